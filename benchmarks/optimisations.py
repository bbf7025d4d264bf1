"""What each optimisation gains, with it and without it in turn: `python -m benchmarks.optimisations`

SD v1 at full size, random weights, bfloat16. To add one: a row in `OPTIMISATIONS` whose function puts
back, in a fresh process, what the library did before; the library has no switches for this.
"""

import argparse
import contextlib
import importlib
import json
import os
import tempfile
import time

from benchmarks.full_size import FOLDER, write_apart
from benchmarks.paired import in_turn, measure, peak_memory, ratios, spread


def put(module, name, value):
    """Sets `name`, dots allowed, of a module."""
    *path, name = name.split(".")
    holder = importlib.import_module(module)
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, name, value)


# === What is timed ===


def step(preset, steps):
    """Seconds of single denoising steps at the preset's size, with guidance."""
    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(preset, dtype="bfloat16")
    ticks = []
    sd.text_to_image("a", num_steps=steps + 2, seed=0, progress=False, callback=lambda *_: ticks.append(clock()))
    seconds = [later - earlier for earlier, later in zip(ticks, ticks[1:])]
    return seconds[1:]  # the second step's may wait for what the first one left


def loading(preset, steps):
    """Seconds from files to the U-Net in memory."""
    import keras

    from keras_sd import StableDiffusion

    keras.ops.zeros(1)
    sd = StableDiffusion.from_preset(preset, dtype="bfloat16")
    start = clock()
    sd.diffusion_model  # noqa: B018  (read at first use)
    return [clock() - start]


def importing(preset, steps):
    """Seconds until a command has Keras and its backend."""
    start = clock()
    prepare()
    return [clock() - start]


def command(preset, steps):
    """Seconds of `txt2img` with four steps, once Keras is there."""
    from keras_sd.__main__ import main

    prepare()
    start = clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        options = "--preset", preset, "--dtype", "bfloat16", "--steps", "4", "--out", f"{folder}/a.png"
        main(["txt2img", "a cat", *options])
    return [clock() - start]


def prepare():
    """What a command does before all else; nothing may import TensorFlow before."""
    from keras_sd.__main__ import patient_with_garbage, start_backend

    patient_with_garbage()
    start_backend()


def decoding(preset, steps):
    """Seconds of the decoder."""
    import numpy as np

    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(preset, dtype="bfloat16")
    latent = np.zeros((1, *sd.latent_shape()), "float32")
    return repeated(lambda: sd.decode(latent), 3)


def picture(preset, steps):
    """Seconds of a second picture."""
    from keras_sd import StableDiffusion

    sd = StableDiffusion.from_preset(preset, dtype="bfloat16")
    return repeated(lambda: sd.text_to_image("a", num_steps=steps, seed=0, progress=False), 2)


def repeated(run, times):
    """Seconds of each call but the first."""
    seconds = []
    for _ in range(times):
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds[1:]


clock = time.perf_counter


# === What is taken away ===


def all_imports():
    put("keras_sd.__main__", "hidden", lambda *packages: contextlib.nullcontext())
    put("keras_sd.__main__", "patient_with_garbage", lambda: None)


def copied_kernels():
    def stored(array):
        axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        return array.transpose(axes), [axes.index(axis) for axis in range(array.ndim)]

    put("keras_sd.weights.assign", "_stored", stored)


def kept_memory():
    put("keras_sd.layers.backend_fixes", "FixedShapes.release_memory", lambda self: None)


def one_reader():
    from concurrent.futures import ThreadPoolExecutor

    put("keras_sd.weights.assign", "ThreadPoolExecutor", lambda threads: ThreadPoolExecutor(1))


def keras_group_norm():
    import keras

    put("keras_sd.layers.group_norm", "GroupNorm.call", keras.layers.GroupNormalization.call)


def text_from_the_start():
    put("keras_sd.models.diffusion_model", "DiffusionModel.guided", None)


def keras_layer_norm():
    import keras

    put("keras_sd.layers.layer_norm", "LayerNorm.call", keras.layers.LayerNormalization.call)


def doubled_pictures():
    from keras_sd.layers.resampling import Upsample

    call = Upsample.call
    put("keras_sd.layers.resampling", "Upsample.call", lambda self, x, like=None: call(self, x, like))


def two_passes():
    from keras_sd.parts import Parts

    Parts.__init__.__kwdefaults__["two_pass_guidance"] = True


def whole_scores():
    put("keras_sd.layers.attention", "MAX_SCORES", 2**62)
    put("keras_sd.layers.attention", "MAX_HEADS", 2**62)


def narrow_values():
    """40 columns, as many as SD v1's heads have."""
    put("keras_sd.layers.attention", "WIDTH", 1)


def wide_softmax():
    put("keras_sd.layers.attention", "Attention._softmax_dtype", lambda self: "float32")


def gelu_apart():
    put("keras_sd.layers.attention", "GEGLU._fuses", lambda self: False)


def all_convolutions():
    import keras

    put("keras_sd.layers.conv", "Conv3x3._product", lambda self, x, *size: keras.layers.Conv2D.call(self, x))


def plain_kernels():
    put("keras_sd.layers.winograd", "faster", lambda *_: None)


def read_in_order():
    put("keras_sd.weights.assign", "_bytes", lambda one: 0)


def plain_products():
    put("keras_sd.layers.dense", "MANY_POSITIONS", 2**62)


def all_models():
    prepare()
    from keras_sd.parts import Parts

    read_ahead = Parts.read_ahead
    put("keras_sd.parts", "Parts.read_ahead", lambda self, *names, keep=True: read_ahead(self, *names))


def many_heaps():
    put("keras_sd.memory", "one_heap", lambda: None)
    put("keras_sd.memory", "trim", lambda: None)


def plain_norms():
    put("keras_sd.layers.group_norm", "GroupNorm._fuses", lambda self, shape: False)


def whole_norms():
    plain_norms()
    put("keras_sd.layers.group_norm", "MAX_BAND", 2**62)


def open_batch():
    import keras

    put("keras_sd.layers.backend_fixes", "FixedShapes._get_compiled_model", keras.Model._get_compiled_model)


def kept_pages():
    put("keras_sd.layers.backend_fixes", "given_back", lambda files: contextlib.nullcontext())


def one_product():
    from keras import ops

    from keras_sd.layers.attention import Attention, dot_product_attention

    separate = Attention.call

    def call(self, x, context=None):
        if context is not None or self.query.use_bias:
            return separate(self, x, context)
        kernel = ops.concatenate([layer.kernel for layer in (self.query, self.key, self.value)], axis=1)
        query, key, value = (self._split(one) for one in ops.split(ops.matmul(x, kernel), 3, axis=-1))
        attended = dot_product_attention(query, key, value, softmax_dtype=self._softmax_dtype())
        return self.output_projection(ops.reshape(attended, (-1, *self._length(x), self.dim)))

    put("keras_sd.layers.attention", "Attention.call", call)


OPTIMISATIONS = {  # name: what it is, backend, what is timed, how to do without
    "pieces": ("attention in pieces that the cache holds, instead of all scores", "tensorflow", step, whole_scores),
    "columns": ("values of heads filled up to whole registers", "tensorflow", step, narrow_values),
    "softmax": ("softmax of bfloat16 scores as they are, instead of in float32", "tensorflow", step, wide_softmax),
    "gelu": ("GELU in the product before it, instead of apart in float32", "tensorflow", step, gelu_apart),
    "products": ("3×3 convolutions at few positions as products", "tensorflow", step, all_convolutions),
    "rows": ("products of many positions as 1×1 convolutions", "tensorflow", step, plain_products),
    "winograd": ("3×3 convolutions of many channels by fewer products", "tensorflow", step, plain_kernels),
    "reading": ("weights read by two threads, instead of one", "tensorflow", loading, one_reader),
    "largest": ("the largest weights read first, instead of in order", "tensorflow", command, read_in_order),
    "norms": ("group normalization by batch normalization's kernels", "tensorflow", step, plain_norms),
    "decoder_norms": ("the same, instead of in bands that the cache holds", "tensorflow", decoding, plain_norms),
    "bands": ("the same, instead of whole pictures in float32", "tensorflow", decoding, whole_norms),
    "group_norm": ("`GroupNorm`, instead of Keras' own", "tensorflow", step, keras_group_norm),
    "layer_norm": ("layer normalization by one kernel, instead of Keras' own", "tensorflow", step, keras_layer_norm),
    "doubling": ("doubling and its convolution in one, instead of two", "tensorflow", step, doubled_pictures),
    "doubling_openvino": ("the same", "openvino", step, doubled_pictures),
    "doubling_decoder": ("the same", "tensorflow", decoding, doubled_pictures),
    "textless": (
        "what comes before the text once for both halves of guidance, instead of twice",
        "tensorflow",
        step,
        text_from_the_start,
    ),
    "textless_openvino": ("the same", "openvino", step, text_from_the_start),
    "one_pass": ("guidance in one batched pass, instead of two", "tensorflow", step, two_passes),
    "without_values": (
        "models built without values before a file is read, instead of initialized",
        "tensorflow",
        loading,
        lambda: put("keras_sd.weights.diffusers_folder", "without_values", contextlib.nullcontext),
    ),
    "fixed_shapes": ("compiled for the batch at hand, instead of any", "openvino", step, open_batch),
    "pages": ("pages of the file given back while OpenVINO packs weights", "openvino", step, kept_pages),
    "kernels": ("no copy of the kernels of 1×1 convolutions", "openvino", step, copied_kernels),
    "release": ("memory given back before the next model's", "openvino", picture, kept_memory),
    "imports": (
        "Keras without optional packages, and few looks for garbage, in commands",
        "tensorflow",
        importing,
        all_imports,
    ),
    "once": ("models given up once they are used, in commands", "tensorflow", command, all_models),
    "heap": (
        "one heap for all threads, given back after the first step, in commands",
        "tensorflow",
        command,
        many_heaps,
    ),
    "separate": ("queries, keys and values in three products, instead of one", "tensorflow", step, one_product),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", choices=OPTIMISATIONS, default=[*OPTIMISATIONS], help="default: all")
    parser.add_argument("--preset", default=str(FOLDER), help="model to measure on (default: SD v1 at full size)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, those of earlier calls included (default 3)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds of earlier calls")
    parser.add_argument("--run", choices=("with", "without"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        _, os.environ["KERAS_BACKEND"], timed, without = OPTIMISATIONS[args.case[0]]
        if args.run == "without":
            without()
        return print(json.dumps({"seconds": timed(args.preset, args.steps), "peak_memory": peak_memory()}))
    if args.preset == str(FOLDER):
        write_apart()
    for name in args.case:

        def run(side, name=name):
            options = ("--preset", args.preset, "--steps", args.steps)
            return measure("benchmarks.optimisations", "--run", side, "--case", name, *options)

        case = name if args.preset == str(FOLDER) else f"{name}, {args.preset}"
        rounds = in_turn("optimisations", case, ("with", "without"), args.rounds, run, args.fresh)
        gains = (spread(ratios(rounds, "with", "without", value)) for value in ("seconds", "peak_memory"))
        print("{}: seconds {}, memory {}".format(name, *gains), flush=True)


if __name__ == "__main__":
    main()
