"""Run by test_lora.py on a backend of its own: `python draw_lora.py PRESET LORA OUT.npy` draws with a LoRA.

What is unloaded must leave no trace; factors to train must draw as the weights that they are fused into.
"""

import sys

import keras
import numpy as np

from keras_sd import StableDiffusion


def values(sd):
    return [keras.ops.convert_to_numpy(v).copy() for v in sd.diffusion_model.variables]


def draw():
    return sd.text_to_image("an apple", num_steps=1, seed=3, progress=False)


sd = StableDiffusion.from_preset(sys.argv[1])
before, plain = values(sd), draw()
sd.load_lora(sys.argv[2], 0.8, "a")
drawn = draw()
sd.unload_lora()
assert all(np.array_equal(a, b) for a, b in zip(values(sd), before))
assert np.array_equal(draw(), plain)
if keras.backend.backend() != "openvino":
    sd.add_lora(rank=4, targets=("attention", "convolution"))
    for i, variable in enumerate(sd.diffusion_model.trainable_variables):
        variable.assign(0.1 * np.random.default_rng(i).standard_normal(variable.shape))
    trained = draw()
    assert np.abs(trained.astype(int) - plain).max() > 1
    sd.fuse_lora()
    assert np.abs(draw().astype(int) - trained).max() <= 1
np.save(sys.argv[3], drawn)
