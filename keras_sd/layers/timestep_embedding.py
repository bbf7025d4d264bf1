"""Sinusoidal timestep embedding."""

import math

from keras import ops


def timestep_embedding(timestep, dim, max_period=10000.0):
    """Embeds timesteps as cosines, then sines, of geometrically spaced frequencies.

    Args:
        timestep: (B,) timesteps in [0, 1000), fractional values allowed (Karras spacing).
        dim: even width of the embedding, the first of the U-Net's `block_out_channels`.
        max_period: longest period, in timesteps.

    Returns:
        float32 (B, dim).

    Reference: Vaswani et al. (2017), arXiv 1706.03762, section 3.5; Ho et al. (2020), arXiv 2006.11239, appendix B.
    """
    half = dim // 2
    frequency = ops.exp(ops.arange(half, dtype="float32") * (-math.log(max_period) / half))
    angle = ops.cast(timestep, "float32")[:, None] * frequency[None]
    return ops.concatenate([ops.cos(angle), ops.sin(angle)], axis=-1)
