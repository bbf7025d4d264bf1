"""The invisible watermark: written and read here, and by the package it comes from where that is installed."""

import numpy as np
import pytest
from PIL import Image

from keras_sd.__main__ import main
from keras_sd.watermark import MESSAGE, add_watermark, read_watermark


def picture(height=512, width=768):
    """Soft colours and some noise."""
    y, x = np.mgrid[:height, :width] / 256
    waves = np.stack([128 + 60 * np.sin(3 * x + y), 128 + 60 * np.cos(2 * y), 128 + 60 * np.sin(x * y + 1)], axis=-1)
    waves += np.random.default_rng(0).normal(0, 12, waves.shape)
    return np.clip(waves, 0, 255).astype("uint8")


@pytest.mark.parametrize("size", [(512, 768), (515, 770), (1023, 513)])
def test_what_is_written_is_read(size):
    image = picture(*size)
    before = image.copy()
    marked = add_watermark(image)
    assert read_watermark(marked) == MESSAGE == b"StableDiffusionV1" and read_watermark(image) != MESSAGE
    change = np.abs(marked.astype(int) - image)
    assert change.mean() < 0.5 and (change.any(axis=-1).mean() <= 1 / 16) and (image == before).all()
    assert (
        add_watermark(image, b"SDV2").shape == image.shape
        and read_watermark(add_watermark(image, b"SDV2"), 4) == b"SDV2"
    )


def test_other_programs_read_it():
    cv2 = pytest.importorskip("cv2")
    imwatermark = pytest.importorskip("imwatermark")
    image = picture()
    decoder = imwatermark.WatermarkDecoder("bytes", 8 * len(MESSAGE))
    assert decoder.decode(cv2.cvtColor(add_watermark(image), cv2.COLOR_RGB2BGR), "dwtDct") == MESSAGE
    encoder = imwatermark.WatermarkEncoder()
    encoder.set_watermark("bytes", MESSAGE)
    theirs = encoder.encode(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), "dwtDct")
    # The package itself does not read all of what it wrote; we read what it reads.
    read = [np.frombuffer(read_watermark(cv2.cvtColor(theirs, cv2.COLOR_BGR2RGB)), "uint8")]
    read.append(np.frombuffer(decoder.decode(theirs, "dwtDct"), "uint8"))
    assert np.mean(np.unpackbits(read[0]) == np.unpackbits(read[1])) > 0.95


def test_its_definition():
    """A bit per 4 × 4 means of 2 × 2 pixels' U; 0 is a quarter of 36 and 1 three quarters, on the scale of 2 U."""
    marked = add_watermark(picture(256, 320))
    red, green, blue = np.moveaxis(marked.astype(float), -1, 0)
    u = 0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 128
    means = 2 * (u[::2, ::2] + u[1::2, ::2] + u[::2, 1::2] + u[1::2, 1::2]) / 4
    bits = np.unpackbits(np.frombuffer(MESSAGE, "uint8"))
    right = []
    for n, (i, j) in enumerate((i, j) for i in range(0, 128, 4) for j in range(0, 160, 4)):
        largest = means[i : i + 4, j : j + 4].ravel()[1:].max()
        right.append((largest % 36 > 18) == bits[n % len(bits)])
    assert np.mean(right) > 0.8


def test_command_line(tiny, tmp_path, capsys):
    start, out = tmp_path / "start.png", tmp_path / "out.png"
    Image.fromarray(picture(256, 256)).save(start)
    flags = ["--preset", str(tiny), "--steps", "1", "--seed", "1", "--quiet", "--out", str(out), "--watermark"]
    mask = tmp_path / "mask.png"
    pixels = np.zeros((256, 256), "uint8")
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(mask)
    assert main(["inpaint", "an apple", "--init-img", str(start), "--mask", str(mask), *flags]) == 0
    read = np.unpackbits(np.frombuffer(read_watermark(np.asarray(Image.open(out))), "uint8"))
    assert (read == np.unpackbits(np.frombuffer(MESSAGE, "uint8"))).mean() > 0.9
    out.unlink()
    capsys.readouterr()
    assert main(["txt2img", "an apple", *flags]) == 1 and not out.exists()
    assert "A watermark needs pictures of at least 256 × 256 pixels; got 64 × 64." in capsys.readouterr().err


def test_bad_input():
    with pytest.raises(ValueError, match="at least 256 × 256 pixels; got 64 × 64"):
        add_watermark(picture(64, 64))
    with pytest.raises(ValueError, match="at least one byte"):
        add_watermark(picture(), b"")
