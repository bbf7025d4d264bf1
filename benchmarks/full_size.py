"""SD v1's models at full size with random weights, as a preset folder of 2 GB. `python -m benchmarks.full_size`"""

import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parents[1] / "runs" / "full_size"


def full_size_preset(folder=FOLDER):
    """The folder; it is written if it is not there."""
    if not (folder / "model_index.json").exists():
        from keras_sd import CLIPTokenizer, Decoder, DiffusionModel, ImageEncoder, TextEncoder
        from keras_sd.checkpoint import SD_SCHEDULER
        from keras_sd.weights.diffusers_folder import write_folder

        models = (cls(dtype="bfloat16") for cls in (TextEncoder, DiffusionModel, ImageEncoder, Decoder))
        write_folder(folder, CLIPTokenizer([("a", "p")]), *models, SD_SCHEDULER, (512, 512))
    return folder


def write_apart():
    """Writes it in a process of its own, whose memory and imports do not count."""
    subprocess.run([sys.executable, "-m", "benchmarks.full_size"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    print(full_size_preset())
