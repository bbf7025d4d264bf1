"""PNGs: what goes in comes out, in the words that Stable Diffusion tools read, whole or not at all."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.png import SAMPLER_NAMES, read_parameters, write_png
from keras_sd.samplers import SAMPLERS

IMAGE = np.arange(8 * 16 * 3, dtype="uint8").reshape(8, 16, 3)


def test_text_is_that_of_the_web_ui(tmp_path):
    path = tmp_path / "new" / "a.png"
    write_png(path, IMAGE, "red apple", "blurry", Steps=25, Sampler="Euler a", CFG_scale=7.5, Eta=None, Seed=7)
    with Image.open(path) as image:
        assert (np.array(image) == IMAGE).all()
        assert image.info["parameters"] == (
            "red apple\nNegative prompt: blurry\nSteps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7"
        )
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "prompt", ["red apple", "", "a (red:1.2) apple, 4k\nsecond line", "Äpfel 🍎, リンゴ", "Steps: 3"]
)
@pytest.mark.parametrize("negative", ["", "blurry, text\nsecond: line"])
def test_parameters_come_back(tmp_path, prompt, negative):
    fields = {"Steps": "25", "Model": 'a, "b": c\\', "Version": "keras_sd 0.1.0"}
    write_png(tmp_path / "a.png", IMAGE, prompt, negative, **fields)
    assert read_parameters(tmp_path / "a.png") == {"prompt": prompt, "negative_prompt": negative, **fields}


def test_png_of_another_program_has_none(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") == {}


def test_sampler_names_are_of_samplers():
    assert SAMPLER_NAMES.keys() <= SAMPLERS.keys()


def test_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, IMAGE, "first")
    with pytest.raises(TypeError):
        write_png(path, IMAGE.astype("complex64"), "second")
    assert read_parameters(path)["prompt"] == "first" and len(list(tmp_path.iterdir())) == 1
