"""Does the embedded model draw what is asked? `python -m benchmarks.emoji_score`

Draws captions of trained and of held-out (emoji, background) pairs and looks which clean rendering each picture is
nearest to (mean squared error at 64×64, over all emoji of the set on the caption's background), and which background
colour its border is nearest to. Needs Debian's fonts-noto-color-emoji for the clean renderings.
"""

import argparse
import json

import numpy as np
from PIL import Image

from keras_sd import StableDiffusion
from keras_sd.presets import locate
from keras_sd.training.emoji_pictures import caption, render

SIDE = 64


def nearest_emoji(image, captions, background):
    """Name of the emoji whose clean rendering on the background is nearest to a uint8 picture."""
    rgb = tuple(captions["backgrounds"][background])
    clean = np.stack([render(character, rgb, side=SIDE) for character in captions["emoji"].values()])
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), "float32")
    return list(captions["emoji"])[int(np.square(clean - small).mean(axis=(1, 2, 3)).argmin())]


def nearest_background(image, captions):
    """Name of the background whose colour is nearest to the median of the picture's border."""
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    colours = np.array(list(captions["backgrounds"].values()), "float32")
    return list(captions["backgrounds"])[int(np.square(colours - np.median(border, axis=0)).sum(axis=1).argmin())]


def score(sd, captions, pairs, num_steps=25, guidance_scale=7.5, batch_size=50, seed=0, **kwargs):
    """Parts of the pairs whose emoji, and whose background, came out right; and the pictures.

    Returns:
        (emoji, background) in [0, 1], uint8 (len(pairs), H, W, 3).
    """
    images = []
    for start in range(0, len(pairs), batch_size):
        prompts = [caption(name, background) for name, background in pairs[start : start + batch_size]]
        images += list(
            sd.text_to_image(
                prompts,
                num_steps=num_steps,
                unconditional_guidance_scale=guidance_scale,
                seed=seed + start,
                progress=False,
                **kwargs,
            )
        )
    emoji, background = right(images, captions, pairs).mean(axis=1)
    return (float(emoji), float(background)), np.stack(images)


def right(images, captions, pairs):
    """Whether each picture's emoji, and its background, is that of its pair: bool (2, B)."""
    emoji = [nearest_emoji(i, captions, background) == name for i, (name, background) in zip(images, pairs)]
    background = [nearest_background(i, captions) == background for i, (_, background) in zip(images, pairs)]
    return np.array([emoji, background])


def pairs_of(captions, held_out, count, seed=0):
    """`count` random (emoji, background) pairs, held out of training or trained."""
    kept_out = {tuple(pair) for pair in captions["held_out"]}
    every = [(name, background) for name in captions["emoji"] for background in captions["backgrounds"]]
    pool = [pair for pair in every if (pair in kept_out) == held_out]
    return [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[:count]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="emoji", help="preset or folder; its captions.json says what it knows")
    parser.add_argument("--count", type=int, default=200, help="captions of each kind (default 200)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument("--scale", type=float, nargs="+", default=[7.5], help="guidance scales (default 7.5)")
    parser.add_argument("--sampler", help="sampler (default: the preset's own)")
    args = parser.parse_args()
    sd = StableDiffusion.from_preset(args.preset)
    captions = json.loads((locate(args.preset) / "captions.json").read_text())
    for scale in args.scale:
        for held_out in (False, True):
            pairs = pairs_of(captions, held_out, args.count)
            (emoji, background), _ = score(sd, captions, pairs, args.steps, scale, sampler=args.sampler)
            kind = "held-out" if held_out else "trained"
            print(f"guidance {scale:g}, {kind:8}: emoji {emoji:6.1%}, background {background:6.1%} of {len(pairs)}")


if __name__ == "__main__":
    main()
