"""Sizes of the LiteRT files of SD v1, 512×512: converts models of full size, with random weights.

    python -m benchmarks.litert_size --out /tmp/litert --check

Needs about 9 GB of memory, with --check about 11 GB, and 4 GB of disk.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from export.litert import convert
from export.litert_runner import SUFFIX, load
from export.parts import parts
from keras_sd import Decoder, DiffusionModel, StableDiffusion, TextEncoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/litert_size", help="folder for the files (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["float16", "int8"])
    parser.add_argument("--check", action="store_true", help="run the files too and compare them with Keras")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    sd = StableDiffusion(512, 512)
    sd.text_encoder, sd.diffusion_model, sd.decoder = TextEncoder(), DiffusionModel(), Decoder()
    for name, part in parts(sd, 512, 512).items():
        inputs = part.example()
        wanted = part(inputs) if options.check else {}
        for precision in options.precision:
            path = out / f"{name}.{precision}{SUFFIX}"
            start = time.perf_counter()
            convert(part, path, precision)
            line = f"{name:15} {precision:8} {path.stat().st_size / 1e6:8.1f} MB  {time.perf_counter() - start:5.0f} s"
            if options.check:
                found = load(path)(inputs)
                errors = (np.sqrt(np.mean((found[x] - wanted[x]) ** 2) / np.mean(wanted[x] ** 2)) for x in wanted)
                line += f"  error {max(errors):.1e}"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{line}  peak {peak:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
