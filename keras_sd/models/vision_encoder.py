"""The CLIP vision encoder, which the safety checker and IP-Adapter look at pictures with."""

import keras
from keras import ops

from keras_sd.models.network import Network
from keras_sd.models.text_encoder import ACTIVATIONS, EncoderLayer


@keras.saving.register_keras_serializable(package="keras_sd")
class VisionEncoder(Network):
    """CLIP's vision transformer: a picture → one vector. Defaults are those of ViT-L/14.

    Args:
        image_size: side of the pictures in pixels.
        patch_size: side of the patches, each of which is one position.
        num_channels: channels of the picture.
        hidden_size: width of the transformer.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads per layer.
        intermediate_size: width inside the feed-forward layers.
        hidden_act: "quick_gelu" or "gelu" (exact).
        projection_dim: width of the result.
        dtype: Keras dtype policy, e.g. "bfloat16" or "mixed_bfloat16".

    Call arguments:
        image (B, image_size, image_size, num_channels), normalized as `keras_sd.feature_extractor` does it.

    Returns:
        image embedding (B, projection_dim): the class token after the last layer, normalized and projected.

    Reference: Radford et al. (2021), arXiv 2103.00020, section 2.4; Dosovitskiy et al. (2020), arXiv 2010.11929.
    """

    def __init__(
        self,
        image_size=224,
        patch_size=14,
        num_channels=3,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_act="quick_gelu",
        projection_dim=768,
        name="vision_encoder",
        dtype=None,
    ):
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {sorted(ACTIVATIONS)}; got {hidden_act!r}.")
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}

        # === Layers ===
        def norm(name):
            return keras.layers.LayerNormalization(epsilon=1e-5, name=f"vision_model.{name}", dtype=dtype)

        # === Functional model ===
        image = keras.Input((image_size, image_size, num_channels), name="image")
        x = PatchEmbeddings(image_size, patch_size, hidden_size, name="vision_model.embeddings", dtype=dtype)(image)
        x = norm("pre_layrnorm")(x)  # spelt so in every checkpoint
        for i in range(num_hidden_layers):
            x = EncoderLayer(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                hidden_act,
                is_causal=False,
                name=f"vision_model.encoder.layers.{i}",
                dtype=dtype,
            )(x)
        x = norm("post_layernorm")(x[:, 0])
        x = keras.layers.Dense(projection_dim, use_bias=False, name="visual_projection", dtype=dtype)(x)
        super().__init__(image, x, name=name)

        # === Config ===
        self.arguments = arguments


@keras.saving.register_keras_serializable(package="keras_sd")
class PatchEmbeddings(keras.layers.Layer):
    """A class token and the embedded patches, each with its position's embedding: (B, S, S, C) → (B, 1 + N, dim)."""

    def __init__(self, image_size, patch_size, dim, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.patches = dim, (image_size // patch_size) ** 2
        self.class_embedding = keras.layers.Embedding(1, dim, name="class_embedding", dtype=self.dtype_policy)
        self.patch_embedding = keras.layers.Conv2D(
            dim, patch_size, patch_size, use_bias=False, name="patch_embedding", dtype=self.dtype_policy
        )
        self.position_embedding = keras.layers.Embedding(
            1 + self.patches, dim, name="position_embedding", dtype=self.dtype_policy
        )

    def build(self, input_shape):
        self.class_embedding.build((None, 1))
        self.patch_embedding.build(input_shape)
        self.position_embedding.build((None, 1 + self.patches))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1 + self.patches, self.dim)

    def call(self, image):
        patches = ops.reshape(self.patch_embedding(image), (-1, self.patches, self.dim))
        token = self.class_embedding(ops.zeros((ops.shape(image)[0], 1), "int32"))
        return ops.concatenate([token, patches], axis=1) + self.position_embedding(ops.arange(1 + self.patches)[None])
