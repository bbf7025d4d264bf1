"""The trainer against an independent loop of torch and diffusers, and against the formulas of the papers."""

import json
import math
import os
import pathlib
import subprocess
import sys

import diffusers
import keras
import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from train_steps import batch, small_unet

from keras_sd import NoiseScheduler, StableDiffusion
from keras_sd.models import ImageEncoder, TextEncoder
from keras_sd.training import objective
from keras_sd.training.optimizers import Adafactor, AdamW, AdamW8bit, GuardedOptimizer, Schedule
from keras_sd.training.trainer import DiffusionTrainer
from keras_sd.training.watching import (
    DrawPictures,
    Progress,
    StopWhenBroken,
    Summaries,
    WriteScalars,
)
from keras_sd.weights.assign import state_dict_key, to_torch_layout

ROOT = pathlib.Path(__file__).parents[1]
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def weights(trainer):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in trainer.trainable_variables]


def furthest(a, b):
    return max(np.abs(x.astype("float32") - y.astype("float32")).max() for x, y in zip(a, b))


# === Against torch and diffusers ===


def torch_loop(folder, prediction_type, gamma, batches):
    """Ten steps as diffusers' train_text_to_image.py makes them: losses, state dict, averaged state dict."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    scheduler = diffusers.DDPMScheduler(**SCHEDULER, prediction_type=prediction_type)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2, eps=1e-8)
    average = EMAModel(unet.parameters(), decay=0.9999)
    losses = []
    for arrays in batches:
        latent, noise = (torch.from_numpy(arrays[key]).permute(0, 3, 1, 2) for key in ("mean", "noise"))
        timestep, context = torch.from_numpy(arrays["timestep"]).long(), torch.from_numpy(arrays["context"])
        wanted = noise if prediction_type == "epsilon" else scheduler.get_velocity(latent, noise, timestep)
        predicted = unet(scheduler.add_noise(latent, noise, timestep), timestep, context).sample
        loss = torch.nn.functional.mse_loss(predicted, wanted, reduction="none").mean(dim=(1, 2, 3))
        if gamma:
            snr = compute_snr(scheduler, timestep)
            clipped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
            loss = loss * clipped / (snr if prediction_type == "epsilon" else snr + 1)
        loss = loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        losses.append(loss.item())
    raw = {name: value.detach().numpy().copy() for name, value in unet.state_dict().items()}
    average.copy_to(unet.parameters())
    return losses, raw, {name: value.detach().numpy() for name, value in unet.state_dict().items()}


@pytest.mark.parametrize("prediction_type, gamma", [("epsilon", None), ("v_prediction", 5.0)])
def test_ten_steps_equal_those_of_diffusers(tiny, prediction_type, gamma):
    batches = [batch(seed, width=32) for seed in range(10)]
    losses, raw, average = torch_loop(tiny, prediction_type, gamma, batches)

    model = StableDiffusion.from_preset(str(tiny)).diffusion_model
    trainer = DiffusionTrainer(model, NoiseScheduler(prediction_type=prediction_type), min_snr_gamma=gamma)
    optimizer = AdamW(1e-3, weight_decay=1e-2, epsilon=1e-8, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9999)
    trainer.compile(GuardedOptimizer(optimizer, ema_warmup=True))
    np.testing.assert_allclose([trainer.train_on_batch(one) for one in batches], losses, rtol=1e-4)

    def error(expected):
        return max(
            np.abs(to_torch_layout(np.asarray(v)) - expected[state_dict_key(v)]).max()
            for v in model.trainable_variables
        )

    moved = max(np.abs(raw[name] - average[name]).max() for name in raw)
    assert error(raw) < 1e-4 and moved > 5e-4  # the average is told apart from the weights
    with trainer.averaged_weights():
        assert error(average) < 1e-4
    assert error(raw) < 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_those_of_diffusers(prediction_type):
    snr = compute_snr(diffusers.DDPMScheduler(**SCHEDULER), torch.arange(1000))
    clipped = torch.minimum(snr, torch.tensor(5.0))
    expected = clipped / (snr if prediction_type == "epsilon" else snr + 1)
    found = objective.min_snr_weights(NoiseScheduler(prediction_type=prediction_type), 5.0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_min_snr_weights_are_finite_at_zero_terminal_snr():
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = NoiseScheduler(prediction_type=prediction_type, rescale_zero_terminal_snr=True)
        assert np.isfinite(objective.min_snr_weights(scheduler, 5.0)).all()


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_equal_those_of_diffusers(kind):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose([float(Schedule(kind, 0.5, 20, 4)(i)) for i in range(20)], expected, atol=1e-6)


# === Accumulation, averages, guard ===


def test_accumulation_of_two_equals_a_batch_of_twice_the_size():
    def optimizer(steps):
        schedule = Schedule("linear", 1e-2, 8, 2)
        return keras.optimizers.AdamW(
            schedule, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=steps
        )

    whole, halves = (DiffusionTrainer(small_unet(trained="mid"), NoiseScheduler()) for _ in range(2))
    whole.compile(optimizer(None))
    halves.compile(optimizer(2))
    for seed in range(4):
        arrays = batch(seed)
        whole.train_on_batch(arrays)
        for half in (slice(0, 2), slice(2, 4)):
            halves.train_on_batch({key: value[half] for key, value in arrays.items()})
    assert int(whole.guard.iterations) == int(halves.guard.iterations) == 4
    assert furthest(weights(whole), weights(halves)) < 1e-4
    assert furthest(*([np.asarray(a) for a in t.guard.averages] for t in (whole, halves))) < 1e-4


def test_averages_follow_their_formula_and_fit_keeps_the_weights():
    trainer = DiffusionTrainer(small_unet(trained="mid"), NoiseScheduler())
    trainer.compile(keras.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.7))
    expected, seen = None, []

    class Follow(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            nonlocal expected
            seen.append(weights(trainer))
            expected = seen[-1] if expected is None else [0.7 * a + 0.3 * w for a, w in zip(expected, seen[-1])]

    data = ((batch(seed),) for seed in range(5))
    trainer.fit(data, steps_per_epoch=5, callbacks=[Follow()], verbose=0)
    assert furthest(expected, [np.asarray(a) for a in trainer.guard.averages]) < 1e-6
    assert furthest(weights(trainer), seen[-1]) == 0
    with trainer.averaged_weights():
        assert furthest(weights(trainer), expected) < 1e-6
    assert furthest(weights(trainer), seen[-1]) == 0


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_a_step_that_is_not_finite_changes_nothing_and_many_end_training(dtype):
    trainer = DiffusionTrainer(small_unet(dtype, trained="up"), NoiseScheduler())
    trainer.compile(keras.optimizers.AdamW(1e-2, use_ema=True))
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == (dtype == "mixed_float16")
    before = weights(trainer)
    assert math.isfinite(trainer.train_on_batch(batch(0)))
    good = weights(trainer)
    assert furthest(before, good) > 1e-3 and int(trainer.guard.taken) == 1
    broken = batch(1)
    broken["mean"][0, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row, up to step 4"):
        trainer.fit(((broken,) for _ in range(9)), callbacks=[StopWhenBroken(patience=3)], verbose=0)
    assert furthest(weights(trainer), good) == 0 and int(trainer.guard.taken) == 1
    assert math.isfinite(trainer.train_on_batch(batch(0)))


# === Objective ===


def test_prior_preservation_is_that_of_dreambooth():
    error, prior = np.array([1.0, 2.0, 10.0, 30.0], "float32"), np.array([False, True, False, True])
    assert float(objective.loss(error)) == 10.75
    assert float(objective.loss(error, prior, 0.5)) == 5.5 + 0.5 * 16.0
    assert float(objective.loss(error, np.zeros(4, bool), 0.5)) == 10.75


def test_weights_priors_and_min_snr_of_the_items():
    trainer = DiffusionTrainer(small_unet(), NoiseScheduler(), min_snr_gamma=5.0)
    arrays = batch(0)
    plain = np.asarray(DiffusionTrainer(trainer.diffusion_model, NoiseScheduler())(arrays))
    factor = objective.min_snr_weights(NoiseScheduler(), 5.0)[arrays["timestep"]]
    np.testing.assert_allclose(trainer(arrays), plain * factor, rtol=1e-5)
    arrays["prior"] = np.array([True, False, False, True])
    arrays["weight"] = np.array([2.0, 1.0, 0.5, 0.0], "float32")
    expected = plain * np.where(arrays["prior"], 1.0, factor) * arrays["weight"]
    np.testing.assert_allclose(trainer(arrays), expected, rtol=1e-5)


def test_dropped_captions_get_the_unconditional_context():
    empty = np.random.default_rng(9).standard_normal((77, 8), "float32")
    trainer = DiffusionTrainer(small_unet(), NoiseScheduler(), unconditional_context=empty, caption_dropout=1.0)
    arrays = {**batch(0), "context": batch(0)["context"].repeat(2, axis=1)}
    dropped = np.asarray(trainer(arrays))
    arrays["context"] = np.broadcast_to(np.tile(empty, (2, 1)), arrays["context"].shape)
    trainer.caption_dropout = 0.0
    np.testing.assert_allclose(dropped, trainer(arrays), rtol=1e-5)
    some = objective.drop_captions(np.ones((2, 77, 8), "float32"), empty[None], np.array([True, False]))
    np.testing.assert_allclose(some, np.stack([empty, np.ones_like(empty)]), rtol=1e-6)


def test_offset_noise_has_the_variance_that_it_should():
    trainer = DiffusionTrainer(small_unet(), NoiseScheduler(), offset_noise=0.5)
    noise = np.asarray(trainer._noise({}, np.zeros((400, 8, 8, 4), "float32")))
    assert abs(noise.mean(axis=(1, 2)).var() - (0.25 + 1 / 64)) < 0.03


def test_pictures_and_tokens_are_encoded():
    encoder = ImageEncoder(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    text = TextEncoder(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = small_unet()
    trainer = DiffusionTrainer(model, NoiseScheduler(), text, encoder)
    random = np.random.default_rng(0)
    image = random.uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
    tokens = random.integers(50, size=(2, 77)).astype("int32")
    fixed = {key: batch(0, size=2)[key] for key in ("noise", "timestep")}
    mean, log_variance = (np.asarray(x) for x in encoder.moments(image))
    cached = {
        "mean": mean * encoder.scaling_factor,
        "std": np.exp(0.5 * log_variance) * encoder.scaling_factor,
        "context": np.asarray(text({"tokens": tokens})),
    }
    state = np.array(trainer.random.state)
    found = trainer({"image": image, "tokens": tokens, **fixed})
    trainer.random.state.assign(state)
    np.testing.assert_allclose(found, trainer({**cached, **fixed}), rtol=1e-4)
    assert not encoder.trainable_variables
    assert len(trainer.trainable_variables) == len(model.trainable_variables) + len(text.trainable_variables)


def test_what_cannot_be_trained_is_said():
    model = small_unet()
    with pytest.raises(ValueError, match="caption_dropout needs unconditional_context"):
        DiffusionTrainer(model, NoiseScheduler(), caption_dropout=0.1)
    with pytest.raises(ValueError, match="caption_dropout must be from 0 to 1; got 2"):
        DiffusionTrainer(model, NoiseScheduler(), caption_dropout=2)
    trainer = DiffusionTrainer(model, NoiseScheduler())
    with pytest.raises(ValueError, match="needs image_encoder"):
        trainer({"image": np.zeros((1, 8, 8, 3), "float32"), "context": np.zeros((1, 77, 8), "float32")})
    with pytest.raises(ValueError, match='must hold "context" or "tokens"'):
        trainer({"mean": np.zeros((1, 8, 8, 4), "float32"), "std": np.zeros((1, 8, 8, 4), "float32")})
    model.trainable = False
    with pytest.raises(ValueError, match="Nothing to train"):
        trainer.compile(keras.optimizers.AdamW(1e-3))


def test_gradient_checkpointing_gives_the_same_gradients():
    def step(gradient_checkpointing):
        trainer = DiffusionTrainer(small_unet(), NoiseScheduler(), gradient_checkpointing=gradient_checkpointing)
        before = weights(trainer)
        trainer.compile(keras.optimizers.SGD(1.0))
        trainer.train_on_batch(batch(0))
        assert trainer.diffusion_model.gradient_checkpointing == gradient_checkpointing
        return [after - start for after, start in zip(weights(trainer), before)]

    kept, recomputed = step(False), step(True)
    assert max(np.abs(g).max() for g in kept) > 0.01
    assert all(np.abs(g).max() > 0 for g in recomputed)
    assert furthest(kept, recomputed) < 1e-5


# === Optimizers with little state ===


def descend(optimizer, steps=20):
    random = np.random.default_rng(0)
    shapes = (64, 80), (3, 3, 16, 32), (10,)
    variables = [keras.Variable(random.standard_normal(shape, "float32")) for shape in shapes]
    goals = [random.standard_normal(shape, "float32") for shape in shapes]
    optimizer.build(variables)
    for _ in range(steps):
        optimizer.apply([keras.ops.convert_to_tensor(np.asarray(v) - g) for v, g in zip(variables, goals)])
    return [np.asarray(v) for v in variables], sum(math.prod(v.shape) * v.value.dtype.size for v in optimizer.variables)


def test_adafactor_is_that_of_keras_with_little_state():
    expected, much = descend(keras.optimizers.Adafactor(0.1))
    found, little = descend(Adafactor(0.1))
    assert furthest(expected, found) < 1e-5
    assert little < much / 10


def test_moments_of_eight_bits_descend_as_those_of_thirty_two():
    expected, much = descend(AdamW(0.01))
    found, little = descend(AdamW8bit(0.01))
    assert max(np.abs(a - b).mean() for a, b in zip(expected, found)) < 0.02 * 0.2  # of 20 steps of 0.01
    assert furthest(expected, found) < 0.02
    assert little < 0.3 * much


# === Watching ===


def test_scalars_and_pictures_are_written(tmp_path):
    from tensorflow.core.util.event_pb2 import Event

    trainer = DiffusionTrainer(small_unet(trained="conv_out"), NoiseScheduler())
    trainer.compile(keras.optimizers.AdamW(Schedule("constant", 1e-3, 4)))
    summaries = Summaries(tmp_path / "log")
    drawn = np.arange(2 * 8 * 8 * 3, dtype="uint8").reshape(2, 8, 8, 3)
    callbacks = [
        Progress(steps=4, batch_size=4),
        WriteScalars(summaries, batch_size=4, every=2),
        DrawPictures(lambda: drawn, tmp_path / "pictures", every=4, summaries=summaries),
        StopWhenBroken(),
    ]
    trainer.fit(((batch(seed),) for seed in range(4)), steps_per_epoch=4, callbacks=callbacks, verbose=0)

    import tensorflow as tf

    records = tf.data.TFRecordDataset([str(path) for path in (tmp_path / "log").iterdir()])
    values = [(e.step, v) for e in (Event.FromString(r.numpy()) for r in records) for v in e.summary.value]
    assert {(step, value.tag) for step, value in values} == {
        *(
            (step, tag)
            for step in (2, 4)
            for tag in ("loss", "learning_rate", "images_per_second", "peak_memory_bytes")
        ),
        (4, "validation"),
    }
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-00000004.png"]


# === Backends ===

SCRIPT = """
import json, sys
import keras
import numpy as np
sys.path.insert(0, "tests")
from train_steps import batch, small_unet
from keras_sd import NoiseScheduler
from keras_sd.training.optimizers import AdamW
from keras_sd.training.trainer import DiffusionTrainer

model = small_unet(trained="mid")
random = np.random.default_rng(3)
model.set_weights([random.normal(0, 0.05, w.shape) + (w.ndim == 1) for w in model.get_weights()])
trainer = DiffusionTrainer(model, NoiseScheduler(prediction_type="v_prediction"), min_snr_gamma=5.0,
                           gradient_checkpointing=True)
trainer.compile(AdamW(1e-2, global_clipnorm=1.0, use_ema=True, gradient_accumulation_steps=2))
losses = [trainer.train_on_batch(batch(seed)) for seed in range(4)]
broken = batch(4)
broken["mean"] *= np.nan
trainer.train_on_batch(broken)
losses.append(trainer.train_on_batch(batch(5)))
drawn = trainer.train_on_batch(batch(6, fixed=False))
print(json.dumps([losses, int(trainer.guard.taken), bool(np.isfinite(drawn))]))
"""


def test_the_same_losses_on_every_backend():
    found = {}
    for backend in ("tensorflow", "jax", "torch"):
        env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, check=True, capture_output=True, text=True
        )
        found[backend], taken, finite = json.loads(result.stdout.splitlines()[-1])
        assert taken == 6 and finite
    assert found["tensorflow"][0] != found["tensorflow"][3]
    for backend in ("jax", "torch"):
        np.testing.assert_allclose(found[backend], found["tensorflow"], rtol=1e-4)
