"""The autoencoder on large pictures: in bands of rows, layer by layer, with the result that it has on the whole.

Tiles that are decoded each for itself differ in colour, since group normalization and attention look at the whole
picture. So here every layer goes over the whole picture before the next one does: a band overlaps its neighbours by the
rows that its convolutions see of them, normalizations use the statistics of all bands, and the attention, on the
smallest activation, is not divided. What is not needed twice is not kept: of the largest activations one is held at a
time, and the first convolution of every residual block runs twice, for the statistics behind it and for the result.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from keras import ops

from keras_sd.layers import Downsample, GroupNorm, ResnetBlock, Upsample
from keras_sd.models.autoencoder import SpatialAttention

BAND = 2**17  # positions (height · width) of a band
MIN_ROWS = 8


def decode(decoder, latent):
    """Decodes a latent as `decoder` does, in little memory.

    Args:
        decoder: a `Decoder`.
        latent: scaled latent (1, h, w, C).

    Returns:
        float32 NumPy array (1, H, W, 3), about [-1, 1].
    """
    return _run(decoder.layers[1:], np.asarray(latent, "float32") / decoder.arguments["scaling_factor"])


def encode(image_encoder, image):
    """Encodes a picture as `image_encoder` does, in little memory.

    Args:
        image_encoder: an `ImageEncoder`.
        image: (1, H, W, 3) in [-1, 1].

    Returns:
        float32 NumPy array (1, h, w, C), the scaled latent mean.
    """
    moments = _run(image_encoder.layers[1:], np.asarray(image, "float32"))
    return moments[..., : image_encoder.arguments["latent_channels"]] * image_encoder.scaling_factor


def _run(layers, x):
    """A chain of layers on an array (1, H, W, C)."""
    picture = _Stored([x]).picture()
    for layer in layers:
        size = picture.height * picture.width * (4 if isinstance(layer, Upsample) else 1)
        if isinstance(layer, SpatialAttention) or size <= BAND:
            picture = _Stored([_whole(layer, picture)]).picture()
        elif isinstance(layer, ResnetBlock):
            picture = _resnet_block(layer, picture)
        elif isinstance(layer, Upsample):
            picture = _upsampled(layer, picture)
        elif isinstance(layer, Downsample):
            picture = _downsampled(layer, picture)
        elif isinstance(layer, GroupNorm):
            picture = _normalized(layer, picture)
        else:
            picture = _mapped(layer, picture, layer.kernel_size[0] // 2)
    return np.concatenate([np.asarray(band, "float32") for band in _last_pass(picture)], axis=1)


# === Pictures that are read by rows ===


@dataclasses.dataclass(frozen=True)
class _Picture:
    """An activation, stored or computed when it is read.

    `read` is a function (start, stop) → these rows of it, (1, stop - start, width, C), an array or a tensor; `stored`
    is what they are computed from in the end.
    """

    height: int
    width: int
    read: Callable
    stored: object


class _Stored:
    """An activation as NumPy arrays, its bands; those that have been read for the last time are let go."""

    def __init__(self, bands):
        self.bands, self.last_pass = bands, False
        self.starts = np.cumsum([0, *(band.shape[1] for band in bands)])

    def picture(self):
        return _Picture(int(self.starts[-1]), self.bands[0].shape[2], self.read, self)

    def read(self, start, stop):
        parts = []
        for i, (first, end) in enumerate(zip(self.starts, self.starts[1:])):
            if first < stop and end > start:
                parts.append(self.bands[i][:, max(start - first, 0) : stop - first])
            elif end <= start and self.last_pass:
                self.bands[i] = None
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _bands(picture):
    """Reads a picture from top to bottom, in NumPy arrays."""
    rows = max(BAND // picture.width, MIN_ROWS)
    for start in range(0, picture.height, rows):
        yield ops.convert_to_numpy(picture.read(start, min(start + rows, picture.height)))


def _last_pass(picture):
    """The same, where nothing will be read again."""
    picture.stored.last_pass = True
    return _bands(picture)


# === Layers ===


def _whole(layer, picture):
    x = layer(np.concatenate([*_last_pass(picture)], axis=1))
    return ops.convert_to_numpy(ops.silu(x) if isinstance(layer, GroupNorm) else x)


def _mapped(function, picture, halo=0):
    """A function that sees `halo` rows above and below the one that it computes."""

    def read(start, stop):
        top = max(start - halo, 0)
        return function(picture.read(top, min(stop + halo, picture.height)))[:, start - top : stop - top]

    return dataclasses.replace(picture, read=read)


def _normalized(norm, picture):
    """Group normalization over the whole picture, and SiLU, which follows it everywhere in an autoencoder."""
    mean, variance = (ops.convert_to_tensor(x, "float32") for x in _statistics(picture, norm.groups))
    return _mapped(lambda x: ops.silu(norm.normalize(x, mean, variance)), picture)


def _statistics(picture, groups):
    """Mean and variance of each channel's group, (1, 1, 1, C), merged from those of bands in float64.

    Reference: Chan, Golub & LeVeque (1983), Algorithms for Computing the Sample Variance, equation 2.1.
    """
    rows, means, variances = [], [], []
    for band in _bands(picture):
        mean, variance = ops.moments(ops.cast(band, "float32"), axes=[0, 1, 2])
        rows.append(band.shape[1])
        means.append(np.asarray(ops.convert_to_numpy(mean), "float64").reshape(groups, -1))
        variances.append(np.asarray(ops.convert_to_numpy(variance), "float64").reshape(groups, -1))
    means, variances = np.stack(means, axis=1), np.stack(variances, axis=1)  # (groups, bands, channels of a group)
    mean = np.average(means.mean(axis=2), axis=1, weights=rows)
    variance = np.average((variances + (means - mean[:, None, None]) ** 2).mean(axis=2), axis=1, weights=rows)
    return [np.repeat(x, means.shape[2]).reshape(1, 1, 1, -1) for x in (mean, variance)]


def _resnet_block(block, picture):
    hidden = _mapped(block.conv1, _normalized(block.norm1, picture), 1)
    hidden = _mapped(block.conv2, _normalized(block.norm2, hidden), 1)
    shortcut = _mapped(block.conv_shortcut, picture) if block.conv_shortcut else picture
    result = dataclasses.replace(picture, read=lambda *rows: ops.add(hidden.read(*rows), shortcut.read(*rows)))
    return _Stored([*_last_pass(result)]).picture()


def _upsampled(layer, picture):
    def read(start, stop):
        top = max(start // 2 - 1, 0)
        rows = picture.read(top, min((stop + 1) // 2 + 1, picture.height))
        return layer(rows, training=False)[:, start - 2 * top : stop - 2 * top]

    return _Picture(2 * picture.height, 2 * picture.width, read, picture.stored)


def _downsampled(layer, picture):
    """Row i sees rows 2i, 2i + 1 and 2i + 2, below the last of which the layer puts a row of zeros."""

    def read(start, stop):
        return layer(picture.read(2 * start, min(2 * stop + 1, picture.height)))[:, : stop - start]

    return _Picture(picture.height // 2, picture.width // 2, read, picture.stored)
