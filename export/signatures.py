"""The functions that TF-Serving hosts: for each SavedModel a module with its signatures.

Every function checks what it is given with `Assert` ops, so that a server answers INVALID_ARGUMENT with one sentence
that names the input. Only core TensorFlow ops are used, float32, integers and strings at the border.
"""

import functools
import json

import keras
import numpy as np
import tensorflow as tf

from export.bpe import GraphTokenizer
from export.numpy_random import standard_normal
from keras_sd.denoiser import Denoiser
from keras_sd.noise import ROW_KEY_SCALE
from keras_sd.samplers import COLUMNS, HISTORY, make_table

MAX_BATCH = 1024  # of the inputs `batch_size`, which are numbers that anybody may send
MAX_PIXELS = 2**26  # of a picture that anybody may send
MAX_STEPS = 250  # tables that `stable_diffusion` carries with it
PUBLISHED_GUIDANCE = 7.5
INPUT_SCALE, TIMESTEP, GUIDANCE, NOISE, SIGMA = (
    COLUMNS.index(name) for name in ("input_scale", "timestep", "guidance", "noise", "sigma")
)


class Module(tf.Module):
    """What one SavedModel holds: `signatures`, and the variables and tables that they use."""

    def __init__(self, signatures, *parts):
        super().__init__()
        # variables in one flat list: OpenVINO does not find those of nested layers
        self.variables_ = [v.value for part in parts if isinstance(part, keras.Model) for v in part.variables]
        self.parts_ = [part for part in parts if not isinstance(part, keras.Model)]
        self.signatures_ = signatures


def _signature(function, **specs):
    """A concrete function whose inputs are `specs`: name → (dtype, shape)."""
    return tf.function(function, autograph=False).get_concrete_function(
        **{name: tf.TensorSpec(shape, dtype, name) for name, (dtype, shape) in specs.items()}
    )


# === Checks: each returns `Assert` ops, which the work waits for ===


def _require(condition, *message):
    return [tf.debugging.Assert(condition, list(message), summarize=8)]


def _check_shapes(**inputs):
    """Name → (tensor, shape): each has its shape, None being any number, and all have as many rows."""
    checks, first, rows = [], None, None
    for name, (tensor, shape) in inputs.items():
        # A server does not compare shapes with the signature. The static shape must go, or this check is folded away.
        found = tf.shape(tf.compat.v1.placeholder_with_default(tensor, None))
        wanted = tf.constant([-1 if n is None else n for n in shape])
        text = ", ".join("batch" if i == 0 else "any" if n is None else str(n) for i, n in enumerate(shape))
        rank = _require(tf.equal(tf.size(found), len(shape)), f"{name} must have the shape ({text}); got", found)
        with tf.control_dependencies(rank):
            fits = tf.reduce_all((found == wanted) | (wanted < 0))
            checks += _require(fits, f"{name} must have the shape ({text}); got", found)
            if rows is None:
                first, rows = name, found[0]
            same = tf.equal(found[0], rows)
            checks += _require(same, f"{name} has", found[0], f"items, {first} has", rows, "; give as many of each.")
    return checks


def _check_finite(**inputs):
    return sum(
        (
            _require(tf.reduce_all(tf.math.is_finite(tensor)), f"{name} holds NaN or infinite numbers.")
            for name, tensor in inputs.items()
        ),
        [],
    )


def _check_range(name, value, low, high):
    return _require(tf.reduce_all((value >= low) & (value <= high)), f"{name} must be from {low} to {high}; got", value)


# === text_encoder ===


def text_encoder(sd, size, compiled):
    model, tokenizer = sd.text_encoder, GraphTokenizer(sd.tokenizer)
    length = sd.tokenizer.max_length
    run = compiled(lambda tokens: tf.cast(model({"tokens": tokens}), tf.float32))
    unconditional_tokens = tf.constant(sd.tokenizer([""]))
    facts = describe(sd, size)
    texts = [json.dumps(facts), *map(json.dumps, facts.values())]
    table = tf.lookup.KeyValueTensorInitializer(["", *facts], texts)
    table = tf.lookup.StaticHashTable(table, "null")

    def serving_default(tokens, batch_size):
        checks = _check_shapes(tokens=(tokens, (None, length))) + _check_range("batch_size", batch_size, 1, MAX_BATCH)
        with tf.control_dependencies(checks):
            context = _for_batch("tokens", run(tokens), batch_size)
            unconditional_context = tf.repeat(run(unconditional_tokens), tf.shape(context)[0], axis=0)
        return {"context": context, "unconditional_context": unconditional_context}

    def encode_prompt(prompt):
        with tf.control_dependencies(_check_shapes(prompt=(prompt, (None,)))):
            tokens, truncated = tokenizer(prompt)
        return {"context": run(tokens), "tokens": tokens, "truncated": truncated}

    def encode_prompt_bytes(prompt):
        outputs = encode_prompt(prompt)
        return {"context_bytes": to_bytes(outputs.pop("context")), **outputs}

    prompt = (tf.string, [None])
    signatures = {
        "serving_default": _signature(serving_default, tokens=(tf.int32, [None, length]), batch_size=(tf.int32, [])),
        "encode_prompt": _signature(encode_prompt, prompt=prompt),
        "encode_prompt_bytes": _signature(encode_prompt_bytes, prompt=prompt),
        # by name; "" is all of it. An input, since TF-Serving's REST API refuses signatures that have none.
        "describe": _signature(lambda names: {"config": table.lookup(names)}, names=(tf.string, [None])),
    }
    return Module(signatures, model, tokenizer, table)


def describe(sd, size):
    """What a client needs to know of a model before it can draw: its scheduler, sizes and the table's columns."""
    height, width = (sd.image_size[i] if side is None else side for i, side in enumerate(size))
    return {
        "preset": str(sd.preset),
        "scheduler": sd.checkpoint.scheduler(),
        "image_size": [height, width],
        "latent_shape": list(sd.latent_shape(height, width)),
        "factor": sd.factor,
        "in_channels": sd.diffusion_model.arguments["in_channels"],
        "history": HISTORY,
        "columns": list(COLUMNS),
    }


def _for_batch(name, tensor, batch_size):
    """One row repeated `batch_size` times, or as many rows as there are pictures."""
    rows = tf.shape(tensor)[0]
    fits = tf.equal(rows, 1) | tf.equal(rows, batch_size) | tf.equal(batch_size, 1)
    with tf.control_dependencies(
        _require(fits, "batch_size is", batch_size, f"and {name} has", rows, "rows; give one row, or as many.")
    ):
        return tf.repeat(tensor, tf.where(tf.equal(rows, 1), batch_size, 1), axis=0)


# === diffusion_model and denoiser ===


def _predicting(model):
    """A model as it predicts: layers then use kernels that have no gradient."""
    return functools.partial(model, training=False)


class _Network:
    """The U-Net as one graph function, so that the branches of a graph share it: for one context of each latent or
    two."""

    def __init__(self, model, compiled):
        self.guided = model.guided
        self.inputs, self._function = model.inputs, compiled(_predicting(self.guided))

    def __call__(self, inputs):
        return self._function(inputs)


class _Step(Denoiser):
    """The denoising step for tables that only the request knows: rows without guidance run half of the batch."""

    def _guided(self, inputs, latent, guidance):
        if self.two_passes:
            return super()._guided(inputs, latent, guidance)
        if "extra" in inputs:
            latent = tf.concat([latent, inputs["extra"]], axis=-1)
        batch, timestep = tf.shape(latent)[0], inputs["row"][:, TIMESTEP]
        working = inputs["row"][:, INPUT_SCALE] != 0.0
        guided = tf.where(tf.reduce_any(working & (inputs["row"][:, GUIDANCE] != 1.0)), batch, 0)
        contexts = tf.concat([inputs["unconditional_context"][:guided], inputs["context"]], axis=0)
        both, _ = self._predict(latent, timestep, contexts)
        conditional = both[guided:]
        unconditional = both[:batch]  # the conditional half itself where there is no other
        return unconditional + guidance * (conditional - unconditional), None


class _Loop:
    """`denoise`: rows of sampler tables, each item with rows of its own, in a while loop around one compiled step."""

    def __init__(self, sd, size, compiled):
        model = sd.diffusion_model
        self.latent = [*_latent_sides(sd, size), model.arguments["out_channels"]]
        self.context = [sd.tokenizer.max_length, model.arguments["cross_attention_dim"]]
        self.extra = model.arguments["in_channels"] - self.latent[-1]
        self.max_rows = 2 * sd.scheduler[0].train_timesteps  # solvers with two evaluations a step
        self.step = _Step(_Network(model, compiled), sd.two_pass_guidance)

    def specs(self, text=False):
        """Inputs of `denoise`; with `text`, of its twin whose tensors are strings of float16."""
        shapes = {
            "latent": self.latent,
            "history": [HISTORY, *self.latent],
            "context": self.context,
            "unconditional_context": self.context,
        }
        if self.extra:
            shapes["extra"] = [*self.latent[:2], self.extra]
        specs = {
            f"{name}_bytes" if text else name: (tf.string, [None]) if text else (tf.float32, [None, *shape])
            for name, shape in shapes.items()
        }
        return specs | {"steps": (tf.float32, [None, None, len(COLUMNS)]), "seed": (tf.int32, [None, 2])}

    def check(self, **inputs):
        checks = _check_shapes(**{name: (inputs[name], spec[1]) for name, spec in self.specs().items()})
        checks += _check_finite(**{name: tensor for name, tensor in inputs.items() if tensor.dtype == tf.float32})
        rows = tf.shape(inputs["steps"])[1]
        return checks + _require(rows <= self.max_rows, f"steps may have up to {self.max_rows} rows; got", rows)

    def denoise(self, **inputs):
        with tf.control_dependencies(self.check(**inputs)):
            return self.run(**inputs)

    def run(self, latent, history, steps, seed, **fixed):
        shape = tf.shape(latent)[1:]

        def fresh(row):
            level = tf.gather(row, [TIMESTEP, SIGMA], axis=1) * tf.constant(ROW_KEY_SCALE, tf.float32)
            return standard_normal(tf.concat([seed, tf.cast(tf.round(level), tf.int32)], axis=1), shape)

        def body(i, latent, history):
            row = steps[:, i]
            noise = tf.cond(tf.reduce_any(row[:, NOISE] != 0), lambda: fresh(row), lambda: tf.zeros_like(latent))
            noise = tf.ensure_shape(noise, latent.shape)
            after = self.step.call({**fixed, "latent": latent, "history": history, "row": row, "noise": noise})
            idle = row[:, INPUT_SCALE, None, None, None] == 0.0
            latent = tf.where(idle, latent, after["latent"])
            return i + 1, latent, tf.where(idle[:, None], history, after["history"])

        # up to the last row that works for anybody: requests are padded with idle rows to be merged
        working = tf.reduce_any(steps[:, :, INPUT_SCALE] != 0.0, axis=0)
        rows = tf.reduce_max(tf.concat([[0], tf.where(working, tf.range(tf.size(working)) + 1, 0)], axis=0))
        _, latent, history = tf.while_loop(
            lambda i, latent, history: i < rows, body, (0, latent, history), maximum_iterations=rows
        )
        return {"latent": latent, "history": history}


def _latent_sides(sd, size):
    return [None if side is None else side // sd.factor for side in size]


def diffusion_model(sd, size, compiled):
    loop = _Loop(sd, size, compiled)
    height, width, channels = sd.latent_shape(*size)
    scheduler = sd.scheduler[0]
    context = (tf.float32, [None, *loop.context])

    def serving_default(context, unconditional_context, num_steps, batch_size):
        shape = (None, *loop.context)
        checks = _check_range("num_steps", num_steps, 1, scheduler.train_timesteps)
        checks += _check_range("batch_size", batch_size, 1, MAX_BATCH)
        checks += _check_shapes(context=(context, shape)) + _check_finite(context=context)
        checks += _check_shapes(unconditional_context=(unconditional_context, shape))
        checks += _check_finite(unconditional_context=unconditional_context)
        with tf.control_dependencies(checks):
            context = _for_batch("context", context, batch_size)
            batch = tf.shape(context)[0]
            latent = tf.random.normal([batch, height, width, channels])
            outputs = loop.run(
                latent=latent,
                history=tf.zeros([batch, HISTORY, height, width, channels]),
                context=context,
                unconditional_context=_for_batch("unconditional_context", unconditional_context, batch),
                steps=tf.repeat(published_rows(scheduler, num_steps)[None], batch, axis=0),
                seed=tf.zeros([batch, 2], tf.int32),
            )
        return {"latent": outputs["latent"]}

    def denoise_bytes(**inputs):
        shapes = {name: shape[1:] for name, (dtype, shape) in loop.specs().items() if dtype == tf.float32}
        decoded = {}
        for name, tensor in inputs.items():
            plain = name.removesuffix("_bytes")
            decoded[plain] = from_bytes(name, tensor, shapes[plain]) if tensor.dtype == tf.string else tensor
        return {f"{name}_bytes": to_bytes(tensor) for name, tensor in loop.denoise(**decoded).items()}

    signatures = {"denoise": _signature(loop.denoise, **loop.specs())}
    if None not in size:
        signatures["denoise_bytes"] = _signature(denoise_bytes, **loop.specs(text=True))
    if not loop.extra:
        signatures["serving_default"] = _signature(
            serving_default,
            context=context,
            unconditional_context=context,
            num_steps=(tf.int32, []),
            batch_size=(tf.int32, []),
        )
    return Module(signatures, sd.diffusion_model)


def published_rows(scheduler, num_steps):
    """The table of the published notebooks, for any number of steps: DDIM at `range(1, T, T // num_steps)`, cut to
    `num_steps` entries, the last step going to the clean picture; guidance 7.5. float32 (num_steps, columns).

    Reference: Song et al. (2021), Denoising Diffusion Implicit Models, arXiv 2010.02502, equation 12.
    """
    total = scheduler.train_timesteps
    timesteps = 1 + total // num_steps * tf.range(num_steps)
    # at as many steps as there are timesteps the range begins at 0
    timesteps = timesteps - tf.maximum(timesteps[-1] - (total - 1), 0)
    alphas = tf.gather(tf.constant(scheduler.alphas_cumprod, tf.float64), timesteps)
    next_alphas = tf.concat([[1.0], alphas[:-1]], axis=0)
    signal, sigma, next_signal, next_sigma = (
        tf.sqrt(x)[::-1] for x in (alphas, 1 - alphas, next_alphas, 1 - next_alphas)
    )
    if scheduler.prediction_type == "epsilon":
        carry, output = next_signal / signal, next_sigma - next_signal * sigma / signal
    elif scheduler.prediction_type == "sample":
        carry, output = next_sigma / sigma, next_signal - next_sigma * signal / sigma
    else:
        carry, output = next_signal * signal + next_sigma * sigma, next_sigma * signal - next_signal * sigma
    one, zero = tf.ones_like(signal), tf.zeros_like(signal)
    columns = dict.fromkeys(COLUMNS, zero) | {
        "input_scale": one,
        "timestep": tf.cast(timesteps[::-1], tf.float64),
        "guidance": PUBLISHED_GUIDANCE * one,
        "output_coef": one,
        "carry": carry,
        "history_0": output,
        "signal": signal,
        "sigma": sigma,
    }
    return tf.cast(tf.stack(list(columns.values()), axis=1), tf.float32)


def denoiser(sd, size, compiled):
    """`denoise` alone: a batching server needs every signature of a model to be batched."""
    loop = _Loop(sd, size, compiled)
    return Module({"serving_default": _signature(loop.denoise, **loop.specs())}, sd.diffusion_model)


# === decoder and image_encoder ===


def decoder(sd, size, compiled):
    decode = _decode(sd, compiled)
    shape = [None, *_latent_sides(sd, size), sd.decoder.arguments["latent_channels"]]

    def serving_default(latent):
        with tf.control_dependencies(_check_shapes(latent=(latent, shape)) + _check_finite(latent=latent)):
            return {"generated_images": decode(latent)}

    def decode_png(latent):
        return {"image_bytes": _to_png(serving_default(latent)["generated_images"])}

    def decode_png_bytes(latent_bytes):
        return decode_png(from_bytes("latent_bytes", latent_bytes, shape[1:]))

    latent = (tf.float32, shape)
    signatures = {
        "serving_default": _signature(serving_default, latent=latent),
        "decode_png": _signature(decode_png, latent=latent),
    }
    if None not in size:
        signatures["decode_png_bytes"] = _signature(decode_png_bytes, latent_bytes=(tf.string, [None]))
    return Module(signatures, sd.decoder)


def _decode(sd, compiled):
    run = compiled(_predicting(sd.decoder))

    def decode(latent):
        image = tf.cast(run(latent), tf.float32)
        return tf.cast(tf.clip_by_value(tf.round((image + 1.0) * 127.5), 0.0, 255.0), tf.uint8)

    return decode


def _to_png(images):
    return tf.map_fn(tf.io.encode_png, images, fn_output_signature=tf.TensorSpec([], tf.string))


def image_encoder(sd, size, compiled):
    run = compiled(_predicting(sd.image_encoder))
    sides = [None if side is None else side // sd.factor * sd.factor for side in size]

    def serving_default(image_bytes):
        with tf.control_dependencies(_check_shapes(image_bytes=(image_bytes, (None,)))):
            images = tf.map_fn(
                lambda image: fit(read_image(image), size, sd.factor),
                image_bytes,
                fn_output_signature=tf.TensorSpec([*sides, 3], tf.float32),
            )
        return {"latent": tf.cast(run(images / 127.5 - 1.0), tf.float32)}

    return Module({"serving_default": _signature(serving_default, image_bytes=(tf.string, [None]))}, sd.image_encoder)


def read_image(image_bytes):
    """PNG, JPEG, GIF or BMP bytes to float32 (H, W, 3) in 0 … 255; transparency is laid over white.

    Rotation in EXIF tags is not applied: no core op reads them, so a client turns the picture first.
    """
    is_png = tf.strings.substr(image_bytes, 0, 4) == b"\x89PNG"
    is_jpeg = tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff"
    is_other = tf.strings.regex_full_match(tf.strings.substr(image_bytes, 0, 3), "GIF|BM(.|\n)")
    begin = tf.strings.substr(image_bytes, 0, 8)
    known = _require(
        is_png | is_jpeg | is_other, "image_bytes must be a PNG, JPEG, GIF or BMP file; it begins with", begin
    )
    with tf.control_dependencies(known):
        header = tf.strings.substr(tf.strings.join([image_bytes, "\0" * 24]), 16, 8)
    sides = tf.case(
        [
            (is_png, lambda: tf.io.decode_raw(header, tf.int32, little_endian=False)),
            (is_jpeg, lambda: tf.io.extract_jpeg_shape(image_bytes)[:2]),
        ],
        lambda: tf.zeros([2], tf.int32),  # those decoders have limits of their own
    )
    few = tf.reduce_all(sides >= 0) & (tf.reduce_prod(tf.cast(sides, tf.int64)) <= MAX_PIXELS)

    def decode_png():
        image = tf.cast(tf.io.decode_png(image_bytes, channels=4), tf.float32)
        opacity = image[:, :, 3:] / 255.0
        return tf.round(image[:, :, :3] * opacity + 255.0 * (1.0 - opacity))

    def decode_other():
        return tf.cast(tf.io.decode_image(image_bytes, channels=3, expand_animations=False), tf.float32)

    with tf.control_dependencies(_require(few, f"image_bytes may have up to {MAX_PIXELS} pixels; got", sides)):
        return tf.ensure_shape(tf.cond(is_png, decode_png, decode_other), [None, None, 3])


def fit(image, size, factor):
    """Scales a picture (H, W, 3) to cover `size` and cuts its middle out, as `keras_sd.images.fit` does."""
    found = tf.shape(image)[:2]
    wanted = tf.stack(
        [tf.maximum(found[i] // factor, 1) * factor if side is None else side for i, side in enumerate(size)]
    )
    spare = found - wanted

    def crop():
        return tf.slice(image, tf.concat([spare // 2, [0]], 0), tf.concat([wanted, [3]], 0))

    def scale():
        old, new = tf.cast(found, tf.float32), tf.cast(wanted, tf.float32)
        factors = tf.repeat(tf.reduce_max(new / old), 2)
        scaled = tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=wanted,
            scale=factors,
            translation=(new - old * factors) / 2.0,
            kernel_type="lanczos3",
            antialias=True,
        )[0]
        return tf.clip_by_value(tf.round(scaled), 0.0, 255.0)

    return tf.cond(tf.reduce_all((spare >= 0) & (spare < factor)), crop, scale)


# === stable_diffusion ===


def stable_diffusion(sd, size, compiled):
    tokenizer, loop, decode = GraphTokenizer(sd.tokenizer), _Loop(sd, size, compiled), _decode(sd, compiled)
    encode = compiled(lambda tokens: tf.cast(sd.text_encoder({"tokens": tokens}), tf.float32))
    height, width, channels = sd.latent_shape(*size)
    rows, begins, lengths, noise_scales = (tf.constant(x) for x in own_tables(sd))
    dtypes = {"prompt": tf.string, "negative_prompt": tf.string, "num_steps": tf.int32}
    dtypes |= {"guidance_scale": tf.float32, "seed": tf.int32}
    specs = {name: (dtype, [None]) for name, dtype in dtypes.items()}

    def serving_default(prompt, negative_prompt, num_steps, guidance_scale, seed):
        inputs = dict(zip(specs, (prompt, negative_prompt, num_steps, guidance_scale, seed)))
        checks = _check_shapes(**{name: (tensor, (None,)) for name, tensor in inputs.items()})
        checks += _check_range("num_steps", num_steps, 1, MAX_STEPS) + _check_finite(guidance_scale=guidance_scale)
        checks += _require(tf.reduce_all(seed >= 0), "seed must be at least 0; got", seed)
        with tf.control_dependencies(checks):
            return {"image_bytes": _to_png(decode(draw(*inputs.values())))}

    def draw(prompt, negative_prompt, num_steps, guidance_scale, seed):
        counts = tf.gather(lengths, num_steps)
        index = tf.range(tf.reduce_max(tf.concat([counts, [0]], 0)))[None]
        within = index < counts[:, None]
        with tf.control_dependencies(
            _require(tf.reduce_all(counts > 0), "num_steps: the model's own sampler has no such table;", num_steps)
        ):
            steps = tf.gather(rows, tf.where(within, tf.gather(begins, num_steps)[:, None] + index, 0))
        # the guidance asked for; a row that waits for a neighbour with more steps is idle
        guidance = tf.one_hot(GUIDANCE, len(COLUMNS), on_value=True, off_value=False)
        steps = tf.where(guidance, guidance_scale[:, None, None], steps)
        noise = standard_normal(seed[:, None], [height, width, channels])
        return loop.run(
            latent=tf.gather(noise_scales, num_steps)[:, None, None, None] * noise,
            history=tf.zeros([tf.shape(noise)[0], HISTORY, height, width, channels]),
            context=encode(tokenizer(prompt)[0]),
            unconditional_context=encode(tokenizer(negative_prompt)[0]),
            steps=tf.where(within[:, :, None], steps, 0.0),
            seed=tf.stack([seed, tf.zeros_like(seed)], axis=1),
        )["latent"]

    function = _signature(serving_default, **specs)
    return Module({"serving_default": function}, sd.text_encoder, sd.diffusion_model, sd.decoder, tokenizer)


def own_tables(sd):
    """The tables of the model's own sampler for 1 … MAX_STEPS steps, one after the other.

    Returns:
        rows float32 (n, columns); for each number of steps, from 0 on: the first row and the number of rows (int32; 0
        where the sampler has no such table), and the factor of the first noise (float32).
    """
    scheduler, name, own_options = sd.scheduler
    tables = [None]
    for num_steps in range(1, MAX_STEPS + 1):
        try:
            tables.append(make_table(name, scheduler, num_steps, **own_options))
        except ValueError:
            tables.append(None)
    lengths = np.array([0 if table is None else len(table) for table in tables], "int32")
    rows = np.concatenate([table.rows for table in tables if table is not None])
    scales = np.array([0.0 if table is None else table.init_noise_scale for table in tables], "float32")
    return rows, (np.cumsum(lengths) - lengths).astype("int32"), lengths, scales


# === Tensors as strings ===

_BYTES = [bytes([byte]) for byte in range(256)]


def to_bytes(tensor):
    """float32 (B, …) → string (B): each item as little-endian float16, in C order."""
    numbers = tf.bitcast(tf.cast(tensor, tf.float16), tf.uint8)
    items = tf.reshape(tf.cast(numbers, tf.int32), [tf.shape(tensor)[0], tf.reduce_prod(tf.shape(numbers)[1:])])
    return tf.strings.reduce_join(tf.gather(tf.constant(_BYTES), items), axis=1)


def from_bytes(name, tensor, shape):
    """The inverse of `to_bytes`: string (B) → float32 (B, *shape)."""
    checks = _check_shapes(**{name: (tensor, (None,))})
    wanted, found = 2 * int(np.prod(shape)), tf.strings.length(tensor)
    text = f"{name} must be {wanted} bytes an item, float16 {tuple(shape)}; got"
    checks += _require(tf.reduce_all(found == wanted), text, found)
    with tf.control_dependencies(checks):
        numbers = tf.io.decode_raw(tensor, tf.float16)
    return tf.reshape(tf.cast(numbers, tf.float32), [-1, *shape])


# name → function (StableDiffusion, size, options) → Module, in the order of the pipeline
MODELS = {
    "text_encoder": text_encoder,
    "diffusion_model": diffusion_model,
    "decoder": decoder,
    "image_encoder": image_encoder,
    "stable_diffusion": stable_diffusion,
    "denoiser": denoiser,
}
