"""Draws with the embedded model on the backend of KERAS_BACKEND: `python tests/draw.py OUT.npy [DTYPE]`."""

import sys

import numpy as np

from keras_sd import StableDiffusion

sd = StableDiffusion.from_preset("emoji", dtype=sys.argv[2] if len(sys.argv) > 2 else None)
prompts = ["red apple on a blue background", "rocket on a yellow background"]
np.save(sys.argv[1], sd.text_to_image(prompts, num_steps=8, seed=7, sampler="dpmpp_2m", progress=False))
