"""A SavedModel in memory: loading it, and running its signatures so that they can be stopped.

Functions run through TensorFlow's eager runtime rather than a session, because only there can one run be cancelled, and
straight through `execute_with_cancellation`: `CancellationManager.get_cancelable_function` keeps its manager in a
global variable, so that concurrent requests would cancel each other. The error messages are the C++ runtime's own, too.
"""

import os
import threading

import tensorflow as tf
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.eager import cancellation, context, execute

from .errors import ServingError, from_exception
from .tensors import from_tensor


class SavedModel:
    """A loaded SavedModel: variables restored, assets read, tables initialised.

    Args:
        path: its folder.
        tags: the tags of the meta graph wanted.

    Attributes:
        signature_defs: name → `SignatureDef`, all of the meta graph.

    Raises:
        ServingError: NOT_FOUND, DATA_LOSS or the runtime's code, if it cannot be loaded.
    """

    def __init__(self, path, tags=("serve",)):
        self.signature_defs = dict(read_meta_graph(path, tags).signature_def)
        try:
            self._loaded = tf.saved_model.load(path, tags=list(tags))
        except Exception as error:
            raise from_exception(error) from error
        self._functions = {}
        self._lock = threading.Lock()

    def run(self, signature_name, inputs, output_names, call):
        """Runs a signature until it is done or the call ends.

        Args:
            signature_name: one of `signature_defs`.
            inputs: dict of every input name → NumPy array of the signature's dtype.
            output_names: the outputs wanted.
            call: the request's `Call`.

        Returns:
            Dict of output name → NumPy array.

        Raises:
            ServingError: the runtime's code and message; DEADLINE_EXCEEDED, CANCELLED.
        """
        function, names = self._function(signature_name, tuple(output_names))
        dtypes = {name: info.dtype for name, info in self.signature_defs[signature_name].inputs.items()}
        manager = cancellation.CancellationManager()
        call.on_cancel(manager.start_cancel)
        call.check()
        ctx = context.context()
        try:
            arguments = [tf.convert_to_tensor(inputs[name], dtype=dtypes[name]) for name in names]
            flat = execute.execute_with_cancellation(
                function.name.decode(),
                num_outputs=len(function.function_type.flat_outputs),
                inputs=arguments + list(function.captured_inputs),
                attrs=tuple(part for pair in ctx.function_call_options.as_attrs().items() for part in pair),
                ctx=ctx,
                cancellation_manager=manager,
            )
            outputs = function.function_type.pack_output(flat)
            return {name: from_tensor(outputs[name]) for name in output_names}
        except Exception as error:
            call.check()
            raise from_exception(error) from error

    def _function(self, signature_name, output_names):
        """The concrete function of a signature and the names of its arguments, in order."""
        signature = self.signature_defs[signature_name]
        if signature_name not in self._loaded.signatures:  # such as __saved_model_init_op, whose output is no tensor
            missing = next(iter(signature.outputs.values())).name
            raise ServingError(
                "INVALID_ARGUMENT",
                f"Tensor {missing}, specified in either feed_devices or fetch_devices was not found in the Graph",
            )
        whole = self._loaded.signatures[signature_name]
        if not hasattr(self._loaded, "prune") or set(output_names) == set(signature.outputs):
            return whole, whole._arg_keywords
        # A graph of TensorFlow 1 can leave out what the wanted outputs do not need.
        with self._lock:
            key = (signature_name, output_names)
            if key not in self._functions:
                names = sorted(signature.inputs)
                element = self._loaded.graph.as_graph_element
                self._functions[key] = (
                    self._loaded.prune(
                        [element(signature.inputs[name].name) for name in names],
                        {name: element(signature.outputs[name].name) for name in output_names},
                    ),
                    names,
                )
            return self._functions[key]


def read_meta_graph(path, tags):
    """The `MetaGraphDef` of a SavedModel folder that has exactly these tags.

    Raises:
        ServingError: NOT_FOUND if there is no SavedModel or no such meta graph, DATA_LOSS if it cannot be read.
    """
    saved_model = saved_model_pb2.SavedModel()
    binary, text = os.path.join(path, "saved_model.pb"), os.path.join(path, "saved_model.pbtxt")
    try:
        if os.path.isfile(binary):
            with open(binary, "rb") as file:
                saved_model.ParseFromString(file.read())
        elif os.path.isfile(text):
            with open(text, encoding="utf-8") as file:
                text_format.Parse(file.read(), saved_model)
        else:
            raise ServingError(
                "NOT_FOUND",
                f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}. Check that the "
                "directory exists and that you have the right permissions for accessing it.",
            )
    except (DecodeError, text_format.ParseError):
        raise ServingError("DATA_LOSS", f"Can't parse {binary} as binary proto") from None
    except OSError as error:
        raise ServingError("NOT_FOUND", f"{path}: {error.strerror}") from None
    for meta_graph in saved_model.meta_graphs:
        if set(meta_graph.meta_info_def.tags) == set(tags):
            return meta_graph
    raise ServingError(
        "NOT_FOUND",
        f"Could not find meta graph def matching supplied tags: {{ {' '.join(tags)} }}. To inspect available tag-sets "
        "in the SavedModel, please use the SavedModel CLI: `saved_model_cli`",
    )
