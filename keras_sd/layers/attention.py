"""Attention: the kernel, the multi-head layer, and the U-Net's spatial transformer."""

import functools
import math

import keras
from keras import ops

from keras_sd.layers.backend_fixes import after
from keras_sd.layers.dense import Dense, product
from keras_sd.layers.group_norm import GroupNorm
from keras_sd.layers.layer_norm import LayerNorm
from keras_sd.layers.recompute import maybe_recomputed
from keras_sd.layers.repeat import repeated
from keras_sd.layers.token_merging import token_merging

# Scores of one head that are computed at once: 2²¹ in bfloat16 are 4 MB, which the cache holds, so that they never
# travel to memory (Dao et al., 2022, arXiv 2205.14135, have that idea for GPUs).
MAX_SCORES = 2**21
WIDTH = 16  # of a register: a product takes less time with a value of 48 columns than of 40
MAX_HEADS = 16  # of a batch, that many scores of each of which are computed at once where they have no more


def dot_product_attention(query, key, value, is_causal=False, softmax_dtype="float32"):
    """Scaled dot-product attention.

    The fused kernels that Keras exposes on JAX, torch and OpenVINO are used where they can be. Elsewhere, once there
    are too many scores, heads are taken one after the other, and the queries of each in chunks (Rabe & Staats, 2021,
    arXiv 2112.05682; here only the queries are split, so that the softmax stays exact).

    Args:
        query: (B, N, heads, head_dim).
        key, value: (B, M, heads, head_dim).
        is_causal: position i sees positions 0 … i only; never chunked.
        softmax_dtype: dtype of the softmax's input and output.

    Returns:
        (B, N, heads, head_dim), in the dtype of `query`.

    Reference: Vaswani et al. (2017), arXiv 1706.03762, equation 1.
    """
    attended = _fused(query, key, value, is_causal)
    if attended is not None:
        return attended
    scale = ops.cast(1 / math.sqrt(query.shape[-1]), query.dtype)
    few = None not in (query.shape[1], key.shape[1]) and key.shape[1] < query.shape[1]
    query, key = (query, key * scale) if few else (query * scale, key)
    query, key, value = (ops.transpose(x, BHND) for x in (query, key, value))
    if is_causal or _fits(query, key):
        attended = _attend(query, key, value, softmax_dtype, is_causal)
    else:
        attended = _attend_in_chunks(query, key, value, softmax_dtype)
    return ops.transpose(attended, BHND)


BHND = 0, 2, 1, 3  # from (B, N, heads, head_dim), and back


def _fused(query, key, value, is_causal):
    """The backend's own kernel, which never holds the scores; None where it has none for these tensors."""
    if keras.backend.backend() in ("torch", "openvino"):
        return ops.dot_product_attention(query, key, value, is_causal=is_causal)
    if keras.backend.backend() == "jax":
        try:
            return ops.dot_product_attention(query, key, value, is_causal=is_causal, flash_attention=True)
        except Exception:  # whichever it is of Keras' checks: no GPU, an old one, no cuDNN, a dtype or width it lacks
            return None
    return None


def _fits(query, key):
    """Whether all scores are computed at once; a batch of unknown size counts as one."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if None in (queries, keys):
        return False
    return queries * keys <= MAX_SCORES and (batch or 1) * heads * queries * keys <= MAX_HEADS * MAX_SCORES


def _attend(query, key, value, softmax_dtype, is_causal=False):
    transposed = ops.swapaxes(key, -1, -2)  # which TensorFlow's graph optimizer makes a part of the product
    scores = ops.cast(ops.matmul(query, transposed), softmax_dtype)
    if is_causal:
        positions = ops.arange(scores.shape[-1])
        scores = ops.where(positions[None, :] > positions[:, None], ops.cast(-1e9, softmax_dtype), scores)
    return ops.matmul(ops.cast(ops.softmax(scores, axis=-1), value.dtype), value)


def _attend_in_chunks(query, key, value, softmax_dtype):
    """query (B, heads, N, d); key, value (B, heads, M, d); one of query and key scaled → (B, heads, N, d)."""
    (heads, dim), (queries, keys) = (query.shape[1], query.shape[3]), (query.shape[2], key.shape[2])
    if None in (queries, keys):
        queries, keys = ops.shape(query)[2], ops.shape(key)[2]
    chunks = queries * keys // MAX_SCORES + 1
    size = -(-queries // chunks)  # of all chunks alike: the last one is filled up
    filled = ops.concatenate([query, query[:, :, : chunks * size - queries]], axis=2)
    pieces = ops.reshape(filled, (-1, size, dim))
    value = ops.pad(value, ((0, 0), (0, 0), (0, 0), (0, -dim % WIDTH)))
    key, value = (ops.reshape(x, (-1, keys, x.shape[-1])) for x in (key, value))

    def attend(piece):
        query, i = piece
        return _attend(query, key[i // chunks], value[i // chunks], softmax_dtype)

    attended = ops.map(attend, (pieces, ops.arange(ops.shape(pieces)[0])))
    return ops.reshape(attended, (-1, heads, chunks * size, value.shape[-1]))[:, :, :queries, :dim]


@keras.saving.register_keras_serializable(package="keras_sd")
class Attention(keras.layers.Layer):
    """Multi-head attention over a sequence.

    Args:
        dim: width of the input and of the result.
        num_heads: number of heads; `dim` must be a multiple of it.
        use_bias: bias in the query, key and value projections; the output projection always has one.
        is_causal: position i sees positions 0 … i only.
        names: names of the query, key, value and output projections.

    Call arguments:
        x: (B, N, dim).
        context: (B, M, any width) for cross-attention; by default `x` itself.

    Returns:
        (B, N, dim).
    """

    def __init__(
        self,
        dim,
        num_heads,
        use_bias=False,
        is_causal=False,
        names=("to_q", "to_k", "to_v", "to_out.0"),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.beside = None  # function of the query → what is added to what is attended; an IP-Adapter lends it
        self.dim, self.num_heads, self.is_causal = dim, num_heads, is_causal
        self.query, self.key, self.value, self.output_projection = (
            Dense(dim, use_bias=use_bias or name == names[-1], name=name, dtype=self.dtype_policy) for name in names
        )

    def build(self, x_shape, context_shape=None):
        self.query.build(x_shape)
        self.key.build(context_shape or x_shape)
        self.value.build(context_shape or x_shape)
        self.output_projection.build(x_shape)

    def compute_output_shape(self, x_shape, context_shape=None):
        return x_shape

    def call(self, x, context=None):
        context = x if context is None else context
        query, key, value = (
            self._split(f(y)) for f, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        attended = dot_product_attention(query, key, value, self.is_causal, self._softmax_dtype())
        if self.beside is not None:
            attended = attended + self.beside(query)
        return self.output_projection(ops.reshape(attended, (-1, *self._length(x), self.dim)))

    def _softmax_dtype(self):
        # TensorFlow's softmax of bfloat16 computes in float32 inside; its gradient does not, and weights that are
        # trained are not in bfloat16.
        wide = keras.backend.backend() != "tensorflow" or self.variable_dtype != "bfloat16"
        return "float32" if wide else "bfloat16"

    def _split(self, x):
        return ops.reshape(x, (-1, *self._length(x), self.num_heads, self.dim // self.num_heads))

    @staticmethod
    def _length(x):
        return (ops.shape(x)[1],)


@keras.saving.register_keras_serializable(package="keras_sd")
class GEGLU(keras.layers.Layer):
    """Dense → gelu(gate) · value, with exact GELU: (B, N, C) → (B, N, dim).

    Reference: Shazeer (2020), GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, dim, **kwargs):
        super().__init__(**kwargs)
        self.proj = Dense(2 * dim, name="proj", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.proj.build(input_shape)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.proj.units // 2)

    def call(self, x):
        if self._fuses():
            return self._fused(x)
        value, gate = ops.split(self.proj(x), 2, axis=-1)
        if keras.backend.backend() == "tensorflow":  # whose error function is four times as slow in bfloat16
            return value * ops.cast(ops.gelu(ops.cast(gate, "float32"), approximate=False), value.dtype)
        return value * ops.gelu(gate, approximate=False)

    def _fuses(self):
        """Whether TensorFlow's graph optimizer makes one operation of product, bias and GELU: of a plain kernel, and
        where no gradient asks for what lies between them."""
        plain = type(self.proj) is Dense and not self.proj.lora_enabled
        return keras.backend.backend() == "tensorflow" and plain and self.variable_dtype == "bfloat16"

    def _fused(self, x):
        """The same, a product for each half, in the one shape that the optimizer knows (`remapper.cc`)."""
        import tensorflow as tf

        x, kernel = after(x, tf.convert_to_tensor(self.proj.kernel))  # whose halves are copies
        rows = tf.reshape(x, (-1, x.shape[-1]))
        for_value, for_gate = zip(*(tf.split(w, 2, axis=-1) for w in (kernel, tf.convert_to_tensor(self.proj.bias))))
        gate = tf.nn.bias_add(tf.matmul(rows, for_gate[0]), for_gate[1])
        gate, x = after(gate * (0.5 * (tf.math.erf(gate * math.sqrt(0.5)) + 1)), x)  # each product takes memory
        value = product(x, *for_value)
        return value * tf.reshape(gate, tf.shape(value))


@keras.saving.register_keras_serializable(package="keras_sd")
class TransformerBlock(keras.layers.Layer):
    """Self-attention, cross-attention and a gated feed-forward layer, each with LayerNorm before and a skip around it.

    With `only_cross_attention` the first attends to the context too, as in the outer levels of the ×4 upscaler.

    Call arguments:
        x: (B, N, dim).
        context: (B, M, any width).
        merging: (height, width, ratio) of the grid that x is, to merge tokens for the self-attention; by default none.
        repeats: whether there may be several contexts of each sample, (k B, M, any width), and so as many results; what
            does not see the context is computed once.
    """

    def __init__(self, dim, num_heads, only_cross_attention=False, **kwargs):
        super().__init__(**kwargs)
        self.only_cross_attention = only_cross_attention
        self.norm1, self.norm2, self.norm3 = (
            LayerNorm(epsilon=1e-5, name=f"norm{i}", dtype=self.dtype_policy) for i in (1, 2, 3)
        )
        self.attn1 = Attention(dim, num_heads, name="attn1", dtype=self.dtype_policy)
        self.attn2 = Attention(dim, num_heads, name="attn2", dtype=self.dtype_policy)
        self.geglu = GEGLU(4 * dim, name="ff.net.0", dtype=self.dtype_policy)
        self.dense = Dense(dim, name="ff.net.2", dtype=self.dtype_policy)

    def build(self, x_shape, context_shape):
        for layer in (self.norm1, self.norm2, self.norm3, self.geglu):
            layer.build(x_shape)
        self.attn1.build(x_shape, context_shape if self.only_cross_attention else None)
        self.attn2.build(x_shape, context_shape)
        self.dense.build((*x_shape[:-1], 4 * x_shape[-1]))

    def compute_output_shape(self, x_shape, context_shape):
        return x_shape

    def call(self, x, context, merging=None, repeats=False):
        if self.only_cross_attention:
            x = repeated(x, context) if repeats else x
            x = x + self.attn1(self.norm1(x), context)
        else:
            x = x + self._self_attention(self.norm1(x), merging)
            x = repeated(x, context) if repeats else x
        x = x + self.attn2(self.norm2(x), context)
        return x + self.dense(self.geglu(self.norm3(x)))

    def _self_attention(self, x, merging):
        if merging is None:
            return self.attn1(x)
        merge, unmerge = token_merging(x, *merging)
        return unmerge(self.attn1(merge(x)))


@keras.saving.register_keras_serializable(package="keras_sd")
class SpatialTransformer(keras.layers.Layer):
    """A transformer block over the positions of a picture, steered by the text.

    Args:
        dim: channels of the picture.
        num_heads: attention heads.
        groups: groups of the normalization before the projection.
        use_linear_projection: Dense instead of 1×1 convolutions around the block, as SD v2 has it.
        only_cross_attention: no self-attention; the context is attended to twice.

    Call arguments:
        x: (B, H, W, dim).
        context: (B, M, any width).
        repeats: see `TransformerBlock`.

    Reference: Rombach et al. (2022), arXiv 2112.10752, appendix E.2.1.
    """

    gradient_checkpointing = False
    token_merging = 0.0  # ratio; `DiffusionModel.merging_tokens` lends another

    def __init__(self, dim, num_heads, groups=32, use_linear_projection=False, only_cross_attention=False, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.use_linear_projection = dim, use_linear_projection
        self.norm = GroupNorm(groups, epsilon=1e-6, name="norm", dtype=self.dtype_policy)
        self.block = TransformerBlock(
            dim, num_heads, only_cross_attention, name="transformer_blocks.0", dtype=self.dtype_policy
        )
        self.proj_in, self.proj_out = (
            Dense(dim, name=name, dtype=self.dtype_policy)
            if use_linear_projection
            else keras.layers.Conv2D(dim, 1, name=name, dtype=self.dtype_policy)
            for name in ("proj_in", "proj_out")
        )

    def build(self, x_shape, context_shape):
        for layer in (self.norm, self.proj_in, self.proj_out):
            layer.build(x_shape)
        self.block.build((x_shape[0], None, self.dim), context_shape)

    def compute_output_shape(self, x_shape, context_shape):
        return x_shape

    def call(self, x, context, repeats=False):
        return maybe_recomputed(self, functools.partial(self._forward, repeats=repeats), x, context)

    def _forward(self, x, context, repeats=False):
        height, width = ops.shape(x)[1:3]
        hidden = ops.reshape(self.proj_in(self.norm(x)), (-1, height * width, self.dim))
        merging = (height, width, self.token_merging) if self.token_merging else None
        hidden = self.block(hidden, context, merging=merging, repeats=repeats)
        return (repeated(x, hidden) if repeats else x) + self.proj_out(
            ops.reshape(hidden, (-1, height, width, self.dim))
        )
