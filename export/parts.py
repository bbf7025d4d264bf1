"""The parts of a pipeline as pure functions of tensors: what every file format but the SavedModel is made from."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_sd.layers.int8 import refuse_int8
from keras_sd.noise import initial_noise
from keras_sd.noise_scheduler import NoiseScheduler
from keras_sd.samplers import COLUMNS, HISTORY, make_table


@dataclasses.dataclass(frozen=True)
class Part:
    """A function of a dict of tensors, and what it needs to be traced.

    Attributes:
        function: dict name → tensor to dict name → tensor, in Keras operations.
        model: the Keras model that holds its weights.
        inputs: dict name → (shape, dtype) of every input; the first dimension is the batch.
    """

    function: Callable
    model: keras.Model
    inputs: dict

    def with_unique_names(self):
        """The same part for formats in which no output may have an input's name: `latent` → `next_latent`."""

        def function(inputs):
            outputs = self.function(inputs).items()
            return {f"next_{name}" if name in self.inputs else name: value for name, value in outputs}

        return dataclasses.replace(self, function=function)

    def example(self):
        """Inputs to compare with: unit noise, ids, and in `row` an ordinary row of a sampler; a dict of arrays."""
        values = {}
        for i, (name, (shape, dtype)) in enumerate(self.inputs.items()):
            values[name] = initial_noise(i, 1, shape[1:]).astype(dtype)
        if "row" in values:
            values["row"] = make_table("euler_a", NoiseScheduler(), num_steps=2).rows[:1]
        if "tokens" in values:
            values["tokens"] = np.arange(self.inputs["tokens"][0][1], dtype="int32")[None]
        return values

    def trace(self):
        """A TensorFlow graph without the weights, which converters would hold several times: they are inputs of it.

        Returns:
            Concrete function whose inputs are those of the part, then `weight_0`, `weight_1`, … (kernels and
            embeddings; the small rest are constants), and the list of these weights, Keras variables.
        """
        import tensorflow as tf

        weights = [variable for variable in self.model.variables if len(variable.shape) > 1]
        names = list(self.inputs)

        def function(*tensors):
            with keras.StatelessScope(state_mapping=list(zip(weights, tensors[len(names) :]))):
                return self.function(dict(zip(names, tensors)))

        specs = [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in self.inputs.items()]
        specs += [tf.TensorSpec(weight.shape, weight.dtype, f"weight_{i}") for i, weight in enumerate(weights)]
        return tf.function(function, autograph=False).get_concrete_function(*specs), weights

    def __call__(self, inputs):
        """Runs it in Keras: dict of arrays to dict of arrays."""
        inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
        return {name: np.asarray(value) for name, value in self.function(inputs).items()}


def parts(sd, height, width, batch_size=1):
    """The three parts that draw a picture.

    - `text_encoder`: `tokens` int32 (B, 77) → `context` (B, 77, width).
    - `denoising_step`: the inputs of `keras_sd.denoiser.Denoiser` → `latent`, `history`.
    - `decoder`: `latent` (B, h, w, 4) → `image` (B, H, W, 3) in [-1, 1].

    Args:
        sd: a `StableDiffusion`, its models in float32.
        height, width: of the pictures in pixels.
        batch_size: B, or None for any.

    Returns:
        dict name → `Part`.

    Raises:
        ValueError: the size is no multiple of what the autoencoder halves, a model is not float32, or the backend is
            not TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"Files are written on the TensorFlow backend; this is {keras.backend.backend()}.")
    sd.keep("text_encoder", "diffusion_model", "decoder")
    for model in (sd.text_encoder, sd.diffusion_model, sd.decoder):
        policies = {layer.dtype_policy.name for layer in model.layers if layer.weights} - {"float32"}
        if policies:
            raise ValueError(f"dtype of the {model.name} is {', '.join(policies)}; this format starts from float32.")
        refuse_int8(model, "This format")
    shape = sd.latent_shape(height, width)
    length, width = (sd.text_encoder.arguments[key] for key in ("max_position_embeddings", "hidden_size"))
    extra = sd.diffusion_model.arguments["in_channels"] - shape[-1]
    latent, context = ((batch_size, *shape), "float32"), ((batch_size, length, width), "float32")
    step = {
        "latent": latent,
        "history": ((batch_size, HISTORY, *shape), "float32"),
        "context": context,
        "unconditional_context": context,
        "row": ((batch_size, len(COLUMNS)), "float32"),
        "noise": latent,
    }
    if extra:
        step["extra"] = ((batch_size, *shape[:2], extra), "float32")
    return {
        "text_encoder": Part(
            functools.partial(_encode, sd.text_encoder), sd.text_encoder, {"tokens": ((batch_size, length), "int32")}
        ),
        "denoising_step": Part(sd.denoiser.call, sd.diffusion_model, step),
        "decoder": Part(functools.partial(_decode, sd.decoder), sd.decoder, {"latent": latent}),
    }


def _encode(text_encoder, inputs):
    return {"context": text_encoder({"tokens": inputs["tokens"]})}


def _decode(decoder, inputs):
    return {"image": ops.clip(decoder(inputs["latent"]), -1.0, 1.0)}
