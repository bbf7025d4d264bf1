"""The README's pictures, drawn by the embedded model: `python -m docs.pictures` writes them beside this file.

The model's 300 emoji have no orange, so ten pictures of one are learnt first, as a LoRA, in about a minute; that needs
Debian's fonts-noto-color-emoji.
"""

import pathlib
import shlex
import tempfile

import numpy as np
from PIL import Image

import finetune
from keras_sd import StableDiffusion
from keras_sd.demo import contact_sheet
from keras_sd.film import film_strip
from keras_sd.training.emoji_pictures import BACKGROUNDS, caption, render

HERE = pathlib.Path(__file__).parent
OPTIONS = {"num_steps": 25, "seed": 7, "progress": False}


def learn(name, character, folder):
    """A LoRA of the model for one more emoji; returns its path."""
    pictures = pathlib.Path(folder, "pictures")
    pictures.mkdir()
    for ground, colour in BACKGROUNDS.items():
        Image.fromarray(render(character, colour)).save(pictures / f"{ground}.png")
        (pictures / f"{ground}.txt").write_text(caption(name, ground))
    arguments = f"""--preset emoji --dataset_archive {pictures} --img_height 64 --img_width 64 --batch_size 10
        --num_epochs 150 --train lora --train_text_encoder --lr 2e-3 --lr_schedule cosine --ema 0
        --caption_dropout 0.1 --quiet --out {folder}"""
    assert finetune.main(shlex.split(arguments)) == 0
    return pathlib.Path(folder, "lora.safetensors")


def change(sd):
    """A picture, and what it becomes at rising strengths."""
    options = {**OPTIONS, "unconditional_guidance_scale": 1.5}
    (apple,) = sd.text_to_image("red apple on a blue background", **options)
    strengths = 0.1, 0.2, 0.3, 0.4, 0.5, 0.7
    rows = []
    for name in ("orange", "green apple", "soccer ball"):
        if name == "orange":
            with tempfile.TemporaryDirectory() as folder:
                sd.load_lora(learn(name, "\N{TANGERINE}", folder), name=name)
        changed = [sd.image_to_image(apple, f"{name} on a blue background", x, **options)[0] for x in strengths]
        rows.append(np.stack([apple, *changed]))
        sd.unload_lora()
    return contact_sheet(np.concatenate(rows), columns=len(strengths) + 1)


def repaint(sd):
    """One of two emoji is replaced: the picture, the mask, and three others in its place."""
    options = {**OPTIONS, "unconditional_guidance_scale": 3.0}
    ground = "on a yellow background"
    picture = np.concatenate(sd.text_to_image([f"rocket {ground}", f"ghost {ground}"], **options), axis=1)
    mask = np.zeros((64, 128), "uint8")
    mask[:, 64:] = 255
    others = [sd.inpaint(picture, mask, f"{name} {ground}", **options)[0] for name in ("penguin", "banana", "coconut")]
    return contact_sheet([picture, np.repeat(mask[..., None], 3, axis=2), *others], columns=5)


def between(sd):
    """Nine pictures from one prompt to another."""
    prompts = "panda face on a green background", "rocket on a purple background"
    return film_strip(sd.interpolate(*prompts, frames=9, unconditional_guidance_scale=3.0, **OPTIONS))


def enlarge(sd):
    """Thumbnails of 32×32, enlarged by Lanczos and by a second pass."""
    prompts = ["red apple on a blue background", "panda face on a green background", "sailboat on a white background"]
    images = []
    for prompt, drawn in zip(prompts, sd.text_to_image(prompts, unconditional_guidance_scale=3.0, **OPTIONS)):
        small = Image.fromarray(drawn).resize((32, 32), Image.Resampling.BOX)
        images.append(np.asarray(small.resize((64, 64), Image.Resampling.LANCZOS)))
        images += list(sd.upscale(small, prompt, 2, strength=0.4, unconditional_guidance_scale=2.0, **OPTIONS))
    return contact_sheet(images, columns=6)


def main():
    sd = StableDiffusion.from_preset("emoji")
    for name, draw in {"img2img": change, "inpaint": repaint, "interpolation": between, "upscale": enlarge}.items():
        picture = Image.fromarray(draw(sd))
        scale = max(768 // picture.width, 1)
        size = scale * picture.width, scale * picture.height
        picture.resize(size, Image.Resampling.NEAREST).save(HERE / f"{name}.png")
        print(HERE / f"{name}.png")


if __name__ == "__main__":
    main()
