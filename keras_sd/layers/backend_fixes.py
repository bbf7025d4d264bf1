"""What three of Keras' backends need before our models run on them as they do elsewhere."""

import contextlib
import threading

import keras
import numpy as np

from keras_sd.layers.openvino_layout import channels_first


class FixedShapes:
    """Of a `keras.Model`: OpenVINO compiles it for the shapes that it is given, the batch size included.

    Keras leaves the batch open, and so OpenVINO could not fuse the attentions. Elsewhere this changes nothing.
    """

    def _get_compiled_model(self, data):
        named = data if isinstance(data, dict) else dict(enumerate(keras.tree.flatten(data)))
        shapes = {name: (x.shape, x.dtype) for name, x in named.items()}
        if self.ov_compiled_model is None:  # the first time, or somebody forgot the traces
            self._compiled = {}
        key = frozenset(shapes.items())
        if key not in self._compiled:
            self.ov_compiled_model = None  # memory goes before the next one's comes, but for rows with other inputs
            for known in [*self._compiled]:
                if any(shapes.get(name, one) != one for name, one in known):
                    del self._compiled[known]
            self._compiled[key] = self._compile_for(data)
        self.ov_compiled_model, self.struct_outputs = self._compiled[key]
        self._n_main_outputs, self._output_mask_indices = len(self.ov_compiled_model.outputs), {}
        return self.ov_compiled_model

    def _compile_for(self, data):
        """What OpenVINO runs for data of these shapes, and the structure of its outputs."""
        import openvino
        from keras.src.backend.openvino.core import OPENVINO_DTYPES, OpenVINOKerasTensor
        from openvino import opset16

        nodes = [opset16.parameter(x.shape, OPENVINO_DTYPES[str(x.dtype)]) for x in keras.tree.flatten(data)]
        inputs = [OpenVINOKerasTensor(node.output(0)) for node in nodes]
        struct_outputs = self(keras.tree.pack_sequence_as(data, inputs))
        outputs = [output.output for output in keras.tree.flatten(struct_outputs)]
        # OpenVINO's arrays of bfloat16 say that they are float16
        narrow = openvino.Type.bf16
        wide = [opset16.convert(one, "f32") if one.get_element_type() == narrow else one for one in outputs]
        model = openvino.Model([opset16.result(one) for one in wide], nodes)
        channels_first(model)
        with given_back([v.value.let_go for v in self.variables if hasattr(v.value, "let_go")]):
            return openvino.compile_model(model, "CPU"), keras.tree.map_structure(lambda _: 0, struct_outputs)

    def release_memory(self):
        """Gives back what the last prediction computed with, where the backend keeps that for the next one."""
        for compiled, _ in vars(self).get("_compiled", {}).values():
            compiled.release_memory()


@contextlib.contextmanager
def given_back(files):
    """While OpenVINO packs weights that lie in files, calls the functions that give back the memory of their pages."""
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            for let_go in files:
                let_go()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for let_go in files:
            let_go()


if keras.backend.backend() == "torch":
    import torch
    from keras.src.backend.torch.layer import TorchLayer

    # Our layers' names hold dots, as the state dict's keys do; torch forbids them in a parameter's name.

    class _DotFree(torch.nn.ParameterDict):
        def _key_to_attr(self, key):
            return super()._key_to_attr(key.replace(".", "_"))

    def _track_variables(self):
        self._torch_params = _DotFree({variable.path: variable.value for variable in self.variables})

    TorchLayer._track_variables = _track_variables

elif keras.backend.backend() == "openvino":
    import openvino

    # On CPUs with bfloat16 units OpenVINO computes float32 models in bfloat16 unless told otherwise.

    _compile_model = openvino.compile_model

    def _compile_as_typed(model, device_name="AUTO", config=None):
        types = {output.get_element_type() for node in model.get_ops() for output in node.outputs()}
        if config is None and not types & {openvino.Type.bf16, openvino.Type.f16}:
            config = {"INFERENCE_PRECISION_HINT": "f32"}
        return _compile_model(model, device_name, config)

    openvino.compile_model = _compile_as_typed


def silu(x, training=None):
    """`keras.ops.silu`; on TensorFlow, but while training, without the gradient that it has there: registering that
    keeps the graph, and so the weights, for as long as the process lives."""
    return keras.ops.silu(x) if training or keras.backend.backend() != "tensorflow" else x * keras.ops.sigmoid(x)


def after(x, value):
    """The tensor `x`, and `value`, which is not there before it. Without this TensorFlow widens all int8 kernels before
    the first layer runs, as there is nothing that they wait for, and holds them at once."""
    if keras.backend.backend() != "tensorflow":
        return x, value
    import tensorflow as tf

    x = tf.ensure_shape(x, x.shape)  # or oneDNN would fuse a padding, the `x`, with its convolution: a cycle
    with tf.control_dependencies([x]):
        return x, tf.identity(value)


def read_in_graph(read, shape, dtype):
    """What the function `read` gives, a NumPy array: a tensor. In a graph of TensorFlow it is called in every run, and
    not before what the graph computes so far is there: all at once would be all of the weights."""
    import tensorflow as tf

    if tf.executing_eagerly():
        return keras.ops.convert_to_tensor(read())
    bits = f"uint{8 * np.dtype(dtype).itemsize}"  # NumPy has no bfloat16 of its own
    made = reversed(tf.compat.v1.get_default_graph().get_operations())
    before = [next(op for op in made if op.inputs and op.type != "Pad")]  # which oneDNN makes a part of the convolution
    with tf.control_dependencies(before):
        value = tf.numpy_function(lambda: read().view(bits), [], bits)
    return tf.bitcast(tf.ensure_shape(value, shape), tf.as_dtype(dtype))
