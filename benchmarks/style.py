"""The style experiment: the embedded model learns another hand of drawings, Fluent's black icons.

    pip install resvg_py
    python -m benchmarks.style pictures runs/style    draws the data set: 500 pictures to learn, 20 that stay unseen
    python finetune.py --pretrained_ckpt emoji --dataset_archive runs/style/learn … --out runs/full
    python -m benchmarks.style score runs/style emoji runs/full

Each emoji of the 20 prompts is unseen in the new style. `score` draws them with every preset given and prints the mean
distance (root mean square difference of the pixels, 0 … 255) to the new style's rendering of that emoji, and of how
many the nearest of all the style's renderings on that background is the right one. LoRA files follow a preset's name
after a comma: `emoji,runs/lora/lora.safetensors`.

The icons are Microsoft's Fluent emoji (MIT licence), from the npm package @iconify-json/fluent-emoji-high-contrast.
"""

import argparse
import csv
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile

import numpy as np
from PIL import Image

from keras_sd.png import write_png
from keras_sd.presets import locate
from keras_sd.training.emoji_pictures import SIZES, caption

PACKAGE = "@iconify-json/fluent-emoji-high-contrast@1.2.6"
SIDE = 64
LEARN, UNSEEN = 500, 20


def read_icons(characters):
    """{name: RGBA picture, cropped to its ink and square} of those characters that the package has."""
    import resvg_py

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (path,) = pathlib.Path(folder).glob("*.tgz")
        with tarfile.open(path) as archive:
            icons, codes = (json.load(archive.extractfile(f"package/{name}.json")) for name in ("icons", "chars"))
    side, drawings = icons.get("width", 16), {}
    for name, character in characters.items():
        icon = icons["icons"].get(codes.get(f"{ord(character):x}", codes.get(f"{ord(character):x}-fe0f")))
        if icon is not None:
            box = f"0 0 {icon.get('width', side)} {icon.get('height', side)}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" color="black">{icon["body"]}</svg>'
            picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=160)))).convert("RGBA")
            ink = picture.crop(picture.getbbox())
            square = Image.new("RGBA", (max(ink.size), max(ink.size)))
            square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
            drawings[name] = square
    return drawings


def render(drawing, background):
    """A drawing over a flat colour, composed as the embedded model's own pictures are: uint8 (64, 64, 3)."""
    side = round(SIZES[""] * SIDE)
    ink = drawing.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    picture = Image.new("RGBA", (SIDE, SIDE), (*background, 255))
    picture.alpha_composite(ink, ((SIDE - side) // 2, (SIDE - side) // 2))
    return np.asarray(picture.convert("RGB"))


def draw_pictures(folder):
    """Writes `learn/` (pictures and data.csv), and `unseen/`: every icon on every background, and prompts.json."""
    known = json.loads((locate("emoji") / "captions.json").read_text())
    backgrounds = {
        name: rgb for name, rgb in known["backgrounds"].items() if name != "black"
    }  # black ink on it is none
    drawings = read_icons(known["emoji"])
    random = np.random.default_rng(0)
    names = [str(name) for name in random.permutation(sorted(drawings))]
    unseen, seen = names[:UNSEEN], names[UNSEEN:]
    pairs = [(name, str(ground)) for name in seen for ground in random.permutation(list(backgrounds))[:2]][:LEARN]
    (folder / "learn").mkdir(parents=True)
    with open(folder / "learn" / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "caption"])
        for i, (name, ground) in enumerate(pairs):
            write_png(folder / "learn" / f"{i:03d}.png", render(drawings[name], backgrounds[ground]), caption(name, ground))
            table.writerow([f"{i:03d}.png", caption(name, ground)])
    prompts = [[name, str(ground)] for name, ground in zip(unseen, random.choice(list(backgrounds), UNSEEN))]
    renderings = np.stack([[render(drawings[name], rgb) for rgb in backgrounds.values()] for name in names])
    np.savez_compressed(folder / "unseen.npz", names=names, backgrounds=list(backgrounds), renderings=renderings)
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1))


def score(images, folder):
    """(mean distance to the style's renderings, part of the pictures whose nearest rendering is the right one)."""
    style = np.load(folder / "unseen.npz")
    names, backgrounds = list(style["names"]), list(style["backgrounds"])
    distances, right = [], 0
    for image, (name, ground) in zip(images, json.loads((folder / "prompts.json").read_text())):
        candidates = style["renderings"][:, backgrounds.index(ground)].astype("float64")
        distance = np.sqrt(np.square(candidates - image).mean((1, 2, 3)))
        distances.append(distance[names.index(name)])
        right += names[int(np.argmin(distance))] == name
    return float(np.mean(distances)), right / len(images)


def draw(model, folder, num_steps=25, scale=3.0):
    """The 20 prompts, drawn by a preset, or by one with a LoRA: "PRESET,LORA"."""
    from keras_sd import StableDiffusion

    preset, *lora = model.split(",")
    sd = StableDiffusion.from_preset(preset)
    for path in lora:
        sd.load_lora(path)
    prompts = [caption(name, ground) for name, ground in json.loads((folder / "prompts.json").read_text())]
    return sd.text_to_image(prompts, num_steps=num_steps, unconditional_guidance_scale=scale, seed=0, progress=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pictures").add_argument("folder", type=pathlib.Path)
    command = commands.add_parser("score")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("models", nargs="+", help="presets, the first is the base; PRESET,LORA with a LoRA")
    command.add_argument("--out", help="PNG: a row of pictures per model")
    args = parser.parse_args()
    if args.command == "pictures":
        return draw_pictures(args.folder)
    rows, base = [], None
    for model in args.models:
        images = draw(model, args.folder)
        distance, right = score(images, args.folder)
        base = base or distance
        print(f"{model}: distance {distance:.1f} ({distance / base - 1:+.0%}), nearest is the right one {right:.0%}")
        rows.append(np.concatenate(images, axis=1))
    if args.out:
        write_png(args.out, np.concatenate(rows), "")


if __name__ == "__main__":
    main()
