"""`winograd=True`: the same convolutions by fewer products over the channels, the same pictures, and one error for what
cannot be done with transformed kernels."""

import diffusers
import numpy as np
import pytest
import tensorflow as tf
import torch
from test_int8 import needing_kernels

from export.__main__ import main
from keras_sd import StableDiffusion
from keras_sd.checkpoint import open_checkpoint
from keras_sd.convert import write_checkpoint
from keras_sd.layers import timestep_embedding
from keras_sd.layers.conv import Conv3x3
from keras_sd.layers.kernel_forms import layers_of
from keras_sd.layers.winograd import RowsKernel, SquaresKernel, WinogradKernel, transform
from keras_sd.weights.diffusers_folder import build_diffusion_model, read_component
from keras_sd.weights.int8 import quantize

FORMS = RowsKernel, SquaresKernel


def resnets(blocks, count):
    return [f"{block}.resnets.{i}/conv{j}" for block in blocks for i in range(count) for j in (1, 2)]


BY_ROWS = resnets(["down_blocks.0", "down_blocks.1"], 2) + resnets(["up_blocks.2", "up_blocks.3"], 3)
BY_SQUARES = resnets(["down_blocks.2"], 2) + resnets(["up_blocks.1"], 3)
OPTIONS = {"num_steps": 2, "seed": 3, "height": 64, "width": 96, "progress": False}


@pytest.fixture
def sd(v2_like):
    return StableDiffusion.from_preset(v2_like, winograd=True)


def random_layer(dtype="float32"):
    """A `Conv3x3` from 8 to 5 channels, and its input, of a batch of 3."""
    layer, random = Conv3x3(5, dtype=dtype), np.random.default_rng(0)
    layer.build((None, None, None, 8))
    layer.set_weights([random.standard_normal((3, 3, 8, 5)) / 6, random.standard_normal(5)])
    return layer, lambda *size: random.standard_normal((3, *size, 8)).astype("float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (8, 6), (5, 16), (1, 9), (18, 3)])
def test_it_is_the_convolution(form, size):
    layer, picture = random_layer()
    x = picture(*size)
    expected = np.asarray(layer(x))
    transform(layer, form)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5)
    unknown = tf.function(layer, [tf.TensorSpec((None, None, None, 8))], autograph=False)
    np.testing.assert_allclose(unknown(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_torch_convolves_alike(form):
    random = np.random.default_rng(0)
    x, kernel = random.standard_normal((2, 12, 10, 16)), random.standard_normal((3, 3, 16, 24))
    expected = torch.nn.functional.conv2d(
        *map(torch.tensor, (x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1))), padding=1
    )
    bias = random.standard_normal(24)
    ours = form.convolve(tf.constant(x), form.transformed(tf.constant(kernel)), tf.constant(bias))
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1) + bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_round(dtype, form):
    """By the size of the sums that are rounded: 1 % in bfloat16."""
    layer, picture = random_layer(dtype)
    x = picture(16, 16)
    expected = np.asarray(layer(x), "float32")
    transform(layer, form)
    ours = np.asarray(layer(x), "float32")
    assert layer._kernel.dtype == dtype
    assert np.linalg.norm(ours - expected) < 0.015 * np.linalg.norm(expected)


def test_which_kernels_are_transformed(sd, v2_like):
    model, plain = sd.diffusion_model, StableDiffusion.from_preset(v2_like).diffusion_model
    layers = layers_of(model, WinogradKernel)
    for form, names in ((RowsKernel, BY_ROWS), (SquaresKernel, BY_SQUARES)):
        assert {layer._kernel.path for layer in layers_of(model, form)} == {f"{name}/kernel" for name in names}
    assert not any(layer._kernel.trainable for layer in layers)
    assert {v.path for v in model.variables} == {v.path for v in plain.variables}
    held = model.count_params()
    model.use_winograd()  # again changes nothing
    assert len(layers_of(model)) == len(layers) and model.count_params() == held


def test_files_of_every_format_are_read_into_them(v2_like, tmp_path):
    """To the same numbers as those of a model that is transformed after it was read."""
    plain = StableDiffusion.from_preset(v2_like)
    for name, format in (("folder", "diffusers"), ("x.safetensors", "single_file"), ("kcv", "keras_cv")):
        write_checkpoint(plain, tmp_path / name, format)
    plain.diffusion_model.use_winograd()
    expected = {v.path: np.asarray(v) for v in plain.diffusion_model.variables}
    for name in ("folder", "x.safetensors", "kcv"):
        model = open_checkpoint(tmp_path / name).diffusion_model(winograd=True)
        assert {v.path for v in model.variables} == expected.keys()
        for variable in model.variables:
            np.testing.assert_array_equal(variable, expected[variable.path])


def test_weights_of_another_shape_are_named(v2_like):
    config, arrays = read_component(v2_like, "unet")
    arrays["up_blocks.1.resnets.0.conv1.weight"] = np.zeros((2, 2, 3, 3), "float32")
    with pytest.raises(
        ValueError, match=r"up_blocks.1.resnets.0.conv1.weight has shape \(2, 2, 3, 3\); .* needs \(\d+, \d+, 3, 3\)"
    ):
        build_diffusion_model(config, arrays, "here", winograd=True)


def test_diffusers_predicts_alike(sd, v2_like):
    """Sizes that are odd on a level, too."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(v2_like, subfolder="unet")
    random = np.random.default_rng(0)
    for height, width in ((8, 8), (12, 20)):
        latent = random.standard_normal((2, height, width, 4)).astype("float32")
        context = random.standard_normal((2, 77, theirs.config.cross_attention_dim)).astype("float32")
        time = np.array(timestep_embedding(np.array([7.0, 981.0]), theirs.config.block_out_channels[0]))
        ours = sd.diffusion_model({"latent": latent, "timestep_embedding": time, "context": context}, training=False)
        with torch.no_grad():
            expected = theirs(
                torch.tensor(latent.transpose(0, 3, 1, 2)),
                torch.tensor([7, 981]),
                torch.tensor(context),
            ).sample
        np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_bfloat16_predicts_nearly_as_well(v2_like):
    """The network rounds in many places: that these round more makes its error at most a third larger."""
    random, outputs = np.random.default_rng(0), {}
    shapes = {"latent": (2, 16, 16, 4), "timestep_embedding": (2, 64), "context": (2, 77, 128)}
    inputs = {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "winograd": True}):
        model = StableDiffusion.from_preset(v2_like, **options).diffusion_model
        outputs[len(outputs)] = np.asarray(model(inputs, training=False), "float32")
    exact, plain, fast = outputs.values()
    assert np.linalg.norm(fast - exact) < 4 / 3 * np.linalg.norm(plain - exact)


def test_pictures(v2_like):
    plain, fast = (
        StableDiffusion.from_preset(v2_like, winograd=winograd).text_to_image("apple", **OPTIONS).astype(int)
        for winograd in (False, True)
    )
    assert np.abs(plain - fast).max() <= 1


def test_exports_take_it(v2_like, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "export.saved_model.export_saved_models", lambda *args, **kwargs: given.append((args, kwargs)) or {}
    )
    main(["--preset", str(v2_like), "--out", str(tmp_path), "--winograd"])
    (((sd, _), options),) = given
    assert len(layers_of(sd.diffusion_model, WinogradKernel)) == len(BY_ROWS + BY_SQUARES) and "winograd" not in options


def test_what_needs_kernels_says_so(sd, tmp_path):
    unet = sd.diffusion_model
    for needs in (*needing_kernels(sd, tmp_path), sd.quantize, lambda: sd.save_preset(tmp_path / "preset")):
        with pytest.raises(
            ValueError, match=r"needs float weights; those of the diffusion_model are transformed \(win"
        ):
            needs()
    with pytest.raises(ValueError, match="no place for the transformed"):
        unet.save_weights(tmp_path / "x.weights.h5")
    assert not (tmp_path / "preset").exists() and not (tmp_path / "kcv_diffusion_model.h5").exists()


def test_what_it_does_not_go_with(v2_like, monkeypatch):
    with pytest.raises(ValueError, match="without low_memory, .* got tensorflow, low_memory=True"):
        StableDiffusion(winograd=True, low_memory=True)
    with pytest.raises(ValueError, match="three levels and more; the diffusion_model has 2"):
        StableDiffusion.from_preset("emoji", winograd=True).diffusion_model  # noqa: B018
    model = StableDiffusion.from_preset(v2_like).diffusion_model
    quantize(model)
    with pytest.raises(ValueError, match="winograd=True needs float weights; those of the diffusion_model are int8"):
        model.use_winograd()
    sd = StableDiffusion.from_preset(v2_like)
    sd.add_lora(rank=2, targets=["up_blocks.3.*conv1"])
    with pytest.raises(ValueError, match="fuse_lora"):
        sd.diffusion_model.use_winograd()
    assert not layers_of(sd.diffusion_model)
    monkeypatch.setattr("keras.backend.backend", lambda: "openvino")
    with pytest.raises(ValueError, match="TensorFlow backend .* got openvino"):
        StableDiffusion(winograd=True)
