"""The invisible watermark that the original Stable Diffusion scripts put into their pictures.

It is the method `dwtDct` of the package invisible-watermark, which reads what is written here and the other way round.
That package needs PyTorch, OpenCV and PyWavelets; what the method does with them comes down to this: of every 8 × 8
pixels, 16 squares of 2 × 2, the square that is bluest is moved on the axis of blue to where it says 0 or 1. The message
is written over and over, and read by the majority. It survives mild changes of colour, but no scaling and no cropping,
and loses bits in colours that cannot be bluer: a mark for filters of training data, no proof.

Reference: https://github.com/ShieldMnt/invisible-watermark (MIT), `scripts/txt2img.py` of CompVis/stable-diffusion.
"""

import numpy as np

MESSAGE = b"StableDiffusionV1"  # what the original txt2img script writes
MIN_PIXELS = 256 * 256  # below, the message does not fit often enough
STEP = 36.0  # from one bit's value to the same one's next, on the scale of twice the U of YUV
BLUE = np.array([-0.147, -0.289, 0.436])  # U of RGB, but for an offset of 128
ALONG_BLUE = np.array([0.0, -0.395, 2.032])  # RGB of U, at the same Y and V


def check_size(height, width):
    """Raises ValueError where pictures of a size in pixels are too small for a watermark."""
    if height * width < MIN_PIXELS:
        raise ValueError(f"A watermark needs pictures of at least 256 × 256 pixels; got {height} × {width}.")


def add_watermark(image, message=MESSAGE):
    """Writes a message into a picture.

    Args:
        image: uint8 (H, W, 3), RGB, of at least 256 × 256 pixels.
        message: bytes.

    Returns:
        uint8 (H, W, 3), a copy.

    Raises:
        ValueError: the picture is too small, or the message empty.
    """
    if not message:
        raise ValueError("message must hold at least one byte.")
    squares, i, j, second = _squares(image)
    value = squares[i, j]
    bits = np.resize(np.unpackbits(np.frombuffer(message, "uint8")), value.size).reshape(value.shape)
    target = (value // STEP + 0.25 + 0.5 * bits) * STEP
    # Where another square becomes the bluest, and says something else, up instead of down.
    target += STEP * ((second > target) & (_bit(second) != bits))
    change = np.zeros_like(squares)
    change[i, j] = (target - value) / 2
    height, width = 2 * np.array(squares.shape)
    marked = np.array(image)
    pixels = marked[:height, :width] + change.repeat(2, axis=0).repeat(2, axis=1)[..., None] * ALONG_BLUE
    marked[:height, :width] = np.clip(np.round(pixels), 0, 255).astype("uint8")
    return marked


def read_watermark(image, length=17):
    """Reads a message of so many bytes; arbitrary ones where the picture has no watermark.

    Args:
        image: uint8 (H, W, 3), RGB, of at least 256 × 256 pixels.
        length: number of bytes.
    """
    squares, i, j, _ = _squares(image)
    votes = _bit(squares[i, j]).ravel()
    place = np.arange(votes.size) % (8 * length)
    share = np.bincount(place, votes, 8 * length) / np.bincount(place, minlength=8 * length)
    return np.packbits(share * 255 > 127).tobytes()


def _bit(value):
    return value % STEP > STEP / 2


def _squares(image):
    """Twice the mean U of each 2 × 2 pixels; of each 4 × 4 of those the bluest's row and column, and the second value.

    The first of each 4 × 4 does not count.
    """
    image = np.asarray(image)
    check_size(*image.shape[:2])
    height, width = (side // 4 * 2 for side in image.shape[:2])
    blue = image[: 2 * height, : 2 * width] @ BLUE + 128
    squares = blue.reshape(height, 2, width, 2).sum(axis=(1, 3)) / 2
    rows, columns = height // 4, width // 4
    blocks = squares[: 4 * rows, : 4 * columns].reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(rows, columns, 16)
    place = 1 + blocks[..., 1:].argmax(axis=-1)
    i, j = 4 * np.arange(rows)[:, None] + place // 4, 4 * np.arange(columns) + place % 4
    return squares, i, j, np.sort(blocks[..., 1:], axis=-1)[..., -2]
