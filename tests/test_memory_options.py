"""Big pictures in little memory: every option draws what the pipeline draws without it."""

import math
import shutil
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_stable_diffusion import close

from keras_sd import Decoder, ImageEncoder, StableDiffusion, stable_diffusion, tiling
from keras_sd.layers import attention

QUERIES, KEYS = 61, 37
RANDOM = np.random.default_rng(0)


# === Attention in chunks ===


def tensors(dtype="float32"):
    return [RANDOM.standard_normal((2, n, 3, 8)).astype(dtype) for n in (QUERIES, KEYS, KEYS)]


def plain_attention(query, key, value):
    """Equation 1 of Vaswani et al. in float64."""
    scores = np.einsum("bnhd,bmhd->bhnm", query.astype("float64"), key) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize("rows", [1, 7, 60, 61, 1000])
@pytest.mark.parametrize(
    "sizes", [(2, QUERIES, KEYS), (None, QUERIES, KEYS), (2, None, KEYS), (2, QUERIES, None), (None, None, None)]
)
@pytest.mark.parametrize("xla", [False, True])
def test_chunked_attention_equals_plain_attention(rows, sizes, xla, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", rows * KEYS)
    monkeypatch.setattr(attention, "MAX_HEADS", 2)
    batch, queries, keys = sizes
    specs = [tf.TensorSpec((batch, n, 3, 8)) for n in (queries, keys, keys)]
    function = tf.function(attention.dot_product_attention, specs, jit_compile=xla, autograph=False)
    given = tensors()
    np.testing.assert_allclose(function(*given), plain_attention(*given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [QUERIES, None])
@pytest.mark.parametrize("xla", [False, True])
def test_gradients_go_through_chunks(queries, xla, monkeypatch):
    given = tensors()

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(attention.dot_product_attention(*inputs) ** 2)
        return tape.gradient(loss, inputs)

    expected = gradient(*map(tf.constant, given))
    monkeypatch.setattr(attention, "MAX_SCORES", 7 * KEYS)
    specs = [tf.TensorSpec((2, n, 3, 8)) for n in (queries, KEYS, KEYS)]
    for ours, theirs in zip(tf.function(gradient, specs, jit_compile=xla, autograph=False)(*given), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_no_tensor_is_larger_than_the_limit(monkeypatch):
    limit = 10 * KEYS
    monkeypatch.setattr(attention, "MAX_SCORES", limit)
    specs = [tf.TensorSpec((2, n, 3, 8)) for n in (QUERIES, KEYS, KEYS)]
    function = tf.function(attention.dot_product_attention, autograph=False).get_concrete_function(*specs)
    loops = [op for op in function.graph.get_operations() if op.type in ("While", "StatelessWhile")]
    assert len(loops) == 1 and loops[0].get_attr("parallel_iterations") <= 10
    bodies = [f for f in function.graph._functions.values() if "body" in f.name.decode()]
    softmaxes = [op for body in bodies for op in body.graph.get_operations() if op.type == "Softmax"]
    assert len(softmaxes) == 1 and math.prod(softmaxes[0].outputs[0].shape) <= limit


@pytest.mark.parametrize(
    "policy, expected",
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("mixed_bfloat16", "float32"), ("mixed_float16", "float32")],
)
def test_softmax_is_float32_inside_in_half_precision(policy, expected, monkeypatch):
    seen, softmax = [], keras.ops.softmax
    monkeypatch.setattr(attention.ops, "softmax", lambda x, axis: (seen.append(x.dtype), softmax(x, axis=axis))[1])
    layer = attention.Attention(24, 3, dtype=policy)
    layer(tf.zeros((2, QUERIES, 24)))
    assert seen == [expected]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_in_half_precision(dtype):
    given = tensors()
    halves = [keras.ops.convert_to_tensor(x, dtype) for x in given]
    for softmax_dtype in ("float32", dtype):
        drawn = attention.dot_product_attention(*halves, softmax_dtype=softmax_dtype)
        assert drawn.dtype == dtype
        np.testing.assert_allclose(tf.cast(drawn, "float32"), plain_attention(*given), rtol=0, atol=0.05)


# === The autoencoder in bands ===


@pytest.fixture(scope="module")
def autoencoder():
    """(ImageEncoder, Decoder), narrow, with random weights, norms and biases included."""
    keras.utils.set_random_seed(0)
    sizes = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    models = ImageEncoder(**sizes), Decoder(**sizes)
    for variable in (variable for model in models for variable in model.variables if len(variable.shape) == 1):
        variable.assign_add(0.1 * RANDOM.standard_normal(variable.shape))
    return models


@pytest.mark.parametrize("band", [1, 700, 3000])
@pytest.mark.parametrize("shape", [(16, 24), (33, 9), (1, 40)])
def test_bands_equal_the_whole(autoencoder, band, shape, monkeypatch):
    monkeypatch.setattr(tiling, "BAND", band)
    encoder, decoder = autoencoder
    latent = RANDOM.standard_normal((1, *shape, 4)).astype("float32")
    whole = np.asarray(decoder(latent))
    np.testing.assert_allclose(tiling.decode(decoder, latent), whole, rtol=0, atol=2e-5)
    np.testing.assert_allclose(tiling.encode(encoder, whole), encoder(whole), rtol=0, atol=2e-5)


def test_bands_of_odd_pictures(autoencoder, monkeypatch):
    monkeypatch.setattr(tiling, "BAND", 300)
    image = RANDOM.uniform(-1, 1, (1, 75, 43, 3)).astype("float32")
    np.testing.assert_allclose(tiling.encode(autoencoder[0], image), autoencoder[0](image), rtol=0, atol=2e-5)


def test_one_large_activation_is_held_at_a_time(autoencoder, monkeypatch):
    """Beside the bands in work: the widest activation of the last level, or what it is made from."""
    monkeypatch.setattr(tiling, "BAND", 2**10)
    most, stored = [], weakref.WeakSet()
    create, read = tiling._Stored.__init__, tiling._Stored.read

    def held():
        return sum(band.nbytes for one in stored for band in one.bands if band is not None)

    def counted(self, bands):
        create(self, bands)
        stored.add(self)

    def watched(self, *rows):
        most.append(held())
        return read(self, *rows)

    monkeypatch.setattr(tiling._Stored, "__init__", counted)
    monkeypatch.setattr(tiling._Stored, "read", watched)
    tiling.decode(autoencoder[1], np.zeros((1, 64, 32, 4), "float32"))
    assert max(most) <= 4 * 256 * 128 * 8 * 1.3  # 8 channels of the picture's size in float32


def test_tiled_pictures_at_1024_by_1024():
    """The embedded decoder on four large emoji: more than 40 dB, and no seam, as the pixels are the same."""
    sd, tiled = (StableDiffusion.from_preset("emoji", vae_tiling=tile) for tile in (False, True))
    small = sd.text_to_image(["red apple", "rocket", "dog", "pizza"], num_steps=8, seed=1, progress=False)
    large = np.stack([np.asarray(Image.fromarray(x).resize((512, 512), Image.Resampling.LANCZOS)) for x in small])
    large = np.concatenate(np.concatenate(large.reshape(2, 2, 512, 512, 3), axis=1), axis=1)
    image = large[None] / np.float32(127.5) - 1
    latent = sd.encode(image)
    np.testing.assert_allclose(tiled.encode(image), latent, rtol=0, atol=1e-4)
    expected, drawn = (x.decode(latent).astype(int) for x in (sd, tiled))
    assert drawn.shape == (1, 1024, 1024, 3)
    error = np.mean((drawn - expected) ** 2)
    assert error == 0 or 10 * math.log10(255**2 / error) >= 40
    assert np.abs(drawn - expected).max() <= 1


# === Arguments of the pipeline ===


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def draw(sd, **kwargs):
    return sd.text_to_image("an apple", num_steps=2, seed=2, progress=False, **kwargs)


@pytest.mark.parametrize("option", ["two_pass_guidance", "vae_slicing", "vae_tiling", "low_memory"])
def test_every_option_draws_the_same(sd, tiny, option, monkeypatch):
    monkeypatch.setattr(tiling, "BAND", 500)
    other = StableDiffusion.from_preset(tiny, **{option: True})
    expected = draw(sd, batch_size=2)
    assert close(draw(other, batch_size=2), expected) == 1.0
    pictures = [m.image_to_image(expected[0], "a pear", 0.5, num_steps=2, seed=1, progress=False) for m in (sd, other)]
    assert close(*pictures) == 1.0


@pytest.mark.parametrize(
    "options, whole, expected",
    [
        ({}, 2**20, ["2 whole"]),
        ({}, 2 * 64 * 64 - 1, ["1 whole", "1 whole"]),
        ({}, 64 * 64 - 1, ["1 tiled", "1 tiled"]),
        ({"vae_slicing": True}, 2**20, ["1 whole", "1 whole"]),
        ({"vae_slicing": False}, 2 * 64 * 64 - 1, ["2 whole"]),
        ({"vae_tiling": True}, 2**20, ["1 tiled", "1 tiled"]),
        ({"vae_tiling": False, "vae_slicing": False}, 1, ["2 whole"]),
        ({"low_memory": True}, 2**20, ["1 tiled", "1 tiled"]),
    ],
)
def test_when_the_autoencoder_works_in_pieces(sd, tiny, options, whole, expected, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "WHOLE", whole)
    monkeypatch.setattr(tiling, "BAND", 64 * 64 - 1)
    other, calls = StableDiffusion.from_preset(tiny, **options), []
    other.decoder = sd.decoder
    run = sd.decoder.predict_on_batch
    monkeypatch.setattr(sd.decoder, "predict_on_batch", lambda x: (calls.append(f"{len(x)} whole"), run(x))[1])
    monkeypatch.setattr(tiling, "decode", lambda model, x: (calls.append(f"{len(x)} tiled"), run(x))[1])
    assert other.decode(np.zeros((2, 8, 8, 4), "float32")).shape == (2, 64, 64, 3)
    assert calls == expected


def test_small_pictures_are_never_tiled(tiny, monkeypatch):
    monkeypatch.setattr(tiling, "decode", None)
    draw(StableDiffusion.from_preset(tiny, vae_tiling=True))


def test_low_memory_holds_one_model_at_a_time(tiny, monkeypatch):
    sd, read = StableDiffusion.from_preset(tiny, low_memory=True), []
    part = StableDiffusion._part

    def watched(self, name):
        model = part(self, name)
        assert all(other() is None for _, other in read), "a model is still held"
        read.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(StableDiffusion, "_part", watched)
    picture = draw(sd)[0]
    assert [name for name, _ in read] == ["text_encoder", "diffusion_model", "decoder"]
    read.clear()
    sd.inpaint(picture, picture[..., 0] > 0, "an apple", num_steps=2, progress=False)
    assert [name for name, _ in read] == ["image_encoder", "text_encoder", "diffusion_model", "decoder"]


@pytest.mark.parametrize("keep", [False, True])
def test_models_that_are_read_ahead(sd, tiny, keep, monkeypatch):
    ahead, threads = StableDiffusion.from_preset(tiny), []
    for name in ("text_encoder", "diffusion_model", "decoder"):
        read = getattr(ahead.checkpoint, name)

        def watched(dtype, name=name, read=read):
            threads.append((name, threading.current_thread() is threading.main_thread()))
            return read(dtype)

        object.__setattr__(ahead.checkpoint, name, watched)  # a frozen dataclass
    ahead.read_ahead("diffusion_model", "decoder", keep=keep)
    assert close(draw(ahead), draw(sd)) == 1.0
    assert sorted(threads) == [("decoder", False), ("diffusion_model", False), ("text_encoder", True)]
    held = {"text_encoder", "diffusion_model", "decoder"} & vars(ahead).keys()
    assert held == ({"text_encoder", "diffusion_model", "decoder"} if keep else {"decoder"})
    assert close(draw(ahead), draw(sd)) == 1.0  # what is gone is read again


def test_weights_go_with_their_model(tiny):
    sd, handles = StableDiffusion.from_preset(tiny), []
    sd.read_ahead("diffusion_model", keep=False)
    draw(sd, callback=lambda *_: handles.append(weakref.ref(sd.diffusion_model.variables[3].value.handle)))
    assert all(handle() is None for handle in handles), "a graph that nobody runs any more holds the weights"


def test_what_cannot_be_read_ahead_is_said_where_it_is_used(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    sd = StableDiffusion.from_preset(tmp_path / "broken")
    sd.read_ahead("diffusion_model", "decoder")
    assert sd.diffusion_model.variables
    with pytest.raises(ValueError, match="is damaged"):
        draw(sd)


def test_low_memory_keeps_what_it_cannot_read_again(sd, tiny, tmp_path):
    other = StableDiffusion.from_preset(tiny, low_memory=True)
    other.decoder = sd.decoder
    draw(other)
    assert other.decoder is sd.decoder and "text_encoder" not in vars(other)

    trained = StableDiffusion.from_preset(tiny)
    trained.add_lora(rank=2, seed=1)
    for variable in trained.diffusion_model.trainable_variables:
        variable.assign(0.3 * RANDOM.standard_normal(variable.shape))
    trained.save_lora(tmp_path / "a.safetensors")
    for model in (trained, other):
        model.load_lora(tmp_path / "a.safetensors") if model is other else model.fuse_lora()
    assert close(draw(other), draw(trained)) == 1.0
    assert close(draw(other), draw(sd)) < 1.0
    assert close(draw(other), draw(trained)) == 1.0


def test_sizes_are_known_before_a_model_is_read(tiny):
    for sd in (StableDiffusion.from_preset(tiny), StableDiffusion.from_preset("emoji")):
        assert sd.latent_shape(64, 72) == (8, 9, 4) and sd.factor == 8
        sd._check_channels(4)
        with pytest.raises(ValueError, match="takes 4 channels"):
            sd._check_channels(9)
        assert not {"decoder", "diffusion_model", "image_encoder", "text_encoder"} & vars(sd).keys()
