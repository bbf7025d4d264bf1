"""Writes how many times OpenVINO compiles something, picture by picture, to the file named on the command line."""

import sys

import numpy as np
import openvino

from keras_sd import StableDiffusion

compiled, counts = [], []
sd = StableDiffusion.from_preset("emoji", dtype="float32")
compile_model = openvino.compile_model
openvino.compile_model = lambda *args: compiled.append(args) or compile_model(*args)
for sampler, options in (("euler_a", {}), ("euler_a", {"guidance_interval": (0, 0.5)}), ("dpmpp_2m", {})):
    sd.text_to_image("rocket", num_steps=6, seed=7, sampler=sampler, progress=False, **options)
    counts.append(len(compiled))
    compiled.clear()
sd.cache_interval = 2
sd.text_to_image("rocket", num_steps=6, seed=7, progress=False)
np.save(sys.argv[1], [*counts, len(compiled)])
