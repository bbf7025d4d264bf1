"""Latent consistency distillation: the loss against an independent torch loop, and a student that learns."""

import diffusers
import keras
import numpy as np
import pytest
import torch

from keras_sd import StableDiffusion
from keras_sd.training.distillation import ConsistencyTrainer


def batch_of(seed, **changed):
    random = np.random.default_rng(seed)
    batch = {
        "mean": random.standard_normal((2, 8, 8, 4)).astype("float32"),
        "std": np.zeros((2, 8, 8, 4), "float32"),
        "noise": random.standard_normal((2, 8, 8, 4)).astype("float32"),
        "context": random.standard_normal((2, 77, 32)).astype("float32"),
        "timestep": np.array([19, 999], "int32"),
        "guidance": np.array([7.5, 3.0], "float32"),
    }
    return batch | changed


EMPTY = np.random.default_rng(9).standard_normal((77, 32)).astype("float32")


def make_trainer(folder, **kwargs):
    """A student with LoRA factors that are not zero, and its teacher."""
    sd = StableDiffusion.from_preset(folder)
    teacher = StableDiffusion.from_preset(folder).diffusion_model
    sd.add_lora(rank=2)
    random = np.random.default_rng(0)
    for variable in sd.diffusion_model.trainable_variables:
        variable.assign(random.standard_normal(variable.shape) * 0.1)
    scheduler = kwargs.pop("scheduler", sd.scheduler[0])
    trainer = ConsistencyTrainer(sd.diffusion_model, scheduler, teacher=teacher, unconditional_context=EMPTY, **kwargs)
    return sd, trainer


def torch_losses(student, teacher, kind, batch, huber_c):
    """The losses of diffusers' `train_lcm_distill_lora_sd`, by its formulas."""
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = scheduler.alphas_cumprod
    latent, noise = (torch.from_numpy(np.moveaxis(batch[key], -1, 1).copy()) for key in ("mean", "noise"))
    context, start = torch.from_numpy(batch["context"]), torch.from_numpy(batch["timestep"]).long()
    empty = torch.from_numpy(EMPTY)[None].repeat(2, 1, 1)
    end = (start - 20).clamp(min=0)

    def estimates(unet, x, timestep, context):
        output = unet(x, timestep, context).sample
        a, s = (c[timestep][:, None, None, None] for c in (alphas.sqrt(), (1 - alphas).sqrt()))
        if kind == "v_prediction":
            return a * x - s * output, a * output + s * x
        return (x - s * output) / a, output

    def consistent(x, timestep):
        skip, out = zip(*(scheduler.get_scalings_for_boundary_condition_discrete(t) for t in timestep.double()))
        skip, out = (torch.stack(c).float()[:, None, None, None] for c in (skip, out))
        return skip * x + out * estimates(student, x, timestep, context)[0]

    with torch.no_grad():
        noisy = scheduler.add_noise(latent, noise, start)
        prediction = consistent(noisy, start)
        w = torch.from_numpy(batch["guidance"])[:, None, None, None] - 1
        (clean, error), (clean_empty, error_empty) = (estimates(teacher, noisy, start, c) for c in (context, empty))
        clean, error = clean + w * (clean - clean_empty), error + w * (error - error_empty)
        a = alphas[end][:, None, None, None]
        target = consistent(a.sqrt() * clean + (1 - a).sqrt() * error, end)
        squares = (prediction - target) ** 2
        losses = squares if huber_c is None else torch.sqrt(squares + huber_c**2) - huber_c
        return losses.mean(dim=(1, 2, 3)).numpy()


@pytest.mark.parametrize("kind, huber_c", [("epsilon", 0.001), ("v_prediction", None)])
def test_losses_equal_torch(tiny, tmp_path, kind, huber_c):
    from keras_sd import NoiseScheduler

    sd, trainer = make_trainer(tiny, scheduler=NoiseScheduler(prediction_type=kind), huber_c=huber_c)
    ours = keras.ops.convert_to_numpy(trainer(batch_of(1)))
    sd.save_lora(tmp_path / "a.safetensors")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    teacher = diffusers.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet")
    peer.load_lora_weights(tmp_path / "a.safetensors")
    np.testing.assert_allclose(ours, torch_losses(peer.unet, teacher, kind, batch_of(1), huber_c), rtol=1e-3)


def test_only_the_student_learns(tiny):
    sd, trainer = make_trainer(tiny)
    assert all("lora" in v.path for v in trainer.trainable_variables)
    before = [np.array(v) for v in trainer.teacher.variables]
    trainer.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    losses = [float(trainer.train_on_batch(batch_of(1))) for _ in range(8)]
    assert min(losses[-2:]) < 0.9 * losses[0]
    assert all(np.array_equal(v, b) for v, b in zip(trainer.teacher.variables, before))


def test_what_is_drawn(tiny):
    """Timesteps on the teacher's path, guidance in its range, the same for the same seed."""
    _, trainer = make_trainer(tiny, num_ddim_steps=10, guidance_range=(2.0, 3.0))
    assert trainer.points.tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    latent = np.zeros((200, 8, 8, 4), "float32")
    timestep = keras.ops.convert_to_numpy(trainer._timestep({}, latent))
    assert set(timestep) == set(trainer.points)
    guidance = keras.ops.convert_to_numpy(trainer._guidance({}, timestep))
    assert 2 <= guidance.min() < 2.1 and 2.9 < guidance.max() <= 3


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"num_ddim_steps": 0}, "num_ddim_steps must be from 1 to 1000"),
        ({"guidance_range": (9.0, 2.0)}, "guidance_range ascending"),
        ({"unconditional_context": None}, "needs unconditional_context"),
        ({"teacher": "the student"}, "another model than the student"),
    ],
)
def test_bad_arguments(tiny, arguments, error):
    sd = StableDiffusion.from_preset(tiny)
    model = sd.diffusion_model
    defaults = {"teacher": object(), "unconditional_context": EMPTY}
    arguments = defaults | {k: model if v == "the student" else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=error):
        ConsistencyTrainer(model, sd.scheduler[0], **arguments)
