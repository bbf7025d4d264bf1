"""Pictures in a row, side by side or one after the other: a strip (PNG) or an animation (GIF, WebP, MP4)."""

import pathlib
import shutil
import subprocess

import numpy as np
from PIL import Image

from keras_sd.png import check_writable, write_png
from keras_sd.weights.files import atomic_file

FORMATS = (".png", ".gif", ".webp", ".mp4")


def film_strip(images, gap=2):
    """uint8 (frames, H, W, 3) → one picture (H, frames · W + gaps, 3), with white between."""
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(images, axis=1)[:, : images.shape[0] * images.shape[2] - gap]


def check_film(path):
    """Raises where `write_film` could not write to `path`: another ending, no permission, no ffmpeg for MP4."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"A film ends in one of {', '.join(FORMATS)}; got {str(path)!r}.")
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise FileNotFoundError("Writing MP4 needs ffmpeg, which is not on the PATH; .gif and .webp need nothing.")
    check_writable(path)


def write_film(path, images, fps=8, prompt="", **parameters):
    """Writes frames as a strip or an animation, whole or not at all; the file's ending decides.

    Args:
        path: file to write: `.png` is a strip, `.gif`, `.webp` and `.mp4` (by ffmpeg) are animations.
        images: uint8 (frames, H, W, 3).
        fps: frames a second.
        prompt, **parameters: what a strip carries, see `keras_sd.png.write_png`.

    Raises:
        ValueError: the ending is another one, or `fps` is not above 0.
        OSError: the file cannot be written, or ffmpeg is not there or fails.
    """
    check_film(path)
    if not fps > 0:
        raise ValueError(f"fps must be above 0; got {fps!r}.")
    suffix = pathlib.Path(path).suffix.lower()
    if suffix == ".png":
        write_png(path, film_strip(images), prompt, **parameters)
        return
    with atomic_file(path) as file:
        if suffix == ".mp4":
            _encode_mp4(file.name, np.asarray(images), fps)
        else:
            first, *others = map(Image.fromarray, images)
            quality = {"quality": 90} if suffix == ".webp" else {}
            duration = round(1000 / fps)
            first.save(file, suffix[1:], save_all=True, append_images=others, duration=duration, loop=0, **quality)


def _encode_mp4(path, images, fps):
    frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{images.shape[2]}x{images.shape[1]}", "-r", f"{fps}"]
    # Players want colour at half the resolution, which needs even sides.
    output = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-f", "mp4", path]
    command = ["ffmpeg", "-y", "-loglevel", "error", *frames, "-i", "-", *output]
    done = subprocess.run(command, input=images.tobytes(), capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise OSError(None, f"ffmpeg failed: {reason[0]}")
