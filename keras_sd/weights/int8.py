"""U-Nets with int8 weights: a quarter of float32's file and memory, computed in the model's dtype.

On disk it is the diffusers layout in which `<layer>.weight` is int8 and `<layer>.weight_scale` float32 (out,), for all
kernels but those where the signal enters and leaves; see `keras_sd.layers.int8`.
"""

import re

import numpy as np
from keras import ops

from keras_sd.layers.int8 import Int8Kernel, narrow, quantize_kernel
from keras_sd.models.network import forget_traces
from keras_sd.weights.assign import from_torch_layout, kernel_layers, set_values, to_state_dict, to_torch_layout

FLOAT = re.compile(r"conv_in|conv_out|time_embedding\..*")  # 0.3 % of SD v1's weights

# === Models ===


def quantize(model):
    """Makes the kernels of a `DiffusionModel` int8, in place, but for those at its ends (`FLOAT`)."""
    for name, layer in kernel_layers(model).items():
        if not FLOAT.fullmatch(name) and not isinstance(layer, Int8Kernel):
            kernel, scale = quantize_kernel(ops.convert_to_numpy(layer._kernel))
            narrow(layer)
            set_values([(layer._kernel, kernel), (layer.kernel_scale, scale)])
    forget_traces(model)


def expect_int8(model, arrays, source):
    """Makes the kernels of a new model int8 that are so in a state dict.

    Raises:
        ValueError: an array is int8 that is no kernel; the message names it and `source`.
    """
    layers = kernel_layers(model)
    for key in (key for key, array in arrays.items() if array.dtype == "int8"):
        layer = layers.get(key.removesuffix(".weight"))
        if layer is None:
            raise ValueError(
                f"{source}: {key} is int8, which only kernels of Dense and Conv2D layers of the model can be."
            )
        narrow(layer)


# === State dicts ===


def int8_state_dict(model):
    """`to_state_dict` in which the kernels that `quantize` narrows are int8, each with its scale; `model` stays."""
    arrays = to_state_dict(model)
    for name, layer in kernel_layers(model).items():
        if not FLOAT.fullmatch(name) and not isinstance(layer, Int8Kernel):
            kernel, scale = quantize_kernel(from_torch_layout(arrays[f"{name}.weight"]))
            arrays[f"{name}.weight"], arrays[f"{name}.weight_scale"] = (
                np.ascontiguousarray(to_torch_layout(kernel)),
                scale,
            )
    return arrays


def float_state_dict(model, dtype=None):
    """`to_state_dict` without int8: kernels times their scales.

    Args:
        model: any of the models.
        dtype: NumPy dtype of all arrays; by default that of the variables, of int8 kernels the layer's.
    """
    arrays = to_state_dict(model)
    for name, layer in kernel_layers(model).items():
        if isinstance(layer, Int8Kernel):
            kernel, scale = from_torch_layout(arrays[f"{name}.weight"]), arrays.pop(f"{name}.weight_scale")
            kernel = (kernel * scale).astype(dtype or layer.variable_dtype)
            arrays[f"{name}.weight"] = np.ascontiguousarray(to_torch_layout(kernel))
    return {key: array.astype(dtype) for key, array in arrays.items()} if dtype else arrays
