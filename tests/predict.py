"""Writes what some narrow models predict to the file named on the command line, on the backend of KERAS_BACKEND."""

import sys

import numpy as np

from keras_sd import Decoder, DiffusionModel, ImageEncoder

NARROW = {"block_out_channels": (32, 64), "layers_per_block": 1}
UNET = {**NARROW, "attention_levels": (True, False), "cross_attention_dim": 24, "num_attention_heads": 4}
UNETS = {
    "v1": {},
    "v2": {"use_linear_projection": True, "num_attention_heads": (2, 4)},
    "upscaler": {"in_channels": 7, "only_cross_attention": (True, False), "num_class_embeds": 10},
}


def filled(model):
    """The model, its weights random and the same on every backend."""
    random = np.random.default_rng(1)
    for variable in model.variables:
        value = random.standard_normal(variable.shape) / np.sqrt(np.prod(variable.shape[:-1]))
        value = value if len(variable.shape) > 1 else 0.1 * value + ("gamma" in variable.path)
        variable.assign(value.astype("float32"))
    model.compile()
    return model


def main():
    random, outputs = np.random.default_rng(0), {}

    def normal(*shape):
        return random.standard_normal(shape, "float32")

    for name, arguments in UNETS.items():
        model = filled(DiffusionModel(**{**UNET, **arguments}))
        for height, width in ((8, 8), (9, 7)):
            inputs = {"latent": normal(2, height, width, arguments.get("in_channels", 4))}
            inputs |= {"timestep_embedding": normal(2, 32), "context": normal(2, 77, 24)}
            if "num_class_embeds" in arguments:
                inputs["class_label"] = np.array([1, 2], "int32")
            outputs[f"{name}, {height} by {width}"] = model.predict_on_batch(inputs)
    model = filled(DiffusionModel(**UNET)).guided
    inputs = {"latent": normal(2, 8, 8, 4), "timestep_embedding": normal(2, 32), "context": normal(4, 77, 24)}
    outputs["guided"] = model.predict_on_batch(inputs)
    outputs["decoder"] = filled(Decoder(**NARROW)).predict_on_batch(normal(2, 9, 7, 4))
    outputs["encoder"] = filled(ImageEncoder(**NARROW)).predict_on_batch(normal(1, 20, 18, 3))
    np.savez(sys.argv[1], **{name: np.asarray(output) for name, output in outputs.items()})


if __name__ == "__main__":
    main()
