"""int8 weights: one byte each on disk and in memory, pictures near the float model's, one error for what cannot be."""

import pathlib
import shutil

import diffusers
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file, save_file

from keras_sd import ControlNet, DiffusionModel, StableDiffusion
from keras_sd.__main__ import main
from keras_sd.convert import write_checkpoint
from keras_sd.layers.int8 import Int8Kernel, has_int8, quantize_kernel
from keras_sd.training.trainer import DiffusionTrainer
from keras_sd.weights.assign import kernel_layers, to_state_dict, without_values
from keras_sd.weights.int8 import FLOAT, float_state_dict, int8_state_dict, quantize
from keras_sd.weights.keras_cv import write_keras_cv

UNET = pathlib.Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A preset with int8 weights, written by the command line."""
    folder = tmp_path_factory.mktemp("int8") / "preset"
    assert main(["convert", str(tiny), str(folder), "--dtype", "int8"]) == 0
    return folder


@pytest.fixture
def sd(folder):
    return StableDiffusion.from_preset(folder)


def predict(model, size=8):
    arguments, random = model.arguments, np.random.default_rng(0)
    shapes = {
        "latent": (size, size, arguments["in_channels"]),
        "timestep_embedding": (arguments["block_out_channels"][0],),
        "context": (77, arguments["cross_attention_dim"]),
    }
    model.compile()
    return model.predict_on_batch({k: random.standard_normal((2, *v)).astype("float32") for k, v in shapes.items()})


def relative(value, expected):
    value, expected = (np.asarray(x, "float32") for x in (value, expected))
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(40, 24), (3, 3, 16, 24)])
def test_a_kernel_is_within_half_a_step(shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype("float32")
    kernel[..., 3] = 0
    narrow, scale = quantize_kernel(kernel)
    assert (narrow.dtype, narrow.shape, scale.dtype, scale.shape) == ("int8", shape, "float32", shape[-1:])
    assert np.abs(narrow).max() == 127 and not narrow[..., 3].any()
    # the scale is rounded to bfloat16: the largest number of a channel may be a quarter of a step further away
    assert (np.abs(narrow * scale - kernel) <= 0.76 * scale).all()
    assert (
        np.abs(narrow * scale - kernel)[np.abs(narrow) < 127]
        <= 0.501 * np.broadcast_to(scale, shape)[np.abs(narrow) < 127]
    ).all()
    with pytest.raises(ValueError, match="not finite"):
        quantize_kernel(np.full(shape, np.nan))


def test_the_file(folder, tiny):
    """Every kernel but those at the ends; a quarter of the float32 file."""
    arrays, floats = load_file(folder / UNET), load_file(tiny / UNET)
    model = StableDiffusion.from_preset(tiny).diffusion_model
    narrow = {key.removesuffix(".weight") for key, array in arrays.items() if array.dtype == "int8"}
    assert narrow == {name for name in kernel_layers(model) if not FLOAT.fullmatch(name)}
    assert arrays.keys() == floats.keys() | {f"{name}.weight_scale" for name in narrow}
    assert all(arrays[f"{name}.weight_scale"].dtype == "float32" for name in narrow)
    assert all(np.array_equal(arrays[k], floats[k]) for k in floats if k.removesuffix(".weight") not in narrow)
    assert (folder / UNET).stat().st_size < 0.4 * (tiny / UNET).stat().st_size
    for component in ("text_encoder", "vae"):
        (file,) = (folder / component).glob("*.safetensors")
        assert {array.dtype for array in load_file(file).values()} == {np.dtype("float32")}


def test_the_file_of_sd_v1_is_small_enough():
    """0.86 · 10⁹ parameters, counted without making them."""
    with without_values():
        model = DiffusionModel()
    narrow = [layer for name, layer in kernel_layers(model).items() if not FLOAT.fullmatch(name)]
    kernels, scales = (
        sum(n) for n in zip(*((np.prod(layer._kernel.shape), layer._kernel.shape[-1]) for layer in narrow))
    )
    assert kernels + 4 * scales + 2 * (model.count_params() - kernels) < 0.9e9  # the rest in bfloat16


@pytest.mark.parametrize(
    "name, dtype, bound", [("v2_like", "float32", 0.02), ("tiny", "bfloat16", 0.03), ("tiny", "float16", 0.02)]
)
def test_outputs_are_near_the_float_models(name, dtype, bound, request, tmp_path):
    """Within 2 % of the output of random weights (trained ones: `benchmarks.int8`); kernels stay int8 in memory."""
    sd = StableDiffusion.from_preset(request.getfixturevalue(name), dtype="float32")
    sd.save_preset(tmp_path, np.int8)
    model = StableDiffusion.from_preset(tmp_path, dtype=dtype).diffusion_model
    assert not has_int8(sd.diffusion_model)
    assert relative(predict(model), predict(sd.diffusion_model)) < bound
    layers = [layer for layer in kernel_layers(model).values() if isinstance(layer, Int8Kernel)]
    assert layers and all(layer._kernel.dtype == "int8" and layer.compute_dtype == dtype for layer in layers)


def test_quantizing_in_memory_is_reading_the_file(tiny, sd):
    other = StableDiffusion.from_preset(tiny)
    first = predict(other.diffusion_model)
    other.quantize()
    other.quantize()  # again changes nothing
    for key, array in to_state_dict(other.diffusion_model).items():
        np.testing.assert_array_equal(array, to_state_dict(sd.diffusion_model)[key], key)
    np.testing.assert_array_equal(predict(other.diffusion_model), predict(sd.diffusion_model))
    assert 0 < relative(predict(other.diffusion_model), first) < 0.02


def test_a_file_is_written_again_as_it_is(sd, folder, tmp_path):
    for dtype in (None, "int8"):
        sd.save_preset(tmp_path / str(dtype), dtype)
        ours, before = load_file(tmp_path / str(dtype) / UNET), load_file(folder / UNET)
        assert ours.keys() == before.keys()
        assert all(ours[key].dtype == before[key].dtype and np.array_equal(ours[key], before[key]) for key in before)


def test_the_way_back_to_floats(sd, folder, tmp_path):
    """Folder, single file; diffusers opens the folder. The weights are kernel times scale."""
    assert main(["convert", str(folder), str(tmp_path / "float"), "--dtype", "float32"]) == 0
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    assert main(["convert", str(folder), str(tmp_path / "one.safetensors"), *tokenizer]) == 0
    arrays, narrow = load_file(tmp_path / "float" / UNET), load_file(folder / UNET)
    key = "down_blocks.0.resnets.0.conv1.weight"
    np.testing.assert_array_equal(arrays[key], narrow[key] * narrow[f"{key}_scale"][:, None, None, None])
    state = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "float", subfolder="unet").state_dict()
    assert state.keys() == arrays.keys()
    for path in ("float", "one.safetensors"):
        model = StableDiffusion.from_preset(tmp_path / path, tokenizer=folder / "tokenizer").diffusion_model
        assert not has_int8(model)
        assert relative(predict(model), predict(sd.diffusion_model)) < 1e-5
    # floats of the same scales are narrowed to the same numbers
    again = int8_state_dict(model)
    assert all(np.abs(again[k].astype(int) - narrow[k]).max() <= 1 for k in narrow if narrow[k].dtype == "int8")
    assert float_state_dict(sd.diffusion_model, "float16")[key].dtype == "float16"


def test_pictures(sd, tiny):
    """Near those of the float model; ControlNets steer them."""
    options = {"num_steps": 2, "seed": 3, "progress": False}
    image = sd.text_to_image("apple", **options)
    reference = StableDiffusion.from_preset(tiny).text_to_image("apple", **options)
    assert np.abs(image.astype(int) - reference).mean() < 3
    net = ControlNet.from_diffusion_model(StableDiffusion.from_preset(tiny).diffusion_model)
    assert np.ptp(sd.text_to_image("apple", control=[(net, image[0])], **options)) > 0


def test_kernels_are_widened_one_after_another(sd):
    """In TensorFlow's graph each conversion waits for its layer's input."""
    layer = kernel_layers(sd.diffusion_model)["mid_block.resnets.0.conv1"]
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec((1, 8, 8, layer._kernel.shape[2]))).graph
    (identity,) = (op for op in graph.get_operations() if op.type == "Identity" and op.inputs[0].dtype == tf.int8)
    assert "EnsureShape" in [op.type for op in (*identity.control_inputs, *identity.inputs[0].op.control_inputs)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("mid_block.resnets.0.conv1.weight_scale"), "lacks 'mid_block.resnets.0.conv1.weight_scale'"),
        (lambda a: a.update({"conv_in.weight_scale": np.ones(32, "float32")}), "holds 'conv_in.weight_scale'"),
        (lambda a: a.update({"conv_norm_out.weight": np.ones(32, "int8")}), "conv_norm_out.weight is int8"),
        (
            lambda a: a.update({"mid_block.resnets.0.conv1.weight_scale": np.ones(3, "float32")}),
            r"mid_block.resnets.0.conv1.weight_scale has shape \(3,\)",
        ),
    ],
)
def test_files_that_do_not_fit(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    arrays = load_file(folder / UNET)
    change(arrays)
    save_file(arrays, tmp_path / UNET)
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_preset(tmp_path).diffusion_model  # noqa: B018


def test_what_needs_floats_says_so(sd, tiny, folder, tmp_path, capsys):
    unet = sd.diffusion_model
    for needs in (
        lambda: DiffusionTrainer(unet, sd.scheduler[0]),
        lambda: ControlNet.from_diffusion_model(unet),
        lambda: sd.add_lora(),
        lambda: sd.load_lora(tmp_path / "any.safetensors"),
        lambda: write_keras_cv(unet, tmp_path / "kcv_diffusion_model.h5"),
    ):
        with pytest.raises(ValueError, match="needs float weights; those of the diffusion_model are int8"):
            needs()
    with pytest.raises(ValueError, match="no place for the int8 kernel"):
        unet.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="int8 is for a folder in the diffusers layout; single_file"):
        write_checkpoint(sd, tmp_path / "x.safetensors", dtype="int8")
    other = StableDiffusion.from_preset(tiny)
    other.add_lora(rank=2)
    with pytest.raises(ValueError, match="fuse_lora"):
        other.quantize()
    other.unload_lora()
    other.quantize()
    assert has_int8(other.diffusion_model)


def test_quantize_leaves_nothing_trainable_behind(sd):
    narrow = [layer for layer in kernel_layers(sd.diffusion_model).values() if isinstance(layer, Int8Kernel)]
    assert all(layer._kernel.path.endswith("/kernel") and not layer._kernel.trainable for layer in narrow)
    assert len({v.path for v in sd.diffusion_model.variables}) == len(sd.diffusion_model.variables)
    count = len(sd.diffusion_model.variables)
    quantize(sd.diffusion_model)
    assert len(sd.diffusion_model.variables) == count
