"""Seconds per picture on a GPU, against diffusers: `python -m benchmarks.gpu`

SD v1 at full size with random weights in bfloat16, 512×512, one picture and eight at once, DDIM, guidance 7.5: Keras on
JAX, with and without cuDNN's flash attention, against diffusers as it is and with all that its guide to speed names.
Whole pictures are timed, as a step is only queued when the next one is.

    python -m benchmarks.gpu --rounds 3
    python -m benchmarks.gpu --case emoji            the embedded model, to try it where there is no GPU
"""

import argparse
import functools
import itertools
import json
import os
import time

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.inference import GUIDANCE, PROMPT, alternated, open_diffusers
from benchmarks.optimisations import put
from benchmarks.paired import in_turn, measure, ratios, spread

CASES = {"512": (1, 512, FOLDER), "512_batch_8": (8, 512, FOLDER), "emoji": (2, 64, "emoji")}  # pictures, side, preset
TITLES = {"512": "One picture", "512_batch_8": "Eight at once", "emoji": "The embedded model, two at once"}
STEPS, WARM = 20, 3  # of a picture; pictures that are timed


def timed(draw, cold, device):
    """{"seconds": those of every warm picture, "device": its name}, after `cold` in which everything is compiled."""
    seconds = []
    for _ in range(cold + WARM):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[cold:], "device": device}


def keras_sd(case, flash=True):
    """This library on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    if not flash:
        put("keras_sd.layers.attention", "_fused", lambda *_: None)
    import jax

    from keras_sd import StableDiffusion

    batch_size, side, preset = CASES[case]
    sd = StableDiffusion.from_preset(preset, dtype="bfloat16")
    options = {"num_steps": STEPS, "unconditional_guidance_scale": GUIDANCE, "sampler": "ddim", "seed": 0}
    options |= {"batch_size": batch_size, "height": side, "width": side, "progress": False}
    return timed(lambda: sd.text_to_image(PROMPT, **options), 1, jax.devices()[0].device_kind)


def diffusers(case, fast=False):
    """diffusers on torch; `fast` with channels last, queries, keys and values in one product, and compiled."""
    import torch

    batch_size, side, preset = CASES[case]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    pipe = open_diffusers(preset, "bfloat16", channels_last=fast).to("cpu" if device == "cpu" else "cuda")
    if fast:
        pipe.fuse_qkv_projections()
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "num_images_per_prompt": batch_size}
    options |= {"height": side, "width": side, "output_type": "np"}
    return timed(lambda: pipe(PROMPT, **options), 2, device)


OURS = {"jax": keras_sd, "jax_without_flash_attention": functools.partial(keras_sd, flash=False)}
THEIRS = {"diffusers": diffusers, "diffusers_fast": functools.partial(diffusers, fast=True)}
RUNNERS = {**OURS, **THEIRS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES][:2], help="default: those at full size")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, those of earlier calls included (default 3)")
    parser.add_argument("--run", choices=RUNNERS, help="one runner, on the first case")
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(RUNNERS[args.run](args.case[0])))
    if set(args.case) != {"emoji"}:
        write_apart()
    for case in args.case:

        def run(name, case=case):
            return measure("benchmarks.gpu", "--run", name, "--case", case)

        rounds = in_turn("gpu", case, alternated(OURS, THEIRS), args.rounds, run)
        for one, other in itertools.product(OURS, THEIRS):
            print(f"{TITLES[case]}, {one} / {other}: {spread(ratios(rounds, one, other, 'seconds'))}", flush=True)


if __name__ == "__main__":
    main()
