"""Counters and histograms under the names of the real server, in Prometheus' text format.

Written here because prometheus_client ends every counter's name in `_total`, which the real server's names do not have.
"""

import bisect
import itertools
import re
import threading

DEFAULT_PATH = "/monitoring/prometheus/metrics"

_lock = threading.Lock()
_metrics = []


class Counter:
    """A number per combination of label values that only grows."""

    def __init__(self, name, *labels):
        self.name, self.labels, self.values = name, labels, {}
        _metrics.append(self)

    def add(self, *labels, by=1):
        with _lock:
            self.values[labels] = self.values.get(labels, 0) + by

    def lines(self, name):
        yield f"# TYPE {name} counter"
        for labels, value in self.values.items():
            yield f"{name}{{{_pairs(self.labels, labels)}}} {value:d}"


class Histogram:
    """Values counted by size, per combination of label values: buckets up to scale · growth**i, and one without end."""

    def __init__(self, name, *labels, scale=10, growth=1.8, buckets=33):
        self.name, self.labels, self.values = name, labels, {}
        self.limits = [scale * growth**i for i in range(buckets - 1)]
        _metrics.append(self)

    def add(self, *labels, value):
        with _lock:
            cell = self.values.setdefault(labels, [[0] * (len(self.limits) + 1), 0.0])
            cell[0][bisect.bisect_right(self.limits, value)] += 1
            cell[1] += value

    def lines(self, name):
        yield f"# TYPE {name} histogram"
        for labels, (counts, total) in self.values.items():
            pairs = _pairs(self.labels, labels)
            sums = list(itertools.accumulate(counts))
            for limit, sum_ in zip([f"{limit:g}" for limit in self.limits] + ["+Inf"], sums):
                yield f'{name}_bucket{{{pairs},le="{limit}"}} {sum_}'
            yield f"{name}_sum{{{pairs}}} {total:g}"
            yield f"{name}_count{{{pairs}}} {sums[-1]}"


def _pairs(names, values):
    escaped = (str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values)
    return ",".join(f'{name}="{value}"' for name, value in zip(names, escaped))


REQUEST_COUNT = Counter("/tensorflow/serving/request_count", "model_name", "status")
REQUEST_LATENCY = Histogram("/tensorflow/serving/request_latency", "model_name", "API", "entrypoint")
RUNTIME_LATENCY = Histogram("/tensorflow/serving/runtime_latency", "model_name", "API", "runtime")
QUEUING_LATENCY = Histogram(
    "/tensorflow/serving/batching_session/queuing_latency", "thread_pool_name", scale=100, growth=1.2, buckets=52
)
WARMUP_LATENCY = Histogram("/tensorflow/serving/model_warmup_latency", "model_path", "status")
LOAD_ATTEMPTS = Counter("/tensorflow/cc/saved_model/load_attempt_count", "model_path", "status")
LOAD_LATENCY = Counter("/tensorflow/cc/saved_model/load_latency", "model_path")


def record_request(model_name, api, entrypoint, code, seconds):
    """One finished request: `api` such as "Predict", `entrypoint` "GRPC" or "REST", `code` a canonical code's name."""
    REQUEST_COUNT.add(model_name, code)
    if code == "OK":
        REQUEST_LATENCY.add(model_name, api, entrypoint, value=seconds * 1e6)


def exposition():
    """All metrics that have values, as Prometheus text (`text/plain`)."""
    with _lock:
        names = [re.sub("[^a-zA-Z0-9_]", ":", metric.name) for metric in _metrics]
        lines = [line for name, metric in zip(names, _metrics) if metric.values for line in metric.lines(name)]
    return "".join(f"{line}\n" for line in lines)
