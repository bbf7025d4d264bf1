"""CLIP's byte-pair encoding: text to the 77 token ids that the text encoder reads.

Reference: Radford et al. (2021), https://github.com/openai/CLIP; Sennrich et al. (2016), https://arxiv.org/abs/1508.07909.
"""

import gzip
import html
import json
import os
import warnings
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
OPENAI_MERGES = 49152 - 256 - 2  # the merges file goes on; CLIP stops here

_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_WHITESPACE = regex.compile(r"\s+")


def _byte_symbols():
    """One printable character for each of the 256 bytes, in CLIP's order: the printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_SYMBOLS = _byte_symbols()
_SYMBOL_BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}


def clean(text):
    """Mend the encoding (ftfy), unescape HTML twice, collapse white space, lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", text).strip().lower()


def split_words(text):
    """Split cleaned text into words, each a string of byte symbols."""
    return ["".join(BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")) for word in _WORDS.findall(text)]


def symbols(word):
    """The symbols a word starts as, before any merge: its bytes, the last one marked as the word's end."""
    return [*word[:-1], word[-1] + WORD_END]


class CLIPTokenizer:
    """CLIP's tokenizer: lower-case byte-pair encoding, 77 ids a prompt.

    The vocabulary is the 256 bytes, the 256 bytes that end a word, one entry per merge, `<|startoftext|>` and
    `<|endoftext|>`. Text is cleaned as OpenAI's CLIP does. Special tokens inside a prompt, the padding token
    included, become their id, as in transformers: with `pad_token="!"` (SD v2) every `!` is id 0. An added token
    `<x>` beside which there are `<x>_1`, `<x>_2` … becomes the ids of all, as in diffusers: textual inversions have
    several vectors.

    Args:
        merges: list of pairs of symbols, the most important first.
        pad_token: token that fills up the row: `"<|endoftext|>"` for SD v1, `"!"` for SD v2.
        max_length: length of a row, start and end tokens included.
        vocabulary: dict token -> id; by default it follows from the merges.
        added_tokens: further tokens kept whole, a dict token -> id.

    Example:

        tokenizer = CLIPTokenizer.from_folder("stable-diffusion-v1-5/tokenizer")
        tokenizer(["red apple", "a cat"])  # int32 (2, 77)
    """

    def __init__(self, merges, pad_token=END, max_length=77, vocabulary=None, added_tokens=None):
        self.merges = [tuple(merge) for merge in merges]
        if vocabulary is None:
            tokens = [*BYTE_SYMBOLS.values(), *(symbol + WORD_END for symbol in BYTE_SYMBOLS.values())]
            tokens += ["".join(merge) for merge in self.merges] + [START, END]
            vocabulary = {token: i for i, token in enumerate(tokens)}
        self.vocabulary = {**vocabulary, **(added_tokens or {})}
        for token in (START, END, pad_token):
            if token not in self.vocabulary:
                raise ValueError(f"The tokenizer's vocabulary has no {token!r} token; CLIP's vocabularies have one.")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2, for the start and end tokens.")
        self.pad_token, self.max_length = pad_token, int(max_length)
        self.start_id, self.end_id, self.pad_id = (self.vocabulary[token] for token in (START, END, pad_token))
        self._ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self._tokens = {i: token for token, i in self.vocabulary.items()}
        self.special_tokens = {
            token: self.vocabulary[token] for token in (START, END, pad_token, *(added_tokens or {}))
        }
        self.expansions = {token: self._expanded(token) for token in self.special_tokens}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self._cache = {}

    def token_ids(self, token):
        """The ids of a special token.

        Raises:
            ValueError: there is none of that name.
        """
        if clean(token) not in self.expansions:
            raise ValueError(f"The tokenizer has no token {token!r}; it has {', '.join(self.expansions)}.")
        return [self.special_tokens[one] for one in self.expansions[clean(token)]]

    def _expanded(self, token):
        """The special tokens that a special token stands for: itself, and those that go on with _1, _2 …"""
        tokens = [token]
        while (following := f"{token}_{len(tokens)}") in self.special_tokens:
            tokens.append(following)
        return tokens

    # === Constructors and saving ===

    def with_token(self, token, ids):
        """This tokenizer with a further token, which stands for one or more ids.

        Raises:
            ValueError: the token is empty, or in the vocabulary already.
        """
        token = clean(token)
        names = [token, *(f"{token}_{i}" for i in range(1, len(ids)))]
        taken = [name for name in (*names, f"{token}_1") if name in self.vocabulary]
        if taken or not token:
            raise ValueError(
                f"Token {[*taken, token][0]!r} is in the vocabulary already, or empty; give another token."
            )
        added = self.special_tokens | dict(zip(names, ids))
        return CLIPTokenizer(self.merges, self.pad_token, self.max_length, self.vocabulary, added)

    @classmethod
    def from_merges_file(cls, path, pad_token=END, max_length=77):
        """Read a merges file, plain or gzipped: a `#version` line, then a merge a line.

        Of OpenAI's `bpe_simple_vocab_16e6.txt.gz` only the first 48,894 merges count.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or is no merges file.
        """
        return cls(_read_merges(Path(path))[:OPENAI_MERGES], pad_token, max_length)

    @classmethod
    def from_folder(cls, folder):
        """Read the `tokenizer/` folder of a diffusers model: `vocab.json` and `merges.txt`, or `tokenizer.json`.

        Raises:
            FileNotFoundError, ValueError: no such files, or they are damaged.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json", {})
        special = _read_json(folder / "special_tokens_map.json", {})
        added = _read_json(folder / "added_tokens.json", {})
        added |= {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary, merges = _read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt")
        elif (folder / "tokenizer.json").is_file():
            data = _read_json(folder / "tokenizer.json")
            vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
            merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
            added |= {entry["content"]: entry["id"] for entry in data.get("added_tokens", [])}
        else:
            raise FileNotFoundError(
                f"No tokenizer in {str(folder)!r}: it holds neither vocab.json and merges.txt nor tokenizer.json."
            )
        pad_token = config.get("pad_token") or special.get("pad_token") or END
        pad_token = pad_token["content"] if isinstance(pad_token, dict) else pad_token
        max_length = config.get("model_max_length") or 77
        # transformers writes 1e30 where nobody set a length
        return cls(merges, pad_token, max_length if max_length < 2**16 else 77, vocabulary, added)

    def save(self, folder):
        """Write `folder` as transformers' `CLIPTokenizer` reads it; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad_token}
        plain = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        added = {
            str(i): {
                "content": token,
                "special": token in roles.values(),
                "normalized": token not in roles.values(),
                **plain,
            }
            for token, i in self.special_tokens.items()
        }
        config = {
            "added_tokens_decoder": added,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
            **roles,
        }
        merges = "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""])
        _write_text(folder / "merges.txt", merges)
        _write_text(folder / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
        _write_text(folder / "special_tokens_map.json", json.dumps(roles, indent=2))
        _write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))

    # === Text to ids and back ===

    @property
    def vocab_size(self):
        return max(self.vocabulary.values()) + 1

    def __call__(self, prompts):
        """Tokenise a prompt or a list of prompts to an int32 array of shape (B, max_length).

        A prompt that does not fit keeps its first `max_length - 2` tokens between the start and end tokens, and a
        warning says what was cut.

        Raises:
            TypeError: `prompts` is neither a string nor a list of strings.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompt must be a string or a list of strings, not {type(prompts).__name__}.")
        tokens = np.full((len(prompts), self.max_length), self.pad_id, "int32")
        for row, prompt in zip(tokens, prompts):
            ids = self.encode(prompt)
            if len(ids) > self.max_length:
                cut, limit = self.decode(ids[self.max_length - 1 : -1]), self.max_length - 2
                warnings.warn(
                    f"The prompt is longer than {limit} tokens; this end of it was cut: {cut!r}", stacklevel=2
                )
                ids = [*ids[: self.max_length - 1], self.end_id]
            row[: len(ids)] = ids
        return tokens

    def encode(self, text):
        """Token ids of a text, between the start and the end token, neither padded nor truncated."""
        if not isinstance(text, str):
            raise TypeError(f"prompt must be a string or a list of strings, not one of {type(text).__name__}.")
        ids = []
        for part in self._special.split(clean(text)):
            if part in self.special_tokens:
                ids += self.token_ids(part)
            else:
                for word in split_words(part):
                    ids += self._encode_word(word)
        return [self.start_id, *ids, self.end_id]

    def decode(self, ids):
        """Text of token ids: without the start token, up to the first end token."""
        text = ""
        for i in ids:
            if int(i) == self.end_id:
                break
            if int(i) not in self._tokens:
                raise ValueError(f"Token id {int(i)} is not in the vocabulary of {self.vocab_size} tokens.")
            text += "" if int(i) == self.start_id else self._tokens[int(i)]
        symbol_bytes = (bytes([_SYMBOL_BYTES[c]]) if c in _SYMBOL_BYTES else c.encode() for c in text)
        return b"".join(symbol_bytes).decode("utf-8", "replace").replace(WORD_END, " ").strip()

    def truncated(self, prompt):
        """The part of a prompt that does not fit into `max_length` tokens; an empty string where all of it fits."""
        return self.decode(self.encode(prompt)[self.max_length - 1 : -1])

    def _encode_word(self, word):
        if word not in self._cache:
            if len(self._cache) >= 2**16:  # a long-running server must not remember every word it ever saw
                self._cache.clear()
            # a symbol outside a small vocabulary is "unknown", which for CLIP is the end token
            self._cache[word] = [self.vocabulary.get(token, self.end_id) for token in self._merge(symbols(word))]
        return self._cache[word]

    def _merge(self, word):
        """Merge neighbouring symbols, the earliest-learned pair first, until no pair is a known merge."""
        while len(word) > 1:
            pair = min(pairwise(word), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if pair not in self._ranks:
                break
            word = merge_pair(word, pair)
        return word


def merge_pair(word, pair):
    """Join each occurrence of `pair` in a list of symbols, from left to right."""
    merged = []
    for symbol in word:
        # merged[-1] may be a symbol just joined: then it is longer than pair[0] and does not match
        if merged and symbol == pair[1] and merged[-1] == pair[0]:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _read_merges(path):
    if not path.is_file():
        raise FileNotFoundError(f"No merges file at {str(path)!r}; CLIP's is bpe_simple_vocab_16e6.txt.gz.")
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        lines = text.split("\n")
        merges = [tuple(line.split()) for line in lines["#version" in lines[0] :] if line.strip()]
        if not merges or any(len(merge) != 2 for merge in merges):
            raise ValueError("not two symbols a line")
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a file of byte-pair merges, or it is damaged ({error}).") from error
    return merges


def _read_json(path, default=None):
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON, or it is damaged ({error}).") from error


def _write_text(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
