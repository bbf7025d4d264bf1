"""The decoder half of the autoencoder."""

import keras

from keras_sd.layers import GroupNorm, ResnetBlock, Upsample
from keras_sd.layers.backend_fixes import silu
from keras_sd.models.autoencoder import middle
from keras_sd.models.network import Network


@keras.saving.register_keras_serializable(package="keras_sd")
class Decoder(Network):
    """Decodes latents to pictures. Fully convolutional; defaults are those of SD v1 and v2.

    Args:
        out_channels: channels of the picture.
        latent_channels: channels of the latent.
        block_out_channels: channels of each level, as the encoder has them: finest first.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        norm_num_groups: groups of all group normalizations.
        scaling_factor: the latent is divided by it first.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        scaled latent (B, h, w, latent_channels), about unit variance.

    Returns:
        image (B, 8h, 8w, out_channels), about [-1, 1] (not clipped).

    Reference: Rombach et al. (2022), arXiv 2112.10752, section 3.1; Esser et al. (2021), arXiv 2012.09841.
    """

    def __init__(
        self,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.18215,
        name="decoder",
        dtype=None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}

        # === Layers ===
        def conv(filters, size, name):
            return keras.layers.Conv2D(filters, size, padding="same", name=name, dtype=dtype)

        # === Functional model ===
        latent = keras.Input((None, None, latent_channels), name="latent")
        x = conv(latent_channels, 1, "post_quant_conv")(latent / scaling_factor)
        x = conv(block_out_channels[-1], 3, "decoder.conv_in")(x)
        x = middle(x, norm_num_groups, "decoder.mid_block", dtype)
        for i_block, width in enumerate(reversed(block_out_channels)):
            block = f"decoder.up_blocks.{i_block}"
            for i in range(layers_per_block + 1):
                x = ResnetBlock(width, norm_num_groups, 1e-6, name=f"{block}.resnets.{i}", dtype=dtype)(x)
            if i_block < len(block_out_channels) - 1:
                x = Upsample(width, name=f"{block}.upsamplers.0", dtype=dtype)(x)
        x = GroupNorm(norm_num_groups, epsilon=1e-6, name="decoder.conv_norm_out", dtype=dtype)(x)
        x = conv(out_channels, 3, "decoder.conv_out")(silu(x))
        super().__init__(latent, x, name=name)

        # === Config ===
        self.arguments = arguments
