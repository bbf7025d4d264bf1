"""Fine-tunes Stable Diffusion on captioned pictures: arguments → keras_sd.training.

python finetune.py --batch_size 4 --num_epochs 577
python finetune.py --img_height 512 --img_width 512 --batch_size 1 --num_epochs 72 --mp
python finetune.py --preset emoji --dataset_archive pictures/ --train lora --num_epochs 20 --out runs/lora --dry-run
"""

import os
import pathlib
import sys

POKEMON = "https://huggingface.co/datasets/sayakpaul/pokemon-blip-original-version/resolve/main/pokemon_dataset.tar.gz"
TRAIN = ("unet", "lora", "textual_inversion", "lcm", "controlnet")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16", "bfloat16")


def build_parser():
    """All flags; those of the Keras original keep their names and defaults."""
    from keras_sd.__main__ import Parser, number

    parser = Parser(prog="python finetune.py", description="Fine-tunes Stable Diffusion on captioned pictures.")

    def flags(title):
        group = parser.add_argument_group(title)

        def add(name, *args, **kwargs):
            spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            default = kwargs.get("default")
            default = " ".join(default) if isinstance(default, list) else default
            default = " ".join(default) if isinstance(default, list) else default
            if default not in (None, False):
                kwargs["help"] += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
            group.add_argument(*spellings, *args, dest=name, **kwargs)

        return add

    flag = flags("pictures")
    flag("dataset_archive", default=POKEMON, help="folder, .tar.gz, .zip or URL of captioned pictures")
    flag("caption", help="caption of pictures that have none, e.g. 'a photo of sks dog'")
    flag("prior_archive", help="DreamBooth's prior-preservation pictures: folder, archive or URL")
    flag("prior_weight", type=number(float, 0), default=1.0, help="weight of their loss")
    flag("img_height", type=number(int, 8), default=256, help="pixels, a multiple of 8")
    flag("img_width", type=number(int, 8), default=256, help="pixels, a multiple of 8")
    flag("buckets", action="store_true", help="train in aspect-ratio buckets of about that area")
    flag("flip", action="store_true", help="turn half of the pictures left to right")
    flag("random_crop", action="store_true", help="cut elsewhere each epoch, which excludes the latent cache")
    flag("repeats", type=number(int, 1), default=1, help="how often an epoch has each picture")
    flag("latent_cache", metavar="DIR", help="folder of the contexts and latents, computed once (default OUT/latents)")
    flag("no_latent_cache", action="store_true", help="encode each batch anew instead")

    flag = flags("model")
    flag("preset", default="sd-v1-4", help="preset, path or hf://owner/name to start from")
    flag("pretrained_ckpt", help="weights of the diffusion model to start from: KerasCV's .h5, or any checkpoint")
    flag("train", choices=TRAIN, default="unet", help="what is trained")
    flag("train_text_encoder", action="store_true", help="the text encoder, too (unet, lora)")
    flag("rank", type=number(int, 1), default=8, help="rank of the LoRA factors (lora, lcm)")
    flag("lora_alpha", type=number(float, 0), help="their scale is alpha / rank (default: the rank)")
    flag(
        "targets",
        nargs="+",
        default=["attention"],
        help="layers with LoRA factors: attention, feed_forward, projection, convolution, timestep, or regular "
        "expressions of their names",
    )
    flag("token", help="the new word (textual_inversion)")
    flag("num_vectors", type=number(int, 1), default=1, help="its vectors (textual_inversion)")
    flag("init_token", help="a known word that it starts from (textual_inversion)")
    flag("control_net", help="ControlNet to go on from: folder, file or hf://owner/name (default: a new one)")
    flag("canny_low", type=number(float, 0), default=100.0, help="Canny's lower threshold (controlnet)")
    flag("canny_high", type=number(float, 0), default=200.0, help="its upper one; unused with conditioning_image")

    flag = flags("optimizer")
    flag("optimizer", choices=("adamw", "adamw_8bit", "adafactor"), default="adamw", help="its kind")
    flag("lr", type=number(float, 0), default=1e-5, help="learning rate")
    flag("wd", type=number(float, 0), default=1e-2, help="weight decay")
    flag("beta_1", type=number(float, 0, 1), default=0.9, help="decay of the first moment")
    flag("beta_2", type=number(float, 0, 1), default=0.999, help="decay of the second moment")
    flag("epsilon", type=number(float, 0), default=1e-8, help="added to the root of the second moment")
    flag("ema", type=number(float, 0, 1), default=0.9999, help="decay of the averaged weights, which are saved")
    flag("max_grad_norm", type=number(float, 0), default=1.0, help="largest global norm of the gradients; 0 is any")
    flag("accumulation", type=number(int, 1), default=1, help="batches per update")
    flag("lr_schedule", choices=("constant", "linear", "cosine"), default="constant", help="after the warm-up")
    flag("warmup_steps", type=number(int, 0), default=0, help="updates until the full learning rate")

    flag = flags("objective")
    flag("offset_noise", type=number(float, 0), default=0.0, help="noise of each channel's mean, e.g. 0.1")
    flag("min_snr_gamma", type=number(float, 0), help="min-SNR weighting, e.g. 5")
    flag("caption_dropout", type=number(float, 0, 1), default=0.0, help="part of the captions left out, e.g. 0.1")

    flag = flags("run")
    flag("batch_size", type=number(int, 1), default=4, help="pictures per batch")
    flag("num_epochs", type=number(int, 1), default=100, help="times that each picture is seen")
    flag("max_steps", type=number(int, 1), help="stop after so many batches")
    flag("mp", action="store_true", help="mixed precision: the same as --precision mixed_float16")
    flag("precision", choices=PRECISIONS, help="of the trained model (default float32)")
    flag("gradient_checkpointing", action="store_true", help="less memory for a third more time")
    flag("seed", type=number(int, 0), default=0, help="of all that is drawn")
    flag("out", default="runs/finetune", help="folder of checkpoints and results; an interrupted run goes on there")
    flag("save_every", type=number(int, 1), default=500, help="batches between two checkpoints")
    flag("keep", type=number(int, 1), default=2, help="checkpoints that are kept")
    flag("validation_prompt", action="append", help="draw this now and then; may be repeated")
    flag("validate_every", type=number(int, 1), default=500, help="batches between two drawings")
    flag("num_processes", type=number(int, 1), default=1, help="processes that train together (JAX)")
    flag("process_id", type=number(int, 0), default=0, help="which of them this is")
    flag("coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    flag("export", metavar="DIR", help="write a new TF-Serving version there at the end")
    flag("dry_run", action="store_true", help="train two steps, print steps, parameters, memory and time, and end")
    flag("quiet", action="store_true", help="no progress bar")
    return parser


# === What is trained on what ===


def open_model(args):
    """The `StableDiffusion` to train, with the weights of --pretrained_ckpt."""
    from keras_sd import StableDiffusion
    from keras_sd.layers.int8 import refuse_int8
    from keras_sd.presets import locate
    from keras_sd.training.textual_inversion import start_token
    from keras_sd.weights.keras_cv import assign_keras_cv

    sd = StableDiffusion.from_preset(locate(args.preset), dtype=args.precision)
    refuse_int8(sd.diffusion_model, "Training")  # before hours of encoding
    if args.pretrained_ckpt is not None:
        path = pathlib.Path(args.pretrained_ckpt)
        if path.suffix == ".h5":
            assign_keras_cv(sd.diffusion_model, path)
        else:
            other = StableDiffusion.from_preset(path, dtype=args.precision)
            sd.diffusion_model = other.diffusion_model
    if args.token is not None:
        start_token(sd, args.token, args.init_token, args.num_vectors)
    return sd


def open_pictures(args, sd):
    """A source of batches: `Pictures`, or a `LatentCache` of them. What cannot be used is listed."""
    import functools

    from keras_sd import canny
    from keras_sd.training.batches import Pictures
    from keras_sd.training.examples import read_examples
    from keras_sd.training.latent_cache import build_latent_cache

    examples, rejected = read_examples(args.dataset_archive, args.caption)
    if args.prior_archive is not None:
        prior, others = read_examples(args.prior_archive, args.caption, prior=True)
        examples, rejected = examples + prior, rejected + others
    for file, reason in rejected:
        print(f"Not used: {file} {reason}.", file=sys.stderr)
    edges = functools.partial(canny, low=args.canny_low, high=args.canny_high)
    pictures = Pictures(
        examples,
        sd.tokenizer,
        args.img_height,
        args.img_width,
        args.buckets,
        args.flip,
        args.random_crop,
        edges if args.train == "controlnet" else None,
    )
    if args.train == "controlnet":
        pictures.seen(0, pictures.picture(0))  # OpenCV is an extra: its absence is said here
    if args.no_latent_cache or args.random_crop:
        return pictures
    folder = args.latent_cache or pathlib.Path(args.out) / "latents"
    return build_latent_cache(
        folder,
        pictures,
        sd,
        contexts=not trains_text_encoder(args),
        progress=not args.quiet,
        batch_size=args.batch_size,
    )


def trains_text_encoder(args):
    return args.train_text_encoder or args.train == "textual_inversion"


def make_trainer(args, sd):
    """The trainer of --train, not yet compiled; what it trains is trainable then, and nothing else."""
    from keras_sd.training.control_net import ControlNetTrainer
    from keras_sd.training.distillation import ConsistencyTrainer
    from keras_sd.training.textual_inversion import TextualInversionTrainer
    from keras_sd.training.trainer import DiffusionTrainer

    sd.text_encoder.trainable = args.train == "unet" and args.train_text_encoder
    options = {
        "offset_noise": args.offset_noise,
        "min_snr_gamma": args.min_snr_gamma,
        "caption_dropout": args.caption_dropout,
        "unconditional_context": sd.encode_text(""),
        "prior_weight": args.prior_weight,
        "seed": args.seed,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    trainer = DiffusionTrainer
    if args.train == "textual_inversion":
        trainer, options["token_ids"] = TextualInversionTrainer, sd.tokenizer.token_ids(args.token)
    elif args.train == "lcm":
        trainer, options["teacher"] = ConsistencyTrainer, open_model(args).diffusion_model
    elif args.train == "controlnet":
        trainer, options["control_net"] = ControlNetTrainer, open_control_net(args, sd)
    if args.train in ("lora", "lcm"):
        sd.add_lora(args.rank, args.lora_alpha, args.targets, args.train_text_encoder, args.seed)
    return trainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, sd.image_encoder, **options)


def open_control_net(args, sd):
    """--control_net, or a new one."""
    from keras_sd import ControlNet, load_control_net

    if args.control_net is not None:
        return load_control_net(args.control_net, args.precision)
    return ControlNet.from_diffusion_model(sd.diffusion_model, args.seed)


def make_optimizer(args, updates):
    """The Keras optimizer of the flags, for a run of so many updates."""
    from keras_sd.training.optimizers import OPTIMIZERS, GuardedOptimizer, Schedule

    rate = Schedule(args.lr_schedule, args.lr, updates, args.warmup_steps)
    moments = {"beta_1": args.beta_1, "beta_2": args.beta_2, "epsilon": args.epsilon}
    return GuardedOptimizer(
        OPTIMIZERS[args.optimizer](
            rate,
            weight_decay=args.wd,
            global_clipnorm=args.max_grad_norm or None,
            use_ema=args.ema > 0,
            ema_momentum=args.ema,
            gradient_accumulation_steps=args.accumulation if args.accumulation > 1 else None,
            **({} if args.optimizer == "adafactor" else moments),
        ),
        ema_warmup=True,
    )


# === The run ===


def main(arguments=None):
    """Runs the command line; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    from keras_sd.__main__ import sentence

    parser = build_parser()
    try:
        args = parser.parse_args(arguments)
        check(args, parser)
        run(args)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("KERAS_SD_TRACEBACK"):
            raise
        print(f"Error: {sentence(error)}", file=sys.stderr)
        return 1


def check(args, parser):
    """Settles the flags, or says which of them do not go together."""
    if args.mp and args.precision not in (None, "mixed_float16"):
        parser.error(f"--mp is --precision mixed_float16; got --precision {args.precision}")
    args.precision = "mixed_float16" if args.mp else args.precision or "float32"
    for side in ("img_height", "img_width"):
        if getattr(args, side) % 8:
            parser.error(f"--{side} must be a multiple of 8; got {getattr(args, side)}")
    if args.train_text_encoder and args.train not in ("unet", "lora"):
        parser.error(f"--train_text_encoder is for --train unet and lora; got {args.train}")
    if args.random_crop and args.latent_cache is not None:
        parser.error("--latent_cache holds one cut of each picture: leave it out, or --random_crop")
    if args.latent_cache is not None and args.no_latent_cache:
        parser.error("--latent_cache and --no_latent_cache exclude each other")
    if args.train == "controlnet" and args.export is not None:
        parser.error("--export writes the model, which --train controlnet leaves as it is")
    if args.train != "controlnet" and args.control_net is not None:
        parser.error(f"--control_net is for --train controlnet; got {args.train}")
    if args.canny_low > args.canny_high:
        parser.error(f"--canny_low must be at most --canny_high; got {args.canny_low:g} and {args.canny_high:g}")
    if (args.train == "textual_inversion") != (args.token is not None and args.init_token is not None):
        parser.error("--token and --init_token go with --train textual_inversion, which needs both")


def run(args):
    """Trains, and writes the result."""
    from keras_sd.__main__ import start_backend

    start_backend()
    from keras_sd.training.batches import batches, steps_per_epoch
    from keras_sd.training.checkpoints import latest, restore
    from keras_sd.training.distributed import all_devices, start_processes

    start_processes(args.coordinator, args.num_processes, args.process_id)
    with all_devices() as devices:
        sd = open_model(args)
        source = open_pictures(args, sd)
        shards = {"num_shards": args.num_processes}
        steps = args.num_epochs * steps_per_epoch(source, args.batch_size, args.repeats, **shards)
        steps = min(steps, args.max_steps or steps)
        trainer = make_trainer(args, sd)
        trainer.compile(make_optimizer(args, -(-steps // args.accumulation)))

        def data(start_step=0):
            return batches(
                source,
                args.batch_size,
                seed=args.seed,
                epochs=args.num_epochs,
                start_step=start_step,
                repeats=args.repeats,
                shard_index=args.process_id,
                **shards,
            ).take(steps - start_step)

        if args.dry_run:
            return print_plan(args, trainer, source, data(), steps, devices)
        folder = pathlib.Path(args.out) / "checkpoints"
        start_step = restore(trainer, folder) if latest(folder) else 0
        if start_step < steps:
            trainer.fit(
                data(start_step),
                epochs=1,
                shuffle=False,
                verbose=0,
                callbacks=make_callbacks(args, sd, trainer, source, steps, folder),
            )
        if args.process_id == 0:
            save(args, sd, trainer)


def make_callbacks(args, sd, trainer, source, steps, folder):
    """Checkpoints, scalars for TensorBoard under OUT/logs, validation pictures, a progress bar."""
    from keras_sd.training.checkpoints import SaveCheckpoints
    from keras_sd.training.watching import DrawPictures, Progress, StopWhenBroken, Summaries, WriteScalars

    batch_size = args.batch_size * args.num_processes
    callbacks = [StopWhenBroken()]
    if args.process_id == 0:
        summaries = Summaries(pathlib.Path(args.out) / "logs")
        callbacks += [SaveCheckpoints(folder, args.save_every, args.keep), WriteScalars(summaries, batch_size)]
        if args.validation_prompt:
            callbacks.append(
                DrawPictures(
                    validation(args, sd, trainer, source), folder.parent / "pictures", args.validate_every, summaries
                )
            )
        if not args.quiet:
            callbacks.append(Progress(steps, batch_size))
    return callbacks


def validation(args, sd, trainer, source):
    """A function that draws --validation_prompt, from the same noise each time; a ControlNet sees the first picture."""
    options = {"height": args.img_height, "width": args.img_width, "num_steps": 20, "seed": args.seed}
    if args.train == "controlnet":
        pictures = getattr(source, "pictures", source)
        options["control"] = [(trainer.control_net, pictures.seen(0, pictures.picture(0)))]
    return lambda: sd.text_to_image(args.validation_prompt, progress=False, **options)


def print_plan(args, trainer, source, data, steps, devices):
    """Steps, parameters and memory; and after two steps, the time that the run will take."""
    import resource
    import time

    import numpy as np

    def count(variables):
        return sum(int(np.prod(variable.shape)) for variable in variables)

    def size(variables):
        return sum(int(np.prod(v.shape)) * np.dtype(str(v.dtype)).itemsize for v in variables) / 1e9

    trained, every = trainer.trainable_variables, trainer.variables
    state = trainer.optimizer.variables
    pictures = getattr(source, "pictures", source)
    print(f"pictures      {len(pictures.examples)} at {args.img_width}x{args.img_height}, {args.batch_size} a batch")
    print(f"steps         {steps:,}, with {-(-steps // args.accumulation):,} updates, on {devices} device(s)")
    print(f"parameters    {count(trained):,} trained, of {count(every):,}; {args.precision}")
    print(
        f"memory        {size(every):.2f} GB weights, {size(trained):.2f} GB gradients, {size(state):.2f} GB optimizer"
    )
    seconds = []
    for batch in data.take(2):
        start = time.perf_counter()
        trainer.train_on_batch(batch)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"measured      {peak:.2f} GB of peak memory in two steps; the second took {seconds[-1]:.2f} s")
    print(f"time          about {hours(seconds[0] + seconds[-1] * (steps - 1))}")


def hours(seconds):
    """ "1 h 02 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes else "under a minute"


def save(args, sd, trainer):
    """Writes what was trained, averaged where there are averages, under OUT."""
    from keras_sd import save_control_net
    from keras_sd.training.textual_inversion import save_token
    from keras_sd.weights.keras_cv import published_names, write_keras_cv

    out = pathlib.Path(args.out)

    def written(name, write, *arguments):
        write(*arguments)
        print(out / name)

    with trainer.averaged_weights():
        if args.train == "textual_inversion":
            trainer.write_rows()
            written("token.safetensors", save_token, sd, args.token, out / "token.safetensors")
        elif args.train == "controlnet":
            written("control_net", save_control_net, trainer.control_net, out / "control_net")
        elif args.train == "unet":
            written("preset", sd.save_preset, out / "preset")
            try:
                published_names(sd.diffusion_model)
            except ValueError as error:
                print(f"No diffusion_model.h5: {error}", file=sys.stderr)
            else:
                written("diffusion_model.h5", write_keras_cv, sd.diffusion_model, out / "diffusion_model.h5")
        else:
            written("lora.safetensors", sd.save_lora, out / "lora.safetensors")
            written("peft", sd.save_lora, out / "peft", "peft")
        if args.export is not None:
            export(args, sd)


def export(args, sd):
    """Writes the next TF-Serving version of the trained model."""
    from export.saved_model import export_saved_models

    if args.train in ("lora", "lcm"):
        sd.fuse_lora()
    for path in export_saved_models(sd, args.export, size=(args.img_height, args.img_width)).values():
        print(path)


if __name__ == "__main__":
    sys.exit(main())
