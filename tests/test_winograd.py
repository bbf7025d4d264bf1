"""3×3 convolutions by fewer products over the channels: the same numbers, taken where they are faster."""

import diffusers
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

from keras_sd import StableDiffusion
from keras_sd.layers import timestep_embedding, winograd
from keras_sd.layers.conv import Conv3x3
from keras_sd.weights.int8 import quantize

WAYS = winograd.by_rows, winograd.by_squares


@pytest.fixture
def everywhere(monkeypatch):
    """Whatever the processor; by rows at 64 pixels and more, below that by squares."""
    monkeypatch.setattr(winograd, "_multiplies_slowly", lambda dtype: True)
    for name, value in (("MIN_CHANNELS", 0), ("MANY_PIXELS", 64), ("FEW_PIXELS", 0)):
        monkeypatch.setattr(winograd, name, value)


@pytest.fixture
def calls(monkeypatch):
    """The functions' names, as they are called."""
    made = []
    for way in WAYS:
        monkeypatch.setattr(winograd, way.__name__, lambda *args, way=way: made.append(way.__name__) or way(*args))
    return made


def random_layer(dtype="float32", **options):
    """A `Conv3x3` from 8 to 5 channels, and its input, of a batch of 3."""
    layer, random = Conv3x3(5, dtype=dtype, **options), np.random.default_rng(0)
    layer.build((None, None, None, 8))
    layer.set_weights([random.standard_normal((3, 3, 8, 5)) / 6, random.standard_normal(5)])
    return layer, lambda *size: random.standard_normal((3, *size, 8)).astype("float32")


# === The functions ===


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (8, 6), (5, 16), (1, 9), (18, 3)])
def test_it_is_the_convolution(by, size):
    random = np.random.default_rng(0)
    x, kernel, bias = (random.standard_normal(shape) for shape in ((3, *size, 8), (3, 3, 8, 5), (5,)))
    expected = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel.transpose(3, 2, 0, 1)), torch.tensor(bias), padding=1
    ).permute(0, 2, 3, 1)
    x, kernel, bias = (tf.constant(each, "float32") for each in (x, kernel, bias))
    np.testing.assert_allclose(by(x, kernel, bias), expected, rtol=0, atol=5e-5)
    unknown = tf.function(lambda x: by(x, kernel, bias), [tf.TensorSpec((None, None, None, 8))], autograph=False)
    np.testing.assert_allclose(unknown(x), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_round(dtype, by):
    """By the size of the sums that are rounded: 1 % in bfloat16."""
    layer, picture = random_layer(dtype)
    x = tf.cast(picture(16, 16), dtype)
    expected = np.asarray(layer(x), "float32")
    ours = by(x, *(tf.cast(each.value, dtype) for each in layer.weights))
    assert ours.dtype == dtype
    assert np.linalg.norm(np.asarray(ours, "float32") - expected) < 0.015 * np.linalg.norm(expected)


# === Where they are taken ===

SD_V1 = [  # of the U-Net with guidance, then of the decoder, at 512×512; and of pictures whose size only the call tells
    ((2, 64, 64), (320, 320), "by_rows"),
    ((2, 64, 64), (4, 320), None),
    ((2, 64, 64), (320, 4), None),
    ((2, 32, 32), (1920, 640), "by_rows"),
    ((2, 16, 16), (2560, 1280), "by_squares"),
    ((None, 16, 16), (1280, 1280), "by_squares"),
    ((2, 12, 12), (1280, 1280), "by_squares"),
    ((1, 12, 12), (1280, 1280), None),
    ((2, 8, 8), (1280, 1280), None),
    ((1, 128, 128), (512, 512), "by_rows"),
    ((1, 512, 512), (128, 128), None),
    ((2, None, None), (320, 320), None),
]


@pytest.mark.parametrize(("pixels", "channels", "name"), SD_V1)
def test_which_convolutions_are_faster_so(pixels, channels, name, monkeypatch):
    for slowly in (True, False):
        monkeypatch.setattr(winograd, "_multiplies_slowly", lambda dtype, slowly=slowly: slowly)
        by = winograd.faster(pixels, channels, "bfloat16")
        assert by is (getattr(winograd, name) if name and slowly else None)


def test_processors(monkeypatch):
    slowly = winograd._multiplies_slowly.__wrapped__
    monkeypatch.setattr("pathlib.Path.exists", lambda path: str(path) == "/proc/cpuinfo")
    for flags, expected in (("avx512_bf16", True), ("avx512_bf16 amx_bf16 amx_tile", False)):
        monkeypatch.setattr("pathlib.Path.read_text", lambda path, flags=flags: f"flags\t: fpu {flags} sse")
        assert slowly("bfloat16") == expected and slowly("float32")
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    assert slowly("bfloat16")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [kind])
    assert not slowly("float32") and not slowly("bfloat16")


def test_only_predictions_on_tensorflow_take_them(everywhere, calls, monkeypatch):
    layer, picture = random_layer()
    for side, name in ((8, "by_rows"), (7, "by_squares")):
        x = picture(side, side)
        expected = np.asarray(layer(x))
        assert np.array_equal(expected, layer(x, training=True)) and not calls
        np.testing.assert_allclose(layer(x, training=False), expected, rtol=0, atol=1e-5)
        assert calls.pop() == name and not calls
    halving = [random_layer(strides=2)[0], random_layer(padding="valid")[0]]
    for other in halving:
        np.testing.assert_allclose(other(x, training=False), other(x), rtol=0, atol=1e-5)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert np.array_equal(layer(x, training=False), expected) and not calls


def test_kernels_in_int8_and_with_lora_factors(everywhere, calls, v2_like):
    """Are transformed as what they stand for."""
    model = StableDiffusion.from_preset(v2_like).diffusion_model
    quantize(model)
    block = next(layer for layer in model._flatten_layers() if layer.name == "down_blocks.0.resnets.0")
    adapted, picture = random_layer()
    adapted.enable_lora(2)
    adapted.lora_kernel_b.assign(np.random.default_rng(1).standard_normal(adapted.lora_kernel_b.shape))
    shape = (2, 8, 8, block.conv1.kernel.shape[2])
    hidden = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for layer, x in ((block.conv1, hidden), (adapted, picture(8, 8))):
        expected = np.asarray(layer(x))
        np.testing.assert_allclose(layer(x, training=False), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert calls == ["by_rows"] * 2


# === Models ===


def test_diffusers_predicts_alike(everywhere, calls, v2_like):
    """Sizes that are odd on a level, too."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(v2_like, subfolder="unet")
    model, random = StableDiffusion.from_preset(v2_like).diffusion_model, np.random.default_rng(0)
    for height, width in ((8, 8), (12, 20)):
        latent = random.standard_normal((2, height, width, 4)).astype("float32")
        context = random.standard_normal((2, 77, theirs.config.cross_attention_dim)).astype("float32")
        time = np.array(timestep_embedding(np.array([7.0, 981.0]), theirs.config.block_out_channels[0]))
        ours = model({"latent": latent, "timestep_embedding": time, "context": context}, training=False)
        with torch.no_grad():
            expected = theirs(
                torch.tensor(latent.transpose(0, 3, 1, 2)),
                torch.tensor([7, 981]),
                torch.tensor(context),
            ).sample
        np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    assert {*calls} == {"by_rows", "by_squares"}


def test_bfloat16_predicts_nearly_as_well(everywhere, v2_like, monkeypatch):
    """The network rounds in many places: that these round more makes its error at most a third larger."""
    random, outputs = np.random.default_rng(0), []
    shapes = {"latent": (2, 16, 16, 4), "timestep_embedding": (2, 64), "context": (2, 77, 128)}
    inputs = {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    for dtype in ("bfloat16", "bfloat16", "float32"):
        model = StableDiffusion.from_preset(v2_like, dtype=dtype).diffusion_model
        outputs.append(np.asarray(model(inputs, training=False), "float32"))
        monkeypatch.setattr(winograd, "faster", lambda *_: None)
    fast, plain, exact = outputs
    assert np.linalg.norm(fast - plain) > 0
    assert np.linalg.norm(fast - exact) < 4 / 3 * np.linalg.norm(plain - exact)


def test_pictures(everywhere, calls, v2_like, monkeypatch):
    pictures = []
    for _ in range(3):
        sd = StableDiffusion.from_preset(v2_like)
        drawn = sd.text_to_image("apple", num_steps=2, seed=3, height=64, width=96, progress=False)
        pictures.append(drawn.astype(int))
        if len(pictures) == 2:
            monkeypatch.setattr(winograd, "faster", lambda *_: None)
    assert calls and np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0] - pictures[2]).max() <= 1
