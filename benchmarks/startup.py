"""From command to first picture, cold, against a script with diffusers: `python -m benchmarks.startup`

Both sides are fresh processes, in turn; the weights are on disk, and after the first round in the system's file cache.
SD v1 at full size with random weights in bfloat16, and the embedded model, which is also set against `import
tensorflow` alone. The stages of our side are those of a third process, as the command has no clock in it.
"""

import argparse
import json
import pathlib
import tempfile
import time

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.inference import open_diffusers
from benchmarks.paired import in_turn, process, ratios, spread

PROMPT = "red apple on a blue background"
CASES = {  # preset, side in pixels, dtype
    "512": (FOLDER, 512, "bfloat16"),
    "emoji": ("emoji", 64, "float32"),
}
STEPS = 4
STAGES = ("import", "load", "first_step", "later_steps", "decode")
RUNNERS = {
    "512": ("keras_sd", "diffusers", "keras_sd_openvino", "stages"),
    "emoji": ("keras_sd", "diffusers", "stages", "import_tensorflow"),
}
PAIRS = (("keras_sd", "diffusers"), ("keras_sd_openvino", "diffusers"), ("keras_sd", "import_tensorflow"))


class Stopwatch(dict):
    """Name of a stage → seconds since the one before; a stage that comes again adds up."""

    def __init__(self):
        self.last = time.perf_counter()

    def __call__(self, name):
        now = time.perf_counter()
        self[name], self.last = self.get(name, 0.0) + now - self.last, now

    def step(self, *_):
        self("later_steps" if "first_step" in self else "first_step")


def stages(preset, side, dtype, out):
    """What the command does, with a clock."""
    clock = Stopwatch()
    from keras_sd import StableDiffusion
    from keras_sd.png import write_png

    clock("import")
    sd = StableDiffusion.from_preset(preset, dtype=dtype)
    sd.text_encoder, sd.diffusion_model, sd.decoder  # noqa: B018  (read at first use)
    clock("load")
    options = {"num_steps": STEPS, "sampler": "ddim", "seed": 0, "progress": False, "callback": clock.step}
    write_png(out, sd.text_to_image(PROMPT, **options)[0], "")
    clock("decode")
    return clock


def diffusers(preset, side, dtype, out):
    """The same with diffusers."""
    clock = Stopwatch()
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401  (timed here)

    clock("import")
    pipe = open_diffusers(preset, dtype)
    clock("load")
    options = {"num_inference_steps": STEPS, "height": side, "width": side}
    options["callback_on_step_end"] = lambda *call: clock.step() or call[-1]
    pipe(PROMPT, **options).images[0].save(out)
    clock("decode")
    return clock


STAGED = {"stages": stages, "diffusers": diffusers}


def command(preset, side, dtype, out):
    """Our command line."""
    options = {"preset": preset, "dtype": dtype, "steps": STEPS, "sampler": "ddim", "seed": 0, "out": out}
    return ["-m", "keras_sd", "txt2img", PROMPT, *(f"--{name}={value}" for name, value in options.items())]


def run(runner, case):
    """Seconds of one fresh process, and its stages where it tells them."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.png"
        arguments = ["-m", "benchmarks.startup", "--run", runner, "--case", case, "--out", out]
        if runner.startswith("keras_sd"):
            arguments = command(*CASES[case], out)
        if runner == "import_tensorflow":
            arguments = ["-c", "import tensorflow"]
        try:
            seconds, said = process(*arguments, KERAS_BACKEND="openvino" if "openvino" in runner else "tensorflow")
        except RuntimeError as error:
            return {"error": str(error)}
        return {"seconds": seconds, **(json.loads(said.splitlines()[-1]) if runner in STAGED else {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, those of earlier calls included (default 5)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of earlier calls")
    parser.add_argument("--run", choices=STAGED, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(STAGED[args.run](*CASES[args.case[0]], args.out)))
    write_apart()
    for case in args.case:
        rounds = in_turn(
            "startup", case, RUNNERS[case], args.rounds, lambda name, case=case: run(name, case), args.fresh
        )
        for mine, other in PAIRS:
            if values := ratios(rounds, mine, other, "seconds"):
                print(f"{case}, {mine} / {other}: {spread(values)}", flush=True)
        for stage in STAGES:
            print(f"{case}, {stage}, ours / theirs: {spread(ratios(rounds, 'stages', 'diffusers', stage))}", flush=True)


if __name__ == "__main__":
    main()
