"""The command line: `python -m export --preset emoji --out models`."""

import argparse
import importlib
import sys

from keras_sd.__main__ import with_suffix

# Stated here too, since help should not wait for TensorFlow; a test compares them with export.signatures.MODELS.
NAMES = ("text_encoder", "diffusion_model", "decoder", "image_encoder", "stable_diffusion", "denoiser")
FORMATS = ("saved_model", "litert", "openvino", "onnx")
SAVED_MODEL_ONLY = ("only", "version", "xla", "warmup", "serving_root")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Writes SavedModels that TF-Serving hosts, or files for LiteRT, OpenVINO or ONNX.",
    )
    add = parser.add_argument
    add("--preset", required=True, help="built-in name, path or hf://owner/name of the model")
    add("--out", required=True, help="folder: OUT/NAME/VERSION/, OUT/models.config, OUT/batching.config are written")
    add("--format", choices=FORMATS, default="saved_model", help="what to write (default: saved_model)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and arithmetic")
    add("--vae", metavar="PATH", help="another autoencoder: folder, .safetensors, .ckpt or hf://owner/name")
    append = {"action": "append", "default": []}
    add("--lora", type=with_suffix(float), metavar="PATH[:SCALE]", help="LoRA to merge in; may be repeated", **append)
    add(
        "--embedding",
        type=with_suffix(str),
        metavar="PATH[:TOKEN]",
        help="textual inversion; may be repeated",
        **append,
    )
    add("--height", type=_side, help="of the pictures in pixels, or 'dynamic' (default: the preset's)")
    add("--width", type=_side, help="of the pictures in pixels, or 'dynamic' (default: the preset's)")
    group = parser.add_argument_group("SavedModels").add_argument
    group("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)} (default: all but denoiser)")
    group("--version", type=int, help="version number (default: the next that is free)")
    group(
        "--xla",
        action="store_true",
        default=None,
        help="compile with XLA; TF-Serving then needs --xla_cpu_compilation_enabled",
    )
    group("--warmup", type=int, nargs="+", metavar="BATCH", help="batch sizes of the warm-up requests (default: 1)")
    group("--serving-root", help="where the server sees OUT, e.g. /models, for models.config (default: its own path)")
    group = parser.add_argument_group("LiteRT").add_argument
    group("--precision", choices=("float32", "float16", "int8"), help="of the weights (default: float16)")
    return parser


def _side(text):
    return text if text == "dynamic" else int(text)


def main(arguments=None):
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = {name: value for name in SAVED_MODEL_ONLY if (value := getattr(options, name)) is not None}
    if options.format != "saved_model" and given:
        parser.error(f"--{next(iter(given)).replace('_', '-')} is for --format saved_model; got {options.format}.")
    if options.format != "litert" and options.precision is not None:
        parser.error(f"--precision is for --format litert; got {options.format}. For the others there is --dtype.")
    if min([options.version if options.version is not None else 1, *(options.warmup or [])]) < 1:
        parser.error("--version and --warmup take integers of at least 1.")

    from keras_sd import StableDiffusion

    try:
        sd = StableDiffusion.from_preset(options.preset, dtype=options.dtype, vae=options.vae)
        for path, token in options.embedding:
            sd.load_textual_inversion(path, token)
        for path, scale in options.lora:
            sd.load_lora(path, 1.0 if scale is None else scale, name=path)
        sides = (("height", options.height), ("width", options.width))
        size = [None if side == "dynamic" else side or sd.image_size[i] for i, (_, side) in enumerate(sides)]
        if options.format == "saved_model":
            from export.saved_model import export_saved_models

            for folder in export_saved_models(sd, options.out, size=tuple(size), **given).values():
                print(folder)
        else:
            if None in size:
                raise ValueError(f"--height and --width: {options.format} files have one size; got 'dynamic'.")
            precision = {"precision": options.precision or "float16"} if options.format == "litert" else {}
            importlib.import_module(f"export.{options.format}").write(sd, options.out, *size, **precision)
            print(options.out)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
