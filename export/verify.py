"""Replays the requests that an exported model carries, and compares: `python -m export.verify models/decoder/1`.

The exporter runs it in a fresh process on everything that it writes.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

WARMUP = "assets.extra/tf_serving_warmup_requests"
DESCRIPTION = "assets.extra/export.json"
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest number in the answer
PIXEL_TOLERANCE = {"float32": 1, "float16": 8, "bfloat16": 32}  # of 255, on 99.9 % of the pixels


def write_requests(path, model, requests):
    """Writes (signature, inputs, outputs) as TFRecords of PredictionLog, which TF-Serving replays before it serves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as file:
        for signature, inputs, outputs in requests:
            log = prediction_log_pb2.PredictionLog()
            for part, tensors in (
                (log.predict_log.request.inputs, inputs),
                (log.predict_log.response.outputs, outputs),
            ):
                for name, tensor in tensors.items():
                    part[name].CopyFrom(tf.make_tensor_proto(tensor))
            log.predict_log.request.model_spec.name = model
            log.predict_log.request.model_spec.signature_name = signature
            file.write(log.SerializeToString())


def verify(folder):
    """Compares the answers of a SavedModel with those in its warm-up file.

    Raises:
        ValueError: an answer differs by more than its dtype explains, or is not finite; the message says which.
    """
    folder = Path(folder)
    dtype = json.loads((folder / DESCRIPTION).read_text())["dtype"]
    model = tf.saved_model.load(str(folder))
    for record in tf.data.TFRecordDataset(str(folder / WARMUP)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log
        signature = log.request.model_spec.signature_name
        inputs = {name: tf.constant(tf.make_ndarray(proto)) for name, proto in log.request.inputs.items()}
        outputs = {name: tensor.numpy() for name, tensor in model.signatures[signature](**inputs).items()}
        for name, output in outputs.items():
            what = f"{folder.parent.name}/{folder.name}, {signature}, {name}"
            if output.dtype.kind == "f" and not np.isfinite(output).all():
                raise ValueError(f"{what}: the answer holds NaN or infinite numbers.")
        for name, proto in log.response.outputs.items():
            _compare(f"{folder.parent.name}, {signature}, {name}", outputs[name], tf.make_ndarray(proto), dtype)


def _compare(what, found, wanted, dtype):
    if wanted.dtype == object:
        found, wanted = (np.stack([_pixels(file) for file in files]) for files in (found, wanted))
    if found.shape != wanted.shape:
        raise ValueError(f"{what}: the export answers with shape {found.shape}, the pipeline with {wanted.shape}.")
    difference = np.abs(found.astype("float64") - wanted.astype("float64"))
    if wanted.dtype == np.uint8:
        worst, limit = np.quantile(difference, 0.999), PIXEL_TOLERANCE[dtype]
    elif wanted.dtype.kind == "f":
        worst, limit = difference.max(), TOLERANCE[dtype] * max(np.abs(wanted).max(), 1.0)
    else:
        worst, limit = difference.max(), 0
    if not worst <= limit:
        raise ValueError(f"{what}: the export differs from the pipeline by {worst:.3g}; {dtype} explains {limit:.3g}.")


def _pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m export.verify", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="versions of exported models, e.g. models/decoder/1")
    for folder in parser.parse_args(arguments).folders:
        try:
            verify(folder)
        except (ValueError, OSError, KeyError, tf.errors.OpError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
