"""How long is one cold picture, in units of `import tensorflow`? `python -m benchmarks.cold_start`

Both commands run as fresh processes, by turns, so that what else the machine does falls on both alike.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def seconds(*arguments):
    """Wall-clock time of one fresh Python process."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="emoji", help="preset or folder (default emoji)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each command (default 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.png"
        draw = ["-m", "keras_sd", "txt2img", "red apple on a blue background"]
        draw += ["--preset", args.preset, "--out", str(out)]
        baseline = ["-c", "import tensorflow"]
        seconds(*baseline), seconds(*draw)  # the first of each also waits for the disk
        pairs = [(seconds(*baseline), seconds(*draw)) for _ in range(args.runs)]
    for i, (tensorflow, picture) in enumerate(pairs):
        print(
            f"run {i + 1}: import tensorflow {tensorflow:5.2f} s, picture {picture:5.2f} s, {picture / tensorflow:.2f}×"
        )
    print(f"median ratio {statistics.median(picture / tensorflow for tensorflow, picture in pairs):.2f}")


if __name__ == "__main__":
    main()
