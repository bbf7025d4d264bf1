"""The graph's random numbers are NumPy's."""

import numpy as np
import pytest
import tensorflow as tf

from export.numpy_random import standard_normal


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_equal_numpys(words):
    keys = np.random.default_rng(words).integers(0, 2**31, (3, words)).astype("int32")
    keys[0] = 0
    found = tf.function(standard_normal)(keys, [16, 24, 4]).numpy()
    for key, item in zip(keys.tolist(), found):
        wanted = np.random.default_rng(key).standard_normal((16, 24, 4), dtype="float32")
        np.testing.assert_array_equal(item, wanted)


def test_equal_numpys_over_a_million_draws():
    """Rejections, wedges and the tail included; log1p may round its last bit otherwise."""
    found = tf.function(standard_normal)(tf.range(4)[:, None], [512, 512]).numpy()
    wanted = np.stack([np.random.default_rng(seed).standard_normal((512, 512), dtype="float32") for seed in range(4)])
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=0)
    assert np.abs(wanted).max() > 4.5 and (found != wanted).mean() < 1e-4


def test_an_empty_batch_and_a_shape_of_one():
    assert standard_normal(tf.zeros([0, 2], tf.int32), [3]).shape == (0, 3)
    assert standard_normal([[7]], [1]).numpy() == np.random.default_rng(7).standard_normal((1, 1), dtype="float32")
