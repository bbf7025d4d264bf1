"""What steers a picture besides its prompt: ControlNets, each with a picture, a scale and a part of the steps."""

import numbers
from typing import Any, NamedTuple

import numpy as np

from keras_sd.images import fit, read_image
from keras_sd.models import ControlNet


class Control(NamedTuple):
    """One entry of `control`; plain tuples of its first two or more fields do as well.

    Attributes:
        net: a `ControlNet`.
        image: what it sees (edges, depth, …): path, PIL image or array, as `keras_sd.images.read_image` takes it.
        scale: factor of what it adds to the U-Net.
        start, end: part of the steps in which it does, 0 … 1: row i of n where start ≤ i / n and (i + 1) / n ≤ end.
    """

    net: ControlNet
    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def read_controls(control):
    """A list of `Control` from the argument `control`; None is an empty one.

    Raises:
        ValueError, TypeError: an entry is not as `Control` says; the message names it.
    """
    if control is None:
        return []
    form = "(net, image), (net, image, scale) or (net, image, scale, start, end)"
    if not isinstance(control, (list, tuple)) or not all(isinstance(entry, (list, tuple)) for entry in control):
        raise TypeError(f"control must be a list of {form}; got {type(control).__name__}.")
    controls = []
    for entry in control:
        if len(entry) not in (2, 3, 5) or not isinstance(entry[0], ControlNet):
            kinds = ", ".join(type(value).__name__ for value in entry)
            raise TypeError(f"control must hold {form}, net being a ControlNet; got ({kinds}).")
        one = Control(*entry)
        for name in ("scale", "start", "end"):
            value = getattr(one, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not np.isfinite(value):
                raise ValueError(f"control: {name} must be a number; got {value!r}.")
        if not 0 <= one.start < one.end <= 1:
            raise ValueError(f"control: 0 ≤ start < end ≤ 1 is needed; got start {one.start:g} and end {one.end:g}.")
        controls.append(one)
    return controls


def check_fit(net, unet, latent_channels, factor):
    """Raises where a ControlNet is for another U-Net.

    Args:
        unet: function name → argument of the `DiffusionModel`.
        latent_channels, factor: channels of the latent, and pixels per position.
    """
    wanted = {name: unet(name) for name in ("block_out_channels", "layers_per_block", "cross_attention_dim")}
    wanted = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in wanted.items()}
    for name, value in (wanted | {"in_channels": latent_channels}).items():
        own = net.arguments[name]
        own = tuple(own) if isinstance(own, (list, tuple)) else own
        if own != value:
            raise ValueError(f"control: the ControlNet is for another model: its {name} is {own}, here {value}.")
    if net.factor != factor:
        raise ValueError(f"control: the ControlNet takes {net.factor} pixels per latent position, here {factor}.")


def conditioning(controls, height, width, factor):
    """The pictures of the networks, float32 (1, networks, height, width, 3) in [0, 1].

    One of another size is scaled to cover the drawn picture's, and its middle is taken, as `image_to_image` does.
    """
    pictures = [fit(read_image(one.image, "control image"), height, width, factor) for one in controls]
    return np.stack([np.asarray(picture, "float32") / 255.0 for picture in pictures])[None]


def control_scales(controls, rows):
    """The networks' scales in each row of a table, float32 (rows, networks); 0 outside their part of the steps."""
    rows_of = range(rows)
    scales = [[one.scale * (i / rows >= one.start and (i + 1) / rows <= one.end) for one in controls] for i in rows_of]
    return np.array(scales, "float32")
