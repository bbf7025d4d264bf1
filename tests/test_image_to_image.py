"""Pictures from pictures: image-to-image and inpainting against diffusers, and what each of them promises."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS, write_checkpoint
from PIL import Image
from test_stable_diffusion import PEERS, close, pair, to_torch  # noqa: F401  (a fixture)

from keras_sd import StableDiffusion
from keras_sd.noise import initial_noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype="uint8")
MASK = np.zeros((64, 96), bool)
MASK[13:45, 20:75] = True


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


@pytest.fixture(scope="module", params=["tiny", "narrow_v1"])
def nine_channels(request, tmp_path_factory):
    """(our pipeline, diffusers' pipeline) of one checkpoint whose U-Net sees mask and masked picture."""
    name = f"{request.param}_inpainting"
    recipe = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECKPOINTS, name, {**recipe, "unet": {**recipe["unet"], "in_channels": 9}})
        write_checkpoint(name, folder)
    peer = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    return StableDiffusion.from_preset(folder), peer


def draw_with_diffusers(peer, sampler, prediction_type, start, monkeypatch, **kwargs):
    """uint8 pictures from a picture, with the same noise; the autoencoder's mean is taken, as we do."""
    module = inspect.getmodule(type(peer))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: to_torch(start))
    monkeypatch.setattr(module, "retrieve_latents", lambda output, **k: output.latent_dist.mode())
    kind, options = PEERS[sampler]
    peer.scheduler = getattr(diffusers, kind)(**BETAS, prediction_type=prediction_type, **options)
    image = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1.0
    images = peer("an apple", image=image, num_inference_steps=10, output_type="np", **kwargs).images
    return np.round(images * 255).astype("uint8")


# === Image to image ===


@pytest.mark.parametrize(
    "sampler, strength", [("ddim", 0.3), ("ddim", 0.6), ("ddim", 1.0), ("euler", 0.6), ("dpmpp_2m", 0.6)]
)
def test_image_to_image_equals_diffusers(pair, sampler, strength, monkeypatch):  # noqa: F811
    ours, peer = pair
    peer = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(peer, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    start = initial_noise(3, 1, (8, 12, 4))
    theirs = draw_with_diffusers(
        peer, sampler, ours.scheduler[0].prediction_type, start, monkeypatch, strength=strength
    )
    drawn = ours.image_to_image(
        PICTURE, "an apple", strength, num_steps=10, diffusion_noise=start, sampler=sampler, progress=False
    )
    assert close(drawn, theirs) >= 0.999


def test_strength_zero_gives_the_autoencoded_picture(sd):
    expected = sd.decode(sd.encode(PICTURE[None] / np.float32(127.5) - 1))
    assert (sd.image_to_image(PICTURE, "an apple", 0.0) == expected).all()
    assert sd.image_to_image(PICTURE, ["an apple", "a pear"], 0).shape == (2, 64, 96, 3)


def test_strength_one_is_text_to_image_but_for_what_the_noise_leaves(sd, monkeypatch):
    """The noisiest level of Stable Diffusion still holds 7 % of the picture; of a grey latent nothing is left."""
    noise = initial_noise(3, 1, (8, 12, 4))
    options = {"num_steps": 4, "sampler": "euler", "progress": False}
    monkeypatch.setattr(sd, "encode", lambda picture: np.zeros((1, 8, 12, 4), "float32"))
    from_picture = sd.image_to_image(PICTURE, "an apple", 1.0, diffusion_noise=noise, **options)
    table = sd._table("euler", 4, 7.5, {})
    noise = noise * (table.sigma[0] / table.init_noise_scale)
    from_text = sd.text_to_image("an apple", height=64, width=96, diffusion_noise=noise, **options)
    assert close(from_picture, from_text) == 1.0


def test_pictures_of_any_size_and_kind(sd, tmp_path):
    grey = Image.fromarray(PICTURE[:61, :83]).convert("L")
    grey.save(tmp_path / "a.png")
    options = {"strength": 0.5, "num_steps": 2, "seed": 1, "progress": False}
    drawn = sd.image_to_image(tmp_path / "a.png", "an apple", **options)
    assert drawn.shape == (1, 56, 80, 3)
    assert (drawn == sd.image_to_image(np.asarray(grey)[2:58, 1:81], "an apple", **options)).all()
    assert sd.image_to_image(PICTURE, "an apple", height=32, width=72, **options).shape == (1, 32, 72, 3)


# === Inpainting ===


@pytest.mark.parametrize("sampler, strength", [("ddim", 1.0), ("euler", 0.6), ("dpmpp_2m", 0.6)])
def test_blended_inpainting_equals_diffusers(pair, sampler, strength, monkeypatch):  # noqa: F811
    ours, peer = pair
    peer = diffusers.StableDiffusionInpaintPipeline.from_pipe(peer, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    compare_inpainting(ours, peer, sampler, strength, monkeypatch)


@pytest.mark.parametrize("sampler, strength", [("ddim", 1.0), ("dpmpp_2m", 0.6)])
def test_nine_channel_inpainting_equals_diffusers(nine_channels, sampler, strength, monkeypatch):
    compare_inpainting(*nine_channels, sampler, strength, monkeypatch)


def compare_inpainting(ours, peer, sampler, strength, monkeypatch):
    start = initial_noise(3, 1, (8, 12, 4))
    theirs = draw_with_diffusers(
        peer,
        sampler,
        ours.scheduler[0].prediction_type,
        start,
        monkeypatch,
        mask_image=torch.from_numpy(MASK[None, None].astype("float32")),
        strength=strength,
        height=64,
        width=96,
    )
    drawn = ours.inpaint(
        PICTURE, MASK, "an apple", strength, num_steps=10, diffusion_noise=start, sampler=sampler, progress=False
    )
    assert close(drawn[:, MASK], theirs[:, MASK]) >= 0.999
    assert (drawn[:, ~MASK] == PICTURE[~MASK]).all()


def test_inpainting_all_of_it_is_text_to_image(sd):
    options = {"num_steps": 3, "diffusion_noise": initial_noise(3, 1, (8, 12, 4)), "progress": False}
    for sampler in ("ddim", "dpmpp_2m"):
        everything = sd.inpaint(PICTURE, np.ones((64, 96), bool), "an apple", sampler=sampler, **options)
        assert close(everything, sd.text_to_image("an apple", height=64, width=96, sampler=sampler, **options)) == 1.0


@pytest.mark.parametrize("feather", [0, 5])
def test_pixels_outside_the_mask_are_kept(sd, feather):
    options = {"num_steps": 3, "seed": 1, "batch_size": 2, "progress": False}
    drawn = sd.inpaint(PICTURE, MASK, "an apple", feather=feather, **options)
    assert drawn.shape == (2, 64, 96, 3) and drawn.dtype == np.uint8
    assert (drawn[:, ~MASK] == PICTURE[~MASK]).all() and (drawn[:, MASK] != PICTURE[MASK]).mean() > 0.5
    inner = np.zeros_like(MASK)
    inner[18:40, 25:70] = True
    hard = sd.inpaint(PICTURE, MASK, "an apple", **options)
    assert (drawn[:, inner] == hard[:, inner]).all()
    edge = np.abs(drawn[:, MASK & ~inner].astype(int) - PICTURE[MASK & ~inner]).mean()
    assert edge <= np.abs(hard[:, MASK & ~inner].astype(int) - PICTURE[MASK & ~inner]).mean() * (0.7 if feather else 1)


def test_masks_that_lie_between_the_latents_positions(sd):
    speck = np.zeros((64, 96), bool)
    speck[10:14, 10:13] = True
    options = {"num_steps": 3, "seed": 1, "progress": False}
    drawn = sd.inpaint(PICTURE, speck, "an apple", **options)
    cell = np.zeros((64, 96), bool)
    cell[8:16, 8:16] = True
    assert (drawn[:, speck] == sd.inpaint(PICTURE, cell, "an apple", **options)[:, speck]).all()


def test_masks_are_read_and_fitted_like_pictures(sd, tmp_path):
    Image.fromarray(255 * MASK[:61, :83].astype("uint8")).save(tmp_path / "mask.png")
    Image.fromarray(PICTURE[:61, :83]).save(tmp_path / "a.png")
    options = {"num_steps": 2, "seed": 1, "progress": False}
    drawn = sd.inpaint(tmp_path / "a.png", tmp_path / "mask.png", "an apple", **options)
    assert (drawn == sd.inpaint(PICTURE[2:58, 1:81], MASK[2:58, 1:81], "an apple", **options)).all()
    assert sd.inpaint(PICTURE, MASK, "an apple", height=32, width=32, **options).shape == (1, 32, 32, 3)


# === Bad input ===


@pytest.mark.parametrize(
    "method, arguments, words",
    [
        ("image_to_image", {"strength": 1.1}, r"strength must be in \[0, 1\]; got 1.1"),
        ("image_to_image", {"strength": -0.1}, r"strength must be in \[0, 1\]; got -0.1"),
        ("image_to_image", {"strength": float("nan")}, r"strength must be in \[0, 1\]; got nan"),
        ("image_to_image", {"strength": "0.5"}, r"strength must be in \[0, 1\]; got '0.5'"),
        ("image_to_image", {"image": "no.png"}, "image: there is no file 'no.png'"),
        ("image_to_image", {"image": PICTURE * 2.0}, "image must be from 0 to 1 as an array of float64"),
        ("image_to_image", {"height": 60}, "height must be a multiple of 8; got 60"),
        ("inpaint", {"strength": 0}, "strength must be above 0 for inpaint"),
        ("inpaint", {"strength": 2}, r"strength must be in \[0, 1\]; got 2"),
        ("inpaint", {"mask": MASK[:, :50]}, "mask has 50 × 64 pixels and the image 96 × 64; they must be alike"),
        ("inpaint", {"mask": np.full((64, 96), 127, "uint8")}, "mask is empty: nothing in it is white"),
        ("inpaint", {"mask": "no.png"}, "mask: there is no file 'no.png'"),
        ("inpaint", {"feather": -1}, "feather must be an integer of at least 0; got -1"),
        ("inpaint", {"feather": 0.5}, "feather must be an integer of at least 0; got 0.5"),
    ],
)
def test_bad_arguments(sd, method, arguments, words):
    arguments = {"image": PICTURE, "prompt": "an apple", "num_steps": 2, "progress": False} | arguments
    if method == "inpaint":
        arguments = {"mask": MASK} | arguments
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        getattr(sd, method)(**arguments)


def test_models_are_told_apart(nine_channels):
    ours, _ = nine_channels
    with pytest.raises(ValueError, match="takes 9 channels, not 4: it is for repainting: use inpaint"):
        ours.text_to_image("an apple", num_steps=2, progress=False)
