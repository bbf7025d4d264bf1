"""Writes a pipeline for LiteRT (TensorFlow Lite): the phone path. `export.litert_runner` draws with it."""

import functools

import keras
import numpy as np
import tensorflow as tf

from export.litert_runner import SUFFIX, load  # noqa: F401  (a format has both)
from export.litert_weights import write_with_weights
from export.part_files import write_folder
from export.parts import parts

# Root mean square of the error over that of the output.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "int8": 1e-1}


def write(sd, folder, height, width, precision="float16"):
    """Writes `text_encoder.tflite`, `denoising_step.tflite`, `decoder.tflite`, the tokenizer and the scheduler.

    Every file has the signature `serving_default`, for batches of one, with the names and shapes of
    `export.parts.parts`.

    Args:
        sd: a `StableDiffusion` on the TensorFlow backend, its models in float32.
        folder: where to; nothing may be there yet.
        height, width: of the pictures in pixels.
        precision: of the weights: "float32", "float16", or "int8", with which matrix products and convolutions also
            narrow their inputs on the fly (dynamic-range quantization).

    Raises:
        ValueError: a wrong size or precision, or the files do not compute what Keras does.
        FileExistsError: something is at `folder`.
    """
    if precision not in TOLERANCE:
        raise ValueError(f"precision must be one of {', '.join(TOLERANCE)}; got {precision!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"LiteRT files are written on the TensorFlow backend; this is {keras.backend.backend()}.")
    write_part = functools.partial(convert, precision=precision)
    write_folder(sd, folder, parts(sd, height, width), "litert", write_part, TOLERANCE[precision])


def convert(part, path, precision):
    """Writes a `Part` as a `.tflite` file. Kernels and embeddings enter the converter as inputs, not as constants."""
    kernels = [variable for variable in part.model.variables if len(variable.shape) > 1]
    names = list(part.inputs)

    def function(*tensors):
        with keras.StatelessScope(state_mapping=list(zip(kernels, tensors[len(names) :]))):
            return part.function(dict(zip(names, tensors)))

    specs = [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in part.inputs.items()]
    specs += [tf.TensorSpec(kernel.shape, kernel.dtype, f"weight_{i}") for i, kernel in enumerate(kernels)]
    traced = tf.function(function, autograph=False).get_concrete_function(*specs)
    graph = tf.lite.TFLiteConverter.from_concrete_functions([traced], None).convert()
    weights = [functools.partial(np.asarray, kernel) for kernel in kernels]
    write_with_weights(graph, path, names, sorted(traced.structured_outputs), weights, precision)
