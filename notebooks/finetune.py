# %% [markdown]
# # Fine-tuning
#
# The embedded model learns another hand of drawings: 500 pictures of Microsoft's Fluent emoji (MIT licence), which
#
#     pip install resvg_py
#     python -m benchmarks.style pictures runs/style
#
# draws. Then prompts are drawn by the base model and by the fine-tuned ones, side by side. With SD v1 it is the same:
# another `--preset`, a folder of your pictures, and `--img_height 512 --img_width 512 --precision mixed_bfloat16`.

# %%
import json
import os
import pathlib
import shlex

import numpy as np
from PIL import Image

import finetune
from benchmarks.style import draw, open_renderings, score
from keras_sd.training.examples import read_examples

STYLE = pathlib.Path(os.environ.get("STYLE", "runs/style"))
EPOCHS = int(os.environ.get("EPOCHS", "80"))


def show(*rows):
    """Rows of pictures, uint8 (B, 64, 64, 3), one below the other."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    return Image.fromarray(sheet).quantize(256)  # a palette keeps the notebook small


examples, rejected = read_examples(STYLE / "learn")
print(len(examples), "pictures,", len(rejected), "rejected; the first:", examples[0].captions[0])
show([np.asarray(example.read()) for example in examples[:14]])

# %% [markdown]
# ## The plan
#
# `--dry-run` trains two steps and says what a run will take.

# %%
COMMON = (
    f"--preset emoji --dataset_archive {STYLE / 'learn'} --img_height 64 --img_width 64 --batch_size 16 --quiet "
    f"--lr_schedule cosine --caption_dropout 0.1 --ema 0.99 --latent_cache {STYLE / 'latents'}"
)
FULL = f"{COMMON} --num_epochs {EPOCHS} --lr 2e-4 --out {STYLE / 'full'}"
LORA = (
    f"{COMMON} --num_epochs {EPOCHS * 5 // 4} --lr 2e-3 --out {STYLE / 'lora'} "
    "--train lora --rank 32 --targets attention feed_forward projection"
)
finetune.main(shlex.split(f"{LORA} --dry-run"))

# %% [markdown]
# ## Training
#
# The whole U-Net, and low-rank factors beside its frozen weights. The same commands work in a terminal:
# `python finetune.py --preset emoji …`. An interrupted run goes on where it was.

# %%
finetune.main(shlex.split(FULL))
finetune.main(shlex.split(LORA))

# %% [markdown]
# ## Before and after
#
# Twenty prompts that were not learnt in the new style, from above: the base model, full fine-tuning, LoRA, and the new
# style's own drawing.

# %%
rendering, _ = open_renderings(STYLE)
models = {
    "base": "emoji",
    "full": str(STYLE / "full" / "preset"),
    "LoRA": f"emoji,{STYLE / 'lora' / 'lora.safetensors'}",
}
prompts = json.loads((STYLE / "prompts.json").read_text())


def compare(pairs):
    rows, base = [], None
    for name, model in models.items():
        rows.append(draw(model, pairs))
        distance, right = score(rows[-1], pairs, STYLE)
        base = base or distance
        print(f"{name:5} distance to the style {distance:5.1f} ({distance / base - 1:+.0%}), subject right {right:.0%}")
    return show(*rows, [rendering(*pair) for pair in pairs])


compare(prompts["learnt emoji"])

# %% [markdown]
# Emoji of which the model has seen no drawing in the new style at all:

# %%
compare(prompts["other emoji"])
