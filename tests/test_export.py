"""The exported signatures: their contract, their numbers, the tools that open them, and the exporter."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import tensorflow as tf
import urllib3
from google.protobuf import text_format
from PIL import Image
from tensorflow.core.protobuf.config_pb2 import CallableOptions
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from export import examples, saved_model, signatures
from export.__main__ import NAMES, main
from keras_sd import NoiseScheduler, StableDiffusion, make_table
from keras_sd.noise import initial_noise
from keras_sd.samplers import COLUMNS
from serving.demo import server

ROOT = Path(__file__).parents[1]
BATCH = None
CONTRACT = {  # of DESIGN section 6, at 64 × 64: name → signature → inputs, outputs
    "text_encoder": {
        "serving_default": (
            {"tokens": ("int32", (BATCH, 77)), "batch_size": ("int32", ())},
            {"context": ("float32", (BATCH, 77, 128)), "unconditional_context": ("float32", (BATCH, 77, 128))},
        ),
        "encode_prompt": (
            {"prompt": ("string", (BATCH,))},
            {
                "context": ("float32", (BATCH, 77, 128)),
                "tokens": ("int32", (BATCH, 77)),
                "truncated": ("bool", (BATCH,)),
            },
        ),
    },
    "diffusion_model": {
        "serving_default": (
            {
                "context": ("float32", (BATCH, 77, 128)),
                "unconditional_context": ("float32", (BATCH, 77, 128)),
                "num_steps": ("int32", ()),
                "batch_size": ("int32", ()),
            },
            {"latent": ("float32", (BATCH, 8, 8, 4))},
        ),
        "denoise": (
            {
                "latent": ("float32", (BATCH, 8, 8, 4)),
                "history": ("float32", (BATCH, 5, 8, 8, 4)),
                "context": ("float32", (BATCH, 77, 128)),
                "unconditional_context": ("float32", (BATCH, 77, 128)),
                "steps": ("float32", (BATCH, None, 14)),
                "seed": ("int32", (BATCH, 2)),
            },
            {"latent": ("float32", (BATCH, 8, 8, 4)), "history": ("float32", (BATCH, 5, 8, 8, 4))},
        ),
    },
    "decoder": {
        "serving_default": (
            {"latent": ("float32", (BATCH, 8, 8, 4))},
            {"generated_images": ("uint8", (BATCH, 64, 64, 3))},
        ),
        "decode_png": ({"latent": ("float32", (BATCH, 8, 8, 4))}, {"image_bytes": ("string", (BATCH,))}),
    },
    "image_encoder": {
        "serving_default": ({"image_bytes": ("string", (BATCH,))}, {"latent": ("float32", (BATCH, 8, 8, 4))}),
    },
    "stable_diffusion": {
        "serving_default": (
            {
                "prompt": ("string", (BATCH,)),
                "negative_prompt": ("string", (BATCH,)),
                "num_steps": ("int32", (BATCH,)),
                "guidance_scale": ("float32", (BATCH,)),
                "seed": ("int32", (BATCH,)),
            },
            {"image_bytes": ("string", (BATCH,))},
        ),
    },
}
CONTRACT["denoiser"] = {"serving_default": CONTRACT["diffusion_model"]["denoise"]}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.from_preset("emoji", dtype="float32")


@pytest.fixture(scope="module")
def models(exported):
    loaded = {}

    def model(name):
        if name not in loaded:
            loaded[name] = tf.saved_model.load(str(exported / name / "1"))
        return loaded[name]

    return model


@pytest.fixture(scope="module")
def predict(models):
    def predict(name, signature, **inputs):
        specs = dict(models(name).signatures[signature].structured_input_signature[1])
        tensors = {key: tf.constant(value, specs[key].dtype) for key, value in inputs.items()}
        return {key: value.numpy() for key, value in models(name).signatures[signature](**tensors).items()}

    return predict


def requests(sd, prompts, table, seeds, shape=(8, 8, 4)):
    """Inputs of `denoise` for one prompt, table and seed per picture."""
    rows = table.rows
    noise = np.concatenate([initial_noise(seed, 1, shape) for seed in seeds])
    return {
        "latent": table.init_noise_scale * noise,
        "history": np.zeros((len(seeds), 5, *shape)),
        "context": sd.encode_text(list(prompts)),
        "unconditional_context": np.repeat(sd.encode_text(""), len(seeds), axis=0),
        "steps": np.repeat(rows[None], len(seeds), axis=0),
        "seed": [[seed, 0] for seed in seeds],
    }


def in_chunks(predict, inputs, size):
    """`denoise`, `size` rows at a time."""
    state, steps = inputs, inputs["steps"]
    for start in range(0, steps.shape[1], size):
        state = {**state, **predict("diffusion_model", "denoise", **{**state, "steps": steps[:, start : start + size]})}
    return state["latent"]


def pixels(files):
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def alike(found, wanted):
    """99.9 % of the pixels within 1/255."""
    return np.mean(np.abs(found.astype(int) - wanted.astype(int)) <= 1) >= 0.999


# === The contract ===


def test_every_signature_of_the_contract_is_there(models, exported):
    assert (
        set(CONTRACT)
        == set(signatures.MODELS)
        == set(NAMES)
        == {path.name for path in exported.iterdir() if path.is_dir()}
    )
    for name, wanted in CONTRACT.items():
        for signature, (inputs, outputs) in wanted.items():
            function = models(name).signatures[signature]
            for tensors, spec in (
                (function.structured_input_signature[1], inputs),
                (function.structured_outputs, outputs),
            ):
                found = {key: (tensor.dtype.name, tuple(tensor.shape)) for key, tensor in tensors.items()}
                assert found == spec, f"{name}, {signature}"
    assert list(models("denoiser").signatures) == ["serving_default"]


def test_only_core_operations(exported):
    for name in NAMES:
        saved = SavedModel.FromString((exported / name / "1" / "saved_model.pb").read_bytes())
        graph = saved.meta_graphs[0].graph_def
        functions = graph.library.function
        ops = {node.op for node in graph.node} | {node.op for function in functions for node in function.node_def}
        assert not {op for op in ops if "PyFunc" in op or "Custom" in op}, name
        compiled = [f.signature.name for f in functions if f.attr["_XlaMustCompile"].b]
        assert not compiled, name  # a stock server has XLA off


def test_models_config_names_what_is_there(exported):
    text = (exported / "models.config").read_text()
    config = text_format.Parse(text, ModelServerConfig()).model_config_list.config
    assert [model.name for model in config] == list(NAMES)
    assert all(
        Path(model.base_path) == exported / model.name and model.model_platform == "tensorflow" for model in config
    )
    assert "max_batch_size" in (exported / "batching.config").read_text()


def test_describe_tells_a_client_all_it_needs(predict, sd):
    config, steps, nothing = map(json.loads, predict("text_encoder", "describe", names=["", "history", "?"])["config"])
    assert steps == 5 and nothing is None
    assert config["latent_shape"] == [8, 8, 4] and config["image_size"] == [64, 64] and config["factor"] == 8
    assert config["scheduler"] == sd.checkpoint.scheduler() and config["columns"] == list(COLUMNS)


# === Numbers ===


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 25, 30, 50, 75, 300, 999])
def test_the_published_table_is_ddim_at_the_published_timesteps(num_steps, prediction_type):
    scheduler = NoiseScheduler(prediction_type=prediction_type)
    rows = signatures.published_rows(scheduler, num_steps).numpy()
    timesteps = list(range(1, 1000, 1000 // num_steps))[:num_steps]
    np.testing.assert_array_equal(rows[:, 1], timesteps[::-1])
    # the loop of the published notebooks, written for any prediction
    alphas = scheduler.alphas_cumprod
    before = [1.0, *(alphas[t] for t in timesteps[:-1])]
    outputs = np.random.default_rng(0).standard_normal((num_steps, 3))
    x = y = np.ones(3)
    for m, t, alpha_prev, row in zip(outputs, timesteps[::-1], before[::-1], rows.astype("float64")):
        signal, sigma = np.sqrt(alphas[t]), np.sqrt(1 - alphas[t])
        if prediction_type == "epsilon":
            noise, clean = m, (x - sigma * m) / signal
        elif prediction_type == "sample":
            noise, clean = (x - signal * m) / sigma, m
        else:
            noise, clean = signal * m + sigma * x, signal * x - sigma * m
        x = np.sqrt(alpha_prev) * clean + np.sqrt(1 - alpha_prev) * noise
        y = row[5] * y + row[6] * (row[3] * y + row[4] * m)
    np.testing.assert_allclose(y, x, rtol=2e-4, atol=1e-4)
    assert (rows[:, 2] == 7.5).all() and len(rows) == num_steps


def test_as_many_steps_as_timesteps():
    rows = signatures.published_rows(NoiseScheduler(), 1000).numpy()
    np.testing.assert_array_equal(rows[:, 1], np.arange(1000)[::-1])


@pytest.mark.parametrize("num_steps", [1, 30, 75])
def test_the_published_endpoint_draws(predict, sd, num_steps):
    tokens = sd.tokenizer(["red apple on a blue background"])
    contexts = predict("text_encoder", "serving_default", tokens=tokens, batch_size=3)
    np.testing.assert_allclose(
        contexts["context"], np.repeat(sd.encode_text("red apple on a blue background"), 3, 0), atol=1e-4
    )
    first, second = (
        predict("diffusion_model", "serving_default", **contexts, num_steps=num_steps, batch_size=3)["latent"]
        for _ in range(2)
    )
    assert first.shape == (3, 8, 8, 4) and np.isfinite(first).all()
    assert np.abs(first - second).max() > 0.1 and np.abs(first[0] - first[1]).max() > 0.1
    if num_steps > 1:  # blue ground, red middle
        pictures = predict("decoder", "serving_default", latent=first)["generated_images"].astype(int)
        assert pictures.shape == (3, 64, 64, 3)
        assert (pictures[:, :4, :4].mean((1, 2)).argmax(1) == 2).all()
        assert (pictures[:, 28:36, 28:36].mean((1, 2)).argmax(1) == 0).all()


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "plms", "heun", "unipc", "euler_a", "ddpm", "dpmpp_2m_sde"])
def test_one_call_and_chunks_equal_python(predict, sd, name):
    """Stochastic samplers included: the graph draws the noise that Python draws."""
    prompts = ["red apple on a blue background", "a cat on a green background"]
    table = make_table(name, sd.scheduler[0], 6)
    inputs = requests(sd, prompts, table, (7, 8))
    wanted = sd.text_to_image(prompts, sampler=table, seed=7, progress=False)
    whole = in_chunks(predict, inputs, len(table))
    assert alike(predict("decoder", "serving_default", latent=whole)["generated_images"], wanted)
    assert alike(pixels(predict("decoder", "decode_png", latent=whole)["image_bytes"]), wanted)
    for size in (1, 3, 5):
        np.testing.assert_allclose(in_chunks(predict, inputs, size), whole, atol=2e-4)


def test_neighbours_do_not_change_a_picture(predict, sd):
    prompts = ["a cat on a green background", "red apple on a blue background", "a rocket on a pink background"]
    tables = [
        make_table(*options)
        for options in (("euler_a", sd.scheduler[0], 5), ("plms", sd.scheduler[0], 4), ("ddim", sd.scheduler[0], 3))
    ]
    alone = [requests(sd, [prompt], table, [seed]) for prompt, table, seed in zip(prompts, tables, (3, 5, 9))]
    rows = max(len(table) for table in tables)
    for inputs in alone:  # a row of zeros is idle
        inputs["steps"] = np.pad(inputs["steps"], [(0, 0), (0, rows - inputs["steps"].shape[1]), (0, 0)])
    together = {key: np.concatenate([np.asarray(inputs[key]) for inputs in alone]) for key in alone[0]}
    found = predict("denoiser", "serving_default", **together)
    for i, inputs in enumerate(alone):
        wanted = predict("diffusion_model", "denoise", **inputs)
        np.testing.assert_allclose(found["latent"][i], wanted["latent"][0], atol=2e-4)
        np.testing.assert_allclose(found["history"][i], wanted["history"][0], atol=2e-4)


def test_tensors_as_float16_strings(predict, sd):
    inputs = requests(sd, ["a cat"], make_table("dpmpp_2m", sd.scheduler[0], 4), [7])
    text = {
        f"{key}_bytes" if key not in ("steps", "seed") else key: value
        if key in ("steps", "seed")
        else [np.asarray(item, "<f2").tobytes() for item in value]
        for key, value in inputs.items()
    }
    found = predict("diffusion_model", "denoise_bytes", **text)
    wanted = predict("diffusion_model", "denoise", **inputs)
    for key in ("latent", "history"):
        number = np.frombuffer(found[f"{key}_bytes"][0], "<f2").reshape(wanted[key][0].shape)
        np.testing.assert_allclose(number, wanted[key][0], atol=2e-2)
    encoded = predict("text_encoder", "encode_prompt_bytes", prompt=["a cat", "a dog"])
    contexts = np.stack([np.frombuffer(item, "<f2").reshape(77, 128) for item in encoded["context_bytes"]])
    np.testing.assert_allclose(contexts, sd.encode_text(["a cat", "a dog"]), atol=5e-3)
    png = predict("decoder", "decode_png_bytes", latent_bytes=found["latent_bytes"])["image_bytes"]
    assert pixels(png).shape == (1, 64, 64, 3)


def test_the_all_in_one_model_draws_what_python_draws(predict, sd):
    prompts = ["red apple on a blue background", "a cat on a green background", "a rocket"]
    negative, seeds, steps, scales = ["", "blue", ""], [7, 0, 2**31 - 1], [4, 9, 1], [7.5, 3.0, 1.0]
    found = predict(
        "stable_diffusion",
        "serving_default",
        prompt=prompts,
        negative_prompt=negative,
        num_steps=steps,
        guidance_scale=scales,
        seed=seeds,
    )["image_bytes"]
    for picture, prompt, bad, seed, count, scale in zip(pixels(found), prompts, negative, seeds, steps, scales):
        options = {"num_steps": count, "seed": seed, "unconditional_guidance_scale": scale, "progress": False}
        assert alike(picture, sd.text_to_image(prompt, negative_prompt=bad, **options)[0])


def test_image_to_image_through_denoise(predict, sd, tmp_path):
    picture = sd.text_to_image("red apple on a blue background", num_steps=8, seed=1, progress=False)[0]
    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "PNG")
        known = predict("image_encoder", "serving_default", image_bytes=[file.getvalue()])["latent"]
    np.testing.assert_allclose(known, sd.encode(Image.fromarray(picture)), atol=1e-3)
    scheduler, name, options = sd.scheduler
    table = make_table(name, scheduler, 8, **{**options, "strength": 0.5})
    inputs = requests(sd, ["green apple on a blue background"], table, [7])
    inputs["latent"] = table.signal[0] * known + table.sigma[0] * initial_noise(7, 1, (8, 8, 4))
    found = predict("decoder", "serving_default", latent=in_chunks(predict, inputs, 3))["generated_images"]
    wanted = sd.image_to_image(picture, "green apple on a blue background", 0.5, num_steps=8, seed=7, progress=False)
    assert alike(found, wanted)


@pytest.mark.parametrize(
    "mode, size, kind",
    [
        ("RGBA", (64, 64), "PNG"),
        ("L", (64, 64), "PNG"),
        ("RGB", (100, 80), "PNG"),
        ("RGB", (64, 64), "BMP"),
        ("P", (64, 64), "GIF"),
    ],
)
def test_pictures_of_all_kinds(predict, sd, mode, size, kind):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 4), dtype="uint8")).resize(size, Image.Resampling.BICUBIC)
    image = image.convert(mode)
    with io.BytesIO() as file:
        image.save(file, kind)
        latent = predict("image_encoder", "serving_default", image_bytes=[file.getvalue()])["latent"]
    wanted = sd.encode(sd._fitted(image, 64, 64))
    assert np.abs(latent - wanted).mean() < 0.02 and np.abs(latent - wanted).max() < 0.3


# === Bad requests ===


BAD = [
    ("latent", lambda x: np.where(np.arange(4) == 1, np.nan, x["latent"]), "latent holds NaN"),
    ("latent", lambda x: x["latent"][..., :3], "latent must have the shape"),
    ("latent", lambda x: np.zeros((1, 7, 8, 4)), "latent must have the shape"),
    ("latent", lambda x: np.zeros((2, 8, 8, 4)), "give as many"),
    ("context", lambda x: x["context"][:, :70], "context must have the shape"),
    ("steps", lambda x: x["steps"][..., :13], "steps must have the shape"),
    ("steps", lambda x: np.zeros((1, 2001, 14)), "steps may have up to 2000 rows"),
    ("steps", lambda x: np.full_like(x["steps"], np.inf), "steps holds NaN"),
]


@pytest.fixture(scope="module")
def as_a_server(exported):
    """Runs a `serving_default` in a session, fed by tensor name: there no shape is compared with the signature's."""
    sessions = {}

    def run(name, **inputs):
        if name not in sessions:
            session = tf.compat.v1.Session(graph=tf.Graph())
            with session.graph.as_default():
                meta = tf.compat.v1.saved_model.load(session, ["serve"], str(exported / name / "1"))
            sessions[name] = session, meta.signature_def["serving_default"]
        session, signature = sessions[name]
        feeds = {key: session.graph.get_tensor_by_name(signature.inputs[key].name) for key in inputs}
        fetches = [tensor.name for tensor in signature.outputs.values()]
        options = CallableOptions(feed=[tensor.name for tensor in feeds.values()], fetch=fetches)
        values = [np.asarray(inputs[key], tensor.dtype.as_numpy_dtype) for key, tensor in feeds.items()]
        return dict(zip(signature.outputs, session._make_callable_from_options(options)(*values)))

    yield run
    for session, _ in sessions.values():
        session.close()


@pytest.mark.parametrize("name, change, message", BAD)
def test_bad_requests_of_denoise(as_a_server, sd, name, change, message):
    inputs = requests(sd, ["a cat"], make_table("ddim", sd.scheduler[0], 2), [7])
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        as_a_server("denoiser", **{**inputs, name: change(inputs)})
    assert np.isfinite(as_a_server("denoiser", **inputs)["latent"]).all()


def good_drawing(**changes):
    good = {"prompt": ["a cat"], "negative_prompt": [""], "num_steps": [2], "guidance_scale": [7.5], "seed": [7]}
    return {**good, **changes}


@pytest.mark.parametrize(
    "model, inputs, message",
    [
        ("stable_diffusion", good_drawing(num_steps=[0]), "num_steps must be from 1 to"),
        ("stable_diffusion", good_drawing(num_steps=[10**6]), "num_steps must be from 1 to"),
        ("stable_diffusion", good_drawing(seed=[-1]), "seed must be at least 0"),
        ("stable_diffusion", good_drawing(guidance_scale=[np.nan]), "guidance_scale holds NaN"),
        ("stable_diffusion", good_drawing(seed=[1, 2]), "give as many"),
        ("stable_diffusion", good_drawing(prompt="a cat"), "prompt must have the shape"),
        ("stable_diffusion", good_drawing(prompt=["x" * 2**20]), "prompt is longer than"),
        ("decoder", {"latent": np.full((1, 8, 8, 4), np.inf)}, "latent holds NaN"),
        ("decoder", {"latent": np.zeros((1, 8, 8, 3))}, "latent must have the shape"),
        ("image_encoder", {"image_bytes": [b"GARBAGE!"]}, "must be a PNG, JPEG, GIF or BMP"),
        ("image_encoder", {"image_bytes": [b"\x89PNG\r\n\x1a\n"]}, ""),
        ("image_encoder", {"image_bytes": [b"\xff\xd8\xff\xe0 no picture"]}, ""),
        ("image_encoder", {"image_bytes": [b""]}, "must be a PNG"),
        ("text_encoder", {"tokens": np.zeros((1, 77)), "batch_size": 0}, "batch_size must be from 1 to"),
        ("text_encoder", {"tokens": np.zeros((1, 76)), "batch_size": 1}, "tokens must have the shape"),
        ("text_encoder", {"tokens": np.full((1, 77), 10**6), "batch_size": 1}, ""),
        ("text_encoder", {"tokens": np.zeros((2, 77)), "batch_size": 3}, "give one row, or as many"),
    ],
)
def test_bad_requests(as_a_server, model, inputs, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        as_a_server(model, **inputs)


@pytest.mark.parametrize("num_steps, batch_size", [(0, 1), (1001, 1), (10**6, 1), (5, 0), (5, 10**6)])
def test_bad_requests_of_the_published_endpoint(as_a_server, num_steps, batch_size):
    context = np.zeros((1, 77, 128))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(num_steps|batch_size) must be from 1 to"):
        as_a_server(
            "diffusion_model",
            context=context,
            unconditional_context=context,
            num_steps=num_steps,
            batch_size=batch_size,
        )


def test_a_decompression_bomb_is_refused_unopened(as_a_server):
    with io.BytesIO() as file:
        Image.new("1", (30000, 30000)).save(file, "PNG")
        with pytest.raises(tf.errors.InvalidArgumentError, match="may have up to"):
            as_a_server("image_encoder", image_bytes=[file.getvalue()])


# === The tools that open them ===


def run(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_saved_model_cli_shows_and_runs(exported, tmp_path):
    cli = ("-m", "tensorflow.python.tools.saved_model_cli")
    shown = run(*cli, "show", "--dir", exported / "diffusion_model" / "1", "--all")
    assert "signature_def['denoise']" in shown and "shape: (-1, 5, 8, 8, 4)" in shown
    np.save(tmp_path / "latent.npy", np.zeros((2, 8, 8, 4), "float32"))
    options = ("--tag_set", "serve", "--signature_def", "serving_default", "--outdir", tmp_path)
    inputs = ("--inputs", f"latent={tmp_path / 'latent.npy'}")
    run(*cli, "run", "--dir", exported / "decoder" / "1", *options, *inputs)
    assert np.load(tmp_path / "generated_images.npy").shape == (2, 64, 64, 3)


def test_the_c_loader_opens_them(exported, sd):
    meta = SavedModel.FromString((exported / "decoder" / "1" / "saved_model.pb").read_bytes()).meta_graphs[0]
    signature = meta.signature_def["serving_default"]
    names = {"input": signature.inputs["latent"].name, "output": signature.outputs["generated_images"].name}
    assert all(name.endswith(":0") for name in names.values())
    names = json.dumps({key: name.removesuffix(":0") for key, name in names.items()})
    folders = [exported / name / "1" for name in ("decoder", *NAMES)]
    size, total = map(int, run(ROOT / "tests" / "c_loader.py", *folders, input=names).split())
    wanted = sd.decode(np.zeros((1, 8, 8, 4), "float32"))
    assert size == wanted.size and abs(total - int(wanted.sum(dtype="int64"))) <= 64


@pytest.mark.parametrize(
    "name, output", [("text_encoder", "context"), ("decoder", "generated_images"), ("denoiser", "latent")]
)
def test_openvino_converts_them(models, sd, name, output):
    """What OpenVINO Model Server does."""
    function = models(name).signatures["serving_default"]
    model = openvino.convert_model(function)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if name == "text_encoder":
        inputs = {"tokens": sd.tokenizer(["a cat"]), "batch_size": np.int32(1)}
    elif name == "decoder":
        inputs = {"latent": initial_noise(7, 1, (8, 8, 4))}
    else:
        inputs = requests(sd, ["a cat"], make_table("ddim", sd.scheduler[0], 4), [7])
        inputs = {key: np.asarray(value, "int32" if key == "seed" else "float32") for key, value in inputs.items()}
        inputs["steps"] = inputs["steps"][:, :1]
    wanted = function(**{key: tf.constant(value) for key, value in inputs.items()})[output].numpy()
    found = [x for x in compiled(inputs).to_tuple() if x.shape == wanted.shape]
    assert min(np.abs(x.astype("float64") - wanted).max() for x in found) <= (1 if wanted.dtype == np.uint8 else 2e-4)


# === The exporter ===


def test_versions(exported, tmp_path, capsys):
    out = tmp_path / "models"
    for version in ("1", "2"):
        main(["--preset", "emoji", "--out", str(out), "--only", "decoder", "--serving-root", "/models"])
        assert capsys.readouterr().out.split() == [str(out / "decoder" / version)]
    assert 'base_path: "/models/decoder"' in (out / "models.config").read_text()
    with pytest.raises(SystemExit, match=r"never overwritten. Free: 3"):
        main(["--preset", "emoji", "--out", str(out), "--only", "decoder", "--version", "2"])
    assert sorted(path.name for path in out.iterdir()) == ["batching.config", "decoder", "models.config"]
    assert sorted(path.name for path in (out / "decoder").iterdir()) == ["1", "2"]


def test_an_export_that_differs_is_not_kept(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(
        saved_model,
        "examples",
        lambda *options: [
            (s, i, {k: v + 9 for k, v in o.items() if v.dtype != object}) for s, i, o in examples.examples(*options)
        ],
    )
    with pytest.raises(ValueError, match=r"does not pass its own check.*generated_images.*differs"):
        saved_model.export_saved_models(sd, tmp_path / "models", only=("decoder",), size=(64, 64))
    assert not list((tmp_path / "models").glob("**/*"))


def test_any_size_in_half_precision(tmp_path):
    """Dynamic sides, bfloat16 weights: the server takes pictures of every size that is a multiple of 8."""
    options = ["--only", "decoder", "image_encoder", "--height", "dynamic", "--width", "dynamic", "--dtype", "bfloat16"]
    main(["--preset", "emoji", "--out", str(tmp_path), *options, "--warmup", "1", "3"])
    function = tf.saved_model.load(str(tmp_path / "decoder" / "1")).signatures["serving_default"]
    assert function(latent=tf.zeros([2, 5, 7, 4]))["generated_images"].shape == (2, 40, 56, 3)
    assert function.structured_input_signature[1]["latent"].dtype == tf.float32


def test_xla_runs_where_the_server_allows_it(tmp_path, sd):
    """A server refuses compiled functions unless told otherwise, which `python -m serving serve` does for these."""
    main(["--preset", "emoji", "--out", str(tmp_path), "--only", "decoder", "--xla"])
    latent, url = initial_noise(7, 1, (8, 8, 4)), "http://localhost:{}/v1/models/decoder:predict"
    body = json.dumps({"instances": latent.tolist()})
    with server(tmp_path) as (_, port):
        reply = urllib3.request("POST", url.format(port), body=body).json()
        assert alike(np.array(reply["predictions"]), sd.decode(latent))
    with server(tmp_path, "--xla_cpu_compilation_enabled=false", "--enable_model_warmup=false") as (_, port):
        reply = urllib3.request("POST", url.format(port), body=body)
        assert reply.status == 500 and "XLA compilation disabled" in reply.json()["error"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "emoij"], "emoij"),
        (["--preset", "emoji", "--height", "100"], "height must be a multiple of 8; got 100"),
        (["--preset", "emoji", "--format", "litert", "--xla"], "--xla is for --format saved_model"),
        (["--preset", "emoji", "--precision", "int8"], "--precision is for --format litert"),
        (["--preset", "emoji", "--version", "0"], "at least 1"),
        (["--preset", "emoji", "--only", "unet"], "invalid choice: 'unet'"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(tmp_path / "models")])
    assert message in f"{stopped.value}{capsys.readouterr().err}" and not (tmp_path / "models").exists()
