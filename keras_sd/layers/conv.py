"""The 3×3 convolution of the residual blocks, of halving and after doubling."""

import keras
import numpy as np
from keras import ops

from keras_sd.layers.backend_fixes import after
from keras_sd.layers.dense import product


@keras.saving.register_keras_serializable(package="keras_sd")
class Conv3x3(keras.layers.Conv2D):
    """`keras.layers.Conv2D`, 3×3 and padded by default, which TensorFlow computes as one product in predictions where
    positions are few and the kernel is large.

    oneDNN packs the kernel of a convolution anew in every call, into memory that the system clears for it: with 2560
    channels at 8×8 positions that took several times as long as the product. Training would keep the nine copies of
    the input, and LiteRT takes kernels as they are.

    Args:
        filters: output channels.

    Call arguments:
        x: (B, H, W, C).
        training: False in predictions.
        doubled: convolve the picture that has each pixel of x four times; see `_doubled`.

    Returns:
        (B, H, W, filters), or (B, 2H, 2W, filters).
    """

    def __init__(self, filters, kernel_size=3, padding="same", **kwargs):
        super().__init__(filters, kernel_size, padding=padding, **kwargs)

    def call(self, x, training=None, doubled=False):
        if doubled:
            return self._doubled(x)
        _, height, width, _ = self.compute_output_shape(x.shape)
        small = None not in (height, width) and 4 * height * width <= self.filters
        if training is not False or not small or keras.backend.backend() != "tensorflow":
            return super().call(x)
        return self._product(x, height, width)

    def _product(self, x, height, width):
        import tensorflow as tf

        if self.padding == "same":
            x = tf.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        pixels = tf.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))
        (down, right), index = self.strides, np.arange(pixels.shape[1], dtype="int32").reshape(x.shape[1:3])
        seen = [index[i::down, j::right][:height, :width] for i in range(3) for j in range(3)]
        rows = tf.gather(pixels, np.stack(seen, axis=-1).ravel(), axis=1)
        kernel = tf.reshape(tf.convert_to_tensor(self.kernel), (9 * x.shape[-1], self.filters))
        rows = tf.reshape(rows, (-1, height * width, kernel.shape[0]))
        return tf.reshape(product(rows, kernel, self.bias), (-1, height, width, self.filters))

    def _doubled(self, x):
        """The four pixels that one becomes see 2×2 pixels of x each, by sums of the kernel's rows and columns: 4/9 of
        the multiplications, and the doubled picture is never made.

        Reference: Aitken et al. (2017), Checkerboard artifact free sub-pixel convolution, arXiv 1707.02937, section 3.
        """
        _, height, width, _ = ops.shape(x)
        x, kernel = after(x, ops.convert_to_tensor(self.kernel))  # whose sums take memory
        padded = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = []
        for i in range(2):
            of_row = _of_pixel(kernel, i, axis=0)
            pixels = [
                ops.conv(padded[:, i : i + height + 1, j : j + width + 1], _of_pixel(of_row, j, axis=1))
                for j in range(2)
            ]
            pixels = [ops.add(one, self.bias) for one in pixels]
            rows.append(ops.reshape(ops.concatenate(pixels, axis=-1), (-1, height, 2 * width * self.filters)))
            rows[-1], kernel = after(rows[-1], kernel)  # the first row's are given up before there are others
        return ops.reshape(ops.concatenate(rows, axis=-1), (-1, 2 * height, 2 * width, self.filters))


def _of_pixel(kernel, i, axis):
    """Of a kernel of three rows (axis 0) or columns (1), that of two which computes the first (i = 0) or the second of
    the pixels that one becomes: two of the three see the same pixel, and are summed."""
    first, second, third = ops.split(kernel, 3, axis=axis)
    return ops.concatenate([first + second, third] if i else [first, second + third], axis)
