"""The text files that flags name: ModelServerConfig, BatchingParameters, MonitoringConfig.

tensorflow-serving-api has the first message only; the other two are declared here, with the field names of the real
server's .proto files (the numbers do not matter in text).
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from . import batching, metrics
from .errors import ServingError

_MESSAGES = {
    "BatchingParameters": {
        "max_batch_size": "Int64Value",
        "batch_timeout_micros": "Int64Value",
        "max_enqueued_batches": "Int64Value",
        "num_batch_threads": "Int64Value",
        "thread_pool_name": "StringValue",
        "allowed_batch_sizes": "repeated int64",
        "pad_variable_length_inputs": "bool",
        "enable_large_batch_splitting": "BoolValue",
        "max_execution_batch_size": "Int64Value",
    },
    "PrometheusConfig": {"enable": "bool", "path": "string"},
    "MonitoringConfig": {"prometheus_config": "PrometheusConfig"},
}


def model_server_config(path):
    """The `ModelServerConfig` in a text file.

    Raises:
        ServingError: NOT_FOUND if there is no such file, INVALID_ARGUMENT if it holds something else.
    """
    return _read(path, model_server_config_pb2.ModelServerConfig())


def single_model(name, base_path):
    """The `ModelServerConfig` of one model."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.config.add(name=name, base_path=base_path, model_platform="tensorflow")
    return config


def batching_parameters(path):
    """The `batching.Parameters` in a text file, with defaults for the rest. Raises as `model_server_config`."""
    message = _read(path, _message("BatchingParameters"))
    values = {
        field.name: value if isinstance(value, bool) else tuple(value) if field.is_repeated else value.value
        for field, value in message.ListFields()
        if field.name in batching.Parameters._fields
    }
    return batching.Parameters(**values)


def monitoring_path(path):
    """The metrics' path by a text file of MonitoringConfig, None if it is off. Raises as `model_server_config`."""
    config = _read(path, _message("MonitoringConfig")).prometheus_config
    return (config.path or metrics.DEFAULT_PATH) if config.enable else None


def _read(path, message):
    try:
        with open(path, encoding="utf-8") as file:
            return text_format.Parse(file.read(), message)
    except OSError as error:
        raise ServingError("NOT_FOUND", f"{path}; {error.strerror}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ServingError("INVALID_ARGUMENT", f"Invalid protobuf file: '{path}' ({error})") from None


def _message(name):
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"tensorflow.serving.{name}"))()


def _declare():
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_sd/serving_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    types = descriptor_pb2.FieldDescriptorProto
    plain = {"int64": types.TYPE_INT64, "bool": types.TYPE_BOOL, "string": types.TYPE_STRING}
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields.items(), start=1):
            repeated, kind = kind.startswith("repeated "), kind.removeprefix("repeated ")
            field = message.field.add(name=field_name, number=number)
            field.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            if kind in plain:
                field.type = plain[kind]
            else:
                package = "google.protobuf" if kind.endswith("Value") else "tensorflow.serving"
                field.type, field.type_name = types.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool


_pool = _declare()
