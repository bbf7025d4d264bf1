"""The way out: a whole model written in any of the formats that `keras_sd.checkpoint` opens.

| format | target | opened by |
|---|---|---|
| `diffusers` | folder | diffusers |
| `single_file` | `.safetensors`, names of CompVis (SD v1) or OpenCLIP (SD v2) | web UIs, `from_single_file` |
| `keras_cv` | folder of four `.h5`, of models with the topology of SD v1 or v2 | KerasCV, of models of those widths |

What the last two have no place for — numbers of heads and groups, the scheduler, the size of the pictures — is
written beside the weights as metadata that other programs pass over, so that what is read here is the same model in
every format. A tokenizer other than CLIP's and a safety checker stay behind; `keras_sd` takes `tokenizer=`.
"""

import os
import pathlib
import shutil
import warnings

import numpy as np

from keras_sd.weights.diffusers_folder import autoencoder_config, diffusion_model_config, text_encoder_config

CLIP_VOCABULARY = 49408


def format_of(path):
    """The format that a target's ending stands for."""
    return {".safetensors": "single_file", ".h5": "keras_cv"}.get(pathlib.Path(path).suffix, "diffusers")


def check_target(path, format, dtype=None):
    """Raises where a checkpoint of a format cannot be written.

    Raises:
        ValueError: there is no such format, the ending is not its own, or it has no place for the dtype.
        OSError: something is there already, or it cannot be written.
    """
    from keras_sd.png import check_writable

    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}; got {format!r}.")
    if dtype and np.dtype(dtype) == "int8" and format != "diffusers":
        raise ValueError(f"dtype int8 is for a folder in the diffusers layout; {format} has no place for the scales.")
    path = pathlib.Path(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{str(path)!r}: checkpoints are written as .safetensors, never as {path.suffix}, a pickle.")
    if (format == "single_file") != (path.suffix == ".safetensors"):
        raise ValueError(f"{str(path)!r}: a single file ends in .safetensors, a folder of {format} does not.")
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; name a target that does not.")
    check_writable(path)


def write_checkpoint(sd, path, format=None, dtype=None):
    """Writes a `StableDiffusion`, whole or not at all.

    Args:
        sd: the model; LoRAs that are loaded are merged in, and what is in memory alone is written, too.
        path: what to write; nothing may be there.
        format: "diffusers", "single_file" or "keras_cv"; by default what the ending of `path` stands for.
        dtype: NumPy dtype of the weights, e.g. "float16", or "int8" (`keras_sd.weights.int8`); by default that of the
            models.

    Raises:
        ValueError: the format has no place for a part of the model, or for int8; the message names it.
        OSError: something is there already, or it cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))
    format = format_of(path) if format is None else format
    check_target(path, format, dtype)
    part = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        WRITERS[format](sd, part, dtype)
        part.rename(path)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _write_single_file(sd, path, dtype):
    from keras_sd.weights.single_file import write_single_file

    _mention_tokenizer(sd)
    side = max(sd.image_size)
    models = {
        "text_encoder": [sd.text_encoder],
        "unet": [sd.diffusion_model],
        "vae": [sd.image_encoder, sd.decoder],
    }
    config = {
        "text_encoder": text_encoder_config(sd.text_encoder),
        "unet": diffusion_model_config(sd.diffusion_model, side // sd.factor),
        "vae": autoencoder_config(sd.decoder, side),
        "scheduler": sd.checkpoint.scheduler(),
    }
    write_single_file(path, models, config, dtype)


def _write_keras_cv(sd, path, dtype):
    from keras_sd.checkpoint import KERAS_CV_FILES
    from keras_sd.weights.keras_cv import has_published_widths, write_keras_cv

    _mention_tokenizer(sd)
    models = {name: getattr(sd, name) for name in KERAS_CV_FILES}
    others = [name for name, model in models.items() if not has_published_widths(model)]
    if others:
        warnings.warn(
            f"KerasCV itself opens the widths of SD v1 and v2 alone; those of the {', '.join(others)} are others.",
            stacklevel=4,
        )
    v2 = sd.diffusion_model.arguments["use_linear_projection"]
    for name, model in models.items():
        further = {"scheduler": sd.checkpoint.scheduler(), "image_size": list(sd.image_size)}
        file = path / KERAS_CV_FILES[name][-1 if v2 else 0]
        write_keras_cv(model, file, dtype or "float32", further if name == "diffusion_model" else {})


def _mention_tokenizer(sd):
    words = sd.text_encoder.arguments["vocab_size"]
    if words != CLIP_VOCABULARY:
        warnings.warn(
            f"The format holds no tokenizer, and this model's is its own ({words} tokens, not CLIP's "
            f"{CLIP_VOCABULARY}): keep its tokenizer/ folder, and give it as tokenizer= or --tokenizer.",
            stacklevel=5,
        )


WRITERS = {
    "diffusers": lambda sd, path, dtype: sd.save_preset(path, dtype),
    "single_file": _write_single_file,
    "keras_cv": _write_keras_cv,
}
