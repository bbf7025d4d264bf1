"""Another autoencoder: each naming that people have, against diffusers' own decoder and encoder."""

import os

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd import StableDiffusion
from keras_sd.__main__ import main
from keras_sd.weights.single_file import VAE, to_single_file
from keras_sd.weights.vae import read_vae

LATENT = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype("float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A VAE of its own weights and widths: folder, and the peer."""
    torch.manual_seed(5)
    peer = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("vae")
    peer.save_pretrained(folder)
    return folder, peer


@pytest.fixture(scope="module")
def files(other, narrow_v1, tmp_path_factory):
    """Every form of it: name → path."""
    folder, peer = other
    made = tmp_path_factory.mktemp("vaes")
    arrays = {key: tensor.numpy() for key, tensor in peer.state_dict().items()}
    original = to_single_file({"vae": arrays})
    bare = {key.removeprefix(VAE): array for key, array in original.items()}
    bare |= {"loss.logvar": np.zeros((), "float32"), "model_ema.decay": np.zeros((), "float32")}
    whole = original | {"model.diffusion_model.out.2.bias": np.zeros(4, "float32"), "betas": np.zeros(3, "float32")}
    for name, tensors in (("diffusers", arrays), ("original", original), ("bare", bare), ("whole", whole)):
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, made / f"{name}.safetensors")
    torch.save({"state_dict": {key: torch.from_numpy(np.array(a)) for key, a in bare.items()}}, made / "bare.ckpt")
    pipeline = made / "pipeline"
    peer.save_pretrained(pipeline / "vae")
    return {"folder": folder, "pipeline": pipeline} | {path.name: path for path in made.iterdir() if path.is_file()}


def assert_is_the_peer(sd, peer, scaling):
    with torch.no_grad():
        start = torch.from_numpy(np.moveaxis(LATENT, -1, 1).copy())
        picture = np.moveaxis(peer.decode(start / scaling).sample.numpy(), 1, -1)
        noise = torch.from_numpy(np.moveaxis(np.tanh(picture), -1, 1).copy())
        latent = np.moveaxis(peer.encode(noise).latent_dist.mean.numpy(), 1, -1) * scaling
    np.testing.assert_allclose(np.asarray(sd.decoder(LATENT)), picture, atol=2e-4)
    np.testing.assert_allclose(sd.encode(np.tanh(picture)), latent, atol=2e-4)


NAMES = "folder", "pipeline", "diffusers.safetensors", "original.safetensors", "bare.safetensors", "bare.ckpt"


@pytest.mark.parametrize("name", [*NAMES, "whole.safetensors"])
def test_all_forms(name, files, other, tiny):
    sd = StableDiffusion.from_preset(tiny, vae=files[name])
    assert_is_the_peer(sd, other[1], 0.5 if name in NAMES[:2] else 0.18215)


def test_pictures_are_the_peers(other, tiny):
    """As a pipeline of diffusers into which the same VAE is put; with and without `low_memory`."""
    start = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype("float32")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tiny, vae=other[1], safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.moveaxis(start, -1, 1).copy())
    expected = peer("an apple", latents=noise, num_inference_steps=3, output_type="np").images
    for options in ({}, {"low_memory": True}):
        sd = StableDiffusion.from_preset(tiny, vae=other[0], **options)
        drawn = sd.text_to_image("an apple", num_steps=3, diffusion_noise=start, progress=False)
        assert (np.abs(drawn.astype(int) - np.round(expected * 255)) <= 1).mean() >= 0.999
    assert "decoder" in vars(sd) and "diffusion_model" not in vars(sd)


def test_a_config_beside_the_file_is_read(other, tmp_path):
    folder, _ = other
    arrays = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(arrays, tmp_path / "vae.safetensors")
    assert read_vae(tmp_path / "vae.safetensors")[0]["scaling_factor"] == 0.18215
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert read_vae(tmp_path / "vae.safetensors")[0]["scaling_factor"] == 0.5


def test_size_follows_the_levels(tiny, tmp_path):
    peer = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )
    peer.save_pretrained(tmp_path / "vae")
    sd = StableDiffusion.from_preset(tiny, vae=tmp_path / "vae")
    assert (sd.factor, sd.image_size, sd.latent_shape()) == (4, (32, 32), (8, 8, 4))


def test_command_line(files, tiny, tmp_path, capsys):
    """It is drawn with, and becomes a part of what is converted."""
    vae = ["--vae", str(files["pipeline"])]
    drawn = []
    for flags in ([], vae):
        out = str(tmp_path / f"{len(flags)}.png")
        assert (
            main(["txt2img", "an apple", "--preset", str(tiny), "--steps", "1", "--seed", "1", "--out", out, *flags])
            == 0
        )
        drawn.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() > 1
    assert main(["convert", str(tiny), str(tmp_path / "new"), *vae]) == 0
    ours, theirs = (
        load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (tmp_path / "new", files["pipeline"])
    )
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)


def test_bad_files(tiny, other, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nothing"):
        StableDiffusion.from_preset(tiny, vae=tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        StableDiffusion.from_preset(tiny, vae=tmp_path)
    save_file({"conv_in.weight": np.zeros((1, 2), "float32")}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors' holds no autoencoder"):
        StableDiffusion.from_preset(tiny, vae=tmp_path / "unet.safetensors")
    diffusers.AutoencoderKL(latent_channels=16, norm_num_groups=8, block_out_channels=(8,)).save_pretrained(
        tmp_path / "wide"
    )
    with pytest.raises(ValueError, match="latents of 16 channels; this model's have 4"):
        StableDiffusion.from_preset(tiny, vae=tmp_path / "wide")
    arrays = load_file(other[0] / "diffusion_pytorch_model.safetensors")
    del arrays["decoder.conv_in.bias"]
    os.mkdir(tmp_path / "cut")
    save_file(arrays, tmp_path / "cut" / "vae.safetensors")
    with pytest.raises(ValueError, match="lacks 'decoder.conv_in.bias' of the decoder"):
        StableDiffusion.from_preset(tiny, vae=tmp_path / "cut" / "vae.safetensors").decoder  # noqa: B018
