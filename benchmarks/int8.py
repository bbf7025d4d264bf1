"""What do int8 weights save, and what do they cost? `python -m benchmarks.int8`

    python -m benchmarks.int8                  all of it, as Markdown; numbers in runs/bench/int8.json
    python -m benchmarks.int8 --draw int8      one full-size picture; prints peak memory and seconds of steps as JSON

Quality is that of the embedded model: pictures of the same prompts and seeds in bfloat16, with float and with int8
weights. Size, memory and speed are those of SD v1's full size with random weights, each picture in a process of its
own, in turn.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
from unittest import mock

import numpy as np

from benchmarks.emoji_score import pairs_of, score
from benchmarks.full_size import FOLDER, write_apart
from benchmarks.paired import in_turn, load, markdown, measure, process, ratios, save, spread, timed
from keras_sd import StableDiffusion
from keras_sd.layers import winograd
from keras_sd.presets import locate

FOLDERS = {"int8": FOLDER.with_name("full_size_int8"), "bfloat16": FOLDER}
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
            "winograd": StableDiffusion.from_preset("emoji", dtype="bfloat16"),
        }
        scores, images = {}, {}
        for name, sd in models.items():
            by = winograd.by_rows if name == "winograd" else None  # its channels are too few for that by default
            with mock.patch.object(winograd, "faster", return_value=by):
                (scores[name], _), images[name] = score(sd, captions, pairs)
    ratios = {
        name: [psnr(*both) for both in zip(images[name], images["bfloat16"])] for name in models if name != "bfloat16"
    }
    return {"prompts": count, "emoji_right": scores, "psnr_to_bfloat16": ratios}


def psnr(image, other):
    """Peak signal-to-noise ratio of two uint8 pictures in dB, at most 99."""
    error = np.square(image.astype("float64") - other).mean()
    return min(99.0, float(10 * np.log10(255**2 / error))) if error else 99.0


def draw(folder):
    """A 512×512 picture with guidance in bfloat16, cold and warm; see `timed`."""
    sd = StableDiffusion.from_preset(folder, dtype="bfloat16")
    return timed(
        lambda tick: sd.text_to_image("an apple", num_steps=STEPS, seed=0, progress=False, callback=lambda *_: tick())
    )


def table(results):
    """The result as Markdown."""
    sizes, rounds = results["unet_bytes"], results["cases"]["512"]
    right, near = results["quality"]["emoji_right"], results["quality"]["psnr_to_bfloat16"]
    rows = [("U-Net's file, GB", *(f"{sizes[name] / 1e9:.2f}" for name in ("bfloat16", "int8")))]
    for what, value in (("a step at 512×512", "seconds"), ("peak memory of a 512×512 picture", "peak_memory")):
        rows.append((f"{what}, ratio", "1", spread(ratios(rounds, "int8", "bfloat16", value))))
    rows.append(("emoji right", f"{right['bfloat16']:.0%}", f"{right['int8']:.0%}"))
    rows.append(("median PSNR to the bfloat16 picture, dB", "", f"{statistics.median(near['int8']):.1f}"))
    rows.append(("the same, of float32's", "", f"{statistics.median(near['float32']):.1f}"))
    rows.append(("the same, with all convolutions by rows", "", f"{statistics.median(near['winograd']):.1f}"))
    return markdown(["", "bfloat16", "int8"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", choices=FOLDERS, help="one full-size picture with those weights")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, those of earlier calls included (default 3)")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls measured")
    args = parser.parse_args()
    if args.draw is not None:
        return print(json.dumps(draw(FOLDERS[args.draw])))
    results = {"cases": {}} if args.fresh else load("int8")
    if "quality" not in results:
        save("int8", {**results, "quality": quality()})
    write_apart()
    if not (FOLDERS["int8"] / "model_index.json").exists():
        process("-m", "keras_sd", "convert", FOLDER, FOLDERS["int8"], "--dtype", "int8")
    in_turn("int8", "512", [*FOLDERS], args.rounds, lambda name: measure("benchmarks.int8", "--draw", name))
    sizes = {name: (folder / UNET).stat().st_size for name, folder in FOLDERS.items()}
    save("int8", results := {**load("int8"), "unet_bytes": sizes})
    print(table(results))


if __name__ == "__main__":
    main()
