"""A contact sheet of pictures that the embedded model draws from text: `python -m keras_sd.demo --out out/demo.png`."""

import argparse
import pathlib

import numpy as np

PROMPTS = [
    "red apple on a blue background",
    "rocket on a black background",
    "small rocket on the left on a yellow background",
    "penguin on a pink background",
    "unicorn face on a purple background",
    "volcano on a teal background",
    "large mushroom on a green background",
    "sailboat on a white background",
    "ghost on a red background",
    "small banana on the right on a brown background",
    "panda face on a blue background",
    "rainbow on a yellow background",
]


def contact_sheet(images, columns):
    """uint8 (B, H, W, 3) → one picture of the given number of columns, with white lines between."""
    images = [np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255) for image in images]
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    return np.concatenate(rows, axis=0)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m keras_sd.demo", description=__doc__.split(":")[0])
    parser.add_argument("--out", type=pathlib.Path, default="out/demo.png", help="PNG to write")
    args = parser.parse_args(arguments)

    from PIL import Image

    from keras_sd import StableDiffusion
    from keras_sd.weights.files import atomic_file

    sd = StableDiffusion.from_preset("emoji")
    images = sd.text_to_image(PROMPTS, num_steps=25, seed=7)
    sheet = Image.fromarray(contact_sheet(images, columns=4))
    with atomic_file(args.out) as file:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(file, format="PNG")
    print(f"{args.out}: {', '.join(PROMPTS)}")


if __name__ == "__main__":
    main()
