import os
import random
import string
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest

from keras_sd.tokenizer import CLIPTokenizer, clean

tf = pytest.importorskip("tensorflow")

from export.bpe import MAX_BYTES, GraphTokenizer  # noqa: E402

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "keras_sd" / "presets" / "emoji" / "tokenizer"
PUBLISHED = ROOT.parent / "shared" / "bpe_simple_vocab_16e6.txt.gz"

WORDS = """a photo of an astronaut riding horse highly-detailed 4k, artstation (((masterpiece))) red:1.3 16:9 --ar $5.99
don't WE'LL it'S YOU'RE i'VE 'd ''s rock'n'roll a_b __init__ #1 C++ e-mail@x.org http://a.b/c?d=e&f=g 50% ¯\\_(ツ)_/¯ ½
café naïve Ünïcödé SMÖRGÅSBORD İstanbul ıspanak Straße GROẞ ΟΔΥΣΣΕΥΣ ΣΑΣ Σ. ſ's Ǆ ﬁne ﬃ “curly” ‘quotes’ it’s …
Ａｂｃ１２ ｶﾞｷﾞ 東京 猫の写真 한국어 한국 привет МОСКВА שָׁלוֹם مرحبا العَرَبِيَّة हिन्दी क़ ภาษาไทย বাংলা ো தமிழ் ქართული ᏣᎳᎩ ٣٤ १२
e\u0301 o\u0323\u0302 a\u0302\u0323 i\u0307 Å ǭ̂ q\u0307\u0323 \u0345 \u0301x ÷ × Ω K
🍎 👩‍🚀 👨‍👩‍👧‍👦 ❤️ 🇯🇵🇫🇷 🏳️‍🌈 👍🏽 1️⃣ ☃ ✈︎ 🧑🏿‍🎤 &amp; &amp;lt;b&amp;gt; &eacute; &EACUTE; &#128512; &#x1F34E; 
&copy2026 &notit; &#150; <b> <|startoftext|> <|endoftext|> ! !!! wow! \u200b\u200d \x07 \x1b[31mred\x1b[0m
\ufeff ŉ Ĳ 𝒜𝓑 𐐀𐐨""".split()
SPACES = [" ", " ", " ", " ", "  ", "", "\t", "\n", "\r\n", "\xa0", "\u3000", "\u2009", "\u2028", ", "]


def prompts(count, seed=0):
    """Prompts of every sort, short and long, a few of them far too long."""
    rng = random.Random(seed)

    def word():
        kind = rng.random()
        if kind < 0.7:
            word = rng.choice(WORDS)
            return rng.choice([word, word, word, word.upper(), word.lower(), word.title()])
        if kind < 0.9:
            return "".join(rng.choices(string.ascii_letters + string.digits + "'_-", k=rng.randint(1, 14)))
        return "".join(chr(rng.randrange(32, 0xD800)) for _ in range(rng.randint(1, 4)))

    lengths = [*range(12), 30, 80]
    return [
        "".join(rng.choice(SPACES) + word() for _ in range(rng.choice(lengths))) + rng.choice(SPACES)
        for _ in range(count)
    ]


def cut(tokenizer, text):
    """What a row of a tokenizer holds, and whether it is all."""
    ids, length = tokenizer.encode(text), tokenizer.max_length
    row = [*ids[: length - 1], tokenizer.end_id] if len(ids) > length else ids
    return row + [tokenizer.pad_id] * (length - len(row)), len(ids) > length


def assert_equal(graph, tokenizer, texts):
    tokens, truncated = graph(tf.constant([text.encode() for text in texts]))
    for text, row, is_cut in zip(texts, tokens.numpy(), truncated.numpy()):
        assert (row.tolist(), bool(is_cut)) == cut(tokenizer, text), ascii(text)


@pytest.fixture(scope="module")
def emoji():
    return CLIPTokenizer.from_folder(EMOJI)


@pytest.fixture(scope="module")
def graph(emoji):
    return GraphTokenizer(emoji)


@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.exists():
        pytest.skip("CLIP's vocabulary file is not here")
    return CLIPTokenizer.from_merges_file(PUBLISHED)


@pytest.fixture
def without_repair(monkeypatch):
    """ftfy without the one thing that the graph leaves out."""
    fix_text = ftfy.fix_text
    monkeypatch.setattr(ftfy, "fix_text", lambda text: fix_text(text, fix_encoding=False))


def test_ten_thousand_prompts(graph, emoji, without_repair):
    assert_equal(graph, emoji, prompts(10_000))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_ten_thousand_prompts_with_the_published_vocabulary(published, pad_token, without_repair):
    tokenizer = CLIPTokenizer(published.merges, pad_token)
    assert_equal(GraphTokenizer(tokenizer), tokenizer, prompts(5_000, seed=len(pad_token)))


def test_equals_the_tokenizer_as_it_is(graph, emoji):
    plain = ["red apple on a blue background", "It’s “ROCKET” &amp; ﬁsh!", "Ünïcödé 東京 🍎 ½", "a" * 500]
    assert_equal(graph, emoji, plain)


def test_every_character_is_cleaned_alike(graph, without_repair):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["Σ x ".join(characters[i : i + 1000]) for i in range(0, len(characters), 1000)]
    for text, cleaned in zip(texts, graph._clean(tf.constant([text.encode() for text in texts])).numpy()):
        assert cleaned.decode() == clean(text)


def test_added_tokens_are_kept_whole(emoji):
    added = {"<my-cat>": 5000, "<my>": 5001, "sks": 5002, "a b": 5003}
    tokenizer = CLIPTokenizer(emoji.merges, "!", 10, emoji.vocabulary, added)
    texts = ["<my-cat> <my>", "(<my-cat>!)", "risks", "<|endoftext|><|x", "a \t b", "!" * 20, "red " * 8, "red " * 9]
    assert_equal(GraphTokenizer(tokenizer), tokenizer, texts)


def test_unknown_symbols_are_the_end_token():
    vocabulary = {"l": 3, "o": 1, "w</w>": 2, "lo": 0, "low</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
    tokenizer = CLIPTokenizer([("l", "o"), ("lo", "w</w>")], vocabulary=vocabulary)
    assert_equal(GraphTokenizer(tokenizer), tokenizer, ["low lx", "lollo", "o", "東京"])


def test_bytes_alone():
    tokenizer = CLIPTokenizer([])
    assert_equal(GraphTokenizer(tokenizer), tokenizer, ["a", "", "red apple", "東京!"])


@pytest.mark.parametrize("batch", [[], [""], [" \n"], ["", "red", ""]])
def test_empty_prompts(graph, emoji, batch):
    tokens, truncated = graph(tf.constant(batch, tf.string))
    np.testing.assert_array_equal(tokens, emoji(batch))
    assert tokens.shape == (len(batch), 77) and tokens.dtype == tf.int32
    assert truncated.dtype == tf.bool and not truncated.numpy().any()


def test_truncation_is_exact(graph, emoji):
    word = "red"
    assert len(emoji.encode(word)) == 3
    texts = [" ".join([word] * count) for count in (74, 75, 76, 77, 5000)]
    texts += [" ".join([word] * count + ["qxzjkw"]) for count in (69, 70, 72, 74, 75)]
    assert_equal(graph, emoji, texts)
    assert graph(tf.constant(texts))[1].numpy().tolist()[:5] == [False, False, True, True, True]


def test_long_words_and_prompts(published):
    rng = random.Random(0)
    letters = ["".join(rng.choices(string.ascii_lowercase, k=k)) for k in (100, 1000, 4000)]
    few = ["".join(rng.choices("aber", k=2000)), "ab" * 2000, "a" * MAX_BYTES, "é" * (MAX_BYTES // 2), "é" * 999 + "x"]
    assert_equal(GraphTokenizer(published), published, letters + few + [" ".join(few)[: MAX_BYTES // 3], "🍎" * 3000])


def test_prompt_over_64_kib(graph):
    graph(tf.constant(["red " * (MAX_BYTES // 4)]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="prompt is longer than 65536 bytes; shorten it"):
        graph(tf.constant(["red", "r" * (MAX_BYTES + 1)]))


def test_bytes_that_are_no_utf8(graph, emoji, without_repair):
    rng = random.Random(0)
    pool = [0x41, 0x20, 0x80, 0xBF, 0xC0, 0xC3, 0xE2, 0x9F, 0xED, 0xA0, 0xF0, 0x90, 0xF4, 0xFF, 0x00]
    texts = [b"\xff\xfe", b"red \x80 apple", b"\xe6\x9d", b"\xed\xa0\x80", b"\0" * 50, bytes(range(256))]
    texts += [bytes(rng.choices(pool, k=rng.randint(1, 12))) for _ in range(500)]
    tokens, _ = graph(tf.constant(texts))
    for text, row in zip(texts, tokens.numpy()):
        assert row.tolist() == cut(emoji, text.decode("utf-8", "replace"))[0], text


def test_saved_and_loaded_in_a_fresh_process(graph, emoji, tmp_path):
    class Served(tf.Module):
        def __init__(self):
            super().__init__()
            self.tokenizer = graph

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompt")])
        def serve(self, prompt):
            tokens, truncated = self.tokenizer(prompt)
            return {"tokens": tokens, "truncated": truncated}

    served = Served()
    tf.saved_model.save(served, str(tmp_path / "model"), signatures=served.serve)
    texts = ["red apple, BLUE background", "İ ΟΔΟΣ &amp; 東京 🍎", "", "e\u0301 ｶﾞ", "red " * 100]
    code = f"""
import sys
import tensorflow as tf
outputs = tf.saved_model.load({str(tmp_path / "model")!r}).signatures["serving_default"](tf.constant({texts!r}))
print(outputs["tokens"].numpy().tolist(), outputs["truncated"].numpy().tolist(), "keras_sd" in sys.modules, sep="|")
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "LC_ALL": "tr_TR.UTF-8"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = [cut(emoji, text) for text in texts]
    assert run.stdout.strip() == f"{[row for row, _ in expected]}|{[is_cut for _, is_cut in expected]}|False"
    operations = {node.op for node in graph.__call__.get_concrete_function().graph.as_graph_def().node}
    assert not {op for op in operations if op.startswith(("PyFunc", "EagerPyFunc", "Xla"))}
