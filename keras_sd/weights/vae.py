"""An autoencoder alone, from the files that people have of it.

| on disk | its keys |
|---|---|
| folder in the diffusers layout, of a VAE or of a whole model with `vae/` | `encoder.down_blocks.0.…` |
| single file of diffusers | the same; a `config.json` beside it is read |
| single file with the original names, bare or of a whole checkpoint | `[first_stage_model.]encoder.down.0.…` |

Reference: the published files, e.g. vae-ft-mse-840000-ema-pruned.ckpt of https://huggingface.co/stabilityai.
"""

import pathlib
import re

from keras_sd.weights.diffusers_folder import WEIGHT_FILES, vae_state_dict, weight_file
from keras_sd.weights.files import read_arrays, read_json
from keras_sd.weights.single_file import VAE, metadata_config, single_file_config, split_single_file, to_single_file

IGNORED = re.compile(r"(loss|model_ema)\..*|global_step|logvar")


def read_vae(path):
    """Reads an autoencoder.

    Args:
        path: a folder or file as above.

    Returns:
        (config in the fields of diffusers' `AutoencoderKL`, dict of key → array in its naming). What a file's keys and
        shapes do not say is as in SD v1: groups of 32 channels, latents scaled by 0.18215.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, or holds no autoencoder.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return read_json(folder / "config.json"), read_arrays(weight_file(folder, WEIGHT_FILES["vae"]))
    arrays = read_arrays(path)
    config = metadata_config(path).get("vae", {})
    if any(key.startswith(VAE) for key in arrays):
        arrays = {key: array for key, array in arrays.items() if key.startswith(VAE)}
    elif any(key.startswith("encoder.down_blocks.") for key in arrays):
        arrays = vae_state_dict(arrays)
        beside = path.with_name("config.json")
        if beside.is_file() and (found := read_json(beside)).get("_class_name") == "AutoencoderKL":
            config = found
        return single_file_config(to_single_file({"vae": arrays}))["vae"] | config, arrays
    else:
        arrays = {VAE + key: array for key, array in arrays.items() if not IGNORED.fullmatch(key)}
    if not any(key.startswith(f"{VAE}encoder.down.") for key in arrays):
        raise ValueError(f"{str(path)!r} holds no autoencoder: no key begins with encoder.down or {VAE}encoder.down.")
    return single_file_config(arrays)["vae"] | config, split_single_file(arrays)["vae"]
