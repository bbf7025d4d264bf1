"""Dynamic batching: who is merged with whom, and what one member's end or error does to the others."""

import concurrent.futures
import threading

import numpy as np
import pytest
import tensorflow as tf
from saved_models import save, save_half_plus

from serving.local import config_files
from serving.local.batching import Batcher, Parameters
from serving.local.call import Call
from serving.local.errors import ServingError
from serving.local.servable import Servable, can_be_batched

SOON = 10_000_000  # microseconds: a batch that does not fill up would wait for this long


class Runs:
    """Runs batches (y = 2 x) and notes their inputs; `gate` holds them up."""

    def __init__(self, wait=False):
        self.inputs, self.calls = [], []
        self.gate, self.started = threading.Event(), threading.Event()
        if not wait:
            self.gate.set()

    def __call__(self, inputs, call):
        self.inputs.append(inputs["x"])
        self.calls.append(call)
        self.started.set()
        while not self.gate.wait(0.01):
            call.check()
        if (inputs["x"] < 0).any():
            raise ServingError("INVALID_ARGUMENT", f"negative: {inputs['x'].min()}")
        return {"y": inputs["x"] * 2}


def together(batcher, run, arrays, kinds=None, calls=None):
    """Runs arrays at once, each as a request of its own; their outputs or errors."""

    def one(i):
        try:
            return batcher.run(kinds[i] if kinds else "k", {"x": arrays[i]}, run, calls[i] if calls else Call())["y"]
        except ServingError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(arrays)) as pool:
        return list(pool.map(one, range(len(arrays))))


def rows(*values):
    return np.array(values, np.float32)[:, None]


def test_concurrent_requests_of_a_kind_are_one_run():
    run, arrays = Runs(), [rows(1), rows(2, 3), rows(4)]
    outputs = together(Batcher(Parameters(max_batch_size=4, batch_timeout_micros=SOON)), run, arrays)
    for array, output in zip(arrays, outputs):
        np.testing.assert_array_equal(output, array * 2)
    assert [len(inputs) for inputs in run.inputs] == [4]


@pytest.mark.parametrize(
    "second, kinds",
    [
        (rows(1, 2).astype(np.float64), None),
        (np.ones((2, 3), np.float32), None),
        (np.ones((2, 1, 1), np.float32), None),
        (rows(1, 2), ["one", "other"]),
    ],
)
def test_only_requests_of_one_kind_dtype_and_inner_shape_are_merged(second, kinds):
    run = Runs()
    outputs = together(
        Batcher(Parameters(max_batch_size=4, batch_timeout_micros=1000)), run, [rows(1, 2), second], kinds
    )
    assert len(run.inputs) == 2
    np.testing.assert_array_equal(outputs[1], second * 2)


def test_a_batch_waits_no_longer_than_the_timeout_and_busy_threads_collect():
    run = Runs(wait=True)
    batcher = Batcher(Parameters(batch_timeout_micros=0, num_batch_threads=1))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(together, batcher, run, [rows(1)])
        run.started.wait(30)  # the only thread is busy
        others = pool.submit(together, batcher, run, [rows(2), rows(3), rows(4)])
        while batcher.waiting() < 3:
            pass
        run.gate.set()
        assert first.result(30)[0] == [[2]]
        assert [output.tolist() for output in others.result(30)] == [[[4]], [[6]], [[8]]]
    assert [len(inputs) for inputs in run.inputs] == [1, 3]


def test_large_requests_are_split():
    run = Runs()
    batcher = Batcher(Parameters(max_batch_size=4))
    output = batcher.run("k", {"x": rows(*range(10))}, run, Call())["y"]
    np.testing.assert_array_equal(output, rows(*range(10)) * 2)
    assert sorted(len(inputs) for inputs in run.inputs) == [2, 4, 4]


def test_batches_are_padded_to_an_allowed_size():
    run = Runs()
    batcher = Batcher(Parameters(max_batch_size=8, allowed_batch_sizes=(2, 8)))
    np.testing.assert_array_equal(batcher.run("k", {"x": rows(1, 2, 3)}, run, Call())["y"], rows(2, 4, 6))
    np.testing.assert_array_equal(run.inputs[0], rows(1, 2, 3, 1, 1, 1, 1, 1))


def test_variable_lengths_are_padded_with_the_first_value():
    run = Runs()
    batcher = Batcher(Parameters(max_batch_size=2, batch_timeout_micros=SOON, pad_variable_length_inputs=True))
    outputs = together(batcher, run, [np.float32([[1, 2]]), np.float32([[3, 4, 5]])])
    assert sorted(output.tolist() for output in outputs) == [[[2, 4, 2]], [[6, 8, 10]]]
    assert len(run.inputs) == 1


def test_a_full_queue_is_unavailable():
    run = Runs(wait=True)
    parameters = Parameters(max_batch_size=1, max_enqueued_batches=2, num_batch_threads=1)
    batcher = Batcher(parameters)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(batcher.run, "k", {"x": rows(1)}, run, Call())]
        run.started.wait(30)
        waiting += [pool.submit(batcher.run, "k", {"x": rows(i)}, run, Call()) for i in (2, 3)]
        while batcher.waiting() < 2:
            pass
        with pytest.raises(ServingError, match="queue to which this task was submitted is full") as caught:
            batcher.run("k", {"x": rows(4)}, run, Call())
        assert caught.value.code == "UNAVAILABLE"
        run.gate.set()
        assert [future.result(30)["y"].item() for future in waiting] == [2, 4, 6]


def test_an_error_stays_with_the_request_that_causes_it():
    run = Runs()
    batcher = Batcher(Parameters(max_batch_size=3, batch_timeout_micros=SOON))
    good, bad, fine = together(batcher, run, [rows(1), rows(-2), rows(3)])
    assert good == [[2]] and fine == [[6]]
    assert isinstance(bad, ServingError) and bad.message == "negative: -2.0"


def test_a_member_that_leaves_takes_nobody_along():
    run = Runs(wait=True)
    batcher = Batcher(Parameters(max_batch_size=3, batch_timeout_micros=SOON))
    cancelled, late, stays = calls = [Call(), Call(timeout_seconds=0.2), Call()]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(together, batcher, run, [rows(1), rows(2), rows(3)], None, calls)
        run.started.wait(30)
        cancelled.cancel()
        while not late.ended():
            pass
        assert run.calls[0].ended() is None
        run.gate.set()
        outputs = running.result(30)
    assert [output.code for output in outputs[:2]] == ["CANCELLED", "DEADLINE_EXCEEDED"]
    assert outputs[2] == [[6]]


def test_the_run_stops_when_all_its_members_have_left():
    run = Runs(wait=True)
    batcher = Batcher(Parameters(max_batch_size=2, batch_timeout_micros=SOON))
    calls = [Call(), Call()]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(together, batcher, run, [rows(1), rows(2)], None, calls)
        run.started.wait(30)
        for call in calls:
            call.cancel()
        assert [output.code for output in running.result(30)] == ["CANCELLED"] * 2
    assert run.calls[0].ended() == "CANCELLED"


def test_who_leaves_before_the_run_is_not_in_it():
    run = Runs()
    batcher = Batcher(Parameters(max_batch_size=2, batch_timeout_micros=SOON))
    call = Call(timeout_seconds=0.1)
    with pytest.raises(ServingError):
        batcher.run("k", {"x": rows(1)}, run, call)
    assert not batcher.waiting()
    together(batcher, run, [rows(2), rows(3)])
    assert sorted(run.inputs[0].ravel().tolist()) == [2, 3]


@pytest.mark.parametrize(
    "inputs, code, text",
    [
        ({"x": np.float32(1)}, "INVALID_ARGUMENT", "at least one dimension"),
        ({"x": rows(1), "y": rows(1, 2)}, "INVALID_ARGUMENT", "equal 0th-dimension size"),
    ],
)
def test_inputs_without_common_rows_are_refused(inputs, code, text):
    with pytest.raises(ServingError, match=text) as caught:
        Batcher(Parameters()).run("k", inputs, None, Call())
    assert caught.value.code == code


@pytest.mark.parametrize("output", [np.float32(1), rows(1, 2, 3)])
def test_outputs_without_the_rows_are_refused(output):
    with pytest.raises(ServingError, match="Batched output tensor") as caught:
        Batcher(Parameters()).run("k", {"x": rows(1)}, lambda inputs, call: {"y": output}, Call())
    assert caught.value.code == "FAILED_PRECONDITION"


def test_no_rows_are_no_batch():
    run = Runs()
    output = Batcher(Parameters(batch_timeout_micros=SOON)).run("k", {"x": rows(1)[:0]}, run, Call())["y"]
    assert output.shape == (0, 1)


def test_parameters_are_read_from_a_text_file(tmp_path):
    file = tmp_path / "batching.config"
    file.write_text(
        "max_batch_size { value: 16 } batch_timeout_micros { value: 5000 } num_batch_threads { value: 3 }"
        " allowed_batch_sizes: 4 allowed_batch_sizes: 16 pad_variable_length_inputs: true"
    )
    assert config_files.batching_parameters(file) == Parameters(
        max_batch_size=16,
        batch_timeout_micros=5000,
        num_batch_threads=3,
        allowed_batch_sizes=(4, 16),
        pad_variable_length_inputs=True,
    )
    file.write_text("max_batch_size: 16")
    with pytest.raises(ServingError, match="Invalid protobuf file"):
        config_files.batching_parameters(file)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_size": 0},
        {"max_batch_size": 4, "allowed_batch_sizes": (4, 2)},
        {"max_batch_size": 8, "allowed_batch_sizes": (2, 4)},
        {"num_batch_threads": 0},
    ],
)
def test_parameters_that_cannot_be(wrong):
    with pytest.raises(ServingError):
        Batcher(Parameters(**wrong))


def test_only_models_of_which_every_signature_has_rows_are_batched(tmp_path):
    row, scalar = tf.TensorSpec([None], tf.float32), tf.TensorSpec([], tf.float32)
    batched = (lambda x: {"y": x}, {"x": row})
    for name, other, expected in [
        ("rows", batched, True),
        ("scalar_input", (lambda x: {"y": x}, {"x": scalar}), False),
        ("scalar_output", (lambda x: {"y": tf.reduce_sum(x)}, {"x": row}), False),
        ("fixed_rows", (lambda x: {"y": x}, {"x": tf.TensorSpec([2], tf.float32)}), False),
        ("unknown_rank", (lambda x: {"y": x}, {"x": tf.TensorSpec(None, tf.float32)}), False),
        ("no_inputs", (lambda: {"y": tf.constant([1.0])}, {}), False),
    ]:
        save(tmp_path / name, {"serving_default": batched, "other": other})
        servable = Servable(name, 1, str(tmp_path / name))
        assert can_be_batched(servable.signature_defs) == expected, name


def test_a_model_answers_sixteen_clients_with_fewer_runs(tmp_path):
    save_half_plus(tmp_path / "1", 1)
    parameters = Parameters(max_batch_size=16, batch_timeout_micros=SOON)
    servable = Servable("m", 1, str(tmp_path / "1"), batcher=Batcher(parameters))
    runs = []
    whole_run = servable._saved_model.run
    servable._saved_model.run = lambda *arguments: runs.append(1) or whole_run(*arguments)

    def client(number):
        name, outputs = servable.predict("", {"x": np.float32([number])}, (), Call())
        return name, outputs["y"].tolist()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(client, range(16))) == [("serving_default", [i / 2 + 1]) for i in range(16)]
    assert len(runs) == 1
