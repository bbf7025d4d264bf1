"""Pictures between prompts and seeds, seeds of their own in a batch, variations, and the files that films are."""

import os
import stat
import sys

import numpy as np
import pytest
from PIL import Image

from keras_sd import StableDiffusion
from keras_sd.film import check_film, film_strip, write_film
from keras_sd.noise import initial_noise, lerp, row_noise, slerp
from keras_sd.png import read_parameters
from keras_sd.samplers import make_table


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def same(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def turned(a, b, t):
    """Spherical interpolation by another road: the part of b that is at right angles to a, then a rotation."""
    a, b = a.astype("float64"), b.astype("float64")
    unit = a / np.sqrt((a * a).sum())
    across = b - (b * unit).sum() * unit
    across /= np.sqrt((across * across).sum())
    angle = np.arctan2((b * across).sum(), (b * unit).sum())
    # slerp of vectors of two lengths: weights such that both ends are met
    return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b


# === Noise ===


def test_slerp():
    a, b = initial_noise([1, 2], 2, (8, 8, 4))
    for t in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(slerp(a, b, t), turned(a, b, t), rtol=1e-5, atol=1e-6)
        assert slerp(a, b, t).std() == pytest.approx(1, abs=0.1) and slerp(a, b, t).dtype == "float32"
    assert (slerp(a, b, 0) == a).all() and (slerp(a, b, 1) == b).all() and (slerp(a, a, 0.3) == a).all()
    assert (slerp(0 * a, 0 * a, 0.3) == 0).all() and (lerp(a, a, 0.7) == a).all()
    np.testing.assert_allclose(slerp([1, 0], [0, 1], 0.5), [np.sqrt(0.5)] * 2)


def test_seeds_as_a_list():
    table = make_table("euler_a", StableDiffusion.from_preset("emoji").scheduler[0], 3)
    for noise in (
        lambda seed, n: initial_noise(seed, n, (4, 4, 4)),
        lambda seed, n: row_noise(seed, n, (4, 4, 4), table)(1),
    ):
        together = noise([5, 9, 5], 3)
        assert (together[0] == noise(5, 1)[0]).all() and (together[1] == noise(9, 1)[0]).all()
        assert (together[2] == together[0]).all() and (noise(5, 2) == noise([5, 6], 2)).all()
        with pytest.raises(ValueError, match="3 of them"):
            noise([1, 2], 3)


@pytest.mark.parametrize("sampler", [None, "euler_a"])
def test_a_batch_of_seeds_is_the_single_pictures(sd, sampler):
    seeds = [11, 3, 2**40]
    options = {"num_steps": 3, "sampler": sampler, "progress": False}
    together = sd.text_to_image("an apple", seed=seeds, **options)
    assert together.shape[0] == 3 and sd.text_to_image("an apple", seed=np.array(seeds[:2]), **options).shape[0] == 2
    for image, seed in zip(together, seeds):
        assert same(image, sd.text_to_image("an apple", seed=seed, **options)[0])


def test_seeds_in_image_to_image_and_inpaint(sd):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    for draw in (
        lambda seed: sd.image_to_image(picture, "an apple", 0.6, num_steps=4, seed=seed, progress=False),
        lambda seed: sd.inpaint(picture, mask, "an apple", num_steps=3, seed=seed, progress=False),
    ):
        together = draw([8, 1])
        assert same(together[0], draw(8)[0]) and same(together[1], draw(1)[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"seed": [1, -2]}, "seed must be an integer of at least 0; got -2"),
        ({"seed": [1, 2], "batch_size": 3}, "batch_size is 3, but there are 2 seeds"),
        ({"seed": [1, 2], "prompt": ["a", "b", "c"]}, "2 seeds"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"variation_strength": 1.5}, "variation_strength must be in"),
        ({"variation_seed": 3}, "variation_seed needs a variation_strength"),
        ({"variation_strength": 0.5, "diffusion_noise": np.zeros((8, 8, 4))}, "diffusion_noise and seed"),
    ],
)
def test_bad_seeds(sd, arguments, words):
    with pytest.raises(ValueError, match=words):
        sd.text_to_image(**{"prompt": "an apple", "num_steps": 2, "progress": False, **arguments})


# === Variations ===


def test_variations_turn_the_noise(sd):
    options = {"num_steps": 3, "progress": False}
    shape = sd.latent_shape()
    varied = sd.text_to_image("an apple", batch_size=2, seed=5, variation_seed=70, variation_strength=0.3, **options)
    for i, image in enumerate(varied):
        noise = turned(initial_noise(5, 1, shape)[0], initial_noise(70 + i, 1, shape)[0], 0.3)
        assert same(image, sd.text_to_image("an apple", diffusion_noise=noise, **options)[0])
    ends = [
        sd.text_to_image("an apple", seed=5, variation_seed=70, variation_strength=strength, **options)
        for strength in (0.0, 1.0)
    ]
    assert (ends[0] == sd.text_to_image("an apple", seed=5, **options)).all()
    assert (ends[1] == sd.text_to_image("an apple", seed=70, **options)).all()
    both = sd.text_to_image("an apple", seed=[5, 6], variation_seed=[1, 1], variation_strength=0.2, **options)
    one = sd.text_to_image("an apple", seed=6, variation_seed=1, variation_strength=0.2, **options)
    assert same(both[1], one[0])


# === Interpolation ===


@pytest.mark.parametrize("sampler", [None, "euler_a"])
def test_the_ends_are_the_pictures_of_either_prompt_and_seed(sd, sampler):
    options = {"num_steps": 3, "sampler": sampler, "progress": False}
    frames = sd.interpolate("an apple", "two BREAK (pears:1.3)", seed=4, to_seed=9, frames=5, batch_size=2, **options)
    assert frames.shape == (5, 64, 64, 3) and frames.dtype == np.uint8
    # The shorter prompt goes on with an empty chunk, as in a batch with the longer one.
    first, last = sd.text_to_image(["an apple", "two BREAK (pears:1.3)"], seed=[4, 9], **options)
    assert same(frames[0], first) and same(frames[-1], last)


def test_what_is_between(sd):
    options = {"num_steps": 3, "progress": False}
    frames = sd.interpolate("an apple", "a pear", seed=4, to_seed=9, frames=4, **options)
    a, b = sd.encode_text("an apple"), sd.encode_text("a pear")
    noise = turned(*initial_noise([4, 9], 2, sd.latent_shape()), 1 / 3)
    expected = sd.generate_image(a * (2 / 3) + b * (1 / 3), diffusion_noise=noise, **options)
    assert same(frames[1], expected[0])


def test_interpolation_of_one_of_both(sd):
    options = {"num_steps": 3, "progress": False, "frames": 3}
    prompts = sd.interpolate("an apple", "[a|b] pear", seed=4, **options)
    seeds = sd.interpolate("an apple", to_seed=5, seed=4, **options)
    assert same(prompts[0], seeds[0]) and not same(prompts[1], seeds[1])
    assert same(prompts[2], sd.text_to_image("[a|b] pear", seed=4, num_steps=3, progress=False)[0])


def test_a_callback_stops_an_interpolation(sd):
    calls = []
    frames = sd.interpolate(
        "an apple", to_seed=2, frames=6, batch_size=2, num_steps=3, callback=lambda *a: calls.append(a) or False
    )
    assert len(calls) == 1 and len(frames) == 2


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({}, ValueError, "to_prompt or to_seed"),
        ({"to_seed": 1, "frames": 1}, ValueError, "frames must be an integer of at least 2"),
        ({"to_seed": -1}, ValueError, "to_seed"),
        ({"to_prompt": ["a"]}, TypeError, "to_prompt must be a string"),
        ({"to_prompt": "(a"}, ValueError, "position 0"),
        ({"to_seed": 1, "batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_interpolations(sd, arguments, error, words):
    with pytest.raises(error, match=words):
        sd.interpolate("an apple", num_steps=2, progress=False, **arguments)


# === Films ===


@pytest.fixture
def frames():
    """Five frames of one colour each."""
    colours = np.array([[255, 0, 0], [200, 60, 0], [120, 120, 0], [60, 200, 0], [0, 255, 0]], "uint8")
    return np.broadcast_to(colours[:, None, None], (5, 16, 24, 3))


def test_strip(frames, tmp_path):
    strip = film_strip(frames, gap=2)
    assert (
        strip.shape == (16, 5 * 24 + 4 * 2, 3)
        and (strip[:, 26:50] == frames[1]).all()
        and (strip[:, 24:26] == 255).all()
    )
    write_film(
        tmp_path / "new" / "strip.PNG", frames, prompt="an apple", negative_prompt="blue", To_seed=3, To_prompt=None
    )
    assert (np.array(Image.open(tmp_path / "new" / "strip.PNG")) == strip).all()
    parameters = read_parameters(tmp_path / "new" / "strip.PNG")
    assert parameters == {"prompt": "an apple", "negative_prompt": "blue", "To seed": "3"}


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animation(frames, tmp_path, suffix):
    write_film(tmp_path / f"film.{suffix}", frames, fps=10)
    with Image.open(tmp_path / f"film.{suffix}") as film:
        assert film.n_frames == 5 and film.size == (24, 16) and film.info["loop"] == 0
        for i, frame in enumerate(frames):
            film.seek(i)
            assert np.abs(np.array(film.convert("RGB")).astype(int) - frame).max() <= 12
            assert film.info["duration"] == 100
    assert os.listdir(tmp_path) == [f"film.{suffix}"]


FFMPEG = """#!{python}
import sys
given, path = sys.stdin.buffer.read(), sys.argv[-1]
if "-fail" in given.decode("latin-1")[:5]:
    sys.exit("unknown encoder")
open(path, "wb").write(" ".join(sys.argv[1:-1]).encode() + b"|" + given)
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A stand-in that writes its arguments and input."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))


def test_mp4(frames, tmp_path, ffmpeg):
    write_film(tmp_path / "film.mp4", frames, fps=12)
    arguments, pictures = (tmp_path / "film.mp4").read_bytes().split(b"|", 1)
    assert b"-s 24x16 -r 12" in arguments and b"yuv420p" in arguments and pictures == frames.tobytes()
    with pytest.raises(OSError, match="Cannot write .*film.mp4.*ffmpeg failed: unknown encoder"):
        write_film(tmp_path / "film.mp4", np.frombuffer(b"-fail" + bytes(43), "uint8").reshape(1, 4, 4, 3))
    assert (tmp_path / "film.mp4").stat().st_size and sorted(os.listdir(tmp_path)) == ["bin", "film.mp4"]


def test_films_that_cannot_be_written(frames, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ffmpeg"):
        check_film(tmp_path / "film.mp4")
    with pytest.raises(ValueError, match=".png, .gif, .webp, .mp4; got"):
        check_film("film.avi")
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_film(tmp_path / "film.gif", frames, fps=0)
    assert not os.listdir(tmp_path)
