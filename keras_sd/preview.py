"""What a latent shows, without the decoder: a linear map from latent to colour, for a picture after every step."""

import json
import pathlib

import numpy as np
from PIL import Image

FILE = "preview.json"  # in the folder of a preset that ships its map: {"weights": …}, fitted on latents it drew


def to_rgb(latent, weights):
    """Colours of latents.

    Args:
        latent: (B, h, w, C), clean and scaled, as the decoder takes it.
        weights: (C + 1, 3), from `fit`; the last row is the colour of a latent of zeros.

    Returns:
        uint8 (B, h, w, 3).
    """
    image = np.asarray(latent, "float32") @ weights[:-1] + weights[-1]
    return np.clip(np.round((image + 1.0) * 127.5), 0, 255).astype("uint8")


def fit(latent, image):
    """The map that reproduces pictures best, by least squares.

    Args:
        latent: (B, h, w, C).
        image: (B, H, W, 3) in [-1, 1], the decoder's picture of it; H and W are the same multiple of h and w.

    Returns:
        float32 (C + 1, 3).
    """
    batch_size, height, width, channels = latent.shape
    image = image.reshape(batch_size, height, image.shape[1] // height, width, image.shape[2] // width, 3)
    colours = image.mean((2, 4), dtype="float64").reshape(-1, 3)
    known = np.append(latent.reshape(-1, channels), np.ones((len(colours), 1)), axis=1)
    return np.linalg.lstsq(known.astype("float64"), colours, rcond=None)[0].astype("float32")


def fit_model(sd, latent=None):
    """The map of a model's decoder.

    Args:
        sd: a `StableDiffusion`; its autoencoder is used, no other part.
        latent: (B, h, w, C), of typical pictures; by default those of `colour_fields`.

    Returns:
        float32 (C + 1, 3).
    """
    latent = sd.encode(colour_fields() / np.float32(127.5) - 1.0) if latent is None else latent
    return fit(latent, np.asarray(sd.decoder.predict_on_batch(latent), "float32"))


def colour_fields(count=8, side=128):
    """Pictures uint8 (count, side, side, 3) of random colours, blended from grids of 2, 4, 8 and 16 cells a side."""
    rng = np.random.default_rng(0)

    def field(cells):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), "uint8"))
        return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), "float64") - 127.5

    weights = {cells: (2 / cells) ** 0.5 for cells in (2, 4, 8, 16)}
    fields = [sum(weight * field(cells) for cells, weight in weights.items()) for _ in range(count)]
    return np.clip(np.round(np.stack(fields) + 127.5), 0, 255).astype("uint8")


def read_map(path):
    """The map in a preset's folder, float32 (C + 1, 3); None where it has none."""
    file = pathlib.Path(path) / FILE
    return np.array(json.loads(file.read_text())["weights"], "float32") if file.is_file() else None


def clean_latent(table, prediction_type, row, latent, remembered):
    """What a row's network output says the picture will be: x0 of equation 12 in Song et al. (2021), arXiv 2010.02502.

    Args:
        table: the `SamplerTable` of the run.
        prediction_type: "epsilon", "v_prediction" or "sample".
        row: its number.
        latent: (B, h, w, C) as the row received it.
        remembered: what the row remembers, `sample_coef * latent + output_coef * output`.

    Returns:
        float32 (B, h, w, C).
    """
    signal, sigma, sample_coef, output_coef = (
        float(column[row]) for column in (table.signal, table.sigma, table.sample_coef, table.output_coef)
    )
    if output_coef == 0.0:
        return np.zeros_like(latent)  # nothing is known yet
    output = (remembered - sample_coef * latent) / output_coef
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (latent - sigma * output) / signal
    scale = np.hypot(signal, sigma)
    return ((signal / scale) * latent - sigma * output) / scale
