"""The embedded model on every backend: the same seed gives the same picture."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A function backend → uint8 (2, H, W, 3)."""
    folder = tmp_path_factory.mktemp("backends")

    def draw(backend):
        path = folder / f"{backend}.npy"
        if not path.exists():
            env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, ROOT / "tests" / "draw.py", path], env=env, check=True)
        return np.load(path).astype(int)

    return draw


@pytest.mark.parametrize("backend", ["jax", "torch", "openvino"])
def test_same_picture_on(backend, pictures):
    assert np.abs(pictures(backend) - pictures("tensorflow")).max() <= 2


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    """A function backend → dict of arrays."""
    folder = tmp_path_factory.mktemp("predictions")

    def predict(backend):
        path = folder / f"{backend}.npz"
        if not path.exists():
            env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, ROOT / "tests" / "predict.py", path], env=env, check=True)
        return dict(np.load(path))

    return predict


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_same_predictions_on(backend, predictions):
    expected, found = predictions("tensorflow"), predictions(backend)
    assert len(expected) == 8 and expected.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
