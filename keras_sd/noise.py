"""Noise from NumPy: the same seed gives the same numbers at any batch size and on every backend."""

import numpy as np


def initial_noise(seed, batch_size, shape):
    """Unit normal noise that a picture starts from; image i of a batch has the seed `seed + i`.

    Args:
        seed: integer from 0 on.
        batch_size: number of images.
        shape: (h, w, channels) of the latent.

    Returns:
        float32 (batch_size, h, w, channels).
    """
    return np.stack(
        [np.random.default_rng(seed + i).standard_normal(shape, dtype="float32") for i in range(batch_size)]
    )


def row_noise(seed, batch_size, shape):
    """The fresh noise of stochastic samplers: a function row → float32 (batch_size, h, w, channels).

    It is keyed by the image's seed and the row, so neither the batch nor where a run is cut changes a picture.
    """

    def noise(row):
        keys = [(seed + i, 1 + row) for i in range(batch_size)]
        return np.stack([np.random.default_rng(key).standard_normal(shape, dtype="float32") for key in keys])

    return noise
