"""`python -m serving`: the flags of `python -m keras_sd`, a server's flags, every bad input one sentence."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image
from test_client import MODELS, Fake, Refusal
from test_command_line import REQUIRED, VALUES

from keras_sd.__main__ import build_parser as build_local_parser
from keras_sd.png import read_parameters
from serving import __main__ as command_line
from serving.client import Client, ServerError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DRAWING = ("txt2img", "img2img", "inpaint")
SERVED = {
    "--host": "gpu-1",
    "--rest": None,
    "--tls": None,
    "--ca": "ca.pem",
    "--timeout": "5",
    "--chunk": "2",
}


class Recorder:
    """Stands in for `Client` and remembers how it was called."""

    calls = []
    config = {"preset": "toy"}
    scheduler = (None, "ddim", {})

    def __init__(self, *args, **kwargs):
        self.calls.append(("Client", args, kwargs))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def decode_png(self, latent):
        return [b"a picture"]

    def __getattr__(self, name):
        def method(*args, **kwargs):
            callback = kwargs.pop("callback")
            self.calls.append((name, args, {**kwargs, "callback": callback is not None}))
            if callback is not None:
                callback(0, 1, np.zeros((1, 1, 2, 4), "float32"))
            return np.zeros((kwargs.get("batch_size", 1), 8, 16, 3), "uint8")

        return method


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    """Calls of the stub; the working folder is empty but for two pictures."""
    Recorder.calls = []
    monkeypatch.setattr("serving.client.Client", Recorder)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 8), "red").save("a.png")
    Image.new("RGB", (16, 8), "blue").save("b.png")
    return Recorder.calls


def run(*args, error=None, code=2, capsys):
    """Runs the command line and returns what it printed; an `error` is one sentence with that in it."""
    result = command_line.main([*map(str, args)])
    out, err = capsys.readouterr()
    if error is None:
        assert result == 0, err
    else:
        lines = [line for line in err.strip().splitlines() if not line.startswith("Warning")]
        assert result == code and len(lines) == 1 and error in lines[0] and "Traceback" not in err, (result, err)
    return out


def options_of(parser, command, refused=False):
    """The spellings of each option of a command, or of those that it refuses."""
    (commands,) = (action for action in parser._actions if action.dest == "command")
    actions = [action for action in commands.choices[command]._actions if action.dest != "help"]
    actions = [action for action in actions if not refused or isinstance(action, command_line.Refuse)]
    return [action.option_strings for action in actions if action.option_strings]


# === Flags ===


@pytest.mark.parametrize("command", DRAWING)
def test_flags_are_those_of_keras_sd_and_of_the_server(command):
    theirs, ours = (options_of(parser, command) for parser in (build_local_parser(), command_line.build_parser()))
    assert sorted(ours) == sorted([*theirs, *([flag] for flag in SERVED)])


@pytest.mark.parametrize("command", DRAWING)
def test_every_flag_is_consumed(command, recorder, capsys, monkeypatch):
    """Each option, in each spelling, changes what is asked for or where it is written."""
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def effect(flags):
        recorder.clear()
        prompt = [] if "--prompt" in flags else ["an apple"]
        flags = [x for pair in (REQUIRED[command] | flags).items() for x in pair if x is not None]
        out = run(command, *prompt, *flags, capsys=capsys)
        return repr((out, [(name, [str(a)[:20] for a in args], kwargs) for name, args, kwargs in recorder]))

    plain, values = effect({}), VALUES | SERVED
    refused = options_of(command_line.build_parser(), command, refused=True)
    assert {"--preset", "--ckpt", "--dtype", "--tokenizer"} <= {x for spellings in refused for x in spellings}
    for spellings in options_of(command_line.build_parser(), command):
        if spellings in refused:
            for spelling in spellings:
                run(command, "an apple", spelling, error=f"{spelling} is for python -m keras_sd", capsys=capsys)
            continue
        (value,) = (values[spelling] for spelling in spellings if spelling in values)
        if spellings[0] not in ("--init-img", "--mask"):
            effects = {effect({spelling: value}) for spelling in spellings}
            assert len(effects) == 1 and plain not in effects, spellings


def test_arguments_of_the_client(recorder, capsys):
    flags = (
        "--host gpu-1 --host gpu-2:9000 --rest --ca ca.pem --timeout 9 --chunk 3 --preview new/preview.png --steps 7 "
        "--ddim_eta 0.5 --scale 2 --H 72 --W 104 --seed 11 --negative-prompt blue --n_samples 3 --n_iter 2 "
        "--outdir folder --init-img a.png --mask b.png --strength 0.5"
    )
    run("inpaint", "an apple", *flags.split(), capsys=capsys)
    opened, first, second = recorder
    assert opened == ("Client", (["gpu-1", "gpu-2:9000"],), {"rest": True, "tls": "ca.pem", "timeout": 9.0})
    assert first[0] == "inpaint" and [x.getpixel((0, 0))[0] for x in first[1][:2]] == [255, 0]
    assert first[2] == {
        "negative_prompt": "blue",
        "batch_size": 3,
        "num_steps": 7,
        "unconditional_guidance_scale": 2.0,
        "seed": 11,
        "sampler": "ddim",
        "height": 72,
        "width": 104,
        "chunk": 3,
        "callback": True,
        "progress": False,
        "eta": 0.5,
        "strength": 0.5,
    }
    assert second[2] == first[2] | {"seed": 14}
    assert sorted(os.listdir("folder")) == [f"{i:05d}.png" for i in range(6)]
    assert os.listdir("new") == ["preview.png"] and pathlib.Path("new/preview.png").read_bytes() == b"a picture"
    found = read_parameters("folder/00004.png")
    assert found["Seed"] == "15" and found["Model"] == "toy" and found["Sampler"] == "DDIM" and found["Eta"] == "0.5"


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("txt2img", "give one prompt"),
        ("txt2img a --prompt b", "give one prompt"),
        ("txt2img a --steps 0", "--steps"),
        ("txt2img a --chunk 0", "--chunk"),
        ("txt2img a --timeout 0", "--timeout"),
        ("txt2img a --sampler eular", "Did you mean 'euler'"),
        ("txt2img a --colour red", "unrecognized arguments: --colour red"),
        ("txt2img a --preview a.jpg", "--preview must end in .png"),
        ("txt2img a --out a.jpg", "--out must end in .png"),
        ("txt2img a --out a.png/b.png", "is a file, not a folder"),
        ("txt2img a --host gpu:port", "A host is a name or address"),
        ("txt2img a --host http://gpu --tls", "TLS needs an https address"),
        ("txt2img a --ca no.pem", "no.pem"),
        ("img2img a --init-img no.png", "--init-img: there is no file 'no.png'"),
        ("inpaint a --init-img a.png", "--mask"),
        ("paint a", "paint"),
    ],
)
def test_bad_input(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 8)).save("a.png")
    run(*arguments.split(), error=error, capsys=capsys)


# === Pictures ===


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.stop()


def test_pictures_are_those_of_the_client(fake, tmp_path, capsys):
    path, preview = tmp_path / "out.png", tmp_path / "preview.png"
    for flags in (
        ["--host", fake.grpc_host],
        ["--host", fake.rest_host, "--rest"],
        ["--host", f"http://{fake.rest_host}"],
    ):
        out = run("txt2img", "an apple", *flags, "--seed", 7, "--steps", 4, "--out", path, capsys=capsys)
        assert out == f"{path}: seed 7\n"
        with Client(fake.grpc_host) as client:
            wanted = client.text_to_image("an apple", num_steps=4, seed=7, progress=False)[0]
        assert np.abs(np.asarray(Image.open(path)).astype(int) - wanted).max() <= 1
    assert read_parameters(path) | {"Version": ""} == {
        "prompt": "an apple",
        "negative_prompt": "",
        "Steps": "4",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "64x64",
        "Model": "toy",
        "Version": "",
    }
    flags = ["--host", fake.grpc_host, "--quiet", "--out", tmp_path / "new.png", "--init-img", path, "--steps", 4]
    run("img2img", "a pear", *flags, "--preview", preview, capsys=capsys)
    assert Image.open(preview).size == (64, 64)
    run("inpaint", "a pear", *flags, "--mask", path, capsys=capsys)


def test_a_servers_error_is_one_sentence(fake, tmp_path, monkeypatch, capsys):
    def before(server, model, signature, inputs):
        raise Refusal("INVALID_ARGUMENT", "latent must have\nthe shape (1, 2)")

    fake.before = before
    error = f"Error: text_encoder at {fake.grpc_host}: latent must have the shape (1, 2) (INVALID_ARGUMENT)"
    monkeypatch.chdir(tmp_path)
    run("txt2img", "a", "--host", fake.grpc_host, error=error, code=1, capsys=capsys)
    monkeypatch.setattr("serving.client.PAUSES", (0,))
    run("txt2img", "a", "--host", "localhost:9", error="(UNAVAILABLE)", code=1, capsys=capsys)
    monkeypatch.setenv("KERAS_SD_TRACEBACK", "1")
    with pytest.raises(ServerError):
        command_line.main(["txt2img", "a", "--host", "localhost:9"])


def test_ctrl_c_leaves_cleanly(tmp_path):
    started, release = threading.Event(), threading.Event()

    def before(server, model, signature, inputs):
        if "steps" in inputs:
            started.set()
            release.wait(30)

    fake = Fake(MODELS, before)
    command = [sys.executable, "-m", "serving", "txt2img", "a", "--host", fake.grpc_host]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1].strip().splitlines()[-1] == "Interrupted"
        assert process.returncode == 130 and not os.listdir(tmp_path)
    finally:
        release.set()
        process.kill()
        fake.stop()


# === serve ===


@pytest.fixture
def models(tmp_path):
    """A folder of two models, as the exporter leaves it."""
    folder = tmp_path / "models"
    for name, version in (("decoder", "1"), ("decoder", "12"), ("denoiser", "3")):
        (folder / name / version / "assets.extra").mkdir(parents=True)
        (folder / name / version / "saved_model.pb").write_bytes(b"")
        (folder / name / version / "assets.extra" / "export.json").write_text('{"xla": false}')
    (folder / "batching.config").write_text("max_batch_size { value: 8 }")
    write_config(folder, folder)
    return folder


def write_config(folder, root):
    blocks = [f'config {{ name: "{x}" base_path: "{root}/{x}" }}' for x in ("decoder", "denoiser")]
    (folder / "models.config").write_text(f"model_config_list {{ {' '.join(blocks)} }}")


@pytest.fixture
def started(monkeypatch):
    """Flags that the project's own server was started with; its config file's text in the place of its path."""
    calls = []

    def main(flags):
        given = dict(flag[2:].partition("=")[::2] for flag in flags)
        if "model_config_file" in given and os.path.isfile(given["model_config_file"]):
            with open(given["model_config_file"]) as file:
                given["text"] = file.read()
        calls.append(given)
        return 0

    module = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "serving.local.__main__", module)
    monkeypatch.setattr("shutil.which", lambda name: None)
    return calls


def test_the_local_server_gets_the_flags(models, started, capsys):
    run("serve", "--models", models, "--local", "--port=9000", "--enable_batching", "--x=y", capsys=capsys)
    assert started[0].pop("text") == (models / "models.config").read_text()
    assert started == [
        {
            "rest_api_port": "8501",
            "rest_api_timeout_in_ms": "600000",
            "model_config_file": str(models / "models.config"),
            "batching_parameters_file": str(models / "batching.config"),
            "port": "9000",
            "enable_batching": "",
            "x": "y",
        }
    ]
    run("serve", "--models", models, "--local", "--enable_batching=false", capsys=capsys)
    assert "batching_parameters_file" not in started[1]
    run("serve", "--models", models, "--local", "--enable_batching", "--batching_parameters_file=mine", capsys=capsys)
    assert started[2]["batching_parameters_file"] == "mine"
    run("serve", "--local", "--model_name=decoder", "--model_base_path=/models/decoder", capsys=capsys)
    assert started[3]["model_base_path"] == "/models/decoder" and "model_config_file" not in started[3]


@pytest.mark.parametrize("config", ["of another machine", "none"])
def test_a_config_is_made_for_the_folders_that_are_there(models, started, capsys, config, monkeypatch):
    write_config(models, "/models") if config != "none" else (models / "models.config").unlink()
    (models / "notes").mkdir()
    monkeypatch.chdir(models.parent)
    run("serve", "--models", "models", "--local", capsys=capsys)
    text = started[0]["text"]
    assert text.count("config {") == 2 and all(f'"{models}/{name}"' in text for name in ("decoder", "denoiser"))
    assert not os.path.exists(started[0]["model_config_file"])  # it went with the server


def test_the_configs_are_what_the_real_server_reads(models, started, capsys):
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    (models / "models.config").unlink()
    run("serve", "--models", models, "--local", capsys=capsys)
    config = text_format.Parse(started[0]["text"], model_server_config_pb2.ModelServerConfig())
    found = {(one.name, one.base_path, one.model_platform) for one in config.model_config_list.config}
    assert found == {(name, str(models / name), "tensorflow") for name in ("decoder", "denoiser")}


def test_without_the_real_server_the_own_one_says_so(models, started, capsys):
    assert command_line.main(["serve", "--models", str(models)]) == 0 and len(started) == 1
    assert "not on the PATH" in capsys.readouterr().err


@pytest.mark.parametrize("xla", [False, True])
def test_the_real_server_is_started_where_there_is_one(models, tmp_path, xla):
    (models / "decoder/12/assets.extra/export.json").write_text(json.dumps({"xla": xla}))
    write_config(models, "/models")
    server = tmp_path / "bin" / "tensorflow_model_server"
    server.parent.mkdir()
    server.write_text('#!/bin/sh\nfor flag in "$@"; do echo "$flag"; done\ncat "${3#*=}" || true\n')
    server.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": ROOT, "PATH": f"{server.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "serving", "serve", "--models", models, "--port=9000", "--enable_batching"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    flags = [line for line in done.stdout.splitlines() if line.startswith("--")]
    assert flags[:2] == ["--rest_api_port=8501", "--rest_api_timeout_in_ms=600000"], done.stderr
    assert flags[2].startswith("--model_config_file=") and f'"{models}/decoder"' in done.stdout
    assert flags[3] == f"--batching_parameters_file={models}/batching.config"
    assert flags[4:] == ["--xla_cpu_compilation_enabled=true"] * xla + ["--port=9000", "--enable_batching"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        ("", "name the models"),
        ("--models no", "there is no folder 'no'"),
        ("--models empty", "'empty' holds no models"),
        ("--models models --model_config_file=x", "--models and --model_config_file exclude each other"),
        ("--models models --port 8500", "--name=value; got '8500'"),
        ("--models models -x", "got '-x'"),
    ],
)
def test_bad_input_of_serve(arguments, error, models, started, monkeypatch, capsys):
    monkeypatch.chdir(models.parent)
    os.mkdir("empty")
    run("serve", "--local", *arguments.split(), error=error, capsys=capsys)
    assert not started
