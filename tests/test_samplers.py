"""Every table against the diffusers scheduler of its kind, on a non-linear toy model.

diffusers keeps its schedules in float32, so agreement ends near 1e-6; `FLOAT32` lists where its rounding is worse.
"""

import copy
import inspect
import json
import sys

import numpy as np
import pytest

from keras_sd import samplers, scheduler_config
from keras_sd.noise_scheduler import NoiseScheduler
from keras_sd.samplers import SAMPLERS, make_table
from keras_sd.scheduler_config import read_scheduler_config, write_scheduler_config

pytestmark = [  # diffusers' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),
]

CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = {  # what makes a diffusers scheduler the one that the sampler is named after, with SD's own config
    "ddpm": {"steps_offset": 1, "clip_sample": False},
    "ddim": {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
    "plms": {"steps_offset": 1, "skip_prk_steps": True},
    "dpmpp_3m": {"solver_order": 3},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
NO_SAMPLE_PREDICTION = ("plms", "euler_a", "dpm2", "dpm2_a")  # in diffusers
KARRAS = ("lms", "euler", "heun", "dpm2", "dpm2_a", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "deis", "unipc")
SPACED = [name for name in CLASSES if name not in ("dpmpp_2s", "lcm", "tcd")]
ZERO_SNR = ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "lcm", "tcd")
STOCHASTIC = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "lcm", "tcd")
TOLERANCE = 1e-5
FLOAT32 = {("dpm2_a", 2): 5e-3, ("dpm2_a", 3): 5e-4, ("heun", 2): 5e-5}  # σ_down² = σ² - σ_up², two close numbers

SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DIFFUSERS = {}  # schedulers made so far

NOISE, LATENT = np.random.default_rng(0).standard_normal((2, 1, 4, 3, 3))


def model(x, timestep):
    return np.tanh(1.7 * x * np.cos(timestep / 300)) + 0.1 * np.sin(timestep)


def row_noise(row):
    return np.random.default_rng(1000 + row).standard_normal(NOISE.shape)


def run_ours(table, strength=1.0):
    start = table.init_noise_scale * NOISE if strength == 1 else table.signal[0] * LATENT + table.sigma[0] * NOISE
    return table.run(model, start, row_noise)


def run_diffusers(kind, config, num_steps, strength=1.0, **step_options):
    """The loop of diffusers' (image-to-image) pipelines, in float64 as far as the scheduler lets it."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    diffusers.logging.set_verbosity_error()
    key = kind, json.dumps(config)
    if key not in DIFFUSERS:
        DIFFUSERS[key] = getattr(diffusers, kind).from_config(config)  # some take long
    scheduler = copy.deepcopy(DIFFUSERS[key])
    scheduler.set_timesteps(num_steps)
    start = num_steps - min(int(num_steps * strength), num_steps)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    noise, latent = torch.from_numpy(NOISE), torch.from_numpy(LATENT)
    x = noise * scheduler.init_noise_sigma if strength == 1 else scheduler.add_noise(latent, noise, timesteps[:1])
    row = 0
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(sys.modules[type(scheduler).__module__], "randn_tensor"):

            def draw(shape, dtype, **_):
                return torch.from_numpy(row_noise(row)).to(dtype)

            patch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw)
        for row, t in enumerate(timesteps):
            output = model(scheduler.scale_model_input(x, t).double().numpy(), float(t))
            x = scheduler.step(torch.from_numpy(output), t, x, return_dict=False, **step_options)[0]
    return x.double().numpy(), len(timesteps)


def assert_agrees(name, num_steps, prediction_type="epsilon", strength=1.0, config=None, tolerance=None, **options):
    rescale = (config or {}).get("rescale_betas_zero_snr", False)
    scheduler = NoiseScheduler(prediction_type=prediction_type, rescale_zero_terminal_snr=rescale)
    table = make_table(name, scheduler, num_steps, strength=strength, **options)
    config = SD_CONFIG | CONFIGS.get(name, {}) | {"prediction_type": prediction_type} | (config or {})
    step_options = {"eta": options["eta"]} if "eta" in options else {}
    expected, rows = run_diffusers(CLASSES[name], config, num_steps, strength, **step_options)
    assert len(table) == rows
    error = np.linalg.norm(run_ours(table, strength) - expected) / np.linalg.norm(expected)
    assert error < (tolerance or TOLERANCE), f"{error:.1e}"


# === Against diffusers ===


def test_names():
    assert list(SAMPLERS) == list(CLASSES)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_default_tables(name, prediction_type):
    if prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
        pytest.skip("not in diffusers")
    for num_steps in (1, 2, 3, 5, 7, 10, 14, 15, 25, 50):
        assert_agrees(name, num_steps, prediction_type, tolerance=FLOAT32.get((name, num_steps)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_starts_where_the_pipelines_start(name, prediction_type):
    for num_steps, strengths in ((5, (0.4, 0.6)), (10, (0.3, 0.75, 0.99)), (25, (0.2, 0.6))):
        for strength in strengths:
            assert_agrees(name, num_steps, prediction_type, strength)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", KARRAS)
def test_karras(name, prediction_type):
    for num_steps, strength in ((5, 1.0), (10, 1.0), (25, 1.0), (10, 0.6)):
        tolerance = 3e-5 if name == "dpm2_a" else None
        config = {"use_karras_sigmas": True}
        assert_agrees(name, num_steps, prediction_type, strength, config, tolerance, karras=True)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("name", SPACED)
def test_spacings(name, spacing):
    for num_steps in (5, 7, 10, 25, 33):
        for offset in (0, 1, 3):
            spaced = {"timestep_spacing": spacing, "steps_offset": offset}
            assert_agrees(name, num_steps, "v_prediction", config=spaced, **spaced)


@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr(name):
    """diffusers' Euler casts samples of size 4096 to float32."""
    for num_steps in (5, 10, 25):
        for spacing in ("trailing", "linspace"):
            spaced = {"timestep_spacing": spacing} if name in SPACED else {}
            config = {"rescale_betas_zero_snr": True, **spaced}
            tolerance = 5e-5 if name == "euler" else None
            assert_agrees(name, num_steps, "v_prediction", 1.0, config, tolerance, **spaced)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta(name, eta):
    for num_steps in (5, 10, 25):
        assert_agrees(name, num_steps, eta=eta)
    assert make_table(name, NoiseScheduler(), 10, eta=eta).stochastic == (eta > 0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "deis", "unipc"])
def test_order(name, order):
    for num_steps, strength in ((5, 1.0), (6, 1.0), (10, 1.0), (20, 0.6)):
        assert_agrees(name, num_steps, "epsilon", strength, {"solver_order": order}, order=order)


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_solver_types_and_ends(name, solver_type):
    for final in ("zero", "sigma_min"):
        for lower in (True, False):
            config = {"solver_type": solver_type, "final_sigmas_type": final, "lower_order_final": lower}
            options = {"solver_type": solver_type, "final_sigma": final, "lower_order_final": lower}
            assert_agrees(name, 10, config=config, **options)
            if name != "dpmpp_2s":
                assert_agrees(name, 20, config=config | {"euler_at_final": True}, **options, euler_at_final=True)


def test_noise_prediction_solvers():
    """`predict="noise"` is the original DPM-Solver, and UniPC's noise prediction."""
    dpm_solver = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for name, config in (("dpmpp_2s", dpm_solver), ("dpmpp_2m", dpm_solver), ("dpmpp_3m", dpm_solver)):
        for num_steps in (5, 10, 25):
            assert_agrees(name, num_steps, config=config, predict="noise", final_sigma="sigma_min")
    config = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
    for solver_type in ("bh1", "bh2"):
        options = {"predict": "noise", "final_sigma": "sigma_min", "solver_type": solver_type}
        assert_agrees("unipc", 10, config=config | {"solver_type": solver_type}, **options)
    assert_agrees("unipc", 10, config={"disable_corrector": [0, 3]}, disable_corrector=(0, 3))


# === Against known solutions ===


def perfect_model(table, clean):
    """An ε-model that always knows the one clean sample there is."""
    levels = iter(zip(table.signal, table.sigma, table.input_scale))

    def perfect(x, timestep):
        signal, sigma, scale = next(levels)
        return (x / scale - signal * clean) / sigma

    return perfect


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_those_of_the_sample(name, strength):
    """With a perfect model x is signal·x0 + noise of size σ before every row, as image-to-image and inpainting need."""
    table = make_table(name, NoiseScheduler(), 10, strength=strength)
    if strength < 1 and name in ("plms", "lms"):
        pytest.skip("diffusers' later start, which is reproduced, leaves the schedule")
    rng, size = np.random.default_rng(0), 100_000
    levels = [table.levels[0]]
    x = table.signal[0] * 3.0 + table.sigma[0] * rng.standard_normal(size)

    def check(row, rows, x):
        signal, sigma = table.levels[row + 1]
        if row + 1 < rows:
            assert abs(x.mean() - signal * 3.0) < 0.03 * max(sigma, 0.05)
            assert abs(x.std() / sigma - 1) < 0.02
        levels.append((signal, sigma))

    x = table.run(perfect_model(table, 3.0), x, lambda row: rng.standard_normal(size), check)
    assert len(levels) == len(table) + 1
    np.testing.assert_allclose(x, 3.0, atol=0.2)  # DDIM, PLMS, DEIS and TCD end at the level of timestep 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in (*STOCHASTIC, "lcm")])
def test_converges_to_the_ode_of_gaussian_data(name, prediction_type):
    """For data N(0, 0.5²) the probability-flow ODE is solved by x(σ) ∝ √(0.25 + σ²), in the scale where signal is 1."""

    def gaussian(x, timestep):
        alpha = np.interp(timestep, np.arange(1000), scheduler.alphas_cumprod)
        signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
        x0 = x * signal * 0.25 / (alpha * 0.25 + 1 - alpha)
        noise = (x - signal * x0) / sigma
        return {"epsilon": noise, "v_prediction": signal * noise - sigma * x0, "sample": x0}[prediction_type]

    scheduler = NoiseScheduler(prediction_type=prediction_type)
    table = make_table(name, scheduler, 200)
    result = table.run(gaussian, table.init_noise_scale * NOISE)
    first = table.sigma[0] / table.signal[0]
    expected = NOISE * table.init_noise_scale / table.signal[0] * 0.5 / np.sqrt(0.25 + first**2)
    np.testing.assert_allclose(result, expected, rtol=0.02)


# === The table itself ===


@pytest.mark.parametrize("name", SAMPLERS)
def test_columns(name):
    table = make_table(name, NoiseScheduler(), 10)
    assert len(table) == {"plms": 11, "heun": 19, "dpm2": 19, "dpm2_a": 19}.get(name, 10)
    assert table.history.shape == (len(table), 5)
    assert table.rows.shape == (len(table), len(samplers.COLUMNS)) and table.rows.dtype == np.float32
    for field in ("input_scale", "timestep", "guidance", "sample_coef", "output_coef", "carry", "noise", "signal"):
        column = getattr(table, field)
        assert column.dtype == np.float64 and column.shape == (len(table),)
        np.testing.assert_array_equal(table.rows[:, samplers.COLUMNS.index(field)], column.astype("float32"))
    np.testing.assert_array_equal(table.rows[:, samplers.COLUMNS.index("history_1")], table.history[:, 1].astype("f4"))
    again = samplers.SamplerTable.from_rows(table.rows, table.init_noise_scale)
    np.testing.assert_array_equal(again.rows, table.rows)
    np.testing.assert_allclose(run_ours(again), run_ours(table), rtol=1e-3, atol=1e-3)
    assert table.stochastic == (name in STOCHASTIC)
    assert np.all(table.guidance == 7.5)


def test_from_rows_needs_all_columns():
    with pytest.raises(ValueError, match=r"rows must have the shape \(n, 14\), got \(3, 4\)"):
        samplers.SamplerTable.from_rows(np.zeros((3, 4)))


def test_run_keeps_the_type_and_calls_back():
    table, seen = make_table("dpmpp_2m", NoiseScheduler(), 5), []
    result = table.run(
        lambda x, t: model(x, t).astype(x.dtype), NOISE.astype("float32"), None, lambda *a: seen.append(a)
    )
    assert result.dtype == np.float32
    assert [call[:2] for call in seen] == [(row, 5) for row in range(5)]
    np.testing.assert_array_equal(seen[-1][2], result)


def test_guidance_column():
    scheduler = NoiseScheduler()
    table = make_table("euler", scheduler, 10, guidance_scale=5, guidance_interval=(0.2, 0.8))
    np.testing.assert_array_equal(table.guidance, [1, 1, 5, 5, 5, 5, 5, 5, 1, 1])
    assert np.all(make_table("euler", scheduler, 10, guidance_scale=0).guidance == 0)
    np.testing.assert_array_equal(make_table("euler", scheduler, 3, guidance_scale=[9, 6, 3]).guidance, [9, 6, 3])


def test_timesteps_stay_in_training_at_every_count():
    scheduler = NoiseScheduler()
    for name in SAMPLERS:
        most = {"lcm": 50, "tcd": 50}.get(name, 999)
        for num_steps in (1, 30, 61, 97, 333, 999):
            for spacing in samplers.SPACINGS if name in SPACED else (None,):
                options = {"timestep_spacing": spacing} if spacing else {}
                if num_steps > most:
                    continue
                table = make_table(name, scheduler, num_steps, **options)
                assert 0 <= table.timestep.min() <= table.timestep.max() <= 999
                assert len(table) >= num_steps and np.all(np.isfinite(table.rows))


# === Bad input ===


@pytest.mark.parametrize(
    ("name", "num_steps", "options", "message"),
    [
        ("dpm_2m", 5, {}, r"Unknown sampler 'dpm_2m'\. Did you mean '.*'\? Samplers: ddpm, ddim, .*, tcd\."),
        (None, 5, {}, "Unknown sampler None"),
        ("ddim", 0, {}, r"num_steps must be an integer from 1 to 1000 \(train_timesteps\), got 0"),
        ("ddim", 2.5, {}, "num_steps must be an integer from 1 to 1000"),
        ("ddim", "5", {}, "num_steps must be an integer from 1 to 1000"),
        ("ddim", 1001, {}, "num_steps must be an integer from 1 to 1000"),
        ("euler", 5, {"eta": 0.5}, "Sampler 'euler' does not take 'eta'; it takes karras, timestep_spacing, .*"),
        ("ddim", 5, {"eta": 2}, "eta must be a number from 0"),
        ("ddim", 5, {"timestep_spacing": "even"}, "timestep_spacing must be one of leading, linspace, trailing"),
        ("ddim", 5, {"steps_offset": -1}, "steps_offset must be an integer ≥ 0, got -1"),
        ("ddim", 5, {"final_alpha_one": 1}, "final_alpha_one must be True or False, got 1"),
        ("euler", 5, {"karras": "yes"}, "karras must be True or False, got 'yes'"),
        ("unipc", 5, {"order": 4}, "order must be one of 1, 2, 3, got 4"),
        ("unipc", 5, {"solver_type": "heun"}, "solver_type must be one of bh1, bh2, got 'heun'"),
        ("unipc", 5, {"lower_order_final": False}, "These options have no solution"),
        ("unipc", 5, {"disable_corrector": 0}, "disable_corrector must be a list of steps, got 0"),
        ("lcm", 5, {"timestep_scaling": 0}, "timestep_scaling must be a number above 0, got 0"),
        ("lcm", 60, {}, r"original_steps must be an integer from num_steps \(60\) to 1000, got 50"),
        ("dpmpp_2m", 1000, {}, "num_steps 1000 puts two steps on one timestep"),
        ("ddim", 5, {"strength": 0}, "strength must be a number above 0 and up to 1, got 0"),
        ("ddim", 5, {"strength": 1.5}, "strength must be a number above 0 and up to 1, got 1.5"),
        ("ddim", 5, {"strength": 0.1}, "strength 0.1 leaves no step of 5: use at least 0.2"),
        (
            "ddim",
            5,
            {"guidance_scale": "high"},
            "guidance_scale must be a number or 5 numbers, one per row, got 'high'",
        ),
        ("ddim", 5, {"guidance_scale": [1, 2]}, "guidance_scale must be a number or 5 numbers"),
        ("ddim", 5, {"guidance_interval": (0.8, 0.2)}, r"guidance_interval must be \(start, stop\)"),
        ("ddim", 5, {"guidance_interval": 0.5}, r"guidance_interval must be \(start, stop\)"),
    ],
)
def test_bad_input(name, num_steps, options, message):
    with pytest.raises(ValueError, match=message):
        make_table(name, NoiseScheduler(), num_steps, **options)


def test_epsilon_cannot_start_from_pure_noise():
    scheduler = NoiseScheduler(rescale_zero_terminal_snr=True)
    with pytest.raises(ValueError, match="use 'v_prediction'"):
        make_table("ddim", scheduler, 5, timestep_spacing="trailing")
    make_table("ddim", scheduler, 5)


@pytest.mark.parametrize("noise", [None, np.zeros(3)])
def test_fresh_noise_is_asked_for(noise):
    table = make_table("euler_a", NoiseScheduler(), 5)
    with pytest.raises(ValueError, match="adds fresh noise in 4 of its 5 rows: noise must be a callable"):
        table.run(model, NOISE, noise)


# === scheduler_config.json ===

STABLE_DIFFUSION_V1_4 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    **SD_CONFIG,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_config_of_stable_diffusion():
    scheduler, name, options = read_scheduler_config(STABLE_DIFFUSION_V1_4)
    assert (scheduler, name) == (NoiseScheduler(), "plms")
    assert options == {"final_alpha_one": False, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        {"_class_name": "DDIMScheduler", "clip_sample": False, **SD_CONFIG, "timestep_spacing": "trailing"},
        {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_large"},
        {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True, "prediction_type": "v_prediction"},
        {"_class_name": "KDPM2AncestralDiscreteScheduler", "timestep_spacing": "leading"},
        {"_class_name": "EulerDiscreteScheduler", **SD_CONFIG, "use_karras_sigmas": True, "skip_prk_steps": False},
        {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "logrho", "algorithm_type": "deis"} | SIGMA_MIN,
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True, **SD_CONFIG},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "euler_at_final": True},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"_class_name": "DEISMultistepScheduler", "solver_order": 3, "lower_order_final": False},
        {"_class_name": "UniPCMultistepScheduler", "predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "disable_corrector": [0, 1]} | SIGMA_MIN,
        {"_class_name": "LCMScheduler", "original_inference_steps": 100, "timestep_scaling": 5.0},
        {"_class_name": "TCDScheduler", "num_train_timesteps": 500},
        {"_class_name": "EulerAncestralDiscreteScheduler", "trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
        STABLE_DIFFUSION_V1_4,
    ],
)
def test_configs_are_read_in_full_and_written_back(config):
    """Fields that a file lacks have diffusers' defaults; what we write, diffusers runs alike."""
    scheduler, name, options = read_scheduler_config(config, pipeline=False)
    ours = run_ours(make_table(name, scheduler, 10, **options))
    written = json.loads(json.dumps(write_scheduler_config(name, scheduler, **options)))
    assert read_scheduler_config(written, pipeline=False) == (scheduler, name, options)
    for source in (config, written):
        expected, _ = run_diffusers(config["_class_name"], source, 10)
        assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < TOLERANCE


@pytest.mark.parametrize("name", SAMPLERS)
def test_default_tables_are_written(name):
    config = write_scheduler_config(name, NoiseScheduler())
    expected, _ = run_diffusers(CLASSES[name], config, 10)
    ours = run_ours(make_table(name, NoiseScheduler(), 10))
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < TOLERANCE


def test_class_defaults_are_those_of_diffusers():
    """Every field of `_CLASSES` is one of the class, with its default."""
    diffusers = pytest.importorskip("diffusers")
    for kind, (_, fields) in scheduler_config._CLASSES.items():
        parameters = inspect.signature(getattr(diffusers, kind)).parameters
        for key, default in (scheduler_config._SCHEDULE | fields).items():
            expected = parameters[key].default
            assert default == (tuple(expected) if isinstance(expected, list) else expected), (kind, key)


def test_config_as_pipelines_read_it():
    """diffusers' Stable Diffusion pipelines set steps_offset to 1 and clip_sample to False."""
    config = {"_class_name": "DDIMScheduler", **SD_CONFIG, "steps_offset": 0, "clip_sample": True}
    assert read_scheduler_config(config)[2]["steps_offset"] == 1
    with pytest.raises(ValueError, match="DDIMScheduler with clip_sample=True is not supported"):
        read_scheduler_config(config, pipeline=False)
    config["clip_sample"] = False
    assert read_scheduler_config(config, pipeline=False)[2]["steps_offset"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "_class_name None of the scheduler config is none of DDPMScheduler, .*"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatchEulerDiscreteScheduler'"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler with skip_prk_steps=False is not supported: it must be True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "HeunDiscreteScheduler", "use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.0}, "sigma_min=0.0"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow"}, "prediction_type must be one of"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "sde-dpmsolver"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order=3",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ],
)
def test_what_cannot_be_honoured_is_said(config, message):
    with pytest.raises(ValueError, match=message):
        read_scheduler_config(config)


def test_what_diffusers_cannot_hold_is_said():
    with pytest.raises(ValueError, match="diffusers' DDIMScheduler cannot hold eta=0.5"):
        write_scheduler_config("ddim", NoiseScheduler(), eta=0.5)
    with pytest.raises(ValueError, match="LMSDiscreteScheduler cannot hold rescale_zero_terminal_snr=True"):
        write_scheduler_config("lms", NoiseScheduler(rescale_zero_terminal_snr=True))
