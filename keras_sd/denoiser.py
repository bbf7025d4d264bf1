"""One denoising step, compiled by whichever backend runs it, and the loop around it."""

from contextlib import nullcontext

import keras
import numpy as np
from keras import ops
from tqdm.auto import tqdm

from keras_sd.arguments import check_integer, check_ratio
from keras_sd.layers import timestep_embedding
from keras_sd.layers.backend_fixes import FixedShapes
from keras_sd.samplers import HISTORY


@keras.saving.register_keras_serializable(package="keras_sd")
class Denoiser(FixedShapes, keras.Model):
    """One row of a `SamplerTable` as a Keras model, and `denoise`, which runs a whole table.

    Calling it executes one row for every item of a batch, each with a row of its own. `predict_on_batch` compiles the
    call once per shape, on every backend; the table is an input, so that no sampler, step count, strength or guidance
    compiles anew.

    Args:
        diffusion_model: a `DiffusionModel`.
        two_passes: run the network on the unconditional and on the conditional half one after the other instead of
            as one batch of twice the size (`DiffusionModel.guided`): half the memory, a little slower.
        jit_compile: compile with XLA; by default only on JAX.
        control_nets: `ControlNet`s that steer it; what they add sums up.
        guess_mode: they steer the conditional half only, and the less the earlier on the U-Net's way down: the
            pictures they see count for more than the prompt.
        ip_adapter: an `IPAdapter`, whose tokens then follow those of the text in every context.
        cache_interval: compute the deep layers in every so many-th row only, and reuse their result in those between;
            see `DiffusionModel.reusing`. 1 is exact.
        token_merging: part of the tokens, 0 … 0.75, that self-attention at the highest resolution merges; see
            `keras_sd.layers.token_merging`. 0 is exact.

    Call arguments:
        dict with `latent` (B, h, w, C), `history` (B, 5, h, w, C) (the remembered outputs, newest first; zeros at the
        start), `context` (B, N, width), `row` (B, columns) in the order of `keras_sd.samplers.COLUMNS`, and where
        needed `unconditional_context` (B, N, width) (without it there is one pass and no guidance), `noise`
        (B, h, w, C) (only for rows that add noise), `extra` (B, h, w, E) (channels that the network sees beside
        the latent, as inpainting models do), `class_label` int32 (B,) (for networks that have classes), and
        `conditioning` (B, nets, H, W, 3) in [0, 1] with `control_scale` (B, nets) (for rows with ControlNets), and
        `deep` (for rows that reuse what a row with the same inputs beside it returned).

    Returns:
        dict with the next `latent` and `history`, and with `cache_interval` above 1 `deep`, where it was computed.

    Raises:
        ValueError: `cache_interval` or `token_merging` is out of its range, or both ControlNets and a `cache_interval`
            are given.

    Reference: Ho & Salimans (2022), Classifier-Free Diffusion Guidance, arXiv 2207.12598, equation 6 (guidance scale
    1 + w); the row's meaning is in `keras_sd.samplers`; Zhang et al. (2023), arXiv 2302.05543, section 3.4
    (ControlNets under guidance).
    """

    def __init__(
        self,
        diffusion_model,
        two_passes=False,
        jit_compile=None,
        control_nets=(),
        guess_mode=False,
        ip_adapter=None,
        cache_interval=1,
        token_merging=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.diffusion_model = diffusion_model
        self.two_passes = two_passes
        self.control_nets, self.guess_mode = list(control_nets), guess_mode
        self.controlled = diffusion_model.controlled if control_nets else None
        self.ip_adapter = ip_adapter
        self.cache_interval = check_integer("cache_interval", cache_interval, 1)
        self.token_merging = check_ratio("token_merging", token_merging)
        if control_nets and cache_interval > 1:
            raise ValueError(
                f"cache_interval must be 1 with ControlNets, which steer deep layers; got {cache_interval}."
            )
        self.whole, self.shallow = diffusion_model.reusing if cache_interval > 1 else (diffusion_model, None)
        self.guided = None if two_passes or cache_interval > 1 else diffusion_model.guided
        self._functions = {}  # shape of the latent, length of the context → compiled step
        self.compile(jit_compile=keras.backend.backend() == "jax" if jit_compile is None else jit_compile)

    def call(self, inputs, training=False):
        latent, history = inputs["latent"], inputs["history"]
        column = [inputs["row"][:, i, None, None, None] for i in range(6 + HISTORY + 1)]
        input_scale, _, guidance, sample_coef, output_coef, carry = column[:6]
        output, deep = self._guided(inputs, latent * input_scale, guidance)
        remembered = sample_coef * latent + output_coef * output
        history = ops.concatenate([remembered[:, None], history[:, :-1]], axis=1)
        latent = carry * latent
        for j in range(HISTORY):
            latent = latent + column[6 + j] * history[:, j]
        if "noise" in inputs:
            latent = latent + column[6 + HISTORY] * inputs["noise"]
        return {"latent": latent, "history": history, **({} if deep is None else {"deep": deep})}

    def _guided(self, inputs, latent, guidance):
        """The prediction, and the deep features where this row computes them to be reused."""
        timestep, context, label = inputs["row"][:, 1], inputs["context"], inputs.get("class_label")
        deep = inputs.get("deep")
        seen = ops.concatenate([latent, inputs["extra"]], axis=-1) if "extra" in inputs else latent
        if "unconditional_context" not in inputs:
            residuals = self._residuals(inputs, latent, timestep, context)
            return self._predict(seen, timestep, context, label, residuals, deep)
        unconditional_context = inputs["unconditional_context"]
        if self.two_passes:
            residuals = None
            if not self.guess_mode:
                residuals = self._residuals(inputs, latent, timestep, unconditional_context)
            halves = (None, None) if deep is None else ops.split(deep, 2)
            unconditional, first = self._predict(seen, timestep, unconditional_context, label, residuals, halves[0])
            residuals = self._residuals(inputs, latent, timestep, context)
            conditional, second = self._predict(seen, timestep, context, label, residuals, halves[1])
            deep = None if first is None else ops.concatenate([first, second])
        else:
            contexts = ops.concatenate([unconditional_context, context])
            if self.guess_mode:
                residuals = self._residuals(inputs, latent, timestep, context)
                residuals = residuals and [ops.concatenate([ops.zeros_like(x), x]) for x in residuals]
            else:
                doubled = {key: _twice(inputs[key]) for key in ("conditioning", "control_scale") if key in inputs}
                residuals = self._residuals(doubled, _twice(latent), _twice(timestep), contexts)
            if self.guided and residuals is None:
                both, deep = self._predict(seen, timestep, contexts, label, guided=True)
            else:
                both, deep = self._predict(_twice(seen), _twice(timestep), contexts, _twice(label), residuals, deep)
            unconditional, conditional = ops.split(both, 2)
        return unconditional + guidance * (conditional - unconditional), deep

    def _predict(self, latent, timestep, context, label=None, residuals=None, deep=None, guided=False):
        text, picture = self._split(context)
        inputs = {"latent": latent, "timestep_embedding": self._embedding(timestep), "context": text}
        if label is not None:
            inputs["class_label"] = label
        attached = nullcontext() if picture is None else self.ip_adapter.attached(self.diffusion_model, picture)
        merging = self.diffusion_model.merging_tokens(self.token_merging) if self.token_merging else nullcontext()
        with attached, merging:
            if residuals is not None:
                return ops.cast(self.controlled({**inputs, "residuals": residuals}), "float32"), None
            if deep is not None:
                return ops.cast(self.shallow({**inputs, "deep": deep}), "float32"), None
            if guided:
                return ops.cast(self.guided(inputs), "float32"), None
            outputs = self.whole(inputs)
            outputs = outputs if self.shallow else {"prediction": outputs}
            return ops.cast(outputs["prediction"], "float32"), outputs.get("deep")

    def _split(self, context):
        """The tokens of the text, and those of a picture for an IP-Adapter."""
        if self.ip_adapter is None:
            return context, None
        return context[:, : -self.ip_adapter.num_tokens], context[:, -self.ip_adapter.num_tokens :]

    def _residuals(self, inputs, latent, timestep, context):
        """What the ControlNets add to the U-Net, a list of tensors; None in a row without them."""
        if "conditioning" not in inputs:
            return None
        conditioning, scales = inputs["conditioning"], inputs["control_scale"]
        embedding, total = self._embedding(timestep), None
        for i, net in enumerate(self.control_nets):
            residuals = net(
                {
                    "latent": latent,
                    "timestep_embedding": embedding,
                    "context": self._split(context)[0],
                    "conditioning": conditioning[:, i],
                }
            )
            graded = self.guess_mode and not net.arguments["global_pool_conditions"]
            factors = np.logspace(-1, 0, len(residuals)) if graded else np.ones(len(residuals))
            scale = scales[:, i, None, None, None]
            residuals = [x * ops.cast(scale * float(factor), x.dtype) for x, factor in zip(residuals, factors)]
            total = residuals if total is None else [x + y for x, y in zip(total, residuals)]
        return total

    def _embedding(self, timestep):
        width = next(x.shape[-1] for x in self.diffusion_model.inputs if x.name == "timestep_embedding")
        return timestep_embedding(timestep, width)

    def _step(self, inputs):
        # One function per shape: TensorFlow would generalise a second shape to unknown sizes, which cannot be chunked.
        shape = (*inputs["latent"].shape, inputs["context"].shape[1])
        self.predict_function = self._functions.get(shape)
        outputs = self.predict_on_batch(inputs)
        self._functions[shape] = self.predict_function
        return outputs

    def denoise(
        self,
        latent,
        context,
        unconditional_context,
        table,
        noise=None,
        extra=None,
        class_label=None,
        conditioning=None,
        control_scales=None,
        blend=None,
        callback=None,
        estimate=None,
        progress=True,
    ):
        """Runs a table from its first row to its last.

        Args:
            latent: float32 (B, h, w, C), e.g. `table.init_noise_scale * initial_noise(…)`.
            context: (B, N, width), N being 77 for each chunk of the prompt; or a function row → such an array.
            unconditional_context: the same, of the same N; unused, and the network runs once, in rows whose guidance
                is 1.
            table: a `SamplerTable`.
            noise: function row → (B, h, w, C), the fresh noise of stochastic samplers; see `keras_sd.noise.row_noise`.
            extra: (B, h, w, E), further channels at the network's input.
            class_label: int32 (B,), only for networks that have classes.
            conditioning: float32 (1, nets, H, W, 3) in [0, 1], what each of the `control_nets` sees.
            control_scales: float32 (rows, nets), their scales in each row; they do not run where all are 0.
            blend: function (row, latent) → latent, applied after every row (inpainting keeps what is known with it).
            callback: function (row, rows, latent), called after every row. The run stops where it returns False.
            estimate: function (row, latent before it, output remembered in it) → the clean latent that the network
                sees coming, (B, h, w, C). The callback finds it as `latent.clean`, and a stopped run returns it.
            progress: show a progress bar.

        Returns:
            float32 (B, h, w, C).

        Raises:
            ValueError: the table adds noise and `noise` is missing, or the model's prediction is not finite.
        """
        if table.stochastic and not callable(noise):
            raise ValueError(f"noise must be a function row → array for a sampler that adds noise; got {noise!r}.")
        latent = np.asarray(latent, "float32")
        batch_size, rows = latent.shape[0], table.rows
        state = {"latent": latent, "history": np.zeros((batch_size, HISTORY, *latent.shape[1:]), "float32")}
        fixed = {"extra": extra, "class_label": class_label}
        fixed = {key: value for key, value in fixed.items() if value is not None}
        guided = table.guidance != 1.0
        whole = np.arange(len(table)) % self.cache_interval == 0
        whole[1:] |= guided[1:] != guided[:-1]  # what one pass gave is of no use to two
        for i in tqdm(range(len(table)), disable=not progress, leave=False):
            if whole[i]:
                state.pop("deep", None)
            inputs = {**state, **fixed, "row": np.repeat(rows[i : i + 1], batch_size, axis=0)}
            inputs["context"] = _at_row(context, i)
            if guided[i]:
                inputs["unconditional_context"] = _at_row(unconditional_context, i)
            # without noise, too: with other inputs a row would be compiled anew
            inputs["noise"] = np.asarray(noise(i) if table.noise[i] else np.zeros_like(state["latent"]), "float32")
            if conditioning is not None and control_scales[i].any():
                inputs["conditioning"] = np.repeat(conditioning, batch_size, axis=0)
                inputs["control_scale"] = np.repeat(control_scales[i : i + 1], batch_size, axis=0)
            state |= {key: np.asarray(value) for key, value in self._step(inputs).items()}
            if blend is not None:
                state["latent"] = np.asarray(blend(i, state["latent"]), "float32")
            if not np.isfinite(state["latent"]).all():
                raise ValueError(
                    f"The latent is not finite after row {i + 1} of {len(table)} (timestep {table.timestep[i]:g}): "
                    "the weights are damaged or the dtype is too narrow; try dtype='float32'."
                )
            if callback is not None:
                latent = state["latent"].view(_Latent)
                if estimate is not None:
                    clean = estimate(i, inputs["latent"], state["history"][:, 0])
                    latent.clean = clean if blend is None else blend(len(table) - 1, clean)
                if callback(i, len(table), latent) is False:
                    return getattr(latent, "clean", state["latent"])
        return state["latent"]


class _Latent(np.ndarray):
    """An array that may have the attribute `clean`."""


def _at_row(context, row):
    return context(row) if callable(context) else context


def _twice(x):
    return None if x is None else ops.concatenate([x, x])
