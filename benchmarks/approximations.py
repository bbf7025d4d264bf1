"""What the options cost that are fast but not exact: `python -m benchmarks.approximations`

For each option, on the same seeds: PSNR to the pictures that the embedded model draws without it, how many show the
emoji that was asked for (see `benchmarks.emoji_score`), and the time of a run with it over that of one without it, in
turn in one process: of the embedded model, and of SD v1 at full size with random weights in bfloat16. Fewer steps stand
below for comparison: the cheapest speed there is. Keeps `runs/bench/approximations.json`.
"""

import argparse
import json
import time

import numpy as np

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.int8 import psnr
from benchmarks.paired import load, markdown, save, spread
from keras_sd import Denoiser, StableDiffusion, make_table
from keras_sd.noise import initial_noise

CASES = {  # name: preset, dtype, steps of a run, pairs of runs
    "emoji": ("emoji", None, 25, 5),
    "512": (FOLDER, "bfloat16", 10, 2),
}
COUNT = 20  # pictures of each option
ROWS = [  # name, options of the step, options of the table
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


def draw(sd, steps, step, table):
    """(part of the emoji that came out right, the pictures)."""
    from benchmarks.emoji_score import pairs_of, score
    from keras_sd.presets import locate

    captions = json.loads((locate("emoji") / "captions.json").read_text())
    sd.cache_interval, sd.token_merging = step.get("cache_interval", 1), step.get("token_merging", 0.0)
    options = {**table, "num_steps": round(steps * table.get("num_steps", 1))}
    (right, _), drawn = score(sd, captions, pairs_of(captions, True, COUNT), **options)
    return right, drawn


def runner(sd, step, options):
    """A function number of steps → seconds of that run of the denoising loop."""
    context = [sd.encode_text(prompt) for prompt in ("an apple", "")]
    latent = initial_noise(0, 1, sd.latent_shape())
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


def cost(exact, pictures):
    """How near pictures are to the exact ones (dB), and the part of them that shows what was asked."""
    right, drawn = pictures
    return {"psnr": [psnr(*pair) for pair in zip(drawn, exact)], "emoji_right": right}


def measure(case, fresh):
    """Measures what is not in `runs/bench/` yet, and keeps it there option by option."""
    preset, dtype, steps, rounds = CASES[case]
    results = load("approximations")
    known = results["cases"][case] = {} if fresh else results["cases"].get(case, {})
    if {name for name, *_ in ROWS} <= set(known):
        return
    sd = StableDiffusion.from_preset(preset, dtype=dtype)
    drawn = draw(sd, steps, {}, {})[1] if case == "emoji" else None
    exact = runner(sd, {}, {})
    exact(2)
    for name, step, table in ROWS:
        if name not in known:
            known[name] = {} if drawn is None else cost(drawn, draw(sd, steps, step, table))
            run = runner(sd, step, table)
            run(6)  # every kind of row is compiled
            known[name]["time"] = [run(steps) / exact(steps) for _ in range(rounds)]
            save("approximations", results)


def table(cases):
    """Markdown, a row for each option; what was not measured is a dash."""
    rows = []
    for name, *_ in ROWS:
        known = cases.get("emoji", {}).get(name, {})
        near = f"{np.mean(known['psnr']):.1f} ({min(known['psnr']):.1f})" if known else "–"
        right = f"{known['emoji_right']:.0%}" if known else "–"
        times = (spread(cases.get(case, {}).get(name, {}).get("time")) for case in CASES)
        rows.append([f"`{name}`" if "=" in name else name, near, right, *times])
    head = ["option", "PSNR, dB: mean (worst)", "emoji right", "time, embedded model", "time, 512×512"]
    return markdown(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], help="default: all")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls measured")
    args = parser.parse_args()
    if "512" in args.case:
        write_apart()
    for case in args.case:
        measure(case, args.fresh)
    print(table(load("approximations")["cases"]))


if __name__ == "__main__":
    main()
