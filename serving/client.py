"""A client of the exported models that draws as `keras_sd.StableDiffusion` does. Needs neither Keras nor TensorFlow.

    client = Client(["gpu-1:8500", "gpu-2:8500"])
    images = client.text_to_image("red apple on a blue background", batch_size=4, num_steps=25, seed=7)

Sampler tables and the first noise are computed here; text, latents and pictures go through the server. The steps are
sent in chunks of rows. A chunk needs nothing but what is sent with it, so between chunks a picture can be shown or
cancelled, and a chunk that failed is repeated on the next host: the picture is the same.
"""

import base64
import functools
import io
import json
import numbers
import re
import secrets
import time
import warnings
from concurrent import futures

import grpc
import numpy as np
import urllib3
from PIL import Image
from tqdm.auto import tqdm

from keras_sd.images import fit, read_image, to_model
from keras_sd.noise import initial_noise
from keras_sd.samplers import COLUMNS, SamplerTable, make_table
from keras_sd.scheduler_config import read_scheduler_config
from serving import messages

TOKENS = 77  # that CLIP reads of a prompt, the start and the end token included
BATCHED_ROWS = 5  # per request to a batching server, from every client: it can only merge requests of one shape
PAUSES = (0.0, 0.25, 0.5, 1.0, 2.0)  # seconds before each round through the hosts

# A code of one of these may pass at the same host after a pause, of the others here at another host. The rest would
# fail everywhere and is raised at once.
_PASSING = {"UNAVAILABLE", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED"}
_LOCAL = {"DEADLINE_EXCEEDED", "NOT_FOUND", "INTERNAL", "UNKNOWN", "DATA_LOSS"}


class ServerError(RuntimeError):
    """What a server, or the way to it, answered instead of a result: `code` is gRPC's name for it."""

    def __init__(self, code, message):
        text = re.sub(r" *\[\[\{\{.*", "", " ".join(message.split()))  # without the graph's node
        if "assertion failed: " in text:  # TensorFlow's, of our own sentences in brackets
            text = re.sub(r"[\[\]]", "", text.replace("assertion failed: ", ""))
        super().__init__(f"{text} ({code})")
        self.code = code


# === One server ===


class Server:
    """One host, reached through gRPC or REST: which of its signatures does what."""

    prefers_bytes = False  # tensors as strings of float16, where a signature has such a twin

    def __init__(self, address, timeout):
        self.address, self.timeout = address, timeout
        self._signatures = {}

    def signatures(self, model):
        """name → (names of the inputs, names of the outputs) of a model's signatures; asked for once."""
        if model not in self._signatures:
            self._signatures[model] = self._metadata(model)
        return self._signatures[model]

    def forget(self):
        """Ask anew which models there are: the server may be another one by now."""
        self._signatures.clear()

    def describe(self):
        """What the exporter wrote about the model: sizes, scheduler, columns of the table."""
        names, _ = self.signatures("text_encoder").get("describe", ((), ()))
        inputs = {name: np.array([b""], object) for name in names}  # a batching server wants one
        return json.loads(self.predict("text_encoder", "describe", inputs)["config"].flat[0])

    def encode_prompt(self, prompts):
        """A list of strings → context float32 (B, 77, width), and for each whether it was cut."""
        prompts = np.array([prompt.encode() for prompt in prompts], object)
        outputs = self._predict_compact("text_encoder", "encode_prompt", {"prompt": prompts}, context=(TOKENS, -1))
        return outputs["context"], outputs["truncated"]

    def denoise(self, state, rows, fixed, compact):
        """Runs rows (n, columns) of a table, the same for every picture, on `latent` and `history`; returns both."""
        model, signature = self._denoiser()
        width = BATCHED_ROWS if model == "denoiser" else len(rows)
        shapes = {name: array.shape[1:] for name, array in state.items()}
        for first in range(0, len(rows), width):
            steps = rows[first : first + width]
            idle = np.zeros((width - len(steps), rows.shape[1]), "float32")
            idle[:, COLUMNS.index("guidance")] = 1.0
            steps = np.repeat(np.concatenate([steps, idle])[None], len(state["latent"]), axis=0)
            inputs = {**state, **fixed, "steps": steps}
            outputs = self._predict_compact(model, signature, inputs, compact, **shapes)
            state = {name: outputs[name] for name in shapes}
        return state

    def decode_png(self, latent):
        """Latents (B, h, w, C) → a list of PNG files."""
        return self._predict_compact("decoder", "decode_png", {"latent": latent})["image_bytes"].tolist()

    def encode_image(self, file):
        """The bytes of a picture file → latent (1, h, w, C)."""
        return self.predict("image_encoder", "serving_default", {"image_bytes": np.array([file], object)})["latent"]

    def _denoiser(self):
        for model, signature in (("diffusion_model", "denoise"), ("denoiser", "serving_default")):
            try:
                if signature in self.signatures(model):
                    return model, signature
            except ServerError as error:
                if error.code != "NOT_FOUND":
                    raise
        raise self._error("NOT_FOUND", "diffusion_model", "there is no diffusion_model with `denoise`, nor a denoiser")

    def _predict_compact(self, model, signature, inputs, compact=True, **shapes):
        """`predict`, through the twin that takes and gives float16 strings where that is shorter.

        `shapes` has the shape of an item of each output that comes as such a string.
        """
        twin = f"{signature}_bytes"
        if not (self.prefers_bytes and compact and twin in self.signatures(model)):
            return self.predict(model, signature, inputs)
        packed = {}
        for name, array in inputs.items():
            as_bytes = f"{name}_bytes" in self.signatures(model)[twin][0]
            packed[f"{name}_bytes" if as_bytes else name] = _pack(array) if as_bytes else array
        outputs = self.predict(model, twin, packed)
        return outputs | {name: _unpack(outputs[f"{name}_bytes"], shape) for name, shape in shapes.items()}

    def _error(self, code, model, message):
        return ServerError(code, f"{model} at {self.address}: {message}")

    def predict(self, model, signature, inputs):
        """Runs a signature on a dict name → array; returns such a dict. Strings are `bytes` in arrays of dtype object.

        Raises:
            ServerError: there is no answer, or it is an error.
        """
        raise NotImplementedError

    def _metadata(self, model):
        raise NotImplementedError

    def close(self):
        """Closes the connection."""
        raise NotImplementedError


class GrpcServer(Server):
    """A server reached through gRPC; `tls` is False, True, or a file with the certificates to trust (PEM)."""

    def __init__(self, address, timeout, tls=False):
        super().__init__(address, timeout)
        self._starter = futures.ThreadPoolExecutor(1)  # gRPC hangs where Ctrl-C meets it at the start of a call
        options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        options += [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
        if tls:
            certificates = None if tls is True else _read_file(tls)
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(certificates), options)
        else:
            self._channel = grpc.insecure_channel(address, options)

    def predict(self, model, signature, inputs):
        request = predict_request(model, signature, inputs)
        outputs = self._call("Predict", model, request, messages.PredictResponse).outputs
        return {name: messages.to_array(tensor) for name, tensor in outputs.items()}

    def _metadata(self, model):
        request = messages.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        response = self._call("GetModelMetadata", model, request, messages.GetModelMetadataResponse)
        found = messages.SignatureDefMap.FromString(response.metadata["signature_def"].value).signature_def
        return {name: (set(found[name].inputs), set(found[name].outputs)) for name in found}

    def _call(self, method, model, request, kind):
        path = f"/tensorflow.serving.PredictionService/{method}"
        stub = self._channel.unary_unary(path, type(request).SerializeToString, kind.FromString)
        starting = self._starter.submit(stub.future, request, timeout=self.timeout)
        try:
            return starting.result().result()
        except grpc.RpcError as error:
            raise self._error(error.code().name, model, error.details() or "no answer") from None
        finally:  # a call that Ctrl-C leaves would go on
            starting.add_done_callback(lambda started: started.exception() or started.result().cancel())

    def close(self):
        self._starter.shutdown()
        self._channel.close()


class RestServer(Server):
    """A server reached through HTTP at `http[s]://host[:port][/path]`; `tls` as for gRPC."""

    prefers_bytes = True
    _CODES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
    _CODES |= {408: "DEADLINE_EXCEEDED", 412: "FAILED_PRECONDITION", 413: "INVALID_ARGUMENT", 501: "UNIMPLEMENTED"}
    _CODES |= {429: "RESOURCE_EXHAUSTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}

    def __init__(self, address, timeout, tls=False):
        super().__init__(address, timeout)
        certificates = None if isinstance(tls, bool) else tls
        if certificates is not None:
            _read_file(certificates)
        limits = urllib3.Timeout(connect=min(timeout, 20), read=timeout)
        self._pool = urllib3.PoolManager(retries=False, timeout=limits, ca_certs=certificates)

    def predict(self, model, signature, inputs):
        outputs = self._call("outputs", "POST", model, ":predict", rest_body(signature, inputs))
        names = self.signatures(model).get(signature, ((), ()))[1]
        if len(names) == 1:  # a single output comes bare
            outputs = {next(iter(names)): outputs}
        return {name: _from_json(value) for name, value in outputs.items()}

    def _metadata(self, model):
        found = self._call("metadata", "GET", model, "/metadata")["signature_def"]["signature_def"]
        return {name: (set(one.get("inputs", ())), set(one.get("outputs", ()))) for name, one in found.items()}

    def _call(self, field, method, model, action, body=None):
        """One field of the answer's JSON."""
        url = f"{self.address}/v1/models/{model}{action}"
        try:
            response = self._pool.request(method, url, body=body, headers={"Content-Type": "application/json"})
        except urllib3.exceptions.ReadTimeoutError:
            raise self._error("DEADLINE_EXCEEDED", model, f"no answer within {self.timeout:g} s") from None
        except urllib3.exceptions.HTTPError as error:
            raise self._error("UNAVAILABLE", model, f"no connection ({error})") from None
        try:
            answer = json.loads(response.data)
            if response.status == 200:
                return answer[field]
            message = answer["error"]
        except (ValueError, TypeError, KeyError):
            message = f"status {response.status} with an answer that is not TF-Serving's"
        raise self._error(self._CODES.get(response.status, "INTERNAL"), model, message)

    def close(self):
        self._pool.clear()


def connect(address, timeout, rest=False, tls=False):
    """The `Server` at `host[:port]` (port 8500, for REST 8501), at a URL (REST), or at a gRPC name (`dns:`, `unix:`).

    Raises:
        ValueError: that is no address.
        FileNotFoundError: there is no such file of certificates.
    """
    if re.match(r"https?://[^/]", address):
        if tls and not address.startswith("https:"):
            raise ValueError(f"TLS needs an https address; got {address!r}.")
        return RestServer(address.rstrip("/"), timeout, tls)
    if re.match(r"(dns|unix|unix-abstract):", address) and not rest:
        return GrpcServer(address, timeout, tls)
    parts = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?", address)
    if not parts or not 0 < int(parts[2] or 1) < 65536:
        raise ValueError(f"A host is a name or address with or without a port, as in 'gpu-1:8500'; got {address!r}.")
    address = f"{parts[1]}:{parts[2] or (8501 if rest else 8500)}"
    if rest:
        return RestServer(f"http{'s' if tls else ''}://{address}", timeout, tls)
    return GrpcServer(address, timeout, tls)


# === Arrays on the wire ===


def predict_request(model, signature, inputs):
    """The `PredictRequest` for a dict name → array."""
    request = messages.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = model, signature
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(messages.to_tensor(np.asarray(array)))
    return request


def rest_body(signature, inputs):
    """The body of a REST request in columns, for a dict name → array."""
    columns = {name: _to_json(np.asarray(array)) for name, array in inputs.items()}
    return json.dumps({"signature_name": signature, "inputs": columns}, separators=(",", ":")).encode()


def _to_json(array):
    if array.dtype == object:
        encoded = [{"b64": base64.b64encode(item).decode()} for item in array.ravel()]
        return np.array(encoded, object).reshape(array.shape).tolist()
    if array.dtype == np.float32:
        array = array.astype(str).astype("float64")  # the fewest digits that mean the same float32
    return array.tolist()


def _from_json(value):
    leaf = value
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if isinstance(leaf, (dict, str)):
        array = np.array(value, object)
        items = [base64.b64decode(item["b64"]) if isinstance(item, dict) else item.encode() for item in array.flat]
        return np.array(items, object).reshape(array.shape)
    array = np.asarray(value)
    return array.astype("float32") if array.dtype == np.float64 else array


def _pack(array):
    """float32 (B, …) → strings (B): an item is little-endian float16, in C order."""
    return np.array([item.astype("<f2").tobytes() for item in array], object)


def _unpack(strings, shape):
    return np.stack([np.frombuffer(item, "<f2").astype("float32").reshape(shape) for item in strings])


def float16_suffices(table, chunk):
    """Whether the state between chunks may travel as float16.

    Rounding it costs nothing visible, except to solvers that lean on what they remember: extrapolation amplifies it.
    The limits are from the embedded model, 8 to 50 steps: below them every sampler's pixels agree within 1/255 on
    99.9 %; above them are `lms` (up to 5 % do not) and `plms` in chunks of one row (0.7 %).
    """
    weights = np.abs(table.history) / np.hypot(*table.levels[1:].T)[:, None]
    remembered = weights[:, 1:].sum(axis=1)
    rounded = sum(weights[i, i % chunk + 1 :].sum() for i in range(chunk, len(table)))
    return remembered.max() <= 1.5 and rounded <= 5.0


# === The client ===


class Client:
    """Draws pictures on TF-Serving hosts, with the methods and arguments of `keras_sd.StableDiffusion`.

    Args:
        hosts: `"host:8500"`, or a list of them: further hosts take over where one fails. A URL (`https://host/path`)
            is a host that is reached through REST; `host` alone means port 8500, or 8501 with `rest`.
        rest: reach plain hosts through REST instead of gRPC.
        tls: encrypt: True, or a file (PEM) with the certificates to trust.
        timeout: seconds until a request, such as a chunk of rows, counts as failed.

    Raises:
        ValueError: a host is no address.
    """

    def __init__(self, hosts="localhost", *, rest=False, tls=False, timeout=300.0):
        hosts = [hosts] if isinstance(hosts, str) else list(hosts)
        if not hosts:
            raise ValueError("hosts must name at least one host; got none.")
        if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real) or not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a number of seconds above 0; got {timeout!r}.")
        self.servers = [connect(host, timeout, rest, tls) for host in hosts]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the connections."""
        for server in self.servers:
            server.close()

    @functools.cached_property
    def config(self):
        """What the exporter wrote about the model, a dict: `preset`, `scheduler`, `image_size`, `latent_shape`, …"""
        config = self._somewhere(Server.describe)
        if config["columns"] != list(COLUMNS):
            raise ServerError("UNIMPLEMENTED", "The models were exported for other sampler tables; export them again.")
        return config

    @functools.cached_property
    def scheduler(self):
        """(NoiseScheduler, sampler name, sampler options) of the model."""
        return read_scheduler_config(self.config["scheduler"])

    # === Text to image ===

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        seed=None,
        **kwargs,
    ):
        """Draws pictures from a prompt.

        Args:
            prompt: a string, or a list with one string per picture.
            negative_prompt: what to steer away from: a string, or a list with one string per picture.
            batch_size: number of pictures; with a list of prompts it follows from the list.
            num_steps: number of denoising steps.
            unconditional_guidance_scale: how closely to follow the prompt; 1 is no guidance.
            seed: integer; picture i of the batch is drawn from `seed + i`. By default a random one.
            **kwargs: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3), or with `png` a list of PNG files.
        """
        return self.generate_image(
            self.encode_text(prompt),
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            num_steps=num_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            seed=seed,
            **kwargs,
        )

    def encode_text(self, prompt):
        """Encodes a prompt, or a list of prompts; warns of one that is cut, for more than 75 tokens.

        Returns:
            float32 (number of prompts, 77, width), for `generate_image`.

        Raises:
            TypeError: the prompt is neither a string nor a list of strings.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt must be a string or a list of strings; got {prompt!r}.")
        context, truncated = self._somewhere(lambda server: server.encode_prompt(prompts))
        for text, cut in zip(prompts, truncated):
            if cut:
                warnings.warn(f"The prompt is longer than {TOKENS - 2} tokens; its end was cut: {text!r}", stacklevel=2)
        return context

    def generate_image(
        self,
        encoded_text,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        sampler=None,
        height=None,
        width=None,
        chunk=5,
        callback=None,
        progress=True,
        png=False,
        **sampler_options,
    ):
        """Draws pictures from an encoded prompt.

        Args:
            encoded_text: (77, width) or (batch_size, 77, width), from `encode_text`.
            negative_prompt, batch_size, num_steps, unconditional_guidance_scale, seed: as in `text_to_image`.
            diffusion_noise: unit noise to start from, (h, w, 4) or (batch_size, h, w, 4), instead of `seed`.
            sampler: one of `keras_sd.SAMPLERS`, or a `SamplerTable` of one's own (then `num_steps`, guidance and
                options are the table's); by default the model's.
            height, width: size in pixels; by default that of the export.
            chunk: rows of the table per request.
            callback: function (row, rows, latent), called after every chunk with its last row; the run stops where it
                returns False.
            progress: show a progress bar.
            png: return PNG files, as the server wrote them.
            **sampler_options: of `keras_sd.make_table`, e.g. `karras=True`, `eta=0.5`, `guidance_interval=(0, 0.8)`.

        Returns:
            uint8 (batch_size, height, width, 3), or with `png` a list of PNG files (`bytes`).

        Raises:
            ValueError, TypeError: an argument is out of its range; the message names it and says what would do.
            ServerError: no host could do it, or one said that it cannot be done.
        """
        latent = self._draw(
            encoded_text,
            negative_prompt,
            batch_size,
            self._table(sampler, num_steps, unconditional_guidance_scale, sampler_options),
            self._latent_shape(height, width),
            diffusion_noise=diffusion_noise,
            seed=seed,
            chunk=chunk,
            callback=callback,
            progress=progress,
        )
        return self.decode_png(latent) if png else self.decode(latent)

    # === Image to image ===

    def image_to_image(
        self,
        image,
        prompt,
        strength=0.8,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        sampler=None,
        height=None,
        width=None,
        chunk=5,
        callback=None,
        progress=True,
        png=False,
        **sampler_options,
    ):
        """Changes a picture.

        Args:
            image: path, PIL image or array (H, W, 3), uint8 0 … 255 or float 0 … 1. It is scaled to cover
                `height` × `width` and its middle is taken; without them it keeps its size, rounded down to a multiple
                of 8, or takes that of the export where this has one size only.
            prompt: what to draw: a string, or a list with one string per picture.
            strength: how much to change, in [0, 1]: the last part of the steps that is run. 0 gives the picture back
                as the autoencoder has it.
            Others: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3), or with `png` a list of PNG files.
        """
        _check_strength(strength)
        options = {**sampler_options, "strength": strength}
        table = self._table(sampler, num_steps, unconditional_guidance_scale, options) if strength else None
        _, known = self._fit_and_encode(read_image(image), height, width)
        context = self.encode_text(prompt)
        if table is None:
            latent = np.repeat(known, _expand(context, batch_size)[1], axis=0)
        else:
            latent = self._draw(
                context,
                negative_prompt,
                batch_size,
                table,
                known.shape[1:],
                diffusion_noise=diffusion_noise,
                seed=seed,
                chunk=chunk,
                callback=callback,
                progress=progress,
                known=known,
            )
        return self.decode_png(latent) if png else self.decode(latent)

    def inpaint(
        self,
        image,
        mask,
        prompt,
        strength=1.0,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        sampler=None,
        height=None,
        width=None,
        chunk=5,
        callback=None,
        progress=True,
        png=False,
        **sampler_options,
    ):
        """Repaints a part of a picture; every pixel outside the mask comes back as it was.

        Works with any model, by blending the known part in after every row (then a chunk is one row), and with
        inpainting models, whose U-Net sees the mask and the masked picture.

        Args:
            image: as in `image_to_image`.
            mask: picture of the same size; white (128 and above) is repainted.
            prompt: what to draw there: a string, or a list with one string per picture.
            strength: in (0, 1]; below 1 the repainted part starts from what was there.
            Others: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3), or with `png` a list of PNG files.
        """
        image, mask = read_image(image), read_image(mask, "mask")
        if mask.size != image.size:
            raise ValueError(f"mask is {mask.size} pixels, the image {image.size}; they must be alike.")
        if _check_strength(strength) == 0:
            raise ValueError("strength must be above 0 for inpaint; got 0.")
        options = {**sampler_options, "strength": strength}
        table = self._table(sampler, num_steps, unconditional_guidance_scale, options)
        picture, known = self._fit_and_encode(image, height, width)
        factor, pixels = self.config["factor"], np.asarray(picture)
        mask = np.asarray(fit(mask, picture.height, picture.width, factor).convert("L"))[..., None] >= 128
        if not mask.any():
            raise ValueError("mask is empty: nothing in it is white (128 or more), so there is nothing to repaint.")
        repaint = mask[::factor, ::factor].astype("float32")
        extra = None
        if self.config["in_channels"] == 2 * known.shape[-1] + 1:
            grey = np.round((np.where(mask, 0.0, to_model(picture)[0]) + 1.0) * 127.5).astype("uint8")
            extra = np.concatenate([repaint[None], self.encode(Image.fromarray(grey))], axis=-1)
        latent = self._draw(
            self.encode_text(prompt),
            negative_prompt,
            batch_size,
            table,
            known.shape[1:],
            diffusion_noise=diffusion_noise,
            seed=seed,
            chunk=chunk,
            callback=callback,
            progress=progress,
            known=known if strength < 1 else None,
            extra=extra,
            keep=None if extra is not None else (known, repaint),
        )
        images = np.where(mask, self.decode(latent), pixels)
        return [_png(Image.fromarray(drawn)) for drawn in images] if png else images

    # === Latents ===

    def encode(self, picture):
        """Encodes a PIL image to a scaled latent (1, h, w, 4)."""
        file = _png(picture)
        return self._somewhere(lambda server: server.encode_image(file))

    def decode_png(self, latent):
        """Decodes scaled latents (B, h, w, 4) to a list of PNG files (`bytes`)."""
        latent = np.asarray(latent, "float32")
        return self._somewhere(lambda server: server.decode_png(latent))

    def decode(self, latent):
        """Decodes scaled latents (B, h, w, 4) to uint8 pictures (B, H, W, 3)."""
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in self.decode_png(latent)])

    # === Inside ===

    def _somewhere(self, call):
        """What `call(server)` returns at the first server that can, beginning with the one that could last."""
        servers, errors = list(self.servers), {}
        for pause in PAUSES:
            time.sleep(pause)
            for server in list(servers):
                try:
                    result = call(server)
                except ServerError as error:
                    server.forget()
                    # a batching server had merged it with somebody's request of another size
                    passing = error.code in _PASSING or "padding is turned off" in str(error)
                    if not passing and error.code not in _LOCAL:
                        raise
                    if not passing:
                        servers.remove(server)
                    errors[server.address] = error
                    continue
                place = self.servers.index(server)
                self.servers = self.servers[place:] + self.servers[:place]
                return result
            if not servers:
                break
        *others, last = errors.values()
        if not others:
            raise last
        raise ServerError(last.code, f"None of {len(errors)} hosts could: {'; '.join(map(str, errors.values()))}")

    def _draw(
        self,
        encoded_text,
        negative_prompt,
        batch_size,
        table,
        shape,
        *,
        diffusion_noise,
        seed,
        chunk,
        callback,
        progress,
        known=None,
        extra=None,
        keep=None,
    ):
        """Noise, and the table in chunks: every picture ends here as a latent (batch_size, h, w, C).

        `known` (1, h, w, C) is the latent to start from, `keep` a (latent, mask) to blend in where the mask is 0.
        """
        context, batch_size = _expand(encoded_text, batch_size)
        chunk = 1 if keep is not None else _check_integer("chunk", chunk, 1)
        if diffusion_noise is not None and seed is not None:
            raise ValueError("diffusion_noise and seed exclude each other: seed makes the noise; give one of them.")
        seed = secrets.randbits(31) if seed is None else _check_integer("seed", seed, 0)
        if table.stochastic and seed + batch_size > 2**32:
            raise ValueError(f"seed must be below {2**32} for a sampler that adds noise on the server; got {seed}.")
        if diffusion_noise is None:
            start = initial_noise(seed, batch_size, shape)
        else:
            start = _check_noise(diffusion_noise, (batch_size, *shape))
        latent = table.init_noise_scale * start
        if known is not None:
            latent = table.signal[0] * known + table.sigma[0] * start
        negative = self.encode_text("" if negative_prompt is None else negative_prompt)
        fixed = {"context": context, "unconditional_context": _expand(negative, batch_size)[0]}
        seeds = np.array([[(seed + i) % 2**32, 0] for i in range(batch_size)], "uint32").view("int32")
        fixed |= {"seed": seeds} if extra is None else {"seed": seeds, "extra": np.repeat(extra, batch_size, axis=0)}
        history = np.zeros((batch_size, self.config["history"], *shape), "float32")
        state = {"latent": latent.astype("float32"), "history": history}
        rows, compact = table.rows, extra is None and float16_suffices(table, chunk)
        with tqdm(total=len(rows), disable=not progress, leave=False) as bar:
            for first in range(0, len(rows), chunk):
                part = rows[first : first + chunk]
                state = self._somewhere(lambda server: server.denoise(state, part, fixed, compact))  # noqa: B023
                last = first + len(part) - 1
                if keep is not None:
                    signal, sigma = table.levels[last + 1]
                    blended = keep[1] * state["latent"] + (1.0 - keep[1]) * (signal * keep[0] + sigma * start)
                    state["latent"] = blended.astype("float32")
                if not np.isfinite(state["latent"]).all():
                    raise ServerError("DATA_LOSS", f"The latent is not finite after row {last + 1} of {len(rows)}.")
                bar.update(len(part))
                if callback is not None and callback(last, len(rows), state["latent"]) is False:
                    break
        return state["latent"]

    def _table(self, sampler, num_steps, guidance_scale, options):
        if isinstance(sampler, SamplerTable):
            return sampler
        scheduler, name, own_options = self.scheduler
        options = {**(own_options if sampler is None else {}), **options}
        name = name if sampler is None else sampler
        return make_table(name, scheduler, num_steps, guidance_scale=guidance_scale, **options)

    def _latent_shape(self, height, width):
        factor, sides = self.config["factor"], []
        for name, side, default in zip(("height", "width"), (height, width), self.config["image_size"]):
            side = default if side is None else _check_integer(name, side, 1)
            if side % factor:
                lower = max(side // factor, 1) * factor
                raise ValueError(
                    f"{name} must be a multiple of {factor}; got {side}. {lower} or {lower + factor} would do."
                )
            sides.append(side // factor)
        return *sides, self.config["latent_shape"][-1]

    def _fit_and_encode(self, image, height, width):
        """A PIL image → the picture in its final size, and its latent (1, h, w, C)."""
        self._latent_shape(height, width)
        factor = self.config["factor"]
        picture = fit(image, height, width, factor)
        latent = self.encode(picture)
        size = tuple(side * factor for side in latent.shape[1:3])
        if size != (picture.height, picture.width):  # exported for one size, to which the server fits every picture
            if height is not None or width is not None:
                raise ValueError(
                    f"height and width must be {size[0]} and {size[1]}, for which the models were exported; "
                    f"got {picture.height} and {picture.width}."
                )
            picture = fit(image, *size, factor)
            latent = self.encode(picture)
        return picture, latent


def _png(picture):
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _read_file(path):
    with open(path, "rb") as file:
        return file.read()


def _expand(encoded_text, batch_size):
    """(77, width) or (B, 77, width) → float32 (batch_size, 77, width) and the batch size."""
    _check_integer("batch_size", batch_size, 1)
    context = np.asarray(encoded_text, "float32")
    context = context[None] if context.ndim == 2 else context
    if context.ndim != 3:
        raise ValueError(f"encoded_text must have shape (77, width) or (batch_size, 77, width); got {context.shape}.")
    if batch_size == 1:
        batch_size = len(context)
    if len(context) not in (1, batch_size):
        raise ValueError(f"batch_size is {batch_size}, but there are {len(context)} prompts; give one, or as many.")
    return np.repeat(context, batch_size // len(context), axis=0), batch_size


def _check_noise(diffusion_noise, shape):
    noise = np.asarray(diffusion_noise, "float32")
    noise = noise[None] if noise.ndim == 3 else noise
    if noise.shape[1:] != shape[1:] or len(noise) not in (1, shape[0]):
        raise ValueError(f"diffusion_noise must have shape {shape} or {shape[1:]}; got {np.shape(diffusion_noise)}.")
    return np.repeat(noise, shape[0] // len(noise), axis=0)


def _check_strength(strength):
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1]; got {strength!r}.")
    return strength


def _check_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return int(value)
