"""Aspect-ratio buckets: sizes of about equal area, so that a picture is trained on in about its own shape.

Reference: NovelAI (2022), https://github.com/NovelAI/novelai-aspect-ratio-bucketing; kohya's sd-scripts do the same.
"""

import math

import numpy as np


def make_buckets(height, width, step=None):
    """The sizes in which pictures are trained on where `height` × `width` is the size of a square one.

    The width goes from half to twice √(height · width) in steps; the height is the largest multiple of the step that
    keeps the area at most `height · width`. The given size is always one of them.

    Args:
        height, width: pixels, multiples of 8.
        step: what all sides are multiples of; by default 64, or 8 where a side is below 256.

    Returns:
        list of (height, width), from the tallest to the widest.

    Raises:
        ValueError: a side is no positive multiple of 8.
    """
    for name, side in (("height", height), ("width", width)):
        if side < 8 or side % 8:
            raise ValueError(f"{name} must be a positive multiple of 8; got {side}.")
    area = height * width
    step = step or (64 if min(height, width) >= 256 else 8)
    longest = int(2 * math.sqrt(area)) // step * step
    sizes = {(height, width)}
    for side in range(max(-(-math.isqrt(area) // (2 * step)), 1) * step, longest + 1, step):
        other = min(area // side // step * step, longest)
        if other:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def choose_buckets(sizes, buckets):
    """The bucket of each picture: that whose aspect ratio is nearest in proportion, the larger one of two as near.

    Args:
        sizes: (N, 2) heights and widths in pixels.
        buckets: list of (height, width).

    Returns:
        int64 (N, 2) heights and widths of the buckets.
    """
    buckets = np.asarray(sorted(buckets, key=lambda size: -size[0] * size[1]), "int64").reshape(-1, 2)
    own, offered = (np.log(x[:, 1] / x[:, 0]) for x in (np.asarray(sizes, "float64").reshape(-1, 2), buckets))
    # rounded, so that equal ratios are equal whatever the sides
    return buckets[np.argmin(np.round(np.abs(own[:, None] - offered), 9), axis=1)]
