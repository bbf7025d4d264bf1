"""Noise from NumPy: the same seed gives the same numbers at any batch size and on every backend."""

import numbers

import numpy as np

ROW_KEY_SCALE = (2.0**10, 2.0**16)  # a row's timestep and sigma in whole units of this, its key among other rows


def seeds_of(seed, batch_size):
    """The seed of every picture, a list: `seed + i` for an integer, the sequence itself where one per picture is given.

    Raises:
        ValueError: the sequence is not of that length.
    """
    if isinstance(seed, numbers.Integral):
        return [int(seed) + i for i in range(batch_size)]
    if len(seed) != batch_size:
        raise ValueError(f"seed must be an integer or {batch_size} of them, one per picture; got {len(seed)}.")
    return [int(one) for one in seed]


def initial_noise(seed, batch_size, shape):
    """Unit normal noise that a picture starts from.

    Args:
        seed: integer from 0 on, image i of the batch having `seed + i`; or a sequence with one per image.
        batch_size: number of images.
        shape: (h, w, channels) of the latent.

    Returns:
        float32 (batch_size, h, w, channels).
    """
    keys = seeds_of(seed, batch_size)
    return np.stack([np.random.default_rng(key).standard_normal(shape, dtype="float32") for key in keys])


def row_noise(seed, batch_size, shape, table):
    """The fresh noise of stochastic samplers: a function row → float32 (batch_size, h, w, channels).

    It is keyed by the image's seed and the row's own timestep and noise level, so neither the batch nor where a run is
    cut changes a picture; exported graphs draw the same noise. `seed` as in `initial_noise`.
    """
    seeds = seeds_of(seed, batch_size)
    levels = np.stack([table.timestep, table.sigma], axis=1).astype("float32")
    levels = np.round(levels * np.array(ROW_KEY_SCALE, "float32")).astype("int64").tolist()

    def noise(row):
        keys = [(one, 0, *levels[row]) for one in seeds]
        return np.stack([np.random.default_rng(key).standard_normal(shape, dtype="float32") for key in keys])

    return noise


def lerp(start, end, t):
    """Linear interpolation, `(1 - t) * start + t * end`, as float32; where both are equal that is exact."""
    return ((1.0 - t) * np.asarray(start, "float64") + t * np.asarray(end, "float64")).astype("float32")


def slerp(start, end, t):
    """Spherical interpolation: from one noise to another along a great circle, so that what is between is noise, too.

    Args:
        start, end: float arrays (…), of one shape; each is taken as one vector. The ends come back bit for bit.
        t: position in [0, 1].

    Returns:
        float32 (…). Vectors of (almost) one direction are interpolated linearly.

    Reference: Shoemake (1985), Animating Rotation with Quaternion Curves.
    """
    a, b = np.asarray(start, "float64"), np.asarray(end, "float64")
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip(np.vdot(a, b) / lengths, -1.0, 1.0)) if lengths else 0.0
    if np.sin(angle) < 1e-6:
        return lerp(a, b, t)
    return (np.sin((1.0 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b).astype("float32")
