"""Edges of a picture, as the ControlNets for edges were trained with."""

import numpy as np

from keras_sd.images import read_image


def canny(image, low=100, high=200):
    """Canny's edges: white lines, one pixel wide, on black.

    Args:
        image: path, PIL image or array, as `keras_sd.images.read_image` takes it.
        low, high: thresholds of the gradient: pixels above `high` are edges, and those above `low` that go on from one.

    Returns:
        uint8 (H, W, 3), 0 or 255.

    Raises:
        ImportError: OpenCV, an extra, is not installed.
        ValueError: the thresholds are not 0 ≤ low ≤ high, or the image cannot be read.

    Reference: Canny (1986), A Computational Approach to Edge Detection, IEEE PAMI 8(6); OpenCV's `cv2.Canny`.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("canny needs OpenCV, which is an extra: pip install opencv-python-headless.") from error
    if not 0 <= low <= high:
        raise ValueError(f"canny: 0 ≤ low ≤ high is needed; got low {low!r} and high {high!r}.")
    edges = cv2.Canny(np.asarray(read_image(image)), low, high)
    return np.repeat(edges[..., None], 3, axis=-1)
