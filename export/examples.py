"""Requests and the answers of the Python pipeline: an export is checked and a server warmed up with them."""

import io

import numpy as np
from PIL import Image

from keras_sd.noise import initial_noise
from keras_sd.samplers import HISTORY, make_table

PROMPTS = ("red apple on a blue background", "a cat")
SEED, STEPS = 7, 2


def examples(sd, name, size, batch_size):
    """Yields (signature, inputs, outputs) of a SavedModel: dicts name → NumPy array.

    Of each model the signatures that this project's client uses: every one costs a starting server seconds.

    Args:
        sd: the `StableDiffusion` that was exported.
        name: one of `export.signatures.MODELS`.
        size: (height, width) of the pictures in pixels, or None for the preset's own.
        batch_size: number of items in each request.
    """
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch_size)]
    strings = np.array([prompt.encode() for prompt in prompts], object)
    height, width = (sd.image_size[i] if side is None else side for i, side in enumerate(size))
    shape = sd.latent_shape(height, width)
    noise = initial_noise(SEED, batch_size, shape)
    count = np.int32(batch_size)

    if name == "text_encoder":
        tokens, context = sd.tokenizer(prompts), sd.encode_text(prompts).astype("float32")
        unconditional_context = np.repeat(sd.encode_text("").astype("float32"), batch_size, axis=0)
        outputs = {"context": context, "unconditional_context": unconditional_context}
        yield "serving_default", {"tokens": tokens, "batch_size": count}, outputs
        yield "encode_prompt", {"prompt": strings}, {"context": context, "tokens": tokens}

    elif name in ("diffusion_model", "denoiser"):
        context = sd.encode_text(prompts).astype("float32")
        unconditional_context = np.repeat(sd.encode_text("").astype("float32"), batch_size, axis=0)
        channels = sd.diffusion_model.arguments["in_channels"] - shape[-1]
        extra = {"extra": np.zeros((batch_size, *shape[:2], channels), "float32")} if channels else {}
        table = make_table("dpmpp_2m", sd.scheduler[0], STEPS)
        latent = (table.init_noise_scale * noise).astype("float32")
        inputs = {
            "latent": latent,
            "history": np.zeros((batch_size, HISTORY, *shape), "float32"),
            "context": context,
            "unconditional_context": unconditional_context,
            "steps": np.repeat(table.rows[None], batch_size, axis=0),
            "seed": np.array([[SEED + i, 0] for i in range(batch_size)], "int32"),
            **extra,
        }
        after = sd.denoiser.denoise(latent, context, unconditional_context, table, progress=False, **extra)
        yield "denoise" if name == "diffusion_model" else "serving_default", inputs, {"latent": after}

    elif name == "decoder":
        pictures = sd.decode(noise)
        yield "serving_default", {"latent": noise}, {"generated_images": pictures}
        yield "decode_png", {"latent": noise}, {"image_bytes": _png(pictures)}

    elif name == "image_encoder":
        rng = np.random.default_rng(SEED)
        coarse = rng.integers(0, 256, (batch_size, 4, 4, 3), dtype="uint8")
        pictures = np.stack(
            [np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in coarse]
        )
        latent = sd.encode(pictures.astype("float32") / 127.5 - 1.0)
        yield "serving_default", {"image_bytes": _png(pictures)}, {"latent": latent}

    elif name == "stable_diffusion":
        inputs = {
            "prompt": strings,
            "negative_prompt": np.array([b""] * batch_size, object),
            "num_steps": np.full(batch_size, STEPS, "int32"),
            "guidance_scale": np.full(batch_size, 7.5, "float32"),
            "seed": np.arange(SEED, SEED + batch_size, dtype="int32"),
        }
        options = {"num_steps": STEPS, "seed": SEED, "height": height, "width": width, "progress": False}
        yield "serving_default", inputs, {"image_bytes": _png(sd.text_to_image(prompts, **options))}


def _png(pictures):
    """uint8 (B, H, W, 3) → object array (B,) of PNG bytes."""
    files = np.empty(len(pictures), object)
    for i, picture in enumerate(pictures):
        with io.BytesIO() as file:
            Image.fromarray(picture).save(file, "PNG")
            files[i] = file.getvalue()
    return files
