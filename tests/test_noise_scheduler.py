import subprocess
import sys

import numpy as np
import pytest

from keras_sd.noise_scheduler import BETA_SCHEDULES, NoiseScheduler


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_agrees_with_diffusers(beta_schedule, rescale):
    """diffusers computes in float32; relative to that its alphas agree to 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    ours = NoiseScheduler(beta_schedule=beta_schedule, rescale_zero_terminal_snr=rescale)
    theirs = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale
    )
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == np.float64
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-7} if rescale else {"rtol": 1e-5 if beta_schedule != BETA_SCHEDULES[2] else 1e-3}
    )
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), **tolerance)
    sample, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2))
    timesteps = np.array([0, 500, 999])
    arguments = [torch.from_numpy(array) for array in (sample, noise, timesteps)]
    np.testing.assert_allclose(ours.add_noise(sample, noise, timesteps), theirs.add_noise(*arguments), atol=1e-4)
    np.testing.assert_allclose(ours.velocity(sample, noise, timesteps), theirs.get_velocity(*arguments), atol=1e-4)


def test_float64_values():
    scheduler = NoiseScheduler()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-14)
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(scheduler.signal**2 + scheduler.noise_level**2, 1)
    np.testing.assert_allclose(scheduler.snr([0, 999]), (scheduler.signal / scheduler.noise_level)[[0, 999]] ** 2)
    assert NoiseScheduler(rescale_zero_terminal_snr=True).alphas_cumprod[-1] == 0
    assert NoiseScheduler(rescale_zero_terminal_snr=True).snr(999) == 0


def test_trained_betas_replace_the_schedule():
    betas = np.linspace(0.001, 0.02, 10)
    scheduler = NoiseScheduler(train_timesteps=10, trained_betas=betas)
    np.testing.assert_array_equal(scheduler.betas, betas)
    assert scheduler == NoiseScheduler(train_timesteps=10, trained_betas=list(betas))
    assert hash(scheduler) != hash(NoiseScheduler(train_timesteps=10))


def test_training_maths_is_consistent():
    """The clean sample and the noise come back from the noisy sample and the velocity; dtypes are kept."""
    scheduler = NoiseScheduler()
    sample, noise = np.random.default_rng(0).standard_normal((2, 2, 8, 8, 4)).astype("float32")
    for timesteps in (np.array([10, 800]), [10, 800], 300):
        noisy, velocity = (f(sample, noise, timesteps) for f in (scheduler.add_noise, scheduler.velocity))
        assert noisy.dtype == velocity.dtype == np.float32
        signal = scheduler.signal[timesteps].reshape(-1, 1, 1, 1)
        noise_level = scheduler.noise_level[timesteps].reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(signal * noisy - noise_level * velocity, sample, atol=1e-6)
        np.testing.assert_allclose(noise_level * noisy + signal * velocity, noise, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train_timesteps", 0),
        ("train_timesteps", 10.5),
        ("beta_start", -1),
        ("beta_start", "0.1"),
        ("beta_end", 2),
        ("beta_end", 1e-5),
        ("beta_schedule", "cosine"),
        ("prediction_type", "eps"),
        ("rescale_zero_terminal_snr", 3),
        ("trained_betas", [0.1, 0.2]),
    ],
)
def test_a_bad_argument_is_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*, got .*\.$"):
        NoiseScheduler(**{argument: value})


@pytest.mark.parametrize("timesteps", [[1000], [-1], 749.25])
def test_bad_timesteps(timesteps):
    with pytest.raises(ValueError, match="timesteps must be integers from 0 to 999"):
        NoiseScheduler().snr(timesteps)


def test_needs_numpy_alone():
    """Neither Keras nor SciPy nor a backend is imported by the scheduler and the samplers."""
    code = "import sys, keras_sd.samplers; print({'keras', 'scipy', 'torch', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
