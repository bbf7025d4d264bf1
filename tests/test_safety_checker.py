"""The safety checker against diffusers' own: which pictures it flags, and that they come back black."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from clip_vision import write_image_encoder, write_safety_checker
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd import StableDiffusion
from keras_sd.__main__ import main
from keras_sd.feature_extractor import extract, read_feature_extractor
from keras_sd.models import VisionEncoder
from keras_sd.safety_checker import SafetyChecker
from keras_sd.weights.vision_encoder import build_vision_encoder, read_vision_folder, vision_encoder_arguments

DRAW = {"num_steps": 2, "progress": False}


def pictures(count, height=64, width=64, seed=0):
    """Pictures that differ in more than their noise: two colours, and a gradient between them."""
    random = np.random.default_rng(seed)
    ends = random.uniform(0, 255, (count, 2, 3))
    mix = np.linspace(0, 1, height)[:, None] * np.linspace(0, 1, width)[None, :]
    drawn = ends[:, None, None, 0] * mix[None, :, :, None] + ends[:, None, None, 1] * (1 - mix)[None, :, :, None]
    return np.clip(drawn + random.normal(0, 20, (count, height, width, 3)), 0, 255).astype("uint8")


@pytest.fixture(scope="module")
def checked(tiny, tmp_path_factory):
    """`tiny` with a safety checker that flags about half of all pictures: (folder, checker, feature extractor)."""
    folder = tmp_path_factory.mktemp("checked")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    checker, processor = write_safety_checker(folder, 0.4, 0.25)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    return folder, checker, processor


# === The vision encoder ===


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision_encoder(act, tmp_path):
    peer = write_image_encoder(tmp_path, hidden_act=act)
    config, arrays = read_vision_folder(tmp_path)
    ours = build_vision_encoder(config, arrays, "it")
    image = np.random.default_rng(0).standard_normal((2, 56, 56, 3)).astype("float32")
    with torch.no_grad():
        expected = peer(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).image_embeds.numpy()
    np.testing.assert_allclose(np.asarray(ours(image)), expected, atol=2e-5)
    again = VisionEncoder.from_config(ours.get_config())
    assert [v.shape for v in again.variables] == [v.shape for v in ours.variables]


def test_keys_of_every_age(checked, tmp_path):
    """Published checkers write `vision_model.` twice and hold positions' ids."""
    folder = tmp_path / "safety_checker"
    shutil.copytree(checked[0] / "safety_checker", folder)
    arrays = load_file(folder / "model.safetensors")
    old = {key.replace("vision_model.", "vision_model.vision_model."): array for key, array in arrays.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(old, folder / "model.safetensors")
    embeddings = [SafetyChecker(one).build_encoder() for one in (folder, checked[0])]
    for a, b in zip(*(model.variables for model in embeddings), strict=True):
        np.testing.assert_array_equal(a, b)


def test_published_sizes():
    """The config of the checker of SD v1: ViT-L/14 with a shared width of 768."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = {"projection_dim": 768, "vision_config": {**vision, "patch_size": 14, "image_size": 224}}
    model = VisionEncoder(num_hidden_layers=0)
    arguments = {key: value for key, value in model.arguments.items() if key not in ("name", "dtype")}
    assert vision_encoder_arguments(config) == arguments | {"num_hidden_layers": 24}


# === Preparing pictures ===


@pytest.mark.parametrize("size", [(64, 64), (100, 71), (33, 90), (512, 768)])
def test_feature_extractor(size, checked):
    folder, _, processor = checked
    image = Image.fromarray(pictures(1, *size)[0])
    expected = np.moveaxis(np.asarray(processor(image, return_tensors="np").pixel_values), 1, -1)
    ours = extract([image], read_feature_extractor(folder / "feature_extractor"))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_feature_extractor_config(tmp_path):
    assert read_feature_extractor(tmp_path)["crop_size"] == (224, 224)
    old = {"size": 56, "crop_size": 48, "resample": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert read_feature_extractor(tmp_path) == old | {"crop_size": (48, 48)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 2, "width": 3}}))
    with pytest.raises(ValueError, match="only a shortest edge"):
        read_feature_extractor(tmp_path)


# === Flags ===


def test_flags_are_the_peers(checked):
    folder, peer, processor = checked
    images = pictures(40)
    ours = SafetyChecker(folder)
    embeddings = np.asarray(ours.build_encoder()(ours.prepare(images)))
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    _, expected = peer(clip_input=pixels, images=[np.ones((2, 2, 3)) for _ in images])
    flags = ours.flags(embeddings)
    assert flags.tolist() == expected and 5 < sum(expected) < 35


def test_special_care_lowers_the_thresholds(tmp_path):
    """By 0.01, whichever special concept it is; scores are rounded to three decimals."""
    write_safety_checker(tmp_path)
    checker = SafetyChecker(tmp_path)
    concepts = np.eye(24, dtype="float32")
    checker._concepts = [concepts[:17], np.full(17, 0.6, "float32"), concepts[17:20], np.full(3, 0.5, "float32")]

    def flagged(concept, special=0.0):
        rest = np.sqrt(1 - concept**2 - special**2)
        return checker.flags((concept * concepts[0] + special * concepts[17] + rest * concepts[23])[None]).tolist()

    assert flagged(0.61) == [True] and flagged(0.595) == [False] and flagged(0.6004) == [False]
    assert flagged(0.595, 0.6) == [True] and flagged(0.595, 0.4) == [False]


def test_flagged_pictures_are_black_as_the_peers(checked):
    folder, _, _ = checked
    start = np.random.default_rng(4).standard_normal((6, 8, 8, 4)).astype("float32")
    start *= np.linspace(0.5, 2.5, 6).reshape(6, 1, 1, 1).astype("float32")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.moveaxis(start, -1, 1).copy())
    result = peer(["an apple"] * 6, latents=noise, num_inference_steps=2, output_type="np")
    for options in ({}, {"low_memory": True}):
        sd = StableDiffusion.from_preset(folder, safety_checker=True, **options)
        drawn = sd.text_to_image(["an apple"] * 6, diffusion_noise=start, **DRAW)
        assert sd.flagged == result.nsfw_content_detected
        assert (np.abs(drawn.astype(int) - np.round(result.images * 255)) <= 1).mean() >= 0.999
        assert [not image.any() for image in drawn] == sd.flagged
    assert "safety_encoder" in vars(sd) and "decoder" not in vars(sd)


def test_all_methods_are_checked(checked, tmp_path):
    write_safety_checker(tmp_path, threshold=-2)  # which flags everything
    sd = StableDiffusion.from_preset(checked[0], safety_checker=tmp_path)
    image = Image.fromarray(pictures(1)[0])
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    assert sd.flagged is None
    assert not sd.inpaint(image, mask, "an apple", seed=1, **DRAW).any() and sd.flagged == [True]
    for strength in (0, 0.5):
        drawn = sd.image_to_image(image, "an apple", strength, batch_size=2, seed=1, **DRAW)
        assert not drawn.any() and sd.flagged == [True] * 2
    assert not sd.interpolate("an apple", "a pear", 1, frames=3, batch_size=2, **DRAW).any()
    assert sd.flagged == [True] * 3
    sd.safety_checker = None
    assert sd.text_to_image("an apple", seed=1, **DRAW).any() and sd.flagged is None


# === Folders and the command line ===


def test_it_stays_with_the_model(checked, tmp_path):
    folder, _, _ = checked
    assert main(["convert", str(folder), str(tmp_path / "new"), "--dtype", "float16"]) == 0
    for name in ("safety_checker", "feature_extractor"):
        for file in (folder / name).iterdir():
            assert (tmp_path / "new" / name / file.name).read_bytes() == file.read_bytes()
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert type(peer.safety_checker).__name__ == "StableDiffusionSafetyChecker" and peer.config.requires_safety_checker
    StableDiffusion.from_preset(folder).save_preset(folder)  # onto itself
    assert SafetyChecker(folder).build_encoder() is not None


def test_command_line(checked, tmp_path, capsys):
    from keras_sd.png import read_parameters

    write_safety_checker(tmp_path, threshold=-2)
    out = tmp_path / "out.png"
    draw = ["txt2img", "an apple", "--preset", str(checked[0]), "--steps", "1", "--seed", "7", "--out", str(out)]
    assert main([*draw, "--safety-checker-from", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{out}: seed 7, blacked out by the safety checker\n"
    assert not np.asarray(Image.open(out)).any() and read_parameters(out)["Safety checker"] == "blacked out"
    assert main([*draw, "--safety-checker"]) == 0
    assert main(draw) == 0 and "Safety checker" not in read_parameters(out)


def test_a_preset_without_one(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no safety checker of its own; give safety_checker"):
        StableDiffusion.from_preset(tiny, safety_checker=True)
    write_image_encoder(tmp_path)
    with pytest.raises(ValueError, match="is no safety checker: it holds no concept_embeds"):
        SafetyChecker(tmp_path)
