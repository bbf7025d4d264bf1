"""Noise from NumPy: the same seed gives the same numbers at any batch size and on every backend."""

import numpy as np

ROW_KEY_SCALE = (2.0**10, 2.0**16)  # a row's timestep and sigma in whole units of this, its key among other rows


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


def row_noise(seed, batch_size, shape, table):
    """The fresh noise of stochastic samplers: a function row → float32 (batch_size, h, w, channels).

    It is keyed by the image's seed and the row's own timestep and noise level, so neither the batch nor where a run is
    cut changes a picture; exported graphs draw the same noise.
    """
    levels = np.stack([table.timestep, table.sigma], axis=1).astype("float32")
    levels = np.round(levels * np.array(ROW_KEY_SCALE, "float32")).astype("int64").tolist()

    def noise(row):
        keys = [(seed + i, 0, *levels[row]) for i in range(batch_size)]
        return np.stack([np.random.default_rng(key).standard_normal(shape, dtype="float32") for key in keys])

    return noise
