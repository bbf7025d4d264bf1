"""A small model, its batches and training; prints the loss of each step: python tests/train_steps.py FOLDER STEPS."""

import sys

import keras
import numpy as np

from keras_sd import NoiseScheduler
from keras_sd.models import DiffusionModel
from keras_sd.training import checkpoints
from keras_sd.training.optimizers import Schedule
from keras_sd.training.trainer import DiffusionTrainer


def small_unet(dtype=None, trained=""):
    """A U-Net of which the layers are trained whose names hold `trained`: few variables make a quick test."""
    keras.utils.set_random_seed(0)
    model = DiffusionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        attention_levels=(True,),
        num_attention_heads=2,
        cross_attention_dim=8,
        norm_num_groups=4,
        dtype=dtype,
    )
    for layer in model.layers:
        layer.trainable = trained in layer.name
    return model


def batch(seed, size=4, width=8, fixed=True):
    random = np.random.default_rng(seed)
    arrays = {
        "mean": random.standard_normal((size, 8, 8, 4), "float32"),
        "std": random.uniform(0.0, 0.1, (size, 8, 8, 4)).astype("float32"),
        "context": random.standard_normal((size, 77, width), "float32"),
    }
    if fixed:
        arrays["noise"] = random.standard_normal((size, 8, 8, 4), "float32")
        arrays["timestep"] = random.integers(1000, size=size).astype("int32")
        arrays["std"] *= 0.0
    return arrays


def make_trainer(dtype=None):
    model = small_unet(dtype, trained="mid")
    trainer = DiffusionTrainer(model, NoiseScheduler(), offset_noise=0.1, min_snr_gamma=5.0, seed=3)
    optimizer = keras.optimizers.AdamW(
        Schedule("cosine", 1e-2, 10, 2), global_clipnorm=1.0, use_ema=True, gradient_accumulation_steps=3
    )
    trainer.compile(optimizer)
    return trainer


def train(trainer, steps, report, callbacks=()):
    """Goes on to `steps`; `report` gets (step, loss) of each step done."""

    class Report(keras.callbacks.Callback):
        def on_train_batch_end(self, _, logs=None):
            self.step = getattr(self, "step", start) + 1
            report(self.step, float(logs["loss"]))

    start = int(trainer.step)
    data = ((batch(step, fixed=False),) for step in range(start, steps))
    trainer.fit(data, steps_per_epoch=steps - start, callbacks=[*callbacks, Report()], shuffle=False, verbose=0)


if __name__ == "__main__":
    folder, steps = sys.argv[1], int(sys.argv[2])
    trainer = make_trainer()
    if checkpoints.latest(folder):
        checkpoints.restore(trainer, folder)
    callbacks = [checkpoints.SaveCheckpoints(folder, every=2, keep=2)]
    train(trainer, steps, lambda step, loss: print(step, repr(loss), flush=True), callbacks)
