"""Weights that stay in their file: read when the layer that needs them runs, and given up after it.

A U-Net then takes the memory of its activations and of a few kernels, whatever its size, for the time that reading
takes: from the system's file cache, where the file has room in it, about as long as copying.
"""

import contextlib
import contextvars

import keras
import numpy as np

from keras_sd.layers.backend_fixes import read_in_graph
from keras_sd.weights.files import let_go

MIN_BYTES = 2**18  # smaller arrays are not worth it; and a bias that waits for its product could not be fused with it
_streaming = contextvars.ContextVar("streaming", default=False)


@contextlib.contextmanager
def streamed():
    """Models that are read in this block leave their large weights in the file. On TensorFlow; elsewhere nothing
    changes."""
    token = _streaming.set(keras.backend.backend() == "tensorflow")
    try:
        yield
    finally:
        _streaming.reset(token)


def wanted(array):
    """Whether an array stays in its file."""
    return _streaming.get() and array.ndim > 1 and array.nbytes >= MIN_BYTES


def stream(variable, stored, convert):
    """Makes a variable without a value read it wherever it is asked for it.

    Args:
        variable: made in `without_values`. Keras takes the value of such a variable from its initializer.
        stored: array as it lies in the file.
        convert: function of a tensor like `stored` → the value.
    """

    def read():
        copy = np.array(stored)
        let_go(stored)
        return copy

    def settle(value):
        variable._initialize(value)
        variable._initializer = None
        del variable._direct_assign

    variable._initializer = lambda shape, dtype=None: convert(read_in_graph(read, stored.shape, stored.dtype))
    variable._direct_assign = settle  # what `assign` calls: from then on it is a variable like others


def settle(model):
    """Reads what the variables of a model left in the file."""
    for variable in model.variables:
        if getattr(variable, "_value", variable) is None:
            variable.assign(variable.value)
