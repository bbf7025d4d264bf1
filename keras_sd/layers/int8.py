"""Dense and Conv2D layers with int8 kernels: widened when the layer runs, and given up after it.

A kernel is whole numbers from -127 to 127 times one scale per output channel; activations stay what they are.
`keras.Model.quantize("int8")` is another thing: it passes over convolutions, and narrows the activations, too, anew in
every call.

Reference: Jacob et al. (2018), Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, arXiv 1712.05877, section 2.1, with a zero point of 0.
"""

import functools

import ml_dtypes
import numpy as np
from keras import ops

from keras_sd.layers.backend_fixes import after


def quantize_kernel(kernel):
    """A float kernel (…, out) → int8 of the same shape, float32 scales (out,): the kernel is about their product.

    The scales are bfloat16 numbers, so that they are exact in every compute dtype of that many bits.

    Raises:
        ValueError: the kernel holds a number that is not finite.
    """
    kernel = np.asarray(kernel, "float32")
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    if not np.isfinite(largest).all():
        raise ValueError("Weights that are not finite cannot be int8.")
    scale = (largest / 127).astype(ml_dtypes.bfloat16).astype("float32")
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(kernel / scale), -127, 127).astype("int8"), scale


class Int8Kernel:
    """What a Dense or Conv2D layer becomes when its kernel is int8."""

    _ready = None  # the int8 kernel, while the layer runs

    @property
    def kernel(self):
        kernel = self._kernel if self._ready is None else self._ready
        return ops.cast(kernel, self.compute_dtype) * ops.cast(self.kernel_scale, self.compute_dtype)

    def call(self, inputs, *args, **kwargs):
        inputs, self._ready = after(inputs, self._kernel)
        try:
            return super().call(inputs, *args, **kwargs)
        finally:
            self._ready = None

    def save_own_variables(self, store):
        raise ValueError(f"Keras' files have no place for the int8 kernel of {self.path}: save_preset() has.")


@functools.cache
def _int8_class(cls):
    return type(f"Int8{cls.__name__}", (Int8Kernel, cls), {})


def narrow(layer):
    """Gives a built layer an int8 kernel and its scale, yet without their values."""
    kernel = layer._kernel
    layer._tracker.unlock()
    layer._untrack_variable(kernel)
    layer.__class__ = _int8_class(type(layer))
    layer._kernel, layer.kernel_scale = variables = [
        layer.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)
        for name, shape, dtype in (
            ("kernel", kernel.shape, "int8"),
            ("kernel_scale", kernel.shape[-1:], "float32"),
        )
    ]
    layer._tracker.lock()
    for variable in variables:
        variable._path = f"{kernel.path.rpartition('/')[0]}/{variable.name}"


def has_int8(model):
    """Whether kernels of a model are int8."""
    return any(isinstance(layer, Int8Kernel) for layer in model._flatten_layers())


def refuse_int8(model, what):
    """Raises where a model's kernels are int8, for what cannot be done with them."""
    if has_int8(model):
        raise ValueError(
            f"{what} needs float weights; those of the {model.name} are int8. "
            "`python -m keras_sd convert PRESET FOLDER --dtype float32` makes floats of them."
        )
