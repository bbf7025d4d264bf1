"""Peak memory of fine-tuning at SD v1's full size, batch 1, random weights. `python -m benchmarks.train_memory`

    python -m benchmarks.train_memory               a Markdown table of all cases
    python -m benchmarks.train_memory lora_512      one case; prints its peak resident memory in GB (10⁹ bytes)

Two steps on cached latents and contexts, as `finetune.py` takes them, with gradient checkpointing.
"""

import argparse

import numpy as np

from benchmarks.memory import run
from keras_sd.training.watching import peak_memory

CASES = {  # what is said of it, side in pixels, precision, LoRA rank, optimizer, EMA
    "lora_512": ("LoRA of rank 8, 512×512, bfloat16, AdamW", 512, "bfloat16", 8, "adamw", False),
    "full_256": ("all weights, 256×256, mixed_bfloat16, AdamW", 256, "mixed_bfloat16", None, "adamw", False),
    "full_256_8bit": ("the same, AdamW with 8-bit state", 256, "mixed_bfloat16", None, "adamw_8bit", False),
    "full_256_8bit_ema": ("the same, and averaged weights", 256, "mixed_bfloat16", None, "adamw_8bit", True),
    "full_256_adafactor": (
        "all weights, 256×256, mixed_bfloat16, Adafactor",
        256,
        "mixed_bfloat16",
        None,
        "adafactor",
        False,
    ),
}


def train(_, side, precision, rank, optimizer, ema):
    """Two steps of `DiffusionTrainer`."""
    from keras_sd import DiffusionModel, NoiseScheduler
    from keras_sd.lora import add_lora
    from keras_sd.training.optimizers import OPTIMIZERS
    from keras_sd.training.trainer import DiffusionTrainer

    model = DiffusionModel(dtype=precision)
    if rank is not None:
        add_lora(model, rank)
    trainer = DiffusionTrainer(model, NoiseScheduler(), gradient_checkpointing=True)
    trainer.compile(OPTIMIZERS[optimizer](1e-5, global_clipnorm=1.0, use_ema=ema))
    random, shape = np.random.default_rng(0), (1, side // 8, side // 8, 4)
    batch = {"mean": random.standard_normal(shape), "std": np.full(shape, 0.1), "context": np.ones((1, 77, 768))}
    batch = {name: value.astype("float32") for name, value in batch.items()}
    for _ in range(2):
        assert np.isfinite(trainer.train_on_batch(batch))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES, help="one case (default: a table of all)")
    args = parser.parse_args()
    if args.case is not None:
        train(*CASES[args.case])
        return print(round(peak_memory() / 1e9, 2))
    print("| what is trained | peak GB |\n|---|---|")
    for name, (description, *_) in CASES.items():
        print(f"| {description} | {run('benchmarks.train_memory', name).split()[-1]} |", flush=True)


if __name__ == "__main__":
    main()
