"""The super-resolution network of ESRGAN and Real-ESRGAN."""

import itertools

import keras
from keras import ops

from keras_sd.models.network import Network

UNSHUFFLE = {4: 1, 2: 2, 1: 4}  # scale → by how much the picture shrinks first, before the network enlarges it by 4


@keras.saving.register_keras_serializable(package="keras_sd")
class RRDBNet(Network):
    """Residual-in-residual dense blocks: enlarges pictures. Fully convolutional; defaults are RealESRGAN_x4plus.

    The body works at one size and the end doubles it twice; for a scale of 2 or 1 the picture comes in at a half or a
    quarter of its size, its pixels folded into channels. RealESRGAN_x4plus_anime_6B has `num_blocks=6`.

    Args:
        in_channels, out_channels: channels of the picture.
        num_features: channels of the body.
        num_blocks: residual-in-residual dense blocks.
        growth_channels: channels that each convolution of a dense block adds.
        scale: 1, 2 or 4.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        image (B, H, W, in_channels) in [0, 1]; H and W multiples of 2 with `scale=2`, of 4 with `scale=1`.

    Returns:
        image (B, scale · H, scale · W, out_channels), about [0, 1] (not clipped).

    Raises:
        ValueError: `scale` is none of those.

    Reference: Wang et al. (2018), ESRGAN, arXiv 1809.00219, section 3.1 and figure 4; Wang et al. (2021), Real-ESRGAN,
    arXiv 2107.10833, section 3.4 (pixel-unshuffle).
    """

    def __init__(
        self,
        in_channels=3,
        out_channels=3,
        num_features=64,
        num_blocks=23,
        growth_channels=32,
        scale=4,
        name="rrdbnet",
        dtype=None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if scale not in UNSHUFFLE:
            raise ValueError(f"scale must be 1, 2 or 4; got {scale!r}.")

        # === Layers ===
        def conv(x, filters, name):
            return keras.layers.Conv2D(filters, 3, padding="same", name=name, dtype=dtype)(x)

        def activation(x):
            return ops.leaky_relu(x, negative_slope=0.2)

        def dense_block(x, name):
            known = x
            for i in range(1, 5):
                new = activation(conv(known, growth_channels, f"{name}.conv{i}"))
                known = ops.concatenate([known, new], axis=-1)
            return x + 0.2 * conv(known, num_features, f"{name}.conv5")

        # === Functional model ===
        image = keras.Input((None, None, in_channels), name="image")
        x = image if scale == 4 else pixel_unshuffle(image, UNSHUFFLE[scale])
        x = first = conv(x, num_features, "conv_first")
        for i in range(num_blocks):
            block = x
            for j in (1, 2, 3):
                block = dense_block(block, f"body.{i}.rdb{j}")
            x = x + 0.2 * block
        x = first + conv(x, num_features, "conv_body")
        for i in (1, 2):
            x = activation(conv(keras.layers.UpSampling2D(2, dtype=dtype)(x), num_features, f"conv_up{i}"))
        x = conv(activation(conv(x, num_features, "conv_hr")), out_channels, "conv_last")
        super().__init__(image, x, name=name)

        # === Config ===
        self.arguments = arguments


def pixel_unshuffle(x, factor):
    """(B, factor · h, factor · w, C) → (B, h, w, C · factor²), channels in torch's order: C, row, column."""
    parts = itertools.product(range(x.shape[-1]), range(factor), range(factor))
    return ops.concatenate([x[:, row::factor, column::factor, c : c + 1] for c, row, column in parts], axis=-1)
