r"""The prompt syntax of AUTOMATIC1111's web UI: weights, chunks, and schedules by step.

| written | means |
|---|---|
| `(word)`, `((word))` | 1.1 times the attention, 1.21 times |
| `[word]` | 1 / 1.1 times |
| `(word:1.3)` | 1.3 times |
| `BREAK` | what follows starts a new chunk of 75 tokens; a longer prompt goes on in a new chunk by itself |
| `[from:to:12]`, `[from:to:0.5]` | `from` in the first 12 steps, or the first half of the run; then `to` |
| `[to:12]`, `[from::12]` | the same with nothing before, or nothing after |
| `[a|b|c]` | a, b and c in turn, one a step |
| `\(` `\)` `\[` `\]` `\:` `\|` `\\` | the character itself |

All of it nests. A number with a point is a part of the run, one without counts steps. Brackets must be balanced.

Reference: https://github.com/AUTOMATIC1111/stable-diffusion-webui, `modules/prompt_parser.py` (syntax),
`modules/sd_hijack_clip.py` (chunks) and `modules/sd_emphasis.py` (weights).
"""

import fractions
import functools
import re

import numpy as np

ROUND, SQUARE = 1.1, 1 / 1.1  # factors of a pair of brackets
BREAK = "BREAK"
_DEEPEST = 100  # brackets in brackets

_PIECE = re.compile(r"\\(?P<escaped>[()\[\]:|\\])|(?P<mark>[()\[\]:|])|[^()\[\]:|\\]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
_LORA = re.compile(r"<lora:([^<>:]*):?([^<>]*)>")
_BREAK = re.compile(rf"\s*\b{BREAK}\b\s*")


# === Syntax ===


def parse(prompt):
    """Reads a prompt.

    Returns:
        a tuple of nodes: strings, `("weight", nodes, factor)`, `("schedule", nodes before, nodes after, when)` with
        `when` as it is written, and `("alternate", [nodes, …])`.

    Raises:
        TypeError: the prompt is no string.
        ValueError: a bracket is not balanced, or a schedule's step is out of its range; the message says where.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string or a list of strings, not one of {type(prompt).__name__}.")
    open_brackets, nodes = [], []
    for piece in _PIECE.finditer(prompt):
        mark, position = piece["mark"], piece.start()
        if mark is None:
            nodes.append(piece["escaped"] or piece[0])
        elif mark in "([":
            if len(open_brackets) == _DEEPEST:
                raise ValueError(f"{_at(prompt, position)} is the {_DEEPEST + 1}st one open; {_DEEPEST} at most.")
            open_brackets.append((mark, position, nodes))
            nodes = []
        elif mark in ")]":
            if not open_brackets:
                raise ValueError(f"{_at(prompt, position)} closes nothing; for the character itself write \\{mark}")
            opening, start, outer = open_brackets.pop()
            if opening + mark not in ("()", "[]"):
                raise ValueError(
                    f"{_at(prompt, position)} closes the {opening!r} at position {start}; "
                    f"for the characters themselves write \\{opening} and \\{mark}"
                )
            outer.append(_weighted(nodes) if mark == ")" else _square(nodes, _at(prompt, start)))
            nodes = outer
        else:
            nodes.append((mark,))  # a separator where it stands in brackets that give it a meaning
    if open_brackets:
        opening, start, _ = open_brackets[-1]
        raise ValueError(f"{_at(prompt, start)} is not closed; for the character itself write \\{opening}")
    return _plain(nodes)


def _at(prompt, position):
    """How an error names a bracket: the character, its position (from 0) and what is around it."""
    around = " ".join(prompt[max(position - 12, 0) : position + 13].split())
    return f"The prompt's {prompt[position]!r} at position {position} (in {around!r})"


def _plain(nodes):
    """Nodes with the separators as text."""
    return tuple(node[0] if isinstance(node, tuple) and len(node) == 1 else node for node in nodes)


def _split(nodes, separator):
    parts = [[]]
    for node in nodes:
        if node == (separator,):
            parts.append([])
        else:
            parts[-1].append(node)
    return parts


def _number(nodes):
    """The number that nodes are, as text; None where they are anything else."""
    match = all(isinstance(node, str) for node in nodes) and _NUMBER.fullmatch("".join(nodes))
    return match[1] if match else None


def _weighted(nodes):
    """(text) or (text:number)"""
    *before, last = _split(nodes, ":")
    if before and _number(last) is not None:
        return "weight", _plain(nodes[: -len(last) - 1]), float(_number(last))
    return "weight", _plain(nodes), ROUND


def _square(nodes, where):
    """[a|b], [from:to:when], [to:when] or [text]"""
    choices = _split(nodes, "|")
    if len(choices) > 1:
        return "alternate", [_plain(choice) for choice in choices]
    *texts, last = _split(nodes, ":")
    when = _number(last)
    if not texts or when is None:
        return "weight", _plain(nodes), SQUARE
    if len(texts) > 2:
        raise ValueError(f"{where} has {len(texts) + 1} parts; a schedule is [from:to:when] or [to:when].")
    if float(when) < 0 or ("." in when and float(when) > 1):
        raise ValueError(
            f"{where} changes at {when}, which is neither a number of steps nor a part of the run, 0.0 … 1.0; "
            "a weight is written in round brackets."
        )
    before, after = texts if len(texts) == 2 else ([], texts[0])
    return "schedule", _plain(before), _plain(after), when


# === Prompt → texts with weights ===


def is_scheduled(nodes):
    """Whether the nodes of `parse` change with the step."""
    return any(node[0] != "weight" or is_scheduled(node[1]) for node in nodes if isinstance(node, tuple))


def segments(prompt, step=None, num_steps=None):
    """The text of a prompt at a step, cut where its weight changes.

    Args:
        prompt: string in the syntax above.
        step: the step, from 0 on; without it the prompt must not be scheduled.
        num_steps: number of steps of the run.

    Returns:
        a tuple of (text, weight); between chunks stands (`BREAK`, None).

    Raises:
        TypeError, ValueError: as `parse`, or the prompt is scheduled and `step` is missing.
    """
    nodes = parse(prompt)
    if step is None and is_scheduled(nodes):
        raise ValueError(f"The prompt {prompt!r} changes from step to step: only a drawing run can encode it.")
    merged = []
    for text, weight in _flat(nodes, step, num_steps, 1.0):
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    result = []
    for text, weight in merged:
        for i, part in enumerate(_BREAK.split(text)):
            result += [(BREAK, None)] * (i > 0) + [(part, weight)] * (part != "")
    return tuple(result)


def _flat(nodes, step, num_steps, weight):
    for node in nodes:
        if isinstance(node, str):
            yield node, weight
        elif node[0] == "weight":
            yield from _flat(node[1], step, num_steps, node[2] * weight)
        elif node[0] == "alternate":
            yield from _flat(node[1][step % len(node[1])], step, num_steps, weight)
        else:
            _, before, after, when = node
            change = int(fractions.Fraction(when) * num_steps) if "." in when else int(when)
            yield from _flat(before if step < change else after, step, num_steps, weight)


def take_loras(prompt):
    """Takes `<lora:name>` and `<lora:name:0.8>` out of a prompt.

    Returns:
        the prompt without them, and a list of (name, scale).

    Raises:
        ValueError: the scale is no number.
    """
    loras = []
    for name, scale in _LORA.findall(prompt):
        number = _NUMBER.fullmatch(scale or "1")
        if number is None or not name:
            raise ValueError(f"A LoRA in a prompt is written <lora:name:0.8>; got <lora:{name}:{scale}>.")
        loras.append((name, float(number[1])))
    return _LORA.sub("", prompt).strip() if loras else prompt, loras


# === Texts with weights → tokens → context ===


def tokenize(tokenizer, texts):
    """The chunks of prompts, each of them start token, up to 75 tokens, end token and padding.

    Args:
        tokenizer: a `CLIPTokenizer`.
        texts: list of B results of `segments`. Prompts of fewer chunks than the longest get empty ones at the end.

    Returns:
        tokens int32 (B, chunks, 77) and their weights float32 (B, chunks, 77): 1 for all tokens but those of the text.
    """
    prompts = [_chunks(tokenizer, text) for text in texts]
    tokens = np.full((len(prompts), max(map(len, prompts)), tokenizer.max_length), tokenizer.pad_id, "int32")
    tokens[..., 0], tokens[..., 1] = tokenizer.start_id, tokenizer.end_id
    weights = np.ones(tokens.shape, "float32")
    for i, chunks in enumerate(prompts):
        for j, chunk in enumerate(chunks):
            tokens[i, j, 1 : len(chunk) + 2] = [*(token for token, _ in chunk), tokenizer.end_id]
            weights[i, j, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
    return tokens, weights


def _chunks(tokenizer, text):
    """Lists of (token, weight), each of up to 75."""
    chunks = [[]]
    for part, weight in text:
        if weight is None:
            chunks.append([])
            continue
        for token in tokenizer.encode(part)[1:-1]:
            if len(chunks[-1]) == tokenizer.max_length - 2:
                chunks.append([])
            chunks[-1].append((token, weight))
    if len(chunks) > 1 and not chunks[-1]:  # a BREAK at the end
        chunks.pop()
    return chunks


def emphasize(context, weights):
    """Multiplies each token's embedding by its weight, then scales every chunk back to the mean it had.

    The mean is taken over all 77 × width numbers of a chunk, as in A1111's `EmphasisOriginal`. Chunks whose weights are
    all 1 come back unchanged, bit for bit.

    Args:
        context: (n, 77, width), a chunk a row, from the text encoder.
        weights: float32 (n, 77).

    Returns:
        (n, 77, width), in the type of `context`.
    """
    context = context.copy()
    for i in np.flatnonzero((weights != 1).any(axis=1)):
        chunk = context[i].astype("float64")
        weighted = chunk * weights[i, :, None]
        context[i] = weighted * (chunk.mean() / weighted.mean())
    return context


# === Context by row ===


def by_row(prompt, encode, num_steps, rows):
    """A prompt as the denoising loop takes it.

    Args:
        prompt: a string or list of B strings; or their context (N, width) or (B, N, width); or a function row → such
            an array.
        encode: function list of `segments` → (how many, N, width).
        num_steps: number of steps of the run.
        rows: number of rows of its table, which may have more of them than one a step.

    Returns:
        function row → float32 (B, N, width), with the same N in every row.

    Raises:
        ValueError: brackets are not balanced, or the context is of another shape.
    """
    if callable(prompt):
        return lambda row: _check_context(prompt(row))
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if not _is_list(prompt):
        context = _check_context(prompt)
        return lambda row: context
    texts = [tuple(segments(one, row * num_steps // rows, num_steps) for one in prompt) for row in range(rows)]
    distinct = list(dict.fromkeys(text for row in texts for text in row))
    contexts = dict(zip(distinct, np.asarray(encode(distinct), "float32")))
    return lambda row: np.stack([contexts[text] for text in texts[row]])


def padded(context, negative, encode, batch_size):
    """Two results of `by_row`, for `batch_size` pictures each, the shorter with empty chunks at its end."""
    lengths = [one(0).shape[1] for one in (context, negative)]
    padding = None
    if lengths[0] != lengths[1]:
        empty = np.asarray(encode([()]), "float32")
        chunks, rest = divmod(abs(lengths[0] - lengths[1]), empty.shape[1])
        if rest:
            raise ValueError(
                f"encoded_text has {lengths[0]} tokens and negative_prompt {lengths[1]}; they go together where the "
                f"difference is a multiple of {empty.shape[1]}."
            )
        padding = np.tile(empty, (1, chunks, 1))

    def batch(context, length, row):
        context = context(row)
        if length < max(lengths):
            context = np.concatenate([context, np.repeat(padding, len(context), axis=0)], axis=1)
        return np.repeat(context, batch_size // len(context), axis=0)

    return [functools.partial(batch, *one) for one in zip((context, negative), lengths)]


def as_list(prompt, name="prompt"):
    """A prompt or list of prompts as a list; TypeError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not _is_list(prompts):
        raise TypeError(f"{name} must be a string or a list of strings; got {prompt!r}.")
    return list(prompts)


def _is_list(prompt):
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(one, str) for one in prompt)


def _check_context(encoded_text):
    """(N, width) or (B, N, width) → float32 (B, N, width)."""
    context = np.asarray(encoded_text, "float32")
    context = context[None] if context.ndim == 2 else context
    if context.ndim != 3:
        raise ValueError(f"encoded_text must have shape (77, width) or (batch_size, 77, width); got {context.shape}.")
    return context
