"""Many prompts to PNG files on the workers of Ray Data: `python -m keras_sd.batch prompts.jsonl --out pictures`

The same code runs on one machine and on a cluster: Ray starts one where it finds none, and `RAY_ADDRESS` names one.
Each worker opens the preset once. What exists under its name is kept, so a run that was stopped goes on.
"""

import argparse
import csv
import json
import os
import pathlib
import sys

from keras_sd.__main__ import FLOATS

FIELDS = ("prompt", "negative_prompt", "seed")


def read_prompts(path):
    """Prompts of a file: `.jsonl` or `.csv` with `prompt`, and where wanted `negative_prompt`, `seed`; or a line each.

    Returns:
        list of dicts with `prompt` (string), `negative_prompt` (string) and `seed` (integer, by default the line's).

    Raises:
        ValueError: a row is no JSON object, has no prompt, a field that is not known, or a seed that is no integer.
        FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            lines = [line.strip() for line in file if line.strip()]
            rows = [_parsed(line) if path.suffix == ".jsonl" else {"prompt": line} for line in lines]
    return [_checked(row, i, path) for i, row in enumerate(rows)]


def _parsed(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _checked(row, i, path):
    if not isinstance(row, dict):
        raise ValueError(f"Row {i + 1} of {str(path)!r} is no JSON object; it takes {', '.join(FIELDS)}.")
    unknown = set(row) - set(FIELDS)
    if unknown or not row.get("prompt"):
        what = f"the field {min(map(str, unknown))!r}" if unknown else "no prompt"
        raise ValueError(f"Row {i + 1} of {str(path)!r} has {what}; it takes {', '.join(FIELDS)}.")
    try:
        seed = int(i if row.get("seed") in (None, "") else row["seed"])
    except ValueError:
        raise ValueError(f"Row {i + 1} of {str(path)!r} has the seed {row['seed']!r}; it must be an integer.") from None
    return {"prompt": row["prompt"], "negative_prompt": row.get("negative_prompt") or "", "seed": seed}


class Drawer:
    """What a worker holds: a callable class, as Ray Data wants it, from rows to the paths of their pictures."""

    def __init__(self, preset, model, options):
        from keras_sd import StableDiffusion

        self.sd, self.options = StableDiffusion.from_preset(preset, **model), options

    def __call__(self, rows):
        from keras_sd.png import write_png

        prompts, negatives, seeds = (list(map(str, rows[name])) for name in FIELDS)
        seeds = list(map(int, seeds))
        images = self.sd.text_to_image(prompts, negative_prompt=negatives, seed=seeds, progress=False, **self.options)
        for path, image, prompt, negative, seed in zip(rows["path"], images, prompts, negatives, seeds):
            write_png(path, image, prompt, negative, Seed=seed)
        return {"path": rows["path"]}


def draw_batch(rows, folder, preset="emoji", *, model=None, workers=1, batch_size=4, gpus=0, **options):
    """Draws a picture of each row that has none yet.

    Args:
        rows: list of dicts as `read_prompts` gives them.
        folder: where to; on a cluster, where all workers reach it. Row i becomes `00000i.png`.
        preset: preset, path or hf://owner/name, which every worker opens.
        model: dict, options of `StableDiffusion`: `dtype`, `cache_interval`, `token_merging` …
        workers: how many.
        batch_size: pictures that a worker draws at once.
        gpus: of each worker.
        **options: of `StableDiffusion.text_to_image`: `num_steps`, `sampler`, `height` …

    Returns:
        list of paths, in the order of the rows.

    Raises:
        ImportError: Ray is not installed.
        Exception: what went wrong on a worker; what was drawn until then stays.

    A picture is the one that `text_to_image` draws from its row, whatever it is drawn beside.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('draw_batch needs Ray Data, which is an extra: `pip install "ray[data]"`.') from error
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(rows))]
    missing = [{**row, "path": str(path)} for row, path in zip(rows, paths) if not path.exists()]
    if missing:
        names = ("KERAS_BACKEND", "KERAS_SD_HOME", "PYTHONPATH", "TF_CPP_MIN_LOG_LEVEL")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        ray.init(ignore_reinit_error=True, runtime_env={"env_vars": environment}, log_to_driver=False)
        drawn = ray.data.from_items(missing).repartition(min(len(missing), -(-len(missing) // batch_size)))
        drawn.map_batches(
            Drawer,
            fn_constructor_args=(preset, model or {}, options),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
        ).materialize()
    return paths


def main(arguments=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m keras_sd.batch", description=__doc__.split(":")[0])
    parser.add_argument(
        "prompts", help=".jsonl or .csv with prompt, negative_prompt, seed; or a text file, a line each"
    )
    parser.add_argument("--out", required=True, help="folder of the pictures")
    parser.add_argument("--preset", default="emoji", help="preset, path or hf://owner/name (default emoji)")
    parser.add_argument("--dtype", choices=FLOATS, help="dtype of the models")
    parser.add_argument("--workers", type=int, default=1, help="how many, each with the model (default 1)")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures that one draws at once (default 4)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance (default 7.5)")
    parser.add_argument("--sampler", help="name of the sampler (default the preset's)")
    args = parser.parse_args(arguments)
    try:
        paths = draw_batch(
            read_prompts(args.prompts),
            args.out,
            args.preset,
            model={"dtype": args.dtype},
            workers=args.workers,
            batch_size=args.batch_size,
            gpus=args.gpus,
            num_steps=args.steps,
            unconditional_guidance_scale=args.scale,
            sampler=args.sampler,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{len(paths)} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
