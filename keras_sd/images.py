"""Pictures in: paths, PIL images and arrays to uint8 arrays of a size that the models take."""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def read_image(image, name="image"):
    """Reads a picture as RGB.

    EXIF orientation is applied, transparency is laid over white, grey and 16-bit pictures are converted.

    Args:
        image: path, PIL image, or array (H, W, 3 or 4) or (H, W): uint8 0 … 255, or float 0 … 1.
        name: what to call it in an error.

    Returns:
        PIL image, mode RGB.

    Raises:
        ValueError: the file cannot be read as a picture, holds an animation, or the array is of another form.
        FileNotFoundError: there is no such file.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open(image, name)
    elif not isinstance(image, Image.Image):
        image = _from_array(image, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, "float32") / 257.0).round().clip(0, 255).astype("uint8"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image, height, width, factor):
    """Scales a PIL image to cover the wanted size and cuts its middle out.

    Without `height` or `width` that side keeps its length, rounded down to a multiple of `factor`.

    Returns:
        PIL image of the wanted size.
    """
    width = width or max(image.width // factor, 1) * factor
    height = height or max(image.height // factor, 1) * factor
    left, top = (image.width - width) // 2, (image.height - height) // 2
    if 0 <= image.width - width < factor and 0 <= image.height - height < factor:
        return image.crop((left, top, left + width, top + height))
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_model(image):
    """A PIL image as float32 (1, H, W, 3) in [-1, 1]."""
    return np.asarray(image, "float32")[None] / 127.5 - 1.0


def _open(path, name):
    try:
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG, its previews after it
            raise ValueError(f"{name}: {str(path)!r} is an animation of {image.n_frames} pictures; give one of them.")
        image.load()
        return image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no file {str(path)!r}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: {str(path)!r} cannot be read as a picture ({error}).") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: {str(path)!r} has more pixels than a picture should (decompression bomb).") from None


def _from_array(array, name):
    array = np.asarray(array)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"{name} must be a path, a PIL image or an array (H, W, 3); got shape {array.shape}.")
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        array = (np.clip(np.asarray(array, "float32"), 0.0, 1.0) * 255.0).round()
    return Image.fromarray(array.astype("uint8"))
