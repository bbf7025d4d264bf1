"""The command line: `python -m keras_sd txt2img "red apple on a blue background" --preset emoji --out out.png`.

Keras takes seconds to import, so nothing here imports it before the arguments are known to be right.
"""

import argparse
import contextlib
import gc
import os
import pathlib
import sys
import warnings

FLOATS = "float32", "bfloat16", "float16"
EPILOG = (
    "KERAS_BACKEND chooses tensorflow, jax, torch or openvino. KERAS_SD_TRACEBACK=1 shows where an error came from."
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the list of all options."""

    def error(self, message):
        self.exit(2, f"Error: {message} ({self.prog} --help shows the options)\n")


def number(kind, least, most=float("inf")):
    """An argument type: an integer or a number in a range."""

    def parse(text):
        limit = f" from {least} to {most}" if most < float("inf") else f" of at least {least}"
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name}{limit}; got {text!r}")
        return value

    return parse


def with_suffix(kind):
    """An argument type: PATH or PATH:SUFFIX, where a suffix that is not of its kind is a part of the path."""

    def parse(text):
        path, _, suffix = text.rpartition(":")
        try:
            return (text, None) if not path or os.path.exists(text) else (path, kind(suffix))
        except ValueError:
            return text, None

    return parse


def build_parser():
    """The parser; a command's function is its `run`."""
    parser = Parser(prog="python -m keras_sd", description="Stable Diffusion in Keras.", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--tokenizer", help="merges file or tokenizer folder, for a checkpoint that carries none")
    model.add_argument("--vae", metavar="PATH", help="another autoencoder: folder, .safetensors, .ckpt or hf://…")

    draw = argparse.ArgumentParser(add_help=False, parents=[model])
    draw.add_argument("--preset", default="emoji", help="preset, path or hf://owner/name (default emoji)")
    draw.add_argument("--dtype", choices=FLOATS, help="dtype of the models")
    draw.add_argument("--ckpt", help="a checkpoint on disk, instead of --preset")
    draw.add_argument("--negative-prompt", "--negative_prompt", default="", help="what to steer away from")
    draw.add_argument(
        "--steps", "--ddim_steps", "--ddim-steps", type=number(int, 1), default=25, help="steps (default 25)"
    )
    draw.add_argument("--sampler", help="one of keras_sd.SAMPLERS (default: the preset's own)")
    draw.add_argument("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    draw.add_argument("--karras", action="store_true", help="noise levels spaced as in Karras et al. (2022)")
    draw.add_argument(
        "--ddim_eta",
        "--ddim-eta",
        "--eta",
        type=number(float, 0, 1),
        help="noise that ddim and tcd add, 0 … 1; chooses ddim where --sampler does not choose",
    )
    draw.add_argument("--scale", type=float, default=7.5, help="guidance scale (default 7.5; 1 is no guidance)")
    draw.add_argument("--seed", type=number(int, 0), help="seed of the first picture (default: a random one)")
    draw.add_argument(
        "--lora",
        action="append",
        default=[],
        type=with_suffix(float),
        metavar="PATH[:SCALE]",
        help="LoRA to draw with (default scale 1); may be repeated",
    )
    draw.add_argument(
        "--lora-dir", "--lora_dir", default=".", metavar="DIR", help="where <lora:name:0.8> in a prompt is (default: .)"
    )
    draw.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=with_suffix(str),
        metavar="PATH[:TOKEN]",
        help="textual inversion to know (default token: its own); may be repeated",
    )
    draw.add_argument(
        "--ip-adapter",
        type=with_suffix(float),
        metavar="PATH[:SCALE]",
        help="IP-Adapter to look at a picture with (default scale 1)",
    )
    draw.add_argument("--image-prompt", metavar="PICTURE", help="the picture that the IP-Adapter looks at")
    draw.add_argument(
        "--image-encoder", metavar="PATH", help="its CLIP vision encoder (default: image_encoder/ beside it)"
    )
    draw.add_argument("--low-memory", action="store_true", help="hold one model at a time, and all that follows here")
    draw.add_argument("--two-pass-guidance", action="store_true", help="half the U-Net's memory, a little slower")
    draw.add_argument("--vae-slicing", action="store_true", help="decode the pictures of a batch one after another")
    draw.add_argument("--vae-tiling", action="store_true", help="decode a picture in parts, as large ones always are")
    draw.add_argument(
        "--cache-interval", type=number(int, 1), help="faster, not exact: the whole U-Net in every so many-th row only"
    )
    draw.add_argument(
        "--token-merging",
        type=number(float, 0, 0.75),
        help="the same: part of the tokens that attention merges, 0 … 0.75",
    )
    draw.add_argument(
        "--safety-checker", action="store_const", const=True, help="black out what the preset's safety checker flags"
    )
    draw.add_argument(
        "--safety-checker-from", dest="safety_checker", metavar="PATH", help="the same, with another one: its folder"
    )
    draw.add_argument(
        "--watermark", action="store_true", help="mark pictures invisibly, as the original scripts did (256 × 256 up)"
    )
    draw.add_argument("--preview", metavar="FILE", help="PNG to show the picture in, as it is every few steps")
    draw.add_argument("--quiet", action="store_true", help="no progress bar")

    batch = argparse.ArgumentParser(add_help=False)
    batch.add_argument("prompt", nargs="?", help="what to draw")
    batch.add_argument("--prompt", dest="prompt_option", metavar="PROMPT", help="the same, as an option")
    batch.add_argument(
        "--n_samples", "--n-samples", type=number(int, 1), default=1, help="pictures at once (default 1)"
    )
    batch.add_argument("--n_iter", "--n-iter", type=number(int, 1), default=1, help="how often (default 1)")
    target = batch.add_mutually_exclusive_group()
    target.add_argument("--out", help="PNG to write (default out.png); several become out-0.png, out-1.png, …")
    target.add_argument("--outdir", help="folder for numbered PNGs; no file in it is overwritten")

    vary = argparse.ArgumentParser(add_help=False)
    vary.add_argument(
        "--variation-strength", type=number(float, 0, 1), help="vary the picture of --seed so much, 0 … 1"
    )
    vary.add_argument("--variation-seed", type=number(int, 0), help="towards this seed (default: a random one)")

    size = argparse.ArgumentParser(add_help=False)
    size.add_argument("--H", "--height", dest="height", type=number(int, 1), help="height in pixels")
    size.add_argument("--W", "--width", dest="width", type=number(int, 1), help="width in pixels")

    control = argparse.ArgumentParser(add_help=False)
    each = {"action": "append", "default": []}
    control.add_argument("--control-net", **each, metavar="PATH", help="ControlNet to draw with; may be repeated")
    control.add_argument(
        "--control-image",
        **each,
        type=lambda path: (path, False),
        metavar="PICTURE",
        help="what it sees, one for each --control-net",
    )
    control.add_argument(
        "--canny",
        **each,
        type=lambda path: (path, True),
        dest="control_image",
        metavar="PICTURE",
        help="instead of a --control-image: the edges of this picture",
    )
    control.add_argument("--canny-low", type=number(float, 0), default=100.0, help="its lower threshold (default 100)")
    control.add_argument("--canny-high", type=number(float, 0), default=200.0, help="its upper one (default 200)")
    once = "; once, or for each --control-net"
    control.add_argument("--control-scale", **each, type=float, help=f"how much of it (default 1){once}")
    control.add_argument("--control-start", **each, type=number(float, 0, 1), help=f"its first step, 0 … 1{once}")
    control.add_argument("--control-end", **each, type=number(float, 0, 1), help=f"its last step, 0 … 1{once}")
    control.add_argument("--guess-mode", action="store_true", help="follow the ControlNet more than the prompt")

    start = argparse.ArgumentParser(add_help=False)
    start.add_argument("--init-img", "--init_img", required=True, help="picture to start from")

    def drawing(name, parents, method, strength, **kwargs):
        command = commands.add_parser(name, parents=parents, epilog=EPILOG, **kwargs)
        command.set_defaults(run=draw_pictures, method=method, usage_error=command.error)
        if strength is not None:
            text = f"how much to change, 0 … 1 (default {strength:g})"
            command.add_argument("--strength", type=number(float, 0, 1), default=strength, help=text)
        return command

    txt2img = drawing(
        "txt2img", [draw, batch, size, vary, control], "text_to_image", None, help="draw pictures from text"
    )
    txt2img.add_argument("--hires", type=number(float, 1), help="enlarge the latent so many times and draw on")
    txt2img.add_argument(
        "--hires-strength", type=number(float, 0, 1), help="how much to change then (default 0.7); alone: --hires 2"
    )
    drawing("img2img", [draw, batch, size, vary, control, start], "image_to_image", 0.8, help="change a picture")
    inpaint = drawing(
        "inpaint", [draw, batch, size, vary, control, start], "inpaint", 1.0, help="repaint a part of a picture"
    )
    inpaint.add_argument("--mask", required=True, help="picture that is white where to repaint")
    inpaint.add_argument(
        "--feather", type=number(int, 0), help="pixels over which old fades into new, inside the mask (default 0)"
    )

    picture = argparse.ArgumentParser(add_help=False)
    picture.add_argument("init_img", metavar="picture", help="picture to enlarge")
    upscale = drawing("upscale", [picture, draw, batch], "upscale", None, help="enlarge a picture")
    upscale.add_argument("--model", help="super-resolution network: .pth or .safetensors of Real-ESRGAN or ESRGAN")
    upscale.add_argument(
        "--outscale", "-s", type=number(float, 1), help="how many times as large (default: the model's, else 2)"
    )
    upscale.add_argument(
        "--strength", type=number(float, 0, 1), help="how much to change after enlarging, 0 … 1 (default 0.7, or 0.35)"
    )
    upscale.add_argument(
        "--noise_level", "--noise-level", type=number(int, 0), help="for a preset that is a ×4 upscaler (default 20)"
    )
    upscale.add_argument("--tile", type=number(int, 64), default=192, help="side of the network's tiles (default 192)")

    film = commands.add_parser(
        "interpolate", parents=[draw, size], epilog=EPILOG, help="draw the pictures between two prompts or seeds"
    )
    film.set_defaults(run=draw_film, usage_error=film.error)
    film.add_argument("prompt", help="what to draw first")
    film.add_argument("--to-prompt", help="what to draw last (default: the same)")
    film.add_argument("--to-seed", type=number(int, 0), help="seed of the last picture (default: the same)")
    film.add_argument("--frames", type=number(int, 2), default=9, help="number of pictures (default 9)")
    film.add_argument("--fps", type=number(float, 0.1), default=8.0, help="pictures a second (default 8)")
    film.add_argument(
        "--out",
        action="append",
        help="file to write (default out.png, a strip): .png, .gif, .webp or, with ffmpeg, .mp4; may be repeated",
    )

    presets = commands.add_parser("presets", help="list the built-in presets")
    presets.set_defaults(run=list_presets)
    convert = commands.add_parser("convert", parents=[model], help="any format → any other")
    convert.add_argument("source", help="preset, path or hf://owner/name")
    convert.add_argument("target", help="what to write, a folder or .safetensors; nothing may be there")
    convert.add_argument("--dtype", choices=(*FLOATS, "int8"), help="dtype of the weights (int8: of the U-Net)")
    convert.add_argument(
        "--format",
        choices=("diffusers", "single_file", "keras_cv"),
        help="what to write (default: single_file for .safetensors, keras_cv for a folder ….h5, else diffusers)",
    )
    convert.set_defaults(run=convert_checkpoint)
    return parser


def main(arguments=None):
    """Runs a command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    try:
        args = build_parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr)
            args.run(args)
        return 0
    except SystemExit as stop:  # argparse's way to say that the help was shown, or that the usage is wrong
        return stop.code or 0
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("KERAS_SD_TRACEBACK"):
            raise
        print(f"Error: {sentence(error)}", file=sys.stderr)
        return 1


def sentence(error):
    """What an exception says, on one line and without the system's error number."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename!r}" if error.filename else "")
    elif not isinstance(error, (ValueError, TypeError, OSError, ImportError)):  # not ours: its kind may tell more
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


# === txt2img, img2img, inpaint, upscale ===


def draw_pictures(args):
    """Draws and writes pictures; what can be wrong is said before anything is downloaded, loaded or drawn."""
    import secrets

    if (args.prompt is None) == (args.prompt_option is None) and (args.prompt is not None or args.method != "upscale"):
        args.usage_error("give one prompt, as an argument or with --prompt")
    prompt = args.prompt if args.prompt is not None else args.prompt_option
    (text,), loras = find_loras(args, prompt)
    check_prompts(text, args.negative_prompt)
    sampler, options = read_sampler(args)
    check_ip_adapter(args)
    check_output(args)
    pictures, controls = open_pictures(args), find_controls(args)
    if getattr(args, "model", None) is not None and not pathlib.Path(args.model).is_file():
        raise FileNotFoundError(f"--model: there is no file {args.model!r}.")
    if args.method == "upscale" and prompt is None and args.model is not None:
        return enlarge_picture(args, *pictures)
    if args.method == "text_to_image" and (args.hires, args.hires_strength) != (None, None):
        args.hires = 2.0 if args.hires is None else args.hires
        args.hires_strength = 0.7 if args.hires_strength is None else args.hires_strength
    options |= method_options(args)

    varies = getattr(args, "variation_strength", None) is not None
    if not varies and getattr(args, "variation_seed", None) is not None:
        args.usage_error("--variation-seed needs a --variation-strength")
    sd = open_model(args.ckpt or args.preset, args)
    check_watermark(args, sd, pictures)
    options |= load_additions(sd, args, loras) | watching(args, sd)
    options |= load_controls(args, controls)
    sd.read_ahead(keep=args.n_iter > 1 or "hires" in options)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if varies and args.variation_seed is None:
        args.variation_seed = secrets.randbits(31)
    for first in range(0, args.n_samples * args.n_iter, args.n_samples):
        if varies:
            options |= {"variation_seed": args.variation_seed + first, "variation_strength": args.variation_strength}
        images = getattr(sd, args.method)(
            *pictures,
            text,
            negative_prompt=args.negative_prompt or None,
            batch_size=args.n_samples,
            num_steps=args.steps,
            unconditional_guidance_scale=args.scale,
            seed=seed if varies else seed + first,
            sampler=sampler,
            progress=not args.quiet and sys.stderr.isatty(),
            **options,
        )
        for i, image in enumerate(images, start=first):
            parameters = described(args, sd, sampler, seed if varies else seed + i, image)
            flagged = args.safety_checker and sd.flagged[i - first]
            parameters["Safety_checker"] = "blacked out" if flagged else None
            if controls:
                nets = (f"{pathlib.Path(path).stem}: {scale:g}" for path, _, scale, *_ in controls)
                parameters["Control_nets"] = ", ".join(nets)
            if varies:
                parameters["Variation_seed"] = args.variation_seed + i
                parameters["Variation_seed_strength"] = f"{args.variation_strength:g}"
            path = write_picture(args, i, watermarked(args, image), prompt or "", parameters)
            varied = f" varied by {args.variation_strength:g} towards {args.variation_seed + i}" if varies else ""
            blacked_out = ", blacked out by the safety checker" if flagged else ""
            print(f"{path}: seed {parameters['Seed']}{varied}{blacked_out}", flush=True)


def enlarge_picture(args, picture):
    """upscale with a network alone: one picture, no preset."""
    from keras_sd import __version__

    given = args.strength, args.noise_level, args.preview, args.safety_checker, args.ip_adapter
    given = *given, *args.lora, *args.embedding
    if args.n_samples * args.n_iter > 1 or any(value is not None for value in given):
        args.usage_error(
            "--n_samples, --n_iter, --strength, --noise_level, --preview, --safety-checker, --ip-adapter, --lora and "
            "--embedding need a prompt; --model alone enlarges"
        )
    start_backend()
    from keras_sd.stable_diffusion import StableDiffusion

    image = StableDiffusion(dtype=args.dtype).upscale(picture, scale=args.outscale, model=args.model, tile=args.tile)[0]
    parameters = {
        "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Postprocess_upscale_by": f"{image.shape[1] / picture.width:g}",
        "Postprocess_upscaler": pathlib.Path(args.model).stem,
        "Version": f"keras_sd {__version__}",
    }
    print(write_picture(args, 0, watermarked(args, image), "", parameters), flush=True)


def method_options(args):
    """What a command has that the others have not, as arguments of its method; those not given are left out."""
    names = "height", "width", "strength", "feather", "hires", "hires_strength", "noise_level"
    options = {name: getattr(args, name, None) for name in names}
    if args.method == "upscale":
        options |= {"scale": args.outscale, "model": args.model, "tile": args.tile}
    return {name: value for name, value in options.items() if value is not None}


def check_prompts(*prompts):
    """Raises where brackets are not balanced."""
    from keras_sd.prompts import parse

    for prompt in prompts:
        parse(prompt or "")


def read_sampler(args):
    """The sampler's name and options; builds a named one's table, which needs NumPy alone, for the errors it raises."""
    from keras_sd.noise_scheduler import NoiseScheduler
    from keras_sd.samplers import make_table

    sampler = "ddim" if args.sampler is None and args.ddim_eta is not None else args.sampler
    options = {"karras": True} if args.karras else {}
    options |= {} if args.ddim_eta is None else {"eta": args.ddim_eta}
    if sampler is not None:
        try:
            make_table(sampler, NoiseScheduler(), args.steps, guidance_scale=args.scale, **options)
        except ValueError as error:
            args.usage_error(str(error))
    return sampler, options


def check_output(args):
    """Raises where the pictures could not be written."""
    from keras_sd.png import check_writable

    check_preview(args)
    if args.outdir is not None:
        return check_writable(pathlib.Path(args.outdir) / "00000.png")
    if args.out is not None and not args.out.lower().endswith(".png"):
        args.usage_error(f"--out must end in .png, which is what is written; got {args.out!r}")
    for i in range(args.n_samples * args.n_iter):
        check_writable(output_path(args, i))


def open_pictures(args):
    """The pictures that the command starts from: the image, and the mask."""
    from keras_sd.images import read_image

    names = {"image_to_image": ("--init-img",), "inpaint": ("--init-img", "--mask"), "upscale": ("picture",)}
    attributes = {"--init-img": "init_img", "--mask": "mask", "picture": "init_img"}
    return [read_image(getattr(args, attributes[name]), name) for name in names.get(args.method, ())]


def output_path(args, i):
    """Where picture `i` goes with --out."""
    path = pathlib.Path(args.out or "out.png")
    return path if args.n_samples * args.n_iter == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")


def write_picture(args, i, image, prompt, parameters):
    """Writes picture `i`; returns its path. In --outdir it takes the next free number."""
    from keras_sd.png import write_png

    if args.outdir is None:
        path = output_path(args, i)
        write_png(path, image, prompt, args.negative_prompt, **parameters)
        return path
    path = reserve_number(pathlib.Path(args.outdir))
    try:
        write_png(path, image, prompt, args.negative_prompt, **parameters)
    except BaseException:
        path.unlink()
        raise
    return path


def reserve_number(folder):
    """Makes an empty file under the next free number, which no other process that writes there will then take."""
    folder.mkdir(parents=True, exist_ok=True)
    i = max((int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()), default=-1) + 1
    while True:
        path = folder / f"{i:05d}.png"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            i += 1


def described(args, sd, sampler, seed, image):
    """The fields of a picture's `parameters`; see `keras_sd.png`."""
    from keras_sd import __version__
    from keras_sd.png import SAMPLER_NAMES

    _, own_sampler, own_options = sd.scheduler
    name = sampler or own_sampler
    karras = args.karras or (sampler is None and own_options.get("karras"))
    model = pathlib.Path(args.ckpt or args.preset)
    hires = getattr(args, "hires", None)
    return {
        "Steps": args.steps,
        "Sampler": SAMPLER_NAMES.get(name, name.upper()),
        "Schedule_type": "Karras" if karras else None,
        "CFG_scale": f"{args.scale:g}",
        "Seed": seed,
        "Size": f"{image.shape[1]}x{image.shape[0]}",
        "Model": model.stem if model.suffix in (".ckpt", ".safetensors") else model.name,
        "Denoising_strength": getattr(args, "hires_strength" if hires else "strength", None),
        "Hires_upscale": f"{hires:g}" if hires else None,
        "Hires_upscaler": "Latent" if hires else None,
        "Upscaler": pathlib.Path(args.model).stem if getattr(args, "model", None) else None,
        "Loras": ", ".join(map(_named, args.lora or ())) or None,
        "IP_adapter": _named(getattr(args, "ip_adapter", None)),
        "Cache_interval": getattr(args, "cache_interval", None),
        "Token_merging_ratio": getattr(args, "token_merging", None),
        "Mask_blur": getattr(args, "feather", None),
        "Noise_level": getattr(args, "noise_level", None),
        "Eta": args.ddim_eta,
        "Version": f"keras_sd {__version__}",
    }


def _named(addition):
    """(path, scale or None) as `name: scale`; None stays."""
    if addition is None:
        return None
    path, scale = addition
    return f"{pathlib.Path(path).stem}: {1 if scale is None else scale:g}"


# === --watermark ===


def check_watermark(args, sd, pictures=()):
    """Raises where the pictures will be too small for a watermark; of an enlarged one that is said afterwards."""
    from keras_sd.watermark import check_size

    if args.watermark and getattr(args, "method", None) != "upscale":
        known = pictures[0].size[::-1] if pictures else sd.image_size
        sides = (getattr(args, name) or side for name, side in zip(("height", "width"), known))
        check_size(*(int(side * (getattr(args, "hires", None) or 1)) for side in sides))


def watermarked(args, image):
    """The picture, with a watermark where --watermark asks for it."""
    from keras_sd.watermark import add_watermark

    return add_watermark(image) if args.watermark else image


# === --preview ===


def check_preview(args):
    """Raises where the preview could not be written."""
    from keras_sd.png import check_writable

    if args.preview is not None:
        if not args.preview.lower().endswith(".png"):
            args.usage_error(f"--preview must end in .png, which is what is written; got {args.preview!r}")
        check_writable(args.preview)


def watching(args, sd):
    """The callback, as an argument: reads the decoder ahead, and writes --preview's file about ten times a run."""
    from keras_sd.memory import trim

    def read_decoder(step, num_steps, latent):
        if step == 0:  # which takes the most memory, and leaves what the graph was optimized with
            trim()
            sd.read_ahead("decoder")

    def write_preview(step, num_steps, latent):
        read_decoder(step, num_steps, latent)
        import numpy as np
        from PIL import Image

        from keras_sd.weights.files import atomic_file

        if (step + 1) % max(num_steps // 10, 1) == 0 or step + 1 == num_steps:
            image = Image.fromarray(np.concatenate(sd.preview(latent), axis=1))
            image = image.resize((sd.factor * image.width, sd.factor * image.height), Image.Resampling.BICUBIC)
            with atomic_file(args.preview) as file:
                image.save(file, format="PNG")

    return {"callback": read_decoder if args.preview is None else write_preview}


# === interpolate ===


def draw_film(args):
    """interpolate: the frames, as a strip or an animation."""
    import secrets

    import numpy as np

    from keras_sd.film import check_film, write_film

    if args.to_prompt is None and args.to_seed is None:
        args.usage_error("give --to-prompt or --to-seed, which the pictures go to")
    texts, loras = find_loras(args, args.prompt, args.to_prompt)
    check_prompts(*texts, args.negative_prompt)
    sampler, options = read_sampler(args)
    check_ip_adapter(args)
    check_preview(args)
    paths = args.out or ["out.png"]
    for path in paths:
        check_film(path)
    sd = open_model(args.ckpt or args.preset, args)
    check_watermark(args, sd)
    options |= load_additions(sd, args, loras)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    frames = sd.interpolate(
        *texts,
        seed,
        args.to_seed,
        args.frames,
        negative_prompt=args.negative_prompt or None,
        num_steps=args.steps,
        unconditional_guidance_scale=args.scale,
        sampler=sampler,
        height=args.height,
        width=args.width,
        progress=not args.quiet and sys.stderr.isatty(),
        **options,
        **watching(args, sd),
    )
    parameters = described(args, sd, sampler, seed, frames[0])
    parameters |= {"To_prompt": args.to_prompt, "To_seed": args.to_seed, "Frames": len(frames)}
    if args.safety_checker and any(sd.flagged):
        print(f"The safety checker blacked out {sum(sd.flagged)} of the pictures.")
    frames = np.stack([watermarked(args, frame) for frame in frames])
    for path in paths:
        write_film(path, frames, args.fps, args.prompt, negative_prompt=args.negative_prompt, **parameters)
        print(f"{path}: seed {seed}", flush=True)


# === --lora, --lora-dir, --embedding ===


def find_loras(args, *prompts):
    """The prompts without `<lora:…>`, and all LoRAs: a list of (path, scale)."""
    from keras_sd.prompts import take_loras
    from keras_sd.weights.lora import find_lora

    for flag, paths in (("--lora", args.lora), ("--embedding", args.embedding)):
        for path, _ in paths:
            if not pathlib.Path(path).exists():
                raise FileNotFoundError(f"{flag}: there is nothing at {path!r}.")
    texts, loras = [], {path: 1.0 if scale is None else scale for path, scale in args.lora}
    for prompt in prompts:
        text, found = take_loras(prompt or "")
        texts.append(prompt if prompt is None else text)
        loras |= {str(find_lora(args.lora_dir, name)): scale for name, scale in found}
    return texts, list(loras.items())


def load_additions(sd, args, loras):
    """Loads --embedding, the LoRAs, (path, scale) each, and --ip-adapter; returns arguments for the drawing."""
    for path, token in args.embedding:
        sd.load_textual_inversion(path, token)
    for path, scale in loras:
        sd.load_lora(path, scale, name=path)
    if args.ip_adapter is None:
        return {}
    path, scale = args.ip_adapter
    sd.load_ip_adapter(path, args.image_encoder, 1.0 if scale is None else scale)
    return {"image_prompt": args.image_prompt}


def check_ip_adapter(args):
    """Raises where --ip-adapter, --image-prompt and --image-encoder do not go together, or are not there."""
    if (args.ip_adapter is None) != (args.image_prompt is None):
        args.usage_error("--ip-adapter and --image-prompt go together; give both")
    if args.ip_adapter is None and args.image_encoder is not None:
        args.usage_error("--image-encoder is that of an --ip-adapter; give one")
    paths = {"--ip-adapter": args.ip_adapter and args.ip_adapter[0], "--image-prompt": args.image_prompt}
    for flag, path in paths.items():
        if path is not None and not path.startswith("hf://") and not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"{flag}: there is no file {path!r}.")


# === --control-net, --control-image, --canny ===


def find_controls(args):
    """What --control-net and its like ask for: a list of (path, image, scale, start, end)."""
    from keras_sd.edges import canny
    from keras_sd.images import read_image

    nets, images = getattr(args, "control_net", []), getattr(args, "control_image", [])
    if len(nets) != len(images):
        args.usage_error("give one --control-image, or --canny, for each --control-net")
    columns = []
    for name, default in (("control_scale", 1.0), ("control_start", 0.0), ("control_end", 1.0)):
        values = getattr(args, name, [])
        if len(values) not in (0, 1, len(nets)) or (values and not nets):
            args.usage_error(f"give --{name.replace('_', '-')} once, or once for each --control-net")
        columns.append([*values] or [default])
    scales, starts, ends = (values * len(nets) if len(values) == 1 else values for values in columns)
    if getattr(args, "guess_mode", False) and not nets:
        args.usage_error("--guess-mode needs a --control-net")
    if nets and (args.cache_interval or 1) > 1:
        args.usage_error("--cache-interval does not go together with --control-net")
    if any(start >= end for start, end in zip(starts, ends)):
        args.usage_error("--control-start must be below --control-end")
    for path in nets:
        if not path.startswith("hf://") and not pathlib.Path(path).exists():
            raise FileNotFoundError(f"--control-net: there is nothing at {path!r}.")
    pictures = [
        canny(read_image(path, "--canny"), args.canny_low, args.canny_high)
        if edges
        else read_image(path, "--control-image")
        for path, edges in images
    ]
    return list(zip(nets, pictures, scales, starts, ends))


def load_controls(args, controls):
    """Loads the ControlNets; returns arguments for the drawing."""
    if not controls:
        return {}
    from keras_sd.weights.control_net import load_control_net

    loaded = [(load_control_net(path, args.dtype), *others) for path, *others in controls]
    return {"control": loaded, "guess_mode": args.guess_mode}


# === The model ===


def open_model(source, args):
    """The `StableDiffusion` of a preset or path, with --tokenizer, --dtype and the options that save memory or time."""
    from keras_sd.presets import locate, locate_safety_checker

    path = locate(source)
    start_backend()
    from keras_sd.stable_diffusion import StableDiffusion

    names = (
        "low_memory",
        "two_pass_guidance",
        "vae_slicing",
        "vae_tiling",
        "cache_interval",
        "token_merging",
    )
    savings = {name: getattr(args, name) for name in names if getattr(args, name, None)}
    other = {} if args.vae is None else {"vae": args.vae}
    if getattr(args, "safety_checker", None) is not None:
        other["safety_checker"] = locate_safety_checker(source, args.safety_checker)
    return StableDiffusion.from_preset(path, dtype=args.dtype, tokenizer=args.tokenizer, **savings, **other)


def start_backend():
    """Imports Keras with the backend's start-up notes, which C++ writes to file descriptor 2, kept off the terminal."""
    from keras_sd.memory import one_heap
    from keras_sd.weights.hub import cache_folder

    one_heap()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))  # what one command compiled
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with hidden("pandas", "matplotlib", "IPython", "cv2", *(() if "jax" in backend_settings() else ("jax",))):
            import keras

        keras.ops.zeros(1)
        gc.freeze()
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def patient_with_garbage():
    """Python looks for garbage less often: imports and tracing make a million objects that stay."""
    gc.set_threshold(100_000)


@contextlib.contextmanager
def hidden(*packages):
    """In this block packages that are not imported yet cannot be: Keras imports some where they are installed, which
    takes a second and 0.2 GB, for what no command does."""
    packages = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name in packages:
            sys.modules.pop(name)


def backend_settings():
    """Where Keras reads which backend it is to use, as text."""
    folder = pathlib.Path(os.environ.get("KERAS_HOME", pathlib.Path.home() / ".keras"))
    with contextlib.suppress(OSError):
        return os.environ.get("KERAS_BACKEND") or (folder / "keras.json").read_text(encoding="utf-8")
    return ""


# === presets, convert ===


def list_presets(args):
    """presets: names, sources and licences."""
    from keras_sd.presets import PRESETS

    for name, preset in PRESETS.items():
        print(f"{name:14} {preset.size:8} {preset.licence:26} {preset.source}")


def convert_checkpoint(args):
    """convert: opens a checkpoint and writes it in another format. The target appears complete, or not at all."""
    from keras_sd.convert import check_target, format_of, write_checkpoint

    format = args.format or format_of(args.target)
    check_target(args.target, format, args.dtype)
    weights, args.dtype = args.dtype, None if args.dtype == "int8" else args.dtype  # int8 is no dtype to compute in
    write_checkpoint(open_model(args.source, args), args.target, format, weights)
    print(args.target)


def run_and_exit():
    """The process' entry: leaves at once, as Python's tidying up behind TensorFlow takes a second."""
    patient_with_garbage()
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read the output has left
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run_and_exit()
