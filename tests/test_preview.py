"""The linear preview: the map against an independent fit, how well it shows, in callbacks, after a stop."""

import json
import shutil

import numpy as np
import pytest

from keras_sd import StableDiffusion
from keras_sd.presets import locate
from keras_sd.preview import FILE, clean_latent, colour_fields, fit, fit_model, to_rgb
from keras_sd.samplers import SAMPLERS, make_table


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


@pytest.fixture(scope="module")
def emoji():
    return StableDiffusion.from_preset("emoji")


def averaged(pictures, h, w):
    """Area averages, a block after the other."""
    _, height, width, _ = pictures.shape
    a, b = height // h, width // w
    blocks = [[pictures[:, a * i : a * i + a, b * j : b * j + b].mean((1, 2)) for j in range(w)] for i in range(h)]
    return np.stack([np.stack(row, 1) for row in blocks], 1)


def test_the_map_is_the_least_squares_fit():
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((3, 4, 6, 5)).astype("float32")
    image = rng.uniform(-1, 1, (3, 8, 12, 3)).astype("float32")
    weights = fit(latent, image)
    assert weights.shape == (6, 3)
    x = np.c_[latent.reshape(-1, 5), np.ones(72)].astype("float64")
    y = averaged(image.astype("float64"), 4, 6).reshape(-1, 3)
    np.testing.assert_allclose(weights, np.linalg.inv(x.T @ x) @ x.T @ y, atol=1e-5)
    shown = to_rgb(latent, weights)
    expected = np.clip(np.rint((x @ weights + 1) * 127.5), 0, 255).reshape(3, 4, 6, 3)
    assert shown.dtype == np.uint8 and np.abs(shown - expected).max() <= 1


def test_it_shows_what_the_decoder_draws(emoji):
    latents = []
    images = emoji.text_to_image(
        ["red apple on a blue background", "rocket on a yellow background", "ghost on a red background"],
        num_steps=15,
        seed=2,
        progress=False,
        callback=lambda i, n, latent: latents.append(np.array(latent)),
    )
    truth = averaged(images.astype("float64"), 8, 8)
    variance = np.square(truth - truth.mean((0, 1, 2))).mean()
    for weights in (emoji._preview_map, fit_model(emoji)):
        error = np.square(to_rgb(latents[-1], weights) - truth).mean()
        assert error < 0.45 * variance
    assert emoji.preview(latents[-1]).shape == (3, 8, 8, 3)


def test_the_embedded_preset_ships_its_map(emoji):
    shipped = np.array(json.loads((locate("emoji") / FILE).read_text())["weights"], "float32")
    assert (emoji._preview_map == shipped).all()


def test_others_are_fitted_once(sd, tiny, monkeypatch):
    model = StableDiffusion.from_preset(tiny)
    latent = model.encode(colour_fields()[:2] / np.float32(127.5) - 1)
    first = model.preview(latent)
    assert (first == sd.preview(latent)).all()
    monkeypatch.setattr("keras_sd.stable_diffusion.fit_model", None)
    assert (model.preview(latent) == first).all()
    assert first.shape == (2, 16, 16, 3) and np.ptp(first) > 0


def test_colour_fields():
    pictures = colour_fields(3, 32)
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == np.uint8 and pictures.std() > 30
    assert (pictures == colour_fields(3, 32)).all() and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_latent_is_found_in_every_samplers_rows(prediction_type):
    """A network that knows the picture: in every row it must be seen, whatever the row remembers."""
    from keras_sd import NoiseScheduler

    scheduler = NoiseScheduler(prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 1, 4, 4, 4))
    for name in SAMPLERS:
        table = make_table(name, scheduler, 4)
        for row in range(len(table)):
            signal, sigma = table.signal[row], table.sigma[row]
            x = signal * x0 + sigma * noise
            scale = np.hypot(signal, sigma)
            output = {"epsilon": noise, "sample": x0, "v_prediction": (signal * noise - sigma * x0) / scale}
            remembered = table.sample_coef[row] * x + table.output_coef[row] * output[prediction_type]
            found = clean_latent(table, prediction_type, row, x, remembered)
            np.testing.assert_allclose(found, x0, atol=1e-6, err_msg=f"{name} {row}")


@pytest.mark.parametrize("sampler", [None, "euler", "plms"])
def test_the_callback_finds_the_clean_latent(emoji, sampler):
    """Half-way through, the preview is nearer to the picture than what the sampler works on."""
    seen = []
    options = {"num_steps": 12, "seed": 7, "sampler": sampler, "progress": False}
    images = emoji.text_to_image(
        "red apple on a blue background",
        callback=lambda i, n, latent: seen.append((emoji.preview(latent), latent)),
        **options,
    )
    shown, latent = seen[5]
    assert shown.shape == (1, 8, 8, 3) and shown.dtype == np.uint8 and latent.shape == (1, 8, 8, 4)
    last = seen[-1][0].astype(int)
    assert np.square(shown - last).mean() < np.square(emoji.preview(np.asarray(latent)) - last).mean()
    assert np.abs(emoji.decode(np.asarray(seen[-1][1])).astype(int) - images).max() == 0


def test_a_stopped_run_draws_the_clean_latent(sd):
    seen = []
    options = {"num_steps": 6, "seed": 7, "sampler": "euler", "progress": False}
    drawn = sd.text_to_image("an apple", callback=lambda *a: seen.append(a[2]) or len(seen) < 3, **options)
    assert len(seen) == 3 and (drawn == sd.decode(seen[-1].clean)).all()


def test_inpainting_shows_what_is_kept(sd):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    seen = []
    sd.inpaint(picture, mask, "an apple", num_steps=3, seed=1, progress=False, callback=lambda *a: seen.append(a[2]))
    known = sd.encode(picture[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(seen[0].clean[:, 4:], known[:, 4:], atol=1e-6)
    assert np.abs(seen[0].clean[:, :4] - known[:, :4]).max() > 0.01


def test_a_preset_saved_elsewhere_may_carry_a_map(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    weights = [[0, 0, 0]] * 4 + [[-1, 0, 1]]
    (tmp_path / "copy" / FILE).write_text(json.dumps({"weights": weights}))
    shown = StableDiffusion.from_preset(tmp_path / "copy").preview(np.ones((1, 2, 2, 4)))
    assert (shown == [0, 128, 255]).all()
