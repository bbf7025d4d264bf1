"""What do int8 weights save, and what do they cost? `python -m benchmarks.int8`

    python -m benchmarks.int8                  all of it, as Markdown; numbers in runs/bench/int8.json
    python -m benchmarks.int8 --draw FOLDER    one full-size picture; prints peak memory and seconds per step as JSON

Quality is that of the embedded model: pictures of the same prompts and seeds in bfloat16, with float and with int8
weights. Size, memory and speed are those of SD v1's full size with random weights, each picture in a process of its
own, in turn.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np

from benchmarks.emoji_score import pairs_of, score
from benchmarks.full_size import FOLDER, full_size_preset
from benchmarks.memory import run
from keras_sd import StableDiffusion
from keras_sd.presets import locate
from keras_sd.training.watching import peak_memory

INT8_FOLDER = FOLDER.with_name("full_size_int8")
RESULT = FOLDER.parent / "bench" / "int8.json"
UNET = pathlib.Path("unet", "diffusion_pytorch_model.safetensors")
STEPS = 5


def quality(count=20):
    """The embedded model: how near the pictures are (dB), and which show what was asked."""
    captions = json.loads((locate("emoji") / "captions.json").read_text())
    pairs = pairs_of(captions, False, count)
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusion.from_preset("emoji", dtype="float32").save_preset(folder, "int8")
        models = {
            "bfloat16": StableDiffusion.from_preset("emoji", dtype="bfloat16"),
            "int8": StableDiffusion.from_preset(folder, dtype="bfloat16"),
            "float32": StableDiffusion.from_preset("emoji", dtype="float32"),
        }
        scores, images = {}, {}
        for name, sd in models.items():
            (scores[name], _), images[name] = score(sd, captions, pairs)
    ratios = {name: [psnr(*both) for both in zip(images[name], images["bfloat16"])] for name in ("int8", "float32")}
    return {"prompts": count, "emoji_right": scores, "psnr_to_bfloat16": ratios}


def psnr(image, other):
    """Peak signal-to-noise ratio of two uint8 pictures in dB, at most 99."""
    error = np.square(image.astype("float64") - other).mean()
    return min(99.0, float(10 * np.log10(255**2 / error))) if error else 99.0


def draw(folder):
    """Draws a 512×512 picture with guidance in bfloat16; the first step, which compiles, is not timed."""
    times = []
    sd = StableDiffusion.from_preset(folder, dtype="bfloat16")
    sd.text_to_image(
        "an apple", num_steps=STEPS, seed=0, progress=False, callback=lambda *_: times.append(time.perf_counter())
    )
    return {"peak": peak_memory(), "seconds_per_step": statistics.median(np.diff(times))}


def full_size(rounds):
    """Files, and pictures by turns."""
    folders = {"bfloat16": full_size_preset(), "int8": INT8_FOLDER}
    if not (INT8_FOLDER / "model_index.json").exists():
        run("keras_sd", "convert", str(FOLDER), str(INT8_FOLDER), "--dtype", "int8")
    runs = [
        {
            name: json.loads(run("benchmarks.int8", "--draw", str(folder)).splitlines()[-1])
            for name, folder in folders.items()
        }
        for _ in range(rounds)
    ]
    return {"unet_bytes": {name: (folder / UNET).stat().st_size for name, folder in folders.items()}, "runs": runs}


def table(result):
    """The result as Markdown."""
    sizes, runs = result["full_size"]["unet_bytes"], result["full_size"]["runs"]
    ratios = [one["int8"]["seconds_per_step"] / one["bfloat16"]["seconds_per_step"] for one in runs]
    right, near = result["quality"]["emoji_right"], result["quality"]["psnr_to_bfloat16"]
    rows = [("U-Net's file, GB", *(f"{sizes[name] / 1e9:.2f}" for name in ("bfloat16", "int8")))]
    peaks = (f"{max(one[name]['peak'] for one in runs) / 1e9:.2f}" for name in ("bfloat16", "int8"))
    rows.append(("peak memory of a 512×512 picture, GB", *peaks))
    rows.append(
        ("seconds per step, ratio", "1", f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
    )
    rows.append(("emoji right", f"{right['bfloat16']:.0%}", f"{right['int8']:.0%}"))
    rows.append(("median PSNR to the bfloat16 picture, dB", "", f"{statistics.median(near['int8']):.1f}"))
    rows.append(("the same, of float32's", "", f"{statistics.median(near['float32']):.1f}"))
    return "\n".join(["| | bfloat16 | int8 |", "|---|---|---|", *("| {} | {} | {} |".format(*row) for row in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", metavar="FOLDER", help="one full-size picture with the weights of a folder")
    parser.add_argument("--rounds", type=int, default=3, help="pictures of each kind (default 3)")
    args = parser.parse_args()
    if args.draw is not None:
        return print(json.dumps(draw(args.draw)))
    result = {"quality": quality(), "full_size": full_size(args.rounds)}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
