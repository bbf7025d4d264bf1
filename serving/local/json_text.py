"""JSON text ↔ Python values and arrays, as RapidJSON reads and writes it for the real server.

A body may be a hundred megabytes. It is read in slices, because the interpreter runs no other thread during one call of
the JSON scanner; arrays are written by TensorFlow's string operations, which run beside other threads.
"""

import base64
import json
import re

import numpy as np
import tensorflow as tf

SLICE = 2**18  # characters that are read in one go

_MESSAGES = {
    "Expecting value": "Invalid value.",
    "Expecting ',' delimiter": "Missing a comma or closing bracket.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid control character at": "Invalid encoding in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string.",
    "Extra data": "The document root must not be followed by other values.",
}
# What looks like half of a surrogate pair; then escapes one by one, the group only in a half without its other half.
_MAYBE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F])|.)", re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")


class NonFinite(float):
    """The value of a `NaN`, `Infinity` or `-Infinity` token; a number too big for a double is a plain float."""


def _first_wins(pairs):
    members = dict(pairs)
    if len(members) < len(pairs):
        members.update(reversed(pairs))
    return members


_DECODER = json.JSONDecoder(
    object_pairs_hook=_first_wins,
    parse_constant={name: NonFinite(name) for name in ("NaN", "Infinity", "-Infinity")}.get,
)


def loads(body):
    """JSON text as Python values.

    Args:
        body: UTF-8 bytes.

    Returns:
        dict, list, str, int (a number without fraction and exponent), float, `NonFinite`, bool or None. Bytes of a
        string that are no UTF-8 become lone surrogates: `encode("utf-8", "surrogateescape")` gives a string's bytes.
        Of members of one name the first counts.

    Raises:
        ValueError: if it is not JSON, with RapidJSON's message and the offset in bytes.
    """
    text = body.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    if not text:
        raise ValueError("The document is empty")
    start = _SPACE.match(text).end()
    if start == len(text):
        raise ValueError(f"The document is empty. at offset: {start}")
    try:
        value = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_MESSAGES.get(error.msg, error.msg)} at offset: {_offset(text, error.pos)}") from None
    except RecursionError:
        raise ValueError("Values are nested too deeply.") from None
    except ValueError:  # the interpreter's limit of an integer's digits, far beyond a double's
        raise ValueError("Number too big to be stored in double.") from None
    if _MAYBE_SURROGATE.search(text):
        for escape in _ESCAPE.finditer(text):
            if escape[1]:
                offset = _offset(text, escape.start())
                raise ValueError(f"The surrogate pair in string is invalid. at offset: {offset}")
    return value


def _offset(text, position):
    return len(text[:position].encode("utf-8", "surrogateescape"))


def _parse(text):
    if len(text) > SLICE:
        try:
            value, end = _value(text, _skip(text, 0))
            if _skip(text, end) == len(text):
                return value
        except ValueError:
            pass  # an error, which the scanner words, or a layout that is not worth slicing
    return _DECODER.decode(text)


def _skip(text, i):
    return _SPACE.match(text, i).end()


def _scan(text, i):
    try:
        return _DECODER.scan_once(text, i)
    except StopIteration:
        raise ValueError from None


def _value(text, i):
    """The value that starts at i, and where it ends."""
    if text.startswith("[", i) and not _is_short(text, i, "]", "["):
        return _list(text, i)
    if text.startswith("{", i) and not (_is_short(text, i, "}", "{") and _is_short(text, i, "}", "[")):
        return _object(text, i)
    return _scan(text, i)


def _is_short(text, i, closing, opening):
    end = text.find(closing, i, i + SLICE)
    return end >= 0 and text.find(opening, i + 1, end) < 0


def _object(text, i):
    pairs = []
    i = _skip(text, i + 1)
    while text.startswith('"', i):
        name, i = _scan(text, i)
        i = _skip(text, i)
        if not text.startswith(":", i):
            break
        value, i = _value(text, _skip(text, i + 1))
        pairs.append((name, value))
        i = _skip(text, i)
        if text.startswith("}", i):
            return _first_wins(pairs), i + 1
        if not text.startswith(",", i):
            break
        i = _skip(text, i + 1)
    raise ValueError


def _list(text, i):
    values = []
    i = _skip(text, i + 1)
    nested = len(text[i : i + 64]) - len(text[i : i + 64].lstrip("["))
    boundary = "]" * nested + ","  # what a sibling ends with, if nothing stands between its brackets
    regular = not text.startswith(("{", '"'), i)
    window = 2**10
    while not text.startswith("]", i):
        cut = text.rfind(boundary, i + 1, i + window) if regular else -1
        if cut >= 0:
            # Right wherever it was cut: from a value's start, what parses as a list's content is just that.
            cut += nested
            part, end = _scan(f"[{text[i:cut]}]", 0)
            values += part
            if end < cut - i + 2:
                return values, i + end - 1  # the list's own bracket came first
            i = _skip(text, cut + 1)
            window = min(2 * window, SLICE)
            continue
        if regular and window < SLICE:
            window *= 2
            continue
        start = i
        value, i = _value(text, i)
        values.append(value)
        i = _skip(text, i)
        if text.startswith("]", i):
            return values, i + 1
        if not text.startswith(",", i) or (regular and i - start < SLICE // 2):
            break
        i = _skip(text, i + 1)
    raise ValueError


def dumps(value):
    """Plain Python values as JSON bytes; strings' lone surrogates of `loads` become the bytes they stand for."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


def dump_array(array, keep=0, as_base64=False):
    """An array as JSON.

    Args:
        array: of float32, float64, integers or bool, or an object array of bytes.
        keep: how many of its first dimensions to keep.
        as_base64: write bytes as `{"b64": "…"}`, not as strings.

    Returns:
        An array of the first `keep` dimensions that holds the JSON text of each item as bytes; for keep=0 the bytes.
        Floats always have a point or an exponent and are the same floats when read; bytes that are no UTF-8 stay.
    """
    flat = np.ravel(array)
    with tf.device("CPU"):
        if array.dtype == object:
            texts = [_base64(item) if as_base64 else _string(item) for item in flat.tolist()]
            texts = tf.constant(texts, tf.string, shape=flat.shape)
        elif array.dtype.kind == "f":
            texts = _floats(flat)
        else:
            texts = tf.strings.as_string(flat)
        texts = tf.reshape(texts, array.shape)
        for _ in range(array.ndim - keep):
            texts = tf.strings.join(["[", tf.strings.reduce_join(texts, -1, separator=", "), "]"])
        return texts.numpy()


def _base64(item):
    return b'{"b64": "' + base64.b64encode(item) + b'"}'


def _string(item):
    return dumps(item.decode("utf-8", "surrogateescape"))


def _floats(values):
    """As the real server prints them: six digits where that is exact, else as many as always are."""
    digits = 9 if values.dtype == np.float32 else 17
    short = tf.strings.as_string(values, precision=6, shortest=True)
    exact = tf.strings.to_number(short, values.dtype).numpy() == values
    texts = tf.where(exact, short, tf.strings.as_string(values, precision=digits, shortest=True))
    size = np.abs(values)
    bare = (size < np.where(exact, 1e6, 10.0**digits)) & (np.rint(values) == values)
    if bare.any():
        texts = tf.strings.join([texts, tf.where(bare, ".0", "")])
    # TensorFlow's threads take denormal numbers for zero.
    special = np.flatnonzero(~np.isfinite(values) | ((size < np.finfo(values.dtype).tiny) & (size > 0)))
    if special.size:
        literals = [
            f"{value:.{digits}g}" if np.isfinite(value) else json.dumps(value) for value in values[special].tolist()
        ]
        texts = tf.tensor_scatter_nd_update(texts, special[:, None], literals)
    return texts
