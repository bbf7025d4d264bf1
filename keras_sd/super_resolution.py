"""Enlarging with a super-resolution network: tile by tile, so that a picture of any size fits into memory."""

import numpy as np

from keras_sd.images import read_image
from keras_sd.models.rrdbnet import UNSHUFFLE


def enlarge(image, network, tile=192, overlap=32):
    """Enlarges a picture by the network's scale.

    Neighbouring tiles overlap and are cross-faded, away from their edges, where the network lacks surroundings.

    Args:
        image: path, PIL image or array (H, W, 3), as `keras_sd.images.read_image` takes it; of any size.
        network: a `RRDBNet`.
        tile: side of a tile in pixels, a multiple of 4 above `overlap`; more takes more memory.
        overlap: pixels that neighbouring tiles share, a multiple of 4.

    Returns:
        uint8 (scale · H, scale · W, 3).

    Raises:
        ValueError: `tile` or `overlap` is out of range, the picture cannot be read, or the result is not finite.
    """
    if overlap < 4 or overlap % 4 or tile % 4 or tile <= overlap:
        raise ValueError(f"tile and overlap must be multiples of 4, tile above overlap; got {tile} and {overlap}.")
    picture = np.asarray(read_image(image), "float32") / 255.0
    scale = network.arguments["scale"]
    sides = picture.shape[:2]
    picture = np.pad(picture, [*((0, -side % UNSHUFFLE[scale]) for side in sides), (0, 0)], "reflect")
    height, width, channels = picture.shape
    total = np.zeros((scale * height, scale * width, channels), "float32")
    weights = np.zeros((scale * height, scale * width, 1), "float32")
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            piece = picture[None, top : top + tile, left : left + tile]
            drawn = np.asarray(network.predict_on_batch(piece), "float32")[0]
            if not np.isfinite(drawn).all():
                raise ValueError(
                    "The network's picture is not finite: its weights are damaged or its dtype too narrow."
                )
            rows, columns = (
                _weights(start, tile, side, overlap, scale) for start, side in ((top, height), (left, width))
            )
            weight = rows[:, None, None] * columns[:, None]
            place = np.s_[scale * top : scale * top + len(rows), scale * left : scale * left + len(columns)]
            total[place] += weight * drawn
            weights[place] += weight
    total = (total / weights)[: scale * sides[0], : scale * sides[1]]
    return np.clip(np.round(total * 255.0), 0, 255).astype("uint8")


def _starts(side, tile, overlap):
    """Where tiles begin along a side; all have one size, so that the network is compiled once."""
    return [*range(0, max(side - tile, 0), tile - overlap), max(side - tile, 0)]


def _weights(start, tile, side, overlap, scale):
    """A tile's weights along one side of the result: 0 in a quarter of each overlap, rising in its middle half to 1."""
    stop = min(start + tile, side)
    position = (np.arange(scale * (stop - start), dtype="float32") + 0.5) / scale
    before = position if start > 0 else np.inf
    after = (stop - start) - position if stop < side else np.inf
    distance = np.minimum(before, after) * np.ones_like(position)
    return np.clip((distance - overlap / 4) / (overlap / 2), 0.0, 1.0)
