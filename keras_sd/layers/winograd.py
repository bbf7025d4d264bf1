"""3×3 convolutions with half of the multiplications or fewer, by Winograd's minimal filtering: for processors whose
products are no faster than their memory allows.

F(m, 3) makes m pixels in a row of the m + 2 around them, d, as Aᵀ [(G g) ⊙ (Bᵀ d)]: m + 2 products over the channels
instead of 3m, with a kernel g that is transformed once. `RowsKernel` has F(4, 3) along the height: 4.5 multiplications
for each pixel and pair of channels instead of 9, and a kernel twice as large. `SquaresKernel` has F(2, 3) along both
sides: 4, and 16/9; but what its pixels become is 4 times as much, that of the former 1.5 times, so it is for few pixels
with many channels. In bfloat16 what is summed is rounded first.

References: Lavin & Gray (2015), Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4;
Barabasz et al. (2020), Error Analysis and Improving the Accuracy of Winograd Convolution, arXiv 1803.10986, for points.
"""

import functools

import numpy as np
from keras import ops

from keras_sd.layers.kernel_forms import KernelForm, change_kernel


def _filtering(size, points):
    """Bᵀ, G and Aᵀ of F(size, 3) by polynomials' values at size + 1 points and at infinity."""
    rest = [[other for other in points if other != point] for point in points]
    values = [np.append(np.poly(others)[::-1], 0) for others in rest]
    scales = [np.prod([point - other for other in others]) for point, others in zip(points, rest)]
    powers = np.array(points)[:, None] ** np.arange(max(size, 3))
    infinity = np.eye(max(size, 3))
    return (
        np.stack([*values, np.poly(points)[::-1]]).astype("float32"),
        np.vstack([powers[:, :3] / np.array(scales)[:, None], infinity[2, :3]]).astype("float32"),
        np.vstack([powers[:, :size], infinity[size - 1, :size]]).T.astype("float32"),
    )


TWO = _filtering(2, (0.0, 1.0, -1.0))
FOUR = _filtering(
    4, (0.0, 1.0, -1.0, 0.5, -2.0)
)  # of the five by halves and twos those with the least error in bfloat16


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


class WinogradKernel(KernelForm):
    """What a 3×3 convolution becomes when its kernel is transformed. Subclasses say how, and convolve with it."""

    form, file = "transformed (winograd=True)", "that of a model without winograd=True"
    way_back = "Read them without winograd=True."

    def call(self, x, training=None):
        return self.convolve(x, *(ops.cast(one, self.compute_dtype) for one in (self._kernel, self.bias)))


class RowsKernel(WinogradKernel):
    @staticmethod
    def transformed(kernel):
        """A tensor (3, 3, in, out) → (6, 3, in, out) of the same dtype, G g."""
        rows = ops.matmul(FOUR[1], ops.cast(ops.reshape(kernel, (3, -1)), "float32"))  # whose thirds are not exact
        return ops.cast(ops.reshape(rows, (6, *kernel.shape[1:])), kernel.dtype)

    @staticmethod
    def convolve(x, kernel, bias):
        """The convolution with stride 1 and zeros around x (B, H, W, in), of what `transformed` gave: (B, H, W, out).
        Sides may be odd, or unknown before it runs."""
        _, height, width, channels = ops.shape(x)
        filters, tiles = kernel.shape[-1], (height + 3) // 4
        rows = ops.matmul(_cut(FOUR, height, x.dtype), ops.reshape(x, (-1, height, width * channels)))
        rows = ops.unstack(ops.reshape(rows, (-1, 6, tiles, width, channels)), 6, axis=1)
        products = [ops.conv(row, kernel[i][None], padding="same") for i, row in enumerate(rows)]
        products[1] = ops.add(products[1], bias)  # every pixel is a sum with this one, once
        products = ops.reshape(ops.stack(products, axis=1), (-1, 6 * tiles, width * filters))
        return ops.reshape(ops.matmul(_join(FOUR, height, x.dtype), products), (-1, height, width, filters))


class SquaresKernel(WinogradKernel):
    @staticmethod
    def transformed(kernel):
        """A tensor (3, 3, in, out) → (16, in, out) of the same dtype, G g Gᵀ row by row."""
        rows = ops.matmul(ops.cast(np.kron(TWO[1], TWO[1]), kernel.dtype), ops.reshape(kernel, (9, -1)))
        return ops.reshape(rows, (16, *kernel.shape[2:]))

    @staticmethod
    def convolve(x, kernel, bias):
        """See `RowsKernel.convolve`."""
        _, height, width, channels = ops.shape(x)
        filters, (high, wide) = kernel.shape[-1], ((height + 1) // 2, (width + 1) // 2)
        cut, join = (functools.partial(make, TWO, dtype=x.dtype) for make in (_cut, _join))
        rows = ops.matmul(cut(height), ops.reshape(x, (-1, height, width * channels)))
        tiles = ops.matmul(cut(width), ops.reshape(rows, (-1, width, channels)))
        tiles = ops.transpose(ops.reshape(tiles, (-1, 4, high, 4, wide * channels)), (1, 3, 0, 2, 4))
        products = ops.matmul(ops.reshape(tiles, (16, -1, channels)), kernel)
        products = ops.transpose(ops.reshape(products, (4, 4, -1, high, wide * filters)), (2, 0, 3, 1, 4))
        rows = ops.matmul(join(width), ops.reshape(products, (-1, 4 * wide, filters)))
        pixels = ops.matmul(join(height), ops.reshape(rows, (-1, 4 * high, width * filters)))
        return ops.reshape(pixels, (-1, height, width, filters)) + bias


def transform(layer, form):
    """Transforms the kernel of a built `Conv3x3` with stride 1 and zeros around, and without LoRA factors, to a
    `WinogradKernel`; one without a value when it gets that."""
    kernel, shape = layer._kernel, tuple(layer._kernel.shape)
    transformed = None if kernel._value is None else form.transformed(ops.convert_to_tensor(kernel))
    sizes = {RowsKernel: (6, *shape[1:]), SquaresKernel: (16, *shape[2:])}
    change_kernel(layer, form, kernel=(sizes[form], kernel.dtype))
    layer._kernel.shape_in_files, layer._kernel.from_file = shape, form.transformed
    if transformed is not None:
        layer._kernel.assign(transformed)
