"""Warm-up requests: what a SavedModel's assets.extra/tf_serving_warmup_requests replays before it is served."""

import concurrent.futures
import logging
import os
import time

import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from . import metrics, tensors
from .call import Call
from .errors import ServingError, from_exception

MAX_RECORDS = 1000


def replay(servable, path, iterations=1):
    """Runs the warm-up requests of a SavedModel folder, if it has any.

    Args:
        servable: the `Servable` that answers them.
        path: the folder.
        iterations: how often each request runs.

    Raises:
        ServingError: DATA_LOSS or INVALID_ARGUMENT for a broken file, else what a request raises.
    """
    file = os.path.join(path, "assets.extra", "tf_serving_warmup_requests")
    if not os.path.exists(file):
        return
    start, code = time.monotonic(), "OK"
    try:
        # Most of the time goes into optimising each signature's graph, on one core each.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = [pool.submit(_run, servable, record, file, iterations) for record in _records(file)]
            for run in runs:
                run.result()
    except ServingError as error:
        code = error.code
        raise
    finally:
        metrics.WARMUP_LATENCY.add(path, code, value=(time.monotonic() - start) * 1e6)


def _records(file):
    try:
        for count, record in enumerate(tf.data.TFRecordDataset(file).as_numpy_iterator()):
            if count == MAX_RECORDS:
                raise ServingError(
                    "INVALID_ARGUMENT", f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {file}"
                )
            yield record
    except tf.errors.DataLossError as error:
        message = f"{from_exception(error).message}. Please verify your warmup data is in TFRecord format."
        raise ServingError("DATA_LOSS", message) from None
    except tf.errors.OpError as error:
        raise from_exception(error) from None


def _run(servable, record, file, iterations):
    log = prediction_log_pb2.PredictionLog()
    try:
        log.ParseFromString(record)
    except Exception:
        raise ServingError("INVALID_ARGUMENT", f"Failed to parse warmup record: {record!r} from {file}") from None
    kind = log.WhichOneof("log_type")
    if kind != "predict_log":
        # This server answers Predict alone, so there is nothing to warm up for the others.
        logging.warning("%s: a %s is not replayed", file, kind)
        return
    request = log.predict_log.request
    inputs = {name: tensors.to_array(proto, name) for name, proto in request.inputs.items()}
    for _ in range(iterations):
        servable.predict(request.model_spec.signature_name, inputs, request.output_filter, Call())
