"""What the latent cache saves: `python -m benchmarks.latent_cache`

An epoch of the embedded model's fine-tuning on pictures of one size, in turn with the cache and with each batch encoded
anew: the batches alone, and training on them. Prints the median ratios of pairs; building the cache is not counted.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from keras_sd import StableDiffusion
from keras_sd.training.batches import Pictures, batches
from keras_sd.training.examples import read_examples
from keras_sd.training.latent_cache import build_latent_cache
from keras_sd.training.optimizers import AdamW
from keras_sd.training.trainer import DiffusionTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    parser.add_argument("--pictures", type=int, default=64, help="their number (default 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a batch (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of epochs (default 3)")
    args = parser.parse_args()
    sd = StableDiffusion.from_preset("emoji")
    sd.text_encoder.trainable = False
    trainer = DiffusionTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, sd.image_encoder)
    trainer.compile(AdamW(1e-6))

    def encoded(batch):
        """What the trainer computes of a batch before its own work."""
        if "image" in batch:
            sd.image_encoder.moments.predict_on_batch(batch["image"])
            sd.text_encoder.predict_on_batch({"tokens": batch["tokens"]})

    def seconds(source, work):
        start = time.perf_counter()
        for batch in batches(source, args.batch_size, seed=0, epochs=1).as_numpy_iterator():
            work(batch)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        folder, random = pathlib.Path(folder), np.random.default_rng(0)
        for i in range(args.pictures):
            pixels = random.integers(0, 256, (args.size, args.size, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i}")
        pictures = Pictures(read_examples(folder)[0], sd.tokenizer, args.size, args.size)
        cache = build_latent_cache(folder / "cache", pictures, sd, progress=False)
        for name, work in (
            ("batches alone", encoded),
            ("training", lambda batch: float(trainer.train_on_batch(batch))),
        ):
            seconds(cache, work), seconds(pictures, work)  # compiles
            pairs = [(seconds(pictures, work), seconds(cache, work)) for _ in range(args.rounds)]
            ratios = [anew / cached for anew, cached in pairs]
            spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
            print(f"{name}: {statistics.median(ratios):.2f} times as fast with the cache ({spread})", flush=True)


if __name__ == "__main__":
    main()
