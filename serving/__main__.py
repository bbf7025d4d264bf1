"""The command line: draw on servers, or start one.

python -m serving serve --models models
python -m serving txt2img "red apple on a blue background" --host gpu-1:8500 --host gpu-2:8500
"""

import argparse
import json
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
import warnings

from keras_sd import __main__ as drawing

EPILOG = "KERAS_SD_TRACEBACK=1 shows where an error came from."
COMMANDS = {
    "txt2img": "draw pictures from text",
    "img2img": "change a picture",
    "inpaint": "repaint a part of a picture",
}
SHARED = set(  # what of `python -m keras_sd`'s arguments has a meaning here
    "help prompt prompt_option negative_prompt steps sampler karras ddim_eta scale height width seed n_samples n_iter "
    "out outdir preview quiet init_img mask strength".split()
)
SERVER = "tensorflow_model_server"
TIMEOUT = 600_000  # milliseconds that a picture may take over REST; the server's own default is 30 s


def build_parser():
    """The parser; a command's function is its `run`, which takes the arguments and those that are not known here."""
    parser = drawing.Parser(
        prog="python -m serving", description="Draw on TF-Serving hosts, or start one.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        add_drawing(commands, name, text)
    command = commands.add_parser(
        "serve",
        help="start a server",
        epilog=f"All other flags are the server's own, as --name=value. {EPILOG}",
        allow_abbrev=False,
    )
    command.add_argument("--models", metavar="DIR", help="folder that python -m export wrote")
    command.add_argument("--local", action="store_true", help=f"the project's own server, not {SERVER}")
    command.set_defaults(run=serve, usage_error=command.error)
    return parser


def add_drawing(commands, name, text):
    """A command with the flags of `python -m keras_sd`, but for those that choose the model: that is the server's."""
    theirs = next(x for x in drawing.build_parser()._actions if isinstance(x, argparse._SubParsersAction)).choices[name]
    command = commands.add_parser(
        name, parents=[theirs], help=text, epilog=EPILOG, add_help=False, conflict_handler="resolve"
    )
    for action in theirs._actions:
        if action.dest not in SHARED:
            command.add_argument(*action.option_strings, action=Refuse)
    host = command.add_argument_group("server")
    host.add_argument(
        "--host", action="append", help="HOST[:PORT] or URL; give more, and they take over from each other"
    )
    host.add_argument("--rest", action="store_true", help="reach HOST through REST (port 8501) instead of gRPC (8500)")
    host.add_argument("--tls", action="store_true", help="encrypt the connection")
    host.add_argument("--ca", metavar="FILE", help="the same, with the certificates to trust (PEM)")
    host.add_argument("--timeout", type=drawing.number(float, 0.001), default=300.0, help="seconds a request may take")
    host.add_argument("--chunk", type=drawing.number(int, 1), default=5, help="steps per request (default 5)")
    command.set_defaults(run=draw_pictures, usage_error=command.error)


class Refuse(argparse.Action):
    """A flag that has no meaning here."""

    def __init__(self, option_strings, dest):
        super().__init__(option_strings, dest, nargs=0, help=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, flag):
        parser.error(f"{flag} is for python -m keras_sd, not for served models")


def main(arguments=None):
    """Runs a command; returns the exit code: 0, 1 for a server's error, 2 for bad input, 130 when interrupted."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it logs is in the errors, too
    try:
        args, others = build_parser().parse_known_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
            return args.run(args, others) or 0
    except SystemExit as stop:  # argparse's way to say that the help was shown, or that the usage is wrong
        return stop.code or 0
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("KERAS_SD_TRACEBACK"):
            raise
        print(f"Error: {drawing.sentence(error).removeprefix('ServerError: ')}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, TypeError, OSError)) else 1


# === txt2img, img2img, inpaint ===


def draw_pictures(args, others):
    """Draws and writes pictures; what can be wrong is said before a server is asked."""
    if others:
        args.usage_error(f"unrecognized arguments: {' '.join(others)}")
    if (args.prompt is None) == (args.prompt_option is None):
        args.usage_error("give one prompt, as an argument or with --prompt")
    prompt = args.prompt if args.prompt is not None else args.prompt_option
    sampler, options = drawing.read_sampler(args)
    drawing.check_output(args)
    pictures = drawing.open_pictures(args)
    options |= {"strength": args.strength} if pictures else {}

    from serving.client import Client

    rest, tls = args.rest, args.ca or args.tls
    with Client(args.host or ["localhost"], rest=rest, tls=tls, timeout=args.timeout) as client:
        args.ckpt, args.preset = None, client.config["preset"]
        seed = secrets.randbits(31) if args.seed is None else args.seed
        for first in range(0, args.n_samples * args.n_iter, args.n_samples):
            images = getattr(client, args.method)(
                *pictures,
                prompt,
                negative_prompt=args.negative_prompt or None,
                batch_size=args.n_samples,
                num_steps=args.steps,
                unconditional_guidance_scale=args.scale,
                seed=seed + first,
                sampler=sampler,
                height=args.height,
                width=args.width,
                chunk=args.chunk,
                callback=previewer(client, args.preview) if args.preview else None,
                progress=not args.quiet and sys.stderr.isatty(),
                **options,
            )
            for i, image in enumerate(images, start=first):
                described = drawing.described(args, client, sampler, seed + i, image)
                path = drawing.write_picture(args, i, image, prompt, described)
                print(f"{path}: seed {seed + i}", flush=True)


def previewer(client, path):
    """A callback that writes the first picture, as far as it is, to a file."""
    from keras_sd.weights.files import atomic_file

    def preview(row, rows, latent):
        (picture,) = client.decode_png(latent[:1])
        with atomic_file(path) as file:
            file.write(picture)

    return preview


# === serve ===


def serve(args, flags):
    """Becomes `tensorflow_model_server` where there is one, else runs the project's own server, until it is stopped."""
    wrong = next((flag for flag in flags if not re.match(r"--\w+(=|$)", flag)), None)
    if wrong is not None:
        args.usage_error(f"the server's flags are written --name=value; got {wrong!r}")
    given = {flag[2:].partition("=")[0]: flag.partition("=")[2] for flag in flags}
    models = given.keys() & {"model_config_file", "model_name", "model_base_path"}
    if args.models is None and not models:
        args.usage_error("name the models: --models DIR, or the server's --model_config_file= or --model_base_path=")
    if args.models is not None and models:
        args.usage_error(f"--models and --{min(models)} exclude each other")

    own = {"port": 8500, "rest_api_port": 8501, "rest_api_timeout_in_ms": TIMEOUT}
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        if args.models is not None:
            own |= folder_flags(pathlib.Path(args.models), pathlib.Path(scratch), given)
        flags = [f"--{name}={value}" for name, value in own.items() if name not in given] + flags
        if not args.local and shutil.which(SERVER):
            os.execvp(SERVER, [SERVER, *flags])  # does not return; what is in `scratch` stays for the server
        if not args.local:
            print(f"{SERVER} is not on the PATH: this is the project's own server.", file=sys.stderr)

        from serving.local.__main__ import main as serve_locally

        return serve_locally(flags)


def folder_flags(folder, scratch, given):
    """The server's flags for a folder of models; `given` are the user's."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--models: there is no folder {str(folder)!r}.")
    versions = [path for path in folder.resolve().glob("*/*/saved_model.pb") if path.parent.name.isdecimal()]
    if not versions:
        raise ValueError(f"--models: {str(folder)!r} holds no models, that is no NAME/VERSION/saved_model.pb.")
    flags = {"model_config_file": config_file(folder.resolve(), {path.parents[1] for path in versions}, scratch)}
    batching = folder.resolve() / "batching.config"
    if given.get("enable_batching", "false") in ("", "true", "1") and batching.is_file():
        flags["batching_parameters_file"] = batching
    if any(compiled(path.parent) for path in versions):  # a stock server refuses XLA otherwise
        flags["xla_cpu_compilation_enabled"] = "true"
    return flags


def config_file(folder, models, scratch):
    """models.config, or where it names folders of another machine, one that is written for what is here."""
    written = folder / "models.config"
    if written.is_file():
        named = re.findall(r"""base_path\s*:\s*(["'])(.*?)\1""", written.read_text())
        if named and all(os.path.isdir(path) for _, path in named):
            return written
    config = "".join(
        f"  config {{\n    name: {json.dumps(model.name)}\n    base_path: {json.dumps(str(model))}\n"
        '    model_platform: "tensorflow"\n  }\n'
        for model in sorted(models)
    )
    path = scratch / "models.config"
    path.write_text(f"model_config_list {{\n{config}}}\n")
    return path


def compiled(version):
    """Whether a SavedModel was exported with XLA."""
    try:
        return bool(json.loads((version / "assets.extra" / "export.json").read_text()).get("xla"))
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
