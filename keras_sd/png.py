"""PNG files that carry how they were drawn, in the `parameters` text chunk that Stable Diffusion tools read."""

import os

from PIL import Image, PngImagePlugin

from keras_sd.weights.files import atomic_file


def write_png(path, image, prompt, negative_prompt="", **parameters):
    """Writes a picture with its parameters, whole or not at all.

    Args:
        path: file to write; its folder is made.
        image: uint8 (H, W, 3).
        prompt, negative_prompt: what it was drawn from.
        **parameters: further fields, e.g. `Steps=25, Seed=7`; underscores become spaces.

    Raises:
        OSError: the file cannot be written.
    """
    fields = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in parameters.items())
    negative = [f"Negative prompt: {negative_prompt}"] if negative_prompt else []
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "\n".join([prompt, *negative, fields]))
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=info)


def read_parameters(path):
    """The `parameters` text of a PNG, "" where it has none."""
    with Image.open(path) as image:
        return image.info.get("parameters", "")


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
