# %% [markdown]
# # Export and serve
#
# `python -m export` writes SavedModels; TF-Serving, or the server that comes with the project, hosts them; any gRPC or
# REST client draws with them.

# %%
import base64
import contextlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile

import grpc
import numpy as np
import tensorflow as tf
import urllib3
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from keras_sd import StableDiffusion
from serving.client import Client
from serving.demo import server

folder = pathlib.Path(tempfile.mkdtemp())
names = ["text_encoder", "diffusion_model", "decoder", "stable_diffusion"]
command = [sys.executable, "-m", "export", "--preset", "emoji", "--out", str(folder), "--only", *names]
subprocess.run(command, check=True, capture_output=True)
for path in sorted(folder.glob("*/*/saved_model.pb")):
    size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    print(f"{path.parent.relative_to(folder)}: {size / 2**20:.0f} MB")
print((folder / "models.config").read_text().replace(str(folder), "…"))

# %% [markdown]
# What is written was reloaded in a fresh process and compared with the Python pipeline before it got its name. Each
# SavedModel has named signatures; this is what a server says of `denoise`, which runs rows of any sampler's table:

# %%
denoise = tf.saved_model.load(str(folder / "diffusion_model" / "1")).signatures["denoise"]
for name, spec in denoise.structured_input_signature[1].items():
    print(f"{name:24} {spec.dtype.name:8} {tuple(spec.shape)}")

# %% [markdown]
# ## A server
#
# `python -m serving serve --models DIR` starts `tensorflow_model_server` where there is one, else the project's own,
# which takes the same flags and answers in the same way.

# %%
stack = contextlib.ExitStack()
port, rest_port = stack.enter_context(server(folder))

# %% [markdown]
# ## The client
#
# Samplers and seeds are on the client's side; the picture is the one that Python draws.


# %%
def show(images, scale=2):
    """uint8 (B, H, W, 3) → one picture, side by side."""
    strip = Image.fromarray(np.concatenate(list(images), axis=1))
    return strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST)


prompts = ["red apple on a blue background", "rocket on a black background", "ghost on a red background"]
client = Client(f"localhost:{port}")
served = client.text_to_image(prompts, num_steps=20, sampler="dpmpp_2m", seed=7, progress=False)
local = StableDiffusion.from_preset("emoji").text_to_image(
    prompts, num_steps=20, sampler="dpmpp_2m", seed=7, progress=False
)
print("within 1/255 of Python's:", np.mean(np.abs(served.astype(int) - local) <= 1))
show(served)

# %% [markdown]
# The picture is drawn in chunks of steps. Between chunks the client can show it:

# %%
seen = []
client.text_to_image(
    "unicorn face on a purple background",
    num_steps=20,
    seed=2,
    progress=False,
    callback=lambda step, num_steps, latent: seen.append(latent),
)
show(np.concatenate([client.decode(latent) for latent in seen]))

# %% [markdown]
# ## One call
#
# `stable_diffusion` takes everything at once. This is TF-Serving's own gRPC client:

# %%
inputs = {
    "prompt": np.array(prompts),
    "negative_prompt": np.array(["", "", ""]),
    "num_steps": np.array([25, 25, 10], "int32"),
    "guidance_scale": np.array([7.5, 3.0, 7.5], "float32"),
    "seed": np.array([7, 8, 9], "int32"),
}
request = predict_pb2.PredictRequest()
request.model_spec.name = "stable_diffusion"
for name, value in inputs.items():
    request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
with grpc.insecure_channel(f"localhost:{port}") as channel:
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
files = tf.make_ndarray(response.outputs["image_bytes"])
show([np.asarray(Image.open(io.BytesIO(file))) for file in files])

# %% [markdown]
# And the same through REST, where binary data is base64:

# %%
rows = [{name: np.asarray(value)[i].item() for name, value in inputs.items()} for i in range(3)]
url = f"http://localhost:{rest_port}/v1/models/stable_diffusion:predict"
reply = urllib3.request("POST", url, body=json.dumps({"instances": rows})).json()
pictures = [base64.b64decode(prediction["b64"]) for prediction in reply["predictions"]]
print("as through gRPC:", pictures == list(files))

# %% [markdown]
# ## Errors
#
# A bad request gets one sentence, and the server goes on.

# %%
rows[0]["num_steps"] = 0
reply = urllib3.request("POST", url, body=json.dumps({"instances": rows}))
print(reply.status, reply.json()["error"].splitlines()[0])

# %%
client.close()
stack.close()
