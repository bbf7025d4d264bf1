"""`finetune.py`: the flags of the Keras original, every flag consumed, results that open, runs that go on."""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from keras_sd import StableDiffusion
from keras_sd.lora import lora_layers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six captioned pictures, as the Keras Pokémon archive has them; one file is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    with open(folder / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "caption"])
        for i in range(6):
            Image.fromarray(random.integers(0, 256, (40, 32, 3), "uint8")).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", f"drawing number {i}"])
        (folder / "bad.png").write_bytes(b"no picture")
        table.writerow(["bad.png", "a damaged file"])
    return folder


@pytest.fixture
def flags(tiny, pictures, tmp_path):
    """What all runs have: two batches of the tiny checkpoint."""
    return (
        f"--preset {tiny} --dataset_archive {pictures} --img_height 32 --img_width 32 --batch_size 2 --max_steps 2 "
        + (f"--out {tmp_path / 'out'} --quiet")
    )


def test_flags_and_defaults_of_the_keras_original():
    args = vars(finetune.build_parser().parse_args("--batch_size 4 --num_epochs 577".split()))
    original = {"img_height": 256, "img_width": 256, "lr": 1e-5, "wd": 1e-2, "beta_1": 0.9, "beta_2": 0.999}
    original |= {"epsilon": 1e-8, "ema": 0.9999, "max_grad_norm": 1.0, "batch_size": 4, "num_epochs": 577, "mp": False}
    assert original.items() <= args.items() and args["pretrained_ckpt"] is None and args["preset"] == "sd-v1-4"
    line = "--img_height 512 --img_width 512 --batch_size 1 --num_epochs 72 --mp"
    parser = finetune.build_parser()
    args = parser.parse_args(line.split())
    finetune.check(args, parser)
    assert args.precision == "mixed_float16"


def test_every_flag_is_consumed(flags, pictures, tmp_path, monkeypatch, capsys):
    """Each flag is read behind the checks, in one run or another."""
    read, check = set(), finetune.check

    class Recorded(argparse.Namespace):
        def __getattribute__(self, name):
            if "checked" in vars(type(self)):
                read.add(name)
            return super().__getattribute__(name)

    def checked(args, parser):
        check(args, parser)
        Recorded.checked = True

    monkeypatch.setattr(finetune, "check", checked)
    monkeypatch.setattr("export.saved_model.export_saved_models", lambda *_, **__: {"decoder": "models/decoder/1"})
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, a: parse(self, a, Recorded()))
    runs = (
        f"--export {tmp_path / 'models'} --validation_prompt drawing --validate_every 2 --train_text_encoder",
        "--train textual_inversion --token <new> --init_token drawing --no_latent_cache",
        f"--train lora --targets attention convolution --prior_archive {pictures} --dry-run --no_latent_cache",
        "--train controlnet --dry-run --no_latent_cache",
    )
    for i, line in enumerate(runs):
        Recorded.__dict__.get("checked") and delattr(Recorded, "checked")
        run = flags.replace(str(tmp_path / "out"), str(tmp_path / f"out{i}"))
        assert finetune.main(f"{run} {line}".split()) == 0, capsys.readouterr().err
    known = {action.dest for action in finetune.build_parser()._actions} - {"help", "mp"}  # --mp settles --precision
    assert known <= read, known - read


def test_results_open_and_a_run_goes_on(flags, tiny, tmp_path, capsys):
    line = f"{flags} --train lora --rank 2 --lr 1e-2 --ema 0 --latent_cache {tmp_path / 'cache'}".split()
    assert finetune.main(line) == 0
    out, err = capsys.readouterr()
    assert "Not used: bad.png cannot be read" in err and "lora.safetensors" in out
    folder = tmp_path / "out" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002.safetensors"]
    assert finetune.main([*line, "--max_steps", "3"]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir())[-1] == "step-00000003.safetensors"
    assert finetune.main([*line, "--max_steps", "3", "--out", str(tmp_path / "whole")]) == 0, capsys.readouterr().err
    first, second = (
        np.concatenate([np.ravel(x) for x in weights_with(tiny, tmp_path / name / "lora.safetensors")])
        for name in ("out", "whole")
    )
    np.testing.assert_array_equal(first, second)


def weights_with(preset, lora):
    """The U-Net's weights with a LoRA."""
    sd = StableDiffusion.from_preset(preset)
    before = [w.copy() for w in sd.diffusion_model.get_weights()]
    sd.load_lora(lora)
    after = sd.diffusion_model.get_weights()
    assert any((a != b).any() for a, b in zip(before, after))
    return after


def test_a_preset_comes_out_of_full_training(flags, tmp_path, capsys):
    assert finetune.main([*flags.split(), "--lr", "1e-2", "--ema", "0", "--no_latent_cache", "--flip"]) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "out" / "preset") in out and "No diffusion_model.h5" in err
    sd = StableDiffusion.from_preset(tmp_path / "out" / "preset")
    assert sd.text_to_image("drawing", num_steps=2, height=32, width=32, progress=False).shape == (1, 32, 32, 3)


def test_a_lora_is_exported(flags, tmp_path, monkeypatch, capsys):
    def exported(sd, folder, size):
        assert not lora_layers(sd.diffusion_model) and size == (32, 32)  # the factors are in the kernels
        return {"decoder": folder}

    monkeypatch.setattr("export.saved_model.export_saved_models", exported)
    line = f"{flags} --train lora --rank 2 --no_latent_cache --export {tmp_path / 'models'}"
    assert finetune.main(line.split()) == 0, capsys.readouterr().err
    assert str(tmp_path / "models") in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, error, code",
    [
        ("--mp --precision bfloat16", "--mp is --precision mixed_float16; got --precision bfloat16", 2),
        ("--img_height 100", "--img_height must be a multiple of 8; got 100", 2),
        ("--train lcm --train_text_encoder", "--train_text_encoder is for --train unet and lora; got lcm", 2),
        ("--train textual_inversion", "--token and --init_token go with --train textual_inversion", 2),
        ("--latent_cache a --random_crop", "--latent_cache holds one cut of each picture", 2),
        ("--lr fast", "must be a number of at least 0; got 'fast'", 2),
        (
            "--preset emoji --dataset_archive /no/such/folder",
            "no folder or archive of pictures at '/no/such/folder'",
            1,
        ),
        ("--preset emoij", "emoij", 1),
    ],
)
def test_bad_arguments_are_one_sentence(line, error, code, capsys):
    assert finetune.main(line.split()) == code
    _, err = capsys.readouterr()
    assert error in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_the_command(tmp_path):
    command = [sys.executable, ROOT / "finetune.py", "--help"]
    assert "--dataset_archive" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
