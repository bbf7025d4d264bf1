"""One version of one model, loaded: what a request must look like, and answering it."""

import time

import tensorflow as tf

from . import metrics, tensors
from .errors import ServingError
from .saved_model import SavedModel

_TYPE_NAMES = {"float32": "float", "float64": "double", "float16": "half"}  # where the runtime has its own


class Servable:
    """A loaded SavedModel.

    Args:
        name: the model's name.
        version: its version, an int.
        path: the SavedModel's folder.
        tags: the tags of its meta graph.
        batcher: a `Batcher` to merge concurrent requests with, or None. Models of which not every signature can be
            batched (each input and output with an unknown first dimension) run plain.

    Attributes:
        name, version: as above.
        signature_defs: name → `SignatureDef`, all of saved_model.pb's meta graph.

    Raises:
        ServingError: with the runtime's code and message, if the SavedModel cannot be loaded.
    """

    def __init__(self, name, version, path, tags=("serve",), batcher=None):
        self.name, self.version = name, version
        start, status = time.monotonic(), "fail"
        try:
            self._saved_model = SavedModel(path, tags)
            status = "success"
        finally:
            metrics.LOAD_ATTEMPTS.add(path, status)
        metrics.LOAD_LATENCY.add(path, by=int((time.monotonic() - start) * 1e6))
        self.signature_defs = self._saved_model.signature_defs
        self._batcher = batcher if can_be_batched(self.signature_defs) else None

    def signature(self, name):
        """The effective name of a signature ("" means `serving_default`) and its `SignatureDef`.

        Raises:
            ServingError: FAILED_PRECONDITION if the model has no such signature.
        """
        name = name or "serving_default"
        if name not in self.signature_defs:
            raise ServingError("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
        return name, self.signature_defs[name]

    def predict(self, signature_name, inputs, output_names, call):
        """Runs a signature.

        Args:
            signature_name: its name; "" means `serving_default`.
            inputs: input name → NumPy array, whose dtype must be the signature's (object arrays of bytes for strings).
            output_names: the outputs wanted, in any order; empty means all.
            call: the request's `Call`; when it ends early the graph stops.

        Returns:
            The effective signature name and a dict of output name → NumPy array.

        Raises:
            ServingError: with the code and message of the real server.
        """
        call.check()
        signature_name, signature = self.signature(signature_name)
        inputs = _checked_inputs(signature, inputs)
        output_names = _checked_outputs(signature, output_names)
        _check_dtypes(signature, inputs)

        def run(inputs, call):
            start = time.monotonic()
            outputs = self._saved_model.run(signature_name, inputs, output_names, call)
            metrics.RUNTIME_LATENCY.add(self.name, "Predict", "TF1", value=(time.monotonic() - start) * 1e6)
            return outputs

        if self._batcher is None:
            return signature_name, run(inputs, call)
        return signature_name, self._batcher.run((self, signature_name, *sorted(output_names)), inputs, run, call)


def can_be_batched(signature_defs):
    """Whether every signature has inputs, and every input and output has an unknown first dimension."""
    signatures = [signature for name, signature in signature_defs.items() if not name.startswith("__saved_model_")]
    return all(
        signature.inputs and all(map(_has_rows, [*signature.inputs.values(), *signature.outputs.values()]))
        for signature in signatures
    )


def _has_rows(info):
    shape = info.tensor_shape
    return not shape.unknown_rank and len(shape.dim) > 0 and shape.dim[0].size == -1


def _checked_inputs(signature, inputs):
    """The inputs, all of the signature's and no others, completed with its defaults."""
    expected = set(signature.inputs)
    missing, extra = expected - set(inputs) - set(signature.defaults), set(inputs) - expected
    if len(inputs) > len(expected) or (len(inputs) < len(expected) and not signature.defaults):
        raise ServingError(
            "INVALID_ARGUMENT",
            f"input size does not match signature: {len(inputs)}!={len(expected)} len({_set(inputs)}) != "
            f"len({_set(expected)}). Sent extra: {_set(extra)}. Missing but required: {_set(missing)}.",
        )
    if missing:
        name = min(missing)
        raise ServingError(
            "INVALID_ARGUMENT",
            f"Signature input alias: {name}(feed name: {signature.inputs[name].name}) not found in request and no "
            f"default value provided. Inputs expected to be in the request {_set(inputs)}, or default input alias set: "
            f"{','.join(sorted(signature.defaults))}",
        )
    if extra:
        raise ServingError(
            "INVALID_ARGUMENT",
            f"Inputs contains invalid name. Used request inputs: {','.join(sorted(expected & set(inputs)))}, request "
            f"input: {','.join(sorted(inputs))}",
        )
    defaults = {name: tensors.to_array(proto, name) for name, proto in signature.defaults.items() if name not in inputs}
    return {**defaults, **inputs}


def _checked_outputs(signature, names):
    """The names of the outputs wanted."""
    seen = set()
    for name in names:
        if name not in signature.outputs:
            raise ServingError(
                "INVALID_ARGUMENT",
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_set(signature.outputs)}.",
            )
        if name in seen:
            raise ServingError("INVALID_ARGUMENT", f"duplicate output tensor alias: {name}")
        seen.add(name)
    return tuple(names) or tuple(signature.outputs)


def _check_dtypes(signature, inputs):
    # The runtime numbers the arguments by their tensors' names.
    for i, name in enumerate(sorted(inputs, key=lambda name: signature.inputs[name].name)):
        expected, given = tf.as_dtype(signature.inputs[name].dtype), tensors.dtype_of(inputs[name])
        if given != expected:
            raise ServingError(
                "INVALID_ARGUMENT", f"Expects arg[{i}] to be {_type(expected)} but {_type(given)} is provided"
            )


def _type(dtype):
    return _TYPE_NAMES.get(dtype.name, dtype.name)


def _set(names):
    return "{" + ",".join(sorted(names)) + "}"
