"""Conversion: round trips bit for bit, files that diffusers and keras-cv open, targets whole or not at all."""

import json
import os
import pathlib
import warnings

import diffusers
import keras_cv
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from keras_sd import Decoder, StableDiffusion
from keras_sd.__main__ import main
from keras_sd.convert import check_target, format_of, write_checkpoint
from keras_sd.weights.keras_cv import write_keras_cv

ROOTS = "model.diffusion_model.", "first_stage_model."


def weights(folder):
    files = pathlib.Path(folder).rglob("*.safetensors")
    return {f"{file.parent.name}.{key}": array for file in files for key, array in load_file(file).items()}


def configs(folder):
    files = [file for name in ("text_encoder", "unet", "vae", "scheduler") for file in (folder / name).glob("*.json")]
    return {
        str(file.relative_to(folder)): json.loads(file.read_text()) for file in [*files, folder / "model_index.json"]
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.dtype == second[key].dtype and array.tobytes() == second[key].tobytes(), key


def convert(source, target, *flags):
    tokenizer = ["--tokenizer", str(convert.tokenizer)]
    assert main(["convert", str(source), str(target), *tokenizer, *flags]) == 0


@pytest.mark.parametrize(
    "name, dtype", [("tiny", None), ("tiny", "float16"), ("narrow_v1", None), ("v2_like", "float16")]
)
def test_round_trips_are_bit_exact(name, dtype, request, tmp_path):
    """folder → single file → h5 or folder → folder; what the formats have no place for stays, too."""
    source = request.getfixturevalue(name)
    convert.tokenizer = source / "tokenizer"
    flags = ["--dtype", dtype] if dtype else []
    convert(source, tmp_path / "start", *flags)
    # KerasCV has no model of two levels.
    chain = ["a.safetensors", "a", "b.safetensors", "b"] if name == "tiny" else ["a.safetensors", "b.h5", "c"]
    before = tmp_path / "start"
    for target in chain:
        convert(before, tmp_path / target, *flags)
        before = tmp_path / target
    assert_same(weights(before), weights(tmp_path / "start"))
    assert configs(before) == configs(tmp_path / "start")
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".")]
    sd, original = StableDiffusion.from_preset(before), StableDiffusion.from_preset(tmp_path / "start")
    assert sd.image_size == original.image_size and sd.scheduler == original.scheduler


def test_values_are_those_of_the_peers_file(narrow_v1, tmp_path):
    convert.tokenizer = narrow_v1 / "tokenizer"
    convert(narrow_v1, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a")
    ours, theirs = weights(tmp_path / "a"), weights(narrow_v1)
    before = (
        "text_encoder."
        if any(key.startswith("text_encoder.text_model.") for key in theirs)
        else "text_encoder.text_model."
    )
    theirs = {key.replace("text_encoder.", before): array for key, array in theirs.items()}
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["narrow_v1", "v2_like"])
def test_diffusers_opens_the_single_file(name, request, tmp_path):
    """`from_single_file` with the folder's configs has the weights of `from_pretrained` and draws the same picture."""
    source = request.getfixturevalue(name)
    convert.tokenizer = source / "tokenizer"
    convert(source, tmp_path / "model.safetensors")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(source), local_files_only=True, safety_checker=None
    )
    expected = diffusers.StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    for component in ("text_encoder", "unet", "vae"):
        arrays = [getattr(peer, component).state_dict() for peer in (expected, theirs)]
        assert arrays[0].keys() == arrays[1].keys()
        assert all(torch.equal(array, arrays[1][key]) for key, array in arrays[0].items())
    if name == "narrow_v1":
        drawn = []
        for peer in (expected, theirs):
            peer.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(1)
            images = peer("an apple", num_inference_steps=2, generator=generator, output_type="np").images
            drawn.append(images)
        np.testing.assert_allclose(*drawn, atol=1e-5)  # torch's sums depend on where in memory weights begin


def test_names_of_the_single_files(narrow_v1, v2_like, tmp_path):
    for source, root in ((narrow_v1, "cond_stage_model.transformer.text_model."), (v2_like, "cond_stage_model.model.")):
        convert.tokenizer = source / "tokenizer"
        convert(source, tmp_path / f"{source.name}.safetensors")
        keys, roots = load_file(tmp_path / f"{source.name}.safetensors").keys(), (*ROOTS, root)
        assert all(key.startswith(roots) for key in keys)
        assert all(any(key.startswith(one) for key in keys) for one in roots)


def test_an_open_clip_file_of_an_epsilon_model_says_so(v2_like, tmp_path):
    """v2 predicts v, v2-base ε; readers tell them apart by the step that v2-base was saved at."""
    sd = StableDiffusion.from_preset(v2_like)
    scheduler = sd.checkpoint.scheduler() | {"prediction_type": "epsilon"}
    sd.checkpoint = type(sd.checkpoint)(**{**vars(sd.checkpoint), "scheduler": lambda: scheduler})
    with warnings.catch_warnings(record=True):
        write_checkpoint(sd, tmp_path / "base.safetensors")
    assert load_file(tmp_path / "base.safetensors")["global_step"] == 875000
    opened = StableDiffusion.from_preset(tmp_path / "base.safetensors", tokenizer=v2_like / "tokenizer")
    assert opened.scheduler[0].prediction_type == "epsilon"


def test_keras_cv_opens_the_files(narrow_v1, v2_like, tmp_path):
    """Its names for v1 and v2; the decoder and the image encoder are small enough for keras-cv's own, of full width."""
    for source, names in (
        (narrow_v1, ["kcv_encoder.h5", "kcv_diffusion_model.h5"]),
        (v2_like, ["text_encoder_v2_1.h5", "diffusion_model_v2_1.h5"]),
    ):
        with pytest.warns(UserWarning, match="KerasCV itself opens the widths of SD v1 and v2 alone"):
            write_checkpoint(StableDiffusion.from_preset(source), tmp_path / source.name, "keras_cv")
        assert sorted(os.listdir(tmp_path / source.name)) == sorted([*names, "kcv_decoder.h5", "vae_encoder.h5"])
    ours = Decoder()
    write_keras_cv(ours, tmp_path / "kcv_decoder.h5", "float16")
    peer = keras_cv.models.stable_diffusion.Decoder(64, 64, download_weights=False)
    peer.load_weights(tmp_path / "kcv_decoder.h5")
    for a, b in zip(sorted(map(_digest, ours.weights)), sorted(map(_digest, peer.weights)), strict=True):
        assert a == b


def _digest(variable):
    array = np.squeeze(np.asarray(variable, "float32").astype("float16"))
    return array.size, float(array.astype("float64").sum()), array.tobytes()[:8]


def test_what_stays_behind_is_said(tiny, tmp_path, capsys):
    assert main(["convert", str(tiny), str(tmp_path / "a.safetensors")]) == 0
    assert "The format holds no tokenizer, and this model's is its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "target, flags, error",
    [
        ("a.ckpt", [], "written as .safetensors, never as .ckpt"),
        ("a.safetensors", ["--format", "diffusers"], "a single file ends in .safetensors"),
        ("a", ["--format", "single_file"], "a single file ends in .safetensors"),
        ("a.h5", [], "KerasCV has no model for it"),
        (".", [], "exists already"),
        ("file/a", [], "Cannot write"),
    ],
)
def test_bad_targets(target, flags, error, tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["convert", str(tiny), str(tmp_path / target), *flags]) == 1
    assert error in capsys.readouterr().err.splitlines()[-1] and os.listdir(tmp_path) == ["file"]


def test_formats_are_guessed():
    endings = {"a": "diffusers", "a.b": "diffusers", "a.safetensors": "single_file", "x/a.h5": "keras_cv"}
    assert {name: format_of(name) for name in endings} == endings
    with pytest.raises(ValueError, match="format must be one of diffusers, single_file, keras_cv; got 'onnx'"):
        check_target("a", "onnx")


def test_an_upscaler_has_no_single_file(tmp_path, tmp_path_factory):
    from checkpoints import write_checkpoint as write_peer

    sd = StableDiffusion.from_preset(write_peer("upscaler", tmp_path_factory.mktemp("upscaler")))
    with warnings.catch_warnings(record=True), pytest.raises(ValueError, match="class_embedding.weight has no place"):
        write_checkpoint(sd, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []
