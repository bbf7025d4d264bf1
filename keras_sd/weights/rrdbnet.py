"""Checkpoints of ESRGAN and Real-ESRGAN to an `RRDBNet`; their shapes say everything about the network.

Reference: the published files of Real-ESRGAN and BasicSR (`conv_first`, `body.0.rdb1.conv1`, …: our layers have their
names), of ESRGAN (`RRDB_trunk.0.RDB1.conv1`), and those of 2018, which the community trained on
(`model.1.sub.0.RDB1.conv1.0`).
"""

import re

from keras_sd.models.rrdbnet import UNSHUFFLE, RRDBNet
from keras_sd.weights.assign import assign_state_dict, without_values
from keras_sd.weights.files import read_arrays

# Older names → those of Real-ESRGAN. In `model.1.sub` the convolution after the blocks has no `RDB`.
RENAMES = (
    (r"(?:model\.1\.sub|RRDB_trunk)\.(\d+)\.RDB(\d)\.conv(\d)(?:\.0)?", r"body.\1.rdb\2.conv\3"),
    (r"model\.1\.sub\.\d+|trunk_conv", "conv_body"),
    (r"model\.0", "conv_first"),
    (r"model\.3|upconv1", "conv_up1"),
    (r"model\.6|upconv2", "conv_up2"),
    (r"model\.8|HRconv", "conv_hr"),
    (r"model\.10", "conv_last"),
)


def rrdbnet_state_dict(arrays):
    """The state dict in the naming of `RRDBNet`, whatever its age."""
    return {_renamed(key): array for key, array in arrays.items()}


def rrdbnet_arguments(arrays, source):
    """Arguments of `RRDBNet` from the shapes of a state dict in its naming.

    Raises:
        ValueError: the arrays are not those of such a network.
    """
    needed = "conv_first.weight", "conv_last.weight", "body.0.rdb1.conv1.weight"
    if not all(key in arrays and arrays[key].ndim == 4 for key in needed):
        raise ValueError(f"{source} is no RRDBNet (ESRGAN, Real-ESRGAN): it lacks {', '.join(needed)} or their like.")
    (features, folded, *_), channels = arrays[needed[0]].shape, arrays[needed[1]].shape[0]
    scales = {channels * factor**2: scale for scale, factor in UNSHUFFLE.items()}
    if folded not in scales:
        raise ValueError(f"{source}: conv_first takes {folded} channels; {channels} times 1, 4 or 16 was expected.")
    return dict(
        in_channels=channels,
        out_channels=channels,
        num_features=features,
        num_blocks=len({key.split(".")[1] for key in arrays if key.startswith("body.")}),
        growth_channels=arrays[needed[2]].shape[0],
        scale=scales[folded],
    )


def read_rrdbnet(path, dtype=None):
    """An `RRDBNet` with the weights of a file.

    Args:
        path: a `.pth` or `.safetensors` file of ESRGAN or Real-ESRGAN, e.g. `RealESRGAN_x4plus.pth`; of several sets
            of weights in it the averaged ones are taken.
        dtype: Keras dtype policy of the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds another network; nothing in it is executed.
    """
    arrays = rrdbnet_state_dict(read_arrays(path))
    with without_values():
        model = RRDBNet(**rrdbnet_arguments(arrays, repr(str(path))), dtype=dtype)
    assign_state_dict(model, arrays, repr(str(path)))
    return model


def _renamed(key):
    layer, _, suffix = key.rpartition(".")
    for pattern, name in RENAMES:
        if found := re.fullmatch(pattern, layer):
            return f"{found.expand(name)}.{suffix}"
    return key
