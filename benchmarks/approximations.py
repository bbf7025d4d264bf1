"""What the options cost that are fast but not exact: `python -m benchmarks.approximations`

For each option, on the same seeds: PSNR to the pictures drawn without it, how many show the emoji that was asked for
(see `benchmarks.emoji_score`), and the time of a step without it over that with it, run in turn, the median of pairs.
Fewer steps stand below for comparison: the cheapest speed there is. Writes `runs/bench/approximations.json`.

    python -m benchmarks.approximations --preset runs/full_size --no-score --dtype bfloat16 --rounds 3
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import numpy as np

from keras_sd import Denoiser, StableDiffusion, make_table
from keras_sd.noise import initial_noise

OUT = pathlib.Path(__file__).parents[1] / "runs" / "bench" / "approximations.json"
ROWS = [  # name, options of the step, options of the table
    ("exact", {}, {}),
    ("cache_interval=2", {"cache_interval": 2}, {}),
    ("cache_interval=3", {"cache_interval": 3}, {}),
    ("cache_interval=5", {"cache_interval": 5}, {}),
    ("token_merging=0.25", {"token_merging": 0.25}, {}),
    ("token_merging=0.5", {"token_merging": 0.5}, {}),
    ("guidance_interval=(0, 0.8)", {}, {"guidance_interval": (0, 0.8)}),
    ("guidance_interval=(0, 0.6)", {}, {"guidance_interval": (0, 0.6)}),
    ("half the steps", {}, {"num_steps": 1 / 2}),
    ("a third of the steps", {}, {"num_steps": 1 / 3}),
]


def psnr(picture, exact):
    """Peak signal-to-noise ratio of a uint8 picture in dB."""
    return 10 * np.log10(255**2 / max(np.mean((picture.astype("float64") - exact) ** 2), 1e-9))


def pictures(sd, pairs, args):
    """For each row: (part of the emoji that came out right, the pictures)."""
    from benchmarks.emoji_score import score
    from keras_sd.presets import locate

    captions = json.loads((locate(args.preset) / "captions.json").read_text())
    for name, step, table in ROWS:
        sd.cache_interval, sd.token_merging = step.get("cache_interval", 1), step.get("token_merging", 0.0)
        options = {**table, "num_steps": round(args.steps * table.get("num_steps", 1))}
        (right, _), drawn = score(sd, captions, pairs(captions), **options)
        yield right, drawn


def runner(sd, context, latent, step, options, args):
    """A function number of steps → seconds of that run of the denoising loop."""
    scheduler, sampler, own = sd.scheduler
    denoiser = Denoiser(sd.diffusion_model, **step)
    options = {**own, "guidance_scale": 7.5, **options}
    part = options.pop("num_steps", 1)

    def run(steps):
        table = make_table(sampler, scheduler, max(round(steps * part), 1), **options)
        start = time.perf_counter()
        denoiser.denoise(latent * table.init_noise_scale, *context, table, progress=False)
        return time.perf_counter() - start

    return run


def speeds(sd, args):
    """For each row the ratios of the exact run's seconds to those of the row's, in turn."""
    context = [np.repeat(sd.encode_text(prompt), args.batch_size, axis=0) for prompt in ("an apple", "")]
    latent = initial_noise(0, args.batch_size, sd.latent_shape())
    exact = runner(sd, context, latent, {}, {}, args)
    exact(2)
    for _, *options in ROWS:
        run = runner(sd, context, latent, *options, args)
        run(6)  # every kind of row is compiled
        yield [exact(args.steps) / run(args.steps) for _ in range(args.rounds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--preset", default="emoji", help="preset or folder (default emoji)")
    parser.add_argument("--no-score", action="store_true", help="time alone, for presets that draw no emoji")
    parser.add_argument("--count", type=int, default=20, help="pictures of each option (default 20)")
    parser.add_argument("--steps", type=int, default=25, help="steps (default 25)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs of each option (default 5)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures in a run that is timed (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the models")
    parser.add_argument("--sheet", help="PNG: the first pictures of each option, a row for each")
    args = parser.parse_args()
    sd = StableDiffusion.from_preset(args.preset, dtype=args.dtype)
    results = [{"option": name} for name, *_ in ROWS]
    if not args.no_score:
        from benchmarks.emoji_score import pairs_of

        drawn = []
        for result, (right, images) in zip(results, pictures(sd, lambda x: pairs_of(x, True, args.count), args)):
            drawn.append(images)
            result["psnr"] = [float(psnr(*pair)) for pair in zip(images, drawn[0])]
            result["emoji_right"] = right
        if args.sheet:
            from keras_sd.png import write_png

            write_png(args.sheet, np.concatenate([np.concatenate(images[:12], axis=1) for images in drawn]), "")
    print("| option | PSNR, dB: mean (worst) | emoji right | speed (spread) |\n|---|---|---|---|")
    for result, ratios in zip(results, speeds(sd, args)):
        result["speed"] = ratios
        distance = result.get("psnr", [])
        cells = [
            f"`{result['option']}`" if "=" in result["option"] else result["option"],
            f"{np.mean(distance):.1f} ({min(distance):.1f})" if distance and result is not results[0] else "",
            f"{result['emoji_right']:.0%}" if distance else "",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    OUT.write_text(json.dumps({"backend": backend, **vars(args), "results": results}, indent=1))


if __name__ == "__main__":
    main()
