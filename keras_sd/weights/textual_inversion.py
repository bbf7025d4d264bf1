"""Textual inversions to and from files: the vectors of a new token, in the formats people have.

| file | holds |
|---|---|
| diffusers, `.bin` or `.safetensors` (also `learned_embeds.…` in a folder) | token → vectors |
| AUTOMATIC1111's web UI, `.pt` | `string_to_param` → `*` → vectors, `name` |
| AUTOMATIC1111's web UI, `.safetensors` | `emb_params` → vectors |
| one tensor, `.pt` or `.bin` | vectors |

Reference: Gal et al. (2022), An Image is Worth One Word, arXiv 2208.01618.
"""

import pathlib

import numpy as np

from keras_sd.weights.files import read_arrays, read_nested, write_safetensors

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
NAMELESS = ("emb_params", "*", "")


def read_textual_inversion(path, token=None):
    """Reads a textual inversion.

    Args:
        path: a file in one of the formats above, or a folder with one under diffusers' name.
        token: what to write in prompts; by default the file's own token, or its name without the ending.

    Returns:
        (token, vectors float32 (n, width)).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged or holds no textual inversion.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{str(path)!r} holds no {' or '.join(FILES)}.")
        path = found[0]
    content = read_arrays(path) if path.suffix == ".safetensors" or not path.is_file() else read_nested(path)
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        parameters, name = content["string_to_param"], content.get("name")
        content = {name if isinstance(name, str) else "*": array for array in parameters.values()}
    elif isinstance(content, np.ndarray):
        content = {"*": content}
    if not isinstance(content, dict) or len(content) != 1:
        names = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{str(path)!r} is no textual inversion of Stable Diffusion v1 or v2: it holds {names}.")
    ((name, vectors),) = content.items()
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2) or not vectors.size:
        raise ValueError(f"{str(path)!r} is no textual inversion: {name} holds no vectors.")
    token = (path.stem if name in NAMELESS else name) if token is None else token
    return token, np.atleast_2d(np.asarray(vectors, "float32"))


def write_textual_inversion(path, token, vectors):
    """Writes a `.safetensors` file that diffusers and the web UI open.

    Args:
        path: file to write; it appears whole or not at all.
        token: what to write in prompts.
        vectors: (n, width).

    Raises:
        ValueError: the file has another ending.
        OSError: it cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"A textual inversion's file must end in .safetensors; got {str(path)!r}.")
    vectors = np.asarray(vectors, "float32")
    write_safetensors(path, {token: vectors[0] if len(vectors) == 1 else vectors})
