"""Stable Diffusion in Keras 3: models, samplers, checkpoints and the pipeline that joins them."""

import importlib

__version__ = "0.1.0"

# name → module, loaded at first use, so that the samplers need NumPy alone and a client needs no Keras.
_HOME = {
    "StableDiffusion": "stable_diffusion",
    "TextEncoder": "models",
    "ImageEncoder": "models",
    "DiffusionModel": "models",
    "Decoder": "models",
    "VisionEncoder": "models",
    "IPAdapter": "models",
    "RRDBNet": "models",
    "read_rrdbnet": "weights.rrdbnet",
    "ControlNet": "models",
    "load_control_net": "weights.control_net",
    "save_control_net": "weights.control_net",
    "canny": "edges",
    "Denoiser": "denoiser",
    "NoiseScheduler": "noise_scheduler",
    "SamplerTable": "samplers",
    "SAMPLERS": "samplers",
    "make_table": "samplers",
    "CLIPTokenizer": "tokenizer",
    "PRESETS": "presets",
    "write_checkpoint": "convert",
    "add_watermark": "watermark",
    "read_watermark": "watermark",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"keras_sd.{_HOME[name]}"), name)
    raise AttributeError(f"module 'keras_sd' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
