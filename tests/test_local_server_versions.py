"""Versions appearing, retiring and failing: `Models` with loaders of the tests' own, and once the whole server."""

import concurrent.futures
import shutil
import threading
import time
import types

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from saved_models import Process, save_half_plus
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

from serving.local.call import Call
from serving.local.errors import ServingError
from serving.local.models import Models

LIMIT = 30  # seconds that an awaited change may take on a busy machine


def until(condition):
    """Waits for a condition; its value."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it never came to pass")


def config_of(**models):
    """A ModelServerConfig: name=(base path, further fields as text)."""
    entries = (
        f'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" {more} }}'
        for name, (path, more) in models.items()
    )
    text = f"model_config_list {{ {' '.join(entries)} }}"
    return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())


class Servable:
    def __init__(self, name, version):
        self.name, self.version = name, version


def load(name, version, path):
    """A loader of folders that hold a file named `good`."""
    import os

    if not os.path.exists(os.path.join(path, "good")):
        raise ServingError("DATA_LOSS", f"no good: {path}")
    return Servable(name, version)


def put(base, name, good=True):
    (base / name).mkdir(parents=True)
    (base / name / ("good" if good else "bad")).touch()


@pytest.fixture
def start():
    """Starts a `Models` over model m in a folder."""
    started = []

    def start(folder, more="", load=load, **options):
        models = Models(load, poll_seconds=0.02, **options)
        started.append(models)
        models.start(config_of(m=(folder, more)))
        return models

    yield start
    for models in started:
        models.stop()


def states(models):
    return {version: state for version, state, _, _ in models.status("m")}


def served(models):
    return {version for version, state in states(models).items() if state == "AVAILABLE"}


def error_of(function, *arguments, **more):
    with pytest.raises(ServingError) as caught:
        function(*arguments, **more)
    return caught.value.code, caught.value.message


def test_a_version_is_a_folder_whose_whole_name_is_an_integer(start, tmp_path):
    for name in ("00000123", "45", "9x", "v8", "7.5", "tmp-9", "1_0", "٣", "99999999999999999999", " 8"):
        put(tmp_path, name)
    (tmp_path / "200").touch()
    models = start(tmp_path, "model_version_policy { all {} }")
    until(lambda: served(models) == {123, 45})
    assert models.find("m").version == 123
    assert models.status("m") == [(123, "AVAILABLE", "OK", ""), (45, "AVAILABLE", "OK", "")]


@pytest.mark.parametrize(
    "policy, wanted",
    [
        ("", {12}),
        ("latest {}", {12}),
        ("latest { num_versions: 2 }", {12, 9}),
        ("all {}", {1, 9, 12}),
        ("specific { versions: 9 versions: 1 versions: 77 }", {1, 9}),
    ],
)
def test_policies(start, tmp_path, policy, wanted):
    for name in ("1", "9", "12"):
        put(tmp_path, name)
    models = start(tmp_path, f"model_version_policy {{ {policy} }}" if policy else "")
    until(lambda: served(models) == wanted)
    assert set(states(models)) == wanted


def test_a_new_version_replaces_the_old_one_and_goes_back_when_removed(start, tmp_path):
    put(tmp_path, "1")
    models = start(tmp_path)
    answered = []
    watching = threading.Event()

    def watch():
        while not watching.is_set():
            answered.append(models.find("m").version)

    watcher = threading.Thread(target=watch)
    watcher.start()
    put(tmp_path, "2")
    until(lambda: states(models) == {1: "END", 2: "AVAILABLE"})
    assert error_of(models.find, "m", version=1) == ("NOT_FOUND", "Servable not found for request: Specific(m, 1)")
    shutil.rmtree(tmp_path / "2")
    until(lambda: states(models) == {1: "AVAILABLE", 2: "END"})
    watching.set()
    watcher.join()
    assert sorted(set(answered)) == [1, 2]  # and no request failed


def test_the_last_version_goes_with_its_folder_but_not_with_the_base_path(start, tmp_path):
    put(tmp_path / "m", "1")
    models = start(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "away")
    time.sleep(0.2)
    assert models.find("m").version == 1
    (tmp_path / "away").rename(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "1")
    until(lambda: states(models) == {1: "END"})
    assert error_of(models.find, "m") == ("NOT_FOUND", "Servable not found for request: Latest(m)")
    put(tmp_path / "m", "1")
    until(lambda: states(models) == {1: "AVAILABLE"})


def test_a_running_request_keeps_its_version(start, tmp_path):
    put(tmp_path, "1")
    models = start(tmp_path)
    held = models.find("m")
    put(tmp_path, "2")
    until(lambda: states(models) == {1: "UNLOADING", 2: "AVAILABLE"})
    del held
    until(lambda: states(models) == {1: "END", 2: "AVAILABLE"})


def test_a_broken_version_never_disturbs_the_old_one(start, tmp_path):
    put(tmp_path, "1")
    models = start(tmp_path, max_retries=2, retry_seconds=0.05)
    put(tmp_path, "2", good=False)
    until(lambda: states(models).get(2) == "END")
    assert models.status("m") == [
        (2, "END", "DATA_LOSS", f"no good: {tmp_path / '2'}"),
        (1, "AVAILABLE", "OK", ""),
    ]
    assert models.find("m").version == 1
    (tmp_path / "2" / "good").touch()  # its copy is complete now
    until(lambda: states(models) == {1: "END", 2: "AVAILABLE"})
    assert models.status("m", 2) == [(2, "AVAILABLE", "OK", "")]


def test_a_version_is_not_loaded_while_it_is_copied(start, tmp_path):
    tried = []

    def load_and_note(name, version, path):
        tried.append(version)
        return load(name, version, path)

    put(tmp_path, "1")
    models = start(tmp_path, load=load_and_note)
    put(tmp_path, "2", good=False)
    for i in range(20):
        (tmp_path / "2" / f"part{i}").touch()
        time.sleep(0.05)
    assert tried == [1]
    (tmp_path / "2" / "good").touch()
    until(lambda: served(models) == {2})
    assert tried == [1, 2]


def test_loads_are_tried_again_after_a_while(start, tmp_path):
    tries = []

    def fails_twice(name, version, path):
        tries.append(version)
        if len(tries) < 3:
            raise ServingError("UNAVAILABLE", "not yet")
        return Servable(name, version)

    put(tmp_path, "1")
    models = start(tmp_path, load=fails_twice, retry_seconds=0.05)
    assert models.find("m").version == 1 and tries == [1, 1, 1]


def test_a_version_that_vanishes_while_it_is_loaded(start, tmp_path):
    def slow_load(name, version, path):
        if version == 2:
            shutil.rmtree(path)
        return load(name, version, path)

    put(tmp_path, "1")
    models = start(tmp_path, load=slow_load)
    put(tmp_path, "2")
    until(lambda: states(models) == {1: "AVAILABLE", 2: "END"})


def test_the_start_waits_for_the_first_version(start, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(start, tmp_path / "later")
        with pytest.raises(concurrent.futures.TimeoutError):
            starting.result(timeout=0.3)
        (tmp_path / "later").mkdir()
        put(tmp_path / "later", "1")
        assert starting.result(timeout=LIMIT).find("m").version == 1


def test_the_start_fails_if_nothing_can_be_loaded(start, tmp_path):
    put(tmp_path, "1", good=False)
    code, text = error_of(start, tmp_path, max_retries=0)
    assert code == "UNKNOWN" and "{name: m version: 1} due to error: no good" in text


def test_labels(start, tmp_path):
    put(tmp_path, "1")
    put(tmp_path, "2")
    models = start(tmp_path, "model_version_policy { all {} }")
    until(lambda: served(models) == {1, 2})
    label = 'model_version_policy {{ all {{}} }} version_labels {{ key: "stable" value: {} }}'
    models.reload(config_of(m=(tmp_path, label.format(1))))
    assert models.find("m", label="stable").version == 1
    assert [version for version, *_ in models.status("m", label="stable")] == [1]
    models.reload(config_of(m=(tmp_path, label.format(2))))
    assert models.find("m", label="stable").version == 2
    refused = config_of(m=(tmp_path, label.format(3)))
    assert error_of(models.reload, refused) == (
        "FAILED_PRECONDITION",
        "Request to assign label to version 3 of model m, which is not currently available for inference",
    )
    assert models.find("m", label="stable").version == 2
    assert error_of(models.find, "m", label="new")[0] == "INVALID_ARGUMENT"


def test_a_new_label_may_come_before_its_version(start, tmp_path):
    put(tmp_path, "1")
    label = 'model_version_policy { all {} } version_labels { key: "next" value: 2 }'
    with pytest.raises(ServingError):
        start(tmp_path, label)
    models = start(tmp_path, label, labels_for_unavailable=True)
    assert error_of(models.find, "m", label="next") == (
        "NOT_FOUND",
        "Servable not found for request: Specific(m, 2)",
    )
    put(tmp_path, "2")
    until(lambda: served(models) == {1, 2})
    assert models.find("m", label="next").version == 2


def test_a_new_config_adds_and_removes_models(start, tmp_path):
    put(tmp_path / "m", "1")
    put(tmp_path / "n", "5")
    models = start(tmp_path / "m")
    models.reload(config_of(m=(tmp_path / "m", ""), n=(tmp_path / "n", "")))
    assert models.find("n").version == 5
    models.reload(config_of(n=(tmp_path / "n", "")))
    until(lambda: states(models) == {1: "END"})
    call = Call(timeout_seconds=0.2)
    assert error_of(models.reload, config_of(o=(tmp_path / "o", "")), call)[0] == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    "text, code",
    [
        ("", "FAILED_PRECONDITION"),
        ('model_config_list { config { name: "m" base_path: "/m" } }', "INVALID_ARGUMENT"),
        ('model_config_list { config { name: "m" base_path: "/m" model_platform: "jax" } }', "INVALID_ARGUMENT"),
        (
            'model_config_list { config { name: "m" base_path: "/m" model_platform: "tensorflow" }'
            ' config { name: "m" base_path: "/n" model_platform: "tensorflow" } }',
            "INVALID_ARGUMENT",
        ),
        ("custom_model_config {}", "FAILED_PRECONDITION"),
    ],
)
def test_configs_that_cannot_be_taken_change_nothing(start, tmp_path, text, code):
    put(tmp_path, "1")
    models = start(tmp_path)
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    assert error_of(models.reload, config)[0] == code
    time.sleep(0.1)
    assert models.find("m").version == 1


# The whole server


@pytest.fixture(scope="module")
def half_plus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half_plus")
    for version in (1, 2, 3, 4):
        save_half_plus(folder / str(version), version)
    return folder


def write_warm_up(version, *records):
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        for record in records:
            writer.write(record)


def predict_log(**inputs):
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = "m"
    for name, value in inputs.items():
        log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return log.SerializeToString()


def test_rolling_out_under_load(half_plus, tmp_path):
    """Versions half copied, corrupt, badly warmed up and good come and go; of all requests meanwhile, none fails."""
    base, config = tmp_path / "m", tmp_path / "models.config"
    base.mkdir()
    shutil.copytree(half_plus / "1", base / "1")
    config.write_text(text_format.MessageToString(config_of(m=(base, ""))))
    server = Process(tmp_path / "log", f"--model_config_file={config}", "--model_config_file_poll_wait_seconds=1")
    stub = prediction_service_pb2_grpc.PredictionServiceStub(server.channel)
    models = model_service_pb2_grpc.ModelServiceStub(server.channel)
    done, answers = threading.Event(), []

    def client():
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "m"
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.float32([2, 4])))
        while not done.is_set():
            response = stub.Predict(request, timeout=LIMIT)
            plus = response.model_spec.version.value
            assert list(response.outputs["y"].float_val) == [1 + plus, 2 + plus]
            answers.append(plus)

    def status(version):
        message = get_model_status_pb2.GetModelStatusRequest()
        message.model_spec.name, message.model_spec.version.value = "m", version
        try:
            found = models.GetModelStatus(message, timeout=LIMIT).model_version_status[0]
        except grpc.RpcError:
            return None, 0
        return get_model_status_pb2.ModelVersionStatus.State.Name(found.state), found.status.error_code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            # Half copied: the graph without its variables, then the rest.
            (base / "2").mkdir()
            shutil.copy(half_plus / "2" / "saved_model.pb", base / "2")
            until(lambda: status(2)[1] != 0)
            assert status(2)[0] == "LOADING"
            shutil.copytree(half_plus / "2", base / "2", dirs_exist_ok=True)
            until(lambda: status(2) == ("AVAILABLE", 0) and status(1) == ("END", 0))
            # Broken in three ways: empty, cut off, bytes that are no graph.
            (base / "3").mkdir()
            until(lambda: status(3) == ("LOADING", 5))
            whole = (half_plus / "3" / "variables" / "variables.data-00000-of-00001").read_bytes()
            shutil.copytree(half_plus / "3", base / "3", dirs_exist_ok=True)
            (base / "3" / "variables" / "variables.data-00000-of-00001").write_bytes(whole[: len(whole) // 2])
            (base / "4").mkdir()
            (base / "4" / "saved_model.pb").write_bytes(b"\xff" * 100)
            until(lambda: status(4)[1] == 15)
            assert status(2) == ("AVAILABLE", 0)
            # A good graph whose warm-up request fails, then one that passes.
            shutil.rmtree(base / "4")
            until(lambda: status(4)[0] == "END")
            shutil.copytree(half_plus / "4", tmp_path / "4")
            write_warm_up(tmp_path / "4", predict_log(wrong=np.float32([1])))
            (tmp_path / "4").rename(base / "4")
            until(lambda: status(4)[1] == 3)
            shutil.rmtree(base / "4" / "assets.extra")
            write_warm_up(base / "4", predict_log(x=np.float32([1])))
            until(lambda: status(4) == ("AVAILABLE", 0) and status(2) == ("END", 0))
            until(lambda: set(answers) == {1, 2, 4})
            # A new config, through the file.
            more = config_of(m=(base, "model_version_policy { specific { versions: 1 } }"), n=(half_plus, ""))
            config.write_text(text_format.MessageToString(more))
            until(lambda: status(1) == ("AVAILABLE", 0) and status(4) == ("END", 0))
            # And through the API.
            message = model_management_pb2.ReloadConfigRequest(config=config_of(m=(base, ""), o=(half_plus, "")))
            assert models.HandleReloadConfigRequest(message, timeout=LIMIT).status.error_code == 0
        finally:
            done.set()
        for one in clients:
            one.result()
    assert server.stop() == 0, server.log()


def test_a_warm_up_file_that_is_none_fails_its_version(half_plus, tmp_path):
    from serving.local import warmup

    def replay(name, *records, raw=None):
        version = tmp_path / name
        version.mkdir()
        write_warm_up(version, *records)
        if raw is not None:
            (version / "assets.extra" / "tf_serving_warmup_requests").write_bytes(raw)
        asked = []
        servable = types.SimpleNamespace(predict=lambda *arguments: asked.append(arguments))
        warmup.replay(servable, str(version), iterations=2)
        return asked

    asked = replay("good", predict_log(x=np.float32([1, 2])))
    assert len(asked) == 2 and asked[0][1]["x"].tolist() == [1, 2]
    assert error_of(replay, "bytes", raw=b"not a record file")[0] == "DATA_LOSS"
    assert error_of(replay, "record", b"\xff\xff")[0] == "INVALID_ARGUMENT"
    assert error_of(replay, "many", *[predict_log()] * 1001)[0] == "INVALID_ARGUMENT"
    warmup.replay(None, str(tmp_path / "has none"))
