"""Starts the server: `python -m serving.local --port=8500 --model_config_file=models/models.config`."""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time

from . import config_files, flags
from .errors import ServingError

GRACE_SECONDS = 10  # for running requests, once the server is told to end
# A graph that loops over cheap operations keeps one of these threads to itself; the others must still find one.
INTER_OP_THREADS = 128


def main(arguments):
    """Serves until SIGTERM or SIGINT, which end the process with exit code 0.

    Args:
        arguments: the command line, a list of strings; see `flags`.

    Returns:
        The exit code: 255 if the server cannot start, 0 after `--version`.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s: %(levelname).1s serving.local] %(message)s"
    )
    stopping = threading.Event()
    try:
        _serve(flags.parse(arguments), stopping)
    except (ServingError, ValueError, RuntimeError, OSError) as error:
        if not stopping.is_set():
            code = f"{error.code}: " if isinstance(error, ServingError) else ""
            print(f"Failed to start server. Error: {code}{error}", file=sys.stderr, flush=True)
            return 255
    if stopping.is_set():
        # A graph or a load that cannot be stopped would hold the interpreter's end up, and may crash it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


def _serve(options, stopping):
    config = _model_config(options)
    monitoring_path = options.monitoring_config_file and config_files.monitoring_path(options.monitoring_config_file)

    _set_on_signal(stopping)
    # TensorFlow takes seconds to import: not before the flags are known to be right.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from . import grpc_server
    from .models import Models

    if options.version:
        print(f"TensorFlow ModelServer: keras_sd's local server\nTensorFlow Library: {tf.__version__}")
        return
    _set_parallelism(tf, options)
    if not options.xla_cpu_compilation_enabled:
        _disable_xla(tf)
    models = Models(
        _loader(options),
        poll_seconds=options.file_system_poll_wait_seconds,
        max_retries=options.max_num_load_retries,
        retry_seconds=options.load_retry_interval_micros / 1e6,
        labels_for_unavailable=options.allow_version_labels_for_unavailable_models,
        stopping=stopping,
    )
    models.start(config)
    servers = []
    if options.port:
        servers.append(
            grpc_server.Server(
                models,
                options.port,
                max_threads=options.grpc_max_threads or grpc_server.DEFAULT_THREADS,
                options=_channel_arguments(options.grpc_channel_arguments),
            )
        )
        logging.info("Running gRPC ModelServer at 0.0.0.0:%d ...", options.port)
    if options.rest_api_port and options.rest_api_port == options.port:
        logging.error("--rest_api_port cannot be same as --port. Skipped exporting HTTP/REST API.")
    elif options.rest_api_port:
        from . import rest_server

        try:
            servers.append(
                rest_server.serve(
                    models, options.rest_api_port, options.rest_api_timeout_in_ms, monitoring_path or None
                )
            )
            logging.info("Exporting HTTP/REST API at:localhost:%d ...", options.rest_api_port)
        except OSError as error:  # as the real server, which then serves gRPC alone
            logging.error("Failed to start HTTP Server at localhost:%d: %s", options.rest_api_port, error)
    if options.model_config_file and options.model_config_file_poll_wait_seconds > 0:
        threading.Thread(target=_reread_config, args=(models, options, stopping), daemon=True).start()
    stopping.wait()
    logging.info("Shutting down")
    stops = [threading.Thread(target=server.stop, args=(GRACE_SECONDS,), daemon=True) for server in servers]
    for stop in stops:
        stop.start()
    end = time.monotonic() + GRACE_SECONDS + 2
    for stop in stops:
        stop.join(max(0, end - time.monotonic()))
    if any(stop.is_alive() for stop in stops):
        logging.error("requests that cannot be stopped are still running")


def _set_on_signal(stopping):
    """A thread of its own waits for what the signals write: Python's handlers run in the main thread alone, once it
    wakes, which is never where the system hands the signal to another one."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.detach())
    threading.Thread(target=lambda: (reader.recv(1), stopping.set()), name="signals", daemon=True).start()


def _model_config(options):
    if options.model_config_file:
        return config_files.model_server_config(options.model_config_file)
    if options.model_base_path or options.version:
        return config_files.single_model(options.model_name, options.model_base_path)
    raise ValueError("neither --model_base_path nor --model_config_file is given; one of them is needed")


def _set_parallelism(tf, options):
    both = options.tensorflow_session_parallelism
    tf.config.threading.set_intra_op_parallelism_threads(options.tensorflow_intra_op_parallelism or both)
    tf.config.threading.set_inter_op_parallelism_threads(
        options.tensorflow_inter_op_parallelism or both or INTER_OP_THREADS
    )


def _disable_xla(tf):
    """Has compiled functions refused, as the real server does: "XLA compilation disabled". For the whole process."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2"))
    library["_ZN10tensorflow21DisableXlaCompilationEv"]()  # tensorflow::DisableXlaCompilation(), which has no binding


def _loader(options):
    """What makes a `Servable` of (name, version, path)."""
    from . import batching, warmup
    from .servable import Servable

    if options.batching_parameters_file and not options.enable_batching:
        raise ValueError("--batching_parameters_file is given without --enable_batching")
    batcher = None
    if options.enable_batching:
        file = options.batching_parameters_file
        batcher = batching.Batcher(config_files.batching_parameters(file) if file else batching.Parameters())
    tags = tuple(options.saved_model_tags.split(","))

    def load(name, version, path):
        servable = Servable(name, version, path, tags, batcher)
        if options.enable_model_warmup:
            warmup.replay(servable, path, max(1, options.num_request_iterations_for_warmup))
        return servable

    return load


def _channel_arguments(text):
    """`a=1,b=c` as gRPC's channel arguments: numbers are numbers."""
    pairs = [argument.partition("=")[::2] for argument in text.split(",") if argument]
    return [(name, int(value) if value.lstrip("-").isdigit() else value) for name, value in pairs]


def _reread_config(models, options, stopping):
    while not stopping.wait(options.model_config_file_poll_wait_seconds):
        try:
            models.reload(config_files.model_server_config(options.model_config_file))
        except ServingError as error:
            logging.error("%s cannot be taken over: %s: %s", options.model_config_file, error.code, error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
