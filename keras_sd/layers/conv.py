"""The 3×3 convolution of the residual blocks, of halving and after doubling."""

import keras
import numpy as np
from keras import ops

from keras_sd.layers import winograd
from keras_sd.layers.backend_fixes import after
from keras_sd.layers.dense import product


@keras.saving.register_keras_serializable(package="keras_sd")
class Conv3x3(keras.layers.Conv2D):
    """`keras.layers.Conv2D`, 3×3 and padded by default, which TensorFlow computes in other ways in predictions: by
    `keras_sd.layers.winograd` where that is faster, and as one product where positions are few and the kernel is large.

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
        if training is not False or keras.backend.backend() != "tensorflow":
            return super().call(x)
        batch, height, width, _ = self.compute_output_shape(x.shape)
        whole = self.strides == (1, 1) and self.padding == "same"
        if by := whole and winograd.faster((batch, height, width), (x.shape[-1], self.filters), self.compute_dtype):
            return by(x, ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(self.bias))
        few = None not in (height, width) and 4 * height * width <= self.filters
        return self._product(x, height, width) if few else super().call(x)

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
        """The convolution of the picture that has each pixel of x four times, which is never made, with a quarter of
        the multiplications.

        Of the two pixels that x₁ between x₀ and x₂ becomes, kernel (a, b, c), one is a x₀ + (b + c) x₁, the other
        (a + b) x₁ + c x₂: with s = a + b + c s x₁ - a (x₁ - x₀) and s x₁ - c (x₁ - x₂), three products instead of six.
        Along both sides nine instead of 36, with a kernel as large as it was. Of sums TensorFlow would make `AddN`s,
        which begin with whichever buffer is free: differences are the same in every call.
        """
        _, height, width, _ = ops.shape(x)
        x, kernel = after(x, ops.convert_to_tensor(self.kernel))  # whose sums take memory
        kernel = ops.reshape(
            ops.matmul(ops.cast(SUMS, kernel.dtype), ops.reshape(kernel, (9, -1))), (9, 1, 1, *kernel.shape[2:])
        )
        padded = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

        def pixels(i, row, bias=0):
            before, at, behind = (ops.conv(one, kernel[3 * i + j]) for j, one in enumerate(_differences(row, axis=2)))
            return ops.concatenate([at + bias - before, at + bias - behind], axis=-1)

        above, at, below = _differences(padded, axis=1)
        at = pixels(1, at, ops.convert_to_tensor(self.bias))
        first, below = after(at - pixels(0, above), below)  # whose products take the memory of those above
        rows = [ops.reshape(row, (-1, height, 2 * width * self.filters)) for row in (first, at - pixels(2, below))]
        return ops.reshape(ops.concatenate(rows, axis=-1), (-1, 2 * height, 2 * width, self.filters))


def _differences(x, axis):
    """Of a tensor with one more position before and after an axis: each position less the one before it, itself, and
    less the next one."""
    before, at, behind = (x[(slice(None),) * axis + (one,)] for one in (slice(None, -2), slice(1, -1), slice(2, None)))
    return at - before, at, at - behind


SIDE = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]], "float32")  # (a, b, c) → (a, s, c)
SUMS = np.kron(SIDE, SIDE)
