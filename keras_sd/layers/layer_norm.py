"""Layer normalization over the last axis."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_sd")
class LayerNorm(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, for which TensorFlow has one kernel in predictions, oneDNN's, instead of eight
    passes over memory.

    Args:
        epsilon: 1e-5 in the U-Net's transformers.

    Call arguments:
        x: (B, N, C), any float dtype.
        training: False in predictions.

    Returns:
        (B, N, C).

    Reference: Ba et al. (2016), Layer Normalization, arXiv 1607.06450.
    """

    def call(self, x, training=None):
        plain = self.variable_dtype == self.compute_dtype and self.compute_dtype in ("float32", "bfloat16")
        if training is not False or not plain or keras.backend.backend() != "tensorflow":
            return super().call(x)
        return self._fused(x)

    def _fused(self, x):
        """The same in the one shape that TensorFlow's graph optimizer knows (`FindMklLayerNorm` in `remapper.cc`):
        every vector is a channel of a batch normalization, whose scale and offset are filled in as the graph runs."""
        import tensorflow as tf

        shape, none = ops.shape(x), tf.constant((), "float32")
        vectors = tf.raw_ops.PlaceholderWithDefault(input=[math.prod(shape[:-1])], shape=(1,))  # or it would fold them
        normalized = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, (1, -1, x.shape[-1], 1)),
            scale=tf.fill(vectors, 1.0),
            offset=tf.fill(vectors, 0.0),
            mean=none,
            variance=none,
            epsilon=self.epsilon,
            data_format="NCHW",
        )[0]
        gamma, beta = (tf.convert_to_tensor(weight) for weight in (self.gamma, self.beta))
        return tf.reshape(normalized, shape) * gamma + beta
