"""The U-Net that predicts the noise."""

import keras
from keras import ops

from keras_sd.layers import Downsample, GroupNorm, ResnetBlock, SpatialTransformer, Upsample


@keras.saving.register_keras_serializable(package="keras_sd")
class DiffusionModel(keras.Model):
    """U-Net with cross-attention to the text. Fully convolutional; defaults are those of SD v1.

    SD v2 differs in `num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True`, the
    ×4 upscaler in `in_channels=7, block_out_channels=(256, 512, 512, 1024), attention_levels=(False, True, True, True),
    cross_attention_dim=1024, use_linear_projection=True, only_cross_attention=(True, True, True, False),
    num_class_embeds=1000`.

    Args:
        in_channels: channels of the latent, 4; 9 in the inpainting model, 7 in the ×4 upscaler.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level; each level halves height and width.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_levels: for each level, whether it has spatial transformers.
        num_attention_heads: heads, one number or one per level.
        cross_attention_dim: width of the context.
        use_linear_projection: Dense rather than 1×1 convolutions around the transformers.
        norm_num_groups: groups of all group normalizations.
        only_cross_attention: for each level, whether its transformers have no self-attention.
        num_class_embeds: number of classes; the embedding of each is learned and added to that of the timestep. The
            ×4 upscaler's are its 1000 noise levels.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        dict with `latent` (B, h, w, in_channels), `timestep_embedding` (B, block_out_channels[0]), see
        `keras_sd.layers.timestep_embedding`, `context` (B, 77, cross_attention_dim) and, only with
        `num_class_embeds`, `class_label` int32 (B,). Any h and w.

    Returns:
        prediction (B, h, w, out_channels): ε, v or x0, as the scheduler's prediction type says.

    Example:
        model = DiffusionModel(block_out_channels=(64, 128), attention_levels=(True, False), cross_attention_dim=64)

    Reference: Rombach et al. (2022), High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
    """

    def __init__(
        self,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_levels=(True, True, True, False),
        num_attention_heads=8,
        cross_attention_dim=768,
        use_linear_projection=False,
        norm_num_groups=32,
        only_cross_attention=False,
        num_class_embeds=None,
        name="diffusion_model",
        dtype=None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        widths = tuple(block_out_channels)
        heads = _per_level(num_attention_heads, widths, "num_attention_heads")
        attends = _per_level(attention_levels, widths, "attention_levels")
        only_cross = _per_level(only_cross_attention, widths, "only_cross_attention")
        last = len(widths) - 1

        # === Layers ===
        def conv(filters, name):
            return keras.layers.Conv2D(filters, 3, padding="same", name=name, dtype=dtype)

        def resnet(filters, name):
            return ResnetBlock(filters, norm_num_groups, time=True, name=name, dtype=dtype)

        def transformer(level, only_cross, name):
            return SpatialTransformer(
                widths[level], heads[level], norm_num_groups, use_linear_projection, only_cross, name=name, dtype=dtype
            )

        # === Functional model ===
        latent = keras.Input((None, None, in_channels), name="latent")
        timestep = keras.Input((widths[0],), name="timestep_embedding")
        context = keras.Input((None, cross_attention_dim), name="context")
        inputs = {"latent": latent, "timestep_embedding": timestep, "context": context}

        time = keras.layers.Dense(4 * widths[0], name="time_embedding.linear_1", dtype=dtype)(timestep)
        time = keras.layers.Dense(4 * widths[0], name="time_embedding.linear_2", dtype=dtype)(ops.silu(time))
        if num_class_embeds is not None:
            inputs["class_label"] = keras.Input((), name="class_label", dtype="int32")
            embedding = keras.layers.Embedding(num_class_embeds, 4 * widths[0], name="class_embedding", dtype=dtype)
            time = time + embedding(inputs["class_label"])

        x = conv(widths[0], "conv_in")(latent)
        skips = [x]
        for level, width in enumerate(widths):
            block = f"down_blocks.{level}"
            for i in range(layers_per_block):
                x = resnet(width, f"{block}.resnets.{i}")(x, time)
                if attends[level]:
                    x = transformer(level, only_cross[level], f"{block}.attentions.{i}")(x, context)
                skips.append(x)
            if level < last:
                x = Downsample(width, name=f"{block}.downsamplers.0", dtype=dtype)(x)
                skips.append(x)

        x = resnet(widths[-1], "mid_block.resnets.0")(x, time)
        x = transformer(last, False, "mid_block.attentions.0")(x, context)
        x = resnet(widths[-1], "mid_block.resnets.1")(x, time)

        for block_index, level in enumerate(reversed(range(len(widths)))):
            block = f"up_blocks.{block_index}"
            for i in range(layers_per_block + 1):
                x = ops.concatenate([x, skips.pop()], axis=-1)
                x = resnet(widths[level], f"{block}.resnets.{i}")(x, time)
                if attends[level]:
                    x = transformer(level, only_cross[level], f"{block}.attentions.{i}")(x, context)
            if level > 0:
                x = Upsample(widths[level], name=f"{block}.upsamplers.0", dtype=dtype)(x, like=skips[-1])

        x = GroupNorm(norm_num_groups, epsilon=1e-5, name="conv_norm_out", dtype=dtype)(x)
        x = conv(out_channels, "conv_out")(ops.silu(x))
        super().__init__(inputs, x, name=name)

        # === Config ===
        self.arguments = arguments

    @property
    def gradient_checkpointing(self):
        """Whether residual blocks and transformers compute their activations again for the gradient instead of keeping
        them: a fraction of the memory for a third more work. To be set before a train step is compiled."""
        return any(layer.gradient_checkpointing for layer in self._blocks())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value):
        for layer in self._blocks():
            layer.gradient_checkpointing = bool(value)

    def _blocks(self):
        return [layer for layer in self.layers if isinstance(layer, (ResnetBlock, SpatialTransformer))]

    def get_config(self):
        return dict(self.arguments)

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def _per_level(value, widths, name):
    """One value per level, from one value for all or a sequence."""
    values = (value,) * len(widths) if isinstance(value, (int, bool)) else tuple(value)
    if len(values) != len(widths):
        raise ValueError(f"{name} must be one value or {len(widths)}, one per level; got {value!r}.")
    return values
