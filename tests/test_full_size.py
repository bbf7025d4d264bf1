"""SD v1's full-size U-Net takes a picture of 1024 × 1024 pixels in bfloat16 within 6 GB."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_a_large_picture_goes_through_the_network_within_six_gigabytes():
    env = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-m", "benchmarks.memory", "network_1024"]
    result = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert float(result.stdout.split()[-1]) < 6
