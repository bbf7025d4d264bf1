"""The one mechanical rule between a model's variables and the keys of a diffusers state dict.

The variable `down_blocks.0.resnets.1/conv1/kernel` is the key `down_blocks.0.resnets.1.conv1.weight`; convolution
kernels are transposed from (height, width, in, out) to (out, in, height, width), dense kernels from (in, out).
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import global_state

from keras_sd.weights import streaming
from keras_sd.weights.files import let_go

SUFFIXES = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias", "bias": "bias"}
SUFFIXES["kernel_scale"] = "weight_scale"  # of int8 kernels, see `keras_sd.weights.int8`


def state_dict_key(variable):
    """The state-dict key of a Keras variable."""
    *layers, suffix = variable.path.split("/")
    if suffix.startswith("lora_"):
        raise ValueError(f"The format holds no LoRA factors ({variable.path}): fuse_lora() or unload_lora() first.")
    return ".".join([*layers, SUFFIXES[suffix]])


@contextlib.contextmanager
def without_values():
    """Models made in this block have variables without values, which `assign_state_dict` then gives them: what a file
    overwrites is not drawn at random first."""
    pending = "uninitialized_variables"  # Keras' list of those that it is going to initialize; ours do not join it
    earlier = global_state.get_global_attribute(pending, [])
    global_state.set_global_attribute(pending, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(pending, earlier)


def kernel_layers(model):
    """dict name → layer, of all Dense and Conv2D layers."""
    kinds = keras.layers.Dense, keras.layers.Conv2D
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]
    return {state_dict_key(layer._kernel).removesuffix(".weight"): layer for layer in layers}


def from_torch_layout(array):
    """An array of a state dict in Keras' axis order."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_torch_layout(array):
    """An array of a Keras variable in the state dict's axis order."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array


def assign_state_dict(model, arrays, source):
    """Assigns every variable of `model` from `arrays`, and uses every array.

    Args:
        model: one of the four models.
        arrays: dict of state-dict key → array, in the layout of diffusers.
        source: what to call the arrays in an error, e.g. the file's path.

    Raises:
        ValueError: a key is missing, unknown, or has another shape; the error names it. No variable is changed then.
    """
    variables = {state_dict_key(v): v for v in model.variables}
    missing, unknown = sorted(variables.keys() - arrays.keys()), sorted(arrays.keys() - variables.keys())
    if missing:
        raise ValueError(f"{source} lacks {_some(missing)} of the {model.name}{_hint(unknown)}.")
    if unknown:
        raise ValueError(f"{source} holds {_some(unknown)}, which the {model.name} does not have.")
    values = {key: _to_keras(key, arrays[key]) for key in variables}
    for key, value in values.items():
        if value.shape != tuple(variables[key].shape):
            expected = to_torch_layout(np.broadcast_to(0, variables[key].shape)).shape
            raise ValueError(f"{source}: {key} has shape {arrays[key].shape}; the {model.name} needs {expected}.")
    set_values((variables[key], value) for key, value in values.items())


def set_values(pairs):
    """Assigns NumPy arrays, or makes them the first values of variables without one; the memory of a file's is given
    back.

    Args:
        pairs: (variable, array) of each.
    """
    here = []
    for variable, array in pairs:
        stored, order = _stored(array)
        if streaming.wanted(stored):
            streaming.stream(variable, stored, functools.partial(_converted, order=order, dtype=variable.dtype))
        else:
            here.append((variable, stored, order))
    here.sort(key=_bytes, reverse=True)  # what large ones leave in TensorFlow's pool has room for small ones
    with ThreadPoolExecutor(2) as pool:  # half of the time goes into clearing fresh memory, which the system does
        for (variable, *_), value in zip(here, pool.map(_value, here)):
            if getattr(variable, "_value", variable) is None:
                variable._initialize(value)
                variable._initializer = None
            else:
                variable.assign(value)


def _bytes(one):
    return one[1].nbytes


def _stored(array):
    """An array as it lies in the file, and the order of axes that makes of that what it is."""
    axes = sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], -array.shape[axis]))
    return array.transpose(axes), [axes.index(axis) for axis in range(array.ndim)]


def _converted(tensor, order, dtype):
    """A tensor of what `_stored` gave, as a variable's value: the backend transposes eight times as fast as NumPy."""
    return ops.cast(ops.transpose(tensor, order) if order != sorted(order) else tensor, dtype)


def _value(one):
    variable, stored, order = one
    if keras.backend.backend() == "openvino":
        value = _openvino_value(stored, order, variable.dtype)
    else:
        # TensorFlow copies; others might share the file's memory, which cannot be written
        copy = stored if keras.backend.backend() == "tensorflow" else stored.copy()
        value = _converted(ops.convert_to_tensor(copy), order, variable.dtype)
    let_go(stored)
    return value


def _openvino_value(stored, order, dtype):
    """The array as a constant that shares its memory, a file's perhaps, and a transpose that compiling takes away."""
    import openvino
    from keras.src.backend.openvino.core import OPENVINO_DTYPES, OpenVINOKerasTensor
    from openvino import opset16

    stored = np.ascontiguousarray(stored.astype(dtype, copy=False))
    bits = stored.view(f"uint{8 * stored.itemsize}")  # NumPy has no bfloat16 of its own
    tensor = openvino.Tensor(bits, openvino.Shape(stored.shape), OPENVINO_DTYPES[dtype])
    constant = opset16.constant(tensor, shared_memory=True)
    value = OpenVINOKerasTensor((constant if order == sorted(order) else opset16.transpose(constant, order)).output(0))
    value.let_go = lambda: let_go(bits)  # which also keeps the array alive: OpenVINO does not
    return value


def to_state_dict(model):
    """dict of state-dict key → NumPy array in the layout of diffusers, in the dtype of the variables."""
    return {state_dict_key(v): np.ascontiguousarray(_to_state_dict(v)) for v in model.variables}


def _to_keras(key, array):
    return array if _is_embedding(key) else from_torch_layout(array)


def _to_state_dict(variable):
    array = np.asarray(variable)
    return array if variable.path.endswith("/embeddings") else to_torch_layout(array)


def _is_embedding(key):
    return key.endswith("_embedding.weight") and not key.endswith("patch_embedding.weight")  # which is a convolution


def _some(keys):
    return f"{keys[0]!r}" + (f" and {len(keys) - 1} more tensors" if len(keys) > 1 else "")


def _hint(unknown):
    return f" (and holds {_some(unknown)}, which it does not have)" if unknown else ""
