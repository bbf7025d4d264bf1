"""Dense and Conv2D layers with int8 kernels: widened when the layer runs, and given up after it.

A kernel is whole numbers from -127 to 127 times one scale per output channel; activations stay what they are.
`keras.Model.quantize("int8")` is another thing: it passes over convolutions, and narrows the activations, too, anew in
every call.

Reference: Jacob et al. (2018), Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, arXiv 1712.05877, section 2.1, with a zero point of 0.
"""

import ml_dtypes
import numpy as np
from keras import ops

from keras_sd.layers.backend_fixes import after
from keras_sd.layers.kernel_forms import KernelForm, change_kernel


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


class Int8Kernel(KernelForm):
    """What a Dense or Conv2D layer becomes when its kernel is int8."""

    form, file = "int8", "save_preset()"
    way_back = "`python -m keras_sd convert PRESET FOLDER --dtype float32` makes floats of them."
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


def narrow(layer):
    """Gives a built layer an int8 kernel and its scale, yet without their values."""
    shape = layer._kernel.shape
    change_kernel(layer, Int8Kernel, kernel=(shape, "int8"), kernel_scale=(shape[-1:], "float32"))
