"""Writes a pipeline as ONNX files, any batch size, for onnxruntime and whatever else reads them."""

import numpy as np

from export.part_files import write_folder

SUFFIX = ".onnx"
OPSET = 18
TOLERANCE = 1e-3  # root mean square of the error over that of the output


def write(sd, folder, height, width):
    """Writes `text_encoder.onnx`, `denoising_step.onnx`, `decoder.onnx`, the tokenizer and the scheduler.

    Inputs and outputs have the names and shapes of `export.parts.parts`, float32, the batch is open;
    the denoising step's outputs are `next_latent` and `next_history`, as names are unique here.

    Args:
        sd: a `StableDiffusion` on the TensorFlow backend, its models in float32.
        folder: where to; nothing may be there yet.
        height, width: of the pictures in pixels.

    Raises:
        ImportError: tf2onnx or onnxruntime is not installed.
        ValueError: a wrong size, or the files do not compute what Keras does.
        FileExistsError: something is at `folder`.
    """
    _tf2onnx(), _onnxruntime()
    from export.parts import parts

    files = {name: part.with_unique_names() for name, part in parts(sd, height, width, batch_size=None).items()}
    write_folder(sd, folder, files, __name__, convert, TOLERANCE)


def convert(part, path):
    """Writes a `Part` as an `.onnx` file, and the weights beside it in `.onnx.data`, which has no 2 GB limit."""
    import onnx
    import tensorflow as tf

    traced, weights = part.trace()
    specs = [tf.TensorSpec(x.shape, x.dtype, x.op.name) for x in traced.inputs if x.dtype != tf.resource]
    function = tf.function(lambda *tensors: traced(*tensors), input_signature=specs, autograph=False)
    model, _ = _tf2onnx().convert.from_function(function, specs, opset=OPSET, custom_op_handlers={"Erfc": (_erfc, [])})
    inputs = {value.name: value for value in model.graph.input}
    with open(f"{path}.data", "wb") as file:
        for i, weight in enumerate(weights):
            model.graph.input.remove(inputs[f"weight_{i}"])
            tensor = model.graph.initializer.add(name=f"weight_{i}", dims=weight.shape)
            tensor.data_type, tensor.data_location = onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
            data = np.asarray(weight, "float32").tobytes()
            places = {"location": f"{path.name}.data", "offset": str(file.tell()), "length": str(len(data))}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)
            file.write(data)
    onnx.save(model, path)


def _erfc(graph, node, name, arguments):
    """1 - erf(x), for an operator of TensorFlow's that ONNX lacks."""
    shape, dtype = graph.get_shape(node.output[0]), graph.get_dtype(node.output[0])
    one = graph.make_const(f"{name}/one", np.ones((), "float32"))
    erf = graph.make_node("Erf", node.input, shapes=[shape], dtypes=[dtype])
    graph.remove_node(name)
    inputs = [one.output[0], erf.output[0]]
    return graph.make_node("Sub", inputs, name=name, outputs=node.output, shapes=[shape], dtypes=[dtype])


def load(path):
    """Opens an `.onnx` file on the CPU: a function from dict of arrays to dict of arrays."""
    session = _onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs):
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))

    return run


def _tf2onnx():
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError("ONNX files are written by tf2onnx: pip install tf2onnx onnxruntime.") from error
    return tf2onnx


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files are checked by onnxruntime: pip install onnxruntime.") from error
    return onnxruntime
