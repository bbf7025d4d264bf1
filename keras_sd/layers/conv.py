"""The 3×3 convolution of the residual blocks and after doubling."""

import keras


@keras.saving.register_keras_serializable(package="keras_sd")
class Conv3x3(keras.layers.Conv2D):
    """`keras.layers.Conv2D`, 3×3 with padding, which TensorFlow computes as one product in predictions where positions
    are few and the kernel is large.

    oneDNN packs the kernel of a convolution anew in every call, into memory that the system clears for it: with 2560
    channels at 8×8 positions that took several times as long as the product. Training would keep the nine copies of
    the input, and LiteRT takes kernels as they are.

    Args:
        filters: output channels.

    Call arguments:
        x: (B, H, W, C).
        training: False in predictions.

    Returns:
        (B, H, W, filters).
    """

    def __init__(self, filters, kernel_size=3, padding="same", **kwargs):
        super().__init__(filters, kernel_size, padding=padding, **kwargs)

    def call(self, x, training=None):
        _, height, width, channels = x.shape
        small = None not in (height, width) and 4 * height * width <= self.filters
        if training is not False or not small or keras.backend.backend() != "tensorflow":
            return super().call(x)
        import tensorflow as tf

        padded = tf.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        columns = tf.concat([padded[:, :, j : j + width] for j in range(3)], axis=-1)
        rows = tf.concat([columns[:, i : i + height] for i in range(3)], axis=-1)
        kernel = tf.reshape(tf.convert_to_tensor(self.kernel), (-1, self.filters))
        y = tf.nn.bias_add(tf.matmul(tf.reshape(rows, (-1, 9 * channels)), kernel), self.bias)
        return tf.reshape(y, (-1, height, width, self.filters))
