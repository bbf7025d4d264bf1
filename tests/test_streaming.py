"""Weights that stay in their file draw what weights in memory draw, and are variables like others where need be."""

import numpy as np
import pytest
import tensorflow as tf

from export.saved_model import export_saved_models
from keras_sd import NoiseScheduler, StableDiffusion
from keras_sd.training.trainer import DiffusionTrainer
from keras_sd.weights import streaming
from keras_sd.weights.assign import to_state_dict


@pytest.fixture(autouse=True)
def every_array(monkeypatch):
    monkeypatch.setattr(streaming, "MIN_BYTES", 0)


@pytest.fixture
def frugal(tiny):
    return StableDiffusion.from_preset(tiny, low_memory=True)


def draw(sd, **kwargs):
    return sd.text_to_image("an apple", num_steps=3, seed=2, progress=False, **kwargs)


def in_file(model):
    return [variable for variable in model.variables if variable._value is None]


@pytest.mark.parametrize("dtype, levels", [("float32", 1), ("bfloat16", 16)])  # TensorFlow fuses other operations
def test_same_pictures(tiny, dtype, levels):
    options = {"dtype": dtype, "vae_tiling": True}
    whole, frugal = (StableDiffusion.from_preset(tiny, **options, low_memory=low) for low in (False, True))
    for arguments in ({}, {"height": 72}, {"unconditional_guidance_scale": 1.0}):
        np.testing.assert_allclose(draw(frugal, **arguments), draw(whole, **arguments).astype(int), rtol=0, atol=levels)


def test_int8_weights_stay_in_their_file(tiny, tmp_path):
    StableDiffusion.from_preset(tiny).save_preset(tmp_path, "int8")
    whole, frugal = (StableDiffusion.from_preset(tmp_path, low_memory=low, vae_tiling=True) for low in (False, True))
    np.testing.assert_allclose(draw(frugal), draw(whole).astype(int), rtol=0, atol=1)


def test_only_the_large_weights_of_the_diffusion_model_stay(frugal, monkeypatch):
    assert not in_file(frugal.text_encoder) and not in_file(frugal.decoder)
    sizes = sorted(4 * np.prod(variable.shape) for variable in frugal.diffusion_model.variables)
    kernels = sum(len(variable.shape) > 1 for variable in frugal.diffusion_model.variables)
    assert len(in_file(frugal.diffusion_model)) == kernels
    del frugal.diffusion_model
    monkeypatch.setattr(streaming, "MIN_BYTES", sizes[-10])
    assert 1 <= len(in_file(frugal.diffusion_model)) <= 10 + sizes.count(sizes[-10])


def test_the_text_encoder_of_whoever_draws_once_stays(tiny):
    whole, once = StableDiffusion.from_preset(tiny), StableDiffusion.from_preset(tiny)
    once.read_ahead("diffusion_model", keep=False)
    kernels = [variable for variable in once.text_encoder.variables if len(variable.shape) > 1]
    assert in_file(once.text_encoder) == kernels
    np.testing.assert_allclose(draw(once), draw(whole).astype(int), rtol=0, atol=1)
    assert not in_file(once.decoder) and "diffusion_model" not in vars(once)


def test_each_weight_is_read_once_in_a_step_after_what_it_is_needed_for(frugal, monkeypatch):
    read = streaming.read_in_graph
    made = []

    def watched(function, shape, dtype):
        tensor = read(function, shape, dtype)
        if not tf.executing_eagerly():
            made.append(next(op for op in tensor.graph.get_operations()[::-1] if op.type == "PyFunc"))
        return tensor

    monkeypatch.setattr(streaming, "read_in_graph", watched)
    draw(frugal, batch_size=2)
    variables = len(in_file(frugal.diffusion_model)) if "diffusion_model" in vars(frugal) else 0
    graphs = {op.graph for op in made}
    for graph in graphs:
        own = [op for op in made if op.graph is graph]
        assert all(op.control_inputs for op in own)
        assert not variables or len(own) == variables


def test_the_values_are_those_of_the_file(sd, frugal):
    expected, found = (to_state_dict(one.diffusion_model) for one in (sd, frugal))
    assert expected.keys() == found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def test_a_value_that_is_assigned_stays(frugal):
    variable = in_file(frugal.diffusion_model)[0]
    variable.assign(np.full(variable.shape, 2.0))
    assert variable._value is not None and np.all(np.asarray(variable) == 2)
    variable.assign(np.full(variable.shape, 3.0))
    assert np.all(np.asarray(variable) == 3)


def test_training_and_export_read_them(frugal, sd, tmp_path):
    model = frugal.diffusion_model
    assert in_file(model)
    DiffusionTrainer(model, NoiseScheduler())
    assert not in_file(model)
    other = StableDiffusion.from_preset(frugal.preset, low_memory=True)
    export_saved_models(other, tmp_path, only=["diffusion_model"])
    assert not in_file(other.diffusion_model)
    np.testing.assert_array_equal(draw(other, sampler="ddim"), draw(other, sampler="ddim"))


def test_xla_does_not_read_files(tiny):
    assert not in_file(StableDiffusion.from_preset(tiny, low_memory=True, jit_compile=True).diffusion_model)
