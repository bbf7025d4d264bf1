"""Draws pictures with exported LiteRT files: `python -m export.litert_runner FOLDER "red apple"`.

It needs ai-edge-litert, NumPy and Pillow, and neither Keras nor TensorFlow: what an app on a phone does.
"""

import argparse
import json
import secrets
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from keras_sd.noise import initial_noise, row_noise
from keras_sd.png import SAMPLER_NAMES, check_writable, write_png
from keras_sd.samplers import SAMPLERS, make_table
from keras_sd.scheduler_config import read_scheduler_config
from keras_sd.tokenizer import CLIPTokenizer

SUFFIX = ".tflite"


def load(path, num_threads=None):
    """Opens a `.tflite` file: a function from dict of arrays to dict of arrays, its signature `serving_default`.

    Raises:
        ImportError: ai-edge-litert is not installed.
        FileNotFoundError, ValueError: no such file, or it is none that LiteRT reads.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError("LiteRT files are run by ai-edge-litert: pip install ai-edge-litert.") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"No LiteRT file at {str(path)!r}: `python -m export --format litert` writes it.")
    runner = Interpreter(str(path), num_threads=num_threads).get_signature_runner("serving_default")

    def run(inputs):
        return runner(**inputs)

    run.shapes = {name: tuple(detail["shape"]) for name, detail in runner.get_input_details().items()}
    return run


def draw(
    folder,
    prompt,
    negative_prompt="",
    num_steps=25,
    guidance_scale=7.5,
    seed=None,
    sampler=None,
    num_threads=None,
    progress=True,
):
    """Draws a picture, the one that `keras_sd.StableDiffusion` draws from the same seed.

    One file is open at a time, so that the largest sets the memory needed.

    Args:
        folder: what `export.litert.write` wrote.
        prompt, negative_prompt: what to draw, and what to steer away from.
        num_steps, guidance_scale, seed, sampler: as in `StableDiffusion.text_to_image`.
        num_threads: CPU threads; by default LiteRT's choice.
        progress: show a progress bar.

    Returns:
        uint8 (H, W, 3).

    Raises:
        FileNotFoundError: a file is missing from the folder.
        ValueError: an option is out of its range, or the model sees more than a latent (inpainting models).
    """
    folder = Path(folder)
    if not (folder / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no folder that `python -m export --format litert` wrote.")
    config = json.loads((folder / "scheduler_config.json").read_text("utf-8"))
    scheduler, own_sampler, own_options = read_scheduler_config(config)
    name, options = (own_sampler, own_options) if sampler is None else (sampler, {})
    table = make_table(name, scheduler, num_steps, guidance_scale=guidance_scale, **options)
    seed = secrets.randbits(31) if seed is None else seed

    encode = load(folder / f"text_encoder{SUFFIX}", num_threads)
    tokens = CLIPTokenizer.from_folder(folder / "tokenizer")([prompt, negative_prompt])
    context, unconditional_context = (encode({"tokens": row[None]})["context"] for row in tokens)

    step = load(folder / f"denoising_step{SUFFIX}", num_threads)
    if "extra" in step.shapes:
        raise ValueError("The model in this folder is for inpainting: its U-Net sees a mask and a picture besides.")
    shape = step.shapes["latent"][1:]
    noise = row_noise(seed, 1, shape, table)
    silence = np.zeros((1, *shape), "float32")
    state = {
        "latent": (table.init_noise_scale * initial_noise(seed, 1, shape)).astype("float32"),
        "history": np.zeros(step.shapes["history"], "float32"),
    }
    for i in tqdm(range(len(table)), disable=not progress, leave=False):
        fixed = {"context": context, "unconditional_context": unconditional_context, "row": table.rows[i : i + 1]}
        state = step({**state, **fixed, "noise": noise(i) if table.noise[i] else silence})
    del step

    image = load(folder / f"decoder{SUFFIX}", num_threads)({"latent": state["latent"]})["image"][0]
    return np.round((image + 1.0) * 127.5).astype("uint8")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m export.litert_runner", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", help="what `python -m export --format litert` wrote")
    add("prompt")
    add("--negative-prompt", default="")
    add("--out", default="out.png", help="PNG to write (default: %(default)s)")
    add("--steps", type=int, default=25, help="(default: %(default)s)")
    add("--scale", type=float, default=7.5, help="guidance (default: %(default)s)")
    add("--seed", type=int, help="(default: a random one)")
    add("--sampler", choices=SAMPLERS, help="(default: the model's)")
    add("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    try:
        check_writable(options.out)
        image = draw(
            options.folder,
            options.prompt,
            options.negative_prompt,
            options.steps,
            options.scale,
            seed,
            options.sampler,
            options.threads,
        )
        height, width, _ = image.shape
        sampler = options.sampler and SAMPLER_NAMES.get(options.sampler, options.sampler.upper())
        fields = {"Steps": options.steps, "Sampler": sampler, "CFG_scale": options.scale, "Seed": seed}
        write_png(options.out, image, options.prompt, options.negative_prompt, **fields, Size=f"{width}x{height}")
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
