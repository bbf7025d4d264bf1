"""Measuring in turn: every run a process of its own, rounds kept in `runs/bench/`, and ratios of runs of one round.

What else the machine does falls on both sides of a round alike, so a ratio means more than the times it is made of.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).parents[1] / "runs" / "bench"
PACKAGES = "tensorflow keras openvino jax torch diffusers transformers keras-cv numpy".split()


# === One run ===


def process(*arguments, limit=3600, **environment):
    """Runs `python …` afresh: (seconds, what it printed). RuntimeError with its last words where it fails."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {limit} s") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(last[0][:200])
    return time.perf_counter() - start, done.stdout


def measure(*command):
    """The JSON that `python -m …` prints last; {"error": …} where it fails."""
    try:
        return json.loads(process("-m", *command)[1].splitlines()[-1])
    except RuntimeError as error:
        return {"error": str(error)}


def timed(draw, cold=1):
    """Draws some pictures cold and one warm.

    Args:
        draw: function (tick) that draws a picture and calls `tick` after each denoising step.
        cold: how many pictures it takes until everything is compiled.

    Returns:
        dict: `seconds` of the last two pictures' steps, without the first two of the one and the first of the other,
        which text and compilation are in; `end_to_end`, seconds of the last picture; `peak_memory` in bytes.
    """
    pictures = []
    for _ in range(cold + 1):
        ticks = [time.perf_counter()]
        draw(lambda *_, ticks=ticks: ticks.append(time.perf_counter()))
        end = time.perf_counter()
        pictures.append([later - earlier for earlier, later in zip(ticks, ticks[1:])])
    seconds = [*pictures[-2][2:], *pictures[-1][1:]]
    return {"seconds": seconds, "end_to_end": end - ticks[0], "peak_memory": peak_memory()}


def peak_memory():
    """Most bytes that this process was resident with; Linux. Imports nothing, which would count."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


# === Rounds ===


def in_turn(name, case, runners, rounds, run, fresh=False):
    """Runs all of `runners` in turn until there are `rounds` rounds of them, those of earlier calls included.

    A runner that fails is kept as its error and not tried again by a later round.

    Args:
        name: the file is `runs/bench/<name>.json`; it is written after every round.
        case: which list of rounds in it.
        runners: names; ours and theirs alternate best.
        run: function name → dict of what was measured.
        fresh: forget the rounds of earlier calls.

    Returns:
        list of rounds, each a dict runner → what `run` returned.
    """
    results = load(name)
    known = [] if fresh else results["cases"].get(case, [])
    results["cases"][case] = known
    while sum(set(runners) <= set(one) for one in known) < rounds:
        failed = {runner: one[runner] for one in known for runner in one if "error" in one[runner]}
        latest = {}
        for runner in runners:
            latest[runner] = failed[runner] if runner in failed else run(runner)
            print(f"{name} {case}, {runner}: {shown(latest[runner])}", file=sys.stderr, flush=True)
        known.append(latest)
        save(name, {**results, "machine": machine()})
    return known


def shown(result):
    """A run in a line, for whoever watches."""
    if "error" in result:
        return f"failed: {result['error']}"
    numbers = ((key, statistics.median(v) if isinstance(v, list) else v) for key, v in result.items())
    return ", ".join(f"{key} {value:.3g}" for key, value in numbers if isinstance(value, (int, float)))


def load(name):
    """{"cases": {case: rounds}, …}, empty where nothing was measured yet."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": {}}


def save(name, results):
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = FOLDER / f".{name}.json.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(FOLDER / f"{name}.json")


# === Ratios, and tables of them ===


def ratios(rounds, ours, theirs, value):
    """value(ours) / value(theirs) of every round that has both; `value` is a key whose lists count as their median."""
    pairs = ((one.get(ours, {}).get(value), one.get(theirs, {}).get(value)) for one in rounds)
    return [_middle(a) / _middle(b) for a, b in pairs if a and b]


def spread(values, digits=2):
    """`median (least … greatest)` of ratios, or a dash."""
    if not values:
        return "–"
    middle, least, most = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} … {most})"


def markdown(head, rows):
    """A table; its first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def best(rounds, runners, value):
    """The runner with the least median of a value, of those that ran in the most rounds; None where none has it."""
    values = {r: [_middle(one[r][value]) for one in rounds if value in one.get(r, {})] for r in runners}
    most = max(map(len, values.values()), default=0)
    often = [r for r in values if most and len(values[r]) == most]
    return min(often, key=lambda r: statistics.median(values[r]), default=None)


def _middle(value):
    return statistics.median(value) if isinstance(value, list) else value


# === Where ===


def machine():
    """The processor, its cores and memory, and the versions measured."""
    info, memory = (pathlib.Path("/proc", name).read_text() for name in ("cpuinfo", "meminfo"))
    flags = set(re.search(r"flags\s*:(.*)", info)[1].split())
    units = "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16".split()
    return {
        "processor": re.search(r"model name\s*:\s*(.*)", info)[1],
        "cores": os.cpu_count(),
        "memory_gb": round(int(re.search(r"MemTotal:\s*(\d+)", memory)[1]) * 1024 / 1e9),
        "instructions": [unit for unit in units if unit in flags],
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
    }


def installed(name):
    """Whether there is a distribution of that name."""
    return any(importlib.metadata.distributions(name=name))
