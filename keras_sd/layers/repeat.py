"""A batch that meets a larger one: guidance has two contexts for every picture."""

import keras
from keras import ops


def repeated(x, like):
    """A batch (B, …) as many times, one after the other, as makes it as large as that of `like`, (k B, …)."""
    batch_size, wanted = x.shape[0], like.shape[0]
    if None in (batch_size, wanted):
        rows = ops.arange(ops.shape(like)[0])  # OpenVINO takes no `tile` of unknown size
        return ops.take(x, rows % ops.maximum(ops.shape(x)[0], 1), axis=0)
    if batch_size == wanted:
        return x
    return ops.tile(x, (wanted // batch_size, *[1] * (len(x.shape) - 1)))


@keras.saving.register_keras_serializable(package="keras_sd")
class Repeat(keras.layers.Layer):
    """`repeated` as a layer, for functional models."""

    def __init__(self, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})

    def compute_output_spec(self, x, like):
        return keras.KerasTensor((like.shape[0], *x.shape[1:]), x.dtype)

    def call(self, x, like):
        return repeated(x, like)
