"""The CLIP text encoder."""

import keras
import numpy as np
from keras import ops

from keras_sd.layers import Attention
from keras_sd.models.network import Network


def quick_gelu(x):
    """x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * ops.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: ops.gelu(x, approximate=False)}


@keras.saving.register_keras_serializable(package="keras_sd")
class TextEncoder(Network):
    """CLIP's text transformer: tokens → one context vector per token. Defaults are those of SD v1.

    SD v2 differs in `hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096,
    hidden_act="gelu"`.

    Args:
        vocab_size: number of tokens.
        max_position_embeddings: length of a token sequence.
        hidden_size: width of the context.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads per layer.
        intermediate_size: width inside the feed-forward layers.
        hidden_act: "quick_gelu" or "gelu" (exact).
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        dict with `tokens` int32 (B, 77) and, optionally, `positions` int32 (B, 77), by default 0 … 76.

    Returns:
        context (B, 77, hidden_size), after the final layer normalization.

    Example:
        context = TextEncoder()({"tokens": tokens})

    Reference: Radford et al. (2021), arXiv 2103.00020, section 2.4; code-level details: openai/CLIP.
    """

    def __init__(
        self,
        vocab_size=49408,
        max_position_embeddings=77,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="quick_gelu",
        name="text_encoder",
        dtype=None,
    ):
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {sorted(ACTIVATIONS)}; got {hidden_act!r}.")
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}

        # === Functional model ===
        length = (max_position_embeddings,)
        tokens = keras.Input(length, dtype="int32", name="tokens")
        positions = keras.Input(length, dtype="int32", name="positions", optional=True)
        x = Embeddings(vocab_size, max_position_embeddings, hidden_size, name="text_model.embeddings", dtype=dtype)(
            tokens, positions
        )
        for i in range(num_hidden_layers):
            x = EncoderLayer(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                hidden_act,
                name=f"text_model.encoder.layers.{i}",
                dtype=dtype,
            )(x)
        x = keras.layers.LayerNormalization(epsilon=1e-5, name="text_model.final_layer_norm", dtype=dtype)(x)
        super().__init__({"tokens": tokens, "positions": positions}, x, name=name)

        # === Config ===
        self.arguments = arguments

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__({"positions": None, **inputs}, *args, **kwargs)

    def call(self, inputs, training=None, mask=None):
        # JAX's stateless call comes here directly.
        return super().call({"positions": None, **inputs}, training, mask)

    def with_tokens(self, vectors):
        """A copy of this model with further tokens, whose ids follow the others.

        Args:
            vectors: (n, hidden_size), the new rows of the token embedding.
        """
        model = TextEncoder(**{**self.arguments, "vocab_size": self.arguments["vocab_size"] + len(vectors)})
        for new, old in zip(model.variables, self.variables):
            value = ops.convert_to_numpy(old)
            further = new.shape[0] - old.shape[0]
            new.assign(np.concatenate([value, vectors.astype(value.dtype)]) if further else value)
        return model


@keras.saving.register_keras_serializable(package="keras_sd")
class Embeddings(keras.layers.Layer):
    """Sum of token and position embeddings: int32 (B, N), optional int32 (B, N) → (B, N, dim)."""

    def __init__(self, vocab_size, max_length, dim, **kwargs):
        super().__init__(**kwargs)
        self.max_length = max_length
        self.token_embedding = keras.layers.Embedding(
            vocab_size, dim, name="token_embedding", embeddings_initializer=_normal(0.02), dtype=self.dtype_policy
        )
        self.position_embedding = keras.layers.Embedding(
            max_length, dim, name="position_embedding", embeddings_initializer=_normal(0.01), dtype=self.dtype_policy
        )

    def build(self, tokens_shape, positions_shape=None):
        self.token_embedding.build(tokens_shape)
        self.position_embedding.build(tokens_shape)

    def compute_output_shape(self, tokens_shape, positions_shape=None):
        return (*tokens_shape, self.token_embedding.output_dim)

    def call(self, tokens, positions=None):
        if positions is None:
            positions = ops.arange(self.max_length, dtype="int32")[None, : ops.shape(tokens)[1]]
        return self.token_embedding(tokens) + self.position_embedding(positions)


def _normal(stddev):
    return keras.initializers.RandomNormal(stddev=stddev)


@keras.saving.register_keras_serializable(package="keras_sd")
class EncoderLayer(keras.layers.Layer):
    """Self-attention and a feed-forward layer, each with LayerNorm before and a skip around it: (B, N, dim)."""

    def __init__(self, dim, num_heads, intermediate_size, hidden_act, is_causal=True, **kwargs):
        super().__init__(**kwargs)
        self.intermediate_size = intermediate_size
        self.activation = ACTIVATIONS[hidden_act]
        self.self_attn = Attention(
            dim,
            num_heads,
            use_bias=True,
            is_causal=is_causal,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            name="self_attn",
            dtype=self.dtype_policy,
        )
        self.layer_norm1, self.layer_norm2 = (
            keras.layers.LayerNormalization(epsilon=1e-5, name=name, dtype=self.dtype_policy)
            for name in ("layer_norm1", "layer_norm2")
        )
        self.fc1 = keras.layers.Dense(intermediate_size, name="mlp.fc1", dtype=self.dtype_policy)
        self.fc2 = keras.layers.Dense(dim, name="mlp.fc2", dtype=self.dtype_policy)

    def build(self, input_shape):
        for layer in (self.layer_norm1, self.self_attn, self.layer_norm2, self.fc1):
            layer.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.intermediate_size))

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))
