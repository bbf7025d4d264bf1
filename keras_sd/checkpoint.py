"""Opening a checkpoint, whatever its format: where each part of Stable Diffusion comes from.

| on disk | opened by |
|---|---|
| folder with `model_index.json` (diffusers) | `open_diffusers_folder` |
| `.safetensors` or `.ckpt` (CompVis, Stability) | `open_single_file` |
| folder with `kcv_diffusion_model.h5` (KerasCV) | `open_keras_cv_folder` |
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from keras_sd.tokenizer import CLIPTokenizer
from keras_sd.weights import diffusers_folder as folder_format

# What the checkpoints without a `scheduler/` were made for.
SD_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of one Stable Diffusion model; each is read when it is asked for.

    Attributes:
        tokenizer: () → `CLIPTokenizer`.
        text_encoder, diffusion_model, image_encoder, decoder: (dtype policy) → model with its weights.
        scheduler: () → scheduler config, a dict in the fields of diffusers.
        image_size: () → default (height, width) in pixels.
        upscaler: () → None, or for a ×4 upscaler (config of the scheduler that noises the small picture, largest noise
            level).
    """

    tokenizer: Callable
    text_encoder: Callable
    diffusion_model: Callable
    image_encoder: Callable
    decoder: Callable
    scheduler: Callable
    image_size: Callable
    upscaler: Callable = lambda: None


def open_checkpoint(path, tokenizer=None):
    """Opens a checkpoint on disk.

    Args:
        path: a folder in the diffusers or KerasCV layout, or a `.safetensors` or `.ckpt` file.
        tokenizer: for formats that carry none, a merges file or `tokenizer/` folder; by default CLIP's own, downloaded.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is none of the formats.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint at {str(path)!r}: give a folder, a .safetensors or a .ckpt file.")
    if path.is_file():
        return open_single_file(path, tokenizer)
    if (path / "model_index.json").exists() or (path / "unet").is_dir():
        return open_diffusers_folder(path)
    if list(path.glob("*.h5")):
        return open_keras_cv_folder(path, tokenizer)
    raise ValueError(
        f"{str(path)!r} is no checkpoint: it has no model_index.json (diffusers) and no .h5 files (KerasCV)."
    )


def open_diffusers_folder(path):
    """Opens a folder in the diffusers layout; see `keras_sd.weights.diffusers_folder`."""
    is_upscaler = (path / "low_res_scheduler").is_dir()

    def part(component, build):
        def read(dtype=None):
            config, arrays = folder_format.read_component(path, component)
            if component == "vae" and is_upscaler:  # diffusers sets it, too: the published file does not have it
                config = {**config, "scaling_factor": 0.08333}
            return build(config, arrays, str(path / component), dtype)

        return read

    def image_size():
        config = folder_format.read_json(path / "unet" / "config.json")
        levels = len(folder_format.read_json(path / "vae" / "config.json")["block_out_channels"])
        size = config.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * 2 ** (levels - 1), width * 2 ** (levels - 1)

    def upscaler():
        if not is_upscaler:
            return None
        index = folder_format.read_json(path / "model_index.json")
        config = folder_format.read_json(path / "low_res_scheduler" / "scheduler_config.json")
        return config, index.get("max_noise_level", 350)

    return Checkpoint(
        tokenizer=lambda: CLIPTokenizer.from_folder(path / "tokenizer"),
        text_encoder=part("text_encoder", folder_format.build_text_encoder),
        diffusion_model=part("unet", folder_format.build_diffusion_model),
        image_encoder=part("vae", folder_format.build_image_encoder),
        decoder=part("vae", folder_format.build_decoder),
        scheduler=lambda: folder_format.read_json(path / "scheduler" / "scheduler_config.json"),
        image_size=image_size,
        upscaler=upscaler,
    )


def open_single_file(path, tokenizer=None):
    """Opens a single-file checkpoint; see `keras_sd.weights.single_file`. The file is read once."""
    from keras_sd.weights import single_file
    from keras_sd.weights.files import read_arrays

    @functools.cache
    def read():
        arrays = read_arrays(path)
        config = single_file.single_file_config(arrays, single_file.prediction_type_beside(path))
        return config, single_file.split_single_file(arrays)

    def part(component, build):
        def build_part(dtype=None):
            config, arrays = read()
            if component not in arrays:
                raise ValueError(f"{str(path)!r} holds no {component}.")
            return build(config[component], arrays[component], str(path), dtype)

        return build_part

    return Checkpoint(
        tokenizer=lambda: clip_tokenizer(tokenizer, read()[0]["tokenizer"]["pad_token"]),
        text_encoder=part("text_encoder", folder_format.build_text_encoder),
        diffusion_model=part("unet", folder_format.build_diffusion_model),
        image_encoder=part("vae", folder_format.build_image_encoder),
        decoder=part("vae", folder_format.build_decoder),
        scheduler=lambda: read()[0]["scheduler"],
        image_size=lambda: (512, 512) if read()[0]["scheduler"]["prediction_type"] == "epsilon" else (768, 768),
    )


KERAS_CV_FILES = {
    "text_encoder": ("kcv_encoder.h5", "text_encoder_v2_1.h5"),
    "diffusion_model": ("kcv_diffusion_model.h5", "diffusion_model_v2_1.h5"),
    "decoder": ("kcv_decoder.h5",),
    "image_encoder": ("vae_encoder.h5",),
}


def open_keras_cv_folder(path, tokenizer=None):
    """Opens a folder of KerasCV's weights under the names it publishes them; see `keras_sd.weights.keras_cv`."""
    from keras_sd.weights.keras_cv import build_from_keras_cv

    def part(name):
        def build(dtype=None):
            names = KERAS_CV_FILES[name]
            file = next((path / name for name in names if (path / name).exists()), None)
            if file is None:
                raise FileNotFoundError(f"{str(path)!r} holds no {' or '.join(names)} for the {name}.")
            return build_from_keras_cv(file, dtype)

        return build

    v2 = (path / KERAS_CV_FILES["diffusion_model"][1]).exists()
    return Checkpoint(
        tokenizer=lambda: clip_tokenizer(tokenizer, "!" if v2 else "<|endoftext|>"),
        **{name: part(name) for name in KERAS_CV_FILES},
        scheduler=lambda: {**SD_SCHEDULER, "prediction_type": "v_prediction" if v2 else "epsilon"},
        image_size=lambda: (768, 768) if v2 else (512, 512),
    )


def clip_tokenizer(source, pad_token):
    """The tokenizer of a checkpoint that carries none.

    Args:
        source: a merges file or a `tokenizer/` folder; None downloads CLIP's published vocabulary.
        pad_token: "<|endoftext|>" (SD v1) or "!" (SD v2).
    """
    if source is None:
        from keras_sd.presets import clip_vocabulary

        source = clip_vocabulary()
    source = pathlib.Path(source)
    return CLIPTokenizer.from_folder(source) if source.is_dir() else CLIPTokenizer.from_merges_file(source, pad_token)
