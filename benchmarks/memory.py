"""Peak memory at SD v1's full size, random weights: each case in a process of its own. `python -m benchmarks.memory`

    python -m benchmarks.memory               a Markdown table of all cases
    python -m benchmarks.memory picture       one case; prints its peak resident memory in GB (10⁹ bytes)

The cases with `low_memory` read their models from `runs/full_size`, which is written before, outside the measurement.
"""

import argparse
import os
import subprocess
import sys

import numpy as np

from keras_sd.training.watching import peak_memory


def picture(**options):
    """Text to picture, two denoising steps: more cost time, not memory."""
    from benchmarks.full_size import full_size_preset
    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(full_size_preset(), **options)
    image = sd.text_to_image("an apple", num_steps=2, seed=0, progress=False)
    assert np.ptp(image) > 0


def network(side, dtype="bfloat16", batch=1):
    """One pass of the U-Net."""
    from keras_sd import DiffusionModel

    model = DiffusionModel(dtype=dtype)
    model.compile()
    shapes = {"latent": (side // 8, side // 8, 4), "timestep_embedding": (320,), "context": (77, 768)}
    output = model.predict_on_batch({name: np.ones((batch, *shape), "float32") for name, shape in shapes.items()})
    assert output.shape == (batch, side // 8, side // 8, 4)


def decode(height, width, dtype, **options):
    """A latent to a picture."""
    from keras_sd import Decoder, StableDiffusion

    sd = StableDiffusion(preset=None, **options)
    sd.decoder = Decoder(dtype=dtype)
    sd.decoder.compile()
    latent = np.random.default_rng(0).standard_normal((1, height // 8, width // 8, 4)).astype("float32")
    assert sd.decode(latent).shape == (1, height, width, 3)


CASES = {
    "picture": ("text to a 512×512 picture, bfloat16", lambda: picture(dtype="bfloat16")),
    "two_passes": (
        "the same, `two_pass_guidance=True`",
        lambda: picture(dtype="bfloat16", two_pass_guidance=True),
    ),
    "low_memory": ("the same, `low_memory=True`", lambda: picture(dtype="bfloat16", low_memory=True)),
    "network_1024": ("U-Net, one pass at 1024×1024, bfloat16", lambda: network(1024)),
    "decode_1024": (
        "decoder, 1024×1024, float32, `vae_tiling=False`",
        lambda: decode(1024, 1024, "float32", vae_tiling=False),
    ),
    "decode_1024_tiled": (
        "decoder, 1024×1024, float32, `vae_tiling=True`",
        lambda: decode(1024, 1024, "float32", vae_tiling=True),
    ),
    "decode_4k": ("decoder, 3840×2160, bfloat16", lambda: decode(2160, 3840, "bfloat16")),
    "decode_4k_float32": ("decoder, 3840×2160, float32", lambda: decode(2160, 3840, "float32")),
}


def run(*arguments):
    """What a module prints in a process of its own."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES, help="one case (default: a table of all)")
    args = parser.parse_args()
    if args.case is not None:
        CASES[args.case][1]()
        return print(round(peak_memory() / 1e9, 2))
    run("benchmarks.full_size")
    print("| what | peak GB |\n|---|---|")
    for name, (description, _) in CASES.items():
        print(f"| {description} | {run('benchmarks.memory', name).split()[-1]} |", flush=True)


if __name__ == "__main__":
    main()
