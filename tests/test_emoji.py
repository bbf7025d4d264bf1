"""The embedded model: what ships, that diffusers draws the same with it, and that it draws what is asked."""

import json
import warnings

import numpy as np
import pytest

from keras_sd import StableDiffusion
from keras_sd.noise import initial_noise
from keras_sd.presets import locate

FOLDER = locate("emoji")


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.from_preset("emoji")


def test_what_ships():
    captions = json.loads((FOLDER / "captions.json").read_text())
    emoji, backgrounds = captions["emoji"], captions["backgrounds"]
    assert len(emoji) >= 300 and len(backgrounds) >= 10
    pairs = {tuple(pair) for pair in captions["held_out"]}
    assert len(pairs) == len(emoji) * len(backgrounds) // 10
    assert all(name in emoji and background in backgrounds for name, background in pairs)
    assert sum(p.stat().st_size for p in FOLDER.rglob("*")) <= 40e6
    assert (FOLDER / "README.md").exists()


def test_no_caption_is_cut(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.tokenizer("small rocket on the left on a yellow background")


def test_backgrounds_are_drawn(sd):
    captions = json.loads((FOLDER / "captions.json").read_text())
    names = list(captions["backgrounds"])
    images = sd.text_to_image(
        [f"red apple on a {name} background" for name in names], num_steps=15, seed=1, progress=False
    )
    corners = np.median(images[:, :4].reshape(len(names), -1, 3), axis=1)
    colours = np.array([captions["backgrounds"][name] for name in names])
    nearest = np.square(corners[:, None] - colours[None]).sum(-1).argmin(1)
    assert (nearest == np.arange(len(names))).sum() >= len(names) - 1


def test_diffusers_opens_it_and_draws_the_same(sd):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    peer.set_progress_bar_config(disable=True)
    start = initial_noise(7, 2, (8, 8, 4))
    prompts = ["red apple on a blue background", "rocket on a yellow background"]
    latents = torch.from_numpy(np.moveaxis(start, -1, 1).copy())
    theirs = np.round(peer(prompts, num_inference_steps=25, latents=latents, output_type="np").images * 255)
    ours = sd.text_to_image(prompts, num_steps=25, diffusion_noise=start, progress=False)
    assert (np.abs(ours - theirs) <= 1).mean() >= 0.999
