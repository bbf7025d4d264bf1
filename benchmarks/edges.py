"""The ControlNet experiment: the embedded model learns to follow edges.

    python -m benchmarks.edges pictures runs/edges      draws the data set: 3000 pictures
    python finetune.py --preset emoji --train controlnet --dataset_archive runs/edges/learn --img_height 64 \
        --img_width 64 --batch_size 32 --num_epochs 40 --lr 3e-4 --ema 0.995 --caption_dropout 0.1 --out runs/control
    python -m benchmarks.edges score runs/edges runs/control/control_net --out edges.png

The pictures show the embedded model's emoji, small or large and in all places, but their captions do not say where:
only the edges do. `score` draws 40 emoji on a background that they were not learnt on, over the edges of a composition
that the prompt keeps to itself, and prints the mean distance to the rendering that the edges are of (root mean square
difference of the pixels, 0 … 255), and how many edges are met: F1 of the edges' pixels, one pixel off allowed.
"""

import argparse
import csv
import json
import pathlib

import numpy as np
from PIL import Image, ImageFilter

from keras_sd.edges import canny
from keras_sd.png import write_png
from keras_sd.presets import locate
from keras_sd.training.emoji_pictures import caption, compositions, render

COUNT, LEARNT = 40, 10  # scored emoji; learnt pictures of each


def held_out(names, backgrounds):
    """{name: the background that it is not learnt on}."""
    return {name: backgrounds[i % len(backgrounds)] for i, name in enumerate(names)}


def draw_pictures(folder):
    """Writes `learn/` (pictures, data.csv) and `score.json`."""
    known = json.loads((locate("emoji") / "captions.json").read_text())
    names, grounds = sorted(known["emoji"]), known["backgrounds"]
    random, kept = np.random.default_rng(0), held_out(names, list(grounds))
    (folder / "learn").mkdir(parents=True)
    with open(folder / "learn" / "data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "caption"])
        for name in names:
            for i in range(LEARNT):
                ground = str(random.choice([ground for ground in grounds if ground != kept[name]]))
                size, place = compositions()[random.integers(len(compositions()))]
                picture = render(known["emoji"][name], grounds[ground], size, place)
                path, text = f"{name.replace(' ', '_')}-{i}.png", caption(name, ground)
                write_png(folder / "learn" / path, picture, text)
                table.writerow([path, text])
    chosen = [str(name) for name in random.choice(names, COUNT, replace=False)]
    moved = [one for one in compositions() if one != ("", "")]
    asked = [[name, kept[name], *moved[random.integers(len(moved))]] for name in chosen]
    (folder / "score.json").write_text(json.dumps(asked, indent=1))


def edge_score(picture, edges):
    """F1 of a picture's edges against given ones, bool (H, W); one pixel off is allowed."""
    own = canny(picture)[..., 0] > 0

    def near(mask):
        return np.asarray(Image.fromarray(np.uint8(255 * mask)).filter(ImageFilter.MaxFilter(3))) > 0

    precision, recall = ((a & near(b)).sum() / max(a.sum(), 1) for a, b in ((own, edges), (edges, own)))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def draw(sd, asked, seen, net=None, num_steps=25, scale=2.0):
    """One picture per entry, uint8 (COUNT, 64, 64, 3), over its edges where a net is given."""
    options = {"num_steps": num_steps, "unconditional_guidance_scale": scale, "progress": False}
    drawn = []
    for i, ((name, ground, *_), edges) in enumerate(zip(asked, seen)):
        control = None if net is None else [(net, edges)]
        drawn.append(sd.text_to_image(caption(name, ground), seed=i, control=control, **options)[0])
    return np.stack(drawn)


def score(folder, paths, out=None):
    """Prints the measures of the model alone and with each net; `out` shows edges, pictures and renderings."""
    from keras_sd import StableDiffusion, load_control_net

    known = json.loads((locate("emoji") / "captions.json").read_text())
    asked = json.loads((folder / "score.json").read_text())
    wanted = np.stack([render(known["emoji"][n], known["backgrounds"][g], size, place) for n, g, size, place in asked])
    seen, sd = np.stack([canny(picture) for picture in wanted]), StableDiffusion.from_preset("emoji")
    rows = [seen]
    for path in [None, *paths]:
        drawn = draw(sd, asked, seen, None if path is None else load_control_net(path))
        distance = np.sqrt(np.square(drawn - wanted.astype("float64")).mean(axis=(1, 2, 3))).mean()
        met = np.mean([edge_score(picture, edges[..., 0] > 0) for picture, edges in zip(drawn, seen)])
        print(f"{path or 'without edges'}: distance {distance:.1f}, edges met {met:.0%}", flush=True)
        rows.append(drawn)
    if out:
        shown = [np.concatenate(list(row[:12]), axis=1) for row in [*rows, wanted]]
        write_png(out, np.concatenate(shown), "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pictures").add_argument("folder", type=pathlib.Path)
    command = commands.add_parser("score")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("nets", nargs="*", help="ControlNets")
    command.add_argument("--out", help="PNG: rows of edges, of pictures without and with each net, and of renderings")
    args = parser.parse_args()
    draw_pictures(args.folder) if args.command == "pictures" else score(args.folder, args.nets, args.out)


if __name__ == "__main__":
    main()
