"""The network that steers a U-Net by a picture: edges, depth, a scribble."""

import keras
from keras import ops

from keras_sd.layers.backend_fixes import silu
from keras_sd.layers.int8 import refuse_int8
from keras_sd.models.diffusion_model import DiffusionModel, embed_time, layer_makers, per_level, way_down
from keras_sd.models.network import Network

SHARED = (  # arguments that it has in common with the U-Net that it is for
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "attention_levels",
    "num_attention_heads",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
)
ZERO = "controlnet_cond_embedding.conv_out", "controlnet_down_blocks", "controlnet_mid_block"  # before training


@keras.saving.register_keras_serializable(package="keras_sd")
class ControlNet(Network):
    """A copy of the U-Net's way down that sees a picture besides and tells the U-Net what to add to its skip
    connections. Fully convolutional; defaults are those of SD v1. Untrained, it adds nothing.

    SD v2 differs as in `DiffusionModel`. Networks for edges, depth, poses … differ in their weights alone.

    Args:
        in_channels: channels of the latent.
        block_out_channels, layers_per_block, attention_levels, num_attention_heads, cross_attention_dim,
            use_linear_projection, norm_num_groups: those of the U-Net, see `DiffusionModel`.
        conditioning_embedding_out_channels: channels on the way from the picture to the latent's size; each but the
            first halves height and width.
        global_pool_conditions: the residuals are averaged over the picture, as in the "shuffle" network: it steers the
            style, not the shape.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        dict with `latent` (B, h, w, in_channels), `timestep_embedding` (B, block_out_channels[0]), `context`
        (B, N, cross_attention_dim) and `conditioning` (B, 8h, 8w, 3), the picture, in [0, 1].

    Returns:
        list of residuals: one per skip connection of the U-Net, in the order of the way down, and that of its middle;
        for `DiffusionModel.controlled`.

    Reference: Zhang et al. (2023), Adding Conditional Control to Text-to-Image Diffusion Models, arXiv 2302.05543.
    """

    def __init__(
        self,
        in_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_levels=(True, True, True, False),
        num_attention_heads=8,
        cross_attention_dim=768,
        use_linear_projection=False,
        norm_num_groups=32,
        conditioning_embedding_out_channels=(16, 32, 96, 256),
        global_pool_conditions=False,
        name="control_net",
        dtype=None,
    ):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        widths = tuple(block_out_channels)
        attends, only_cross = per_level(attention_levels, widths, "attention_levels"), (False,) * len(widths)
        conv, *makers = layer_makers(widths, num_attention_heads, use_linear_projection, norm_num_groups, dtype)

        # === Layers ===
        def halve(filters, name):
            pad = keras.layers.ZeroPadding2D(1, dtype=dtype)
            return lambda x: keras.layers.Conv2D(filters, 3, strides=2, name=name, dtype=dtype)(pad(x))

        def zero(filters, size, name):
            return keras.layers.Conv2D(
                filters, size, padding="same", kernel_initializer="zeros", name=name, dtype=dtype
            )

        # === Functional model ===
        latent = keras.Input((None, None, in_channels), name="latent")
        timestep = keras.Input((widths[0],), name="timestep_embedding")
        context = keras.Input((None, cross_attention_dim), name="context")
        conditioning = keras.Input((None, None, 3), name="conditioning")
        inputs = {
            "latent": latent,
            "timestep_embedding": timestep,
            "context": context,
            "conditioning": conditioning,
        }

        time = embed_time(timestep, dtype)
        x = conv(widths[0], "conv_in")(latent)
        block, (first, *others) = "controlnet_cond_embedding", conditioning_embedding_out_channels
        hint = silu(conv(first, f"{block}.conv_in")(conditioning))
        for i, (width, next_width) in enumerate(zip((first, *others), others)):
            hint = silu(conv(width, f"{block}.blocks.{2 * i}")(hint))
            hint = silu(halve(next_width, f"{block}.blocks.{2 * i + 1}")(hint))
        x = x + zero(widths[0], 3, f"{block}.conv_out")(hint)

        middle, skips = way_down(x, time, context, makers, widths, layers_per_block, attends, only_cross, dtype)
        residuals = [zero(skip.shape[-1], 1, f"controlnet_down_blocks.{i}")(skip) for i, skip in enumerate(skips)]
        residuals.append(zero(widths[-1], 1, "controlnet_mid_block")(middle))
        if global_pool_conditions:
            residuals = [ops.mean(x, axis=(1, 2), keepdims=True) for x in residuals]
        super().__init__(inputs, residuals, name=name)

        # === Config ===
        self.arguments = arguments

    @classmethod
    def from_diffusion_model(cls, diffusion_model, seed=0, dtype=None, **kwargs):
        """A network to train: the U-Net's own way down, a random embedding of the picture, zeros where it comes out.

        Args:
            diffusion_model: a `DiffusionModel`.
            seed: integer, of the embedding's weights.
            dtype: Keras dtype policy; by default the U-Net's.
            **kwargs: further arguments of `ControlNet`.

        Raises:
            ValueError: the U-Net's weights are int8.
        """
        refuse_int8(diffusion_model, "A ControlNet to train")
        known = {name: diffusion_model.arguments[name] for name in SHARED}
        net = cls(**known, **kwargs, dtype=dtype or diffusion_model.arguments["dtype"])
        weights = {variable.path: variable for variable in diffusion_model.variables}
        for i, variable in enumerate(net.variables):
            if variable.path in weights:
                # a copy: training on JAX gives the buffers of both models away
                variable.assign(ops.copy(ops.cast(weights[variable.path], variable.dtype)))
            elif not variable.path.startswith(ZERO) and variable.path.endswith("/kernel"):
                variable.assign(keras.initializers.GlorotUniform(seed + i)(variable.shape))
        return net

    gradient_checkpointing, _blocks = DiffusionModel.gradient_checkpointing, DiffusionModel._blocks

    @property
    def factor(self):
        """Pixels of the picture per latent position, in height and width."""
        return 2 ** (len(self.arguments["conditioning_embedding_out_channels"]) - 1)
