"""Token merging: self-attention over fewer tokens, those that are alike counting as one."""

import numpy as np
from keras import ops


def token_merging(x, height, width, ratio):
    """Finds the tokens of a picture that are alike.

    The top left token of every 2 × 2 cell is a destination, always the same: the paper draws one at random. Each of the
    others looks for the destination that it is most similar to (cosine), and the most similar `ratio` of all tokens
    become one with theirs. Here it is the input of the attention that is compared.

    Args:
        x: (B, height · width, C).
        height, width: integers, the size of the picture that the tokens are of.
        ratio: part of the tokens that is merged, in [0, 0.75]; a picture of odd size has a few less to merge.

    Returns:
        (merge, unmerge): functions (B, N, C) → (B, M, C), where tokens that are one become their mean, and back, where
        each of them gets what that became.

    Reference: Bolya & Hoffman (2023), Token Merging for Fast Stable Diffusion, arXiv 2303.17604, section 4.
    """
    grid = np.arange(height * width).reshape(height, width)
    targets = grid[::2, ::2].ravel()
    others = np.setdiff1d(grid, targets)
    merged = min(int(ratio * grid.size), len(others))
    count = grid.size - merged

    unit = x / ops.maximum(ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True)), 1e-6)
    similarity = ops.matmul(ops.take(unit, others, axis=1), ops.transpose(ops.take(unit, targets, axis=1), (0, 2, 1)))
    rank = ops.argsort(ops.argsort(-ops.max(similarity, axis=-1)))  # 0 is the most similar of the others
    nearest = ops.cast(ops.argmax(similarity, axis=-1), rank.dtype)
    # For each token, which of the `count` it becomes: the destinations come first, then what is not merged.
    kept = ops.where(rank < merged, nearest, rank + (len(targets) - merged))
    own = ops.zeros_like(kept[:, :1]) + ops.arange(len(targets), dtype=rank.dtype)
    place = ops.take(ops.concatenate([own, kept], axis=1), np.argsort(np.concatenate([targets, others])), axis=1)

    def merge(x):
        batch = ops.shape(x)[0]
        segments = ops.reshape(place + count * ops.arange(batch, dtype=rank.dtype)[:, None], (-1,))
        x = ops.reshape(ops.cast(x, "float32"), (-1, x.shape[-1]))
        number = batch * count if isinstance(batch, int) else None  # found out then: OpenVINO takes integers alone
        sums = ops.segment_sum(ops.concatenate([x, ops.ones_like(x[:, :1])], axis=1), segments, number)
        return ops.cast(ops.reshape(sums[:, :-1] / sums[:, -1:], (batch, count, -1)), unit.dtype)

    def unmerge(x):
        return ops.take_along_axis(x, place[..., None], axis=1)

    return merge, unmerge
