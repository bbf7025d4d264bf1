"""Peak memory at SD v1's full size, random weights: each case in a process of its own. `python -m benchmarks.memory`

    python -m benchmarks.memory               a Markdown table of all cases, and ratios to diffusers
    python -m benchmarks.memory picture       one case; prints its peak resident memory in GB (10⁹ bytes)

Whole pictures read their models from `runs/full_size`, which is written before, outside the measurement. Ours are
drawn by the command line, which imports less than Keras does by itself, and where it says so from Python; diffusers' by
a script.
"""

import argparse
import os
import pathlib
import resource
import tempfile

import numpy as np

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.inference import open_diffusers
from benchmarks.paired import in_turn, markdown, peak_memory, process, ratios, spread


def command(backend, *options):
    """`python -m keras_sd txt2img` with two denoising steps, more of which cost time, not memory; its peak in bytes."""
    preset = ("--preset", FOLDER, "--dtype", "bfloat16", "--steps", 2, "--seed", 0)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "apple.png"
        process("-m", "keras_sd", "txt2img", "an apple", *preset, "--out", out, *options, KERAS_BACKEND=backend)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def picture(backend):
    """The same from Python."""
    os.environ["KERAS_BACKEND"] = backend
    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(FOLDER, dtype="bfloat16")
    image = sd.text_to_image("an apple", num_steps=2, seed=0, progress=False)
    assert np.ptp(image) > 0


def diffusers(channels_last):
    """The same with diffusers."""
    open_diffusers(FOLDER, "bfloat16", channels_last)("an apple", num_inference_steps=2, output_type="np")


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


PICTURES = {  # name: what is drawn with, how
    "picture": ("TensorFlow", lambda: command("tensorflow")),
    "picture_python": ("TensorFlow, from Python", lambda: picture("tensorflow")),
    "two_passes": ("TensorFlow, `two_pass_guidance=True`", lambda: command("tensorflow", "--two-pass-guidance")),
    "low_memory": ("TensorFlow, `low_memory=True`", lambda: command("tensorflow", "--low-memory")),
    "openvino": ("OpenVINO", lambda: command("openvino")),
    "openvino_python": ("OpenVINO, from Python", lambda: picture("openvino")),
    "openvino_low_memory": ("OpenVINO, `low_memory=True`", lambda: command("openvino", "--low-memory")),
    "diffusers": ("diffusers", lambda: diffusers(False)),
    "diffusers_channels_last": ("diffusers, channels last", lambda: diffusers(True)),
}
PARTS = {
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
}
CASES = {**PICTURES, **PARTS}
GROUPS = {"pictures": PICTURES, "parts": PARTS}
OURS, PEERS = [*PICTURES][:-2], [*PICTURES][-2:]


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
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[*GROUPS], help="default: all")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, those of earlier calls included (default 1)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of earlier calls")
    args = parser.parse_args()
    if args.case is not None:
        peak = CASES[args.case][1]() or peak_memory()
        return print(round(peak / 1e9, 3))
    write_apart()
    for group in args.group:
        print(table(in_turn("memory", group, [*GROUPS[group]], args.rounds, measured, args.fresh), group))


def table(rounds, group):
    """Markdown: the peak of every case in GB, the median of its rounds, and of pictures the ratios to diffusers'."""
    peers = PEERS if group == "pictures" else ()
    head = [group, "peak GB", *(f"/ {PICTURES[peer][0]}" for peer in peers)]
    rows = []
    for name, (description, _) in GROUPS[group].items():
        peaks = [one[name]["peak_memory"] / 1e9 for one in rounds if "peak_memory" in one.get(name, {})]
        shares = (spread(ratios(rounds, name, peer, "peak_memory")) for peer in peers)
        rows.append([description, f"{np.median(peaks):.2f}" if peaks else "–", *shares])
    return markdown(head, rows)


if __name__ == "__main__":
    main()
