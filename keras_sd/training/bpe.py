"""Learning a byte-pair vocabulary from captions.

Reference: Sennrich et al. (2016), Algorithm 1, https://arxiv.org/abs/1508.07909.
"""

from collections import Counter, defaultdict
from itertools import pairwise

from keras_sd.tokenizer import clean, merge_pair, split_words, symbols


def train_bpe(texts, num_merges):
    """Learn the merges of a `CLIPTokenizer`, after the cleaning that the tokenizer itself does.

    Args:
        texts: iterable of strings; a text that comes twice counts twice.
        num_merges: merges to learn; fewer come back once every word is one token.

    Returns:
        List of pairs of symbols, the most frequent pair first; equal counts go in alphabetical order, so that the
        result depends on the texts alone.
    """
    if num_merges < 0:
        raise ValueError(f"num_merges is {num_merges}; it must be 0 or more.")
    counts = Counter(word for text in texts for word in split_words(clean(text)))
    words = {word: symbols(word) for word in counts}
    pairs, words_with = Counter(), defaultdict(set)

    def count(word, sign):
        for pair in pairwise(words[word]):
            pairs[pair] += sign * counts[word]
            words_with[pair].add(word)

    for word in words:
        count(word, 1)
    merges = []
    while len(merges) < num_merges:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] == 0:
            break
        merges.append(best)
        for word in words_with.pop(best):
            count(word, -1)
            words[word] = merge_pair(words[word], best)
            count(word, 1)
        del pairs[best]
    return merges
