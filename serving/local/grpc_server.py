"""gRPC: PredictionService, ModelService and grpc.health.v1 over `Models`."""

import time
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from . import metrics, tensors
from .call import Call
from .errors import CODES, ServingError, from_exception

# Each waiting request keeps a thread, so there are more of them than anybody's clients: status must always find one.
DEFAULT_THREADS = 1024
MAX_MESSAGE = 1024  # bytes of an error's text
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Server:
    """A running gRPC server.

    Args:
        models: `Models`.
        port: the TCP port; 0 takes a free one, then found in `.port`.
        max_threads: how many requests run at once.
        options: gRPC channel arguments, (name, value) pairs.

    Raises:
        RuntimeError: if the port is taken.
    """

    def __init__(self, models, port, max_threads=DEFAULT_THREADS, options=()):
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_threads, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                *options,
            ],
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_PredictionService(models), self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_ModelService(models), self._server)
        self._health = health.HealthServicer()
        for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = self._server.add_insecure_port(f"0.0.0.0:{port}")
        self._server.start()

    def stop(self, grace):
        """Reports NOT_SERVING, takes no new requests, and gives the running ones `grace` seconds; waits for the end."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()


def _answers(counted=False):
    """Makes a method of (request, call) one of gRPC: errors become status codes; the metrics count it if asked to."""

    def decorate(method):
        def handle(self, request, context):
            start, code = time.monotonic(), "OK"
            remaining = context.time_remaining()
            call = Call(remaining if remaining is not None and remaining < 1e9 else None)
            if not context.add_callback(call.cancel):
                call.cancel()
            try:
                return method(self, request, call)
            except Exception as error:
                error = from_exception(error)
                code = error.code
                text = error.message.encode(errors="replace")
                if len(text) > MAX_MESSAGE:
                    text = text[:MAX_MESSAGE] + b"...TRUNCATED"
                context.abort(_STATUS_CODES[CODES[code]], text.decode(errors="ignore"))
            finally:
                if counted:
                    metrics.record_request(
                        request.model_spec.name, method.__name__, "GRPC", code, time.monotonic() - start
                    )

        return handle

    return decorate


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self._models = models

    @_answers(counted=True)
    def Predict(self, request, call):
        servable = _find(self._models, request)
        signature_name, signature = servable.signature(request.model_spec.signature_name)
        inputs = {name: tensors.to_array(proto, name) for name, proto in request.inputs.items()}
        _, outputs = servable.predict(signature_name, inputs, request.output_filter, call)
        response = predict_pb2.PredictResponse()
        _describe(response.model_spec, servable)
        response.model_spec.signature_name = signature_name
        for name, array in outputs.items():
            response.outputs[name].CopyFrom(tensors.to_proto(array))
        return response

    @_answers()
    def GetModelMetadata(self, request, call):
        _require_model_spec(request)
        if not request.metadata_field:
            raise ServingError("INVALID_ARGUMENT", "GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != "signature_def":
                raise ServingError("INVALID_ARGUMENT", f"Metadata field {field} is not supported")
        servable = _find(self._models, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in servable.signature_defs.items():
            signatures.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        _describe(response.model_spec, servable)
        response.metadata["signature_def"].Pack(signatures)
        return response


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models):
        self._models = models

    @_answers()
    def GetModelStatus(self, request, call):
        _require_model_spec(request)
        response = get_model_status_pb2.GetModelStatusResponse()
        spec = request.model_spec
        for version, state, code, message in self._models.status(spec.name, **_version_choice(spec)):
            status = response.model_version_status.add(version=version, state=state)
            status.status.error_code, status.status.error_message = CODES[code], message
        return response

    @_answers()
    def HandleReloadConfigRequest(self, request, call):
        if request.config.WhichOneof("config") != "model_config_list":
            raise ServingError(
                "INVALID_ARGUMENT",
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
                "supported",
            )
        self._models.reload(request.config, call)
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response


def _require_model_spec(request):
    if not request.HasField("model_spec"):
        raise ServingError("INVALID_ARGUMENT", "Missing ModelSpec")


def _find(models, request):
    _require_model_spec(request)
    return models.find(request.model_spec.name, **_version_choice(request.model_spec))


def _version_choice(spec):
    choice = spec.WhichOneof("version_choice")
    if choice == "version":
        return {"version": spec.version.value}
    return {"label": spec.version_label} if choice else {}


def _describe(spec, servable):
    spec.name = servable.name
    spec.version.value = servable.version
