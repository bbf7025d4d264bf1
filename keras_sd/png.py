"""PNG files that carry how they were drawn, in the `parameters` text chunk that Stable Diffusion tools read.

The text is that of AUTOMATIC1111's web UI, which its peers and the sites that share pictures understand:

    red apple on a blue background
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: emoji
"""

import json
import os
import re

from PIL import Image, PngImagePlugin

from keras_sd.weights.files import atomic_file

# What those tools call our samplers; the others are written in capitals.
SAMPLER_NAMES = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
_NEGATIVE = "Negative prompt: "
_FIELD = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def write_png(path, image, prompt, negative_prompt="", **parameters):
    """Writes a picture with its parameters, whole or not at all.

    Args:
        path: file to write; its folder is made.
        image: uint8 (H, W, 3).
        prompt, negative_prompt: what it was drawn from.
        **parameters: further fields, e.g. `Steps=25, Seed=7`; underscores become spaces. Fields of None are left out.

    Raises:
        OSError: the file cannot be written.
    """
    fields = [f"{key.replace('_', ' ')}: {_quote(str(x))}" for key, x in parameters.items() if x is not None]
    negative = [f"{_NEGATIVE}{negative_prompt}"] if negative_prompt else []
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "\n".join([prompt, *negative, ", ".join(fields)]))
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=info)


def read_parameters(path):
    """What a PNG was drawn with.

    Returns:
        dict of strings with `prompt`, `negative_prompt` and the fields, e.g. `Seed`; empty where the PNG says nothing.
        A prompt with a line that itself begins with "Negative prompt:" is cut there: the format cannot tell.
    """
    with Image.open(path) as image:
        text = image.info.get("parameters")
    if text is None:
        return {}
    prompt, _, last = text.rpartition("\n")
    prompt, _, negative = prompt.partition("\n" + _NEGATIVE)
    fields = {key: json.loads(value) if value.startswith('"') else value for key, value in _FIELD.findall(last)}
    return {"prompt": prompt, "negative_prompt": negative, **fields}


def check_writable(path):
    """Raises OSError, with one clear sentence, where no file could be written at `path`; leaves nothing behind."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"Cannot write {path!r}: it is a folder; name a file in it.")
    folder = os.path.dirname(os.path.abspath(path))
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise NotADirectoryError(f"Cannot write {path!r}: {existing!r} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"Cannot write {path!r}: no permission to write in {existing!r}.")


def _quote(value):
    """A value that the next field cannot be mistaken for a part of."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value
