"""The local server through gRPC: every promise that the real server makes to a client."""

import concurrent.futures
import random
import threading

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from saved_models import DTYPES, Process, save_everything, save_half_plus, save_tf1, values
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
FOREVER = np.int64(2**62)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_everything(folder / "everything" / "0042")
    save_tf1(folder / "tf1" / "1", ["apple", "pear"], 3)
    save_half_plus(folder / "half_plus" / "1", 1)
    save_half_plus(folder / "half_plus" / "2", 2)
    save_half_plus(folder / "half_plus" / "3", 3)
    (folder / "models.config").write_text(
        "model_config_list {"
        + "".join(
            f'config {{ name: "{name}" base_path: "{folder / name}" model_platform: "tensorflow" {more} }}'
            for name, more in {
                "everything": "",
                "tf1": "",
                "half_plus": "model_version_policy { specific { versions: 1 versions: 2 } }"
                ' version_labels { key: "stable" value: 1 } version_labels { key: "absent" value: 9 }',
            }.items()
        )
        + "}"
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Process(
        folder / "log",
        f"--model_config_file={folder / 'models.config'}",
        "--allow_version_labels_for_unavailable_models",
        "--some_flag_of_a_later_version=1",
    )
    yield server
    server.process.kill()  # where no test has ended it


@pytest.fixture(scope="module")
def stub(server):
    return prediction_service_pb2_grpc.PredictionServiceStub(server.channel)


def request(model, signature="", version=None, label=None, outputs=(), **inputs):
    message = predict_pb2.PredictRequest(output_filter=outputs)
    message.model_spec.name, message.model_spec.signature_name = model, signature
    if version is not None:
        message.model_spec.version.value = version
    if label is not None:
        message.model_spec.version_label = label
    for name, value in inputs.items():
        proto = value if isinstance(value, tensor_pb2.TensorProto) else tf.make_tensor_proto(value)
        message.inputs[name].CopyFrom(proto)
    return message


def error_of(call, *arguments):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=60)
    return caught.value.code(), caught.value.details()


def floats(values, *shape, **fields):
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=values, **fields)
    for size in shape:
        proto.tensor_shape.dim.add().size = size
    return proto


# Predict


def test_a_prediction_names_what_answered_and_fills_the_typed_fields(stub):
    response = stub.Predict(request("everything", x=np.ones((2, 1), np.float32), n=np.int32(3)))
    assert response.model_spec.name == "everything"
    assert response.model_spec.signature_name == "serving_default"
    assert response.model_spec.version.value == 42
    assert list(response.outputs["scaled"].float_val) == [3.0, 3.0]
    assert not response.outputs["scaled"].tensor_content
    assert list(response.outputs["n"].int_val) == [3] and not response.outputs["n"].tensor_shape.dim


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_with_every_value(stub, dtype, shape):
    sent = values(dtype, shape)
    from serving.local.tensors import FIELDS, to_array, to_proto

    response = stub.Predict(request("everything", f"echo_{dtype}", x=to_proto(sent)))
    proto = response.outputs["x"]
    name = types_pb2.DataType.Name(proto.dtype)
    assert tf.as_dtype(proto.dtype).name == dtype
    field = next(field for field, dtypes in FIELDS.items() if name in dtypes.split())
    assert len(getattr(proto, field)) == sent.size * (2 if dtype.startswith("complex") else 1)
    np.testing.assert_array_equal(to_array(proto, "x"), sent)
    if dtype != "string" and not dtype.startswith("q"):  # the same as raw bytes
        content = tensor_pb2.TensorProto(dtype=proto.dtype, tensor_shape=proto.tensor_shape)
        content.tensor_content = sent.tobytes()
        again = stub.Predict(request("everything", f"echo_{dtype}", x=content)).outputs["x"]
        np.testing.assert_array_equal(tf.make_ndarray(again), sent)


def test_typed_values_are_as_tensorflow_itself_writes_them(stub):
    for dtype in DTYPES:
        response = stub.Predict(request("everything", f"echo_{dtype}", x=_typed(values(dtype, (1,)))))
        assert response.outputs["x"] == _typed(values(dtype, (1,))), dtype


def _typed(array):
    from serving.local.tensors import dtype_of

    # make_tensor_proto uses the typed fields for single values.
    plain = array.view(array.dtype[0]) if array.dtype.names else array
    return tf.make_tensor_proto(plain, dtype=dtype_of(array))


def test_fewer_values_than_elements_repeat_the_last(stub):
    response = stub.Predict(request("everything", "echo_float32", x=floats([1, 2], 2, 2)))
    assert list(response.outputs["x"].float_val) == [1, 2, 2, 2]
    response = stub.Predict(request("everything", "echo_float32", x=floats([], 2)))
    assert list(response.outputs["x"].float_val) == [0, 0]


@pytest.mark.parametrize(
    "proto",
    [
        floats([1], -1),
        floats([1], -1, 0),
        floats([1, 2, 3], 2),
        floats([], 2, tensor_content=b"1234567"),
        floats([], 1, tensor_content=b"12345678"),
        floats([1], 2**40),
        floats([1], 2**31, 2**31, 2**31),
        floats([1], *[1] * 300),
        floats([1], tensor_shape={"unknown_rank": True}),
        tensor_pb2.TensorProto(),
        tensor_pb2.TensorProto(dtype=types_pb2.DT_VARIANT),
        tensor_pb2.TensorProto(dtype=types_pb2.DT_RESOURCE),
        tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT_REF, float_val=[1]),
        tensor_pb2.TensorProto(dtype=999, float_val=[1]),
        tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_content=b"\x09ab"),
        tensor_pb2.TensorProto(dtype=types_pb2.DT_BOOL, tensor_content=b"\x02"),
    ],
    ids=repr,
)
def test_what_is_no_tensor_is_an_invalid_argument(stub, proto):
    assert error_of(stub.Predict, request("everything", "echo_float32", x=proto)) == (
        INVALID,
        "tensor parsing error: x",
    )


def test_strings_keep_their_bytes_and_a_signature_may_have_no_inputs(stub):
    response = stub.Predict(request("everything", "nothing"))
    assert list(response.outputs["bytes"].string_val) == [b"\x00\xff", b""]


def test_an_output_filter_selects(stub):
    inputs = {"x": np.float32(2), "n": np.int32(3)}
    assert set(stub.Predict(request("everything", outputs=["n"], **inputs)).outputs) == {"n"}
    assert set(stub.Predict(request("everything", outputs=["n", "scaled"], **inputs)).outputs) == {"n", "scaled"}
    code, text = error_of(stub.Predict, request("everything", outputs=["m"], **inputs))
    assert code == INVALID
    assert text == ("output tensor alias not found in signature: m Outputs expected to be in the set {n,scaled}.")
    code, text = error_of(stub.Predict, request("everything", outputs=["n", "n"], **inputs))
    assert (code, text) == (INVALID, "duplicate output tensor alias: n")


def test_big_messages_pass_in_both_directions(stub):
    sent = np.random.default_rng(0).standard_normal((4, 512, 1024, 3)).astype(np.float32)  # 25 MB
    response = stub.Predict(request("everything", "echo_float32", x=sent))
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["x"]), sent)


def test_a_savedmodel_of_tensorflow_1(stub):
    response = stub.Predict(request("tf1", "look_up", word=[b"pear", b"apple", b"plum"]))
    assert list(response.outputs["row"].int64_val) == [1, 0, -1]
    assert list(stub.Predict(request("tf1", outputs=["y"], x=np.float32([2]))).outputs["y"].float_val) == [7]
    code, text = error_of(stub.Predict, request("tf1", x=np.float32([2])))
    assert code == INVALID and text.startswith("infinite : Tensor had Inf values\n\t [[{{node")
    assert list(stub.Predict(request("tf1", "middle", scaled=np.float32([5]))).outputs["y"].float_val) == [6]


# Errors


@pytest.mark.parametrize(
    "message, code, text",
    [
        (predict_pb2.PredictRequest(), INVALID, "Missing ModelSpec"),
        (request(""), INVALID, "ModelSpec has no name specified."),
        (request("m"), NOT_FOUND, "Servable not found for request: Latest(m)"),
        (request("half_plus", version=0), NOT_FOUND, "Servable not found for request: Specific(half_plus, 0)"),
        (request("half_plus", version=3), NOT_FOUND, "Servable not found for request: Specific(half_plus, 3)"),
        (request("half_plus", label="absent"), NOT_FOUND, "Servable not found for request: Specific(half_plus, 9)"),
        (request("half_plus", label="new"), INVALID, "Unrecognized servable version label: new"),
        (request("m", label="new"), INVALID, "Unrecognized servable version label: new"),
        (
            request("everything", "other"),
            grpc.StatusCode.FAILED_PRECONDITION,
            'Serving signature key "other" not found.',
        ),
        (
            request("everything", x=np.float32(1)),
            INVALID,
            "input size does not match signature: 1!=2 len({x}) != len({n,x}). Sent extra: {}. "
            "Missing but required: {n}.",
        ),
        (
            request("everything", "nothing", x=np.float32(1)),
            INVALID,
            "input size does not match signature: 1!=0 len({x}) != len({}). Sent extra: {x}. Missing but required: {}.",
        ),
        (
            request("everything", x=np.float32(1), m=np.int32(1)),
            INVALID,
            "Signature input alias: n(feed name: serving_default_n:0) not found in request and no default value "
            "provided. Inputs expected to be in the request {m,x}, or default input alias set: ",
        ),
        (
            request("everything", x=np.float64(1), n=np.int32(1)),
            INVALID,
            "Expects arg[1] to be float but double is provided",
        ),
        (
            request("everything", x=np.float32(1), n="1"),
            INVALID,
            "Expects arg[0] to be int32 but string is provided",
        ),
        (
            request("everything", "positive", x=np.float32([1, -1])),
            INVALID,
            "assertion failed: [not positive:] [1 -1]\n\t [[",
        ),
        (
            request("everything", "matmul", x=np.ones((2, 4), np.float32)),
            INVALID,
            "Matrix size-incompatible: In[0]: [2,4], In[1]: [3,1]\n\t [[{{node",
        ),
        (request("everything", "gather", i=np.int32([5])), INVALID, "indices[0] = 5 is not in [0, 2)\n\t [[{{"),
        (request("everything", "__saved_model_init_op"), INVALID, "Tensor NoOp"),
    ],
)
def test_errors_have_the_code_and_text_of_the_real_server(stub, message, code, text):
    got_code, got_text = error_of(stub.Predict, message)
    assert (got_code, got_text[: len(text)]) == (code, text)
    assert "Op:" not in got_text and "Detected at" not in got_text


def test_long_messages_are_cut(stub):
    code, text = error_of(stub.Predict, request("everything", "number", text="ü" * 2000))
    assert code == INVALID
    assert text.startswith("StringToNumberOp could not correctly convert string: üü") and text.endswith("...TRUNCATED")
    assert len(text.encode()) <= 1024 + len("...TRUNCATED")


def test_other_inference_calls_are_unimplemented(stub):
    from tensorflow_serving.apis import classification_pb2, inference_pb2, regression_pb2

    for call, message in [
        (stub.Classify, classification_pb2.ClassificationRequest()),
        (stub.Regress, regression_pb2.RegressionRequest()),
        (stub.MultiInference, inference_pb2.MultiInferenceRequest()),
    ]:
        assert error_of(call, message)[0] == grpc.StatusCode.UNIMPLEMENTED


# Metadata, status, health


def test_metadata_are_the_signatures_of_the_file(stub, folder):
    message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    message.model_spec.name = "everything"
    response = stub.GetModelMetadata(message)
    assert (response.model_spec.name, response.model_spec.version.value) == ("everything", 42)
    packed = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(packed)
    file = saved_model_pb2.SavedModel.FromString((folder / "everything/0042/saved_model.pb").read_bytes())
    assert dict(packed.signature_def) == dict(file.meta_graphs[0].signature_def)


def test_metadata_fields_must_be_signature_def(stub):
    message = get_model_metadata_pb2.GetModelMetadataRequest()
    assert error_of(stub.GetModelMetadata, message) == (INVALID, "Missing ModelSpec")
    message.model_spec.name = "everything"
    assert error_of(stub.GetModelMetadata, message) == (
        INVALID,
        "GetModelMetadataRequest must specify at least one metadata_field",
    )
    message.metadata_field.append("weights")
    assert error_of(stub.GetModelMetadata, message) == (INVALID, "Metadata field weights is not supported")
    message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    message.model_spec.name = "m"
    assert error_of(stub.GetModelMetadata, message) == (NOT_FOUND, "Servable not found for request: Latest(m)")


def test_versions_and_labels_choose(stub, server):
    def predict(**which):
        return stub.Predict(request("half_plus", x=np.float32([2]), **which)).outputs["y"].float_val[0]

    assert predict() == 3 and predict(version=1) == 2 and predict(label="stable") == 2
    models = model_service_pb2_grpc.ModelServiceStub(server.channel)
    message = get_model_status_pb2.GetModelStatusRequest()
    assert error_of(models.GetModelStatus, message) == (INVALID, "Missing ModelSpec")
    message.model_spec.name = "half_plus"
    states = models.GetModelStatus(message).model_version_status
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert [(s.version, s.state, s.status.error_code, s.status.error_message) for s in states] == [
        (2, available, 0, ""),
        (1, available, 0, ""),
    ]
    message.model_spec.version.value = 1
    assert [status.version for status in models.GetModelStatus(message).model_version_status] == [1]
    message.model_spec.version.value = 7
    assert error_of(models.GetModelStatus, message) == (NOT_FOUND, "Could not find version 7 of model half_plus")
    message = get_model_status_pb2.GetModelStatusRequest()
    message.model_spec.name = "m"
    assert error_of(models.GetModelStatus, message) == (NOT_FOUND, "Could not find any versions of model m")


def test_configs_that_cannot_be_taken_change_nothing(stub, server):
    models = model_service_pb2_grpc.ModelServiceStub(server.channel)
    message = model_management_pb2.ReloadConfigRequest()
    assert error_of(models.HandleReloadConfigRequest, message)[0] == INVALID
    message.config.model_config_list.config.add(name="everything", base_path="/nowhere", model_platform="caffe")
    assert error_of(models.HandleReloadConfigRequest, message)[0] == INVALID
    message.config.model_config_list.config[0].model_platform = "tensorflow"
    message.config.model_config_list.config[0].version_labels["new"] = 7
    message.config.model_config_list.config[0].version_labels["stable"] = 7
    message.config.model_config_list.config.add(name="everything", base_path="/nowhere", model_platform="tensorflow")
    assert error_of(models.HandleReloadConfigRequest, message)[0] == INVALID
    stub.Predict(request("half_plus", x=np.float32([2])))


def test_health(server):
    health = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", "tensorflow.serving.PredictionService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING


# Load


def test_sixteen_clients_get_their_own_results(stub):
    def client(number):
        for i in range(20):
            sent = np.full((number % 5 + 1, 2), number * 100 + i, np.float32)
            response = stub.Predict(request("everything", x=sent, n=np.int32(number)), timeout=60)
            np.testing.assert_array_equal(tf.make_ndarray(response.outputs["scaled"]), sent * number)
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(client, range(16)))


def test_endless_predictions_block_nobody_and_stop_when_their_clients_leave(stub, server):
    endless = [stub.Predict.future(request("everything", "loop", steps=FOREVER)) for _ in range(24)]
    stub.Predict(request("everything", x=np.float32(1), n=np.int32(1)), timeout=60)
    stub.Predict(request("half_plus", x=np.float32([1])), timeout=60)
    message = get_model_status_pb2.GetModelStatusRequest()
    message.model_spec.name = "everything"
    model_service_pb2_grpc.ModelServiceStub(server.channel).GetModelStatus(message, timeout=60)
    assert not any(call.done() for call in endless)
    for call in endless:
        call.cancel()
    # That the work stops is what lets the server end in time: see test_the_server_ends_gracefully.


def test_a_deadline_stops_the_work(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request("everything", "loop", steps=FOREVER), timeout=0.5)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_fuzzed_requests_are_answered_and_leave_the_server_serving(stub, server):
    chance = random.Random(3)
    method = "/tensorflow.serving.PredictionService/"
    valid = [
        request("everything", x=np.ones((2, 2), np.float32), n=np.int32(2)),
        request("everything", "echo_string", x=[b"some", b"words"]),
        request("everything", "echo_float16", x=np.ones(3, np.float16), outputs=["x"]),
        request("half_plus", label="stable", x=floats([1, 2], 4)),
        request("tf1", "look_up", word=[b"pear"]),
    ]

    def mutated():
        data = bytearray(chance.choice(valid).SerializeToString())
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randint(1, 4)]
                case 2:
                    data[at:at] = chance.randbytes(chance.randint(1, 4))
            data = data or bytearray(b"\x00")
        return bytes(data)

    messages = [mutated() for _ in range(800)] + [chance.randbytes(chance.randrange(200)) for _ in range(200)]
    calls = [
        server.channel.unary_unary(method + name, lambda data: data, lambda data: data)
        for name in ("Predict", "GetModelMetadata")
    ]
    answers = [calls[i % 10 == 0].future(message, timeout=120) for i, message in enumerate(messages)]
    codes = {answer.code() for answer in answers}
    # INTERNAL: bytes that are no message at all, which the transport refuses.
    known = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "INTERNAL"}
    assert {code.name for code in codes} <= known
    assert server.process.poll() is None
    stub.Predict(valid[0], timeout=60)


# Beside the requests


def test_metrics_have_the_names_and_form_of_the_real_server():
    from serving.local import metrics

    metrics.record_request("a", "Predict", "GRPC", "OK", 0.00002)
    metrics.record_request('b"\\', "Predict", "REST", "NOT_FOUND", 0.1)
    lines = metrics.exposition().splitlines()
    assert "# TYPE :tensorflow:serving:request_count counter" in lines
    assert ':tensorflow:serving:request_count{model_name="a",status="OK"} 1' in lines
    assert ':tensorflow:serving:request_count{model_name="b\\"\\\\",status="NOT_FOUND"} 1' in lines
    assert "# TYPE :tensorflow:serving:request_latency histogram" in lines
    name, labels = ":tensorflow:serving:request_latency", 'model_name="a",API="Predict",entrypoint="GRPC"'
    buckets = [line for line in lines if line.startswith(f"{name}_bucket{{{labels},")]
    assert len(buckets) == 33
    assert buckets[0] == f'{name}_bucket{{{labels},le="10"}} 0'
    assert buckets[2] == f'{name}_bucket{{{labels},le="32.4"}} 1'
    assert buckets[-1] == f'{name}_bucket{{{labels},le="+Inf"}} 1'
    assert f"{name}_sum{{{labels}}} 20" in lines and f"{name}_count{{{labels}}} 1" in lines


def test_a_signature_may_have_defaults(tmp_path):
    from serving.local.call import Call
    from serving.local.servable import Servable

    save_everything(tmp_path / "1")
    file = tmp_path / "1" / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    defaults = saved_model.meta_graphs[0].signature_def["serving_default"].defaults
    defaults["n"].CopyFrom(tf.make_tensor_proto(np.int32(5)))
    file.write_bytes(saved_model.SerializeToString())
    _, outputs = Servable("m", 1, str(tmp_path / "1")).predict("", {"x": np.float32(2)}, ("scaled",), Call())
    assert outputs == {"scaled": 10}


def test_a_call_ends_once_and_tells_who_waits():
    from serving.local.call import Call
    from serving.local.errors import ServingError

    told = []
    call = Call()
    call.on_cancel(lambda: told.append(1))
    assert call.ended() is None and call.remaining() is None
    call.cancel()
    call.cancel("DEADLINE_EXCEEDED")
    call.on_cancel(lambda: told.append(2))
    assert told == [1, 2] and call.ended() == "CANCELLED"
    late, passed = Call(timeout_seconds=0.1), threading.Event()
    late.on_cancel(passed.set)
    assert passed.wait(30)
    with pytest.raises(ServingError) as caught:
        late.check()
    assert caught.value.code == "DEADLINE_EXCEEDED"


# Start and end


@pytest.mark.parametrize(
    "flags, text",
    [
        ([], "--model_base_path"),
        (["--model_base_path=/m", "--port=high"], "port takes an integer"),
        (["--model_base_path=/m", "--enable_batching=perhaps"], "enable_batching takes true or false"),
        (["--model_config_file=/nowhere"], "/nowhere"),
    ],
)
def test_flags_that_cannot_be_are_an_error_at_the_start(flags, text, capsys):
    from serving.local.__main__ import main

    assert main(flags) == 255
    assert text in capsys.readouterr().err


def test_the_server_ends_gracefully(server, stub):
    """The last test of this server: what runs is finished, what nobody waits for has stopped, and it exits with 0."""
    finishes = stub.Predict.future(request("everything", "loop", steps=np.int64(100_000)))
    stub.Predict(request("everything", "nothing"), timeout=60)
    assert server.stop() == 0
    assert finishes.code() == grpc.StatusCode.OK
    assert "still running" not in server.log()
