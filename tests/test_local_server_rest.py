"""The local server through HTTP: every promise that the real server's REST API makes to a client."""

import base64
import concurrent.futures
import contextlib
import gzip
import http.client
import json
import random
import socket
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from saved_models import Process, save, save_everything, save_half_plus, values
from tensorflow_serving.config import model_server_config_pb2

from serving.local import metrics, rest_server
from serving.local.models import Models
from serving.local.servable import Servable

FOREVER = 2**62
ROWS = tf.TensorSpec([None], tf.float32)


def save_odd(path):
    """Signatures whose outputs REST treats in different ways."""
    text, number = tf.TensorSpec([None], tf.string), tf.TensorSpec([], tf.float32)
    signatures = {
        "serving_default": (lambda x, t: {"x": x * 2, "t": t}, {"x": ROWS, "t": text}),
        "strings": (lambda t: {"plain": t, "same_bytes": t}, {"t": text}),
        "scalar": (lambda x: {"y": tf.reduce_sum(x)}, {"x": ROWS}),
        "uneven": (lambda x: {"y": x, "z": tf.concat([x, x], 0)}, {"x": ROWS}),
        "half": (lambda x: {"y": tf.cast(x, tf.float16)}, {"x": ROWS}),
        "picture": (lambda x: {"image": tf.zeros([1, 512, 512, 3], tf.uint8) + 7}, {"x": number}),
        "read": (lambda name: {"y": tf.io.read_file(name)}, {"name": tf.TensorSpec([], tf.string)}),
    }
    save(path, signatures)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_everything(folder / "everything" / "42")
    save_odd(folder / "odd" / "1")
    for version in (1, 2, 3):
        save_half_plus(folder / "half plus" / str(version), version)
    config = text_format.Parse(
        f"""model_config_list {{
            config {{ name: "everything" base_path: "{folder}/everything" model_platform: "tensorflow" }}
            config {{ name: "odd" base_path: "{folder}/odd" model_platform: "tensorflow" }}
            config {{
                name: "half plus" base_path: "{folder}/half plus" model_platform: "tensorflow"
                model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
                version_labels {{ key: "stable/1" value: 1 }}
            }}
        }}""",
        model_server_config_pb2.ModelServerConfig(),
    )
    models = Models(lambda *which: Servable(*which), poll_seconds=0, labels_for_unavailable=True)
    models.start(config)
    yield models
    models.stop()


@contextlib.contextmanager
def serving(models, timeout_ms=0):
    server = rest_server.serve(models, 0, timeout_ms, metrics.DEFAULT_PATH, host="127.0.0.1")
    try:
        yield server
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def port(models):
    with serving(models) as server:
        yield server.port


def call(port, method, path, body=None, headers=()):
    """Status, content type and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read()
    finally:
        connection.close()


def ask(port, method, path, body=None, headers=()):
    """Status and JSON of an answer of the API; checks what all of them have in common."""
    body = json.dumps(body) if isinstance(body, dict) else body
    status, kind, text = call(port, method, path, body, headers)
    assert kind == "application/json"
    answer = json.loads(text)
    assert (status == 200) == (list(answer) != ["error"])
    return status, answer


def predict(port, model, body, where="", **headers):
    return ask(port, "POST", f"/v1/models/{model}{where}:predict", body, headers)


# What is asked and answered


def test_rows_and_columns(port):
    assert predict(port, "half%20plus", {"instances": [1.0, 2, 5]}) == (200, {"predictions": [2.5, 3.0, 4.5]})
    assert predict(port, "half%20plus", {"inputs": {"x": [1.0]}}) == (200, {"outputs": [2.5]})
    assert predict(port, "odd", {"instances": [{"x": 1, "t": "a"}, {"t": {"b64": "Yg=="}, "x": 2}]}) == (
        200,
        {"predictions": [{"x": 2.0, "t": "a"}, {"x": 4.0, "t": "b"}]},
    )
    assert predict(port, "odd", {"inputs": {"x": [1, 2], "t": ["a"]}}) == (
        200,
        {"outputs": {"x": [2.0, 4.0], "t": ["a"]}},
    )
    assert predict(port, "everything", {"inputs": {"x": [[1.5]], "n": 2}}) == (
        200,
        {"outputs": {"scaled": [[3.0]], "n": 2}},
    )
    matmul = {"signature_name": "matmul", "instances": [[1, 2, 3], [0, 0, 1]]}
    assert predict(port, "everything", matmul) == (200, {"predictions": [[14.0], [3.0]]})


def test_versions_and_labels(port):
    for where, result in {"": 3.0, "/versions/1": 2.0, "/versions/0002": 3.0, "/labels/stable%2F1": 2.0}.items():
        assert predict(port, "half%20plus", {"instances": [2]}, where)[1] == {"predictions": [result]}


def test_strings(port):
    data = [b"\x00\xff", "ü".encode(), b""]
    body = {"signature_name": "strings", "instances": [{"b64": base64.b64encode(item).decode()} for item in data]}
    status, _, text = call(port, "POST", "/v1/models/odd:predict", json.dumps(body))
    assert status == 200
    rows = json.loads(text.decode("utf-8", "surrogateescape"))["predictions"]
    assert [row["plain"].encode("utf-8", "surrogateescape") for row in rows] == data
    assert [base64.b64decode(row["same_bytes"]["b64"]) for row in rows] == data


@pytest.mark.parametrize("dtype", "float32 float64 int8 int16 int32 int64 uint8 uint32 uint64 bool".split())
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_every_dtype_comes_back(port, dtype, shape):
    array = values(dtype, shape)
    signature = {"signature_name": f"echo_{dtype}"}
    status, answer = predict(port, "everything", {**signature, "inputs": array.tolist()})
    assert status == 200
    np.testing.assert_array_equal(np.array(answer["outputs"]).ravel(), array.ravel())
    if shape and shape[0]:
        status, answer = predict(port, "everything", {**signature, "instances": array.tolist()})
        assert status == 200
        assert answer["predictions"] == array.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint16", "complex64"])
def test_dtypes_without_json_form(port, dtype):
    signature = {"signature_name": f"echo_{dtype}"}
    assert predict(port, "everything", {**signature, "instances": [1]})[0] == 400
    assert predict(port, "everything", {**signature, "inputs": [1]})[0] == 501


def test_status(port):
    def version(number):
        return {
            "version": str(number),
            "state": "AVAILABLE",
            "status": {"error_code": "OK", "error_message": ""},
        }

    path = "/v1/models/half%20plus"
    assert ask(port, "GET", path) == (200, {"model_version_status": [version(2), version(1)]})
    assert ask(port, "GET", f"{path}/versions/1") == (200, {"model_version_status": [version(1)]})
    assert ask(port, "GET", f"{path}/labels/stable%2F1") == (200, {"model_version_status": [version(1)]})
    assert ask(port, "GET", "/V1/MODELS/everything") == (200, {"model_version_status": [version(42)]})


def test_metadata(port):
    status, answer = ask(port, "GET", "/v1/models/half%20plus/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "half plus", "signature_name": "", "version": "2"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    described = signatures["serving_default"]["inputs"]["x"]
    assert described["dtype"] == "DT_FLOAT"
    assert described["tensor_shape"] == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert "__saved_model_init_op" in signatures
    for where in ("versions/1", "labels/stable%2F1"):
        assert ask(port, "GET", f"/v1/models/half%20plus/{where}/metadata")[1]["model_spec"]["version"] == "1"
    assert ask(port, "GET", "/v1/models/half%20plus/versions/9/metadata") == (
        404,
        {"error": "Servable not found for request: Specific(half plus, 9)"},
    )


@pytest.mark.parametrize(
    "method, path, body, status, text",
    [
        ("GET", "/v1/", None, 400, "Malformed request: GET /v1/"),
        ("GET", "/v1/foo?bar", None, 400, "Malformed request: GET /v1/foo?bar"),
        ("GET", "/v1/models", None, 400, "Missing model name in request."),
        ("GET", "/v1/models/", None, 400, "Malformed request"),
        ("GET", "/v1/models/odd/", None, 400, "Malformed request"),
        ("GET", "/v1/models/odd:predict", None, 400, "Malformed request"),
        ("GET", "/v1/models/odd/versions/one", None, 400, "Malformed request"),
        ("GET", "/v1/models/odd/versions/-1", None, 400, "Malformed request"),
        ("GET", "/v1/models/odd/versions/1/labels/a", None, 400, "Malformed request"),
        ("GET", f"/v1/models/odd/versions/{2**63}", None, 400, f"Failed to convert version: {2**63} to numeric."),
        ("GET", f"/v1/models/odd/versions/{'9' * 5000}", None, 400, "Failed to convert version"),
        ("GET", "/v1/models/odd/versions/9", None, 404, "Could not find version 9 of model odd"),
        ("GET", "/v1/models/odd/versions/0", None, 404, "Could not find version 0 of model odd"),
        ("GET", f"/v1/models/{'a' * 500_000}", None, 404, "Could not find any versions of model aaa"),
        ("GET", "/v1/models/nobody", None, 404, "Could not find any versions of model nobody"),
        ("GET", "/v1/models/odd?x=1", None, 404, "Could not find any versions of model odd?x=1"),
        ("GET", "/v1/models/%FF", None, 404, "Could not find any versions"),
        ("GET", "/v1/models/odd/labels/none", None, 400, "Unrecognized servable version label: none"),
        ("GET", "/v1/models/nobody/metadata", None, 404, "Servable not found for request: Latest(nobody)"),
        ("POST", "/v1/models/odd", "{}", 400, "Malformed request: POST /v1/models/odd"),
        ("POST", "/v1/models/odd/metadata", "{}", 400, "Malformed request"),
        ("POST", "/v1/models/odd:explain", "{}", 400, "Malformed request"),
        ("POST", "/v1/models/odd:predict?x=1", "{}", 400, "Malformed request"),
        ("PUT", "/v1/models/odd:predict", "{}", 400, "Malformed request: PUT"),
        ("DELETE", "/v1/models/odd", None, 400, "Malformed request: DELETE"),
        ("OPTIONS", "/v1/models/odd:predict", None, 400, "Malformed request: OPTIONS"),
        ("PATCH", "/v1/models/odd", "{}", 400, "Malformed request: PATCH"),
        ("POST", "/v1/models/nobody:predict", '{"instances": [1]}', 404, "Servable not found for request: Latest("),
        ("POST", "/v1/models/odd/versions/7:predict", "{}", 404, "Servable not found for request: Specific(odd, 7)"),
        ("POST", "/v1/models/odd/labels/none:predict", "{}", 400, "Unrecognized servable version label: none"),
        ("POST", "/v1/models/odd:predict", "", 400, "JSON Parse error: The document is empty"),
        ("POST", "/v1/models/odd:predict", "instances", 400, "JSON Parse error: Invalid value."),
        ("POST", "/v1/models/odd:predict", "[1]", 400, "Is not object"),
        ("POST", "/v1/models/odd:predict", "{}", 400, "Missing 'inputs' or 'instances' key"),
        ("POST", "/v1/models/odd:predict", '{"instances": []}', 400, "No values in 'instances' array"),
        ("POST", "/v1/models/odd:predict", '{"signature_name": 1}', 400, "'signature_name' key must be a string"),
        ("POST", "/v1/models/odd:predict", '{"signature_name": "no"}', 400, 'Serving signature name: "no" not found'),
    ],
)
def test_errors(port, method, path, body, status, text):
    answered, answer = ask(port, method, path, body)
    assert answered == status
    assert text in answer["error"]


@pytest.mark.parametrize(
    "model, body, status, text",
    [
        ("odd", {"signature_name": "scalar", "instances": [1]}, 400, "Tensor name: y has no shape information"),
        ("odd", {"signature_name": "uneven", "instances": [1]}, 400, "has inconsistent batch size"),
        ("odd", {"signature_name": "half", "inputs": [1]}, 400, "JSON value for tensor type: half"),
        ("odd", {"signature_name": "read", "inputs": "/no/such/file"}, 404, "No such file"),
        ("everything", {"signature_name": "positive", "inputs": [-1]}, 400, "not positive"),
        ("everything", {"signature_name": "matmul", "instances": [[1, 2]]}, 400, "Matrix size-incompatible"),
        ("everything", {"signature_name": "number", "inputs": "abc"}, 400, "could not correctly convert string: abc"),
        ("everything", {"signature_name": "gather", "inputs": 7}, 400, "not in [0, 2)"),
        ("everything", {"signature_name": "nothing", "inputs": {}}, 400, "Failed to get input map for signature"),
    ],
)
def test_errors_of_graphs_and_outputs(port, model, body, status, text):
    answered, answer = predict(port, model, body)
    assert answered == status
    assert text in answer["error"]


def test_other_paths_are_a_plain_404(port):
    for path in ("/", "/v2/models/odd", "/v1", "/metrics"):
        for method in ("GET", "POST"):
            assert call(port, method, path)[0] == 404


def test_metrics(port):
    predict(port, "half%20plus", {"instances": [1]})
    predict(port, "half%20plus", {"instances": []})
    status, kind, text = call(port, "GET", metrics.DEFAULT_PATH)
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert b':tensorflow:serving:request_count{model_name="half plus",status="INVALID_ARGUMENT"}' in text
    assert b':tensorflow:serving:request_latency_count{model_name="half plus",API="predict",entrypoint="REST"}' in text
    assert call(port, "GET", metrics.DEFAULT_PATH + "?x")[0] == 400


# HTTP


def exchange(port, *parts, pause=0.05):
    """Sends parts of bytes with pauses over one connection; returns all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for i, part in enumerate(parts):
            if i:
                time.sleep(pause)
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def post(body, *headers, path="/v1/models/half%20plus:predict", version="1.1"):
    lines = [f"POST {path} HTTP/{version}", "Host: test", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def test_a_connection_is_used_again_also_after_errors(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    own = connection.sock
    for i in range(20):
        body = [json.dumps({"instances": [i]}), "{", ""][i % 3]
        connection.request("POST", "/v1/models/half%20plus:predict", body)
        response = connection.getresponse()
        assert ("predictions" in json.loads(response.read())) == (i % 3 == 0)
        assert connection.sock is own
    connection.close()


def test_requests_that_do_not_wait_are_answered_in_order(port):
    bodies = [b'{"instances": [%d]}' % i for i in range(50)]
    requests = [post(body, f"Content-Length: {len(body)}") for body in bodies]
    last = b"GET /v1/models/odd HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    answer = exchange(port, b"".join(requests) + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 51
    positions = [answer.index(b'{"predictions": [%.1f]}' % (i / 2 + 2)) for i in range(50)]
    assert positions == sorted(positions)


def test_expect_100_continue(port):
    body = b'{"instances": [2]}'
    head = post(b"", f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b'{"predictions": [3.0]}')


def test_chunked_bodies(port):
    head = post(b"", "Transfer-Encoding: chunked", "Connection: close")
    answer = exchange(port, head, b'5\r\n{"ins\r\n', b'd\r\ntances": [2]}\r\n0\r\n', b"\r\n")
    assert answer.endswith(b'{"predictions": [3.0]}')


def test_http_1_0_and_absolute_targets(port):
    body = b'{"instances": [2]}'
    answer = exchange(port, post(body, f"Content-Length: {len(body)}", version="1.0"))
    assert answer.endswith(b'{"predictions": [3.0]}')
    path = f"http://127.0.0.1:{port}/v1/models/half%20plus:predict"
    answer = exchange(port, post(body, f"Content-Length: {len(body)}", "Connection: close", path=path))
    assert answer.endswith(b'{"predictions": [3.0]}')


def test_the_content_type_does_not_matter_but_gzip_does(port):
    body = b'{"instances": [2]}'
    for kind in ("text/plain", "application/octet-stream", "application/json; charset=utf-16", "nonsense"):
        assert predict(port, "half%20plus", body, **{"Content-Type": kind})[0] == 200
    zipped = {"Content-Encoding": "gzip"}
    assert predict(port, "half%20plus", gzip.compress(body), **zipped) == (200, {"predictions": [3.0]})
    for wrong in (body, gzip.compress(body)[:-3], b""):
        status, answer = predict(port, "half%20plus", wrong, **zipped)
        assert (status, answer["error"]) == (400, "JSON Parse error: The document is empty")
    assert predict(port, "half%20plus", body, **{"Content-Encoding": "br"})[0] == 200  # of no interest here


def test_big_bodies(port):
    text = "x" * (100 * 10**6)
    body = json.dumps({"signature_name": "echo_string", "inputs": text})
    status, _, answer = call(port, "POST", "/v1/models/everything:predict", body)
    assert status == 200
    assert answer == b'{"outputs": "%s"}' % text.encode()


def test_a_head_request_has_no_body(port):
    assert call(port, "HEAD", "/v1/models/odd") == (400, "application/json", b"")


# Side by side


def test_sixteen_clients_get_their_own_results(port):
    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for i in range(20):
            row = [float(number), float(i), 1.0]
            body = json.dumps({"signature_name": "matmul", "instances": [row]})
            connection.request("POST", "/v1/models/everything:predict", body)
            answer = json.loads(connection.getresponse().read())
            assert answer == {"predictions": [[number + 2 * i + 3]]}
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))


def counted(port, model, code):
    """How many predictions have ended with a code."""
    text = call(port, "GET", metrics.DEFAULT_PATH)[2].decode()
    start = f':tensorflow:serving:request_count{{model_name="{model}",status="{code}"}} '
    return sum(int(line.removeprefix(start)) for line in text.splitlines() if line.startswith(start))


def await_(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def answers(port):
    try:
        return call(port, "GET", "/v1/models/everything")[0] == 200
    except OSError:
        return False


def start_endless(port):
    """A connection that waits for a prediction without end."""
    body = json.dumps({"signature_name": "loop", "inputs": FOREVER}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(post(body, f"Content-Length: {len(body)}", path="/v1/models/everything:predict"))
    return connection


def test_endless_predictions_block_nobody_and_stop_when_their_clients_leave(tmp_path):
    # A process of its own: it has threads for many graphs at once.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    save_everything(tmp_path / "everything" / "1")
    (tmp_path / "monitoring.config").write_text("prometheus_config { enable: true }")
    server = Process(
        tmp_path / "log",
        "--model_name=everything",
        f"--model_base_path={tmp_path / 'everything'}",
        f"--rest_api_port={port}",
        f"--monitoring_config_file={tmp_path / 'monitoring.config'}",
    )
    try:
        await_(lambda: answers(port))
        connections = [start_endless(port) for _ in range(4)]
        for _ in range(5):
            assert ask(port, "GET", "/v1/models/everything")[0] == 200
            assert predict(port, "everything", {"inputs": {"x": [1], "n": 1}})[0] == 200
        for connection in connections:
            connection.close()
        await_(lambda: counted(port, "everything", "CANCELLED") == 4)
        assert server.stop() == 0
    finally:
        server.process.kill()


def test_a_timeout_is_a_504(models):
    with serving(models, timeout_ms=300) as server:
        body = {"signature_name": "loop", "inputs": FOREVER}
        assert predict(server.port, "everything", body) == (504, {"error": "Timed out waiting for notification"})
        assert predict(server.port, "everything", {"signature_name": "loop", "inputs": 10}) == (200, {"outputs": 10})


def test_status_answers_while_a_big_prediction_is_read_and_written(port):
    row = np.random.default_rng(0).standard_normal(10**6).astype(np.float32)
    body = json.dumps({"signature_name": "echo_float32", "inputs": [row.tolist()]})
    assert len(body) > 20 * 10**6
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        big = pool.submit(call, port, "POST", "/v1/models/everything:predict", body)
        answers = 0
        while not big.done():
            assert ask(port, "GET", "/v1/models/odd")[0] == 200
            answers += 1
        status, _, text = big.result()
    assert status == 200
    assert answers > 3
    np.testing.assert_array_equal(np.float32(json.loads(text)["outputs"]), row[None])


def test_pictures_as_numbers(port):
    status, answer = predict(port, "odd", {"signature_name": "picture", "inputs": 0})
    assert status == 200
    assert np.array(answer["outputs"]).shape == (1, 512, 512, 3)
    assert answer["outputs"][0][511][511] == [7, 7, 7]


# Ends


def test_a_port_that_is_taken_is_an_error(models, port):
    with pytest.raises(OSError):
        rest_server.serve(models, port, 0, host="127.0.0.1")


def test_running_requests_may_end_and_endless_ones_are_cancelled(models):
    server = rest_server.serve(models, 0, 0, host="127.0.0.1")
    idle = http.client.HTTPConnection("127.0.0.1", server.port)
    idle.request("GET", "/v1/models/odd")
    idle.getresponse().read()
    body = json.dumps({"signature_name": "loop", "inputs": 5000}).encode()
    finite = socket.create_connection(("127.0.0.1", server.port))
    finite.sendall(post(body, f"Content-Length: {len(body)}", path="/v1/models/everything:predict"))
    endless = start_endless(server.port)
    await_(lambda: len(server._calls) >= 1 and server._http.requests_count == 3)
    server.stop(2)
    for connection, ending in [(finite, b'{"outputs": 5000}'), (endless, b'{"error": "Run was cancelled"}')]:
        answer = b"".join(iter(lambda connection=connection: connection.recv(2**16), b""))
        assert answer.endswith(ending)
        connection.close()
    assert idle.sock.recv(10) == b""
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_an_idle_connection_does_not_hold_the_end_up(models):
    server = rest_server.serve(models, 0, 0, host="127.0.0.1")
    idle = http.client.HTTPConnection("127.0.0.1", server.port)
    idle.request("GET", "/v1/models/odd")
    idle.getresponse().read()
    stop = threading.Thread(target=server.stop, args=(600,), daemon=True)
    stop.start()
    stop.join(60)
    assert not stop.is_alive()
    assert idle.sock.recv(10) == b""
    idle.close()


# Nonsense


def mutated(rng, body):
    """A JSON text with some of it replaced."""
    tokens = ["[", "]", "{", "}", ",", ":", '"', "NaN", "-", "1e999", "null", "true", "\\u", "\x00", "ü", "9" * 30]
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(len(body))
        body = body[:i] + rng.choice([*tokens, body[: rng.randrange(len(body))]]) + body[i + rng.randrange(3) :]
    return body.encode()


def nonsense(rng):
    """The bytes of a request that is wrong somewhere, and whether it is complete."""
    good = [
        '{"instances": [{"x": 1.5, "t": "a"}, {"x": 2, "t": {"b64": "YQ=="}}]}',
        '{"inputs": {"x": [1.0, -2e-3], "t": ["a", "b"]}, "signature_name": "serving_default"}',
        '{"signature_name": "strings", "instances": [[{"b64": "YWJj"}]]}',
        '{"signature_name": "scalar", "inputs": [[[]]]}',
    ]
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 300)), False
    if kind == 1:
        parts = "/v1 /models /odd :predict /versions/ 1 /labels/ % /metadata ? # ü // .. ; ,".split()
        path = "/" * rng.randrange(2) + "".join(rng.choices(parts, k=rng.randrange(1, 7)))
        method = rng.choice("GET POST HEAD PUT OPTIONS CONNECT TRACE BREW get".split())
        text = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        return text.encode(), True
    body = mutated(rng, rng.choice(good))
    request = post(body, f"Content-Length: {len(body)}", "Connection: close", path="/v1/models/odd:predict")
    if kind == 2:
        return request, True
    i = rng.randrange(len(request))
    return request[:i] + rng.randbytes(rng.randrange(4)) + request[i + rng.randrange(4) :], False


def test_fuzzed_requests_are_answered_and_leave_the_server_serving(port):
    def send(seed):
        request, complete = nonsense(random.Random(seed))
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request)
            if not complete:  # the server may wait for more
                connection.settimeout(0.2)
            with contextlib.suppress(*() if complete else (TimeoutError, ConnectionResetError)):
                answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert answer or not complete, request
        if answer:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), request
            if b"application/json" in head and not request.startswith(b"HEAD"):
                json.loads(body.decode("utf-8", "surrogateescape"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(500)))
    assert predict(port, "half%20plus", {"instances": [1]}) == (200, {"predictions": [2.5]})
