"""Halving and doubling of height and width, each with its 3×3 convolution."""

import keras
from keras import ops

from keras_sd.layers.conv import Conv3x3


@keras.saving.register_keras_serializable(package="keras_sd")
class Downsample(keras.layers.Layer):
    """3×3 convolution with stride 2: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, filters).

    Args:
        filters: output channels.
        padding: rows and columns of zeros (before, after): (1, 1) in the U-Net, (0, 1) in the autoencoder, where an odd
            size rounds down.
    """

    def __init__(self, filters, padding=(1, 1), **kwargs):
        super().__init__(**kwargs)
        self.pad = keras.layers.ZeroPadding2D((tuple(padding), tuple(padding)), dtype=self.dtype_policy)
        self.conv = Conv3x3(filters, strides=2, padding="valid", name="conv", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.conv.build(input_shape)

    def compute_output_shape(self, input_shape):
        return self.conv.compute_output_shape(self.pad.compute_output_shape(input_shape))

    def call(self, x):
        return self.conv(self.pad(x))


@keras.saving.register_keras_serializable(package="keras_sd")
class Upsample(keras.layers.Layer):
    """Nearest-neighbour doubling, then a 3×3 convolution: (B, H, W, C) → (B, 2H, 2W, filters).

    Call arguments:
        x: (B, H, W, C).
        like: optional tensor whose height and width the result takes (2H or 2H - 1, 2W or 2W - 1): the next skip
            connection, where a level's size was odd.
        training: False in predictions.
    """

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.conv = Conv3x3(filters, name="conv", dtype=self.dtype_policy)

    def build(self, x_shape, like_shape=None):
        self.conv.build(x_shape)

    def compute_output_shape(self, x_shape, like_shape=None):
        batch_size, height, width, _ = x_shape
        doubled = (None if side is None else 2 * side for side in (height, width))
        return (batch_size, *(like_shape[1:3] if like_shape else doubled), self.conv.filters)

    def call(self, x, like=None, training=None):
        doubled = self.compute_output_shape(x.shape)[1:3]
        fits = like is None or (None not in doubled and tuple(like.shape[1:3]) == doubled)
        # the sums of a kernel that is larger than the picture would take what they save, and memory
        large = None in doubled or 2 * doubled[0] * doubled[1] >= self.conv.filters
        if training is False and fits and large:
            return self.conv(x, doubled=True)
        # Rows and columns doubled by concatenation and reshape: plain copies, on every backend and in every export.
        _, height, width, channels = ops.shape(x)
        x = ops.reshape(ops.concatenate([x, x], axis=-1), (-1, height, 2 * width * channels))
        x = ops.reshape(ops.concatenate([x, x], axis=-1), (-1, 2 * height, 2 * width, channels))
        if like is not None:
            x = x[:, : ops.shape(like)[1], : ops.shape(like)[2]]
        return self.conv(x)
