"""Peak memory at SD v1's full size, random weights: each case in a process of its own. `python -m benchmarks.memory`

    python -m benchmarks.memory               a Markdown table of all cases, and ratios to diffusers
    python -m benchmarks.memory picture       one case; prints its peak resident memory in GB (10⁹ bytes)

Whole pictures read their models from `runs/full_size`, which is written before, outside the measurement.
"""

import argparse

import numpy as np

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.inference import open_diffusers
from benchmarks.paired import in_turn, peak_memory, process, ratios, spread


def picture(**options):
    """Text to picture, two denoising steps: more cost time, not memory."""
    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(FOLDER, **options)
    image = sd.text_to_image("an apple", num_steps=2, seed=0, progress=False)
    assert np.ptp(image) > 0


def diffusers():
    """The same with diffusers."""
    open_diffusers(FOLDER, "bfloat16")("an apple", num_inference_steps=2, output_type="np")


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
    "diffusers": ("text to a 512×512 picture, bfloat16, diffusers, channels last", diffusers),
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
AGAINST_DIFFUSERS = ("picture", "two_passes", "low_memory")


def run(*arguments):
    """What a module prints in a process of its own."""
    return process("-m", *arguments)[1]


def measured(name):
    """Peak memory of one case, in bytes."""
    try:
        return {"peak_memory": 1e9 * float(run("benchmarks.memory", name).split()[-1])}
    except RuntimeError as error:
        return {"error": str(error)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES, help="one case (default: a table of all)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, those of earlier calls included (default 1)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of earlier calls")
    args = parser.parse_args()
    if args.case is not None:
        CASES[args.case][1]()
        return print(round(peak_memory() / 1e9, 2))
    write_apart()
    rounds = in_turn("memory", "all", [*CASES], args.rounds, measured, args.fresh)
    print(table(rounds))
    for name in AGAINST_DIFFUSERS:
        print(f"{name} / diffusers: {spread(ratios(rounds, name, 'diffusers', 'peak_memory'))}")


def table(rounds):
    """Markdown: the peak of every case in GB, the median of its rounds."""
    lines = ["| what | peak GB |", "|---|---|"]
    for name, (description, _) in CASES.items():
        peaks = [one[name]["peak_memory"] / 1e9 for one in rounds if "peak_memory" in one.get(name, {})]
        lines.append(f"| {description} | {np.median(peaks):.2f} |" if peaks else f"| {description} | – |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
