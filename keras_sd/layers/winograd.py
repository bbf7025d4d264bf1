"""3×3 convolutions with half of the multiplications or fewer, by Winograd's minimal filtering: for processors whose
products are no faster than their memory allows.

F(m, 3) makes m pixels in a row of the m + 2 around them, d, as Aᵀ [(G g) ⊙ (Bᵀ d)]: m + 2 products over the channels
instead of 3m. `by_rows` has F(4, 3) along the height: 4.5 multiplications for each pixel and pair of channels instead
of 9. `by_squares` has F(2, 3) along both sides: 4; but what its pixels become is 4 times as much, that of the former
1.5 times, so it is for few pixels with many channels. In bfloat16 what is summed is rounded first.

References: Lavin & Gray (2015), Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4;
Barabasz et al. (2020), Error Analysis and Improving the Accuracy of Winograd Convolution, arXiv 1803.10986, for points.
"""

import functools
import pathlib

import keras
import numpy as np
from keras import ops

from keras_sd.layers.backend_fixes import after


def _filtering(size, points, factors):
    """Bᵀ, G and Aᵀ of F(size, 3) by polynomials' values at size + 1 points and at infinity, G with a factor for each
    point that Aᵀ has the inverse of."""
    rest = [[other for other in points if other != point] for point in points]
    values = [np.append(np.poly(others)[::-1], 0) for others in rest]
    scales = np.array([np.prod([point - other for other in others]) for point, others in zip(points, rest)])
    powers, factors = np.array(points)[:, None] ** np.arange(max(size, 3)), np.array(factors)[:, None]
    infinity = np.eye(max(size, 3))
    return (
        np.stack([*values, np.poly(points)[::-1]]).astype("float32"),
        np.vstack([powers[:, :3] * factors, infinity[2, :3]]).astype("float32"),
        np.vstack([powers[:, :size] / factors / scales[:, None], infinity[size - 1, :size]]).T.astype("float32"),
    )


TWO = _filtering(2, (0.0, 1.0, -1.0), (1.0, 0.5, 0.5))
# Of the five points by halves and twos those with the least error in bfloat16; with these factors all three matrices
# are numbers of bfloat16, to 1/16000.
FOUR = _filtering(4, (0.0, 1.0, -1.0, 0.5, -2.0), (1.0, 1.34375, 1.34375, 1.4296875, 1.4296875))


def _cut(filtering, side, dtype):
    """(values · tiles, side): Bᵀ of each tile's pixels, the first of which is before or between those of the side; all
    tiles' first numbers, all second ones, …"""
    matrix, _, output = filtering
    size = len(output)
    tiles = (side + size - 1) // size
    pixel = ops.arange(side)[None] - (size * ops.arange(tiles)[:, None] - 1)  # counted from the tile's first
    matrix = ops.tensordot(matrix, ops.one_hot(pixel, len(matrix)), ((1,), (2,)))
    return ops.cast(ops.reshape(matrix, (-1, side)), dtype)


def _join(filtering, side, dtype):
    """(side, values · tiles): Aᵀ of each tile's numbers, in the order that `_cut` has them in."""
    _, _, output = filtering
    size = len(output)
    tiles = (side + size - 1) // size
    pixel = ops.arange(side)[:, None] - size * ops.arange(tiles)[None]
    matrix = ops.transpose(ops.tensordot(ops.one_hot(pixel, size), output, 1), (0, 2, 1))
    return ops.cast(ops.reshape(matrix, (side, -1)), dtype)


def by_rows(x, kernel, bias):
    """The convolution with stride 1 and zeros around it.

    Args:
        x: (B, H, W, in); sides may be odd, or unknown before it runs.
        kernel: (3, 3, in, out).
        bias: (out,).

    Returns:
        (B, H, W, out).
    """
    _, height, width, channels = ops.shape(x)
    filters, tiles = kernel.shape[-1], (height + 3) // 4
    x, kernel = after(x, kernel)  # which takes twice its memory
    kernel = ops.matmul(ops.cast(FOUR[1], kernel.dtype), ops.reshape(kernel, (3, -1)))
    kernel = ops.reshape(kernel, (6, 1, 3, channels, filters))
    rows = ops.matmul(_cut(FOUR, height, x.dtype), ops.reshape(x, (-1, height, width * channels)))
    rows = ops.unstack(ops.reshape(rows, (-1, 6, tiles, width, channels)), 6, axis=1)
    products = [ops.conv(row, kernel[i], padding="same") for i, row in enumerate(rows)]
    products[1] = ops.add(products[1], bias / float(FOUR[2][0, 1]))  # every pixel is a sum with this one
    products = ops.reshape(ops.stack(products, axis=1), (-1, 6 * tiles, width * filters))
    pixels = ops.matmul(_join(FOUR, height, x.dtype), products)
    return ops.reshape(pixels, (-1, height, width, filters))


def by_squares(x, kernel, bias):
    """See `by_rows`."""
    _, height, width, channels = ops.shape(x)
    filters, (high, wide) = kernel.shape[-1], ((height + 1) // 2, (width + 1) // 2)
    cut, join = (functools.partial(make, TWO, dtype=x.dtype) for make in (_cut, _join))
    x, kernel = after(x, kernel)
    kernel = ops.matmul(ops.cast(np.kron(TWO[1], TWO[1]), kernel.dtype), ops.reshape(kernel, (9, -1)))
    rows = ops.matmul(cut(height), ops.reshape(x, (-1, height, width * channels)))
    tiles = ops.matmul(cut(width), ops.reshape(rows, (-1, width, channels)))
    tiles = ops.transpose(ops.reshape(tiles, (-1, 4, high, 4, wide * channels)), (1, 3, 0, 2, 4))
    products = ops.matmul(ops.reshape(tiles, (16, -1, channels)), ops.reshape(kernel, (16, channels, filters)))
    products = ops.transpose(ops.reshape(products, (4, 4, -1, high, wide * filters)), (2, 0, 3, 1, 4))
    rows = ops.matmul(join(width), ops.reshape(products, (-1, 4 * wide, filters)))
    pixels = ops.matmul(join(height), ops.reshape(rows, (-1, 4 * high, width * filters)))
    return ops.reshape(pixels, (-1, height, width, filters)) + bias


def faster(pixels, channels, dtype):
    """`by_rows`, `by_squares`, or None where neither takes less time than a convolution.

    Args:
        pixels: shape (B, H, W), None where it is unknown.
        channels: of the input and the output.
        dtype: of both and the kernel.
    """
    if min(channels) < MIN_CHANNELS or None in pixels[1:] or not _multiplies_slowly(dtype):
        return None
    batch, height, width = pixels
    if height * width >= MANY_PIXELS:
        return by_rows
    return by_squares if (batch or 1) * height * width >= FEW_PIXELS else None


MIN_CHANNELS = 320  # with fewer, pixels take as long to transform as the products save
MANY_PIXELS = 24**2  # of a picture, from which on kernels for rows are the smaller part
FEW_PIXELS = 16**2  # of a batch, below which the kernel takes as long to transform


@functools.cache
def _multiplies_slowly(dtype):
    """Whether it is products that convolutions take their time for: not on GPUs, nor in 16 bits on matrix units."""
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow" or tf.config.list_physical_devices("GPU"):
        return False
    processor = pathlib.Path("/proc/cpuinfo")  # whose flags name Intel's AMX
    return dtype == "float32" or not (processor.exists() and "amx_bf16" in processor.read_text())
