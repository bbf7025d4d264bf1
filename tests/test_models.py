"""The four models against diffusers and transformers, with the same weights; sizes, dtypes, saving."""

import functools

import diffusers
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers
from diffusers.models.embeddings import get_timestep_embedding

from keras_sd import Decoder, DiffusionModel, ImageEncoder, StableDiffusion, TextEncoder
from keras_sd.layers import GroupNorm, SpatialTransformer, Upsample, dot_product_attention, timestep_embedding
from keras_sd.layers import attention as attention_module
from keras_sd.layers.attention import GEGLU
from keras_sd.layers.conv import Conv3x3
from keras_sd.layers.dense import Dense
from keras_sd.layers.layer_norm import LayerNorm

RANDOM = np.random.default_rng(0)

NARROW = {
    TextEncoder: {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    DiffusionModel: {
        "block_out_channels": (16, 32),
        "attention_levels": (True, False),
        "layers_per_block": 1,
        "num_attention_heads": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    ImageEncoder: {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    Decoder: {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
}


def inputs_of(cls):
    random = np.random.default_rng(0)
    if cls is TextEncoder:
        return {"tokens": random.integers(0, 60, (2, 77), dtype="int32")}
    if cls is DiffusionModel:
        shapes = {"latent": (2, 9, 13, 4), "timestep_embedding": (2, 16), "context": (2, 77, 32)}
        return {name: random.standard_normal(shape, "float32") for name, shape in shapes.items()}
    return random.standard_normal((1, 40, 24, 3) if cls is ImageEncoder else (1, 5, 3, 4), "float32")


def numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")))


def distance(a, b):
    a, b = numpy(a), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


# === Parity ===


@pytest.fixture(scope="module", params=["tiny", "narrow_v1", "v2_like"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def sd(folder):
    return StableDiffusion.from_preset(folder)


def test_tokens_and_text_encoder(sd, folder):
    prompts = ["", "an apple", "two apples, please! it's 7 o'clock", "ünïcode 苹果 🍎", "pear " * 100]
    peer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    expected = peer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="pear"):
        tokens = sd.tokenizer(prompts)
    np.testing.assert_array_equal(tokens, expected)
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        assert distance(sd.text_encoder({"tokens": tokens}), encoder(expected)[0]) < 1e-4


@pytest.mark.parametrize("height, width", [(8, 8), (16, 8), (9, 13)])
def test_diffusion_model(sd, folder, height, width):
    peer = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    random = np.random.default_rng(height)
    latent = random.standard_normal((2, height, width, 4), "float32")
    context = random.standard_normal((2, 77, peer.config.cross_attention_dim), "float32")
    timestep = np.array([749.25, 3.0], "float32")
    embedding = numpy(timestep_embedding(timestep, peer.config.block_out_channels[0]))
    ours = sd.diffusion_model({"latent": latent, "timestep_embedding": embedding, "context": context})
    with torch.no_grad():
        theirs = peer(channels_first(latent), torch.from_numpy(timestep), torch.from_numpy(context)).sample
    assert distance(ours, channels_last(theirs)) < 1e-4


def test_autoencoder(sd, folder):
    peer = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = np.random.default_rng(0).uniform(-1, 1, (2, 72, 104, 3)).astype("float32")
    with torch.no_grad():
        posterior = peer.encode(channels_first(image)).latent_dist
        scale = peer.config.scaling_factor
        assert distance(sd.image_encoder(image), scale * channels_last(posterior.mean)) < 1e-4
        mean, log_variance = sd.image_encoder.moments(image)
        assert distance(mean, channels_last(posterior.mean)) < 1e-4
        assert distance(log_variance, channels_last(posterior.logvar)) < 1e-4
        latent = scale * channels_last(posterior.mean)
        decoded = peer.decode(posterior.mean).sample
        assert distance(sd.decoder(latent), channels_last(decoded)) < 1e-4


def test_timestep_embedding():
    timesteps = np.array([0, 1, 500.5, 999], "float32")
    expected = get_timestep_embedding(torch.from_numpy(timesteps), 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(numpy(timestep_embedding(timesteps, 320)), expected.numpy(), atol=1e-4)


# === Any size ===


def test_any_latent_size():
    levels = {"block_out_channels": (16,) * 3, "attention_levels": (True, False, False)}
    model = DiffusionModel(**{**NARROW[DiffusionModel], **levels})
    for size in ((1, 1), (1, 6), (9, 13)):
        inputs = {**inputs_of(DiffusionModel), "latent": np.ones((2, *size, 4), "float32")}
        assert model(inputs).shape == (2, *size, 4)
    # Where the graph does not know the size, too.
    assert distance(model.predict(inputs, verbose=0), numpy(model(inputs))) < 1e-5


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (72, 104)])
def test_any_picture_size(size):
    latent = ImageEncoder(**NARROW[ImageEncoder])(np.ones((1, *size, 3), "float32"))
    assert latent.shape == (1, size[0] // 8, size[1] // 8, 4)
    assert Decoder(**NARROW[Decoder])(latent).shape == (1, *size, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("strides, padding, size", [(1, "same", (4, 3)), (2, "valid", (10, 7)), (2, "valid", (9, 8))])
def test_a_convolution_at_few_positions_is_a_product(strides, padding, size, dtype, in_graph, monkeypatch):
    options = {"strides": strides, "padding": padding, "dtype": dtype}
    layer, other = Conv3x3(64, **options), keras.layers.Conv2D(64, 3, **options)
    x = RANDOM.standard_normal((2, *size, 40), "float32") / 2  # sums below 64, where bfloat16's numbers are 0.25 apart
    x = keras.ops.cast(x, dtype)
    for one in (layer, other):
        one.build(x.shape)
    layer.set_weights([RANDOM.standard_normal(w.shape, "float32") for w in layer.get_weights()])
    other.set_weights(layer.get_weights())
    expected, plain = numpy(other(x)), layer(x)
    assert (numpy(plain) == expected).all()
    monkeypatch.setattr(keras.layers.Conv2D, "call", None)
    product = tf.function(lambda x: layer(x, training=False))(x) if in_graph else layer(x, training=False)
    assert product.dtype == dtype and product.shape == (2, 4, 3, 64)
    np.testing.assert_allclose(numpy(product), expected, atol=1e-4 if dtype == "float32" else 0.3)
    side = 8 * strides
    with pytest.raises(TypeError):
        layer(keras.ops.zeros((2, side, side, 40), dtype), training=False)  # whose kernel is no larger than the picture


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 5, 7, 16), (3, 16, 16, 32)])
def test_group_normalization_by_the_kernels_of_batch_normalization(dtype, shape):
    random = np.random.default_rng(0)  # its own: the bound holds for numbers below 8, whatever ran before
    layer = GroupNorm(4, epsilon=1e-5, dtype=dtype)
    layer.build(shape)
    layer.set_weights([random.standard_normal(w.shape, "float32") for w in layer.get_weights()])
    x = keras.ops.cast(3 * random.standard_normal(shape, "float32") + 10, dtype)
    grouped = numpy(x).astype("float64").reshape(shape[0], -1, 4, shape[-1] // 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    expected = (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(shape)
    expected = expected * numpy(layer.gamma) + numpy(layer.beta)
    eager, graph = layer(x, training=False), tf.function(lambda x: layer(x, training=False))(x)
    unknown = tf.function(lambda x: layer(x, training=False), [tf.TensorSpec((None, *shape[1:]), dtype)])(x)
    for result in (layer(x), eager, graph, unknown):
        assert result.dtype == dtype
        np.testing.assert_allclose(numpy(result), expected, atol=2e-5 if dtype == "float32" else 0.03)


def test_no_wrong_gradient_of_a_prediction():
    layer, x = GroupNorm(4), tf.ones((1, 4, 4, 8))
    layer.build(x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=False)
    with pytest.raises(LookupError, match="training=True"):
        tape.gradient(y, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", [77, 1024])
def test_dense_of_a_sequence_in_predictions(dtype, positions, monkeypatch):
    random = np.random.default_rng(0)
    x = keras.ops.cast(random.standard_normal((2, positions, 24), "float32"), dtype)
    for options in ({}, {"use_bias": False}, {"activation": "relu"}):
        layer = Dense(40, dtype=dtype, **options)
        layer.build(x.shape)
        layer.set_weights([random.standard_normal(w.shape, "float32") for w in layer.get_weights()])
        layer.enable_lora(2)
        layer.set_weights([random.standard_normal(w.shape, "float32") for w in layer.get_weights()])
        expected = numpy(layer(x, training=True))
        with monkeypatch.context() as patch:
            patch.setattr(keras.layers.Dense, "call", None)
            predict = functools.partial(layer, training=False)
            unknown = tf.function(predict, [tf.TensorSpec((None, None, 24), dtype)])
            results = predict(x), tf.function(predict)(x), unknown(x)
        for result in results:
            assert result.dtype == dtype and result.shape == (2, positions, 40)
            rtol, atol = (1e-5, 1e-4) if dtype == "float32" else (2**-7, 0.1)
            np.testing.assert_allclose(numpy(result), expected, rtol, atol)


def test_gelu_in_the_product(monkeypatch):
    layer, x = GEGLU(48, dtype="bfloat16"), keras.ops.cast(RANDOM.standard_normal((2, 5, 16), "float32"), "bfloat16")
    layer.build(x.shape)
    layer.set_weights([RANDOM.standard_normal(w.shape, "float32") for w in layer.get_weights()])
    graph, eager = numpy(tf.function(layer)(x)), numpy(layer(x))
    monkeypatch.setattr(GEGLU, "_fuses", lambda self: False)
    wide = GEGLU(48)
    wide.build(x.shape)
    wide.set_weights(layer.get_weights())
    exact, plain = numpy(wide(keras.ops.cast(x, "float32"))), numpy(layer(x))
    assert graph.shape == exact.shape == (2, 5, 48)
    for result in (graph, eager):
        assert np.abs(result - exact).mean() < 1.2 * np.abs(plain - exact).mean()


def test_upsample_takes_the_size_of_the_skip_connection():
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4), "float32")
    layer = Upsample(4)
    layer.build(x.shape)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    assert distance(layer(x), numpy(layer.conv(doubled))) < 1e-6
    skip = np.zeros((1, 3, 5, 9), "float32")
    assert distance(layer(x, like=skip), numpy(layer.conv(doubled[:, :3, :5]))) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(4, 7), (3, 3), (None, None)])
def test_doubling_and_convolution_in_one(dtype, size, monkeypatch):
    x = keras.ops.cast(RANDOM.standard_normal((2, *(side or 5 for side in size), 6), "float32"), dtype)
    layer = Upsample(8, dtype=dtype)
    layer.build(x.shape)
    layer.set_weights([RANDOM.standard_normal(w.shape, "float32") for w in layer.get_weights()])
    expected, given = numpy(layer(x)), (tf.TensorSpec((None, *size, 6), dtype),)
    cut = numpy(layer(x, like=np.zeros((2, expected.shape[1] - 1, expected.shape[2], 1))))
    monkeypatch.setattr(keras.layers.Conv2D, "call", None)  # which sees a doubled picture
    results = [layer(x, training=False), tf.function(lambda x: layer(x, training=False), given)(x)]
    for result in [*results, layer(x, like=expected, training=False)]:
        assert result.dtype == dtype
        np.testing.assert_allclose(numpy(result), expected, atol=5e-5 if dtype == "float32" else 0.8)
    monkeypatch.undo()  # below the last row of a picture of an odd size there is nothing
    again = numpy(layer(x, like=np.zeros((2, expected.shape[1] - 1, expected.shape[2], 1)), training=False))
    np.testing.assert_array_equal(again, cut)


def test_predictions_are_the_same_to_the_last_bit_in_every_call(tiny):
    """Which a TensorFlow `AddN` of three is not: it begins with whichever of its buffers is free."""
    model = StableDiffusion.from_preset(tiny).diffusion_model
    x = {x.name: RANDOM.standard_normal((2, *(side or 8 for side in x.shape[1:])), "float32") for x in model.inputs}
    assert len({model.predict_on_batch(x).tobytes() for _ in range(50)}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_layer_normalization_by_one_kernel(dtype):
    layer, x = LayerNorm(epsilon=1e-5, dtype=dtype), 3 * RANDOM.standard_normal((2, 5, 24), "float32") + 10
    layer.build(x.shape)
    layer.set_weights([RANDOM.standard_normal(w.shape, "float32") for w in layer.get_weights()])
    x = keras.ops.cast(x, layer.compute_dtype)
    wide = numpy(x).astype("float64")
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    expected = expected * numpy(layer.gamma) + numpy(layer.beta)
    given = (tf.TensorSpec((None, None, 24), x.dtype),)
    eager, graph = layer(x, training=False), tf.function(lambda x: layer(x, training=False))(x)
    unknown = tf.function(lambda x: layer(x, training=False), given)(x)
    compiled = tf.function(lambda x: layer(x, training=False), jit_compile=True)(x)
    for result in (layer(x), eager, graph, unknown, compiled):
        assert result.dtype == x.dtype
        np.testing.assert_allclose(numpy(result), expected, atol=2e-5 if dtype == "float32" else 0.05)


# === Guidance ===

LEVELS = {
    "first": {"attention_levels": (True, True, False)},
    "later": {"attention_levels": (False, False, True), "use_linear_projection": True},
    "middle": {"attention_levels": (False, False, False), "layers_per_block": 1},
    "upscaler": {
        "attention_levels": (False, True, True),
        "only_cross_attention": (True, True, False),
        "in_channels": 7,
        "num_class_embeds": 9,
    },
}


@pytest.mark.parametrize("levels", list(LEVELS))
def test_what_comes_before_the_text_is_computed_once(levels):
    model = DiffusionModel(**{**NARROW[DiffusionModel], "block_out_channels": (16, 16, 32), **LEVELS[levels]})
    channels = model.arguments["in_channels"]
    inputs = {**inputs_of(DiffusionModel), "latent": RANDOM.standard_normal((2, 6, 9, channels), "float32")}
    if "num_class_embeds" in LEVELS[levels]:
        inputs["class_label"] = np.array([3, 7], "int32")
    contexts = RANDOM.standard_normal((4, *inputs["context"].shape[1:]), "float32")
    expected = [numpy(model({**inputs, "context": half})) for half in (contexts[:2], contexts[2:])]
    assert distance(*expected) > 1e-3
    guided = model.guided
    assert distance(guided({**inputs, "context": contexts}), np.concatenate(expected)) < 1e-5
    first = next(x for x in model.layers if isinstance(x, SpatialTransformer))
    sizes = {}
    for layer in (model.get_layer("conv_in"), first.norm, first.block.attn1, first.block.attn2, first.proj_out):
        call = layer.call
        layer.call = lambda x, *a, name=layer.name, call=call, **k: sizes.update({name: x.shape[0]}) or call(x, *a, **k)
    guided({**inputs, "context": contexts})
    sees_text = 4 if first.block.only_cross_attention else 2
    assert list(sizes.values()) == [2, 2, sees_text, 4, 4]


# === As Keras models ===


@pytest.mark.parametrize("cls", list(NARROW))
def test_config_and_saving(cls, tmp_path):
    model = cls(**NARROW[cls])
    inputs = inputs_of(cls)
    expected = numpy(model(inputs))
    again = cls.from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(again(inputs)), expected)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(loaded(inputs)), expected, atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = cls(**NARROW[cls])
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(numpy(fresh(inputs)), expected, atol=1e-6)
    clone = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert [(v.path, v.shape) for v in clone.variables] == [(v.path, v.shape) for v in model.variables]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("cls", list(NARROW))
def test_precision(cls, dtype):
    model, half = cls(**NARROW[cls]), cls(**NARROW[cls], dtype=dtype)
    half.set_weights(model.get_weights())
    stored = "float32" if dtype.startswith("mixed") else dtype
    assert {v.dtype for v in half.variables} == {stored}
    inputs = inputs_of(cls)
    output = half(inputs)
    assert keras.backend.standardize_dtype(output.dtype) == dtype.removeprefix("mixed_")
    assert distance(output, numpy(model(inputs))) < (0.05 if "bfloat16" in dtype else 0.01)


@pytest.mark.parametrize("positions", [np.arange(77)[None], np.arange(77)[None].repeat(2, 0), None])
def test_positions_are_optional(positions):
    model, inputs = TextEncoder(**NARROW[TextEncoder]), inputs_of(TextEncoder)
    given = inputs if positions is None else {**inputs, "positions": positions.astype("int32")}
    np.testing.assert_allclose(numpy(model(given)), numpy(model(inputs)), atol=1e-6)
    backwards = {**inputs, "positions": np.arange(77, dtype="int32")[None, ::-1].repeat(2, 0)}
    assert distance(model(backwards), numpy(model(inputs))) > 1e-3


@pytest.mark.parametrize("cls", list(NARROW))
def test_gradients_in_mixed_precision_are_finite(cls):
    model = cls(**NARROW[cls], dtype="mixed_bfloat16")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.cast(model(inputs_of(cls)), "float32") ** 2)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert all(np.isfinite(tf.convert_to_tensor(gradient)).all() for gradient in gradients)


def test_layers_carry_the_names_of_the_state_dict():
    model = DiffusionModel(**NARROW[DiffusionModel])
    assert model.get_layer("down_blocks.0.resnets.0").conv1.kernel.path == "down_blocks.0.resnets.0/conv1/kernel"


def test_defaults_are_sd_v1():
    assert TextEncoder.__init__.__defaults__[:6] == (49408, 77, 768, 12, 12, 3072)
    assert DiffusionModel.__init__.__defaults__[2] == (320, 640, 1280, 1280)


def test_per_level_arguments_are_checked():
    with pytest.raises(ValueError, match="num_attention_heads must be one value or 4"):
        DiffusionModel(num_attention_heads=(8, 8))
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        TextEncoder(hidden_act="relu")


def test_chunked_attention_equals_plain_attention(monkeypatch):
    random = np.random.default_rng(0)
    query, key, value = (random.standard_normal((2, n, 4, 8), "float32") for n in (50, 33, 33))
    plain = numpy(dot_product_attention(query, key, value))
    monkeypatch.setattr(attention_module, "MAX_SCORES", 2000)
    assert distance(dot_product_attention(query, key, value), plain) < 1e-5
