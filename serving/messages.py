"""TF-Serving's messages, as far as a client needs them, and tensors in them. Needs protobuf and NumPy alone.

They are declared here, in a descriptor pool of their own, because the official packages import TensorFlow; beside those
nothing clashes. On the wire only the numbers count: they are those of `tensorflow_serving/apis/*.proto` and
`tensorflow/core/framework/{tensor,tensor_shape,types}.proto`.
"""

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "tensorflow.serving"
_SCHEMA = {  # message → field → (number, type); "*" is repeated, "map" has string keys
    "Dim": {"size": (1, "int64")},
    "TensorShapeProto": {"dim": (2, "*Dim")},
    "TensorProto": {
        "dtype": (1, "int32"),  # an enum, which travels as its number
        "tensor_shape": (2, "TensorShapeProto"),
        "tensor_content": (4, "bytes"),
        "float_val": (5, "*float"),
        "double_val": (6, "*double"),
        "int_val": (7, "*int32"),
        "string_val": (8, "*bytes"),
        "int64_val": (10, "*int64"),
        "bool_val": (11, "*bool"),
        "half_val": (13, "*int32"),
    },
    "ModelSpec": {"name": (1, "string"), "signature_name": (3, "string")},
    "PredictRequest": {"model_spec": (1, "ModelSpec"), "inputs": (2, "map TensorProto")},
    "PredictResponse": {"outputs": (1, "map TensorProto")},
    "GetModelMetadataRequest": {"model_spec": (1, "ModelSpec"), "metadata_field": (2, "*string")},
    "GetModelMetadataResponse": {"metadata": (2, "map Any")},
    "Any": {"value": (2, "bytes")},
    "TensorInfo": {"name": (1, "string")},
    "SignatureDef": {"inputs": (1, "map TensorInfo"), "outputs": (2, "map TensorInfo")},
    "SignatureDefMap": {"signature_def": (1, "map SignatureDef")},
}


def _declare(schema):
    """Message classes by name."""
    file = descriptor_pb2.FileDescriptorProto(name="serving/messages.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in schema.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            if kind.startswith("map "):
                entry = message.nested_type.add(name=f"{field.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                _add_field(entry, "key", 1, "string")
                _add_field(entry, "value", 2, kind.removeprefix("map "))
                kind = f"*{name}.{entry.name}"
            _add_field(message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in schema}


def _add_field(message, name, number, kind):
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
    kind = kind.removeprefix("*")
    scalar = getattr(field, f"TYPE_{kind.upper()}", None)
    if scalar is None:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = scalar


_MESSAGES = _declare(_SCHEMA)
TensorProto, SignatureDefMap = _MESSAGES["TensorProto"], _MESSAGES["SignatureDefMap"]
PredictRequest, PredictResponse = _MESSAGES["PredictRequest"], _MESSAGES["PredictResponse"]
GetModelMetadataRequest = _MESSAGES["GetModelMetadataRequest"]
GetModelMetadataResponse = _MESSAGES["GetModelMetadataResponse"]

# NumPy dtype → (number of the tensor's type, field of its values)
_DTYPES = {
    "float32": (1, "float_val"),
    "float64": (2, "double_val"),
    "int32": (3, "int_val"),
    "uint8": (4, "int_val"),
    "object": (7, "string_val"),
    "int64": (9, "int64_val"),
    "bool": (10, "bool_val"),
    "float16": (19, "half_val"),
}
_DTYPE_OF = {number: dtype for dtype, (number, _) in _DTYPES.items()}


def to_tensor(array):
    """A `TensorProto`: numbers as little-endian `tensor_content`, arrays of `bytes` (dtype object) as strings.

    Raises:
        TypeError: there is no such tensor type here.
    """
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"An array of {array.dtype} cannot be sent; send one of {', '.join(_DTYPES)}.")
    tensor = TensorProto(dtype=_DTYPES[array.dtype.name][0])
    tensor.tensor_shape.SetInParent()
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    if array.dtype == object:
        tensor.string_val.extend(array.ravel().tolist())
    else:
        tensor.tensor_content = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return tensor


def to_array(tensor):
    """The array of a `TensorProto`; strings become an array of `bytes`. Fewer values than elements repeat the last.

    Raises:
        TypeError: there is no such array type here.
    """
    if tensor.dtype not in _DTYPE_OF:
        raise TypeError(f"Tensors of type number {tensor.dtype} cannot be read.")
    dtype = np.dtype(_DTYPE_OF[tensor.dtype])
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
    values = getattr(tensor, _DTYPES[dtype.name][1])
    array = np.array(values, "uint16").view(dtype) if dtype == np.float16 else np.array(values, dtype)
    count = int(np.prod(shape))
    if len(array) < count:
        array = np.concatenate([array, np.repeat(array[-1:] if len(array) else np.zeros(1, dtype), count - len(array))])
    return array.reshape(shape)
