"""TensorProto ↔ NumPy, as the real server does it.

Reading is TensorFlow's own `Tensor::FromProto` (through the ParseTensor operation), after the checks that keep a small
message from claiming a huge tensor. Writing fills the typed fields with every value, as `Tensor::AsProtoField` does,
but whole arrays at a time: the packed fields are assembled as bytes.
"""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from .errors import ServingError

# The typed field of each dtype; what a request may carry.
FIELDS = {
    "float_val": "DT_FLOAT",
    "double_val": "DT_DOUBLE",
    "int_val": "DT_INT32 DT_INT16 DT_INT8 DT_UINT16 DT_UINT8 DT_QINT32 DT_QINT16 DT_QINT8 DT_QUINT16 DT_QUINT8"
    " DT_INT4 DT_UINT4",
    "string_val": "DT_STRING",
    "scomplex_val": "DT_COMPLEX64",
    "int64_val": "DT_INT64",
    "bool_val": "DT_BOOL",
    "dcomplex_val": "DT_COMPLEX128",
    "half_val": "DT_HALF DT_BFLOAT16",
    "uint32_val": "DT_UINT32",
    "uint64_val": "DT_UINT64",
    "float8_val": "DT_FLOAT8_E5M2 DT_FLOAT8_E4M3FN",
}
_FIELD_OF = {types_pb2.DataType.Value(dtype): field for field, dtypes in FIELDS.items() for dtype in dtypes.split()}
_FLOATS = {"float_val": "<f4", "double_val": "<f8", "scomplex_val": "<f4", "dcomplex_val": "<f8"}

MAX_REPEATED_BYTES = 2**28  # of a tensor of which the message does not carry every value
_VARINT_CHUNK = 2**18


def to_array(proto, name):
    """A TensorProto as a NumPy array: strings as objects of type bytes, the other dtypes as TensorFlow's NumPy dtypes.

    Typed values that are fewer than the elements repeat the last one; none at all means zeros.

    Args:
        proto: the message.
        name: the input's name, for the error.

    Raises:
        ServingError: INVALID_ARGUMENT if the message is no tensor.
    """
    field = _FIELD_OF.get(proto.dtype)
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if field is None or proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise _parsing_error(name)
    dtype, elements = tf.as_dtype(proto.dtype), math.prod(sizes)
    given = len(getattr(proto, field)) // (2 if dtype.is_complex else 1)
    # A tensor of strings costs 24 bytes an element before its first character.
    size = elements * (24 if dtype == tf.string else dtype.size)
    if given > elements or (size > MAX_REPEATED_BYTES and given < elements and not proto.tensor_content):
        raise _parsing_error(name)
    try:
        return from_tensor(tf.raw_ops.ParseTensor(serialized=proto.SerializeToString(), out_type=dtype))
    except tf.errors.OpError:
        raise _parsing_error(name) from None


def from_tensor(tensor):
    """An eager tensor as a NumPy array that knows its dtype: also a single string, also quantised integers."""
    value = tensor.numpy()
    if tensor.dtype == tf.string:
        return value if isinstance(value, np.ndarray) else np.array(value, dtype=object)
    return np.asarray(value).view(tensor.dtype.as_numpy_dtype)


def to_proto(array):
    """A NumPy array (as `to_array` returns it) as a TensorProto with every value in the dtype's typed field."""
    dtype = dtype_of(array)
    proto = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum)
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    field = _FIELD_OF[proto.dtype]
    flat = np.ravel(array)
    if field == "string_val":
        proto.string_val.extend(flat.tolist())
    elif field == "float8_val":
        proto.float8_val = flat.tobytes()
    elif flat.size:
        if field in _FLOATS:
            packed = flat.view(_FLOATS[field]).tobytes()
        elif field == "half_val":
            packed = _varints(flat.view(np.uint16))
        else:
            packed = _varints(_plain_integers(flat))
        number = tensor_pb2.TensorProto.DESCRIPTOR.fields_by_name[field].number
        proto.MergeFromString(_varint(number << 3 | 2) + _varint(len(packed)) + packed)
    return proto


def dtype_of(array):
    """The TensorFlow dtype of a NumPy array; arrays of objects hold strings."""
    return tf.as_dtype(array.dtype)


def _parsing_error(name):
    return ServingError("INVALID_ARGUMENT", f"tensor parsing error: {name}")


def _plain_integers(flat):
    """Quantised and four-bit dtypes as the integers they are made of."""
    if flat.dtype.names:
        return flat.view(flat.dtype[0])
    return flat if flat.dtype.kind in "iub" else flat.astype(np.int8)


def _varint(value):
    return _varints(np.array([value]))


def _varints(integers):
    """An integer array as protocol buffers' varints: seven bits a byte, lowest first; negatives take ten bytes."""
    encoded = []
    for start in range(0, integers.size, _VARINT_CHUNK):
        values = integers[start : start + _VARINT_CHUNK].astype(np.int64 if integers.dtype.kind == "i" else np.uint64)
        values = values.view(np.uint64)
        length = max(1, -(-int(values.max()).bit_length() // 7))
        rest = values[:, None] >> np.arange(0, 7 * length, 7, dtype=np.uint64)
        needed = rest != 0
        needed[:, 0] = True
        groups = (rest & np.uint64(0x7F)).astype(np.uint8)
        groups[:, :-1] |= needed[:, 1:].astype(np.uint8) << 7
        encoded.append(groups[needed].tobytes())
    return b"".join(encoded)
