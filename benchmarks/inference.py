"""Seconds per denoising step and per picture, against diffusers and KerasCV: `python -m benchmarks.inference`

SD v1 at full size with random weights, and the embedded model; DDIM, guidance 7.5. Every runner draws pictures, cold
and warm, in a process of its own; a round is one run of each, ours and theirs in turn, and a ratio is of two runs of
one round.

    python -m benchmarks.inference                               every case, every runner, three rounds
    python -m benchmarks.inference --case 512 --ours tensorflow_bfloat16 --theirs diffusers_bfloat16_channels_last
    python -m benchmarks.inference --run openvino_bfloat16       one run; prints JSON, or its own error
"""

import argparse
import functools
import itertools
import json
import os

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.paired import in_turn, measure, ratios, spread, timed

PROMPT, GUIDANCE = "red apple on a blue background", 7.5
CASES = {  # pictures at once, side in pixels, preset, denoising steps
    "512": (1, 512, FOLDER, 4),
    "512_batch_4": (4, 512, FOLDER, 4),
    "768": (1, 768, FOLDER, 4),
    "emoji": (1, 64, "emoji", 25),
}
TITLES = {
    "512": "512×512",
    "512_batch_4": "512×512, four pictures at once",
    "768": "768×768",
    "emoji": "the embedded model, 64×64",
}


# === Runners ===


def keras_sd(case, steps, backend, dtype):
    """This library."""
    os.environ["KERAS_BACKEND"] = backend
    from keras_sd import StableDiffusion

    batch_size, side, preset, _ = CASES[case]
    sd = StableDiffusion.from_preset(preset, dtype=dtype)
    options = {"num_steps": steps, "unconditional_guidance_scale": GUIDANCE, "sampler": "ddim", "seed": 0}
    options |= {"batch_size": batch_size, "height": side, "width": side, "progress": False}
    return timed(lambda tick: sd.text_to_image(PROMPT, callback=tick, **options))


def open_diffusers(preset, dtype, channels_last=True):
    """diffusers' pipeline of a preset, with DDIM."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from keras_sd.presets import locate

    options = {"dtype": getattr(torch, dtype), "safety_checker": None}
    pipe = StableDiffusionPipeline.from_pretrained(locate(preset), **options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def diffusers(case, steps, dtype, channels_last=False, compiled=False):
    """diffusers on torch."""
    import torch

    batch_size, side, preset, _ = CASES[case]
    pipe = open_diffusers(preset, dtype, channels_last)
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
    options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "num_images_per_prompt": batch_size}
    options |= {"height": side, "width": side, "output_type": "np"}

    def draw(tick):
        pipe(PROMPT, **options, callback_on_step_end=lambda *call: tick() or call[-1])

    return timed(draw, cold=2 if compiled else 1)


def keras_cv(case, steps, dtype, backend="tensorflow", jit_compile=False):
    """KerasCV's own `generate_image`, two passes a step, with random weights and without its vocabulary."""
    os.environ["KERAS_BACKEND"] = backend
    import keras
    from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, stable_diffusion, text_encoder

    keras.config.set_dtype_policy(dtype)
    keras.config.disable_interactive_logging()
    batch_size, side, *_ = CASES[case]

    class Pipeline(stable_diffusion.StableDiffusionBase):
        tokenizer = text_encoder = diffusion_model = decoder = None  # theirs download

    sd, models = Pipeline(side, side), {"download_weights": False}
    sd.text_encoder = text_encoder.TextEncoder(77, **models)
    sd.diffusion_model = diffusion_model.DiffusionModel(side, side, 77, **models)
    sd.decoder = decoder.Decoder(side, side, **models)
    for model in (sd.text_encoder, sd.diffusion_model, sd.decoder):
        model.compile(jit_compile=jit_compile)
        model.predict_on_batch = functools.partial(_from_numpy, model.predict_on_batch)
    sd.tokenizer = argparse.Namespace(encode=lambda _: [49406, 736, 3055, 525, 320, 1746, 5994, 49407])
    predict, passes = sd.diffusion_model.predict_on_batch, itertools.count(1)

    def draw(tick):
        def counted(inputs):
            output = predict(inputs)
            if next(passes) % 2 == 0:
                tick()
            return output

        sd.diffusion_model.predict_on_batch = counted
        sd.text_to_image(PROMPT, None, batch_size, steps, GUIDANCE, seed=0)

    return timed(draw)


def _from_numpy(predict, inputs):
    """OpenVINO's `predict_on_batch` takes arrays alone."""
    import keras

    return predict(keras.tree.map_structure(keras.ops.convert_to_numpy, inputs))


OURS = {
    "tensorflow_bfloat16": functools.partial(keras_sd, backend="tensorflow", dtype="bfloat16"),
    "openvino_bfloat16": functools.partial(keras_sd, backend="openvino", dtype="bfloat16"),
    "tensorflow_float32": functools.partial(keras_sd, backend="tensorflow", dtype="float32"),
    "openvino_float32": functools.partial(keras_sd, backend="openvino", dtype="float32"),
}
DIFFUSERS = {
    "diffusers_bfloat16_channels_last": functools.partial(diffusers, dtype="bfloat16", channels_last=True),
    "diffusers_bfloat16": functools.partial(diffusers, dtype="bfloat16"),
    "diffusers_float32": functools.partial(diffusers, dtype="float32"),
    "diffusers_bfloat16_compiled": functools.partial(diffusers, dtype="bfloat16", channels_last=True, compiled=True),
}
KERAS_CV = {  # widths of SD v1 alone
    "keras_cv_bfloat16": functools.partial(keras_cv, dtype="bfloat16"),
    "keras_cv_bfloat16_xla": functools.partial(keras_cv, dtype="bfloat16", jit_compile=True),
    "keras_cv_float32": functools.partial(keras_cv, dtype="float32"),
    "keras_cv_float32_xla": functools.partial(keras_cv, dtype="float32", jit_compile=True),
    "keras_cv_openvino": functools.partial(keras_cv, dtype="float32", backend="openvino"),
}
RUNNERS = {**OURS, **DIFFUSERS, **KERAS_CV}


def peers(case):
    """The peers that can draw a case."""
    return [*DIFFUSERS, *(KERAS_CV if case != "emoji" else ())]


def alternated(ours, theirs):
    """Both lists in one, ours and theirs in turn as long as there are both."""
    return [name for pair in itertools.zip_longest(ours, theirs) for name in pair if name is not None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], help="default: all")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=[*OURS], help="default: all")
    parser.add_argument("--theirs", nargs="+", choices={**DIFFUSERS, **KERAS_CV}, help="default: all")
    parser.add_argument("--steps", type=int, help="denoising steps of each picture, from 3 (default: the case's)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, those of earlier calls included (default 3)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of earlier calls")
    parser.add_argument("--run", choices=RUNNERS, help="one runner, on the first case")
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(RUNNERS[args.run](args.case[0], args.steps or CASES[args.case[0]][3])))
    write_apart()
    for case in args.case:
        theirs = [name for name in args.theirs or peers(case) if name in peers(case)]
        steps = args.steps or CASES[case][3]

        def run(name, case=case, steps=steps):
            return measure("benchmarks.inference", "--run", name, "--case", case, "--steps", steps)

        kept = case if steps == CASES[case][3] else f"{case}, {steps} steps"
        rounds = in_turn("inference", kept, alternated(args.ours, theirs), args.rounds, run, args.fresh)
        for mine, other in itertools.product(args.ours, theirs):
            if values := ratios(rounds, mine, other, "seconds"):
                print(f"{TITLES[case]}, a step, {mine} / {other}: {spread(values)}", flush=True)


if __name__ == "__main__":
    main()
