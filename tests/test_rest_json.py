"""JSON bodies of the REST API: what a request's values become, what is refused and how, how tensors are printed."""

import json
import random

import numpy as np
import pytest
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from serving.local import json_text, rest_json
from serving.local.errors import ServingError


def signature(**inputs):
    """A `SignatureDef` with inputs of the named types: x="FLOAT"."""
    definition = meta_graph_pb2.SignatureDef(method_name="tensorflow/serving/predict")
    for name, dtype in inputs.items():
        definition.inputs[name].name = f"{name}:0"
        definition.inputs[name].dtype = types_pb2.DataType.Value(f"DT_{dtype}")
    return definition


def read(body, **inputs):
    """The inputs that a body, JSON text or a value, gives a model with one signature."""
    body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return rest_json.read_inputs(rest_json.read_document(body), {"serving_default": signature(**inputs)})[1]


def refusal(body, code="INVALID_ARGUMENT", **inputs):
    with pytest.raises(ServingError) as caught:
        read(body, **inputs)
    assert caught.value.code == code
    return caught.value.message


# Rows


def test_rows_of_values():
    assert read('{"instances": [[1,2],[3,4],[5,6]]}', x="INT32")["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    array = read('{"instances": [1, 2.0, 3, 5.003, 0.007, -0.0]}', x="FLOAT")["x"]
    assert array.dtype == np.float32
    assert array.tolist() == np.float32([1, 2, 3, 5.003, 0.007, 0]).tolist()
    assert read('{"instances": [[], []]}', x="FLOAT")["x"].shape == (2, 0)


def test_rows_of_objects():
    values = read(
        """{"instances": [
            {"i": [[1,2],[3,4]], "s": ["foo", "bar"], "f": [1.0, NaN], "d": [-Infinity]},
            {"d": [2], "f": [2.0, Infinity], "s": ["baz", {"b64": "YmF0"}], "i": [[5,6],[7,8]]}]}""",
        i="INT32",
        s="STRING",
        f="FLOAT",
        d="DOUBLE",
    )
    assert values["i"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert values["s"].tolist() == [[b"foo", b"bar"], [b"baz", b"bat"]]
    np.testing.assert_array_equal(values["f"], np.float32([[1, np.nan], [2, np.inf]]))
    np.testing.assert_array_equal(values["d"], [[-np.inf], [2]])
    assert values["d"].dtype == np.float64


def test_one_input_may_be_named_too():
    assert read('{"instances": [{"x": 1}, {"x": 2}]}', x="INT64")["x"].tolist() == [1, 2]


def test_base64_objects_are_values_and_not_named_inputs():
    assert read('{"instances": [{"b64": "aGk="}, {"b64": ""}]}', b64="STRING")["b64"].tolist() == [b"hi", b""]
    assert read('{"instances": [{"x": {"b64": "aGk="}}]}', x="STRING")["x"].tolist() == [b"hi"]
    assert read('{"instances": [{"b64": {"b64": "aGk="}}]}', b64="STRING")["b64"].tolist() == [b"hi"]
    assert read('{"instances": [["a", {"b64": "aGk="}]]}', x="STRING")["x"].tolist() == [[b"a", b"hi"]]


@pytest.mark.parametrize(
    "body, inputs, message",
    [
        ('{"instances": []}', {"x": "FLOAT"}, "No values in 'instances' array"),
        ('{"instances": 1}', {"x": "FLOAT"}, "Excepting 'instances' to be an list/array"),
        ('{"instances": {"x": 1}}', {"x": "FLOAT"}, "Excepting 'instances' to be an list/array"),
        ('{"instances": [[1,2],[3,4],[5,6,7]]}', {"x": "INT32"}, "Expecting tensor size: 2 but got: 3"),
        ('{"instances": [[1,2],[3,4],[[5,6]]]}', {"x": "INT32"}, "Expecting shape [2] but got: [1,2]"),
        ('{"instances": [1, [1]]}', {"x": "INT32"}, "Expecting shape [] but got: [1]"),
        ('{"instances": [[1, [2]]]}', {"x": "INT32"}, "Encountered list at unexpected level: 1 expected < 1"),
        ('{"instances": [[[1], 2]]}', {"x": "INT32"}, "JSON Value: 2 found at incorrect level: 2 in the JSON DOM."),
        ('{"instances": [[[1], [2, 3]]]}', {"x": "INT32"}, "unexpected size: 2 at level: 1 expected size: 1"),
        ('{"instances": [[1,2],["a", "b"]]}', {"x": "INT32"}, 'JSON Value: "a" Type: String is not of expected type'),
        ('{"instances": [[1], {"x": [1]}]}', {"x": "INT32"}, "Expecting value/list but got object at item 1"),
        ('{"instances": [{"x": 1}, 2]}', {"x": "INT32"}, "Expecting object but got list at item 1 of input list"),
        ('{"instances": [{}]}', {"x": "INT32"}, "must only have keys: x"),
        ('{"instances": [{"x": 1, "z": 1}]}', {"x": "INT32"}, "does not have named input: z"),
        ('{"instances": [{"x": 1}]}', {"x": "INT32", "y": "INT32"}, "must only have keys: x,y"),
        ('{"instances": [[1, 2]]}', {"x": "INT32", "y": "INT32"}, "instances is a plain list"),
        ('{"instances": [null]}', {"x": "FLOAT"}, "JSON Value: null Type: Null is not of expected type: float"),
        ('{"instances": [1]}', {"x": "HALF"}, "Error: UNIMPLEMENTED: Conversion of JSON Value: 1 to type: half"),
    ],
)
def test_refused_rows(body, inputs, message):
    assert message in refusal(body, **inputs)


# Columns


def test_columns():
    assert read('{"inputs": {"x": [[1], [2]]}}', x="INT32")["x"].shape == (2, 1)
    assert read('{"inputs": [[1], [2]]}', x="INT32")["x"].shape == (2, 1)
    assert read('{"inputs": 7}', x="INT32")["x"] == np.array(7)
    assert read('{"inputs": {"x": 7}}', x="INT32")["x"].shape == ()
    assert read('{"inputs": {"b64": "aGk="}}', x="STRING")["x"].tolist() == b"hi"
    assert read('{"inputs": "hi"}', x="STRING")["x"].shape == ()
    assert read('{"inputs": []}', x="FLOAT")["x"].shape == (0,)
    values = read('{"inputs": {"x": [1, 2], "y": 3, "z": "ignored"}, "more": null}', x="INT32", y="FLOAT")
    assert (values["x"].tolist(), values["y"].tolist(), sorted(values)) == ([1, 2], 3.0, ["x", "y"])


@pytest.mark.parametrize(
    "body, inputs, message",
    [
        ('{"inputs": {"x": 1}}', {"x": "INT32", "y": "INT32"}, "Missing named input: y in 'inputs' object."),
        ('{"inputs": [1]}', {"x": "INT32", "y": "INT32"}, "inputs is a plain value/list, but expecting an object"),
        ('{"inputs": {"x": {"y": 1}}}', {"x": "INT32"}, "Type: Object is not of expected type: int32"),
        ('{"inputs": {"x": {"y": 1}}}', {"x": "STRING"}, "not formatted correctly for base64 data"),
        ('{"inputs": {"x": [1, [2]]}}', {"x": "INT32"}, "Encountered list at unexpected level"),
        ('{"inputs": 1, "instances": [1]}', {"x": "INT32"}, "only one of 'inputs' or 'instances' keys to exist"),
        ("{}", {"x": "INT32"}, "Missing 'inputs' or 'instances' key"),
        ('{"inputs": {}}', {}, "Failed to get input map for signature: DEFAULT"),
        ('{"signature_name": "other", "inputs": 1}', {"x": "INT32"}, 'Serving signature name: "other" not found'),
        ('{"signature_name": 5, "inputs": 1}', {"x": "INT32"}, "'signature_name' key must be a string value."),
        ('{"inputs": %s}' % ("[" * 100 + "]" * 100), {"x": "FLOAT"}, "nested 100 deep"),
    ],
)
def test_refused_columns(body, inputs, message):
    assert message in refusal(body, **inputs)


def test_types_without_json_form_are_unimplemented_in_columns():
    for dtype in ("HALF", "BFLOAT16", "UINT16", "COMPLEX64"):
        message = refusal('{"inputs": [1.5]}', "UNIMPLEMENTED", x=dtype)
        assert message == f"Conversion of JSON Value: 1.5 to type: {dtype.lower()}"


# Values


@pytest.mark.parametrize("dtype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT32", "UINT64"])
def test_integers(dtype):
    limits = np.iinfo(dtype.lower())
    array = read(f'{{"inputs": [{limits.min}, 0, -0, {limits.max}]}}', x=dtype)["x"]
    assert array.dtype == limits.dtype
    assert array.tolist() == [limits.min, 0, 0, limits.max]
    for token in (limits.min - 1, limits.max + 1, "1.0", "1e2", "true", "NaN", '"1"', "null", 10**30):
        assert f"is not of expected type: {dtype.lower()}" in refusal(f'{{"inputs": [1, {token}]}}', x=dtype)


def test_floats():
    assert read('{"inputs": [1, 16777215, -16777215, 1.5e3, 3e38]}', x="FLOAT")["x"].tolist()[:4] == [
        1,
        16777215,
        -16777215,
        1500,
    ]
    assert read(f'{{"inputs": {10**30}}}', x="FLOAT")["x"] == np.float32(1e30)
    assert read(f'{{"inputs": {2**53 - 1}}}', x="DOUBLE")["x"] == 2**53 - 1
    for token, dtype in [(16777217, "FLOAT"), (-16777217, "FLOAT"), ("1e39", "FLOAT"), (2**53 + 1, "DOUBLE")]:
        assert "without loss of precision" in refusal(f'{{"inputs": [0, {token}]}}', x=dtype)
    for token in ("true", '"1"', '"NaN"', "null", "{}", '{"b64": "aGk="}'):
        assert "is not of expected type: float" in refusal(f'{{"inputs": [0, {token}]}}', x="FLOAT")
    for token in ("1e400", "-1e400", "1" * 400, "1" * 5000):
        assert "Number too big to be stored in double." in refusal(f'{{"inputs": [0, {token}]}}', x="FLOAT")


def test_booleans():
    assert read('{"inputs": [true, false]}', x="BOOL")["x"].tolist() == [True, False]
    for token in ("1", "0", '"true"', "null", "1.0"):
        assert "is not of expected type: bool" in refusal(f'{{"inputs": [true, {token}]}}', x="BOOL")


def test_strings():
    assert read('{"inputs": ["ü🙂", "\\u00fc\\ud83d\\ude42", "a\\u0000b", ""]}', x="STRING")["x"].tolist() == [
        "ü🙂".encode(),
        "ü🙂".encode(),
        b"a\0b",
        b"",
    ]
    assert read(b'{"inputs": "\xff\xfe"}', x="STRING")["x"].tolist() == b"\xff\xfe"  # bytes pass through
    for token in ("1", "true", "null"):
        assert "is not of expected type: string" in refusal(f'{{"inputs": ["a", {token}]}}', x="STRING")
    assert "surrogate pair" in refusal('{"inputs": "\\ud800"}', x="STRING")
    assert "surrogate pair" in refusal('{"inputs": "\\udc00\\ud800"}', x="STRING")
    assert read('{"inputs": "\\\\ud800"}', x="STRING")["x"].tolist() == b"\\ud800"


@pytest.mark.parametrize(
    "text, data",
    [
        ("", b""),
        ("aGk=", b"hi"),
        ("aGk", b"hi"),
        ("a G\\nk=", b"hi"),
        ("aGk.", b"hi"),
        ("/+8=", b"\xff\xef"),
        ("QQ", b"A"),
    ],
)
def test_base64(text, data):
    assert read(f'{{"inputs": {{"b64": "{text}"}}}}', x="STRING")["x"].tolist() == data


@pytest.mark.parametrize("text", ["!", "Q", "Q===", "QQ=", "aGk=aGk=", "_-8=", "aü==", "====", "="])
def test_bad_base64(text):
    assert refusal(f'{{"inputs": [{{"b64": "{text}"}}]}}', x="STRING") == "Unable to base64 decode"


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "JSON Parse error: The document is empty"),
        (b"  \n", "The document is empty. at offset: 3"),
        (b"instances = [1, 2]", "JSON Parse error: Invalid value. at offset: 0"),
        (b'{"inputs": [1,]}', "Invalid value. at offset: 14"),
        (b'{"inputs": 1} x', "The document root must not be followed by other values. at offset: 14"),
        ('{"ü": 1} x'.encode(), "at offset: 10"),
        (b'{"inputs": "a', "Missing a closing quotation mark in string."),
        (b'{"inputs": "\n"}', "Invalid encoding in string."),
        (b'{"inputs": "\\x"}', "Invalid escape character in string."),
        (b'{"inputs" 1}', "Missing a colon after a name of object member."),
        (b"{inputs: 1}", "Missing a name for object member."),
        (b"[1, 2", "Missing a comma or closing bracket."),
        (b"[1]", "Is not object"),
        (b'"text"', 'JSON Value: "text" Is not object'),
        (b"\x00", "Invalid value."),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"inputs":' * 100_000, "nested too deeply"),
        (b'{"inputs": 01}', "JSON Parse error"),
        (b'{"inputs": +1}', "JSON Parse error"),
        (b'{"inputs": .5}', "JSON Parse error"),
    ],
)
def test_bad_json(body, message):
    assert message in refusal(body, x="FLOAT")


def test_long_values_are_cut_in_messages():
    assert len(refusal({"inputs": "x" * 10_000}, x="FLOAT")) < 2000
    assert len(refusal({"more": list(range(10_000))}, x="FLOAT")) < 2000


def test_a_byte_order_mark_is_skipped_and_of_two_members_the_first_counts():
    assert read(b'\xef\xbb\xbf{"inputs": 1, "inputs": 2}', x="INT32")["x"] == 1


# Slices


def random_value(rng, depth=0):
    kind = rng.randrange(9 if depth < 5 else 5)
    if kind >= 7:
        return {rng.choice('[]{}",:') + str(i): random_value(rng, depth + 1) for i in range(rng.randrange(5))}
    if kind >= 5:
        if rng.random() < 0.5:  # regular lists, as tensors are
            shape = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 4))]
            return np.random.default_rng(rng.randrange(1000)).standard_normal(shape).tolist()
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(8))]
    return [None, True, rng.random(), rng.randrange(10**6), '],[{"}\\ü' * rng.randrange(4)][kind]


@pytest.mark.parametrize("length", [1, 8, 100, 3000])
def test_slices_give_what_the_scanner_gives(length, monkeypatch):
    monkeypatch.setattr(json_text, "SLICE", length)
    rng = random.Random(length)
    for _ in range(300):
        value = [random_value(rng) for _ in range(rng.randrange(6))]
        layout = rng.choice([{}, {"indent": 1}, {"separators": (",", ":")}])
        text = json.dumps(value, **layout)
        assert json_text.loads(text.encode()) == value
        # Damaged, it is the same error as in one piece.
        i = rng.randrange(len(text))
        damaged = (text[:i] + rng.choice(["", ",", "]", '"', "}", "[", "x"]) + text[i + 1 :]).encode()
        results = []
        for slice_length in (length, 10**9):
            monkeypatch.setattr(json_text, "SLICE", slice_length)
            try:
                results.append(json_text.loads(damaged))
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1]
        monkeypatch.setattr(json_text, "SLICE", length)


@pytest.mark.parametrize("shape", [(100_000,), (100_000, 1), (3, 50_000), (10, 10, 10, 10, 10)])
def test_big_tensors(shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for rows in (False, True):
        body = rest_json.outputs_body({"y": array}, rows)
        text = body.replace(b"outputs", b"inputs").replace(b"predictions", b"instances")
        np.testing.assert_array_equal(read(text, x="FLOAT")["x"], array)


# Replies


def test_outputs_in_columns_and_rows():
    one = {"y": np.int32([[1, 2], [3, 4]])}
    assert rest_json.outputs_body(one, False) == b'{"outputs": [[1, 2], [3, 4]]}'
    assert rest_json.outputs_body(one, True) == b'{"predictions": [[1, 2], [3, 4]]}'
    two = {**one, "t": np.array([b"a", b"b"], object)}
    assert json.loads(rest_json.outputs_body(two, False)) == {"outputs": {"y": [[1, 2], [3, 4]], "t": ["a", "b"]}}
    assert json.loads(rest_json.outputs_body(two, True)) == {
        "predictions": [{"y": [1, 2], "t": "a"}, {"y": [3, 4], "t": "b"}]
    }
    assert rest_json.outputs_body({"y": np.float32(2)}, False) == b'{"outputs": 2.0}'
    assert rest_json.outputs_body({"y": np.zeros([0, 3], np.float32)}, False) == b'{"outputs": []}'
    assert rest_json.outputs_body({"y": np.zeros([2, 0], np.float32)}, True) == b'{"predictions": [[], []]}'


@pytest.mark.parametrize(
    "outputs, message",
    [
        ({"y": np.float32(1)}, "Tensor name: y has no shape information"),
        ({"y": np.zeros([0, 1])}, "Tensor name: y has invalid batch size: 0"),
        ({"y": np.zeros(2), "z": np.zeros(3)}, "Tensor name: z has inconsistent batch size: 3 expecting: 2"),
        ({"y": np.zeros(2, np.float16)}, "Failed to write JSON value for tensor type: half"),
        ({"y": np.zeros(2, np.uint16)}, "Failed to write JSON value for tensor type: uint16"),
        ({"y": np.zeros(2, np.complex64)}, "Failed to write JSON value for tensor type: complex64"),
    ],
)
def test_refused_rows_of_outputs(outputs, message):
    with pytest.raises(ServingError) as caught:
        rest_json.outputs_body(outputs, True)
    assert (caught.value.code, caught.value.message.strip()) == ("INVALID_ARGUMENT", message)


def test_bfloat16_outputs_are_refused():
    import ml_dtypes

    with pytest.raises(ServingError, match="bfloat16"):
        rest_json.outputs_body({"y": np.zeros(2, ml_dtypes.bfloat16)}, False)


def test_float_texts():
    values = np.float32([9e6, 999999, 0.5, 0.0003, 0.00003, 555557.5, 0.1, -0.0, 1234567, 1e9, np.nan, np.inf, -np.inf])
    assert json_text.dump_array(values).decode() == (
        "[9e+06, 999999.0, 0.5, 0.0003, 3e-05, 555557.5, 0.1, -0.0, 1234567.0, 1e+09, NaN, Infinity, -Infinity]"
    )


@pytest.mark.parametrize("dtype, bits", [(np.float32, np.uint32), (np.float64, np.uint64)])
def test_every_float_is_read_as_it_was(dtype, bits):
    info = np.finfo(dtype)
    values = np.random.default_rng(1).integers(0, np.iinfo(bits).max, 20_000, bits, endpoint=True).view(dtype)
    values = values[np.isfinite(values)]
    powers = dtype(10.0) ** np.arange(-30, 30, dtype=dtype)
    special = dtype(
        [0, info.max, info.min, info.tiny, info.smallest_subnormal, -info.smallest_subnormal * 3, 2**24 + 2]
    )
    whole = np.arange(10**6 - 50, 10**6 + 50).astype(dtype)
    values = np.concatenate([values, powers, special, whole, -whole * 1000, whole / 7])
    text = json_text.dump_array(values).decode()
    assert all("." in token or "e" in token for token in text[1:-1].split(", "))
    np.testing.assert_array_equal(np.array(json.loads(text), np.float64).astype(dtype), values)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64])
def test_integer_texts(dtype):
    limits = np.iinfo(dtype)
    assert json_text.dump_array(np.array([limits.min, 0, limits.max], dtype)).decode() == (
        f"[{limits.min}, 0, {limits.max}]"
    )


def test_booleans_and_strings_in_replies():
    assert rest_json.outputs_body({"y": np.array([True, False])}, False) == b'{"outputs": [true, false]}'
    strings = np.array([[b'"\\\n\x00\x7f', "ü🙂".encode()], [b"\xff", b""]], object)
    assert rest_json.outputs_body({"y": strings}, False) == (
        b'{"outputs": [["\\"\\\\\\n\\u0000\x7f", "' + "ü🙂".encode() + b'"], ["\xff", ""]]}'
    )
    assert json.loads(rest_json.outputs_body({"y_bytes": strings}, False))["outputs"][1] == [
        {"b64": "/w=="},
        {"b64": ""},
    ]
    numbers = rest_json.outputs_body({"y_bytes": np.uint8([1, 255])}, False)
    assert numbers == b'{"outputs": [1, 255]}'


def test_status_metadata_and_error():
    versions = [(124, "LOADING", "OK", ""), (123, "END", "NOT_FOUND", 'gone "away"')]
    assert json.loads(rest_json.status_body(versions)) == {
        "model_version_status": [
            {"version": "124", "state": "LOADING", "status": {"error_code": "OK", "error_message": ""}},
            {"version": "123", "state": "END", "status": {"error_code": "NOT_FOUND", "error_message": 'gone "away"'}},
        ]
    }
    definition = signature(x="FLOAT")
    definition.inputs["x"].tensor_shape.dim.add(size=-1)
    body = json.loads(rest_json.metadata_body("m", 2**40, {"serving_default": definition}))
    assert body["model_spec"] == {"name": "m", "signature_name": "", "version": str(2**40)}
    described = body["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert described["inputs"]["x"] == {
        "dtype": "DT_FLOAT",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
        "name": "x:0",
    }
    assert described["method_name"] == "tensorflow/serving/predict"
    assert described["outputs"] == {}
    assert rest_json.error_body('a "b" ü') == '{"error": "a \\"b\\" ü"}'.encode()
