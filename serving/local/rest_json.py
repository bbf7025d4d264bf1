"""REST bodies ↔ tensors: pure functions, with the rules and the error messages of the real server's json_tensor.cc."""

import binascii
import json
import sys
from itertools import chain

import numpy as np
from google.protobuf import json_format
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from . import json_text
from .errors import CODES, ServingError

_DTYPES = {
    types_pb2.DT_FLOAT: np.float32,
    types_pb2.DT_DOUBLE: np.float64,
    types_pb2.DT_INT32: np.int32,
    types_pb2.DT_INT16: np.int16,
    types_pb2.DT_INT8: np.int8,
    types_pb2.DT_UINT8: np.uint8,
    types_pb2.DT_INT64: np.int64,
    types_pb2.DT_UINT32: np.uint32,
    types_pb2.DT_UINT64: np.uint64,
    types_pb2.DT_BOOL: np.bool_,
    types_pb2.DT_STRING: np.object_,
}
_OUTPUT_DTYPES = {np.dtype(dtype) for dtype in _DTYPES.values()}
_TYPE_NAMES = {"float16": "half", "float32": "float", "float64": "double"}  # where TensorFlow has its own
_JSON_TYPES = {dict: "Object", list: "Array", str: "String", bool: "", type(None): "Null"}
MAX_RANK = 64  # of a NumPy array
MAX_SHOWN = 1000  # characters of a JSON value in an error message


# Requests


def read_document(body):
    """A request's body as the JSON object that it must be.

    Raises:
        ServingError: INVALID_ARGUMENT.
    """
    try:
        value = json_text.loads(body)
    except ValueError as error:
        raise _invalid(f"JSON Parse error: {error}") from None
    if type(value) is not dict:
        raise _invalid(f"JSON Value: {_show(value)} Is not object")
    if type(value.get("signature_name", "")) is not str:
        raise _invalid(
            f"JSON Value: {_show(value)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return value


def read_inputs(document, signature_defs):
    """What a predict request asks for.

    Args:
        document: of `read_document`.
        signature_defs: the model's, name → `SignatureDef`.

    Returns:
        The signature's name; dict of input name → NumPy array of the signature's dtype (objects of bytes for strings)
        and of whatever shape came; whether the request is in rows.

    Raises:
        ServingError: INVALID_ARGUMENT; UNIMPLEMENTED for dtypes that have no JSON form, in columns.
    """
    name = document.get("signature_name") or "serving_default"
    if name not in signature_defs:
        raise _invalid(f'Serving signature name: "{name}" not found in signature def')
    dtypes = {key: info.dtype for key, info in signature_defs[name].inputs.items()}
    if not dtypes:
        raise _invalid(f"Failed to get input map for signature: {document.get('signature_name') or 'DEFAULT'}")
    if "instances" in document and "inputs" in document:
        raise _invalid(
            f"JSON Value: {_show(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' keys "
            "to exist "
        )
    if "instances" in document:
        rows = document["instances"]
        if type(rows) is not list:
            raise _invalid(f"JSON Value: {_show(document)} Excepting 'instances' to be an list/array")
        if not rows:
            raise _invalid(f"JSON Value: {_show(document)} No values in 'instances' array")
        return name, _from_rows(rows, dtypes), True
    if "inputs" in document:
        return name, _from_columns(document["inputs"], dtypes), False
    raise _invalid("Missing 'inputs' or 'instances' key")


def _from_columns(value, dtypes):
    if type(value) is not dict or _is_base64(value):
        if len(dtypes) > 1:
            raise _invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        value = {next(iter(dtypes)): value}
    for name in dtypes:
        if name not in value:
            raise _invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _tensor(value[name], dtype) for name, dtype in dtypes.items()}


def _from_rows(rows, dtypes):
    if type(rows[0]) is not dict and len(dtypes) > 1:
        raise _invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    named = _is_object(rows[0])
    columns = {}
    try:
        if named:
            if all(_is_object(row) and row.keys() == dtypes.keys() for row in rows):
                columns = {name: _tensor([row[name] for row in rows], dtype) for name, dtype in dtypes.items()}
        elif not any(map(_is_object, rows)):
            name = next(iter(dtypes))
            columns = {name: _tensor(rows, dtypes[name])}
    except ServingError:
        columns = {}
    return columns or _wrong_rows(rows, named, dtypes)


def _wrong_rows(rows, named, dtypes):
    """Finds the first thing wrong with rows that make no tensors, and raises it."""
    shapes = {}
    for i, row in enumerate(rows):
        if named != _is_object(row):
            expected, found = ("object", "list") if named else ("value/list", "object")
            raise _invalid(f"Expecting {expected} but got {found} at item {i} of input list")
        for name, value in row.items() if named else [(next(iter(dtypes)), row)]:
            try:
                if name not in dtypes:
                    raise _invalid(f"JSON object: does not have named input: {name}")
                array = _tensor(value, dtypes[name])
                size, shape = shapes.setdefault(name, (array.size, array.shape))
                if size != array.size:
                    raise _invalid(f"Expecting tensor size: {size} but got: {array.size}")
                if shape != array.shape:
                    raise _invalid(f"Expecting shape {_shape(shape)} but got: {_shape(array.shape)}")
            except ServingError as error:
                key = f" key: {name}" if named else ""
                raise _invalid(
                    f"Failed to process element: {i}{key} of 'instances' list. Error: {error.code}: {error.message}"
                ) from None
        if named and row.keys() != dtypes.keys():
            raise _invalid(
                f"Failed to process element: {i} of 'instances' list. JSON object: {_show(row)} must only have keys: "
                f"{','.join(sorted(dtypes))}"
            )
    raise _invalid("'instances' list has rows that make no tensor")


def _is_base64(value):
    """Whether it is `{"b64": "…"}`, a value and not an object of named inputs."""
    return type(value) is dict and len(value) == 1 and type(value.get("b64")) is str


def _is_object(value):
    return type(value) is dict and not _is_base64(value)


def _shape(shape):
    return f"[{','.join(map(str, shape))}]"


# Values


def _tensor(value, dtype):
    """A value or nested lists of values as an array of the dtype, a number of `types_pb2.DataType`."""
    shape = []
    first = value
    while type(first) is list:
        shape.append(len(first))
        first = first[0] if first else None
    if len(shape) > MAX_RANK:
        raise _invalid(f"Encountered lists nested {len(shape)} deep; tensors have up to {MAX_RANK} dimensions")
    array = None
    if dtype in _DTYPES:
        leaves = [value]
        for size in shape:
            if not set(map(type, leaves)) <= {list} or not set(map(len, leaves)) <= {size}:
                break
            leaves = list(chain.from_iterable(leaves))
        else:
            array = _leaves(leaves, np.dtype(_DTYPES[dtype]))
    if array is None:
        _wrong_value(value, shape, 0, dtype)
        raise _invalid(f"JSON Value: {_show(value)} is no tensor")
    return array.reshape(shape)


def _leaves(leaves, dtype):
    """Values that are no lists as an array; None if any of them is not of the dtype."""
    types = set(map(type, leaves))
    if dtype.kind == "f":
        return _floats(leaves, types, dtype) if types <= {int, float, json_text.NonFinite} else None
    if dtype.kind == "b":
        return np.array(leaves, dtype) if types <= {bool} else None
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        in_range = types <= {int} and (not leaves or limits.min <= min(leaves) <= max(leaves) <= limits.max)
        return np.array(leaves, dtype) if in_range else None
    try:
        return _filled([_bytes(leaf) for leaf in leaves])
    except ValueError:
        return None


def _filled(items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _floats(leaves, types, dtype):
    try:
        wide = np.array(leaves, np.float64)
    except OverflowError:
        return None
    finite = np.isfinite(wide)
    if not finite.all() and any(type(leaves[i]) is not json_text.NonFinite for i in np.flatnonzero(~finite)):
        return None
    info = np.finfo(dtype)
    largest = np.abs(wide[finite]).max(initial=0)
    limit = 2 ** (info.nmant + 1)
    if largest > info.max or (int in types and largest >= limit and any(_is_lossy(leaf, limit) for leaf in leaves)):
        return None
    return wide.astype(dtype)


def _is_lossy(leaf, limit):
    """Whether it is an integer token beyond the mantissa; what 64 bits cannot hold counts as a decimal."""
    return type(leaf) is int and abs(leaf) >= limit and -(2**63) <= leaf < 2**64


def _bytes(leaf):
    """A string or `{"b64": "…"}` as bytes; ValueError for anything else."""
    if type(leaf) is str:
        return leaf.encode("utf-8", "surrogateescape")
    if not _is_base64(leaf):
        raise ValueError
    # White space is skipped, a full stop pads as well as "=" does, and padding is right or left out.
    data = leaf["b64"].encode("ascii").translate(None, b" \t\n\v\f\r")
    end = data[-2:].replace(b".", b"=")
    if not end.endswith(b"="):
        end += b"=" * (-len(data) % 4)
    return binascii.a2b_base64(data[:-2] + end, strict_mode=True)


def _wrong_value(value, shape, level, dtype):
    """Finds the first thing wrong with a value that makes no tensor, and raises it."""
    if type(value) is list:
        if level >= len(shape):
            raise _invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        if len(value) != shape[level]:
            raise _invalid(
                f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
            )
        for item in value:
            _wrong_value(item, shape, level + 1, dtype)
        return
    shown = f"JSON Value: {_show(value)}"
    if level != len(shape):
        raise _invalid(
            f"{shown} found at incorrect level: {level + 1} in the JSON DOM. Expected at level: {len(shape)}"
        )
    name = types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()
    if dtype not in _DTYPES:
        raise ServingError("UNIMPLEMENTED", f"Conversion of {shown} to type: {name}")
    if _leaves([value], np.dtype(_DTYPES[dtype])) is not None:
        return
    if dtype == types_pb2.DT_STRING and _is_base64(value):
        raise _invalid("Unable to base64 decode")
    if dtype == types_pb2.DT_STRING and type(value) is dict:
        raise _invalid(f"{shown} not formatted correctly for base64 data")
    if type(value) in (int, float) and abs(value) > sys.float_info.max:
        raise _invalid("JSON Parse error: Number too big to be stored in double.")
    if dtype in (types_pb2.DT_FLOAT, types_pb2.DT_DOUBLE) and type(value) in (int, float):
        raise _invalid(f"Cannot convert JSON value: {_show(value)} to {name} without loss of precision.")
    kind = str(value) if type(value) is bool else _JSON_TYPES.get(type(value), "Number")
    raise _invalid(f"{shown} Type: {kind} is not of expected type: {name}")


def _invalid(message):
    return ServingError("INVALID_ARGUMENT", message)


def _show(value):
    """A JSON value for an error message, its beginning if it is long."""
    text = ""
    try:
        for part in json.JSONEncoder(indent=4, ensure_ascii=False).iterencode(value):
            text += part[:MAX_SHOWN]
            if len(text) > MAX_SHOWN:
                return text[:MAX_SHOWN] + "...TRUNCATED"
    except (RecursionError, ValueError):  # lists deeper, or integers longer, than Python writes
        text += "..."
    return text


# Replies


def outputs_body(arrays, in_rows):
    """A predict reply's body.

    Args:
        arrays: output name → NumPy array.
        in_rows: whether the request came in rows.

    Returns:
        UTF-8 bytes, except where strings of the model are not.

    Raises:
        ServingError: INVALID_ARGUMENT for arrays that make no rows, and for dtypes that have no JSON form.
    """
    if not arrays:
        raise _invalid("Cannot convert empty tensor map to JSON")
    if in_rows:
        _check_rows(arrays)
    for array in arrays.values():
        if array.size and array.dtype not in _OUTPUT_DTYPES:
            name = _TYPE_NAMES.get(array.dtype.name, array.dtype.name)
            raise _invalid(f"Failed to write JSON value for tensor type: {name}")
    texts = {
        name: json_text.dump_array(array, keep=int(in_rows), as_base64=name.endswith("_bytes"))
        for name, array in arrays.items()
    }
    if not in_rows:
        return b'{"outputs": ' + (_members(texts) if len(texts) > 1 else next(iter(texts.values()))) + b"}"
    if len(texts) > 1:
        rows = [_members(dict(zip(texts, row))) for row in zip(*texts.values())]
    else:
        rows = next(iter(texts.values()))
    return b'{"predictions": [' + b", ".join(rows) + b"]}"


def _members(texts):
    return b"{" + b", ".join(json_text.dumps(name) + b": " + text for name, text in texts.items()) + b"}"


def _check_rows(arrays):
    size = 0
    for name, array in arrays.items():
        if array.ndim == 0:
            raise _invalid(f"Tensor name: {name} has no shape information ")
        if array.shape[0] < 1:
            raise _invalid(f"Tensor name: {name} has invalid batch size: {array.shape[0]}")
        if size and array.shape[0] != size:
            raise _invalid(f"Tensor name: {name} has inconsistent batch size: {array.shape[0]} expecting: {size}")
        size = array.shape[0]


def status_body(versions):
    """The body of a model's status, for a list of (version, state, code, message)."""
    response = get_model_status_pb2.GetModelStatusResponse()
    for version, state, code, message in versions:
        entry = response.model_version_status.add(version=version, state=state)
        entry.status.error_code, entry.status.error_message = CODES[code], message
    return _indented(_fields(response))


def metadata_body(name, version, signature_defs):
    """The body of a model version's metadata."""
    spec = model_pb2.ModelSpec(name=name)
    spec.version.value = version
    signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=signature_defs)
    return _indented({"model_spec": _fields(spec), "metadata": {"signature_def": _fields(signatures)}})


def _fields(message):
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _indented(value):
    return json.dumps(value, indent=1, ensure_ascii=False).encode(errors="replace")


def error_body(message):
    """The body of an error."""
    return json.dumps({"error": message}, ensure_ascii=False).encode(errors="replace")
