"""Writes a pipeline for OpenVINO: `.xml` with `.bin`, any batch size, for CPUs, integrated GPUs and NPUs of Intel."""

from export.part_files import write_folder

SUFFIX = ".xml"
SMALL = 1024  # numbers; smaller constants stay float32
TOLERANCE = 1e-2  # weights are stored in float16; root mean square of the error over that of the output


def write(sd, folder, height, width):
    """Writes `text_encoder`, `denoising_step` and `decoder` as `.xml` and `.bin`, the tokenizer and the scheduler.

    Inputs and outputs have the names and shapes of `export.parts.parts`, the batch is open; the
    denoising step's outputs are `next_latent` and `next_history`, as names are unique here. Weights are stored in
    float16; the arithmetic is the device's choice (`INFERENCE_PRECISION_HINT`).

    Args:
        sd: a `StableDiffusion` on the TensorFlow backend, its models in float32.
        folder: where to; nothing may be there yet.
        height, width: of the pictures in pixels.

    Raises:
        ImportError: openvino is not installed.
        ValueError: a wrong size, or the files do not compute what Keras does.
        FileExistsError: something is at `folder`.
    """
    _openvino()
    from export.parts import parts

    files = {name: part.with_unique_names() for name, part in parts(sd, height, width, batch_size=None).items()}
    write_folder(sd, folder, files, __name__, convert, TOLERANCE)


def convert(part, path):
    """Writes a `Part` as `.xml` and `.bin`."""
    import tensorflow as tf

    openvino, names = _openvino(), list(part.inputs)
    specs = [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in part.inputs.items()]
    function = tf.function(lambda *tensors: part.function(dict(zip(names, tensors))), autograph=False)
    traced = function.get_concrete_function(*specs)
    model = openvino.convert_model(traced)
    for name, port in zip([*names, *sorted(traced.structured_outputs)], [*model.inputs, *model.outputs]):
        port.set_names({name})
    _narrow_weights(model)
    openvino.save_model(model, path, compress_to_fp16=False)


def _narrow_weights(model):
    """Stores weights in float16. OpenVINO's own compression also takes the frequencies of the timestep embedding, of
    which half a thousandth is half a radian."""
    from openvino import Type, opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == Type.f32 and node.data.size >= SMALL:
            wide = opset13.convert(opset13.constant(node.data.astype("float16")), "f32")
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(wide.output(0))


def load(path):
    """Opens an `.xml` file on the CPU in float32: a function from dict of arrays to dict of arrays."""
    compiled = _openvino().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs):
        return {port.any_name: value for port, value in compiled(inputs).items()}

    return run


def _openvino():
    try:
        import openvino
    except ImportError as error:
        raise ImportError("OpenVINO files are written and run by openvino: pip install openvino.") from error
    return openvino
