"""Images per second of the trainer, against the same step with diffusers: `python -m benchmarks.train_speed`

The same U-Net (widths, batch, size, precision), AdamW, cached latents and contexts, all weights trained; ours and
theirs in turn, each in a process of its own, the median ratio of pairs. KERAS_BACKEND chooses our backend.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

WIDTHS = {"narrow": (64, 128, 256, 256), "half": (160, 320, 640, 640), "full": (320, 640, 1280, 1280)}


def batch_of(args):
    """{"mean", "std", "context"}: random moments of the latents, and contexts."""
    random = np.random.default_rng(0)
    side = args.size // 8
    mean, std = random.standard_normal((2, args.batch_size, side, side, 4)).astype("float32")
    context = random.standard_normal((args.batch_size, 77, 768)).astype("float32")
    return {"mean": mean, "std": 0.1 * np.abs(std), "context": context}


def ours(args):
    """Seconds of each step of `DiffusionTrainer`."""
    from keras_sd import DiffusionModel, NoiseScheduler
    from keras_sd.training.optimizers import AdamW
    from keras_sd.training.trainer import DiffusionTrainer

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[args.precision]
    model = DiffusionModel(block_out_channels=WIDTHS[args.width], dtype=policy)
    trainer = DiffusionTrainer(model, NoiseScheduler(), gradient_checkpointing=args.gradient_checkpointing)
    trainer.compile(AdamW(1e-5, weight_decay=1e-2, epsilon=1e-8, global_clipnorm=1.0))
    batch = batch_of(args)
    return timed(args, lambda: float(trainer.train_on_batch(batch)))


def theirs(args):
    """Seconds of each step of diffusers' loop, as its text-to-image example has it."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=WIDTHS[args.width], cross_attention_dim=768, attention_head_dim=8, sample_size=args.size // 8
    )
    model.to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    batch = {name: torch.from_numpy(value) for name, value in batch_of(args).items()}
    mean, std = (batch[name].permute(0, 3, 1, 2).contiguous() for name in ("mean", "std"))

    def step():
        latent = mean + std * torch.randn_like(mean)
        noise, timestep = torch.randn_like(latent), torch.randint(0, 1000, (args.batch_size,))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            prediction = model(scheduler.add_noise(latent, noise, timestep), timestep, batch["context"]).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return timed(args, step)


def timed(args, step):
    """Seconds of each step, after two that do not count."""
    seconds = []
    for i in range(args.steps + 2):
        start = time.perf_counter()
        step()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--width", choices=WIDTHS, default="half", help="of the U-Net (default half SD v1's)")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels (default 256)")
    parser.add_argument("--batch-size", type=int, default=2, help="pictures in a batch (default 2)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--steps", type=int, default=5, help="steps of each run (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--run", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps({"ours": ours, "theirs": theirs}[args.run](args)))
        return

    def seconds(which):
        command = [sys.executable, "-m", "benchmarks.train_speed", *sys.argv[1:], "--run", which]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return statistics.median(json.loads(done.stdout.splitlines()[-1]))

    ratios = []
    for i in range(args.rounds):
        mine, other = seconds("ours"), seconds("theirs")
        ratios.append(other / mine)
        print(f"round {i + 1}: {mine:.2f} s and {other:.2f} s a step", flush=True)
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
    print(f"images per second, {backend} against torch: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
