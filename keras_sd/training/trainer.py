"""The training step: a batch, random numbers and a diffusion model to a loss."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_sd.layers import timestep_embedding
from keras_sd.layers.int8 import refuse_int8
from keras_sd.training import objective
from keras_sd.training.optimizers import GuardedOptimizer
from keras_sd.weights.streaming import settle


class DiffusionTrainer(keras.Model):
    """Trains whatever is trainable in a diffusion model and a text encoder to predict the noise in noisy latents.

    Which variables are trained is decided by their `trainable` flags (the whole U-Net, LoRA factors, a row of the
    embedding), set before `compile`. The optimizer may be any of Keras'; a step whose gradients are not finite is left
    out, and `gradient_accumulation_steps`, `use_ema` and learning-rate schedules mean updates of the weights, see
    `keras_sd.training.optimizers.GuardedOptimizer`. With float16 layers the loss is scaled dynamically.

    Args:
        diffusion_model: a `DiffusionModel`.
        scheduler: the `NoiseScheduler` that it is trained with; its `prediction_type` decides the target.
        text_encoder: a `TextEncoder`, for batches of tokens.
        image_encoder: an `ImageEncoder`, for batches of images; it is frozen.
        unconditional_context: (1, 77, width) or (77, width), the context of the empty prompt, for `caption_dropout`.
        offset_noise: strength of the noise's own mean, e.g. 0.1; 0 is none.
        min_snr_gamma: where to clip the weights by signal-to-noise ratio, e.g. 5; None weighs all timesteps alike.
        caption_dropout: probability, 0 … 1, with which an item is trained on the unconditional context.
        prior_weight: weight of the prior-preservation pictures' mean loss.
        seed: integer of all random numbers: noise, timesteps, samples of the autoencoder, dropped captions.
        gradient_checkpointing: compute activations again for the gradient; see `DiffusionModel`.

    Call arguments:
        dict of arrays, the first axis of each B. Either "mean", "std" float32 (B, h, w, C), the scaled moments of the
        latents, and "context" (B, 77·n, width); or "image" float32 (B, H, W, 3) in [-1, 1] and "tokens" int32 (B, 77).
        Optional: "prior" bool (B,), prior-preservation pictures; "weight" float32 (B,), factors of the items' losses;
        "noise" float32 (B, h, w, C) and "timestep" int32 (B,), which replace the drawn ones.

    Returns:
        float32 (B,), the weighted mean squared error of each item.

    Raises:
        ValueError: an argument is out of its range, the batch holds what there is no encoder for, or the diffusion
            model's weights are int8.

    Example:
        trainer = DiffusionTrainer(sd.diffusion_model, sd.scheduler[0], min_snr_gamma=5.0)
        trainer.compile(keras.optimizers.AdamW(1e-5, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9999))
        trainer.fit(batches(cache, batch_size=4, epochs=10), callbacks=[…])

    References: Ho et al. (2020), arXiv 2006.11239, algorithm 1; `keras_sd.training.objective` has the others.
    """

    def __init__(
        self,
        diffusion_model,
        scheduler,
        text_encoder=None,
        image_encoder=None,
        *,
        unconditional_context=None,
        offset_noise=0.0,
        min_snr_gamma=None,
        caption_dropout=0.0,
        prior_weight=1.0,
        seed=0,
        gradient_checkpointing=False,
    ):
        super().__init__(name="diffusion_trainer")
        refuse_int8(diffusion_model, "Training")
        settle(diffusion_model)
        _check("offset_noise", offset_noise, offset_noise >= 0, "0 or more")
        _check("caption_dropout", caption_dropout, 0 <= caption_dropout <= 1, "from 0 to 1")
        _check("prior_weight", prior_weight, prior_weight >= 0, "0 or more")
        _check("min_snr_gamma", min_snr_gamma, min_snr_gamma is None or min_snr_gamma > 0, "above 0, or None")
        if caption_dropout and unconditional_context is None:
            raise ValueError("caption_dropout needs unconditional_context, the context of the empty prompt.")
        self.diffusion_model, self.scheduler = diffusion_model, scheduler
        self.text_encoder, self.image_encoder, self.moments = text_encoder, image_encoder, None
        if image_encoder is not None:
            image_encoder.trainable = False
            self.moments = image_encoder.moments
        if unconditional_context is not None:
            width = np.shape(unconditional_context)[-1]
            unconditional_context = np.reshape(np.asarray(unconditional_context, "float32"), (1, -1, width))
        self.unconditional_context = unconditional_context
        self.offset_noise, self.caption_dropout, self.prior_weight = offset_noise, caption_dropout, prior_weight
        self.timestep_weights = None
        if min_snr_gamma is not None:
            self.timestep_weights = objective.min_snr_weights(scheduler, min_snr_gamma)
        self.random = keras.random.SeedGenerator(seed)
        self.step = keras.Variable(0, dtype="int32", trainable=False, name="step")
        diffusion_model.gradient_checkpointing = gradient_checkpointing
        self.built = True

    def compile(self, optimizer, **kwargs):
        """As `keras.Model.compile`, without losses and metrics: the loss is the trainer's own.

        Args:
            optimizer: a Keras optimizer. It is built at once, so `trainable` flags are set before.
            **kwargs: `jit_compile` (by default only on JAX), `run_eagerly`, `steps_per_execution`.

        Raises:
            ValueError: nothing is trainable, or gradients are to be accumulated over several devices of TensorFlow.
        """
        if not self.trainable_variables:
            raise ValueError("Nothing to train: no variable of the diffusion model or the text encoder is trainable.")
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.replicas = getattr(getattr(self, "distribute_strategy", None), "num_replicas_in_sync", 1)
        if not scaled:
            if not isinstance(optimizer, GuardedOptimizer):
                optimizer = GuardedOptimizer(optimizer)
            optimizer.conditional = self.replicas == 1
            if self.replicas > 1 and optimizer.accumulation_steps > 1:
                raise ValueError(
                    f"Gradients of {optimizer.accumulation_steps} batches cannot be accumulated on several devices of "
                    "TensorFlow: take larger batches, or KERAS_BACKEND=jax."
                )
        if not scaled and _computes_in_float16(self.diffusion_model):
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        if not optimizer.built:
            optimizer.build(self.trainable_variables)
        kwargs.setdefault("jit_compile", keras.backend.backend() == "jax")
        super().compile(optimizer=optimizer, **kwargs)

    @property
    def steps_done(self):
        """Number of steps (batches) since the run began, those before a restart included."""
        return int(ops.convert_to_numpy(self.step))

    @property
    def guard(self):
        """The `GuardedOptimizer` of the compiled trainer, or None."""
        optimizer = self.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        return optimizer if isinstance(optimizer, GuardedOptimizer) else None

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within the block the trained variables have the values of their moving averages, where there are such."""
        averages = getattr(self.guard, "averages", None)
        if averages is None:
            yield
            return
        variables = list(self.trainable_variables)  # fused factors are no longer among them at the end
        raw = [np.array(ops.convert_to_numpy(v)) for v in variables]
        try:
            for variable, average in zip(variables, averages):
                variable.assign(ops.copy(ops.cast(average, variable.dtype)))
            yield
        finally:
            for variable, value in zip(variables, raw):
                variable.assign(value)

    # === One step ===

    def call(self, batch, training=False):
        if training:
            self.step.assign_add(1)
        latent, context = self._latent(batch), self._context(batch)
        noise, timestep = self._noise(batch, latent), self._timestep(batch, latent)
        width = next(x.shape[-1] for x in self.diffusion_model.inputs if x.name == "timestep_embedding")
        inputs = {
            "latent": objective.noisy(self.scheduler, latent, noise, timestep),
            "timestep_embedding": timestep_embedding(timestep, width),
            "context": context,
        }
        prediction = self._predict(inputs, batch)
        target = objective.target(self.scheduler, latent, noise, timestep)
        error = ops.mean(ops.square(ops.cast(prediction, "float32") - target), axis=(1, 2, 3))
        return error * self._weight(batch, timestep)

    def _predict(self, inputs, batch):
        return self.diffusion_model(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = objective.loss(y_pred, x.get("prior"), self.prior_weight)
        return loss / self.replicas  # the gradients of MirroredStrategy's devices are summed

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The loss of this very step; the history has the mean over the epoch."""
        return {"loss": objective.loss(y_pred, x.get("prior"), self.prior_weight)}

    def _latent(self, batch):
        if "mean" in batch:
            mean, std = (ops.cast(batch[key], "float32") for key in ("mean", "std"))
        elif "image" not in batch:
            raise ValueError(f'A batch must hold "mean" and "std", or "image"; it holds {sorted(batch)}.')
        elif self.moments is None:
            raise ValueError("A batch of images needs image_encoder.")
        else:
            moments = self.moments(batch["image"])
            mean, log_variance = (ops.stop_gradient(ops.cast(x, "float32")) for x in moments)
            mean = mean * self.image_encoder.scaling_factor
            std = ops.exp(0.5 * log_variance) * self.image_encoder.scaling_factor
        return mean + std * self._normal(ops.shape(mean))

    def _context(self, batch):
        if "context" in batch:
            context = batch["context"]
        elif "tokens" not in batch:
            raise ValueError(f'A batch must hold "context" or "tokens"; it holds {sorted(batch)}.')
        elif self.text_encoder is None:
            raise ValueError("A batch of tokens needs text_encoder.")
        else:
            context = self.text_encoder({"tokens": batch["tokens"]})
        if not self.caption_dropout:
            return context
        drop = keras.random.uniform(ops.shape(context)[:1], seed=self.random) < self.caption_dropout
        return objective.drop_captions(context, self.unconditional_context, drop)

    def _noise(self, batch, latent):
        if "noise" in batch:
            return ops.cast(batch["noise"], "float32")
        noise = self._normal(ops.shape(latent))
        if not self.offset_noise:
            return noise
        count, channels = ops.shape(latent)[0], latent.shape[-1]
        return objective.offset_noise(noise, self._normal((count, 1, 1, channels)), self.offset_noise)

    def _timestep(self, batch, latent):
        if "timestep" in batch:
            return ops.cast(batch["timestep"], "int32")
        steps = self.scheduler.train_timesteps
        return keras.random.randint(ops.shape(latent)[:1], 0, steps, dtype="int32", seed=self.random)

    def _weight(self, batch, timestep):
        weight = ops.ones(ops.shape(timestep), "float32")
        if self.timestep_weights is not None:
            weight = objective.at_timestep(self.timestep_weights, timestep)
            if "prior" in batch:  # as in diffusers' DreamBooth, they are weighted by `prior_weight` alone
                weight = ops.where(batch["prior"], 1.0, weight)
        return weight * ops.cast(batch["weight"], "float32") if "weight" in batch else weight

    def _normal(self, shape):
        return keras.random.normal(shape, dtype="float32", seed=self.random)


def _computes_in_float16(model):
    return any(layer.compute_dtype == "float16" for layer in model.layers)


def _check(name, value, condition, wanted):
    if not condition:
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")
