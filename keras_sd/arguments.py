"""What arguments must be: each check returns the value, or raises ValueError with one sentence that names it."""

import numbers

import numpy as np


def count(batch_size, **given):
    """Number of pictures: `batch_size`, or, where that is 1, as many as there are prompts, encoded ones, or seeds."""
    check_integer("batch_size", batch_size, 1)
    for name, value in given.items():
        value = value(0) if callable(value) else value
        count = len(value) if np.ndim(value) in (1, 3) else 1
        if batch_size == 1:
            batch_size = count
        if count not in (1, batch_size):
            name = name.replace("_", " ")
            raise ValueError(f"batch_size is {batch_size}, but there are {count} {name}; give one, or as many.")
    return batch_size


def check_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return int(value)


def check_number(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}.")


def check_scale(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 1 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 1; got {value!r}.")
    return value


def check_strength(strength, name="strength"):
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not 0 <= strength <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {strength!r}.")
    return strength


def check_ratio(name, value):
    """The part of the tokens that `keras_sd.layers.token_merging` merges: one of every 2 × 2 cell stays."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 0.75:
        raise ValueError(f"{name} must be in [0, 0.75]; got {value!r}.")
    return value


def check_seed(name, seed):
    if np.ndim(seed) == 1:
        return [check_integer(name, one, 0) for one in seed]
    return check_integer(name, seed, 0)


def check_noise(noise, shape, name="diffusion_noise"):
    given = np.shape(noise)
    noise = np.asarray(noise, "float32")
    noise = noise[None] if noise.ndim == 3 else noise
    if noise.shape[1:] != shape[1:] or len(noise) not in (1, shape[0]):
        raise ValueError(f"{name} must have shape {shape} or {shape[1:]}; got {given}.")
    return np.repeat(noise, shape[0] // len(noise), axis=0)
