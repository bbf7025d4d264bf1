"""Prompt syntax against A1111's own examples; contexts against a calculation by hand; schedules by step."""

import json
import warnings

import numpy as np
import pytest

from keras_sd import StableDiffusion
from keras_sd.noise import initial_noise
from keras_sd.presets import locate
from keras_sd.prompts import BREAK, parse, segments, tokenize
from keras_sd.samplers import make_table


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def encode_by_hand(sd, chunks):
    """The context of chunks, each a list of (token, weight), concatenated: one number at a time, in float64."""
    contexts = []
    for chunk in chunks:
        row = [sd.tokenizer.start_id] + [token for token, _ in chunk]
        row += [sd.tokenizer.end_id] + [sd.tokenizer.pad_id] * (75 - len(chunk))
        plain = np.asarray(sd.text_encoder.predict_on_batch({"tokens": np.array([row], "int32")}))[0].astype("float64")
        weighted = plain.copy()
        for position, (_, weight) in enumerate(chunk, start=1):
            weighted[position] *= weight
        contexts.append(weighted * (plain.sum() / weighted.sum()))
    return np.concatenate(contexts)


def tokens_of(sd, text, weight=1.0):
    return [(token, weight) for token in sd.tokenizer.encode(text)[1:-1]]


# === Syntax ===


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        (r"\(literal\] \\ \: \|", [("(literal] \\ : |", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("((a))[b][[c]]", [("a", 1.21), ("b", 1 / 1.1), ("c", 1 / 1.21)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [
                ("a ", 1),
                ("house", 1.1 * 1.1 * 1.3),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        ("(a: b)", [("a: b", 1.1)]),
        ("(a:b:-.5 )", [("a:b", -0.5)]),
        ("ratio 16:9 | x", [("ratio 16:9 | x", 1)]),
        ("[a:b]", [("a:b", 1 / 1.1)]),
        ("a BREAK b", [("a", 1), (BREAK, None), ("b", 1)]),
        ("(a\nBREAK b:2) BREAKFAST", [("a", 2), (BREAK, None), ("b", 2), (" BREAKFAST", 1)]),
        ("a \\ b", [("a \\ b", 1)]),
        ("a (red:1.0) apple", [("a red apple", 1)]),
        ("", []),
        ("()", []),
    ],
)
def test_segments(prompt, expected):
    found = segments(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    for (_, weight), (_, wanted) in zip(found, expected):
        assert weight == (wanted if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("a [b:3]", ["a "] * 3 + ["a b"] * 7),
        ("a[b:[c:d:2]:1]e", ["abe", "ace"] + ["ade"] * 8),
        ("a [b:.5] c", ["a  c"] * 5 + ["a b c"] * 5),
        ("[a::0.7]", ["a"] * 7 + [""] * 3),
        ("[a:b:0.29]", ["a"] * 2 + ["b"] * 8),
        ("[a:b:1]", ["a"] + ["b"] * 9),
        ("[a:b:1.0]", ["a"] * 10),
        ("[a:b:99]", ["a"] * 10),
        ("[a|b|]", ["a", "b", "", "a", "b", "", "a", "b", "", "a"]),
        ("[x[a|b]:c:4]", ["xa", "xb", "xa", "xb"] + ["c"] * 6),
        ("[a:b|c]", ["a:b", "c"] * 5),
    ],
)
def test_schedules(prompt, texts):
    for step, text in enumerate(texts):
        assert "".join(part for part, _ in segments(prompt, step, 10)) == text


def test_the_example_of_a1111():
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    expected = [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]
    for step in range(100):
        text = next(text for end, text in expected if step < end)
        assert segments(prompt, step, 100) == ((text, 1.0),)


def test_weights_inside_schedules():
    assert segments("([a:(b:2):0.5])", 5, 10) == (("b", pytest.approx(2.2)),)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a cat :)", r"'\)' at position 7 .*closes nothing; .* write \\\)"),
        ("a (cat", r"'\(' at position 2 .*is not closed; .* write \\\("),
        ("a [b (c)", r"'\[' at position 2 .*is not closed"),
        ("(a]", r"'\]' at position 2 .*closes the '\(' at position 0"),
        ("[a:b:c:0.5]", r"'\[' at position 0 .*4 parts"),
        ("x [word:1.3]", r"'\[' at position 2 .*changes at 1.3.*round brackets"),
        ("[a:b:-1]", "changes at -1"),
        ("(" * 5000, "position 100 .*100 at most"),
    ],
)
def test_what_is_wrong_is_said_with_its_position(sd, prompt, words):
    with pytest.raises(ValueError, match=words) as error:
        parse(prompt)
    assert "\n" not in str(error.value)
    for arguments in ({"prompt": prompt}, {"prompt": "x", "negative_prompt": prompt}):
        with pytest.raises(ValueError, match=words):
            sd.text_to_image(**arguments, num_steps=2, progress=False)


# === Contexts ===


@pytest.mark.parametrize(
    "prompt", ["an apple", "", "two apples, please: 1 2 3 |", "ein Apfel \\ 🍎 &amp; <|endoftext|>"]
)
def test_plain_prompts_and_weights_of_one_change_nothing(sd, prompt):
    plain = np.asarray(sd.text_encoder.predict_on_batch({"tokens": sd.tokenizer(prompt)}))
    for written in (prompt, f"({prompt}:1)", f"[({prompt}:1.1)]"):
        assert (sd.encode_text(written) == plain).all() and sd.encode_text(written).dtype == plain.dtype


def test_weights_multiply_the_embeddings_and_the_mean_is_restored(sd):
    context = sd.encode_text("an (apple:1.6) and [two] ((pears))")
    chunk = tokens_of(sd, "an") + tokens_of(sd, "apple", 1.6) + tokens_of(sd, "and")
    chunk += tokens_of(sd, "two", 1 / 1.1) + tokens_of(sd, "pears", 1.21)
    np.testing.assert_allclose(context, encode_by_hand(sd, [chunk])[None], rtol=1e-5, atol=1e-6)
    assert context.mean() == pytest.approx(sd.encode_text("an apple and two pears").mean(), rel=1e-4)


def test_long_prompts_go_on_in_chunks(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = sd.encode_text("apple " * 40 + "(pear:1.4) " * 60)
    tokens = tokens_of(sd, "apple") * 40 + tokens_of(sd, "pear", 1.4) * 60
    assert len(tokens) > 75
    chunks = [tokens[i : i + 75] for i in range(0, len(tokens), 75)]
    assert context.shape == (1, 77 * len(chunks), 32)
    np.testing.assert_allclose(context[0], encode_by_hand(sd, chunks), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count, chunks", [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_number_of_chunks(sd, count, chunks):
    tokens, weights = tokenize(sd.tokenizer, [segments("7" * count)])
    assert tokens.shape == weights.shape == (1, chunks, 77) and tokens.dtype == "int32"
    assert (tokens[0, :, 0] == sd.tokenizer.start_id).all() and (tokens == sd.tokenizer.encode("7")[1]).sum() == count


def test_break_starts_a_chunk(sd):
    context = sd.encode_text("an apple BREAK (two BREAK pears:1.2) BREAK")
    chunks = [tokens_of(sd, "an apple"), tokens_of(sd, "two", 1.2), tokens_of(sd, "pears", 1.2)]
    np.testing.assert_allclose(context[0], encode_by_hand(sd, chunks), rtol=1e-5, atol=1e-6)


def test_shorter_prompts_get_empty_chunks(sd):
    context = sd.encode_text(["an apple", "two BREAK pears BREAK please"])
    expected = encode_by_hand(sd, [tokens_of(sd, "an apple"), [], []])
    np.testing.assert_allclose(context[0], expected, rtol=1e-5, atol=1e-6)


def test_half_precision_stays_half(tiny):
    model = StableDiffusion.from_preset(tiny, dtype="float16")
    assert model.encode_text("(an apple:1.3)").dtype == model.encode_text("an apple").dtype == "float16"


def test_padding_of_sd_v2(v2_like):
    tokenizer = StableDiffusion.from_preset(v2_like).tokenizer
    tokens, _ = tokenize(tokenizer, [segments("an apple"), segments("two BREAK")])
    assert (tokens[:, 0] == tokenizer(["an apple", "two"])).all() and tokens[0, 0, -1] == tokenizer.pad_id == 0


# === Drawing ===


def draw(sd, prompt, **kwargs):
    return sd.text_to_image(prompt, **{"num_steps": 4, "seed": 3, "progress": False} | kwargs)


def draw_by_rows(sd, contexts, negative, sampler=None, num_steps=4):
    """The picture of given contexts, one a row (rows, N, width), by the denoiser alone."""
    table = sd._table(sampler, num_steps, 7.5, {})
    latent = table.init_noise_scale * initial_noise(3, 1, sd.latent_shape())
    return sd.decode(sd.denoiser.denoise(latent, lambda i: contexts[i][None], negative, table, progress=False))


def test_text_to_image_is_encode_and_generate(sd):
    prompt = "an (apple:1.3) " + "and a pear " * 30
    assert sd.encode_text(prompt).shape[1] > 77
    image = sd.generate_image(sd.encode_text(prompt), num_steps=4, seed=3, progress=False)
    assert (image == draw(sd, prompt)).all() and (image == sd.generate_image(prompt, num_steps=4, seed=3)).all()


def test_the_shorter_of_prompt_and_negative_prompt_is_padded(sd):
    short, long = "an apple", "two BREAK pears BREAK please"
    empty = encode_by_hand(sd, [[], []]).astype("float32")
    padded = np.concatenate([sd.encode_text(short)[0], empty])
    pictures = [
        (draw(sd, short, negative_prompt=long), [padded] * 4, sd.encode_text(long)),
        (draw(sd, long, negative_prompt=short), [sd.encode_text(long)[0]] * 4, padded[None]),
    ]
    for drawn, contexts, negative in pictures:
        expected = draw_by_rows(sd, contexts, negative)
        assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("sampler, rows", [(None, 4), ("heun", 7), ("plms", 5)])
def test_prompts_change_at_their_step(sd, sampler, rows):
    a, b = sd.encode_text("an apple")[0], sd.encode_text("a pear")[0]
    steps = {4: [0, 1, 2, 3], 7: [0, 0, 1, 1, 2, 2, 3], 5: [0, 0, 1, 2, 3]}[rows]
    assert len(make_table(sampler or "ddim", sd.scheduler[0], 4)) == rows
    prompts = {"[an apple:a pear:1]": "abbb", "[an apple:a pear:0.5]": "aabb", "[an apple|a pear]": "abab"}
    for prompt, chosen in prompts.items():
        contexts = [{"a": a, "b": b}[chosen[step]] for step in steps]
        expected = draw_by_rows(sd, contexts, sd.encode_text(""), sampler)
        assert np.abs(draw(sd, prompt, sampler=sampler).astype(int) - expected).max() <= 1, prompt


def test_image_to_image_counts_the_steps_that_it_runs(sd):
    picture = np.full((64, 64, 3), 200, "uint8")
    drawn = [
        sd.image_to_image(picture, prompt, 0.5, num_steps=8, seed=1, progress=False)
        for prompt in ("[an apple:a pear:4]", "an apple", "[an apple:a pear:0.5]")
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[1] != drawn[2]).any()


def test_negative_prompts_are_scheduled_and_prompts_of_a_batch_differ(sd):
    prompts = ["[an apple:a pear:2]", "an (apple:1.4)", "apple " * 60]
    together = draw(sd, prompts, seed=[3, 9, 4], negative_prompt="[blue:red:2]")
    assert sd.encode_text(prompts[2]).shape[1] == 77
    for image, prompt, seed in zip(together, prompts, (3, 9, 4)):
        alone = draw(sd, prompt, seed=seed, negative_prompt="[blue:red:2]")[0]
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_a_schedule_has_no_context_of_its_own(sd):
    with pytest.raises(ValueError, match="changes from step to step"):
        sd.encode_text("an [apple:pear:0.5]")


def test_contexts_that_do_not_go_together(sd):
    with pytest.raises(ValueError, match="multiple of 77"):
        sd.generate_image(np.zeros((1, 80, 32), "float32"), num_steps=2, progress=False)
    with pytest.raises(ValueError, match="encoded_text must have shape"):
        sd.generate_image(np.zeros(77, "float32"), num_steps=2, progress=False)
    with pytest.raises(TypeError, match="negative_prompt"):
        draw(sd, "an apple", negative_prompt=3)


def test_the_embedded_model_follows_a_schedule():
    sd = StableDiffusion.from_preset("emoji")
    yellow = json.loads((locate("emoji") / "captions.json").read_text())["backgrounds"]["yellow"]
    image = draw(sd, "red apple on a [blue:yellow:1] background", num_steps=15)[0]
    assert np.abs(np.median(image[:4].reshape(-1, 3), axis=0) - yellow).max() < 40
