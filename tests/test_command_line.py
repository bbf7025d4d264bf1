"""The command line: every flag is consumed, every bad input is one sentence and an exit code."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from keras_sd.__main__ import main
from keras_sd.png import read_parameters
from keras_sd.presets import Preset

DRAW = ["txt2img", "an apple", "--steps", "2", "--quiet"]


class Recorder:
    """Stands in for `StableDiffusion` and remembers how it was called."""

    calls = []
    scheduler = (None, "ddim", {})

    @classmethod
    def from_preset(cls, preset, **kwargs):
        cls.calls.append(("from_preset", (preset,), kwargs))
        return cls()

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return np.zeros((kwargs.get("batch_size", 1), 8, 16, 3), "uint8")

        return method


@pytest.fixture
def recorder(monkeypatch):
    Recorder.calls = []
    monkeypatch.setattr("keras_sd.presets.PRESETS", {"emoji": Preset(".", "", "")})
    monkeypatch.setattr("keras_sd.stable_diffusion.StableDiffusion", Recorder)
    return Recorder.calls


def run(*args, error=None, code=1, capsys):
    """Runs the command line; where an error is expected, asserts one sentence that holds `error`."""
    result = main([*map(str, args)])
    err = capsys.readouterr().err
    if error is None:
        assert result == 0, err
    else:
        lines = [line for line in err.strip().splitlines() if not line.startswith("Warning")]
        assert result == code and len(lines) == 1 and error in lines[0] and "Traceback" not in err, err


def test_every_flag_is_consumed(recorder, tmp_path, capsys):
    common = {
        "--negative-prompt": ("blue", "negative_prompt", "blue"),
        "--ddim_steps": ("7", "num_steps", 7),
        "--sampler": ("euler", "sampler", "euler"),
        "--ddim_eta": ("0.5", "eta", 0.5),
        "--scale": ("0", "unconditional_guidance_scale", 0.0),
        "--H": ("72", "height", 72),
        "--W": ("104", "width", 104),
        "--seed": ("11", "seed", 11),
        "--n_samples": ("3", "batch_size", 3),
    }
    own = {
        "txt2img": ("text_to_image", {}, ()),
        "img2img": ("image_to_image", {"--init-img": "a.png", "--strength": "0.25"}, ("a.png",)),
        "inpaint": ("inpaint", {"--init-img": "a.png", "--mask": "b.png", "--strength": "0.5"}, ("a.png", "b.png")),
    }
    flags = [x for flag, (value, _, _) in common.items() for x in (flag, value)]
    for command, (method, extra, pictures) in own.items():
        recorder.clear()
        more = [x for pair in extra.items() for x in pair]
        model = ["--preset", tmp_path, "--dtype", "float16", "--tokenizer", "t"]
        out = ["--outdir", tmp_path / command, "--n_iter", "2", "--karras", "--quiet"]
        run(command, "--prompt", "an apple", *flags, *more, *model, *out, capsys=capsys)
        assert recorder[0] == ("from_preset", (tmp_path,), {"dtype": "float16", "tokenizer": "t"})
        name, args, kwargs = recorder[1]
        assert name == method and args == (*pictures, "an apple")
        for _, argument, value in common.values():
            assert kwargs[argument] == value, argument
        assert kwargs["karras"] is True and kwargs["progress"] is False
        assert kwargs.get("strength") == (float(extra["--strength"]) if extra else None)
        assert recorder[2][2]["seed"] == 14
        assert sorted(p.name for p in (tmp_path / command).iterdir()) == [f"{i:05d}.png" for i in range(6)]
    (tmp_path / "c.ckpt").touch()
    run("txt2img", "x", "--plms", "--ckpt", tmp_path / "c.ckpt", "--out", tmp_path / "a.png", capsys=capsys)
    assert recorder[-2][1] == (tmp_path / "c.ckpt",) and recorder[-1][2]["sampler"] == "plms"
    assert "Model: c.ckpt" in read_parameters(tmp_path / "a.png")
    run("convert", "target", "--preset", tmp_path, "--store", "float16", capsys=capsys)
    assert recorder[-1] == ("save_preset", ("target", "float16"), {})


def test_numbered_files_are_not_overwritten(recorder, tmp_path, capsys):
    (tmp_path / "00004.png").write_bytes(b"mine")
    run("txt2img", "x", "--outdir", tmp_path, capsys=capsys)
    assert (tmp_path / "00004.png").read_bytes() == b"mine" and (tmp_path / "00005.png").exists()


def test_pictures_are_drawn_and_carry_their_parameters(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "out.png"
    draw = [*DRAW, "--preset", tiny, "--seed", "7", "--negative-prompt", "a pear", "--out", out]
    run(*draw, "--n_samples", "2", capsys=capsys)
    assert Image.open(tmp_path / "new" / "out-1.png").size == (64, 64)
    text = read_parameters(tmp_path / "new" / "out-1.png").splitlines()
    assert text[:2] == ["an apple", "Negative prompt: a pear"]
    assert text[2].startswith("Steps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 8, Size: 64x64, Model: ")
    picture = tmp_path / "new" / "out-0.png"
    changed = tmp_path / "changed.png"
    run("img2img", "a pear", "--init-img", picture, "--preset", tiny, "--steps", 3, "--out", changed, capsys=capsys)
    mask = np.zeros((64, 64), "uint8")
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    more = ["--mask", tmp_path / "mask.png", "--preset", tiny, "--steps", 2, "--out", tmp_path / "painted.png"]
    run("inpaint", "a pear", "--init-img", picture, *more, capsys=capsys)
    assert (np.array(Image.open(tmp_path / "painted.png"))[32:] == np.array(Image.open(picture))[32:]).all()


def test_convert(tiny, tmp_path, capsys):
    run("convert", tmp_path / "converted", "--ckpt", tiny, "--store", "float16", capsys=capsys)
    run(*DRAW, "--preset", tmp_path / "converted", "--out", tmp_path / "out.png", capsys=capsys)


# === Bad input ===


@pytest.mark.parametrize(
    "args, error",
    [
        (["--preset", "emojy"], "Did you mean 'emoji'"),
        (["--ckpt", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--H", "63"], "height must be a multiple of 8"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--sampler", "eular"], "Did you mean 'euler"),
        (["--prompt", "two"], "one prompt"),
        (["--seed", "-3"], "seed"),
    ],
)
def test_bad_arguments(tiny, tmp_path, capsys, args, error):
    preset = [] if {"--preset", "--ckpt"} & set(args) else ["--preset", tiny]
    run(*DRAW, *preset, "--out", tmp_path / "out.png", *args, error=error, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_wrong_usage(capsys):
    for args in (["txt2img", "x", "--no-such-flag"], ["paint"], [], ["txt2img", "x", "--steps", "many"]):
        assert main(args) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_damaged_weights(tiny, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "out.png"
    run(*DRAW, "--preset", broken, "--out", out, error="diffusion_pytorch_model.safetensors", capsys=capsys)
    assert not out.exists()


def test_hostile_checkpoint(tmp_path, capsys):
    import torch

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it ran'}",)

    torch.save({"state_dict": {"x": Hostile()}}, tmp_path / "model.ckpt")
    out = tmp_path / "out.png"
    run(*DRAW, "--ckpt", tmp_path / "model.ckpt", "--out", out, error="model.ckpt", capsys=capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]


def test_output_that_cannot_be_written(recorder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run(*DRAW, "--out", tmp_path / "file" / "out.png", error="is a file, not a folder", capsys=capsys)
    run(*DRAW, "--out", tmp_path, error="is a folder", capsys=capsys)
    assert not recorder  # said before anything is loaded


def test_interrupted(recorder, tmp_path, capsys, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "text_to_image", interrupt, raising=False)
    run(*DRAW, "--out", tmp_path / "out.png", error="Interrupted", code=130, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_usage_needs_no_keras():
    code = (
        "import sys; from keras_sd.__main__ import main; main(['presets']); main(['txt2img']); main(['--help'])\n"
        "assert not {'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_process(tmp_path):
    (tmp_path / "empty").mkdir()
    for preset in ("no-such", tmp_path / "empty"):
        command = [sys.executable, "-m", "keras_sd", *DRAW, "--preset", str(preset), "--out", str(tmp_path / "out.png")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and str(preset) in result.stderr
