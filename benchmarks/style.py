"""The style experiment: the embedded model learns another hand of drawings, Fluent's flat emoji.

    pip install resvg_py
    python -m benchmarks.style pictures runs/style    draws the data set: 500 pictures
    python finetune.py --preset emoji --dataset_archive runs/style/learn … --out runs/full
    python -m benchmarks.style score runs/style emoji runs/full/preset

Of 250 emoji two backgrounds are learnt. Two kinds of 20 prompts are unseen in the new style: learnt emoji on another
background, and emoji that were not learnt at all. `score` draws them with every model given and prints the mean
distance (root mean square difference of the pixels, 0 … 255) to the new style's rendering, and of how many pictures the
nearest of all the style's renderings on that background is the right one. `emoji,FILE` is a preset with a LoRA.

The emoji are Microsoft's Fluent emoji (MIT licence), from the npm package @iconify-json/fluent-emoji-flat.
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

PACKAGE = "@iconify-json/fluent-emoji-flat@1.2.6"
SIDE = 64
LEARNT, COUNT = 250, 20


def read_drawings(characters):
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
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
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


def draw_pictures(folder, drawings, backgrounds, learnt=LEARNT, count=COUNT):
    """Writes `learn/` (pictures, data.csv), `prompts.json`, and `renderings.npz`: every emoji on every background.

    Args:
        folder: where to.
        drawings: {name: RGBA picture}.
        backgrounds: {name: (red, green, blue)}, three at least.
        learnt: number of emoji that are learnt.
        count: number of prompts of each kind.
    """
    random = np.random.default_rng(0)
    names = [str(name) for name in random.permutation(sorted(drawings))]
    grounds = {name: [str(ground) for ground in random.permutation(list(backgrounds))] for name in names}
    (folder / "learn").mkdir(parents=True)
    with open(folder / "learn" / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "caption"])
        for i, (name, ground) in enumerate((x, ground) for x in names[:learnt] for ground in grounds[x][:2]):
            text = caption(name, ground)
            write_png(folder / "learn" / f"{i:03d}.png", render(drawings[name], backgrounds[ground]), text)
            table.writerow([f"{i:03d}.png", text])
    chosen = {"learnt emoji": names[:learnt][:count], "other emoji": names[learnt:][:count]}
    prompts = {kind: [[name, grounds[name][2]] for name in names] for kind, names in chosen.items()}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1))
    renderings = np.stack([[render(drawings[name], rgb) for rgb in backgrounds.values()] for name in names])
    np.savez_compressed(folder / "renderings.npz", names=names, backgrounds=list(backgrounds), renderings=renderings)


def open_renderings(folder):
    """A function (name, background) → uint8 (64, 64, 3), and the list of names."""
    style = np.load(folder / "renderings.npz")
    names, backgrounds, renderings = list(style["names"]), list(style["backgrounds"]), style["renderings"]
    return lambda name, ground: renderings[names.index(name), backgrounds.index(ground)], names


def score(images, pairs, folder):
    """(mean distance to the style's renderings, part of the pictures whose nearest rendering is the right one)."""
    rendering, names = open_renderings(folder)
    distances, right = [], 0
    for image, (name, ground) in zip(images, pairs):
        distance = {x: np.sqrt(np.square(rendering(x, ground) - image.astype("float64")).mean()) for x in names}
        distances.append(distance[name])
        right += min(distance, key=distance.get) == name
    return float(np.mean(distances)), right / len(images)


def draw(model, pairs, num_steps=25, scale=2.0):
    """The prompts, drawn by a preset, or by one with a LoRA: "PRESET,LORA"."""
    from keras_sd import StableDiffusion

    preset, *lora = model.split(",")
    sd = StableDiffusion.from_preset(preset)
    for path in lora:
        sd.load_lora(path)
    prompts = [caption(name, ground) for name, ground in pairs]
    return sd.text_to_image(prompts, num_steps=num_steps, unconditional_guidance_scale=scale, seed=0, progress=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pictures").add_argument("folder", type=pathlib.Path)
    command = commands.add_parser("score")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("models", nargs="+", help="presets, the first is the base; PRESET,LORA with a LoRA")
    command.add_argument("--out", help="PNG: a row of pictures per model, and one of renderings in the style")
    args = parser.parse_args()
    if args.command == "pictures":
        known = json.loads((locate("emoji") / "captions.json").read_text())
        return draw_pictures(args.folder, read_drawings(known["emoji"]), known["backgrounds"])
    rendering, _ = open_renderings(args.folder)
    sheets = []
    for kind, pairs in json.loads((args.folder / "prompts.json").read_text()).items():
        rows, base = [], None
        for model in args.models:
            rows.append(draw(model, pairs))
            distance, right = score(rows[-1], pairs, args.folder)
            base = base or distance
            print(f"{kind}, {model}: distance {distance:.1f} ({distance / base - 1:+.0%}), right {right:.0%}")
        rows.append([rendering(*pair) for pair in pairs])
        sheets += [np.concatenate(row, axis=1) for row in rows]
    if args.out:
        write_png(args.out, np.concatenate(sheets), "")


if __name__ == "__main__":
    main()
