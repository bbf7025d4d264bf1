"""The U-Net that predicts the noise."""

import contextlib

import keras
from keras import ops

from keras_sd.layers import Downsample, GroupNorm, ResnetBlock, SpatialTransformer, Upsample
from keras_sd.layers.backend_fixes import silu
from keras_sd.layers.repeat import Repeat
from keras_sd.models.network import Network


@keras.saving.register_keras_serializable(package="keras_sd")
class DiffusionModel(Network):
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
        attends = per_level(attention_levels, widths, "attention_levels")
        only_cross = per_level(only_cross_attention, widths, "only_cross_attention")
        conv, resnet, transformer = layer_makers(
            widths, num_attention_heads, use_linear_projection, norm_num_groups, dtype
        )

        # === Functional model ===
        latent = keras.Input((None, None, in_channels), name="latent")
        timestep = keras.Input((widths[0],), name="timestep_embedding")
        context = keras.Input((None, cross_attention_dim), name="context")
        inputs = {"latent": latent, "timestep_embedding": timestep, "context": context}

        time = embed_time(timestep, dtype)
        if num_class_embeds is not None:
            inputs["class_label"] = keras.Input((), name="class_label", dtype="int32")
            embedding = keras.layers.Embedding(num_class_embeds, 4 * widths[0], name="class_embedding", dtype=dtype)
            time = time + embedding(inputs["class_label"])

        x = conv(widths[0], "conv_in")(latent)
        makers = resnet, transformer
        x, skips = way_down(x, time, context, makers, widths, layers_per_block, attends, only_cross, dtype)
        joints = [time, x, *skips]

        for block_index, level in enumerate(reversed(range(len(widths)))):
            block = f"up_blocks.{block_index}"
            for i in range(layers_per_block + 1):
                deep = x
                x = ops.concatenate([x, skips.pop()], axis=-1)
                x = resnet(widths[level], f"{block}.resnets.{i}")(x, time)
                if attends[level]:
                    x = transformer(level, only_cross[level], f"{block}.attentions.{i}")(x, context)
            if level > 0:
                x = Upsample(widths[level], name=f"{block}.upsamplers.0", dtype=dtype)(x, like=skips[-1])

        x = GroupNorm(norm_num_groups, epsilon=1e-5, name="conv_norm_out", dtype=dtype)(x)
        x = conv(out_channels, "conv_out")(silu(x))
        super().__init__(inputs, x, name=name)

        # === Config ===
        self.arguments = arguments
        self._joints, self._deep = joints, deep
        above = attends.index(True) if any(attends) else len(widths)  # levels that do not see the text
        self._textless = joints[2:][: 1 + above * (layers_per_block + 1)]

    @property
    def guided(self):
        """A model with the same layers for several contexts of each latent, (k B, 77, cross_attention_dim), as guidance
        has two. Inputs as this model's, the latent and all else (B, …) → prediction (k B, h, w, out_channels), the
        first B for the first contexts. What comes before the first look at the text is computed once."""
        inputs, time = dict(self.input), self._joints[0]
        context = inputs.pop("context")
        transformer = next(layer for layer in self.layers if isinstance(layer, SpatialTransformer))
        before = keras.Model(inputs, [transformer.input[0], time, *self._textless])
        after = keras.Model([transformer.output, time, *self._textless, context], self.output)
        contexts = keras.Input(context.shape[1:], None, context.dtype, name="context")
        x, *joints = before(inputs)
        prediction = after([transformer(x, contexts, repeats=True), *(Repeat()(y, contexts) for y in joints), contexts])
        return keras.Model({**inputs, "context": contexts}, prediction, name=self.name)

    @property
    def reusing(self):
        """Two models with the same layers, for steps that reuse what the deep layers of another step gave: one that
        gives dict `prediction`, `deep` (B, h, w, C), what the last up block's last residual block gets from below; and
        one that takes `deep` besides and computes the rest alone: `conv_in`, that block, its transformer, `conv_out`.

        Reference: Ma et al. (2023), DeepCache: Accelerating Diffusion Models for Free, arXiv 2312.00858, section 3.2.
        """
        inputs, deep = dict(self.input), keras.Input(self._deep.shape[1:], None, self._deep.dtype, name="deep")
        whole = keras.Model(inputs, {"prediction": self.output, "deep": self._deep}, name=self.name)
        rest = keras.Model([*inputs.values(), self._deep], self.output)
        return whole, keras.Model({**inputs, "deep": deep}, rest([*inputs.values(), deep]), name=self.name)

    @contextlib.contextmanager
    def merging_tokens(self, ratio):
        """While this lasts, self-attention at the highest resolution merges so many of its tokens, 0 … 0.75; see
        `keras_sd.layers.token_merging`. Models that share the layers do so, too."""
        blocks = [x for x in self._blocks() if isinstance(x, SpatialTransformer) and not x.block.only_cross_attention]
        last = len(self.arguments["block_out_channels"]) - 1
        level = min((int(x.name.split(".")[1]) for x in blocks if x.name.startswith("down_blocks")), default=last)
        outermost = [x for x in blocks if x.name.startswith((f"down_blocks.{level}.", f"up_blocks.{last - level}."))]
        try:
            for layer in outermost:
                layer.token_merging = ratio
            yield
        finally:
            for layer in outermost:
                layer.token_merging = 0.0

    @property
    def controlled(self):
        """A model with the same layers that takes the residuals of a `ControlNet` besides: dict with this model's
        inputs and `residuals`, a list in the order of the network's results → prediction."""
        inputs, (_, middle, *skips) = dict(self.input), self._joints
        others = [x for name, x in inputs.items() if name != "latent"]
        residuals = [
            keras.Input(x.shape[1:], None, x.dtype, name=f"residual_{i}") for i, x in enumerate([*skips, middle])
        ]
        down = keras.Model(inputs, self._joints)
        up = keras.Model([*others, *self._joints], self.output)
        time, middle, *skips = down(inputs)
        *skips, middle = (ops.add(x, residual) for x, residual in zip([*skips, middle], residuals))
        prediction = up([*others, time, middle, *skips])
        return keras.Model({**inputs, "residuals": residuals}, prediction, name=self.name)

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


def layer_makers(widths, num_attention_heads, use_linear_projection, norm_num_groups, dtype):
    """Functions that make the layers of a U-Net: convolution (filters, name), residual block (filters, name) and
    spatial transformer (level, only_cross_attention, name)."""
    heads = per_level(num_attention_heads, widths, "num_attention_heads")

    def conv(filters, name):
        return keras.layers.Conv2D(filters, 3, padding="same", name=name, dtype=dtype)

    def resnet(filters, name):
        return ResnetBlock(filters, norm_num_groups, time=True, name=name, dtype=dtype)

    def transformer(level, only_cross, name):
        return SpatialTransformer(
            widths[level], heads[level], norm_num_groups, use_linear_projection, only_cross, name=name, dtype=dtype
        )

    return conv, resnet, transformer


def embed_time(timestep, dtype):
    """The sinusoidal embedding (B, C) of a timestep through two dense layers: (B, 4 C)."""
    width = 4 * timestep.shape[-1]
    time = keras.layers.Dense(width, name="time_embedding.linear_1", dtype=dtype)(timestep)
    return keras.layers.Dense(width, name="time_embedding.linear_2", dtype=dtype)(silu(time))


def way_down(x, time, context, makers, widths, layers_per_block, attends, only_cross, dtype):
    """The down blocks and the middle of a U-Net.

    Args:
        x: (B, h, w, widths[0]), what `conv_in` gives.
        makers: (residual block, spatial transformer) of `layer_makers`.
        attends, only_cross: one value per level.

    Returns:
        (middle, skips): (B, …, widths[-1]), and the list of the skip connections, `x` being the first.
    """
    resnet, transformer = makers
    skips, last = [x], len(widths) - 1
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
    return resnet(widths[-1], "mid_block.resnets.1")(x, time), skips


def per_level(value, widths, name):
    """One value per level, from one value for all or a sequence."""
    values = (value,) * len(widths) if isinstance(value, (int, bool)) else tuple(value)
    if len(values) != len(widths):
        raise ValueError(f"{name} must be one value or {len(widths)}, one per level; got {value!r}.")
    return values
