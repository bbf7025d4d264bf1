"""Group normalization over (batch, height, width, channels), statistics in float32."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_sd")
class GroupNorm(keras.layers.GroupNormalization):
    """`keras.layers.GroupNormalization` with fewer passes over memory.

    The statistics are reduced per channel first and per group afterwards, so the picture is never reshaped, and the
    normalization is one multiply-add. They are taken in float32 whatever the compute dtype.

    Args:
        groups: number of groups; the channels must be a multiple of it.
        epsilon: 1e-5 in the U-Net's residual blocks, 1e-6 in its transformers and in the autoencoder.

    Call arguments:
        x: (B, H, W, C), any float dtype.

    Reference: Wu & He (2018), Group Normalization, arXiv 1803.08494.
    """

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x):
        channels = x.shape[-1]
        wide = ops.cast(x, "float32")
        mean = self._group_mean(ops.mean(wide, axis=(1, 2), keepdims=True), channels)
        variance = self._group_mean(ops.mean(ops.square(wide - mean), axis=(1, 2), keepdims=True), channels)
        return self.normalize(wide, mean, variance)

    def normalize(self, x, mean, variance):
        """Normalizes with given statistics, (B, 1, 1, C), each channel's being those of its group."""
        scale = ops.cast(self.gamma, "float32") * ops.rsqrt(variance + self.epsilon)
        shift = ops.cast(self.beta, "float32") - mean * scale
        return ops.cast(ops.cast(x, "float32") * scale + shift, self.compute_dtype)

    def _group_mean(self, per_channel, channels):
        """(B, 1, 1, C) → the mean of each channel's group, (B, 1, 1, C)."""
        grouped = ops.reshape(per_channel, (-1, self.groups, channels // self.groups))
        spread = ops.mean(grouped, axis=2, keepdims=True) * ops.ones((1, 1, channels // self.groups))
        return ops.reshape(spread, (-1, 1, 1, channels))
