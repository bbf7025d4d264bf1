"""Pictures in: every kind of file and array, the rule that fits sizes, soft masks, one sentence for each bad input."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.images import feathered, fit, read_image

GRADIENT = np.arange(12 * 20 * 3, dtype="uint8").reshape(12, 20, 3)


def saved(path, image, **kwargs):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **kwargs)
    return path


def pixels(image):
    image = read_image(image)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {  # EXIF 2.3, table 6: where the file's first row and column are in the picture
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: GRADIENT.transpose(1, 0, 2)[:, ::-1],
        7: GRADIENT.transpose(1, 0, 2)[::-1, ::-1],
        8: GRADIENT.transpose(1, 0, 2)[::-1],
    }
    assert (pixels(saved(tmp_path / "a.png", GRADIENT, exif=exif)) == turned[orientation]).all()


def test_transparency_is_laid_over_white(tmp_path):
    alpha = np.linspace(0, 255, 12 * 20).astype("uint8").reshape(12, 20, 1)
    expected = 255 + (GRADIENT - 255.0) * (alpha / 255.0)
    rgba = np.concatenate([GRADIENT, alpha], axis=-1)
    for image in (rgba, saved(tmp_path / "a.png", rgba), Image.fromarray(rgba)):
        assert np.abs(pixels(image) - expected).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    drawn = pixels(saved(tmp_path / "b.png", palette, transparency=0))
    assert (drawn[0, 0] == 255).all() and (drawn[0, 1] == [0, 0, 255]).all()


def test_grey_and_sixteen_bits(tmp_path):
    grey = np.arange(240, dtype="uint8").reshape(12, 20)
    deep = np.arange(240, dtype="uint16").reshape(12, 20) * 257
    for image in (
        grey,
        saved(tmp_path / "a.png", grey),
        deep,
        saved(tmp_path / "b.png", deep),
        deep.astype("int32") // 257,
    ):
        assert (pixels(image) == grey[..., None]).all()
    for suffix, values in ((".tif", deep), (".tiff", (deep / np.float32(65535)))):
        assert (pixels(saved(tmp_path / f"c{suffix}", values)) == grey[..., None]).all()
    assert (pixels(Image.fromarray(grey > 100)) == 255 * (grey > 100)[..., None]).all()


def test_arrays():
    for array in (GRADIENT, GRADIENT[None], GRADIENT / np.float64(255), GRADIENT.astype("int64")):
        assert (pixels(array) == GRADIENT).all()
    assert (pixels(GRADIENT / 255.0 + 0.004)[GRADIENT == 255] == 255).all()  # a little out of range, as networks are
    assert (pixels(np.eye(4, dtype=bool))[..., 0] == 255 * np.eye(4)).all()


def test_a_phones_jpeg_has_previews(tmp_path):
    image = Image.new("RGB", (16, 8), "red")
    path = saved(tmp_path / "a.jpg", image, format="MPO", save_all=True, append_images=[image.resize((8, 4))])
    assert pixels(path).shape == (8, 16, 3)


def test_sizes_are_fitted_by_one_rule():
    image = Image.fromarray(np.arange(21 * 45 * 3).astype("uint8").reshape(21, 45, 3))
    own = fit(image, None, None, 8)  # rounded down, the middle
    assert (np.asarray(own) == np.asarray(image)[2:18, 2:42]).all()
    assert fit(image, 64, 32, 8).size == (32, 64) and fit(image, 64, None, 8).size == (40, 64)
    assert fit(image.resize((5, 3)), None, None, 8).size == (8, 8)
    wide = Image.new("RGB", (300, 100))
    wide.paste("red", (100, 0, 200, 100))
    cut = np.asarray(fit(wide, 64, 64, 8)).astype(int)  # covers, and is cut
    assert cut.shape == (64, 64, 3) and np.abs(cut[:, 4:-4] - [255, 0, 0]).max() <= 2


def test_feathered_masks():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:40] = True
    assert (feathered(mask, 0) == mask).all()
    soft = feathered(mask, 4)
    assert (soft[~mask] == 0).all() and (soft[mask] > 0).all()
    np.testing.assert_allclose(soft[20, 8:18], [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1], atol=1e-6)
    assert (soft[20, 18:] == 1).all()  # the picture's own edge is none of the mask's


# === Bad input ===


def test_files_that_are_no_pictures(tmp_path):
    whole = saved(tmp_path / "whole.png", GRADIENT.repeat(9, axis=0))
    (tmp_path / "text.png").write_text("a text")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:80])
    (tmp_path / "cut.jpg").write_bytes(saved(tmp_path / "whole.jpg", GRADIENT).read_bytes()[:300])
    damaged = bytearray(whole.read_bytes())
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(damaged)
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "empty.png", "cut.png", "cut.jpg", "damaged.png", "folder.png"):
        with pytest.raises(ValueError, match=rf"--mask: '.*{name}' cannot be read as a picture \("):
            read_image(tmp_path / name, "--mask")
    with pytest.raises(FileNotFoundError, match="image: there is no file 'no.png'"):
        read_image("no.png")


def test_animations_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=f"image: '.*{name}' is an animation of 3 pictures; give one of them"):
            read_image(path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "bomb.png", Image.new("1", (3000, 1000)))
    for limit in (2_000_000, 1_000_000):  # Pillow itself warns above its limit, and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="bomb.png' has more than the .* pixels that a picture may have"):
            read_image(path)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((4, 4, 2)), r"got shape \(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3)), r"got shape \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3)), r"got shape \(0, 4, 3\)"),
        (np.full((4, 4), 256), "from 0 to 255 as an array of int64; got 256 to 256"),
        (np.full((4, 4), -1), "got -1 to -1"),
        (np.full((4, 4), 255.0), "from 0 to 1 as an array of float64; got 255 to 255"),
        (np.full((4, 4), np.nan), "got nan to nan"),
        (np.full((4, 4), 1j), "got dtype complex128"),
        ([["a"]], "got dtype <U1"),
    ],
)
def test_bad_arrays(array, words):
    with pytest.raises(ValueError, match=words):
        read_image(array)
