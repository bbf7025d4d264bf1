"""What the two halves of the autoencoder share: the attention block in their middle."""

import keras
from keras import ops

from keras_sd.layers import Attention, GroupNorm, ResnetBlock


def middle(x, groups, name, dtype):
    """Residual block, single-head attention, residual block: (B, h, w, C) → (B, h, w, C)."""
    channels = x.shape[-1]
    x = ResnetBlock(channels, groups, 1e-6, name=f"{name}.resnets.0", dtype=dtype)(x)
    x = SpatialAttention(channels, groups, name=f"{name}.attentions.0", dtype=dtype)(x)
    return ResnetBlock(channels, groups, 1e-6, name=f"{name}.resnets.1", dtype=dtype)(x)


@keras.saving.register_keras_serializable(package="keras_sd")
class SpatialAttention(Attention):
    """Single-head self-attention over all positions of a picture, with a skip around it: (B, h, w, dim)."""

    def __init__(self, dim, groups, **kwargs):
        super().__init__(dim, num_heads=1, use_bias=True, **kwargs)
        self.group_norm = GroupNorm(groups, epsilon=1e-6, name="group_norm", dtype=self.dtype_policy)

    def build(self, x_shape):
        self.group_norm.build(x_shape)
        super().build((x_shape[0], None, self.dim))

    def compute_output_shape(self, x_shape):
        return x_shape

    def call(self, x):
        height, width = ops.shape(x)[1:3]
        attended = super().call(ops.reshape(self.group_norm(x), (-1, height * width, self.dim)))
        return x + ops.reshape(attended, (-1, height, width, self.dim))
