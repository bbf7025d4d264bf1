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


ARGUMENTS = {  # model → its component in diffusers' configs, and how that is read
    "diffusion_model": ("unet", folder_format.diffusion_model_arguments),
    "decoder": ("vae", folder_format.autoencoder_arguments),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of one Stable Diffusion model; each is read when it is asked for.

    Attributes:
        tokenizer: () → `CLIPTokenizer`.
        text_encoder, diffusion_model, image_encoder, decoder: (dtype policy) → model with its weights.
        scheduler: () → scheduler config, a dict in the fields of diffusers.
        image_size: (levels of the autoencoder, by default its own) → default (height, width) in pixels.
        arguments: ("diffusion_model" or "decoder") → the arguments of that model, a dict, without reading its weights;
            None where only they tell.
        upscaler: () → None, or for a ×4 upscaler (config of the scheduler that noises the small picture, largest noise
            level).
        companions: () → dict of what a diffusers folder holds beside it, e.g. `safety_checker`: (folder, its entry in
            `model_index.json`).
    """

    tokenizer: Callable
    text_encoder: Callable
    diffusion_model: Callable
    image_encoder: Callable
    decoder: Callable
    scheduler: Callable
    image_size: Callable
    arguments: Callable | None = None
    upscaler: Callable = lambda: None
    companions: Callable = dict


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

    def image_size(levels=None):
        config = folder_format.read_json(path / "unet" / "config.json")
        levels = levels or len(folder_format.read_json(path / "vae" / "config.json")["block_out_channels"])
        size = config.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * 2 ** (levels - 1), width * 2 ** (levels - 1)

    def arguments(name):
        component, from_config = ARGUMENTS[name]
        return from_config(folder_format.read_json(path / component / "config.json"))

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
        arguments=arguments,
        upscaler=upscaler,
        companions=lambda: folder_format.companions(path),
    )


def open_single_file(path, tokenizer=None):
    """Opens a single-file checkpoint; see `keras_sd.weights.single_file`. The file is read once."""
    from keras_sd.weights.single_file import read_single_file

    @functools.cache
    def read():
        return read_single_file(path)

    def missing(component):
        raise ValueError(f"{str(path)!r} holds no {component}.")

    def part(component, build):
        def build_part(dtype=None):
            config, arrays = read()
            return build(config[component], arrays.get(component) or missing(component), str(path), dtype)

        return build_part

    def arguments(name):
        component, from_config = ARGUMENTS[name]
        return from_config(read()[0].get(component) or missing(component))

    def image_size(levels=None):
        config = read()[0]
        side = 64 if config["scheduler"].get("prediction_type", "epsilon") == "epsilon" else 96
        levels = levels or (len(config["vae"]["block_out_channels"]) if "vae" in config else 4)
        return (config["unet"].get("sample_size", side) * 2 ** (levels - 1),) * 2

    return Checkpoint(
        tokenizer=lambda: clip_tokenizer(tokenizer, read()[0]["tokenizer"]["pad_token"]),
        text_encoder=part("text_encoder", folder_format.build_text_encoder),
        diffusion_model=part("unet", folder_format.build_diffusion_model),
        image_encoder=part("vae", folder_format.build_image_encoder),
        decoder=part("vae", folder_format.build_decoder),
        scheduler=lambda: read()[0]["scheduler"],
        image_size=image_size,
        arguments=arguments,
    )


def with_vae(checkpoint, path):
    """The checkpoint with another autoencoder; see `keras_sd.weights.vae`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no autoencoder, or one for latents of other channels.
    """
    from keras_sd.presets import locate_model
    from keras_sd.weights.vae import read_vae

    path = locate_model(path)
    config, arrays = read_vae(path)
    own = folder_format.autoencoder_arguments(config)
    changes = {
        "image_encoder": lambda dtype=None: folder_format.build_image_encoder(config, arrays, str(path), dtype),
        "decoder": lambda dtype=None: folder_format.build_decoder(config, arrays, str(path), dtype),
    }
    if checkpoint.arguments is not None:
        channels = checkpoint.arguments("diffusion_model")["out_channels"]
        if own["latent_channels"] != channels:
            raise ValueError(
                f"vae: {str(path)!r} makes latents of {own['latent_channels']} channels; this model's have {channels}."
            )
        changes["arguments"] = lambda name: own if name == "decoder" else checkpoint.arguments(name)
        changes["image_size"] = lambda: checkpoint.image_size(len(own["block_out_channels"]))
    return dataclasses.replace(checkpoint, **changes)


KERAS_CV_FILES = {
    "text_encoder": ("kcv_encoder.h5", "text_encoder_v2_1.h5"),
    "diffusion_model": ("kcv_diffusion_model.h5", "diffusion_model_v2_1.h5"),
    "decoder": ("kcv_decoder.h5",),
    "image_encoder": ("vae_encoder.h5",),
}


def open_keras_cv_folder(path, tokenizer=None):
    """Opens a folder of KerasCV's weights under the names it publishes them; see `keras_sd.weights.keras_cv`."""
    from keras_sd.weights.keras_cv import build_from_keras_cv, read_metadata

    def file(name):
        names = KERAS_CV_FILES[name]
        found = next((path / name for name in names if (path / name).exists()), None)
        if found is None:
            raise FileNotFoundError(f"{str(path)!r} holds no {' or '.join(names)} for the {name}.")
        return found

    def part(name):
        return lambda dtype=None: build_from_keras_cv(file(name), dtype)

    def further(field, default):
        return read_metadata(file("diffusion_model")).get(field, default)

    v2 = (path / KERAS_CV_FILES["diffusion_model"][1]).exists()
    return Checkpoint(
        tokenizer=lambda: clip_tokenizer(tokenizer, "!" if v2 else "<|endoftext|>"),
        **{name: part(name) for name in KERAS_CV_FILES},
        scheduler=lambda: further(
            "scheduler", {**SD_SCHEDULER, "prediction_type": "v_prediction" if v2 else "epsilon"}
        ),
        image_size=lambda: tuple(further("image_size", (768, 768) if v2 else (512, 512))),
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
