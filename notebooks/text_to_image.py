# %% [markdown]
# # Text to image
#
# The embedded model `emoji` draws 64×64 pictures and needs no download. Everything here works the same with
# `"sd-v1-5"`, a diffusers folder or a `.safetensors` file in its place.

# %%
import numpy as np
from PIL import Image

from keras_sd import SAMPLERS, StableDiffusion, make_table


def show(images, scale=2):
    """uint8 (B, H, W, 3) → one picture, side by side."""
    strip = Image.fromarray(np.concatenate(list(images), axis=1))
    return strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST)


sd = StableDiffusion.from_preset("emoji")
prompts = ["red apple on a blue background", "rocket on a black background", "ghost on a red background"]
show(sd.text_to_image(prompts, num_steps=25, seed=7, progress=False))

# %% [markdown]
# ## Seeds
#
# Picture *i* of a batch is drawn from `seed + i`, so a picture found in a batch can be drawn again alone.

# %%
batch = sd.text_to_image("ghost and a rocket", batch_size=6, num_steps=20, seed=0, progress=False)
alone = sd.text_to_image("ghost and a rocket", num_steps=20, seed=4, progress=False)
print("largest difference:", np.abs(batch[4].astype(int) - alone[0]).max())
show(batch)

# %% [markdown]
# ## Guidance
#
# How closely to follow the prompt: 1 is no guidance. This small model was trained without much need of it.

# %%
scales = (1.0, 2.0, 4.0, 7.5, 12.0)
show(
    np.concatenate(
        [
            sd.text_to_image(
                "penguin on a pink background",
                num_steps=20,
                unconditional_guidance_scale=scale,
                seed=3,
                progress=False,
            )
            for scale in scales
        ]
    )
)

# %% [markdown]
# ## Samplers
#
# A sampler is a table of coefficients. All of them run through one compiled step, from the same noise.

# %%
names = [name for name in SAMPLERS if name != "lcm"]  # lcm is for distilled models
print(", ".join(names))
show(
    np.concatenate(
        [
            sd.text_to_image(
                "ferris wheel on a pink background",
                num_steps=25,
                sampler=name,
                unconditional_guidance_scale=3.0,
                seed=1,
                progress=False,
            )
            for name in names
        ]
    ),
    scale=1,
)

# %%
table = make_table("dpmpp_2m", sd.scheduler[0], num_steps=4, karras=True)
print(table)
print(np.round(table.rows[:, :7], 3))

# %% [markdown]
# ## Watching
#
# A callback sees the latent after every step; it may stop the run by returning `False`.

# %%
seen = []
sd.text_to_image(
    "unicorn face on a purple background",
    num_steps=20,
    seed=2,
    progress=False,
    callback=lambda step, num_steps, latent: seen.append(latent),
)
show(np.concatenate([sd.decode(latent) for latent in seen[::3]]))

# %% [markdown]
# ## A picture to start from
#
# `image_to_image` changes a picture; `inpaint` repaints what is white in a mask and gives every other pixel back.

# %%
apple = sd.text_to_image("red apple on a blue background", num_steps=25, seed=7, progress=False)[0]
changed = [
    sd.image_to_image(
        apple, "green apple on a blue background", strength=strength, num_steps=25, seed=1, progress=False
    )[0]
    for strength in (0.3, 0.5, 0.7, 0.9)
]
show([apple, *changed])

# %%
mask = np.zeros((64, 64), "uint8")
mask[:, 32:] = 255
painted = sd.inpaint(apple, mask, "red apple on a yellow background", num_steps=25, seed=5, progress=False)[0]
print("kept pixels are the same:", (painted[:, :32] == apple[:, :32]).all())
show([apple, np.repeat(mask[..., None], 3, axis=-1), painted])
