"""Dynamic batching: concurrent requests of one kind run as one, merged along axis 0 and split again.

As in the real server's shared batch scheduler, requests of a kind collect in a queue of batches; one of a fixed number
of threads takes a batch when it is full or its oldest request has waited long enough. Unlike there, requests that the
merged run fails for run again alone, so that no neighbour's error reaches them, and one that is cancelled or late
leaves its batch.
"""

import os
import threading
import time
from typing import NamedTuple

import numpy as np

from . import metrics
from .call import Call
from .errors import ServingError, from_exception


class Parameters(NamedTuple):
    """The fields of BatchingParameters, with the real server's defaults."""

    max_batch_size: int = 1000  # rows
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10  # of one kind
    num_batch_threads: int = os.cpu_count()
    allowed_batch_sizes: tuple = ()  # merged batches are padded up to one of these
    pad_variable_length_inputs: bool = False
    thread_pool_name: str = "model_server_batch_threads"


class _Task:
    """Some rows of one request, waiting for their batch."""

    def __init__(self, inputs, rows):
        self.inputs, self.rows = inputs, rows
        self.batch = None
        self.done = threading.Event()
        self.gone = self.alone = False
        self.outputs = self.error = None


class _Batch:
    def __init__(self, run, due):
        self.run, self.due = run, due
        self.tasks, self.rows = [], 0
        self.enqueued = time.monotonic()
        self.call = None  # once it runs


class Batcher:
    """Merges the runs of all models.

    Args:
        parameters: `Parameters`.

    Raises:
        ServingError: INVALID_ARGUMENT for parameters that cannot be.
    """

    def __init__(self, parameters):
        if min(parameters[:4]) < 0 or not parameters.max_batch_size or not parameters.num_batch_threads:
            raise ServingError("INVALID_ARGUMENT", f"batching parameters must be positive; got {parameters}")
        allowed = list(parameters.allowed_batch_sizes)
        if allowed != sorted(set(allowed)):
            raise ServingError(
                "INVALID_ARGUMENT", f"allowed_batch_sizes entries must be monotonically increasing; got {allowed}"
            )
        if allowed and (allowed[0] < 1 or allowed[-1] != parameters.max_batch_size):
            raise ServingError(
                "INVALID_ARGUMENT",
                "Last entry in allowed_batch_sizes must match max_batch_size; last entry was "
                f"{allowed[-1]}; expected {parameters.max_batch_size}",
            )
        self._parameters = parameters
        self._queues = {}  # kind → batches, oldest first; only the last one is open
        self._changed = threading.Condition()
        for _ in range(parameters.num_batch_threads):
            threading.Thread(target=self._work, name=parameters.thread_pool_name, daemon=True).start()

    def run(self, kind, inputs, run, call):
        """Runs one request, merged with others of its kind.

        Args:
            kind: what must be equal for requests to be merged, beside dtypes and inner shapes.
            inputs: dict of name → NumPy array.
            run: runs a batch: (inputs, call) → dict of name → NumPy array.
            call: the request's `Call`.

        Returns:
            Dict of name → NumPy array, this request's rows.

        Raises:
            ServingError: what running it alone raises; UNAVAILABLE if the queue is full; INVALID_ARGUMENT if the inputs
                have no common first dimension; FAILED_PRECONDITION if the outputs do not have it.
        """
        if not all(array.ndim for array in inputs.values()):
            raise ServingError("INVALID_ARGUMENT", "Batching Run() input tensors must have at least one dimension")
        if len({len(array) for array in inputs.values()}) != 1:
            raise ServingError("INVALID_ARGUMENT", "Batching Run() input tensors must have equal 0th-dimension size")
        rows = len(next(iter(inputs.values())))
        if not rows:
            return run(inputs, call)
        padded = self._parameters.pad_variable_length_inputs
        shapes = (
            (name, array.dtype, array.ndim if padded else array.shape[1:]) for name, array in sorted(inputs.items())
        )
        most = self._parameters.max_batch_size
        tasks = [
            _Task({name: array[start : start + most] for name, array in inputs.items()}, min(most, rows - start))
            for start in range(0, rows, most)
        ]
        self._enqueue((kind, *shapes), tasks, run)
        results = [self._wait(task, run, call) for task in tasks]
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def waiting(self):
        """How many requests wait for their run to start."""
        with self._changed:
            return sum(len(batch.tasks) for queue in self._queues.values() for batch in queue)

    def _enqueue(self, kind, tasks, run):
        with self._changed:
            queue = self._queues.get(kind, [])
            open_rows = queue[-1].rows if queue else self._parameters.max_batch_size
            joins = open_rows + tasks[0].rows <= self._parameters.max_batch_size
            if len(queue) + len(tasks) - joins > max(1, self._parameters.max_enqueued_batches):
                raise ServingError("UNAVAILABLE", "The batch scheduling queue to which this task was submitted is full")
            for task in tasks:
                if not queue or queue[-1].rows + task.rows > self._parameters.max_batch_size:
                    queue.append(_Batch(run, time.monotonic() + self._parameters.batch_timeout_micros / 1e6))
                task.batch = queue[-1]
                task.batch.tasks.append(task)
                task.batch.rows += task.rows
            self._queues[kind] = queue
            self._changed.notify_all()

    def _wait(self, task, run, call):
        call.on_cancel(lambda: self._leave(task))
        task.done.wait()
        call.check()
        if task.alone:
            return run(task.inputs, call)
        if task.error:
            raise ServingError(task.error.code, task.error.message)
        return task.outputs

    def _leave(self, task):
        with self._changed:
            task.gone = True
            batch = task.batch
            if batch.call is None and task in batch.tasks:
                batch.tasks.remove(task)
                batch.rows -= task.rows
            abandoned = batch.call is not None and all(member.gone for member in batch.tasks)
        if abandoned:
            batch.call.cancel()
        task.done.set()

    def _work(self):
        while True:
            batch = self._next()
            metrics.QUEUING_LATENCY.add(
                self._parameters.thread_pool_name, value=(time.monotonic() - batch.enqueued) * 1e6
            )
            try:
                self._process(batch)
            except Exception as error:
                for task in batch.tasks:
                    task.error = from_exception(error)
            for task in batch.tasks:
                task.done.set()

    def _next(self):
        """Waits for a batch that is full, closed or due, and takes it out of its queue."""
        with self._changed:
            while True:
                for kind in [kind for kind, queue in self._queues.items() if not any(batch.tasks for batch in queue)]:
                    del self._queues[kind]  # everybody left
                now = time.monotonic()
                ready, wait = None, None
                for kind, queue in self._queues.items():
                    first = queue[0]
                    if len(queue) > 1 or first.rows >= self._parameters.max_batch_size or first.due <= now:
                        if ready is None or first.due < self._queues[ready][0].due:
                            ready = kind
                    else:
                        wait = min(first.due - now, wait or first.due - now)
                if ready is not None:
                    batch = self._queues[ready].pop(0)
                    if not self._queues[ready]:
                        del self._queues[ready]
                    if batch.tasks:
                        batch.call = Call()
                        return batch
                else:
                    self._changed.wait(wait)

    def _process(self, batch):
        tasks = batch.tasks
        merged = {name: self._merge([task.inputs[name] for task in tasks]) for name in tasks[0].inputs}
        padding = next((size for size in self._parameters.allowed_batch_sizes if size >= batch.rows), batch.rows)
        padding -= batch.rows
        if padding:
            # A row that is known to be valid; the real server repeats the last request's first one, too.
            merged = {
                name: np.concatenate([array, np.repeat(array[-tasks[-1].rows :][:1], padding, axis=0)])
                for name, array in merged.items()
            }
        try:
            outputs = batch.run(merged, batch.call)
        except ServingError:
            if len(tasks) == 1:
                raise
            for task in tasks:
                task.alone = True
            return
        for array in outputs.values():
            if not array.ndim:
                raise ServingError("FAILED_PRECONDITION", "Batched output tensor has 0 dimensions")
            if len(array) != batch.rows + padding:
                raise ServingError(
                    "FAILED_PRECONDITION",
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the "
                    "input tensors",
                )
        start = 0
        for task in tasks:
            task.outputs = {name: array[start : start + task.rows] for name, array in outputs.items()}
            start += task.rows

    def _merge(self, arrays):
        """Arrays joined along axis 0; smaller inner dimensions are first filled up with the array's first value."""
        if self._parameters.pad_variable_length_inputs:
            inner = np.max([array.shape[1:] for array in arrays], axis=0)
            arrays = [_fill(array, inner) for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _fill(array, inner):
    if tuple(inner) == array.shape[1:]:
        return array
    if not array.size:
        raise ServingError("INVALID_ARGUMENT", "Got empty tensor in batch of non-empty tensors.")
    filled = np.full((len(array), *inner), array.flat[0], dtype=array.dtype)
    filled[tuple(slice(size) for size in array.shape)] = array
    return filled
