"""Sixteen clients at once against the same pictures one after the other, on the local server with batching on.

python -m benchmarks.concurrency    exports the embedded model to out/served and prints the ratio of the two times
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

from serving.client import Client
from serving.demo import server

CLIENTS = 16
MODELS = ("text_encoder", "decoder", "denoiser")
SUBJECTS = ("red apple", "rocket", "ghost", "penguin", "volcano", "panda face", "mushroom", "sailboat")
GROUNDS = ("blue", "black", "red", "pink")
SAMPLERS = ("ddim", "dpmpp_2m", "euler_a", "unipc")


def requests():
    """Different prompts, seeds, samplers and step counts."""
    for i in range(CLIENTS):
        prompt = f"{SUBJECTS[i % len(SUBJECTS)]} on a {GROUNDS[i % len(GROUNDS)]} background"
        yield prompt, {"seed": i, "sampler": SAMPLERS[i % len(SAMPLERS)], "num_steps": 10 + i % 4 * 5}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements")
    parser.add_argument("--models", type=pathlib.Path, default="out/served", help="exported models; made if missing")
    args = parser.parse_args()
    if not (args.models / "models.config").is_file():
        command = [sys.executable, "-m", "export", "--preset", "emoji", "--out", str(args.models), "--only", *MODELS]
        subprocess.run(command, check=True)
    with server(args.models, "--enable_batching=true") as (port, _):

        def draw(request):
            prompt, options = request
            with Client(f"localhost:{port}") as client:
                return client.text_to_image(prompt, progress=False, **options)[0]

        def timed(run):
            start = time.perf_counter()
            pictures = np.stack(list(run()))
            return time.perf_counter() - start, pictures

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            ratios = []
            timed(lambda: pool.map(draw, requests()))  # shapes that the server has not seen
            for _ in range(args.rounds):
                alone, wanted = timed(lambda: map(draw, requests()))
                together, found = timed(lambda: pool.map(draw, requests()))
                assert np.mean(np.abs(found.astype(int) - wanted) <= 1) >= 0.999, "results were mixed up"
                ratios.append(together / alone)
    print(f"{CLIENTS} clients at once take {statistics.median(ratios):.2f} of the time of one after the other")
    print(f"({len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
