"""Bytes on the wire for one 512×512 picture, by each way to draw it: `python -m benchmarks.payload`

Counted from the messages themselves, in SD v1's sizes (context 77×768, latent 64×64×4, 25 rows); no model is needed.
Random numbers stand for tensors, and a photograph-like PNG for the picture. HTTP's own headers are not counted: they
are some hundred bytes a request. Prints a markdown table, in kilobytes (1000 bytes).
"""

import base64
import io
import json

import numpy as np
from PIL import Image

from keras_sd import NoiseScheduler, make_table
from keras_sd.samplers import HISTORY
from serving import messages
from serving.client import predict_request, rest_body

ROWS, CHUNK = 25, 5
PROMPT = "a photograph of an astronaut riding a horse"


def tensor(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype="float32")


def strings(*items):
    return np.array(items, object)


def halves(array):
    return strings(*(item.astype("<f2").tobytes() for item in array))


def photograph(side=512):
    """A picture with the spectrum of photographs, 1 / frequency, and a little of a sensor's noise; as PNG."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))[..., None] + 1 / side
    spectrum = np.fft.fft2(tensor(side, side, 3), axes=(0, 1)) / frequency**1.5
    picture = np.fft.ifft2(spectrum, axes=(0, 1)).real
    picture = 127.5 + 50 * picture / picture.std() + tensor(side, side, 3)
    file = io.BytesIO()
    pixels = picture.clip(0, 255).round().astype("uint8")
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue(), pixels


PNG, PIXELS = photograph()
TABLE = make_table("ddim", NoiseScheduler(), ROWS).rows[None]
LATENT, HISTORY_STATE, CONTEXT = tensor(1, 64, 64, 4), tensor(1, HISTORY, 64, 64, 4), tensor(1, 77, 768)
SEED, TOKENS = np.array([[7, 0]], "int32"), np.arange(77, dtype="int32")[None] * 600
FIELDS = {"float32": "float_val", "int32": "int_val", "uint8": "int_val", "bool": "bool_val"}
IMAGE = {"image_bytes": strings(PNG)}


# === One exchange: bytes to the server, bytes from it ===


def grpc(model, signature, inputs, outputs):
    """Messages, and the 5 bytes before each; the answer in typed fields, as the server writes it."""
    request, response = predict_request(model, signature, inputs), messages.PredictResponse()
    for name, array in outputs.items():
        answer = messages.to_tensor(array)
        if answer.tensor_content:
            answer.ClearField("tensor_content")
            getattr(answer, FIELDS[array.dtype.name]).extend(array.ravel().tolist())
        response.outputs[name].CopyFrom(answer)
    return np.array([request.ByteSize() + 5, response.ByteSize() + 5])


def rest(model, signature, inputs, outputs):
    """JSON in columns."""
    body = json.loads(rest_body(signature, outputs))["inputs"]
    body = body if len(body) > 1 else next(iter(body.values()))
    return np.array([len(rest_body(signature, inputs)), len(json.dumps({"outputs": body}, separators=(",", ":")))])


def rows(model, signature, inputs, outputs):
    """JSON in rows, with Python's own separators and digits."""
    (instance,), (answer,) = row_objects(inputs), row_objects(outputs)
    request = json.dumps({"signature_name": signature, "instances": [instance]})
    return np.array([len(request), len(json.dumps({"predictions": [answer]}))])


def row_objects(arrays):
    """One dict name → value per row."""
    values = [
        [{"b64": base64.b64encode(item).decode()} for item in array] if array.dtype == object else array.tolist()
        for array in arrays.values()
    ]
    return [dict(zip(arrays, row)) for row in zip(*values)]


# === One picture ===


def floats(exchange, chunk):
    """`encode_prompt`, `denoise` in chunks, `decode_png`: tensors as they are."""
    prompts = {"prompt": strings(PROMPT.encode())}
    encoded = {"context": CONTEXT, "tokens": TOKENS, "truncated": np.array([False])}
    state = {"latent": LATENT, "history": HISTORY_STATE}
    fixed = {"context": CONTEXT, "unconditional_context": CONTEXT, "seed": SEED}
    total = 2 * exchange("text_encoder", "encode_prompt", prompts, encoded)
    for first in range(0, ROWS, chunk):
        inputs = {**state, **fixed, "steps": TABLE[:, first : first + chunk]}
        inputs["history"] = HISTORY_STATE * (first > 0)  # zeros are shorter in JSON
        total = total + exchange("diffusion_model", "denoise", inputs, state)
    return total + exchange("decoder", "decode_png", {"latent": LATENT}, IMAGE)


def compact(exchange, chunk):
    """The same through the signatures that take and give strings of float16."""
    prompts = {"prompt": strings(PROMPT.encode())}
    encoded = {"context_bytes": halves(CONTEXT), "tokens": TOKENS, "truncated": np.array([False])}
    state = {"latent_bytes": halves(LATENT), "history_bytes": halves(HISTORY_STATE)}
    fixed = {"context_bytes": halves(CONTEXT), "unconditional_context_bytes": halves(CONTEXT), "seed": SEED}
    total = 2 * exchange("text_encoder", "encode_prompt_bytes", prompts, encoded)
    for first in range(0, ROWS, chunk):
        inputs = {**state, **fixed, "steps": TABLE[:, first : first + chunk]}
        total = total + exchange("diffusion_model", "denoise_bytes", inputs, state)
    return total + exchange("decoder", "decode_png_bytes", {"latent_bytes": halves(LATENT)}, IMAGE)


def published(exchange):
    """The three calls of the published notebooks: tokens → contexts → latent → pixels."""
    contexts, one = {"context": CONTEXT, "unconditional_context": CONTEXT}, np.array([1], "int32")
    total = exchange("text_encoder", "serving_default", {"tokens": TOKENS, "batch_size": one}, contexts)
    numbers = {"num_steps": np.array([ROWS], "int32"), "batch_size": one}
    total = total + exchange("diffusion_model", "serving_default", {**contexts, **numbers}, {"latent": LATENT})
    return total + exchange("decoder", "serving_default", {"latent": LATENT}, {"generated_images": PIXELS[None]})


def main():
    ways = {
        f"gRPC, `denoise` in chunks of {CHUNK} rows": floats(grpc, CHUNK),
        "gRPC, `denoise` in one call": floats(grpc, ROWS),
        "gRPC, `serving_default` of the three models, pixels": published(grpc),
        f"REST, float16 bytes, chunks of {CHUNK} rows": compact(rest, CHUNK),
        "REST, float16 bytes, one call": compact(rest, ROWS),
        f"REST, JSON floats, chunks of {CHUNK} rows": floats(rest, CHUNK),
        f"REST, JSON floats in rows, chunks of {CHUNK} rows": floats(rows, CHUNK),
        "REST, JSON floats in rows, the three models, pixels": published(rows),
    }
    print("| way | to the server, kB | from the server, kB | both, kB |")
    print("|---|---:|---:|---:|")
    for way, (sent, received) in ways.items():
        print(f"| {way} | {sent / 1e3:,.0f} | {received / 1e3:,.0f} | {(sent + received) / 1e3:,.0f} |")
    print(f"\nThe PNG in it: {len(PNG) / 1e3:,.0f} kB.")


if __name__ == "__main__":
    main()
