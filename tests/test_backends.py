"""The embedded model and narrow ones on every backend: the same pictures, the same predictions."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function (script of this folder, backend, ending, further arguments) → what the script writes there, as
    `np.load` gives it."""
    folder = tmp_path_factory.mktemp("backends")

    def run(script, backend, ending, *arguments):
        path = folder / "-".join([script, backend, *arguments, ending])
        if not path.exists():
            env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, ROOT / "tests" / script, path, *arguments], env=env, check=True)
        return np.load(path)

    return run


@pytest.mark.parametrize("backend", ["jax", "torch", "openvino"])
def test_same_picture_on(backend, written):
    found, expected = (written("draw.py", one, ".npy").astype(int) for one in (backend, "tensorflow"))
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("backend", ["jax", "torch", "openvino"])
def test_nearly_the_same_picture_in_bfloat16_on(backend, written):
    expected = written("draw.py", "tensorflow", ".npy").astype(int)
    found = written("draw.py", backend, ".npy", "bfloat16").astype(int)
    assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_same_predictions_on(backend, written):
    expected, found = (dict(written("predict.py", one, ".npz")) for one in ("tensorflow", backend))
    assert len(expected) == 9 and expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_openvino_compiles_once_for_rows_of_a_kind(written):
    # text encoder, step and decoder; the step without guidance; nothing; the whole step and the shallow one
    assert written("count_compilations.py", "openvino", ".npy").tolist() == [3, 1, 0, 2]
