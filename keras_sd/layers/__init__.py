"""The building blocks that the models share, named after the parts of a diffusers state dict."""

import keras_sd.layers.backend_fixes  # noqa: F401
from keras_sd.layers.attention import Attention, SpatialTransformer, dot_product_attention
from keras_sd.layers.group_norm import GroupNorm
from keras_sd.layers.resampling import Downsample, Upsample
from keras_sd.layers.resnet_block import ResnetBlock
from keras_sd.layers.timestep_embedding import timestep_embedding

__all__ = [
    "Attention",
    "Downsample",
    "GroupNorm",
    "ResnetBlock",
    "SpatialTransformer",
    "Upsample",
    "dot_product_attention",
    "timestep_embedding",
]
