"""SD v1's full-size models draw a 512×512 picture in bfloat16 within 6 GB."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_full_size_picture_within_six_gigabytes():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--steps", "1"]
    result = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1])["peak_gb"] < 6
