"""Pictures against steps for every sampler, on the embedded model: `python -m benchmarks.quality`

Fewer steps at the same quality are the cheapest speed. Captions of trained (emoji, background) pairs, fixed seeds,
guidance 7.5. Distance is that to the same sampler's picture of 200 steps (root mean square of the pixels, 0 … 255, mean
over the pictures), for samplers without fresh noise; the score is the part of the pictures whose emoji and background
are both right (`benchmarks.emoji_score`, which needs Debian's fonts-noto-color-emoji).

Prints a table, keeps `runs/bench/quality.json`, and plots `docs/quality.png`.
"""

import argparse
import json
import pathlib

import numpy as np

from benchmarks.paired import load, markdown, save

STEPS, REFERENCE = (5, 8, 12, 16, 25, 50), 200
PLOT = pathlib.Path(__file__).parents[1] / "docs" / "quality.png"
SHOWN = {"ddim": "#4c72b0", "plms": "#8172b3", "euler_a": "#55a868", "dpmpp_2m": "#c44e52", "unipc": "#dd8452"}


def measure(names, count, results):
    """Fills `results["samplers"]`: sampler → steps → {"evaluations", "score", "distance"}; saves after each."""
    from benchmarks.emoji_score import pairs_of, right
    from keras_sd import StableDiffusion, make_table
    from keras_sd.presets import locate
    from keras_sd.training.emoji_pictures import caption

    sd = StableDiffusion.from_preset("emoji")
    captions = json.loads((locate("emoji") / "captions.json").read_text())
    pairs = pairs_of(captions, False, count)
    prompts = [caption(*pair) for pair in pairs]

    def draw(name, steps):
        return sd.text_to_image(prompts, num_steps=steps, sampler=name, seed=0, progress=False)

    for name in names:
        known, reference = results["samplers"].setdefault(name, {}), None
        for steps in STEPS:
            if str(steps) in known:
                continue
            images, table = draw(name, steps), make_table(name, sd.scheduler[0], steps)
            one = {"evaluations": len(table), "score": float(np.mean(right(images, captions, pairs).all(axis=0)))}
            if not table.stochastic:
                reference = draw(name, REFERENCE) if reference is None else reference
                one["distance"] = distance(images, reference)
            known[str(steps)] = one
            save("quality", results)


def distance(images, others):
    """Mean over two batches of pictures (B, H, W, 3) of the root mean square difference of their pixels, 0 … 255."""
    return float(np.sqrt(np.square(images - others.astype("float64")).mean(axis=(1, 2, 3))).mean())


def table(samplers):
    """Markdown: distance and score of every sampler at every number of steps."""
    head = ["sampler", *(f"{steps} steps" for steps in STEPS)]
    rows = ([f"`{name}`", *(cell(known.get(str(steps))) for steps in STEPS)] for name, known in samplers.items())
    return markdown(head, rows)


def cell(one):
    if one is None:
        return "–"
    return f"{one['distance']:.1f}, {one['score']:.0%}" if "distance" in one else f"{one['score']:.0%}"


def plot(samplers, path=PLOT):
    """Distance and score against evaluations of the network, which is what takes the time; some samplers stand out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, (key, factor, title) in zip(
        panels, (("distance", 1, "distance to 200 steps, grey levels"), ("score", 100, "emoji and background right, %"))
    ):
        labels = []
        for name, known in samplers.items():
            points = [(one["evaluations"], factor * one[key]) for one in known.values() if key in one]
            if not points:
                continue
            colour = SHOWN.get(name, "#c8c8c8")
            axes.plot(*zip(*points), color=colour, lw=2 if name in SHOWN else 1, zorder=2 + (name in SHOWN))
            if name in SHOWN:
                labels.append((*points[0], name, colour))
        label(axes, labels)
        axes.set(title=title, xlabel="evaluations of the network", xscale="log", xlim=(2.5, 105))
        axes.set_xticks([5, 8, 12, 16, 25, 50, 100], ["5", "8", "12", "16", "25", "50", "100"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label(axes, labels):
    """Writes names left of where their lines begin, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    taken = -np.inf
    for x, y, name, colour in sorted(labels, key=lambda one: one[1]):
        place = taken = max(y, taken + 0.05 * (high - low))
        axes.annotate(name, (x, y), (2.55, place), color=colour, va="center", fontsize=9)


def main():
    from keras_sd import SAMPLERS

    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=[*SAMPLERS], help="default: all")
    parser.add_argument("--count", type=int, default=20, help="pictures of each (default 20)")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls measured")
    args = parser.parse_args()
    results = {} if args.fresh else load("quality")
    if results.get("count") != args.count:
        results = {"count": args.count, "samplers": {}}
    measure(args.sampler, args.count, results)
    print(table(results["samplers"]))
    plot(results["samplers"])


if __name__ == "__main__":
    main()
