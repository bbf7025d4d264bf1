"""Writes a pipeline for LiteRT (TensorFlow Lite): the phone path. `export.litert_runner` draws with it."""

import functools

import numpy as np
import tensorflow as tf

from export.litert_weights import write_with_weights
from export.part_files import write_folder
from export.parts import parts

# Root mean square of the error over that of the output.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "int8": 2e-1}


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
    write_part = functools.partial(convert, precision=precision)
    write_folder(sd, folder, parts(sd, height, width), "export.litert_runner", write_part, TOLERANCE[precision])


def convert(part, path, precision):
    """Writes a `Part` as a `.tflite` file."""
    traced, weights = part.trace()
    graph = tf.lite.TFLiteConverter.from_concrete_functions([traced], None).convert()
    weights = [functools.partial(np.asarray, weight) for weight in weights]
    write_with_weights(graph, path, list(part.inputs), sorted(traced.structured_outputs), weights, precision)
