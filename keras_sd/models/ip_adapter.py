"""IP-Adapter: a picture as a prompt, beside the text."""

import contextlib

import keras
from keras import ops

from keras_sd.layers import SpatialTransformer
from keras_sd.layers.attention import dot_product_attention


@keras.saving.register_keras_serializable(package="keras_sd")
class IPAdapter(keras.layers.Layer):
    """Projects the embedding of a picture to a few tokens, and lets a U-Net's cross-attentions see them.

    What each cross-attention makes of the text stays; what an attention of its own makes of the picture is added,
    times `scale`. The U-Net itself is not changed: `attached` lends it the further attentions for a call.

    Args:
        widths: channels of the U-Net's cross-attentions, in the order of `cross_attentions`.
        cross_attention_dim: width of the tokens, that of the text's context.
        image_embed_dim: width of the picture's embedding.
        num_tokens: number of tokens of a picture.

    Call arguments:
        image embedding (B, image_embed_dim), of a `VisionEncoder`; zeros stand for no picture.

    Returns:
        tokens (B, num_tokens, cross_attention_dim).

    Reference: Ye et al. (2023), IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models,
    arXiv 2308.06721, section 3.2.
    """

    def __init__(self, widths, cross_attention_dim, image_embed_dim, num_tokens=4, name="ip_adapter", **kwargs):
        super().__init__(name=name, **kwargs)
        self.num_tokens, self.cross_attention_dim = num_tokens, cross_attention_dim
        policy = self.dtype_policy
        self.projection = keras.layers.Dense(num_tokens * cross_attention_dim, name="image_proj.proj", dtype=policy)
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, name="image_proj.norm", dtype=policy)
        # The files count all attentions of the U-Net, every other one of which is a cross-attention.
        self.attentions = [
            ImageAttention(w, name=f"ip_adapter.{2 * i + 1}", dtype=policy) for i, w in enumerate(widths)
        ]
        self.scale = self.add_weight((), "ones", name="scale", trainable=False)
        self.projection.build((None, image_embed_dim))
        self.norm.build((None, num_tokens, cross_attention_dim))
        for attention in self.attentions:
            attention.build((None, num_tokens, cross_attention_dim))
        self.built = True

    def compute_output_shape(self, embedding_shape):
        return (embedding_shape[0], self.num_tokens, self.cross_attention_dim)

    def call(self, embedding):
        return self.norm(ops.reshape(self.projection(embedding), (-1, self.num_tokens, self.cross_attention_dim)))

    @contextlib.contextmanager
    def attached(self, diffusion_model, tokens):
        """While this lasts, the cross-attentions of a `DiffusionModel` see the tokens (B, num_tokens, width), too."""
        layers = cross_attentions(diffusion_model)
        try:
            for layer, attention in zip(layers, self.attentions, strict=True):
                layer.beside = lambda query, attention=attention: attention(tokens, query, self.scale)
            yield
        finally:
            for layer in layers:
                layer.beside = None


@keras.saving.register_keras_serializable(package="keras_sd")
class ImageAttention(keras.layers.Layer):
    """What a cross-attention sees of a picture: tokens (B, n, C), query (B, N, heads, d), scale → as the query."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.key, self.value = (
            keras.layers.Dense(width, use_bias=False, name=name, dtype=self.dtype_policy)
            for name in ("to_k_ip", "to_v_ip")
        )

    def build(self, tokens_shape, *_):
        self.key.build(tokens_shape)
        self.value.build(tokens_shape)

    def compute_output_shape(self, tokens_shape, query_shape, scale_shape=None):
        return query_shape

    def call(self, tokens, query, scale):
        shape = (-1, tokens.shape[1], *query.shape[2:])
        key, value = (ops.reshape(f(tokens), shape) for f in (self.key, self.value))
        return ops.cast(scale, query.dtype) * dot_product_attention(query, key, value)


def cross_attentions(diffusion_model):
    """The cross-attentions of a `DiffusionModel` in the order of IP-Adapter's files: down, up, middle."""
    blocks = [layer for layer in diffusion_model.layers if isinstance(layer, SpatialTransformer)]
    ways = ("down_blocks", "up_blocks", "mid_block")
    return [block.block.attn2 for way in ways for block in blocks if block.name.startswith(way)]
