"""Peak memory of a full-size picture: SD v1's models with random weights. `python -m benchmarks.memory`

Prints one JSON line: what was drawn, and the process's peak resident memory in GB (10⁹ bytes).
"""

import argparse
import json
import resource

import numpy as np

from keras_sd import CLIPTokenizer, Decoder, DiffusionModel, NoiseScheduler, StableDiffusion, TextEncoder


def full_size(dtype, **kwargs):
    """SD v1's pipeline with random weights and no checkpoint behind it."""
    sd = StableDiffusion(preset=None, dtype=dtype, **kwargs)
    sd.tokenizer, sd.scheduler = CLIPTokenizer([]), (NoiseScheduler(), "ddim", {})
    sd.text_encoder, sd.diffusion_model, sd.decoder = (
        cls(dtype=dtype) for cls in (TextEncoder, DiffusionModel, Decoder)
    )
    return sd


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", help="Keras dtype policy (default bfloat16)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default 2: more cost time, not memory)")
    parser.add_argument("--two-passes", action="store_true", help="guidance in two passes")
    args = parser.parse_args()
    sd = full_size(args.dtype, img_height=args.height, img_width=args.width, two_pass_guidance=args.two_passes)
    image = sd.text_to_image("an apple", num_steps=args.steps, seed=0, progress=False)
    assert image.shape == (1, args.height, args.width, 3) and np.ptp(image) > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({**vars(args), "peak_gb": round(peak, 2)}))


if __name__ == "__main__":
    main()
