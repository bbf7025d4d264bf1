"""The command line: `python -m keras_sd txt2img "red apple on a blue background" --preset emoji --out out.png`."""

import argparse
import os
import pathlib
import sys
import warnings

EPILOG = (
    "KERAS_BACKEND chooses tensorflow, jax, torch or openvino. KERAS_SD_TRACEBACK=1 shows where an error came from."
)


def build_parser():
    """The parser; a command's function is its `run`."""
    parser = argparse.ArgumentParser(prog="python -m keras_sd", description="Stable Diffusion in Keras.", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--preset", default="emoji", help="preset, path or hf://owner/name (default emoji)")
    model.add_argument("--ckpt", help="a checkpoint on disk, instead of --preset")
    model.add_argument("--tokenizer", help="merges file or tokenizer folder, for a checkpoint that carries none")
    model.add_argument("--dtype", help="float32, bfloat16 or float16")

    draw = argparse.ArgumentParser(add_help=False, parents=[model])
    draw.add_argument("prompt", nargs="?", help="what to draw")
    draw.add_argument("--prompt", dest="prompt_option", metavar="PROMPT", help="the same, as an option")
    draw.add_argument("--negative-prompt", "--negative_prompt", default="", help="what to steer away from")
    draw.add_argument("--steps", "--ddim_steps", "--ddim-steps", type=int, default=25, help="steps (default 25)")
    draw.add_argument("--sampler", help="one of keras_sd.SAMPLERS (default: the preset's own)")
    draw.add_argument("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    draw.add_argument("--karras", action="store_true", help="noise levels spaced as in Karras et al. (2022)")
    draw.add_argument("--ddim_eta", "--ddim-eta", "--eta", type=float, help="noise that ddim and tcd add, 0 … 1")
    draw.add_argument("--scale", type=float, default=7.5, help="guidance scale (default 7.5; 1 is no guidance)")
    draw.add_argument("--H", "--height", dest="height", type=int, help="height in pixels")
    draw.add_argument("--W", "--width", dest="width", type=int, help="width in pixels")
    draw.add_argument("--seed", type=int, help="seed of the first picture (default: a random one)")
    draw.add_argument("--n_samples", "--n-samples", type=int, default=1, help="pictures at once (default 1)")
    draw.add_argument("--n_iter", "--n-iter", type=int, default=1, help="how often (default 1)")
    target = draw.add_mutually_exclusive_group()
    target.add_argument("--out", help="PNG to write (default out.png); several become out-0.png, out-1.png, …")
    target.add_argument("--outdir", help="folder for numbered PNGs; no file in it is overwritten")
    draw.add_argument("--quiet", action="store_true", help="no progress bar")

    start = argparse.ArgumentParser(add_help=False)
    start.add_argument("--init-img", "--init_img", required=True, help="picture to start from")

    txt2img = commands.add_parser("txt2img", parents=[draw], help="draw pictures from text")
    txt2img.set_defaults(run=lambda args: draw_pictures(args, "text_to_image"))
    img2img = commands.add_parser("img2img", parents=[draw, start], help="change a picture")
    img2img.add_argument("--strength", type=float, default=0.8, help="how much to change, 0 … 1 (default 0.8)")
    img2img.set_defaults(run=lambda args: draw_pictures(args, "image_to_image"))
    inpaint = commands.add_parser("inpaint", parents=[draw, start], help="repaint a part of a picture")
    inpaint.add_argument("--mask", required=True, help="picture that is white where to repaint")
    inpaint.add_argument("--strength", type=float, default=1.0, help="how much to change, 0 … 1 (default 1)")
    inpaint.set_defaults(run=lambda args: draw_pictures(args, "inpaint"))

    presets = commands.add_parser("presets", help="list the built-in presets")
    presets.set_defaults(run=list_presets)
    convert = commands.add_parser("convert", parents=[model], help="any format → a folder in the diffusers layout")
    convert.add_argument("target", help="folder to write")
    convert.add_argument("--store", help="dtype to store: float32, float16 or bfloat16 (default: that of the weights)")
    convert.set_defaults(run=convert_checkpoint)
    return parser


def main(arguments=None):
    """Runs a command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    try:
        args = build_parser().parse_args(arguments)
    except SystemExit as stop:
        return stop.code
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("KERAS_SD_TRACEBACK"):
            raise
        print(f"Error: {error or type(error).__name__}", file=sys.stderr)
        return 1


def draw_pictures(args, method):
    """txt2img, img2img and inpaint."""
    if (args.prompt is None) == (args.prompt_option is None):
        raise ValueError("Give one prompt: as an argument or with --prompt.")
    for flag, value in (("--n_samples", args.n_samples), ("--n_iter", args.n_iter), ("--steps", args.steps)):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1; got {value}.")
    count = args.n_samples * args.n_iter
    paths = output_paths(args.out, args.outdir, count)

    from keras_sd.png import check_writable, write_png

    for path in paths:
        check_writable(path)

    import secrets

    sd = open_model(args)
    prompt = args.prompt if args.prompt is not None else args.prompt_option
    seed = secrets.randbits(31) if args.seed is None else args.seed
    options = {"karras": True} if args.karras else {}
    options |= {} if args.ddim_eta is None else {"eta": args.ddim_eta}
    pictures = {"image_to_image": ("init_img",), "inpaint": ("init_img", "mask")}.get(method, ())
    options |= {"strength": args.strength} if pictures else {}
    for i in range(args.n_iter):
        first = i * args.n_samples
        images = getattr(sd, method)(
            *(getattr(args, name) for name in pictures),
            prompt,
            negative_prompt=args.negative_prompt or None,
            batch_size=args.n_samples,
            num_steps=args.steps,
            unconditional_guidance_scale=args.scale,
            seed=seed + first,
            sampler=args.sampler,
            height=args.height,
            width=args.width,
            progress=not args.quiet,
            **options,
        )
        for j, (path, image) in enumerate(zip(paths[first:], images), start=first):
            fields = {
                "Steps": args.steps,
                "Sampler": args.sampler or sd.scheduler[1],
                "CFG_scale": args.scale,
                "Seed": seed + j,
                "Size": f"{image.shape[1]}x{image.shape[0]}",
                "Model": pathlib.Path(args.ckpt or args.preset).name,
            }
            strength = {"Denoising_strength": args.strength} if pictures else {}
            write_png(path, image, prompt, args.negative_prompt, **fields, **strength)
            print(path)
    print(f"seed {seed}")


def output_paths(out, outdir, count):
    """Where `count` pictures go."""
    if outdir is not None:
        folder = pathlib.Path(outdir)
        taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit()] if folder.is_dir() else []
        return [folder / f"{i:05d}.png" for i in range(max(taken, default=-1) + 1, max(taken, default=-1) + 1 + count)]
    path = pathlib.Path(out or "out.png")
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def open_model(args):
    """The `StableDiffusion` that --preset, --ckpt, --tokenizer and --dtype name."""
    from keras_sd.presets import locate

    source = locate(args.ckpt or args.preset)
    start_backend()
    from keras_sd.stable_diffusion import StableDiffusion

    return StableDiffusion.from_preset(source, dtype=args.dtype, tokenizer=args.tokenizer)


def start_backend():
    """Imports Keras with the backend's start-up notes, which C++ writes to file descriptor 2, kept off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import keras

        keras.ops.zeros(1)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def list_presets(args):
    """presets: names, sources and licences."""
    from keras_sd.presets import PRESETS

    for name, preset in PRESETS.items():
        print(f"{name:14} {preset.size:8} {preset.licence:26} {preset.source}")


def convert_checkpoint(args):
    """convert: opens a checkpoint and saves it as a preset."""
    open_model(args).save_preset(args.target, args.store)
    print(args.target)


if __name__ == "__main__":
    sys.exit(main())
