"""CLIP's text cleaning in TensorFlow: what `keras_sd.tokenizer.clean` does to a string, as core operations of a graph.

Text is handled as one flat array of code points, each with the row it belongs to; a space ends every row, so that no
rule reaches over into the next one. Every table comes from the Python functions that it stands for.
"""

import functools
import html
import html.entities
import unicodedata
from itertools import groupby

import numpy as np
import tensorflow as tf
from ftfy import chardata, fixes

from keras_sd.tokenizer import _WHITESPACE

MARK = "\x01"  # sets pieces apart; cleaned text has no control characters

_REFERENCE = r"&#[0-9]+;?|&#[xX][0-9a-fA-F]+;?|&[^\t\n\f <&#;]{1,32};?"  # as Python's html module reads them
_FTFY_REFERENCE = r"&#?[0-9A-Za-z]{1,24};"
_BARE = sorted((name for name in html.entities.html5 if not name.endswith(";")), key=len, reverse=True)
_SIGMA, _FINAL_SIGMA = ord("Σ"), ord("ς")


class TextCleaner(tf.Module):
    """Cleans text as CLIP does: string [N] → string [N].

    Unescapes HTML, straightens quotes, breaks ligatures, takes full-width forms to plain ones, drops control
    characters, composes accents (NFC), collapses white space and lower-cases as `str.lower` does. Invalid UTF-8
    becomes U+FFFD. Equal to `keras_sd.tokenizer.clean` but for ftfy's repair of wrongly decoded text ("cafÃ©").
    """

    def __init__(self):
        super().__init__()
        self._html = _strings({f"&{name}": text for name, text in html.entities.html5.items()})
        self._ftfy = _strings(chardata.HTML_ENTITIES)

    def __call__(self, text):
        text = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")
        text = tf.strings.regex_replace(text, MARK, "")
        text = _if_any(text, "&", self._unescape_as_ftfy)
        text = tf.strings.regex_replace(text, r"\x1b\[[\d;]*[a-zA-Z]", "")  # a terminal's colours
        code_points, rows = _translate(*_decode(text), _ftfy_characters())
        text = _encode(*_normalize(code_points, rows), tf.size(text))
        for _ in range(2):
            text = _if_any(text, "&", lambda text: self._unescape(text, _REFERENCE, self._html))
        code_points, rows = _decode(text)
        code_points, rows = _translate(_end_sigmas(code_points), rows, _lower_characters())
        text = tf.strings.regex_replace(_encode(code_points, rows, tf.size(text)), " +", " ")
        return tf.strings.strip(text)

    def _unescape_as_ftfy(self, text):
        """Unescape again and again what is surely escaped, up to the first line that has a "<"."""
        head = tf.strings.regex_replace(text, r"(?s)^((?:[^<\n]*\n)*)[^<\n]*<.*$", r"\1")
        start = tf.strings.length(head)
        rest = tf.strings.substr(text, start, tf.strings.length(text) - start)

        def again(i, text, before):
            return (i < 8) & tf.reduce_any(text != before)

        def unescape(i, text, _):
            return i + 1, self._unescape(text, _FTFY_REFERENCE, self._ftfy), text

        return tf.while_loop(again, unescape, unescape(0, head, head))[1] + rest

    def _unescape(self, text, pattern, entities):
        """Put characters for the references that `pattern` finds: every other piece of the text is one."""
        pieces = tf.strings.split(tf.strings.regex_replace(text, f"({pattern})", rf"{MARK}\1{MARK}"), MARK)
        piece = pieces.flat_values
        named = entities.lookup(piece)
        bare = f"(?s)^(&(?:{'|'.join(_BARE)}))(.*)$"  # "&copy2026": names that stand without a semicolon
        prefix, rest = tf.strings.regex_replace(piece, bare, r"\1"), tf.strings.regex_replace(piece, bare, r"\2")
        prefix = entities.lookup(prefix)
        prefixed = tf.where(prefix != "", prefix + rest, piece)
        number = tf.strings.regex_full_match(piece, "&#(?:[0-9]+|[xX][0-9a-fA-F]+);?")
        text = tf.where(number, _character(piece), tf.where(named != "", named, prefixed))
        is_reference = tf.ragged.range(pieces.row_lengths()).flat_values % 2 == 1
        text = tf.where(is_reference, text, piece)
        return tf.strings.reduce_join(pieces.with_flat_values(text), axis=1)


# === Numeric character references ===


def _character(reference):
    """The character of "&#233;" or "&#xe9;": string [P] → string [P]; for other strings any string."""
    is_hex = tf.strings.regex_full_match(reference, "(?s)&#[xX].*")
    digits = tf.strings.regex_replace(reference, "^&#[xX]?0*|;", "")
    long = tf.strings.length(digits) > 7
    digits = tf.strings.substr(tf.strings.join(["0000000", digits]), -7, 7)
    digits = tf.io.decode_raw(digits, tf.uint8, fixed_length=7)
    digits = tf.cast(digits % 16 + tf.where(digits >= 65, tf.constant(9, tf.uint8), tf.constant(0, tf.uint8)), tf.int64)
    base = tf.where(is_hex, tf.constant(16, tf.int64), tf.constant(10, tf.int64))
    number = tf.zeros_like(base)
    for i in range(7):
        number = number * base + digits[:, i]
    unknown = long | (number > 0x10FFFF) | ((number >= 0xD800) & (number <= 0xDFFF))
    number = tf.where(unknown, 0xFFFD, tf.cast(number, tf.int32))
    code_points, rows = _translate(number, tf.range(tf.size(number)), _odd_references())
    return tf.strings.unicode_encode(_ragged(code_points, rows, tf.size(number)), "UTF-8")


@functools.cache
def _odd_references():
    """Code points that HTML reads as another character, or none."""
    odd = html._invalid_charrefs | dict.fromkeys(html._invalid_codepoints - set(html._invalid_charrefs), "")
    return _sequences({code: text for code, text in odd.items() if text != chr(code)})


# === Code points ===


def _decode(text):
    """string [N] → code points and rows, both int32 [M]; a space ends every row."""
    code_points = tf.strings.unicode_decode(tf.strings.join([text, " "]), "UTF-8", errors="replace")
    return code_points.flat_values, tf.cast(code_points.value_rowids(), tf.int32)


def _encode(code_points, rows, count):
    return tf.strings.unicode_encode(_ragged(code_points, rows, count), "UTF-8")


def _ragged(values, rows, count):
    return tf.RaggedTensor.from_value_rowids(values, rows, tf.cast(count, rows.dtype), validate=False)


def _if_any(text, character, function):
    """Apply a costly function only where some text has the character that it is about."""
    found = tf.reduce_any(tf.strings.regex_full_match(text, f"(?s).*{character}.*"))
    return tf.cond(found, lambda: function(text), lambda: tf.identity(text))


def _characters(stop=0x110000):
    return [chr(code) for code in range(stop) if not 0xD800 <= code <= 0xDFFF]


def _sequences(mapping):
    """Table of `_translate` from a dict code point → string: sorted keys [K], code points [K, longest], ended by -1."""
    keys = sorted(mapping)
    values = np.full((len(keys), max(1, *map(len, mapping.values()))), -1, "int32")
    for row, key in zip(values, keys):
        row[: len(mapping[key])] = [ord(c) for c in mapping[key]]
    return np.array(keys, "int32"), values


def _changes(function, stop=0x110000):
    return {ord(c): function(c) for c in _characters(stop) if function(c) != c}


def _strings(mapping):
    initializer = tf.lookup.KeyValueTensorInitializer([*mapping], [*mapping.values()])
    return tf.lookup.StaticHashTable(initializer, default_value="")


def _translate(code_points, rows, table):
    """`str.translate`: each code point becomes the sequence that the table has for it, or stays."""
    keys, values = table
    index = tf.minimum(tf.searchsorted(keys, code_points), len(keys) - 1)
    same = tf.pad(code_points[:, None], [[0, 0], [0, values.shape[1] - 1]], constant_values=-1)
    found = tf.where((tf.gather(keys, index) == code_points)[:, None], tf.gather(values, index), same)
    kept = found >= 0
    return tf.boolean_mask(found, kept), tf.repeat(rows, tf.reduce_sum(tf.cast(kept, tf.int32), axis=1))


def _ranges(values):
    """Table of `_look_up` from one value per code point: where each run of equal values starts, and the value."""
    starts, kinds, start = [], [], 0
    for kind, run in groupby(values):
        starts.append(start)
        kinds.append(kind)
        start += len(list(run))
    return np.array(starts, "int32"), np.array(kinds, "int32")


def _look_up(code_points, table):
    starts, kinds = table
    return tf.gather(kinds, tf.searchsorted(starts, code_points, side="right") - 1)


def _shift(x, first):
    """Each element's left neighbour."""
    return tf.concat([tf.constant([first], x.dtype), x[:-1]], axis=0)


# === What ftfy changes character by character ===


@functools.cache
def _ftfy_characters():
    def fix(character):
        for fixer in (
            fixes.fix_c1_controls,
            fixes.fix_latin_ligatures,
            fixes.fix_character_width,
            fixes.uncurl_quotes,
            fixes.fix_line_breaks,
            fixes.remove_control_chars,
        ):
            character = fixer(character)
        return character

    return _sequences(_changes(fix, 0x10000))  # none of them knows a character beyond


# === Lower case ===


@functools.cache
def _lower_characters():
    spaces = {ord(c): " " for c in _characters(0x10000) if _WHITESPACE.fullmatch(c)}
    return _sequences(_changes(str.lower) | spaces)


@functools.cache
def _case_kinds():
    """0, 1 for cased characters, 2 for those that the rule about the final sigma looks through, as Python does."""
    alone = [c == "ς" for c in "".join(f"{chr(c)}Σ\n" for c in range(0x110000)).lower().replace("i̇", "i")[1::3]]
    behind = [c == "ς" for c in "".join(f"A{chr(c)}Σ\n" for c in range(0x110000)).lower().replace("i̇", "i")[2::4]]
    return _ranges(1 if cased else 2 * through for cased, through in zip(alone, behind))


def _end_sigmas(code_points):
    """Σ at the end of a word becomes ς (elsewhere lower-casing makes it σ)."""

    def mend():
        kinds = _look_up(code_points, _case_kinds())
        solid = kinds != 2
        kinds = tf.pad(tf.boolean_mask(kinds, solid), [[1, 1]])
        count = tf.cumsum(tf.cast(solid, tf.int32))
        before, after = tf.gather(kinds, count - tf.cast(solid, tf.int32)), tf.gather(kinds, count + 1)
        return tf.where((code_points == _SIGMA) & (before == 1) & (after != 1), _FINAL_SIGMA, code_points)

    return tf.cond(tf.reduce_any(code_points == _SIGMA), mend, lambda: tf.identity(code_points))


# === Composed accents: NFC (https://www.unicode.org/reports/tr15) ===

_L, _V, _T, _SYLLABLE = 0x1100, 0x1161, 0x11A7, 0xAC00  # Hangul: first, second and third letters, and syllables


@functools.cache
def _normal_forms():
    """Tables: decompositions, combining classes, pairs that compose (keys, results), characters that need the work."""
    hangul = range(_SYLLABLE, _SYLLABLE + 11172)  # composed by arithmetic
    decompositions = _changes(lambda c: unicodedata.normalize("NFD", c) if ord(c) not in hangul else c)
    pairs = {}
    for code in decompositions:
        parts = [int(part, 16) for part in unicodedata.decomposition(chr(code)).split()]
        if len(parts) == 2 and unicodedata.normalize("NFC", chr(code)) == chr(code):
            pairs[parts[0] << 21 | parts[1]] = code
    keys = np.array(sorted(pairs), "int64")
    classes = [unicodedata.combining(chr(code)) for code in range(0x110000)]
    work = np.array(classes) > 0
    work[[key & 0x1FFFFF for key in pairs]] = True
    work[[code for code in decompositions if unicodedata.normalize("NFC", chr(code)) != chr(code)]] = True
    work[_V : _V + 21] = work[_T + 1 : _T + 28] = True
    compositions = keys, np.array([pairs[key] for key in keys], "int32")
    return _sequences(decompositions), _ranges(classes), compositions, _ranges(work.tolist())


def _normalize(code_points, rows):
    needed = tf.reduce_any(_look_up(code_points, _normal_forms()[3]) > 0)
    return tf.cond(needed, lambda: _nfc(code_points, rows), lambda: (tf.identity(code_points), tf.identity(rows)))


def _nfc(code_points, rows):
    decompositions, classes, compositions, _ = _normal_forms()
    code_points, rows = _translate(code_points, rows, decompositions)
    kinds = _look_up(code_points, classes)
    order = tf.cumsum(tf.cast(kinds == 0, tf.int64)) * 256 + tf.cast(kinds, tf.int64)
    order = tf.argsort(order, stable=True)
    state = [tf.gather(x, order) for x in (code_points, rows, kinds)]

    def compose(_, code_points, rows, kinds):
        starts = tf.where(kinds == 0)[:, 0]
        index = tf.range(tf.size(kinds, tf.int64))
        starter = tf.cast(kinds == 0, tf.int64)
        base = tf.gather(tf.concat([[0], starts], 0), tf.cumsum(starter) - starter)  # the starter before each one
        composed = _compose(tf.gather(code_points, base), code_points, compositions)
        reached = (_shift(kinds, 0) < kinds) | (base == index - 1)
        able = reached & (composed >= 0) & (index > 0)
        first = tf.math.unsorted_segment_min(tf.where(able, index, index.dtype.max), base, tf.size(index))
        able &= tf.gather(first, base) == index
        able &= tf.logical_not(tf.gather(able, base))  # a starter that is about to be taken takes nothing
        taken = tf.boolean_mask(base, able)[:, None]
        code_points = tf.tensor_scatter_nd_update(code_points, taken, tf.boolean_mask(composed, able))
        left = tf.logical_not(able)
        return (tf.reduce_any(able), *(tf.boolean_mask(x, left) for x in (code_points, rows, kinds)))

    unknown = [tf.TensorShape([])] + 3 * [tf.TensorShape([None])]
    _, code_points, rows, _ = tf.while_loop(
        lambda more, *_: more, compose, [tf.constant(True), *state], shape_invariants=unknown
    )
    return code_points, rows


def _compose(first, second, compositions):
    """The character that two compose to, or -1."""
    keys, results = compositions
    key = tf.bitwise.bitwise_or(tf.bitwise.left_shift(tf.cast(first, tf.int64), 21), tf.cast(second, tf.int64))
    index = tf.minimum(tf.searchsorted(keys, key), len(keys) - 1)
    composed = tf.where(tf.gather(keys, index) == key, tf.gather(results, index), -1)
    lead, v, t, syllable = first - _L, second - _V, second - _T, first - _SYLLABLE
    is_lv = (lead >= 0) & (lead < 19) & (v >= 0) & (v < 21)
    is_lvt = (syllable >= 0) & (syllable < 11172) & (syllable % 28 == 0) & (t > 0) & (t < 28)
    composed = tf.where(is_lv, _SYLLABLE + (lead * 21 + v) * 28, composed)
    return tf.where(is_lvt, first + t, composed)
