"""Pictures in: paths, PIL images and arrays to uint8 arrays of a size that the models take."""

import os
import warnings

import numpy as np
from PIL import Image, ImageFilter, ImageOps


def read_image(image, name="image"):
    """Reads a picture as RGB.

    EXIF orientation is applied, transparency is laid over white, grey and 16-bit pictures are converted.

    Args:
        image: path, PIL image, or array (H, W, 3 or 4) or (H, W): integers 0 … 255, uint16 0 … 65535, or float 0 … 1.
        name: what to call it in an error.

    Returns:
        PIL image, mode RGB.

    Raises:
        ValueError: the file cannot be read as a picture, is an animation, or is larger than a picture should be; or the
            array is of another form or range.
        FileNotFoundError: there is no such file.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open(image, name)
    elif not isinstance(image, Image.Image):
        image = _from_array(image, name)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, grey
        image = _from_array(np.clip(image, 0, 65535).astype("uint16"), name)
    if image.mode == "F":
        image = _from_array(np.asarray(image), name)
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


def feathered(mask, feather):
    """How much of the new picture shows where: 0 outside a mask, and inside it 1 from `feather` pixels off its edge on.

    Args:
        mask: bool (H, W); beyond the picture's own edges it goes on.
        feather: pixels over which the weights rise, evenly.

    Returns:
        float32 (H, W) in [0, 1].
    """
    inside, total = Image.fromarray(mask.astype("uint8")), mask.astype("float32")
    for _ in range(feather):
        inside = inside.filter(ImageFilter.MinFilter(3))
        total += np.asarray(inside)
    return total / (feather + 1)


def _open(path, name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            # The further pictures of a phone's JPEG (MPO) are previews of the first.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames == 1:
                image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no file {str(path)!r}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{name}: {str(path)!r} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that a picture may have here "
            "(it could be a decompression bomb)."
        ) from None
    except Exception as error:  # damaged files raise whatever their decoder stumbles over
        raise ValueError(f"{name}: {str(path)!r} cannot be read as a picture ({error}).") from None
    if frames > 1:
        raise ValueError(f"{name}: {str(path)!r} is an animation of {frames} pictures; give one of them.")
    return image


def _from_array(array, name):
    array = np.asarray(array)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"{name} must be a path, a PIL image or an array (H, W, 3); got shape {array.shape}.")
    floating = array.dtype == bool or np.issubdtype(array.dtype, np.floating)
    if not floating and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be an array of integers 0 … 255 or floats 0 … 1; got dtype {array.dtype}.")
    most = 1 if floating else 65535 if array.dtype == np.uint16 else 255
    low, high = float(array.min()), float(array.max())
    if not (-0.01 * floating <= low and high <= most + 0.01 * floating):  # a network's floats may leave it a little
        raise ValueError(f"{name} must be from 0 to {most} as an array of {array.dtype}; got {low:g} to {high:g}.")
    if array.dtype != np.uint8:
        array = np.clip(np.round(np.asarray(array, "float32") * (255.0 / most)), 0, 255).astype("uint8")
    return Image.fromarray(array)
