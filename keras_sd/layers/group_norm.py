"""Group normalization over (batch, height, width, channels), statistics in float32."""

import functools

import keras
from keras import ops

MAX_SAMPLES = 8  # of a batch that TensorFlow normalizes one by one
MAX_POSITIONS = 2**16  # of which those kernels sum float32 numbers without losing digits
MAX_BAND = 2**19  # numbers that are normalized at once: 2 MB in float32, which the cache holds
NO_GRADIENT = "a model that is called with training=False has none; training=True or None gives it"


def _pieces(height, width, channels):
    """Into how many bands of whole rows a picture is divided, 1 where its size is unknown or small."""
    unknown = None in (height, width)
    if keras.backend.backend() != "tensorflow" or unknown or height * width * channels <= 16 * MAX_BAND:
        return 1
    fewest = -(-height * width * channels // MAX_BAND)
    return next(n for n in range(min(fewest, height), height + 1) if height % n == 0)


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
        training: False, as `predict` has it, lets TensorFlow use kernels without a gradient.

    Reference: Wu & He (2018), Group Normalization, arXiv 1803.08494.
    """

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x, training=None):
        _, height, width, channels = x.shape
        if training is False and self._fuses(x.shape):
            return self._fused(x)
        pieces = _pieces(height, width, channels)
        if pieces > 1:
            return self._in_pieces(x, pieces)
        wide = ops.cast(x, "float32")
        mean = self._group_mean(ops.mean(wide, axis=(1, 2), keepdims=True), channels)
        variance = self._group_mean(ops.mean(ops.square(wide - mean), axis=(1, 2), keepdims=True), channels)
        return self.normalize(wide, mean, variance)

    def _fuses(self, shape):
        """Whether TensorFlow's batch normalization does it, in one pass for the statistics and one for the rest."""
        if keras.backend.backend() != "tensorflow" or None in shape or shape[0] > MAX_SAMPLES:
            return False
        exact = self.compute_dtype == "float32" and shape[1] * shape[2] <= MAX_POSITIONS
        return exact or self.compute_dtype == "bfloat16"

    def _fused(self, x):
        """A batch of one sample has the statistics of the sample's channels; those of the groups follow from them."""
        import tensorflow as tf

        batch_size, height, width, channels = x.shape
        apply = functools.partial(tf.raw_ops.FusedBatchNormV3, epsilon=self.epsilon)
        samples = tf.split(x, batch_size)
        ones, zeros, none = (tf.constant(x, shape=(n,)) for x, n in ((1.0, channels), (0.0, channels), (0.0, 0)))
        moments = [apply(x=one, scale=ones, offset=zeros, mean=none, variance=none)[1:3] for one in samples]
        grouped = 2, batch_size, self.groups, channels // self.groups
        per_channel, variance = tf.unstack(tf.reshape(tf.stack([*zip(*moments)]), grouped))
        mean = tf.reduce_mean(per_channel, -1, keepdims=True)
        variance = variance * (1 - 1 / (height * width))  # it was divided by n - 1
        variance = tf.reduce_mean(variance + tf.math.squared_difference(per_channel, mean), -1, keepdims=True)
        spread = tf.unstack(tf.reshape(tf.broadcast_to(tf.stack([mean, variance]), grouped), (-1, channels)))
        gamma, beta = (ops.cast(weight, "float32") for weight in (self.gamma, self.beta))
        normalized = [
            apply(x=one, scale=gamma, offset=beta, mean=m, variance=v, is_training=False)[0]
            for one, m, v in zip(samples, spread[:batch_size], spread[batch_size:])
        ]
        # TensorFlow's gradient of it would take the statistics for constants
        return tf.raw_ops.PreventGradient(input=tf.concat(normalized, 0), message=NO_GRADIENT)

    def _in_pieces(self, x, pieces):
        """The same, in bands of rows that the cache holds; statistics merged as in Chan et al. (1983), equation 2.1."""
        _, height, width, channels = x.shape
        bands = ops.reshape(x, (-1, height // pieces, width, channels))
        indices = ops.arange(ops.shape(bands)[0])
        mean, variance = ops.map(lambda i: ops.moments(ops.cast(bands[i], "float32"), axes=[0, 1]), indices)
        mean, variance = (ops.reshape(one, (-1, pieces, 1, 1, channels)) for one in (mean, variance))
        whole = self._group_mean(ops.mean(mean, axis=1), channels)
        variance = self._group_mean(ops.mean(variance + ops.square(mean - whole[:, None]), axis=1), channels)
        normalized = ops.map(
            lambda i: self.normalize(bands[i][None], whole[i // pieces, None], variance[i // pieces, None])[0], indices
        )
        return ops.reshape(normalized, (-1, height, width, channels))

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
