"""Residual block of the U-Net and the autoencoder."""

import functools

import keras

from keras_sd.layers.backend_fixes import silu
from keras_sd.layers.conv import Conv3x3
from keras_sd.layers.group_norm import GroupNorm
from keras_sd.layers.recompute import maybe_recomputed


@keras.saving.register_keras_serializable(package="keras_sd")
class ResnetBlock(keras.layers.Layer):
    """GroupNorm → SiLU → conv, twice, around a skip connection; the timestep is added in the middle.

    Args:
        filters: output channels; where they differ from the input's, the skip connection is a 1×1 convolution.
        groups: groups of the two normalizations.
        epsilon: epsilon of the two normalizations.
        time: whether a timestep embedding is added.

    Call arguments:
        x: (B, H, W, C).
        time_embedding: (B, T), only with `time=True`.

    Returns:
        (B, H, W, filters).

    Reference: Ho et al. (2020), arXiv 2006.11239, appendix B.
    """

    gradient_checkpointing = False

    def __init__(self, filters, groups=32, epsilon=1e-5, time=False, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.norm1 = GroupNorm(groups, epsilon=epsilon, name="norm1", dtype=self.dtype_policy)
        self.conv1 = Conv3x3(filters, name="conv1", dtype=self.dtype_policy)
        self.time_emb_proj = (
            keras.layers.Dense(filters, name="time_emb_proj", dtype=self.dtype_policy) if time else None
        )
        self.norm2 = GroupNorm(groups, epsilon=epsilon, name="norm2", dtype=self.dtype_policy)
        self.conv2 = Conv3x3(filters, name="conv2", dtype=self.dtype_policy)
        self.conv_shortcut = None

    def build(self, x_shape, time_embedding_shape=None):
        hidden = (*x_shape[:-1], self.filters)
        self.norm1.build(x_shape)
        self.conv1.build(x_shape)
        if self.time_emb_proj:
            self.time_emb_proj.build(time_embedding_shape)
        self.norm2.build(hidden)
        self.conv2.build(hidden)
        if x_shape[-1] != self.filters:
            self.conv_shortcut = keras.layers.Conv2D(self.filters, 1, name="conv_shortcut", dtype=self.dtype_policy)
            self.conv_shortcut.build(x_shape)

    def compute_output_shape(self, x_shape, time_embedding_shape=None):
        return (*x_shape[:-1], self.filters)

    def call(self, x, time_embedding=None, training=None):
        return maybe_recomputed(self, functools.partial(self._forward, training=training), x, time_embedding)

    def _forward(self, x, time_embedding=None, training=None):
        hidden = self.conv1(silu(self.norm1(x), training))
        if self.time_emb_proj:
            hidden = hidden + self.time_emb_proj(silu(time_embedding))[:, None, None]
        hidden = self.conv2(silu(self.norm2(hidden), training))
        return hidden + (self.conv_shortcut(x) if self.conv_shortcut else x)
