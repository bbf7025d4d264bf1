"""CLIP's tokenizer as a TensorFlow graph: strings in, token ids out, so that a served model reads plain prompts."""

import re

import regex
import tensorflow as tf

from export.text import MARK, TextCleaner
from keras_sd.tokenizer import BYTE_SYMBOLS, WORD_END

MAX_BYTES = 64 * 1024


def _words():
    """The pattern of `keras_sd.tokenizer`, its classes written out: RE2's Unicode may be older than regex's."""
    characters = [chr(code) for code in range(2, 0x110000) if not 0xD800 <= code <= 0xDFFF]
    text = "".join(characters)

    def characters_of(pattern):
        runs = regex.finditer(rf"{pattern}+", text, regex.IGNORECASE)
        return "".join(f"\\x{{{ord(run[0][0]):x}}}-\\x{{{ord(run[0][-1]):x}}}" for run in runs)

    letters, numbers, others = map(characters_of, (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
    # a run that jumps over the surrogates takes them in: no text has them
    return rf"{MARK}[^{MARK}]*{MARK}|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[{letters}]+|[{numbers}]|[{others}]+"


class GraphTokenizer(tf.Module):
    """`CLIPTokenizer` in core TensorFlow operations, with the same vocabulary, special tokens and padding.

    All words of a batch are encoded together, by one loop of merges. Gives the ids that `CLIPTokenizer` gives, but
    for ftfy's repair of wrongly decoded text ("cafÃ©"), which a graph does not do.

    Args:
        tokenizer: a `CLIPTokenizer`.

    Call arguments:
        prompts: string [N], UTF-8, at most 64 KiB each; bytes that are no UTF-8 read as U+FFFD.

    Returns:
        tokens int32 [N, max_length] and truncated bool [N]: whether the prompt's end was cut.

    Raises:
        tf.errors.InvalidArgumentError: a prompt is longer than 64 KiB.
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.max_length, self._clean = tokenizer.max_length, TextCleaner()
        self._start_id, self._end_id, self._pad_id = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
        special, self._words = tokenizer.special_tokens, _words()
        self._special = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._special_ids = _table([f"{MARK}{token}{MARK}" for token in special], [*special.values()])
        self._expansions = {token: tokens for token, tokens in tokenizer.expansions.items() if len(tokens) > 1}

        # === Symbols are numbered: 256 bytes, 256 bytes that end a word, then what the merges make of them ===
        ends = [symbol + WORD_END for symbol in BYTE_SYMBOLS.values()]
        merged = ["".join(merge) for merge in tokenizer.merges]
        parts = [part for merge in tokenizer.merges for part in merge]
        symbols = [*dict.fromkeys([*BYTE_SYMBOLS.values(), *ends, *merged, *parts])]
        number = {symbol: i for i, symbol in enumerate(symbols)}
        ranks = {merge: rank for rank, merge in enumerate(tokenizer.merges)}
        self._byte_symbols = [number[BYTE_SYMBOLS[byte]] for byte in range(256)]
        self._end_symbols = [number[BYTE_SYMBOLS[byte] + WORD_END] for byte in range(256)]
        self._ids = [tokenizer.vocabulary.get(symbol, self._end_id) for symbol in symbols]
        self._merged, self._count = [*(number[symbol] for symbol in merged), -1], len(symbols)
        self._unmerged = len(merged)  # the rank of a pair that no merge joins
        pairs = [number[left] * self._count + number[right] for left, right in ranks]
        # a pair that no text has keeps the table of a tokenizer without merges from being empty
        self._ranks = _table([-1, *pairs], [self._unmerged, *ranks.values()], default=self._unmerged)
        self._longest = max(map(len, symbols))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompts")], autograph=False)
    def __call__(self, prompts):
        message = f"prompt is longer than {MAX_BYTES} bytes; shorten it: the model reads {self.max_length - 2} tokens."
        with tf.control_dependencies([tf.debugging.assert_less(tf.strings.length(prompts), MAX_BYTES + 1, message)]):
            words, rows = self._split(self._clean(prompts))
        ids, rows = self._encode(words, rows)
        ids = tf.RaggedTensor.from_value_rowids(ids, rows, tf.size(prompts, tf.int64), validate=False)
        truncated = ids.row_lengths() > self.max_length - 2
        ends = tf.ones([tf.size(prompts), 1], tf.int32)
        rows = tf.concat([ends * self._start_id, ids[:, : self.max_length - 2], ends * self._end_id], axis=1)
        return rows.to_tensor(self._pad_id, shape=[None, self.max_length]), truncated

    def _split(self, text):
        """Words [W] and their rows [W]; of each row only the first words: each one gives a token at least."""
        text = tf.strings.regex_replace(text, f"({self._special})", rf"{MARK}\1{MARK}")
        for token, tokens in self._expansions.items():
            marked = "".join(f"{MARK}{one}{MARK}" for one in tokens).replace("\\", r"\\")
            text = tf.strings.regex_replace(text, f"{MARK}{re.escape(token)}{MARK}", marked)
        text = tf.strings.regex_replace(text, f"({self._words})", "\x02\\1\x02")
        words = tf.strings.split(text, "\x02")
        kept = tf.strings.regex_full_match(words.flat_values, f"(?s){self._words}")  # not what lies between words
        words = tf.ragged.boolean_mask(words, words.with_flat_values(kept))[:, : self.max_length - 1]
        return words.flat_values, words.value_rowids()

    def _encode(self, words, rows):
        special_ids = self._special_ids.lookup(words)
        lengths = tf.strings.length(words)
        data = tf.io.decode_raw(tf.strings.reduce_join(words), tf.uint8)
        # a special token takes part as its one mark, which is never merged
        word = tf.repeat(tf.range(tf.size(words)), lengths)
        ends = tf.cumsum(lengths) - 1
        is_end = tf.scatter_nd(ends[:, None], tf.ones_like(ends), tf.shape(word)) > 0
        data = tf.cast(data, tf.int32)
        symbols = tf.where(is_end, tf.gather(self._end_symbols, data), tf.gather(self._byte_symbols, data))
        kept = (tf.gather(special_ids, word) < 0) | is_end
        symbols, word = self._merge(tf.boolean_mask(symbols, kept), tf.boolean_mask(word, kept), tf.size(words))
        special = tf.cast(tf.gather(special_ids, word), tf.int32)
        return tf.where(special >= 0, special, tf.gather(self._ids, symbols)), tf.gather(rows, word)

    def _merge(self, symbols, word, words):
        """Join neighbouring symbols, in every word the earliest-learned pair first: symbols and words, int32 [M].

        A pair is joined when its rank is the lowest of its word, or the lowest within `longest` symbols to both sides:
        what is joined before it grows from further away, and no symbol is long enough to reach it. So the rounds
        needed do not grow with the word.
        """

        def rank(symbols, word, at):
            """Ranks of the pairs that start at the positions `at`."""
            left, right = tf.gather(symbols, at), tf.gather(symbols, at + 1)
            pairs = tf.cast(left, tf.int64) * self._count + tf.cast(right, tf.int64)
            same = tf.gather(word, at) == tf.gather(word, at + 1)
            return tf.where(same, tf.cast(self._ranks.lookup(pairs), tf.int32), self._unmerged)

        def join(symbols, word, ranks):  # the last symbol starts no pair; its rank is that of an unknown one
            lowest = tf.gather(tf.math.unsorted_segment_min(ranks, word, words), word)
            following = tf.concat([symbols[1:], [-1]], axis=0)
            nearest = (ranks == self._nearest_lowest(ranks)) & (symbols != following)
            joined = (ranks < self._unmerged) & ((ranks == lowest) | nearest)
            # in a run such as "aaa", where pairs overlap, every other one counts
            first = joined & tf.logical_not(tf.concat([[False], joined[:-1]], axis=0))
            starts = tf.concat([[0], tf.where(first)[:, 0]], axis=0)
            offset = tf.range(tf.size(ranks, tf.int64)) - tf.gather(starts, tf.cumsum(tf.cast(first, tf.int32)))
            joined &= offset % 2 == 0
            symbols = tf.where(joined, tf.gather(self._merged, ranks), symbols)
            kept = tf.concat([[True], tf.logical_not(joined[:-1])], axis=0)
            symbols, word, ranks, joined = (tf.boolean_mask(x, kept) for x in (symbols, word, ranks, joined))
            changed = tf.where(joined[:-1] | joined[1:])
            ranks = tf.concat([ranks[:-1], [self._unmerged]], axis=0)
            return symbols, word, tf.tensor_scatter_nd_update(ranks, changed, rank(symbols, word, changed[:, 0]))

        ranks = tf.concat(
            [rank(symbols, word, tf.range(tf.maximum(tf.size(symbols) - 1, 0))), [self._unmerged]], axis=0
        )
        unknown = tf.TensorShape([None])
        return tf.while_loop(
            lambda symbols, word, ranks: tf.reduce_any(ranks < self._unmerged),
            join,
            [symbols, word, ranks],
            shape_invariants=[unknown, unknown, unknown],
        )[:2]

    def _nearest_lowest(self, ranks):
        """The lowest of each rank and its `longest` neighbours on both sides."""
        reach = 0
        while reach < self._longest:
            step = min(reach + 1, self._longest - reach)
            padded = tf.pad(ranks, [[step, step]], constant_values=self._unmerged)
            ranks = tf.minimum(ranks, tf.minimum(padded[: -2 * step], padded[2 * step :]))
            reach += step
        return ranks


def _table(keys, values, default=-1):
    keys = tf.constant(keys) if isinstance(keys[0], str) else tf.constant(keys, tf.int64)
    initializer = tf.lookup.KeyValueTensorInitializer(keys, tf.constant(values, tf.int64))
    return tf.lookup.StaticHashTable(initializer, default)
