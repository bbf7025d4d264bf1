"""Little SavedModels for the tests of the local server, and the server as a process of its own."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import grpc
import numpy as np
import tensorflow as tf

DTYPES = (
    "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128"
    " string qint8 quint8 qint32"
).split()
ANY = tf.TensorSpec(None, tf.float32)  # unknown rank


def save(path, signatures, variables=()):
    """Writes a SavedModel of TensorFlow 2.

    Args:
        path: its folder, the version.
        signatures: name → (function of named tensors that returns a dict of them, dict of their `TensorSpec`s).
        variables: what the functions use.
    """
    module = tf.Module()
    module.kept = list(variables)
    functions = {name: tf.function(function) for name, (function, _) in signatures.items()}
    concrete = {name: functions[name].get_concrete_function(**specs) for name, (_, specs) in signatures.items()}
    tf.saved_model.save(module, str(path), signatures=concrete)


def save_half_plus(path, plus):
    """y = x / 2 + plus, over any number of rows: version 1 plus 1, version 2 plus 2 …"""
    variable = tf.Variable(float(plus))
    rows = tf.TensorSpec([None], tf.float32)
    save(path, {"serving_default": (lambda x: {"y": x * 0.5 + variable}, {"x": rows})}, [variable])


def save_everything(path):
    """A signature for each thing that can go right or wrong; see the dict."""
    weights = tf.Variable([[1.0], [2.0], [3.0]])

    def positive(x):
        tf.debugging.Assert(tf.reduce_all(x > 0), ["not positive:", x])
        return {"y": x}

    def loop(steps):
        return {"steps": tf.while_loop(lambda i: i < steps, lambda i: i + 1, [tf.constant(0, tf.int64)])[0]}

    signatures = {
        "serving_default": (
            lambda x, n: {"scaled": x * tf.cast(n, tf.float32), "n": n},
            {"x": ANY, "n": tf.TensorSpec([], tf.int32)},
        ),
        "matmul": (lambda x: {"y": tf.matmul(x, weights)}, {"x": tf.TensorSpec([None, 3], tf.float32)}),
        "nothing": (lambda: {"bytes": tf.constant([b"\x00\xff", b""])}, {}),
        "positive": (positive, {"x": ANY}),
        "number": (lambda text: {"y": tf.strings.to_number(text)}, {"text": tf.TensorSpec([], tf.string)}),
        "gather": (lambda i: {"y": tf.gather([1.0, 2.0], i)}, {"i": tf.TensorSpec(None, tf.int32)}),
        "loop": (loop, {"steps": tf.TensorSpec([], tf.int64)}),
    }
    for dtype in DTYPES:
        signatures[f"echo_{dtype}"] = (lambda x: {"x": tf.identity(x)}, {"x": tf.TensorSpec(None, tf.as_dtype(dtype))})
    save(path, signatures, [weights])


def save_tf1(path, words, factor):
    """A SavedModel of TensorFlow 1: a variable, a table read from an asset, a signature fed in mid-graph."""
    v1 = tf.compat.v1
    vocabulary = pathlib.Path(path).parent.parent / "words.txt"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("".join(f"{word}\n" for word in words))
    with tf.Graph().as_default(), v1.Session() as session:
        x, word = v1.placeholder(tf.float32, [None]), v1.placeholder(tf.string, [None])
        scaled = x * v1.get_variable("factor", initializer=float(factor))
        failing = v1.debugging.check_numerics(scaled / 0.0, "infinite")
        asset = tf.constant(str(vocabulary))
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, asset)
        whole, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
        rows = tf.lookup.TextFileInitializer(asset, tf.string, whole, tf.int64, number)
        table = tf.lookup.StaticHashTable(rows, -1)
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])

        def signature(inputs, outputs):
            infos = [
                {name: v1.saved_model.build_tensor_info(tensor) for name, tensor in tensors.items()}
                for tensors in (inputs, outputs)
            ]
            return v1.saved_model.build_signature_def(*infos, "tensorflow/serving/predict")

        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            signature_def_map={
                "serving_default": signature({"x": x}, {"y": scaled + 1.0, "failing": failing}),
                "middle": signature({"scaled": scaled}, {"y": scaled + 1.0}),
                "look_up": signature({"word": word}, {"row": table.lookup(word)}),
            },
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=v1.tables_initializer(),
        )
        builder.save()
    vocabulary.unlink()  # the copy among the assets counts


def values(dtype, shape):
    """Some values of a dtype, with its extremes where there are any."""
    dtype, count = tf.as_dtype(dtype), int(np.prod(shape))
    if dtype == tf.string:
        some = np.array([b"", b"\x00\xff\x00", "äöü".encode(), b"word"] * count, dtype=object)
    elif dtype.is_quantized:
        some = np.array([0, 1, 127] * count, dtype=dtype.as_numpy_dtype[0]).view(dtype.as_numpy_dtype)
    elif dtype.is_integer:
        some = np.array([dtype.min, dtype.max, 0, 1, 127, 128 % dtype.max] * count, dtype=dtype.as_numpy_dtype)
    elif dtype == tf.bool:
        some = np.array([True, False] * count, dtype=bool)
    else:
        some = np.array([0.5, -2, np.inf, 0] * count, dtype=dtype.as_numpy_dtype)
    return some[:count].reshape(shape)


class Process:
    """The local server as a process that answers gRPC on `channel` when the constructor returns.

    Args:
        log: the file that its log goes to.
        *flags: what `python -m serving.local` takes.
    """

    def __init__(self, log, *flags):
        with socket.socket() as taken:
            taken.bind(("", 0))
            self.port = taken.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._log = pathlib.Path(log)
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving.local", f"--port={self.port}", "--rest_api_port=0", *flags],
                env=environment,
                stderr=stderr,
            )
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(f"localhost:{self.port}", options=unlimited)
        while True:
            try:
                grpc.channel_ready_future(self.channel).result(timeout=1)
                return
            except grpc.FutureTimeoutError:
                if self.process.poll() is not None:
                    raise RuntimeError(self.log()) from None

    def log(self):
        return self._log.read_text()

    def stop(self):
        """Ends it with SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.channel.close()
        return code
