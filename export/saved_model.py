"""Writes SavedModels as TF-Serving hosts them: `out/NAME/VERSION/`, models.config and batching.config."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

import keras_sd
from export.examples import examples
from export.signatures import MODELS
from export.verify import DESCRIPTION, WARMUP, write_requests

DEFAULT = tuple(name for name in MODELS if name != "denoiser")  # what is written unless somebody asks for others


def export_saved_models(
    sd, out, only=DEFAULT, version=None, size=(None, None), xla=False, warmup=(1,), serving_root=None
):
    """Exports a pipeline.

    Everything is written beside its place, reloaded in a fresh process, compared with the pipeline, and only then
    renamed: a server that watches the folder sees whole, right versions or none.

    Args:
        sd: a `StableDiffusion` on the TensorFlow backend.
        out: folder of the models; `out/NAME/VERSION/` is written.
        only: names from `MODELS`; by default all but `denoiser`.
        version: integer from 1 on; by default the next that is free for all of them.
        size: (height, width) of the pictures in pixels; None leaves that side open.
        xla: compile the networks with XLA. TF-Serving refuses such models unless started with
            `--xla_cpu_compilation_enabled`.
        warmup: batch sizes of the warm-up requests.
        serving_root: where the server will see `out`, for models.config; by default its absolute path.

    Returns:
        dict name → Path of the version.

    Raises:
        FileExistsError: that version is there already.
        ValueError: an unknown name, a wrong size, or the reloaded models do not answer as the pipeline does.
    """
    out = Path(out)
    unknown = [name for name in only if name not in MODELS]
    if unknown or not only:
        raise ValueError(
            f"only: {', '.join(unknown) or 'nothing'} cannot be exported; choose from {', '.join(MODELS)}."
        )
    sd.latent_shape(*size)  # a wrong size is said before anything is built
    version = _next_version(out, only) if version is None else version
    taken = [str(out / name / str(version)) for name in only if _versions(out / name).get(version)]
    if taken:
        raise FileExistsError(f"{taken[0]} exists; versions are never overwritten. Free: {_next_version(out, only)}.")

    sd.keep("text_encoder", "diffusion_model", "image_encoder", "decoder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as staging:
        folders = {name: Path(staging) / name / str(version) for name in only}
        for name, folder in folders.items():
            _write(sd, name, folder, size, xla, warmup)
        _verify(folders.values())
        for name, folder in folders.items():
            (out / name).mkdir(exist_ok=True)
            target = out / name / str(version)
            if target.exists():
                raise FileExistsError(f"{target} appeared meanwhile; versions are never overwritten.")
            os.rename(folder, target)
    write_config(out, serving_root)
    return {name: out / name / str(version) for name in only}


def _write(sd, name, folder, size, xla, warmup):
    compiled = functools.partial(tf.function, autograph=False, jit_compile=xla or None)
    module = MODELS[name](sd, size, compiled)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(folder), signatures=module.signatures_, options=options)
    requests = (request for batch_size in warmup for request in examples(sd, name, size, batch_size))
    write_requests(folder / WARMUP, name, requests)
    description = {
        "model": name,
        "preset": str(sd.preset),
        "dtype": keras.dtype_policies.get(sd.dtype or keras.config.dtype_policy()).compute_dtype,
        "height": size[0],
        "width": size[1],
        "xla": bool(xla),
        "keras_sd": keras_sd.__version__,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _verify(folders):
    command = [sys.executable, "-m", "export.verify", *map(str, folders)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        message = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise ValueError(f"The export does not pass its own check, and was not kept: {message.removeprefix('error: ')}")


def _versions(folder):
    """Version number → folder, for every sub-folder whose name is an integer."""
    folders = folder.iterdir() if folder.is_dir() else ()
    return {int(path.name): path for path in folders if path.is_dir() and path.name.isdecimal()}


def _next_version(out, names):
    return 1 + max((version for name in names for version in _versions(out / name)), default=0)


# === The server's configuration ===

BATCHING = """\
# Of --batching_parameters_file. A batch waits 20 ms at most for company.
max_batch_size { value: 8 }
batch_timeout_micros { value: 20000 }
max_enqueued_batches { value: 64 }
num_batch_threads { value: 2 }
"""


def write_config(out, serving_root=None):
    """Writes models.config (all models that have a version) and, where there is none, batching.config."""
    root = Path(out).resolve() if serving_root is None else serving_root
    names = [name for name in MODELS if _versions(out / name)]
    models = "".join(
        f"  config {{\n    name: {json.dumps(name)}\n    base_path: {json.dumps(f'{root}/{name}')}\n"
        f'    model_platform: "tensorflow"\n  }}\n'
        for name in names
    )
    _write_text(out / "models.config", f"model_config_list {{\n{models}}}\n")
    if not (out / "batching.config").exists():
        _write_text(out / "batching.config", BATCHING)


def _write_text(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
