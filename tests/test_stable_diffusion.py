"""The pipeline: whole pictures against diffusers, the KerasCV API, image-to-image, inpainting, saving."""

import functools
import inspect
import json

import diffusers
import numpy as np
import pytest
import torch

from keras_sd import Denoiser, NoiseScheduler, StableDiffusion
from keras_sd.noise import initial_noise, row_noise
from keras_sd.samplers import SAMPLERS, make_table

# Our sampler → the diffusers scheduler of that kind, and what it is made with.
PEERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
LEADING = ("ddpm", "ddim", "plms")


@pytest.fixture(scope="module", params=["tiny", "narrow_v1", "v2_like"])
def pair(request):
    """(our pipeline, diffusers' pipeline) of one checkpoint."""
    folder = request.getfixturevalue(request.param)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    return StableDiffusion.from_preset(folder), peer


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, "float32"), -1, 1).copy())


def close(ours, theirs):
    """The part of pixels within 1/255."""
    return (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean()


def draw_with_diffusers(peer, prompt, scheduler, start, noise, monkeypatch, **kwargs):
    """uint8 pictures from diffusers, from the same initial noise and the same fresh noise in every row."""
    row, step = -1, scheduler.step

    def counted(*args, **kwargs):
        nonlocal row
        row += 1
        return step(*args, **kwargs)

    peer.scheduler = scheduler
    monkeypatch.setattr(scheduler, "step", functools.wraps(step)(counted))
    module = inspect.getmodule(type(scheduler))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: to_torch(noise(row)))
    height, width = 8 * start.shape[1], 8 * start.shape[2]
    images = peer(prompt, height=height, width=width, latents=to_torch(start), output_type="np", **kwargs).images
    return np.round(images * 255).astype("uint8")


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_pictures_equal_diffusers(pair, name, monkeypatch):
    ours, peer = pair
    kind, options = PEERS[name]
    spacing = "leading" if name in LEADING else "linspace"
    config = {**options, "timestep_spacing": spacing, "prediction_type": ours.scheduler[0].prediction_type}
    config |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name in LEADING:
        config["steps_offset"] = 1
    if name in ("dpmpp_2s", "lcm", "tcd"):
        del config["timestep_spacing"]
    for scale, shape in ((7.5, (8, 12, 4)), (1.0, (9, 13, 4))):
        start = initial_noise(3, 1, shape)
        fresh = row_noise(5, 1, shape, make_table(name, ours.scheduler[0], 4))
        theirs = draw_with_diffusers(
            peer,
            "an apple",
            getattr(diffusers, kind)(**config),
            start,
            fresh,
            monkeypatch,
            num_inference_steps=4,
            guidance_scale=scale,
            **({"eta": 0.3} if name == "tcd" else {}),
        )
        drawn = ours.text_to_image(
            "an apple",
            num_steps=4,
            unconditional_guidance_scale=scale,
            diffusion_noise=start,
            height=8 * shape[0],
            width=8 * shape[1],
            sampler=name,
            noise=fresh,
            progress=False,
        )
        assert close(drawn, theirs) >= 0.999, (name, scale, np.abs(drawn.astype(int) - theirs.astype(int)).max())


def test_the_presets_own_scheduler_is_read(pair):
    ours, peer = pair
    config = ours.checkpoint.scheduler()
    peer.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    start = initial_noise(0, 2, (8, 8, 4))
    prompts = ["an apple", "two apples, please"]
    theirs = peer(prompts, num_inference_steps=5, latents=to_torch(start), height=64, width=64, output_type="np").images
    drawn = ours.text_to_image(prompts, num_steps=5, diffusion_noise=start, height=64, width=64, progress=False)
    assert close(drawn, np.round(theirs * 255)) >= 0.999


# === The API of KerasCV ===


def test_a_seed_gives_the_same_picture_at_any_batch_size(sd):
    together = sd.text_to_image("an apple", batch_size=3, num_steps=3, seed=7, progress=False)
    alone = sd.text_to_image("an apple", num_steps=3, seed=8, progress=False)
    assert together.dtype == np.uint8 and together.shape == (3, *sd.image_size, 3)
    assert close(together[1:2], alone) == 1.0


def test_stochastic_samplers_are_reproducible_too(sd):
    a, b = (sd.text_to_image("an apple", num_steps=3, seed=1, sampler="euler_a", progress=False) for _ in range(2))
    assert (a == b).all()


def test_arguments_of_keras_cv(sd, tiny):
    for method in ("text_to_image", "encode_text", "generate_image"):
        import keras_cv

        theirs = list(inspect.signature(getattr(keras_cv.models.StableDiffusion, method)).parameters)
        assert list(inspect.signature(getattr(StableDiffusion, method)).parameters)[: len(theirs)] == theirs
    assert list(inspect.signature(StableDiffusion).parameters)[:3] == ["img_height", "img_width", "jit_compile"]
    model = StableDiffusion(img_height=64, img_width=72, jit_compile=False, preset=tiny)
    assert (model.img_height, model.img_width) == (64, 72)
    encoded = model.encode_text("an apple")
    assert encoded.shape == (1, 77, 32)
    interpolated = np.linspace(encoded[0], model.encode_text("a pear")[0], 3)
    images = model.generate_image(interpolated, batch_size=3, num_steps=2, seed=1, progress=False)
    assert images.shape == (3, 64, 72, 3)
    same = model.generate_image(
        encoded[0], batch_size=2, num_steps=2, diffusion_noise=np.zeros((8, 9, 4)), progress=False
    )
    assert same.shape == (2, 64, 72, 3) and (same[0] == same[1]).all()


def test_negative_prompt_steers(sd):
    plain, empty, other = (
        sd.text_to_image("an apple", negative_prompt=n, num_steps=2, seed=1, progress=False)
        for n in (None, "", "a pear")
    )
    assert (plain == empty).all() and (plain != other).any()


def test_parts_can_be_replaced(sd, tiny):
    model = StableDiffusion.from_preset(tiny)
    model.decoder = sd.decoder
    model.diffusion_model = sd.diffusion_model
    assert model.denoiser.diffusion_model is sd.diffusion_model


def test_callback_sees_every_row_and_stops(sd):
    seen = []
    sd.text_to_image("an apple", num_steps=4, progress=False, callback=lambda *a: seen.append(a))
    assert [(i, n) for i, n, _ in seen] == [(i, 4) for i in range(4)]
    assert seen[0][2].shape == (1, 8, 8, 4)
    seen.clear()
    sd.text_to_image("an apple", num_steps=4, progress=False, callback=lambda *a: (seen.append(a), False)[1])
    assert len(seen) == 1


def test_two_passes_and_one_pass_draw_the_same(sd, tiny):
    other = StableDiffusion.from_preset(tiny, two_pass_guidance=True)
    pictures = [m.text_to_image("an apple", num_steps=3, seed=2, progress=False) for m in (sd, other)]
    assert close(*pictures) == 1.0


def test_guidance_of_one_runs_the_network_once(sd, monkeypatch):
    sizes = []
    call = sd.denoiser._predict

    def predict(latent, timestep, context, *args, **kwargs):
        sizes.append(context.shape[0])
        return call(latent, timestep, context, *args, **kwargs)

    monkeypatch.setattr(sd.denoiser, "_predict", predict)
    inputs = {
        "latent": np.zeros((1, 8, 8, 4), "float32"),
        "history": np.zeros((1, 5, 8, 8, 4), "float32"),
        "context": np.zeros((1, 77, 32), "float32"),
        "row": np.ones((1, 14), "float32"),
    }
    sd.denoiser(inputs)
    sd.denoiser({**inputs, "unconditional_context": inputs["context"]})
    assert sizes == [1, 2]


def test_one_compilation_serves_every_sampler(sd, monkeypatch):
    traces = []
    call = Denoiser._guided
    monkeypatch.setattr(Denoiser, "_guided", lambda self, *args: (traces.append(1), call(self, *args))[1])
    denoiser = Denoiser(sd.diffusion_model)
    context = sd.encode_text("an apple")
    for name in ("ddim", "dpmpp_2m", "heun", "unipc"):
        table = make_table(name, NoiseScheduler(), num_steps=4, guidance_scale=len(name))
        denoiser.denoise(initial_noise(1, 1, (8, 8, 4)), context, context, table, progress=False)
    assert len(traces) == 1


# === Image to image, inpainting ===


def test_image_to_image_equals_diffusers(pair, monkeypatch):
    ours, peer = pair
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype="uint8")
    peer = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(peer, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    start = initial_noise(3, 1, (8, 12, 4))
    module = inspect.getmodule(type(peer))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: to_torch(start))
    monkeypatch.setattr(module, "retrieve_latents", lambda output, **k: output.latent_dist.mode())
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config["prediction_type"] = ours.scheduler[0].prediction_type
    for name in ("ddim", "euler", "dpmpp_2m"):
        kind, options = PEERS[name]
        peer.scheduler = getattr(diffusers, kind)(**config, **options)
        for strength in (0.3, 0.6, 1.0):
            theirs = peer(
                "an apple",
                image=torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1.0,
                strength=strength,
                num_inference_steps=10,
                output_type="np",
            ).images
            drawn = ours.image_to_image(
                picture, "an apple", strength, num_steps=10, diffusion_noise=start, sampler=name, progress=False
            )
            assert close(drawn, np.round(theirs * 255)) >= 0.999, (name, strength)


def test_strength_zero_gives_the_autoencoded_picture(sd):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
    expected = sd.decode(sd.encode(picture[None] / np.float32(127.5) - 1))
    assert (sd.image_to_image(picture, "an apple", 0.0) == expected).all()


def test_inpaint_keeps_every_pixel_outside_the_mask(sd):
    picture = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype="uint8")
    mask = np.zeros((64, 72), bool)
    mask[10:40, 5:50] = True
    drawn = sd.inpaint(picture, mask, "an apple", num_steps=3, seed=1, batch_size=2, progress=False)
    assert drawn.shape == (2, 64, 72, 3) and drawn.dtype == np.uint8
    assert (drawn[:, ~mask] == picture[~mask]).all() and (drawn[:, mask] != picture[mask]).mean() > 0.5


# === Saving ===


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_diffusers_opens_what_save_preset_writes(sd, tmp_path, dtype):
    sd.save_preset(tmp_path / "saved", dtype)
    saved = StableDiffusion.from_preset(tmp_path / "saved")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    peer.set_progress_bar_config(disable=True)
    start = initial_noise(1, 1, (8, 8, 4))
    theirs = peer(
        "an apple", num_inference_steps=4, latents=to_torch(start), height=64, width=64, output_type="np"
    ).images
    drawn = saved.text_to_image("an apple", num_steps=4, diffusion_noise=start, height=64, width=64, progress=False)
    assert close(drawn, np.round(theirs * 255)) >= 0.999
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert not [p for p in (tmp_path / "saved").rglob("*") if "tmp" in p.name]


# === Bad input ===


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"prompt": 7}, TypeError, "prompt"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 2.5}, ValueError, "num_steps"),
        ({"height": 63}, ValueError, "height must be a multiple of 8; got 63"),
        ({"width": -8}, ValueError, "width"),
        ({"sampler": "eular"}, ValueError, "euler"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1, "diffusion_noise": np.zeros((8, 8, 4))}, ValueError, "diffusion_noise and seed"),
        ({"diffusion_noise": np.zeros((7, 8, 4))}, ValueError, "diffusion_noise must have shape"),
        ({"sampler_option": 1}, ValueError, "sampler_option"),
        ({"prompt": ["a", "b"], "batch_size": 3}, ValueError, "batch_size"),
    ],
)
def test_bad_arguments(sd, arguments, error, words):
    with pytest.raises(error, match=words):
        sd.text_to_image(**{"prompt": "an apple", "progress": False, "num_steps": 2, **arguments})


def test_bad_presets(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'emoji'"):
        StableDiffusion.from_preset("emojy")
    with pytest.raises(ValueError, match="no checkpoint"):
        StableDiffusion.from_preset(tmp_path)


def test_interrupted_runs_raise(sd):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd.text_to_image("an apple", num_steps=3, progress=False, callback=interrupt)


def test_damaged_weights_are_said(sd, tiny):
    model = StableDiffusion.from_preset(tiny)
    model.diffusion_model.variables[0].assign(np.full(model.diffusion_model.variables[0].shape, np.nan))
    with pytest.raises(ValueError, match="not finite"):
        model.text_to_image("an apple", num_steps=2, progress=False)


def test_every_shape_is_compiled_for_itself(sd):
    for height, width in ((64, 64), (72, 64), (64, 64), (128, 64)):
        picture = sd.text_to_image("an apple", num_steps=2, seed=1, height=height, width=width, progress=False)
        assert picture.shape == (1, height, width, 3)
    shapes = {shape[1:3] for shape in sd.denoiser._functions}
    assert {(8, 8), (9, 8), (16, 8)} <= shapes
