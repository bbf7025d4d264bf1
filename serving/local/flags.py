"""The command line of `tensorflow_model_server`: `--name=value`; unknown flags are tolerated with a warning."""

import logging
from types import SimpleNamespace

# What this server reads, with the real server's defaults (rest_api_port: its Docker image's).
FLAGS = {
    "port": 8500,
    "rest_api_port": 8501,
    "rest_api_timeout_in_ms": 30000,
    "model_name": "default",
    "model_base_path": "",
    "model_config_file": "",
    "model_config_file_poll_wait_seconds": 0,
    "file_system_poll_wait_seconds": 1,
    "max_num_load_retries": 5,
    "load_retry_interval_micros": 60_000_000,
    "allow_version_labels_for_unavailable_models": False,
    "enable_batching": False,
    "batching_parameters_file": "",
    "enable_model_warmup": True,
    "num_request_iterations_for_warmup": 0,
    "saved_model_tags": "serve",
    "monitoring_config_file": "",
    "tensorflow_session_parallelism": 0,
    "tensorflow_intra_op_parallelism": 0,
    "tensorflow_inter_op_parallelism": 0,
    "xla_cpu_compilation_enabled": False,
    "grpc_max_threads": 0,
    "grpc_channel_arguments": "",
    "version": False,
}

_KINDS = {bool: "true or false", int: "an integer"}
_BOOLEANS = {"": True, "true": True, "1": True, "false": False, "0": False}


def parse(arguments):
    """Command-line arguments as a namespace with one attribute for each of `FLAGS`.

    Raises:
        ValueError: naming the flag, for a value that is not of its kind.
    """
    values = SimpleNamespace(**FLAGS)
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in FLAGS:
            logging.warning("unknown argument: %s", argument)
            continue
        kind = type(FLAGS[name])
        try:
            if kind is not bool and not equals:
                raise ValueError
            setattr(values, name, _BOOLEANS[value] if kind is bool else kind(value))
        except (KeyError, ValueError):
            raise ValueError(f"--{name}={value}: {name} takes {_KINDS.get(kind, 'a value')}: --{name}=…") from None
    return values
