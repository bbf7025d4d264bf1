"""The encoder half of the autoencoder."""

import keras
from keras import ops

from keras_sd.layers import Downsample, GroupNorm, ResnetBlock
from keras_sd.layers.backend_fixes import silu
from keras_sd.models.autoencoder import middle
from keras_sd.models.network import Network


@keras.saving.register_keras_serializable(package="keras_sd")
class ImageEncoder(Network):
    """Encodes pictures as latents. Fully convolutional; defaults are those of SD v1 and v2.

    Args:
        in_channels: channels of the picture.
        latent_channels: channels of the latent.
        block_out_channels: channels of each level; each level but the last halves height and width.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of all group normalizations.
        scaling_factor: the latent mean is multiplied by it, so that latents have about unit variance.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        image (B, H, W, in_channels) in [-1, 1]; H and W multiples of 2 ** (levels - 1), 8 by default.

    Returns:
        scaled latent mean (B, H/8, W/8, latent_channels). `moments` gives mean and log-variance for training.

    Reference: Rombach et al. (2022), arXiv 2112.10752, section 3.1; Esser et al. (2021), arXiv 2012.09841.
    """

    def __init__(
        self,
        in_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.18215,
        name="image_encoder",
        dtype=None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}

        # === Layers ===
        def conv(filters, size, name):
            return keras.layers.Conv2D(filters, size, padding="same", name=name, dtype=dtype)

        # === Functional model ===
        image = keras.Input((None, None, in_channels), name="image")
        x = conv(block_out_channels[0], 3, "encoder.conv_in")(image)
        for level, width in enumerate(block_out_channels):
            block = f"encoder.down_blocks.{level}"
            for i in range(layers_per_block):
                x = ResnetBlock(width, norm_num_groups, 1e-6, name=f"{block}.resnets.{i}", dtype=dtype)(x)
            if level < len(block_out_channels) - 1:
                x = Downsample(width, padding=(0, 1), name=f"{block}.downsamplers.0", dtype=dtype)(x)
        x = middle(x, norm_num_groups, "encoder.mid_block", dtype)
        x = GroupNorm(norm_num_groups, epsilon=1e-6, name="encoder.conv_norm_out", dtype=dtype)(x)
        x = conv(2 * latent_channels, 3, "encoder.conv_out")(silu(x))
        moments = conv(2 * latent_channels, 1, "quant_conv")(x)
        super().__init__(image, moments[..., :latent_channels] * scaling_factor, name=name)

        # === Config ===
        self.arguments = arguments
        self.scaling_factor = scaling_factor
        self._moments = moments

    @property
    def moments(self):
        """A model with the same layers: image → (unscaled mean, log-variance), each (B, H/8, W/8, latent_channels)."""
        mean, log_variance = ops.split(self._moments, 2, axis=-1)
        return keras.Model(self.input, (mean, ops.clip(log_variance, -30.0, 20.0)))
