"""3×3 convolutions with 4 multiplications for each pixel and pair of channels instead of 9, by Winograd's minimal
filtering F(2×2, 3×3): for processors whose products are no faster than their memory allows.

Every 2×2 pixels of the result are Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A of the 4×4 pixels d around them: 16 products over the
channels, with a kernel that is transformed once, and 16/9 of its size. In bfloat16 what is summed is rounded first.

Reference: Lavin & Gray (2015), Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4.1.
"""

import numpy as np
from keras import ops

from keras_sd.layers.kernel_forms import KernelForm, change_kernel

INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], "float32")  # Bᵀ
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], "float32")  # G
OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], "float32")  # Aᵀ


def transform_kernel(kernel):
    """A tensor (3, 3, in, out) → (16, in, out) of the same dtype, G g Gᵀ row by row."""
    rows = ops.matmul(ops.cast(np.kron(KERNEL, KERNEL), kernel.dtype), ops.reshape(kernel, (9, -1)))
    return ops.reshape(rows, (16, *kernel.shape[2:]))


def convolve(x, kernel):
    """The 3×3 convolution with stride 1 and zeros around x (B, H, W, in), of what `transform_kernel` gave: (B, H, W,
    out). Sides may be odd, or unknown before it runs."""
    _, height, width, channels = ops.shape(x)
    filters, (high, wide) = kernel.shape[-1], ((height + 1) // 2, (width + 1) // 2)
    rows = ops.matmul(_cut(height, x.dtype), ops.reshape(x, (-1, height, width * channels)))
    tiles = ops.matmul(_cut(width, x.dtype), ops.reshape(rows, (-1, width, channels)))
    tiles = ops.transpose(ops.reshape(tiles, (-1, 4, high, 4, wide * channels)), (1, 3, 0, 2, 4))
    products = ops.matmul(ops.reshape(tiles, (16, -1, channels)), kernel)
    products = ops.transpose(ops.reshape(products, (4, 4, -1, high, wide * filters)), (2, 0, 3, 1, 4))
    rows = ops.matmul(_join(width, x.dtype), ops.reshape(products, (-1, 4 * wide, filters)))
    pixels = ops.matmul(_join(height, x.dtype), ops.reshape(rows, (-1, 4 * high, width * filters)))
    return ops.reshape(pixels, (-1, height, width, filters))


def _cut(side, dtype):
    """(4 · tiles, side): Bᵀ of each tile's four pixels, the first of which is before or between those of the side; all
    tiles' first numbers, all second ones, …"""
    tiles = (side + 1) // 2
    pixel = ops.arange(side)[None] - (2 * ops.arange(tiles)[:, None] - 1)  # counted from the tile's first
    matrix = ops.tensordot(INPUT, ops.one_hot(pixel, 4), ((1,), (2,)))
    return ops.cast(ops.reshape(matrix, (-1, side)), dtype)


def _join(side, dtype):
    """(side, 4 · tiles): Aᵀ of each tile's four numbers, in the order that `_cut` has them in."""
    tiles = (side + 1) // 2
    pixel = ops.arange(side)[:, None] - 2 * ops.arange(tiles)[None]
    matrix = ops.transpose(ops.tensordot(ops.one_hot(pixel, 2), OUTPUT, 1), (0, 2, 1))
    return ops.cast(ops.reshape(matrix, (side, -1)), dtype)


class WinogradKernel(KernelForm):
    """What a 3×3 convolution becomes when its kernel is transformed."""

    form, file = "transformed (winograd=True)", "that of a model without winograd=True"
    way_back = "Read them without winograd=True."

    def call(self, x, training=None):
        kernel, bias = (ops.cast(one, self.compute_dtype) for one in (self._kernel, self.bias))
        return convolve(x, kernel) + bias


def transform(layer):
    """Transforms the kernel of a built `Conv3x3` with stride 1 and zeros around, and without LoRA factors; one without
    a value when it gets that."""
    kernel, shape = layer._kernel, tuple(layer._kernel.shape)
    transformed = None if kernel._value is None else transform_kernel(ops.convert_to_tensor(kernel))
    change_kernel(layer, WinogradKernel, kernel=((16, *shape[2:]), kernel.dtype))
    layer._kernel.shape_in_files, layer._kernel.from_file = shape, transform_kernel
    if transformed is not None:
        layer._kernel.assign(transformed)
