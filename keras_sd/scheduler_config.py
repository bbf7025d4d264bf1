"""diffusers' scheduler configs to samplers and back: every field that changes numbers is honoured, or it raises."""

import inspect
import math

from keras_sd.noise_scheduler import NoiseScheduler
from keras_sd.samplers import COMMON_OPTIONS, SAMPLERS

_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SCHEDULE |= {"trained_betas": None, "prediction_type": "epsilon"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_NO_CLIP, _CLIP = ({"clip_sample": clip, "thresholding": False} for clip in (False, True))
_RESCALE = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SOLVER = {"solver_order": 2, "thresholding": False, "use_flow_sigmas": False, "lower_order_final": True, **_SIGMAS}
_DPM = {"solver_type": "midpoint", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", **_SOLVER}
_DPM |= {"lambda_min_clipped": -math.inf, "variance_type": None}
_DISTILLED = {**_SD_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50, **_NO_CLIP, **_RESCALE}
_RANGE = {"sigma_min": None, "sigma_max": None}

# Per class, the sampler and every field that changes its numbers, with the value of a field that the file lacks.
_CLASSES = {
    "DDPMScheduler": ("ddpm", {**_LEADING, **_CLIP, **_RESCALE, "variance_type": "fixed_small"}),
    "DDIMScheduler": ("ddim", {**_LEADING, **_CLIP, **_RESCALE, "set_alpha_to_one": True}),
    "PNDMScheduler": ("plms", {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False}),
    "LMSDiscreteScheduler": ("lms", {**_LINSPACE, **_SIGMAS}),
    "EulerDiscreteScheduler": (
        "euler",
        {**_LINSPACE, **_SIGMAS, **_RESCALE, **_RANGE, "final_sigmas_type": "zero"}
        | {"interpolation_type": "linear", "timestep_type": "discrete"},
    ),
    "EulerAncestralDiscreteScheduler": ("euler_a", {**_LINSPACE, **_RESCALE}),
    "HeunDiscreteScheduler": ("heun", {**_SD_BETAS, **_LINSPACE, **_SIGMAS, "clip_sample": False}),
    "KDPM2DiscreteScheduler": ("dpm2", {**_SD_BETAS, **_LINSPACE, **_SIGMAS}),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", {**_SD_BETAS, **_LINSPACE, **_SIGMAS}),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", {**_DPM, "lower_order_final": False}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {**_DPM, **_LINSPACE, **_RESCALE, "euler_at_final": False, "use_lu_lambdas": False},
    ),
    "DEISMultistepScheduler": ("deis", {**_SOLVER, **_LINSPACE}),
    "UniPCMultistepScheduler": (
        "unipc",
        {**_SOLVER, **_LINSPACE, **_RESCALE, **_RANGE, "final_sigmas_type": "zero", "solver_type": "bh2"}
        | {"predict_x0": True, "disable_corrector": (), "solver_p": None, "use_dynamic_shifting": False},
    ),
    "LCMScheduler": ("lcm", {**_DISTILLED, "timestep_scaling": 10.0}),
    "TCDScheduler": ("tcd", _DISTILLED),
}
_OPTION_OF = {"set_alpha_to_one": "final_alpha_one", "use_karras_sigmas": "karras", "solver_order": "order"}
_OPTION_OF |= {"final_sigmas_type": "final_sigma", "original_inference_steps": "original_steps"}
_OPTION_OF |= {"variance_type": "variance"}
_ALGORITHMS = {"dpmsolver++": ("dpmpp_2m", "x0"), "dpmsolver": ("dpmpp_2m", "noise")}
_ALGORITHMS |= {"sde-dpmsolver++": ("dpmpp_2m_sde", None)}
_ONLY = {"clip_sample": False, "skip_prk_steps": True, "interpolation_type": "linear", "timestep_type": "discrete"}
_ONLY |= {"lambda_min_clipped": -math.inf, "variance_type": None, "solver_p": None, **_RANGE}  # others: False


def _options_of(name):
    """The sampler's own options and their defaults."""
    parameters = inspect.signature(SAMPLERS[name]).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not p.empty and key not in COMMON_OPTIONS}


def read_scheduler_config(config, pipeline=True):
    """Reads a diffusers `scheduler_config.json`: every field that changes numbers is honoured, or it raises.

    Args:
        config: the file as a dict. Fields that its class does not know are passed over, as diffusers does; fields
            that the file lacks have the class's defaults.
        pipeline: read it as diffusers' Stable Diffusion pipelines do, which replace a `steps_offset` other than 1 by 1
            and `clip_sample` True by False. With False a `clip_sample` of True raises.

    Returns:
        `(scheduler, name, options)` for `make_table(name, scheduler, num_steps, **options)`.

    Raises:
        ValueError: for a class or a value that no sampler here can honour; the message names the field.
    """
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise ValueError(f"_class_name {kind!r} of the scheduler config is none of {', '.join(_CLASSES)}.")
    name, defaults = _CLASSES[kind]
    values = {key: config.get(key, default) for key, default in (_SCHEDULE | defaults).items()}
    if pipeline:
        corrections = {"steps_offset": 1, "clip_sample": False}
        values |= {key: value for key, value in corrections.items() if key in values}
    scheduler = NoiseScheduler(
        train_timesteps=values["num_train_timesteps"],
        rescale_zero_terminal_snr=bool(values.get("rescale_betas_zero_snr")),
        **{key: values[key] for key in _SCHEDULE if key != "num_train_timesteps"},
    )
    options = {}
    if "algorithm_type" in defaults:
        algorithm = "dpmsolver++" if values["algorithm_type"] == "deis" else values["algorithm_type"]
        sampler, predict = _ALGORITHMS.get(algorithm, (None, None))
        order = values["solver_order"]
        if sampler is None or (sampler == "dpmpp_2m_sde" and (name == "dpmpp_2s" or order == 3)):
            raise ValueError(f"{kind} with algorithm_type={algorithm!r}, solver_order={order} is not supported.")
        name = name if name == "dpmpp_2s" else sampler
        options = {"predict": predict} if predict else {}
        if name == "dpmpp_2m" and order == 3:
            name = "dpmpp_3m"
    if "predict_x0" in defaults:
        options["predict"] = "x0" if values["predict_x0"] else "noise"
    if "solver_type" in defaults and values["solver_type"] in ("midpoint", "heun", "logrho", "bh1", "bh2"):
        known = ("bh1", "bh2") if name == "unipc" else ("midpoint", "heun")  # a config of another solver's: the default
        values["solver_type"] = values["solver_type"] if values["solver_type"] in known else defaults["solver_type"]
    for key in defaults.keys() - _SCHEDULE.keys() - {"rescale_betas_zero_snr", "algorithm_type", "predict_x0"}:
        value, option = values[key], _OPTION_OF.get(key, key)
        if option in _options_of(name):
            default = _options_of(name)[option]
            options[option] = type(default)(value) if isinstance(default, (bool, tuple)) else value
        elif value is not None and value != _ONLY.get(key, False):
            raise ValueError(f"{kind} with {key}={value!r} is not supported: it must be {_ONLY.get(key, False)!r}.")
    return scheduler, name, options


def write_scheduler_config(name, scheduler, **options):
    """The inverse of `read_scheduler_config`: a dict that diffusers' `from_config` opens, for `scheduler_config.json`.

    Raises:
        ValueError: for an option that diffusers' class does not have (`eta` is an argument of its `step`).
    """
    kinds = {sampler: kind for kind, (sampler, _) in _CLASSES.items()}
    kind = kinds.get(name, "DPMSolverMultistepScheduler")
    defaults, own = _CLASSES[kind][1], _options_of(name)
    chosen = own | options
    config = {"_class_name": kind, **{key: getattr(scheduler, key, None) for key in _SCHEDULE}}
    config |= {"num_train_timesteps": scheduler.train_timesteps, "rescale_betas_zero_snr": False}
    config["trained_betas"] = scheduler.trained_betas and list(scheduler.trained_betas)
    for key in defaults.keys() - _SCHEDULE.keys():
        option = _OPTION_OF.get(key, key)
        config[key] = chosen.pop(option) if option in own else _ONLY.get(key, False)
    if "rescale_betas_zero_snr" in defaults:
        config["rescale_betas_zero_snr"] = scheduler.rescale_zero_terminal_snr
    elif scheduler.rescale_zero_terminal_snr:
        chosen["rescale_zero_terminal_snr"] = True
    if "algorithm_type" in defaults or "predict_x0" in defaults:
        predict = chosen.pop("predict", None)
        algorithms = {(sampler, p): algorithm for algorithm, (sampler, p) in _ALGORITHMS.items()}
        sampler = name if name == "dpmpp_2m_sde" else "dpmpp_2m"
        field = {"predict_x0": predict == "x0"} if name == "unipc" else {"algorithm_type": algorithms[sampler, predict]}
        config |= field
    for option, value in chosen.items():
        if option not in own or value != own[option]:
            raise ValueError(f"diffusers' {kind} cannot hold {option}={value!r}.")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(config.items())}
