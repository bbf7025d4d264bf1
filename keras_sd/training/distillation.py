"""Step distillation: a student that draws in four steps what its teacher draws in many.

    sd.add_lora(rank=16, targets=("attention", "feed_forward", "projection", "convolution"))  # or all of the weights
    teacher = StableDiffusion.from_preset(preset).diffusion_model
    trainer = ConsistencyTrainer(sd.diffusion_model, sd.scheduler[0], teacher=teacher, unconditional_context=empty)
    …
    sd.text_to_image(prompt, num_steps=4, sampler="lcm", unconditional_guidance_scale=1.0)

Reference: Luo et al. (2023), Latent Consistency Models, arXiv 2310.04378, and LCM-LoRA, arXiv 2311.05556.
"""

import keras
import numpy as np
from keras import ops

from keras_sd.layers import timestep_embedding
from keras_sd.training import objective
from keras_sd.training.trainer import DiffusionTrainer

# Of the boundary condition, as the `lcm` sampler has them: the network's share is 0 at timestep 0.
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


class ConsistencyTrainer(DiffusionTrainer):
    """Latent consistency distillation: neighbouring points of the teacher's guided path must lead to one picture.

    The student learns the guidance, too, for a random scale in a range; it is drawn with at scale 1. The target is its
    own prediction at the point that one DDIM step of the teacher leads to, without a gradient (as LCM-LoRA has it).

    Args:
        diffusion_model: the student: the teacher's weights, with LoRA factors or trainable itself.
        scheduler: the `NoiseScheduler` of both.
        teacher: a `DiffusionModel`, which is frozen.
        unconditional_context: (1, 77, width) or (77, width), the context of the empty prompt.
        guidance_range: least and greatest guidance scale, in the convention of `unconditional_guidance_scale`.
        num_ddim_steps: number of points on the teacher's path.
        huber_c: where the pseudo-Huber loss turns from square to absolute; None is the square.
        **kwargs: as in `DiffusionTrainer`.

    Call arguments:
        as in `DiffusionTrainer`; "timestep" must be on the teacher's path, and "guidance" float32 (B,) replaces the
        drawn scales.

    Returns:
        float32 (B,), the loss of each item.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        diffusion_model,
        scheduler,
        text_encoder=None,
        image_encoder=None,
        *,
        teacher,
        unconditional_context,
        guidance_range=(6.0, 16.0),
        num_ddim_steps=50,
        huber_c=0.001,
        **kwargs,
    ):
        super().__init__(
            diffusion_model,
            scheduler,
            text_encoder,
            image_encoder,
            unconditional_context=unconditional_context,
            **kwargs,
        )
        steps = scheduler.train_timesteps
        if unconditional_context is None or teacher is diffusion_model:
            raise ValueError("Distillation needs unconditional_context and a teacher, another model than the student.")
        if not 1 <= num_ddim_steps <= steps or not guidance_range[0] <= guidance_range[1]:
            raise ValueError(
                f"num_ddim_steps must be from 1 to {steps} and guidance_range ascending; got {num_ddim_steps}, "
                f"{guidance_range}."
            )
        teacher.trainable = False
        self.teacher, self.guidance_range, self.huber_c = teacher, guidance_range, huber_c
        self.stride = steps // num_ddim_steps
        self.points = np.arange(1, num_ddim_steps + 1) * self.stride - 1
        scaled = TIMESTEP_SCALING * np.arange(steps)
        self.skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        self.out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)

    def call(self, batch, training=False):
        if training:
            self.step.assign_add(1)
        latent, context = self._latent(batch), self._context(batch)
        noise, start = self._noise(batch, latent), self._timestep(batch, latent)
        end = ops.maximum(start - self.stride, 0)
        guidance = self._guidance(batch, start)[:, None, None, None]
        noisy = objective.noisy(self.scheduler, latent, noise, start)

        prediction = self._consistent(noisy, start, context)

        # === One DDIM step of the guided teacher ===
        empty = ops.cast(self.unconditional_context, context.dtype)
        empty = ops.tile(empty, (ops.shape(context)[0], ops.shape(context)[1] // empty.shape[1], 1))
        conditional, unconditional = (self._estimates(self.teacher, noisy, start, c) for c in (context, empty))
        clean, error = (u + guidance * (c - u) for c, u in zip(conditional, unconditional))
        target = self._consistent(ops.stop_gradient(self._noised(clean, error, end)), end, context)

        difference = ops.square(prediction - ops.stop_gradient(target))
        if self.huber_c is not None:
            difference = ops.sqrt(difference + self.huber_c**2) - self.huber_c
        return ops.mean(difference, axis=(1, 2, 3)) * self._weight(batch, start)

    def _consistent(self, noisy, timestep, context):
        """The consistency function: the clean latent that a point leads to; at timestep 0 the point itself."""
        skip, out = (objective.at_timestep(table, timestep, 4) for table in (self.skip, self.out))
        return skip * noisy + out * self._estimates(self.diffusion_model, noisy, timestep, context)[0]

    def _estimates(self, model, noisy, timestep, context):
        """The clean latent and the noise that a model sees in a noisy latent, whatever it predicts."""
        width = next(x.shape[-1] for x in model.inputs if x.name == "timestep_embedding")
        embedding = timestep_embedding(timestep, width)
        output = ops.cast(model({"latent": noisy, "timestep_embedding": embedding, "context": context}), "float32")
        signal, sigma = self._levels(timestep)
        if self.scheduler.prediction_type == "epsilon":
            return (noisy - sigma * output) / signal, output
        if self.scheduler.prediction_type == "sample":
            return output, (noisy - signal * output) / sigma
        return signal * noisy - sigma * output, signal * output + sigma * noisy

    def _noised(self, clean, error, timestep):
        signal, sigma = self._levels(timestep)
        return signal * clean + sigma * error

    def _levels(self, timestep):
        return (objective.at_timestep(t, timestep, 4) for t in (self.scheduler.signal, self.scheduler.noise_level))

    def _timestep(self, batch, latent):
        if "timestep" in batch:
            return ops.cast(batch["timestep"], "int32")
        count = ops.shape(latent)[:1]
        index = keras.random.randint(count, 0, len(self.points), dtype="int32", seed=self.random)
        return ops.take(self.points.astype("int32"), index, axis=0)

    def _guidance(self, batch, timestep):
        if "guidance" in batch:
            return ops.cast(batch["guidance"], "float32")
        return keras.random.uniform(ops.shape(timestep), *self.guidance_range, seed=self.random)
