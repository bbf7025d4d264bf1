"""`benchmarks/RESULTS.md` and `docs/speed.png`, from what is in `runs/bench/`: `python -m benchmarks.results`

A section whose benchmark has not run is left out. `benchmarks/NOTES.md` is written by hand and put at the end.
"""

import pathlib
import statistics

from benchmarks import approximations, gpu, inference, int8, memory, optimisations, quality, startup
from benchmarks.paired import PACKAGES, best, load, markdown, ratios, spread

HERE = pathlib.Path(__file__).parent
PLOT = HERE.parent / "docs" / "speed.png"
INTRODUCTION = """# Results

Written by `make bench`. Every number is a ratio ours / theirs of two runs of one round, below 1 where ours takes less:
the median of the rounds, and in brackets the least and the greatest. Every run is a process of its own. Peaks of
memory that are no ratios are in GB (10⁹ bytes).
"""


def report():
    """The whole page, Markdown."""
    sections = [INTRODUCTION, where(), in_short(), *map(pictures, inference.CASES), first_picture(), peaks(), gains()]
    sections += [small(), inexact(), steps(), on_gpu(), (HERE / "NOTES.md").read_text()]
    return "\n".join(filter(None, sections))


def rows_of(name, case):
    return load(name)["cases"].get(case, [])


def named(runner):
    return runner.replace("keras_cv", "KerasCV").replace("_", " ")


# === Sections ===


def where():
    """The machine and the versions; several where not everything was measured with the same."""
    known = [load(name).get("machine") for name in ("inference", "startup", "memory", "optimisations", "gpu")]
    lines = []
    for one in known:
        if one:
            processor = "{processor}, {cores} cores, {memory_gb} GB".format(**one)
            versions = ", ".join(f"{name} {one[name]}" for name in ("python", *PACKAGES) if name in one)
            lines.append(f"- {processor}, {' '.join(one['instructions'])}; {versions}")
    lines = dict.fromkeys(lines)
    return "\n".join(["## Machine\n", *lines, ""]) if lines else None


def in_short():
    """The ratios that matter most."""
    rounds, first, peak = rows_of("inference", "512"), rows_of("startup", "512"), rows_of("memory", "pictures")
    ours, diffusers, keras_cv = (best(rounds, names, "seconds") for names in _families())
    pairs = [
        ("a step at 512×512, best against best", rounds, ours, diffusers, "seconds"),
        ("the same, our TensorFlow in bfloat16", rounds, "tensorflow_bfloat16", diffusers, "seconds"),
        ("the same, against KerasCV's best on TensorFlow", rounds, "tensorflow_bfloat16", keras_cv, "seconds"),
        ("the same, float32", rounds, "tensorflow_float32", "diffusers_float32", "seconds"),
        ("a step on OpenVINO, of KerasCV's network there", rounds, "openvino_bfloat16", "keras_cv_openvino", "seconds"),
        ("from command to first picture of 4 steps", first, "keras_sd", "diffusers", "seconds"),
        ("the same, on OpenVINO", first, "keras_sd_openvino", "diffusers", "seconds"),
        *(
            (f"peak memory of a picture, {memory.PICTURES[mine][0]}", peak, mine, other, "peak_memory")
            for mine in ("picture", "openvino", "low_memory")
            for other in memory.PEERS
        ),
    ]
    rows = [
        [what, f"{named(a)} / {named(b)}", spread(values)]
        for what, rounds, a, b, value in pairs
        if a and b and (values := ratios(rounds, a, b, value))
    ]
    return "## In short\n\n" + markdown(["what", "of", "ratio"], rows) if rows else None


def pictures(case):
    """One case of `benchmarks.inference`: a column for each of ours."""
    rounds = rows_of("inference", case)
    if not rounds:
        return None
    drawn = {name for one in rounds for name, result in one.items() if "seconds" in result}
    ours, theirs = ([name for name in names if name in drawn] for names in (inference.OURS, inference.peers(case)))
    parts = [f"## {inference.TITLES[case].capitalize()}\n"]
    measures = ("A denoising step", "seconds"), ("A warm picture", "end_to_end"), ("Peak memory", "peak_memory")
    for title, value in measures:
        rows = [[named(b), *(spread(ratios(rounds, a, b, value)) for a in ours)] for b in theirs]
        parts.append(markdown([title, *map(named, ours)], rows))
    failed = {name: result["error"] for one in rounds for name, result in one.items() if "error" in result}
    parts += [f"- {named(name)} did not run: {error}" for name, error in failed.items()] + [""] * bool(failed)
    return "\n".join(parts)


def first_picture():
    """From command to first picture, and its stages."""
    rows = []
    for case in startup.CASES:
        rounds = rows_of("startup", case)
        for mine, other in startup.PAIRS:
            rows.append([f"{case}: {named(mine)} / {named(other)}", ratios(rounds, mine, other, "seconds")])
        for stage in startup.STAGES:
            rows.append([f"{case}: {named(stage)}", ratios(rounds, "stages", "diffusers", stage)])
    rows = [[what, spread(values)] for what, values in rows if values]
    return (
        f"## From command to first picture, {startup.STEPS} steps\n\n" + markdown(["what", "ratio"], rows)
        if rows
        else None
    )


def peaks():
    tables = [memory.table(rounds, group) for group in memory.GROUPS if (rounds := rows_of("memory", group))]
    words = "A 512×512 picture in bfloat16, and parts of the work.\n"
    return "\n".join(["## Memory\n", words, *tables]) if tables else None


def gains():
    """With each optimisation / without it."""
    rows = []
    for name, (what, backend, timed, _) in optimisations.OPTIMISATIONS.items():
        if rounds := rows_of("optimisations", name):
            values = (spread(ratios(rounds, "with", "without", value)) for value in ("seconds", "peak_memory"))
            rows.append([f"{what} ({backend})", timed.__name__, *values])
    head = ["with / without", "of", "time", "peak memory"]
    return "## What each optimisation gains\n\n" + markdown(head, rows) if rows else None


def small():
    """int8 weights."""
    results = load("int8")
    words = """## int8 weights

Quality on the embedded model, all else at SD v1's full size.
"""
    return f"{words}\n{int8.table(results)}" if "unet_bytes" in results else None


def inexact():
    """Options that are fast but not exact."""
    cases = load("approximations")["cases"]
    words = f"""## Faster, less exact

Time of a run with an option / without it, and how near {approximations.COUNT} pictures of the embedded model are to the
exact ones of the same seeds. Fewer steps, all exact, for comparison.
"""
    return f"{words}\n{approximations.table(cases)}" if cases else None


def steps():
    results = load("quality")
    if "samplers" not in results:
        return None
    words = f"""## Quality against steps

Distance to the same sampler's picture of 200 steps (grey levels), and the part of {results["count"]} pictures whose
emoji and background are right; samplers with fresh noise have no such distance. `heun`, `dpm2` and `dpm2_a` evaluate
the network twice a step.

![Distance and score against evaluations](../docs/quality.png)
"""
    return f"{words}\n{quality.table(results['samplers'])}"


def on_gpu():
    """JAX against torch."""
    cases = load("gpu")["cases"]
    rows = [
        [
            f"{gpu.TITLES[case]}, {named(theirs)}",
            *(spread(ratios(rounds, ours, theirs, "seconds")) for ours in gpu.OURS),
        ]
        for case, rounds in cases.items()
        for theirs in gpu.THEIRS
    ]
    devices = {
        run["device"]: None for rounds in cases.values() for one in rounds for run in one.values() if "device" in run
    }
    words = f"## On a GPU: {', '.join(devices)}\n\nA whole picture of {gpu.STEPS} steps, bfloat16.\n"
    return f"{words}\n{markdown(['A warm picture', *map(named, gpu.OURS)], rows)}" if rows else None


# === Plot ===


def plot(path=PLOT):
    """Bars: a denoising step at 512×512 of every runner, in units of the best diffusers configuration's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rounds = rows_of("inference", "512")
    unit = best(rounds, inference.DIFFUSERS, "seconds")
    bars = {name: ratios(rounds, name, unit, "seconds") for name in inference.RUNNERS} if unit else {}
    bars = {name: statistics.median(values) for name, values in bars.items() if values}
    if not bars:
        return
    names = sorted(bars, key=bars.get, reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.34 * len(names)), layout="constrained")
    colours = ["#c44e52" if name in inference.OURS else "#b8b8b8" for name in names]
    labels = [f"keras_sd, {named(name)}" if name in inference.OURS else named(name) for name in names]
    drawn = axes.barh(labels, [bars[name] for name in names], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(1, color="#606060", lw=0.8, zorder=0)
    axes.set_title("time of a denoising step at 512×512, best diffusers configuration = 1", fontsize=10, loc="left")
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _families():
    return inference.OURS, inference.DIFFUSERS, [name for name in inference.KERAS_CV if name != "keras_cv_openvino"]


def main():
    (HERE / "RESULTS.md").write_text(report())
    plot()
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
