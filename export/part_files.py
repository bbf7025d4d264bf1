"""A folder with one file per part of a pipeline, its tokenizer and its scheduler, checked before it appears.

A format has a function `write(sd, folder, height, width, …)` that ends in `write_folder`, and a module with `SUFFIX`
and `load(path)`, which opens one file with the format's own runtime (and imports neither Keras nor TensorFlow): a
function from dict of arrays to dict of arrays.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

EXPECTED = "{}.expected.npz"  # inputs and outputs of a part, while the folder is being checked


def write_folder(sd, folder, parts, runtime, write_part, tolerance):
    """Writes a folder under a temporary name, compares it with Keras in a fresh process, then renames it.

    Args:
        sd: the `StableDiffusion` that they are of.
        folder: where to; nothing may be there yet.
        parts: dict name → `export.parts.Part`.
        runtime: name of the module with `SUFFIX` and `load`.
        write_part: function (part, path) that writes one file.
        tolerance: how far an output may be from Keras's, as root mean square over the output's own.

    Raises:
        FileExistsError: something is at `folder`.
        ValueError: the files do not compute what Keras does.
        NotADirectoryError, PermissionError: the folder cannot be made.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is there already, and is not overwritten; name another folder.")
    suffix = importlib.import_module(runtime).SUFFIX
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        beside = Path(temporary) / folder.name
        beside.mkdir()
        for name, part in parts.items():
            write_part(part, beside / f"{name}{suffix}")
            inputs = part.example()
            outputs = {f"output/{key}": value for key, value in part(inputs).items()}
            np.savez(beside / EXPECTED.format(name), **{f"input/{key}": x for key, x in inputs.items()}, **outputs)
        sd.tokenizer.save(beside / "tokenizer")
        (beside / "scheduler_config.json").write_text(json.dumps(sd.checkpoint.scheduler(), indent=2) + "\n")
        _check_in_a_fresh_process(runtime, beside, tolerance)
        for path in beside.glob(EXPECTED.format("*")):
            path.unlink()
        beside.rename(folder)  # fails where somebody else's files have appeared meanwhile


def check(runtime, folder, tolerance):
    """Loads every file of a folder and compares its outputs with the expected ones; returns the errors by name.

    Raises:
        ValueError: an output has another shape, is not finite, or is too far off.
    """
    module = importlib.import_module(runtime)
    errors = {}
    for path in sorted(Path(folder).glob(EXPECTED.format("*"))):
        arrays = np.load(path)
        name = path.name.removesuffix(EXPECTED.format(""))
        part = module.load(path.with_name(name + module.SUFFIX))
        outputs = part({key.removeprefix("input/"): arrays[key] for key in arrays if key.startswith("input/")})
        for key in (key for key in arrays if key.startswith("output/")):
            found, wanted = outputs[key.removeprefix("output/")], arrays[key]
            if found.shape != wanted.shape:
                raise ValueError(f"{name}: {key} has shape {found.shape}; Keras gives {wanted.shape}.")
            error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))
            if not error <= tolerance:  # NaN is an error too
                raise ValueError(f"{name}: {key} differs from Keras by {error:.2g}, of {tolerance:g} allowed.")
            errors[f"{name} {key}"] = error
    return errors


def _check_in_a_fresh_process(runtime, folder, tolerance):
    command = [sys.executable, "-m", "export.part_files", runtime, str(folder.resolve()), str(tolerance)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"the check ended with status {run.returncode}"]
        raise ValueError(f"The exported files do not pass their check, and were not kept: {lines[-1]}")


if __name__ == "__main__":
    check(sys.argv[1], sys.argv[2], float(sys.argv[3]))
