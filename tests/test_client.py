"""The client against a server that is written here, to the contract: signatures, errors, JSON; its models are NumPy."""

import base64
import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from concurrent import futures
from unittest import mock

import grpc
import numpy as np
import pytest
from PIL import Image

from keras_sd.noise import initial_noise, row_noise
from keras_sd.noise_scheduler import NoiseScheduler
from keras_sd.samplers import COLUMNS, HISTORY, SAMPLERS, SamplerTable, make_table
from serving import messages
from serving.client import (
    BATCHED_ROWS,
    Client,
    GrpcServer,
    RestServer,
    ServerError,
    connect,
    float16_suffices,
    predict_request,
    rest_body,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = (8, 8, 4)
CONFIG = {
    "preset": "toy",
    "scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    | {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "image_size": [64, 64],
    "latent_shape": list(SHAPE),
    "factor": 8,
    "in_channels": 4,
    "history": HISTORY,
    "columns": list(COLUMNS),
}


# === The models ===


class Refusal(Exception):
    """An error that the server answers with: a gRPC code and a message."""


def context_of(prompt):
    rng = np.random.default_rng(zlib.crc32(prompt.encode()))
    return rng.standard_normal((77, 6), dtype="float32")


def unet(latent, timestep, context):
    return np.tanh(latent + context.mean() + timestep / 1000.0).astype("float32")


def guided(latent, row, context, unconditional_context):
    one = unet(latent, row[1], unconditional_context)
    return one + row[2] * (unet(latent, row[1], context) - one)


def denoise(latent, history, context, unconditional_context, steps, seed, extra=None):
    if not (np.isfinite(latent).all() and steps.shape[2] == len(COLUMNS)):
        raise Refusal("INVALID_ARGUMENT", "latent holds NaN")
    latent, history = latent.copy(), history.copy()
    for b in range(len(latent)):
        noise = row_noise(int(seed[b].view("uint32")[0]), 1, latent.shape[1:], SamplerTable.from_rows(steps[b]))
        for i, row in enumerate(steps[b]):
            if row[0] == 0:
                continue
            output = guided(row[0] * latent[b], row, context[b], unconditional_context[b])
            if extra is not None:
                output = output + extra[b].mean()
            history[b] = np.concatenate([(row[3] * latent[b] + row[4] * output)[None], history[b, :-1]])
            latent[b] = row[5] * latent[b] + np.tensordot(row[6 : 6 + HISTORY], history[b], 1) + row[11] * noise(i)[0]
    return {"latent": latent, "history": history}


def to_png(latent):
    image = np.clip(np.round((latent[..., :3] + 3.0) * 42.5), 0, 255).astype("uint8").repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def strings(items):
    return np.array(list(items), object)


def halves(array):
    return strings(item.astype("<f2").tobytes() for item in array)


def floats(items, *shape):
    return np.stack([np.frombuffer(item, "<f2").astype("float32").reshape(shape) for item in items])


def encode_prompt(prompt):
    texts = [item.decode() for item in prompt]
    context, cut = np.stack([context_of(text) for text in texts]), [len(text.split()) > 75 for text in texts]
    return {"context": context, "tokens": np.zeros((len(texts), 77), "int32"), "truncated": np.array(cut)}


def encode_prompt_bytes(prompt):
    outputs = encode_prompt(prompt)
    return {**outputs, "context_bytes": halves(outputs.pop("context"))}


def denoise_bytes(latent_bytes, history_bytes, context_bytes, unconditional_context_bytes, steps, seed):
    outputs = denoise(
        floats(latent_bytes, *SHAPE),
        floats(history_bytes, HISTORY, *SHAPE),
        floats(context_bytes, 77, 6),
        floats(unconditional_context_bytes, 77, 6),
        steps,
        seed,
    )
    return {f"{name}_bytes": halves(value) for name, value in outputs.items()}


def encode_image(image_bytes):
    images = [np.asarray(Image.open(io.BytesIO(item)).convert("RGB"), "float32") for item in image_bytes]
    blocks = [image[4::8, 4::8] / 127.5 - 1.0 for image in images]
    return {"latent": np.stack([np.concatenate([block, block[..., :1]], axis=-1) for block in blocks])}


TENSORS = ("latent", "history", "context", "unconditional_context")
MODELS = {  # model → signature → (function, names of the inputs, names of the outputs)
    "text_encoder": {
        "describe": (lambda prompt: {"config": strings([json.dumps(CONFIG).encode()])}, ("prompt",), ("config",)),
        "encode_prompt": (encode_prompt, ("prompt",), ("context", "tokens", "truncated")),
        "encode_prompt_bytes": (encode_prompt_bytes, ("prompt",), ("context_bytes", "tokens", "truncated")),
    },
    "diffusion_model": {
        "denoise": (denoise, (*TENSORS, "steps", "seed"), ("latent", "history")),
        "denoise_bytes": (
            denoise_bytes,
            (*(f"{name}_bytes" for name in TENSORS), "steps", "seed"),
            ("latent_bytes", "history_bytes"),
        ),
    },
    "decoder": {
        "decode_png": (lambda latent: {"image_bytes": strings(map(to_png, latent))}, ("latent",), ("image_bytes",)),
        "decode_png_bytes": (
            lambda latent_bytes: {"image_bytes": strings(map(to_png, floats(latent_bytes, *SHAPE)))},
            ("latent_bytes",),
            ("image_bytes",),
        ),
    },
    "image_encoder": {"serving_default": (encode_image, ("image_bytes",), ("latent",))},
}
PLAIN = {name: {key: one for key, one in found.items() if not key.endswith("_bytes")} for name, found in MODELS.items()}
BATCHING = {**{name: found for name, found in MODELS.items() if name != "diffusion_model"}}
BATCHING["denoiser"] = {"serving_default": MODELS["diffusion_model"]["denoise"]}


# === The server ===


def typed(array):
    """A tensor as the real server answers: every value in a typed field."""
    tensor = messages.to_tensor(array)
    if tensor.tensor_content:
        field = {"float32": "float_val", "int32": "int_val", "bool": "bool_val"}[array.dtype.name]
        tensor.ClearField("tensor_content")
        getattr(tensor, field).extend(array.ravel().tolist())
    return tensor


class Fake:
    """A server on two ports: `grpc_host` and `rest_host`. `requests` lists what was asked for, `before` may raise."""

    def __init__(self, models=MODELS, before=lambda server, model, signature, inputs: None, tls=None):
        self.models, self.before, self.requests, self.payloads = models, before, [], []
        self._grpc = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        handlers = {
            "Predict": (self.grpc_predict, messages.PredictRequest),
            "GetModelMetadata": (self.grpc_metadata, messages.GetModelMetadataRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(function, kind.FromString, lambda x: x.SerializeToString())
            for name, (function, kind) in handlers.items()
        }
        service = grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", handlers)
        self._grpc.add_generic_rpc_handlers((service,))
        if tls is None:
            port = self._grpc.add_insecure_port("localhost:0")
        else:
            pair = [tuple(path.read_bytes() for path in tls)]
            port = self._grpc.add_secure_port("localhost:0", grpc.ssl_server_credentials(pair))
        self.grpc_host = f"localhost:{port}"
        self._grpc.start()
        self._http = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
        self._http.daemon_threads, self._http.fake = True, self
        self.rest_host = f"localhost:{self._http.server_port}"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls[1], tls[0])
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self._grpc.stop(0)
        self._http.shutdown()
        self._http.server_close()

    def kill(self):
        """What is left when the process is killed: nobody listens, and every connection breaks."""
        self._grpc.stop(0)
        self._http.server_close()
        raise ConnectionAbortedError

    def signatures(self, model):
        if model not in self.models:
            raise Refusal("NOT_FOUND", f"Servable not found for request: Latest({model})")
        return self.models[model]

    def run(self, model, signature, inputs):
        found = self.signatures(model)
        if signature not in found:
            raise Refusal("FAILED_PRECONDITION", f'Serving signature name: "{signature}" not found in signature def')
        function, names, _ = found[signature]
        if inputs.keys() != set(names) and "extra" not in inputs:
            raise Refusal("INVALID_ARGUMENT", f"input names {sorted(inputs)}, wanted {sorted(names)}")
        self.requests.append((model, signature, inputs))
        self.before(self, model, signature, inputs)
        return function(**inputs)

    def chunks(self):
        """Rows of each denoising request."""
        return [inputs["steps"].shape[1] for _, _, inputs in self.requests if "steps" in inputs]

    def grpc_predict(self, request, context):
        self.payloads.append(request.ByteSize())
        inputs = {name: messages.to_array(tensor) for name, tensor in request.inputs.items()}
        response = messages.PredictResponse()
        outputs = self._answer(context, request.model_spec.name, request.model_spec.signature_name, inputs)
        for name, array in outputs.items():
            response.outputs[name].CopyFrom(typed(array))
        return response

    def _answer(self, context, *call):
        try:
            return self.run(*call)
        except Refusal as error:
            context.abort(getattr(grpc.StatusCode, error.args[0]), error.args[1])
        except ConnectionAbortedError:
            time.sleep(1)  # the stopping server cancels this call
            raise

    def grpc_metadata(self, request, context):
        found, response = messages.SignatureDefMap(), messages.GetModelMetadataResponse()
        try:
            for name, (_, inputs, outputs) in self.signatures(request.model_spec.name).items():
                for side, names in (("inputs", inputs), ("outputs", outputs)):
                    for one in names:
                        getattr(found.signature_def[name], side)[one].name = one
        except Refusal as error:
            context.abort(getattr(grpc.StatusCode, error.args[0]), error.args[1])
        response.metadata["signature_def"].value = found.SerializeToString()
        return response


class Handler(http.server.BaseHTTPRequestHandler):
    """REST, in columns."""

    protocol_version = "HTTP/1.1"
    STATUS = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503}
    STATUS |= {"DEADLINE_EXCEEDED": 504}

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(self.metadata)

    def do_POST(self):
        self.answer(self.predict)

    def answer(self, function):
        try:
            status, body = 200, function(self.server.fake, self.path.removeprefix("/v1/models/"))
        except Refusal as error:
            status, body = self.STATUS[error.args[0]], {"error": error.args[1]}
        except ConnectionAbortedError:
            self.close_connection = True
            return
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def metadata(self, fake, path):
        model = path.removesuffix("/metadata")
        found = {
            name: {"inputs": dict.fromkeys(inputs, {}), "outputs": dict.fromkeys(outputs, {})}
            for name, (_, inputs, outputs) in fake.signatures(model).items()
        }
        return {"model_spec": {"name": model}, "metadata": {"signature_def": {"signature_def": found}}}

    def predict(self, fake, path):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        fake.payloads.append(len(data))
        request = json.loads(data)
        inputs = {name: self.array(name, value) for name, value in request["inputs"].items()}
        outputs = fake.run(path.removesuffix(":predict"), request["signature_name"], inputs)
        values = {name: self.value(name, array) for name, array in outputs.items()}
        return {"outputs": values if len(values) > 1 else next(iter(values.values()))}

    @staticmethod
    def array(name, value):
        if name.endswith("_bytes") or name == "prompt":
            return strings(base64.b64decode(item["b64"]) for item in value)
        return np.array(value, "int32" if name == "seed" else "float32")

    @staticmethod
    def value(name, array):
        if array.dtype != object:
            return array.tolist()
        if name.endswith("_bytes"):
            return [{"b64": base64.b64encode(item).decode()} for item in array]
        return array.item().decode() if array.shape == () else [item.decode() for item in array]


@pytest.fixture
def serve():
    """A function that starts a `Fake`."""
    with contextlib.ExitStack() as stack:

        def start(*args, **kwargs):
            fake = Fake(*args, **kwargs)
            stack.callback(fake.stop)
            return fake

        yield start


@pytest.fixture(params=["grpc", "rest", "rest without bytes"])
def transport(request, serve):
    """(a server, a client of it)."""
    fake = serve(PLAIN if request.param == "rest without bytes" else MODELS)
    rest = request.param != "grpc"
    with Client(fake.rest_host if rest else fake.grpc_host, rest=rest) as client:
        yield fake, client


def expected(table, seed, prompts, negative="", batch_size=None, start=None, blend=None):
    """The pictures as NumPy's reference executor draws them with the same models."""
    batch_size = batch_size or len(prompts)
    prompts = prompts * batch_size if len(prompts) == 1 else prompts
    images = []
    for i, prompt in enumerate(prompts):
        contexts, row = (context_of(prompt), context_of(negative)), -1

        def model(x, timestep):
            nonlocal row
            row += 1
            return guided(x, table.rows[row], *contexts)  # noqa: B023

        noise = initial_noise(seed + i, 1, SHAPE)[0]
        x = table.init_noise_scale * noise if start is None else table.signal[0] * start + table.sigma[0] * noise
        x = table.run(model, x.astype("float64"), noise=lambda row: row_noise(seed + i, 1, SHAPE, table)(row)[0])  # noqa: B023
        images.append(np.asarray(Image.open(io.BytesIO(to_png(x)))))
    return np.stack(images)


def assert_same(images, wanted):
    """Within 1/255 on 99.9 % of the values."""
    assert images.dtype == np.uint8 and images.shape == wanted.shape
    assert np.mean(np.abs(images.astype(int) - wanted) > 1) <= 0.001


def own_table(num_steps, **options):
    return make_table("ddim", NoiseScheduler(prediction_type="v_prediction"), num_steps, **options)


# === Pictures ===


def test_a_picture_is_the_reference_executors_whatever_the_way_and_the_chunks(transport):
    fake, client = transport
    wanted = expected(own_table(13), 7, ["an apple"], "blurry")
    for chunk in (1, 3, 5, 13, 99):
        fake.requests.clear()
        images = client.text_to_image("an apple", "blurry", num_steps=13, seed=7, chunk=chunk, progress=False)
        assert_same(images, wanted)
        assert fake.chunks() == [min(chunk, 13 - first) for first in range(0, 13, chunk)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_in_chunks(serve, sampler):
    fake = serve()
    table = make_table(sampler, NoiseScheduler(prediction_type="v_prediction"), 12, guidance_scale=3.0)
    wanted = expected(table, 3, ["an apple", "a pear"])
    for host, rest in ((fake.grpc_host, False), (fake.rest_host, True)):
        with Client(host, rest=rest) as client:
            images = client.text_to_image(
                ["an apple", "a pear"],
                num_steps=12,
                unconditional_guidance_scale=3.0,
                seed=3,
                sampler=sampler,
                progress=False,
            )
        assert_same(images, wanted)


def test_several_pictures_are_one_request_a_chunk_and_each_has_its_own_seed(transport):
    fake, client = transport
    images = client.text_to_image("an apple", batch_size=3, num_steps=6, seed=5, progress=False)
    assert len(fake.chunks()) == 2
    for i, image in enumerate(images):
        assert_same(client.text_to_image("an apple", num_steps=6, seed=5 + i, progress=False), image[None])
    assert len(np.unique(images.reshape(3, -1), axis=0)) == 3


def test_large_seeds_reach_the_server_as_their_bits(serve):
    fake = serve()
    with Client(fake.grpc_host) as client:
        arguments = {"num_steps": 4, "sampler": "euler_a", "progress": False}
        wanted = expected(make_table("euler_a", NoiseScheduler(prediction_type="v_prediction"), 4), 2**32 - 2, ["a"])
        assert_same(client.text_to_image("a", seed=2**32 - 2, **arguments), wanted)
        with pytest.raises(ValueError, match="seed must be below 4294967296"):
            client.text_to_image("a", seed=2**32, **arguments)
        client.text_to_image("a", seed=2**40, num_steps=1, progress=False)


def test_png_files_come_as_the_server_wrote_them(transport):
    _, client = transport
    files = client.text_to_image("an apple", batch_size=2, num_steps=2, seed=1, png=True, progress=False)
    images = client.text_to_image("an apple", batch_size=2, num_steps=2, seed=1, progress=False)
    assert [np.asarray(Image.open(io.BytesIO(file))).tolist() for file in files] == images.tolist()


def test_a_table_and_noise_of_ones_own(serve):
    with Client(serve().grpc_host) as client:
        noise, table = initial_noise(9, 1, SHAPE)[0], own_table(4, guidance_scale=2.0)
        images = client.text_to_image("an apple", sampler=table, diffusion_noise=noise, progress=False)
        assert_same(images, expected(table, 9, ["an apple"]))
        with pytest.raises(ValueError, match="exclude each other"):
            client.text_to_image("an apple", diffusion_noise=noise, seed=1)
        with pytest.raises(ValueError, match="diffusion_noise must have shape"):
            client.text_to_image("an apple", diffusion_noise=noise[:4])


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8"))


def test_image_to_image_starts_from_the_picture(transport):
    _, client = transport
    start = encode_image([_bytes(picture())])["latent"][0]
    images = client.image_to_image(picture(), "an apple", strength=0.5, num_steps=8, seed=2, progress=False)
    assert_same(images, expected(own_table(8, strength=0.5), 2, ["an apple"], start=start))
    unchanged = client.image_to_image(picture(), "an apple", strength=0, batch_size=2, progress=False)
    assert_same(unchanged, np.repeat(np.asarray(Image.open(io.BytesIO(to_png(start))))[None], 2, axis=0))


def _bytes(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_a_picture_takes_the_size_of_an_export_that_has_only_one(serve):
    def encode(image_bytes):
        images = [Image.open(io.BytesIO(item)).resize((64, 64)) for item in image_bytes]
        return encode_image([_bytes(image) for image in images])

    fake = serve({**MODELS, "image_encoder": {"serving_default": (encode, ("image_bytes",), ("latent",))}})
    with Client(fake.grpc_host) as client:
        big = picture().resize((200, 128))
        assert client.image_to_image(big, "a", num_steps=2, progress=False).shape == (1, 64, 64, 3)
        mask = np.zeros((128, 200), "uint8")
        mask[:, 100:] = 255
        drawn = client.inpaint(big, mask, "a", num_steps=2, progress=False)
        middle = np.asarray(big.resize((100, 64), Image.Resampling.LANCZOS).crop((18, 0, 82, 64)))
        assert drawn.shape == (1, 64, 64, 3) and np.abs(drawn[0, :, :24].astype(int) - middle[:, :24]).max() <= 8
        with pytest.raises(ValueError, match="height and width must be 64 and 64"):
            client.image_to_image(big, "a", height=128, width=128, progress=False)


def test_inpaint_keeps_what_is_known(transport):
    fake, client = transport
    mask = np.zeros((64, 64), "uint8")
    mask[:, 32:] = 255
    for strength in (1.0, 0.5):
        images = client.inpaint(
            picture(), mask, "an apple", strength=strength, batch_size=2, num_steps=6, seed=4, progress=False
        )
        assert (images[:, :, :32] == np.asarray(picture())[:, :32]).all() and np.ptp(images[:, :, 32:]) > 50
    assert set(fake.chunks()) == {1}
    whole = client.inpaint(picture(), mask | 255, "an apple", num_steps=6, seed=4, progress=False)
    assert_same(whole, expected(own_table(6), 4, ["an apple"]))
    files = client.inpaint(picture(), mask, "an apple", num_steps=6, seed=4, png=True, progress=False)
    assert (np.asarray(Image.open(io.BytesIO(files[0])))[:, :32] == np.asarray(picture())[:, :32]).all()


def test_inpaint_with_an_inpainting_model_sends_the_mask_and_the_masked_picture(serve):
    config = {**CONFIG, "in_channels": 9}
    describe = (lambda: {"config": np.array(json.dumps(config).encode(), object)}, (), ("config",))
    fake = serve({**MODELS, "text_encoder": {**MODELS["text_encoder"], "describe": describe}})
    mask = np.zeros((64, 64), "uint8")
    mask[:, 32:] = 255
    with Client(fake.grpc_host) as client:
        client.inpaint(picture(), mask, "an apple", num_steps=6, seed=4, chunk=3, progress=False)
    assert fake.chunks() == [3, 3]
    extra = next(inputs["extra"] for _, _, inputs in fake.requests if "extra" in inputs)
    assert extra.shape == (1, 8, 8, 5) and (extra[0, :, :4, 0] == 0).all() and (extra[0, :, 4:, 0] == 1).all()
    assert np.abs(extra[0, :, 4:, 1:]).max() < 0.005 and np.abs(extra[0, :, :4, 1:]).max() > 0.5


# === Chunks: progress, cancel, retry ===


def test_the_callback_sees_every_chunk_and_stops_the_run(transport):
    fake, client = transport
    seen = []

    def callback(row, rows, latent):
        seen.append((row, rows, latent.shape))
        return row < 5

    images = client.text_to_image("a", num_steps=10, seed=1, chunk=3, callback=callback, progress=False)
    assert seen == [(2, 10, (1, *SHAPE)), (5, 10, (1, *SHAPE))]
    assert fake.chunks() == [3, 3] and images.shape == (1, 64, 64, 3)


def test_the_progress_bar_counts_rows(serve, capsys):
    with Client(serve().grpc_host) as client:
        client.text_to_image("a", num_steps=7, seed=1)
        assert "/7" in capsys.readouterr().err
        client.text_to_image("a", num_steps=7, seed=1, progress=False)
        assert not capsys.readouterr().err


def killing(after):
    """Kills the server at its `after`-th denoising request."""

    def before(server, model, signature, inputs):
        if len(server.chunks()) == after:
            server.kill()

    return before


@pytest.mark.parametrize("rest", [False, True])
def test_killing_one_of_two_servers_does_not_change_the_picture(serve, rest):
    first, second = serve(before=killing(3)), serve()
    hosts = [fake.rest_host if rest else fake.grpc_host for fake in (first, second)]
    arguments = {"num_steps": 20, "seed": 7, "sampler": "dpmpp_2m", "progress": False}
    with Client(hosts, rest=rest) as client:
        images = client.text_to_image("an apple", **arguments)
        with Client(hosts[1], rest=rest) as other:
            assert (images == other.text_to_image("an apple", **arguments)).all()
        assert len(first.chunks()) == 3 and client.servers[0].address.endswith(hosts[1])


def refusing(code, message="no", until=10**9):
    """Refuses the first `until` denoising requests."""

    def before(server, model, signature, inputs):
        if "steps" in inputs and len(server.chunks()) <= until:
            raise Refusal(code, message)

    return before


@pytest.mark.parametrize("rest", [False, True])
def test_what_passes_is_tried_again_at_the_same_host(serve, rest, monkeypatch):
    monkeypatch.setattr("serving.client.PAUSES", (0, 0.01, 0.01))
    merged = "Tensors with name 'x' from different tasks have different shapes and padding is turned off."
    for before in (refusing("UNAVAILABLE", "queue full", 2), refusing("FAILED_PRECONDITION", merged, 2)):
        fake = serve(before=before)
        with Client(fake.rest_host if rest else fake.grpc_host, rest=rest) as client:
            client.text_to_image("a", num_steps=2, seed=1, progress=False)
        assert len(fake.chunks()) == 3
    fake = serve(before=refusing("UNAVAILABLE", "queue full"))
    with Client(fake.rest_host if rest else fake.grpc_host, rest=rest) as client:
        with pytest.raises(ServerError, match=r"diffusion_model at .*queue full \(UNAVAILABLE\)") as caught:
            client.text_to_image("a", num_steps=2, seed=1, progress=False)
        assert caught.value.code == "UNAVAILABLE" and len(fake.chunks()) == 3


@pytest.mark.parametrize("rest", [False, True])
def test_what_would_fail_everywhere_is_raised_at_once(serve, rest):
    first, second = serve(before=refusing("INVALID_ARGUMENT", "steps must have\nthe shape")), serve()
    hosts = [fake.rest_host if rest else fake.grpc_host for fake in (first, second)]
    with (
        Client(hosts, rest=rest) as client,
        pytest.raises(ServerError, match=r"at .*: steps must have the shape \(INVALID_ARGUMENT\)"),
    ):
        client.text_to_image("a", num_steps=2, seed=1, progress=False)
    assert len(first.chunks()) == 1 and not second.chunks()


@pytest.mark.parametrize("rest", [False, True])
def test_a_model_that_one_host_lacks_is_found_on_another(serve, rest):
    lacking = {name: found for name, found in MODELS.items() if name != "diffusion_model"}
    first, second = serve(lacking), serve()
    hosts = [fake.rest_host if rest else fake.grpc_host for fake in (first, second)]
    with Client(hosts, rest=rest) as client:
        client.text_to_image("a", num_steps=2, seed=1, progress=False)
    with Client(hosts[0], rest=rest) as client, pytest.raises(ServerError, match="no diffusion_model") as caught:
        client.text_to_image("a", num_steps=2, seed=1, progress=False)
    assert caught.value.code == "NOT_FOUND"


@pytest.mark.parametrize("rest", [False, True])
def test_every_model_may_have_a_host_of_its_own(serve, rest):
    fakes = [serve({name: MODELS[name]}) for name in MODELS]
    with Client([fake.rest_host if rest else fake.grpc_host for fake in fakes], rest=rest) as client:
        images = client.text_to_image("an apple", num_steps=12, seed=7, progress=False)
    assert_same(images, expected(own_table(12), 7, ["an apple"]))
    assert [len(fake.requests) for fake in fakes] == [3, 3, 1, 0]


@pytest.mark.parametrize("rest", [False, True])
def test_a_request_that_takes_too_long_goes_to_the_next_host(serve, rest):
    release = threading.Event()

    def before(server, model, signature, inputs):
        if "steps" in inputs:
            release.wait(30)

    first, second = serve(before=before), serve()
    hosts = [fake.rest_host if rest else fake.grpc_host for fake in (first, second)]
    try:
        with Client(hosts, rest=rest, timeout=1.0) as client:
            images = client.text_to_image("an apple", num_steps=3, seed=7, progress=False)
        assert_same(images, expected(own_table(3), 7, ["an apple"]))
        with Client(hosts[0], rest=rest, timeout=0.5) as client, pytest.raises(ServerError) as caught:
            client.text_to_image("an apple", num_steps=3, seed=7, progress=False)
        assert caught.value.code == "DEADLINE_EXCEEDED"
    finally:
        release.set()


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr("serving.client.PAUSES", (0, 0.01))
    for hosts, message in (
        ("localhost:9", "^text_encoder at (http://)?localhost:9: .*refused.*"),
        (["localhost:9", "localhost:13"], "^None of 2 hosts could: text_encoder at .*:9: .*; text_encoder at .*:13: "),
        ("no.such.host.invalid", "^text_encoder at (http://)?no.such.host.invalid:850[01]: "),
    ):
        for rest in (False, True):
            with Client(hosts, rest=rest) as client, pytest.raises(ServerError, match=message) as caught:
                client.text_to_image("a")
            assert caught.value.code == "UNAVAILABLE"


def test_ctrl_c_cancels_the_running_request(serve):
    cancelled, started = threading.Event(), threading.Event()

    class Watched(Fake):
        def grpc_predict(self, request, context):
            if "steps" in request.inputs:
                context.add_callback(cancelled.set)
                started.set()
                cancelled.wait(30)
            return super().grpc_predict(request, context)

    fake = Watched()
    script = f"from serving.client import Client; Client({fake.grpc_host!r}).text_to_image('a', num_steps=2)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": ROOT}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.wait(60)
        process.send_signal(2)
        assert cancelled.wait(10) and "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    finally:
        process.kill()
        fake.stop()


def test_what_a_graph_refuses_is_one_sentence():
    message = "assertion failed: [latent must have the shape (batch, 8, 8, 4); got] [1 16 8 4]\n\t [[{{node Assert}}]]"
    error = ServerError("INVALID_ARGUMENT", f"diffusion_model at gpu-1:8500: {message}")
    wanted = (
        "diffusion_model at gpu-1:8500: latent must have the shape (batch, 8, 8, 4); got 1 16 8 4 (INVALID_ARGUMENT)"
    )
    assert str(error) == wanted


# === Which model and which signature ===


def test_a_batching_servers_denoiser_gets_requests_of_one_shape(serve):
    fake = serve(BATCHING)
    mask = np.full((64, 64), 255, "uint8")
    for host, rest in ((fake.grpc_host, False), (fake.rest_host, True)):
        with Client(host, rest=rest) as client:
            for chunk in (3, 5, 7):
                images = client.text_to_image("an apple", num_steps=8, seed=7, chunk=chunk, progress=False)
                assert_same(images, expected(own_table(8), 7, ["an apple"]))
            client.inpaint(picture(), mask, "an apple", num_steps=2, seed=7, progress=False)
    assert set(fake.chunks()) == {BATCHED_ROWS}


def test_rest_sends_float16_where_that_suffices(serve):
    full, plain = serve(), serve(PLAIN)
    for sampler, same in (("ddim", False), ("lms", True)):
        for fake in (full, plain):
            fake.payloads.clear(), fake.requests.clear()
            with Client(fake.rest_host, rest=True) as client:
                client.text_to_image("a", num_steps=20, seed=1, sampler=sampler, progress=False)
        signatures = {signature for _, signature, _ in full.requests}
        assert ("denoise" in signatures) == same and ("denoise_bytes" in signatures) != same
        assert "encode_prompt_bytes" in signatures and "decode_png_bytes" in signatures
        assert same or sum(full.payloads) < 0.4 * sum(plain.payloads)


def test_float16_suffices_for_all_but_the_solvers_that_amplify_rounding():
    tables = {name: make_table(name, NoiseScheduler(), 25) for name in SAMPLERS}
    assert [name for name, table in tables.items() if not float16_suffices(table, 5)] == ["lms"]
    assert [name for name, table in tables.items() if not float16_suffices(table, 1)] == ["plms", "lms"]


def test_models_of_another_kind_are_refused(serve):
    config = {**CONFIG, "columns": ["timestep"]}
    describe = (lambda: {"config": np.array(json.dumps(config).encode(), object)}, (), ("config",))
    fake = serve({**MODELS, "text_encoder": {**MODELS["text_encoder"], "describe": describe}})
    with Client(fake.grpc_host) as client, pytest.raises(ServerError, match="export them again"):
        client.text_to_image("a")


# === Arguments ===


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("text_to_image", {"prompt": 5}, "prompt must be a string"),
        ("text_to_image", {"prompt": []}, "prompt must be a string"),
        ("text_to_image", {"prompt": ["a", "b"], "batch_size": 3}, "batch_size is 3, but there are 2"),
        ("text_to_image", {"prompt": "a", "batch_size": 0}, "batch_size must be an integer of at least 1"),
        ("text_to_image", {"prompt": "a", "num_steps": 0}, "num_steps must be an integer from 1"),
        ("text_to_image", {"prompt": "a", "sampler": "eular"}, "Did you mean 'euler'"),
        ("text_to_image", {"prompt": "a", "height": 60}, "height must be a multiple of 8; got 60. 56 or 64"),
        ("text_to_image", {"prompt": "a", "seed": -1}, "seed must be an integer of at least 0"),
        ("text_to_image", {"prompt": "a", "chunk": 0}, "chunk must be an integer of at least 1"),
        ("text_to_image", {"prompt": "a", "colour": 1}, "does not take 'colour'"),
        ("image_to_image", {"prompt": "a", "image": "no.png"}, "there is no file 'no.png'"),
        ("image_to_image", {"prompt": "a", "image": picture(), "strength": 2}, "strength must be in"),
        ("inpaint", {"prompt": "a", "image": picture(), "mask": np.zeros((9, 9))}, "they must be alike"),
        ("inpaint", {"prompt": "a", "image": picture(), "mask": np.zeros((64, 64))}, "mask is empty"),
        ("inpaint", {"prompt": "a", "image": picture(), "mask": picture(), "strength": 0}, "strength must be above 0"),
    ],
)
def test_bad_arguments(serve, method, arguments, message):
    with (
        Client(serve().grpc_host) as client,
        pytest.raises((ValueError, TypeError, FileNotFoundError), match=message),
    ):
        getattr(client, method)(**arguments, progress=False)


def test_a_prompt_that_is_cut_gives_a_warning(transport):
    _, client = transport
    with pytest.warns(UserWarning, match="longer than 75 tokens"):
        client.encode_text("apple " * 80)


def test_hosts():
    addresses = {
        "gpu-1": ("gpu-1:8500", GrpcServer),
        "10.0.0.1:9000": ("10.0.0.1:9000", GrpcServer),
        "[::1]": ("[::1]:8500", GrpcServer),
        "dns:///serving:8500": ("dns:///serving:8500", GrpcServer),
        "unix:/tmp/socket": ("unix:/tmp/socket", GrpcServer),
        "https://example.org/serving/": ("https://example.org/serving", RestServer),
    }
    for given, (address, kind) in addresses.items():
        server = connect(given, 1.0)
        assert (server.address, type(server)) == (address, kind)
        server.close()
    assert connect("gpu-1", 1.0, rest=True).address == "http://gpu-1:8501"
    assert connect("gpu-1:1", 1.0, rest=True, tls=True).address == "https://gpu-1:1"
    for wrong in ("", "host:", "host:port", "host:70000", "::1", "ftp://host", "a b", "http://"):
        with pytest.raises(ValueError, match="A host is a name or address"):
            connect(wrong, 1.0)
    with pytest.raises(ValueError, match="TLS needs an https address"):
        connect("http://host", 1.0, tls=True)
    for rest in (False, True):
        with pytest.raises(FileNotFoundError):
            connect("host", 1.0, rest=rest, tls="no.pem")
    with pytest.raises(ValueError, match="at least one host"):
        Client([])
    for timeout in (0, -1, "5", float("inf"), True):
        with pytest.raises(ValueError, match="timeout must be"):
            Client("host", timeout=timeout)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.client.PAUSES", (0,))
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    fake = serve(tls=(key, certificate))
    for host, rest in ((fake.grpc_host, False), (fake.rest_host, True), (f"https://{fake.rest_host}", False)):
        with Client(host, rest=rest, tls=certificate) as client:
            assert client.text_to_image("a", num_steps=1, progress=False).shape == (1, 64, 64, 3)
        for tls in (True, False):  # an unknown authority; no TLS at all
            with Client(host, rest=rest, tls=tls) as client, pytest.raises(ServerError):
                client.text_to_image("a", num_steps=1, progress=False)


# === Messages ===

ARRAYS = {
    "float32": np.array([[1.5, -0.0, np.inf]], "float32"),
    "float64": np.array([1e300]),
    "float16": np.array([1.5, -2.0], "float16"),
    "int32": np.array(-5, "int32"),
    "int64": np.array([2**62]),
    "uint8": np.array([[0, 255]], "uint8"),
    "bool": np.array([True, False]),
    "string": np.array([b"a\0", b""], object),
    "empty": np.zeros((2, 0, 3), "float32"),
}


FIELDS = {"float32": "float_val", "float64": "double_val", "int32": "int_val", "int64": "int64_val", "uint8": "int_val"}
FIELDS |= {"bool": "bool_val", "string": "string_val"}


@pytest.mark.parametrize("name", ARRAYS)
def test_tensors_are_those_of_tensorflow(name):
    import tensorflow as tf

    array = ARRAYS[name]
    sent = tf.make_tensor_proto(0)
    sent.ParseFromString(messages.to_tensor(array).SerializeToString())
    assert tf.make_ndarray(sent).dtype == array.dtype and tf.make_ndarray(sent).tolist() == array.tolist()
    answers = [tf.make_tensor_proto(array)]
    if name in FIELDS:
        answers.append(tf.make_tensor_proto(array))
        answers[-1].tensor_content = b""
        answers[-1].ClearField(FIELDS[name])
        getattr(answers[-1], FIELDS[name]).extend(array.ravel().tolist())
    for answer in answers:
        back = messages.to_array(messages.TensorProto.FromString(answer.SerializeToString()))
        assert back.dtype == array.dtype and back.shape == array.shape and back.tolist() == array.tolist()


def test_fewer_values_than_elements_repeat_the_last():
    tensor = messages.TensorProto(dtype=1, float_val=[1.0, 2.0])
    tensor.tensor_shape.dim.add(size=4)
    assert messages.to_array(tensor).tolist() == [1.0, 2.0, 2.0, 2.0]
    del tensor.float_val[:]
    assert messages.to_array(tensor).tolist() == [0.0] * 4


def test_messages_are_those_of_the_official_package():
    from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2

    sent = predict_request("decoder", "decode_png", {"latent": np.ones((1, 2, 2, 4), "float32")})
    official = predict_pb2.PredictRequest.FromString(sent.SerializeToString())
    assert (official.model_spec.name, official.model_spec.signature_name) == ("decoder", "decode_png")
    assert list(official.inputs) == ["latent"] and official.inputs["latent"].tensor_content == b"\0\0\x80?" * 16
    assert messages.PredictRequest.FromString(official.SerializeToString()) == sent

    official = get_model_metadata_pb2.GetModelMetadataResponse()
    found = get_model_metadata_pb2.SignatureDefMap()
    found.signature_def["denoise"].inputs["latent"].name = "x:0"
    found.signature_def["denoise"].outputs["latent"].name = "y:0"
    official.metadata["signature_def"].Pack(found)
    answer = messages.GetModelMetadataResponse.FromString(official.SerializeToString())
    signatures = messages.SignatureDefMap.FromString(answer.metadata["signature_def"].value).signature_def
    assert signatures["denoise"].outputs["latent"].name == "y:0"


def test_json_floats_mean_the_same_float32():
    numbers = np.random.default_rng(0).standard_normal(1000, dtype="float32") * np.float32(1e-3)
    body = rest_body("denoise", {"latent": numbers, "prompt": np.array([b"\xff\0"], object)})
    inputs = json.loads(body)["inputs"]
    assert (np.array(inputs["latent"], "float32") == numbers).all() and len(body) < 16 * len(numbers)
    assert inputs["prompt"] == [{"b64": "/wA="}]


# === Without Keras and TensorFlow ===


def test_a_client_machine_needs_neither_keras_nor_tensorflow(serve):
    fake = serve()
    script = f"""
import sys
for name in ("tensorflow", "keras", "tensorflow_serving", "torch", "jax", "ftfy", "regex", "h5py", "ml_dtypes"):
    sys.modules[name] = None
from serving.client import Client
for host, rest in (({fake.grpc_host!r}, False), ({fake.rest_host!r}, True)):
    images = Client(host, rest=rest).text_to_image("an apple", num_steps=3, seed=7, progress=False)
    assert images.shape == (1, 64, 64, 3), images.shape
"""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# === The exported embedded model on the project's own server ===

PROMPTS = ["red apple on a blue background", "rocket on a yellow background"]


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """(the Python pipeline, the folder of its export)."""
    from export.saved_model import export_saved_models
    from keras_sd import StableDiffusion

    sd, folder = StableDiffusion.from_preset("emoji"), tmp_path_factory.mktemp("models")
    names = ("text_encoder", "diffusion_model", "decoder", "image_encoder", "denoiser")
    with mock.patch("export.saved_model._verify"):  # by a process of its own: half the time, and tested elsewhere
        export_saved_models(sd, folder, only=names, size=sd.image_size)
    return sd, folder


@pytest.fixture(scope="module")
def local_servers(emoji):
    """Two servers as (process, gRPC host, REST host); the second has the denoiser in place of the diffusion model."""
    _, folder = emoji
    batching = folder / "batching-models.config"
    text = (folder / "models.config").read_text()
    batching.write_text(re.sub(r"  config \{[^}]*diffusion_model[^}]*\}\n", "", text))
    servers = []
    with contextlib.ExitStack() as stack:
        for flags in (["--models", folder], [f"--model_config_file={batching}", "--enable_batching"]):
            ports = free_port(), free_port()
            command = [sys.executable, "-m", "serving", "serve", "--local", *flags]
            command += [f"--port={ports[0]}", f"--rest_api_port={ports[1]}"]
            environment = {**os.environ, "PYTHONPATH": ROOT, "TF_CPP_MIN_LOG_LEVEL": "3"}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            servers.append((process, *(f"localhost:{port}" for port in ports)))
        for process, grpc_host, rest_host in servers:
            for host in (grpc_host, f"http://{rest_host}"):
                wait_for(process, host)
        yield servers


def wait_for(process, host):
    with Client(host) as client:
        while process.poll() is None:
            try:
                return client.config
            except ServerError as error:
                assert error.code == "UNAVAILABLE", error
    raise AssertionError("the server did not start")


def test_served_pictures_are_those_of_the_pipeline(emoji, local_servers):
    sd, _ = emoji
    (_, grpc_host, rest_host), (_, batching_host, _) = local_servers
    arguments = {"negative_prompt": "blurry", "num_steps": 12, "seed": 7, "progress": False}
    wanted = sd.text_to_image(PROMPTS, **arguments)
    for host in (grpc_host, f"http://{rest_host}", batching_host):
        with Client(host) as client:
            for chunk in (1, 3, 5, 12):
                assert_same(client.text_to_image(PROMPTS, chunk=chunk, **arguments), wanted)
            noisy = {**arguments, "sampler": "euler_a"}
            assert_same(client.text_to_image(PROMPTS, **noisy), sd.text_to_image(PROMPTS, **noisy))


def test_served_pictures_from_pictures_are_those_of_the_pipeline(emoji, local_servers):
    sd, _ = emoji
    arguments = {"num_steps": 10, "seed": 3, "sampler": "dpmpp_2m", "progress": False}
    image = sd.text_to_image(PROMPTS[0], **arguments)[0]
    mask = np.zeros((64, 64), "uint8")
    mask[:, 32:] = 255
    for host in (local_servers[0][1], f"http://{local_servers[0][2]}"):
        with Client(host) as client:
            for method, pictures in (("image_to_image", [image]), ("inpaint", [image, mask])):
                wanted = getattr(sd, method)(*pictures, PROMPTS, strength=0.7, **arguments)
                assert_same(getattr(client, method)(*pictures, PROMPTS, strength=0.7, **arguments), wanted)


def test_sixteen_clients_at_once_get_their_own_pictures(emoji, local_servers):
    sd, _ = emoji
    samplers = ("ddim", "dpmpp_2m", "euler_a", "unipc")
    jobs = [
        (f"{subject} on a {ground} background", {"sampler": samplers[i % 4], "num_steps": 5 + i // 2, "seed": i})
        for i, (ground, subject) in enumerate(
            itertools.product(
                ("blue", "red"),
                ("red apple", "rocket", "ghost", "penguin", "volcano", "panda face", "mushroom", "sailboat"),
            )
        )
    ]
    wanted = [sd.text_to_image(prompt, progress=False, **options) for prompt, options in jobs]

    def draw(host, job):
        with Client(host) as client:
            return client.text_to_image(job[0], progress=False, **job[1])

    for host in (local_servers[0][1], local_servers[1][1]):
        with futures.ThreadPoolExecutor(len(jobs)) as pool:
            for found, expected in zip(pool.map(functools.partial(draw, host), jobs), wanted):
                assert_same(found, expected)


def test_killing_a_real_server_in_the_middle_does_not_change_the_picture(emoji, local_servers):
    sd, _ = emoji
    (process, *first), (_, *second) = local_servers
    arguments = {"num_steps": 15, "seed": 7, "sampler": "unipc", "progress": False}
    wanted = sd.text_to_image(PROMPTS, **arguments)

    def kill(row, rows, latent):
        if row >= rows // 2 and process.poll() is None:
            process.kill()
            process.wait()

    with Client([first[0], second[0]]) as client:
        assert_same(client.text_to_image(PROMPTS, chunk=3, callback=kill, **arguments), wanted)
    assert process.poll() is not None
    with Client([first[1], second[1]], rest=True) as client:
        assert_same(client.text_to_image(PROMPTS, **arguments), wanted)
