"""The command line: every flag is consumed, every bad input is one sentence and an exit code."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from keras_sd.__main__ import build_parser, main
from keras_sd.edges import canny
from keras_sd.png import read_parameters
from keras_sd.presets import Preset

DRAW = ["txt2img", "an apple", "--steps", "2"]
DRAWING = ("txt2img", "img2img", "inpaint", "upscale")
PATH = {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}


class Recorder:
    """Stands in for `StableDiffusion` and remembers how it was called."""

    calls = []
    scheduler = (None, "ddim", {})
    flagged = [True] * 3
    image_size = (512, 512)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        cls.calls.append(("from_preset", (preset,), kwargs))
        return cls()

    def read_ahead(self, *names, keep=True):
        """Changes when models are read, but no picture."""

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            frames = np.zeros((2 if name == "interpolate" else kwargs.get("batch_size", 1), 8, 16, 3), "uint8")
            frames[1:] = 255
            return frames

        return method


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    """Calls of the stub; the working folder is empty but for the pictures of one colour `a.png` and `b.png`."""
    Recorder.calls = []
    monkeypatch.setattr("keras_sd.presets.PRESETS", {"emoji": Preset(".", "", "")})
    monkeypatch.setattr("keras_sd.stable_diffusion.StableDiffusion", Recorder)
    monkeypatch.setattr("keras_sd.watermark.check_size", lambda *size: None)
    monkeypatch.setattr(
        "keras_sd.watermark.add_watermark", lambda image: Recorder.calls.append(("add_watermark", (), {})) or image
    )
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 8), "red").save("a.png")
    Image.new("RGB", (16, 8), "blue").save("b.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 100, (8, 16), "uint8")).save("grey.png")
    monkeypatch.setattr("keras_sd.weights.control_net.load_control_net", lambda path, dtype: f"{dtype} net {path}")
    os.mkdir("loras")
    os.mkdir("safety_checker")
    for path in ("a.safetensors", "loras/a.safetensors", "loras/b.pt", "a:b.pt"):
        open(path, "w").close()
    return Recorder.calls


def run(*args, error=None, code=1, capsys):
    """Runs the command line and returns what it printed.

    Where an error is expected, it asserts the exit code and that one sentence is said, with `error` in it.
    """
    result = main([*map(str, args)])
    out, err = capsys.readouterr()
    if error is None:
        assert result == 0, err
    else:
        lines = [line for line in err.strip().splitlines() if not line.startswith("Warning")]
        assert result == code and len(lines) == 1 and error in lines[0] and "Traceback" not in err, err
    return out


# === Flags ===

# A value for every option, other than its default.
VALUES = {
    "--prompt": "a pear",
    "--negative-prompt": "blue",
    "--steps": "7",
    "--sampler": "euler",
    "--plms": None,
    "--karras": None,
    "--ddim_eta": "0.5",
    "--scale": "0",
    "--H": "72",
    "--W": "104",
    "--seed": "11",
    "--n_samples": "3",
    "--n_iter": "2",
    "--out": "other.png",
    "--outdir": "folder",
    "--quiet": None,
    "--preview": "preview.png",
    "--lora": "a.safetensors:0.5",
    "--lora-dir": "loras",
    "--embedding": "loras/b.pt:<cat>",
    "--control-net": "a.safetensors",
    "--control-image": "b.png",
    "--canny": "grey.png",
    "--canny-low": "20",
    "--canny-high": "120",
    "--control-scale": "0.5",
    "--control-start": "0.25",
    "--control-end": "0.75",
    "--guess-mode": None,
    "--variation-strength": "0.25",
    "--variation-seed": "3",
    "--to-prompt": "a pear",
    "--to-seed": "3",
    "--frames": "3",
    "--fps": "4",
    "--preset": "a.png",
    "--ckpt": "a.png",
    "--tokenizer": "t",
    "--vae": "a.png",
    "--watermark": None,
    "--ip-adapter": "a.safetensors:0.5",
    "--image-prompt": "b.png",
    "--image-encoder": "e",
    "--safety-checker": None,
    "--safety-checker-from": "a.png",
    "--dtype": "float16",
    "--init-img": "b.png",
    "--mask": "a.png",
    "--feather": "3",
    "--low-memory": None,
    "--two-pass-guidance": None,
    "--vae-slicing": None,
    "--vae-tiling": None,
    "--cache-interval": "2",
    "--token-merging": "0.5",
    "--strength": "0.25",
    "--hires": "1.5",
    "--hires-strength": "0.5",
    "--outscale": "1.5",
    "--model": "a.png",
    "--noise_level": "30",
    "--tile": "128",
}
REQUIRED = {"txt2img": {}, "img2img": {"--init-img": "a.png"}, "inpaint": {"--init-img": "a.png", "--mask": "b.png"}}
REQUIRED |= {"upscale": {}, "interpolate": {"--to-prompt": "a fig", "--out": "film.gif"}}
# Options that make sense beside others alone.
NEEDS = {"--variation-seed": {"--variation-strength": "0.5"}, "--lora-dir": {"--prompt": "an <lora:a:0.5> apple"}}
NEEDS |= {"--ip-adapter": {"--image-prompt": "a.png"}, "--image-prompt": {"--ip-adapter": "a.safetensors"}}
NEEDS["--image-encoder"] = {"--ip-adapter": "a.safetensors", "--image-prompt": "a.png"}
NEEDS["interpolate --lora-dir"] = {"--to-prompt": "an <lora:a:0.5> apple"}


CONTROL = {"--control-net": "loras/b.pt"}
NEEDS |= {"--control-net": {"--control-image": "b.png"}, "--control-image": CONTROL, "--canny": CONTROL}
for _name in ("--control-scale", "--control-start", "--control-end", "--guess-mode"):
    NEEDS[_name] = CONTROL | {"--control-image": "b.png"}
NEEDS |= {name: CONTROL | {"--canny": "grey.png"} for name in ("--canny-low", "--canny-high")}
# Of these none is right without the other.
TOGETHER = "--control-net", "--control-image", "--canny", "--ip-adapter", "--image-prompt"


def options_of(command):
    """The spellings of each option of a command."""
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    actions = commands.choices[command]._actions
    return [action.option_strings for action in actions if action.option_strings and action.dest != "help"]


def without_pictures(args):
    return [x.getpixel((0, 0)) if isinstance(x, Image.Image) else x for x in args]


def watched(kwargs):
    """The arguments in a form that can be compared."""
    nets = [(net, np.asarray(image).tolist(), *others) for net, image, *others in kwargs.get("control", ())]
    shown = {"callback": kwargs["callback"].__name__ if "callback" in kwargs else None, "control": nets}
    return {name: shown.get(name, value) for name, value in kwargs.items()}


@pytest.mark.parametrize("command", [*DRAWING, "interpolate"])
def test_every_flag_is_consumed(command, recorder, capsys, monkeypatch):
    """Each option that the parser knows, in each spelling, changes what is drawn or where it is written."""
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def effect(flags):
        recorder.clear()
        prompt = [] if "--prompt" in flags else ["an apple"]
        prompt = ["a.png", *prompt] if command == "upscale" else prompt
        flags = [x for pair in (REQUIRED[command] | flags).items() for x in pair if x is not None]
        out = run(command, *prompt, *flags, capsys=capsys)
        shutil.rmtree("folder", ignore_errors=True)
        film = Image.open("film.gif").info if command == "interpolate" and "other.png" not in flags else None
        return repr((out, film, [(name, without_pictures(args), watched(kwargs)) for name, args, kwargs in recorder]))

    for spellings in options_of(command):
        (value,) = (VALUES[spelling] for spelling in spellings if spelling in VALUES)
        needs = NEEDS.get(f"{command} {spellings[0]}", NEEDS.get(spellings[0], {}))
        effects = {effect(needs | {spelling: value}) for spelling in spellings}
        without = effect({} if spellings[0] in TOGETHER else needs)
        assert len(effects) == 1 and without not in effects, spellings


def test_arguments_of_the_pipeline(recorder, capsys):
    flags = (
        "--preset a.png --ddim_steps 7 --sampler ddim --ddim_eta 0.5 --scale 0 --H 72 --W 104 --seed 11 "
        "--negative-prompt blue --n_samples 3 --n_iter 2 --dtype float16 --tokenizer t --outdir folder "
        "--init-img a.png --mask b.png --strength 0.5"
    )
    run("inpaint", "an apple", *flags.split(), capsys=capsys)
    opened, first, second = recorder
    assert str(opened[1][0]) == "a.png" and opened[2] == {"dtype": "float16", "tokenizer": "t"}
    assert first[0] == "inpaint" and without_pictures(first[1]) == [(255, 0, 0), (0, 0, 255), "an apple"]
    assert watched(first[2]) == {
        "callback": "read_decoder",
        "negative_prompt": "blue",
        "batch_size": 3,
        "num_steps": 7,
        "unconditional_guidance_scale": 0.0,
        "seed": 11,
        "sampler": "ddim",
        "height": 72,
        "width": 104,
        "progress": False,
        "eta": 0.5,
        "strength": 0.5,
    }
    assert watched(second[2]) == watched(first[2]) | {"seed": 14}
    assert sorted(os.listdir("folder")) == [f"{i:05d}.png" for i in range(6)]
    assert read_parameters("folder/00004.png") == {
        "prompt": "an apple",
        "negative_prompt": "blue",
        "Steps": "7",
        "Sampler": "DDIM",
        "CFG scale": "0",
        "Seed": "15",
        "Size": "16x8",
        "Model": "a.png",
        "Denoising strength": "0.5",
        "Eta": "0.5",
        "Version": read_parameters("folder/00000.png")["Version"],
    }


def test_control_nets(recorder, capsys):
    """Pictures and nets go together in their order; one scale is for all."""
    flags = "--control-net a.safetensors --canny grey.png --control-net a:b.pt --control-image b.png --control-scale -2"
    flags += " --control-end 0.5 --control-end 1 --canny-low 3 --canny-high 6 --dtype bfloat16 --guess-mode"
    run("img2img", "an apple", "--init-img", "a.png", *flags.split(), capsys=capsys)
    _, (_, _, options) = recorder
    first, second = options["control"]
    edges = canny("grey.png", 3, 6)
    assert first[0] == "bfloat16 net a.safetensors" and (first[1] == edges).all() and edges.any()
    assert second[0] == "bfloat16 net a:b.pt" and second[1].getpixel((0, 0)) == (0, 0, 255)
    assert (first[2:], second[2:]) == ((-2.0, 0.0, 0.5), (-2.0, 0.0, 1.0)) and options["guess_mode"] is True
    assert read_parameters("out.png")["Control nets"] == "a: -2, a:b: -2"


@pytest.mark.parametrize(
    "flags, error, code",
    [
        ("--control-net a.safetensors", "give one --control-image, or --canny, for each --control-net", 2),
        ("--canny a.png", "give one --control-image, or --canny, for each --control-net", 2),
        ("--guess-mode", "--guess-mode needs a --control-net", 2),
        ("--control-scale 1", "give --control-scale once, or once for each --control-net", 2),
        (
            "--control-net a:b.pt --canny a.png --control-start 0.6 --control-end 0.5",
            "--control-start must be below --control-end",
            2,
        ),
        ("--control-net a:b.pt --canny a.png --cache-interval 2", "--cache-interval does not go together with", 2),
        ("--control-net c --canny a.png", "--control-net: there is nothing at 'c'", 1),
        ("--control-net a:b.pt --canny c.png", "--canny: there is no file 'c.png'", 1),
        ("--control-net a:b.pt --canny a.png --canny-low 300", "low 300.0 and high 200.0", 1),
    ],
)
def test_bad_control_nets(recorder, capsys, flags, error, code):
    run("txt2img", "an apple", *flags.split(), error=error, code=code, capsys=capsys)
    assert recorder == []


def test_loras_and_embeddings(recorder, capsys):
    """They are loaded in order; the tags are no part of the prompt, but of the picture's parameters."""
    prompt = "an <lora:a:0.5> apple <lora:b>"
    flags = "--lora a.safetensors --lora a:b.pt --lora loras/b.pt:-2 --embedding a:b.pt --embedding loras/b.pt:<cat>"
    run("txt2img", prompt, *flags.split(), "--lora-dir", "loras", capsys=capsys)
    _, *loaded, drawn = recorder
    embeddings = [("a:b.pt", None), ("loras/b.pt", "<cat>")]
    loras = [("a.safetensors", 1.0), ("a:b.pt", 1.0), ("loras/b.pt", 1.0), ("loras/a.safetensors", 0.5)]
    assert [args for name, args, _ in loaded if name == "load_textual_inversion"] == embeddings
    assert [args for name, args, _ in loaded if name == "load_lora"] == loras
    assert drawn[1] == ("an  apple",)
    parameters = read_parameters("out.png")
    assert parameters["prompt"] == prompt and parameters["Loras"] == "a: 1, a:b: 1, b: -2"
    recorder.clear()
    run("interpolate", "an apple", "--to-prompt", "a <lora:a:2> fig", "--steps", "2", capsys=capsys)
    assert recorder[1][:2] == ("load_lora", ("a.safetensors", 2.0))
    assert recorder[2][1][:2] == ("an apple", "a  fig")


@pytest.mark.parametrize(
    "flags, error, code",
    [
        (["--lora", "none.safetensors:0.5"], "--lora: there is nothing at 'none.safetensors'", 1),
        (["--embedding", "none.pt"], "--embedding: there is nothing at 'none.pt'", 1),
        (["--prompt", "a <lora:c:1>"], "There is no LoRA 'c' in '.'; there are: a", 1),
        (["--prompt", "a <lora:a:much>"], "<lora:name:0.8>; got <lora:a:much>", 1),
        (["--prompt", "a <lora:>"], "<lora:name:0.8>", 1),
    ],
)
def test_bad_loras_and_embeddings(recorder, capsys, flags, error, code):
    prompt = [] if "--prompt" in flags else ["a"]
    run("txt2img", *prompt, *flags, error=error, code=code, capsys=capsys)
    assert not recorder  # said before anything is loaded


def test_random_seed_is_printed_and_repeats(recorder, capsys):
    assert run(*DRAW, capsys=capsys) == f"out.png: seed {recorder[-1][2]['seed']}\n"
    assert read_parameters("out.png")["Seed"] == str(recorder[-1][2]["seed"])


def test_numbered_files_are_not_overwritten(recorder, tmp_path, capsys):
    for name in ("00004.png", "7.png", "note.png"):
        (tmp_path / name).write_bytes(b"mine")
    assert "00008.png" in run(*DRAW, "--outdir", tmp_path, capsys=capsys)
    assert (tmp_path / "00004.png").read_bytes() == (tmp_path / "7.png").read_bytes() == b"mine"


def test_several_pictures_are_numbered(recorder, capsys):
    run(*DRAW, "--n_iter", "2", "--out", "new/x.png", "--seed", "7", capsys=capsys)
    assert sorted(os.listdir("new")) == ["x-0.png", "x-1.png"] and read_parameters("new/x-1.png")["Seed"] == "8"


# === Whole runs ===


def test_pictures_are_drawn_changed_and_repainted(tiny, tmp_path, capsys):
    options = ["--preset", tiny, "--seed", "7", "--steps", "2"]
    run("txt2img", "an apple", *options, "--n_samples", "2", "--out", tmp_path / "out.png", capsys=capsys)
    run("txt2img", "an apple", *options, "--seed", "8", "--out", tmp_path / "one.png", capsys=capsys)
    picture = np.array(Image.open(tmp_path / "out-1.png"))
    assert np.abs(picture.astype(int) - np.array(Image.open(tmp_path / "one.png"))).max() <= 1
    start = ["--init-img", tmp_path / "out-1.png"]
    run("img2img", "a pear", *options, *start, "--strength", "1", "--out", tmp_path / "changed.png", capsys=capsys)
    mask = np.zeros((64, 64), "uint8")
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    start += ["--mask", tmp_path / "mask.png", "--sampler", "euler", "--karras"]
    run("inpaint", "a pear", *options, *start, "--out", tmp_path / "painted.png", capsys=capsys)
    painted = np.array(Image.open(tmp_path / "painted.png"))
    assert (painted[32:] == picture[32:]).all() and not (painted[:32] == picture[:32]).all()
    parameters = read_parameters(tmp_path / "painted.png")
    assert parameters["Sampler"] == "Euler" and parameters["Schedule type"] == "Karras"


def test_convert(tiny, tmp_path, capsys):
    half = tmp_path / "new" / "half"
    run("convert", tiny, half, "--dtype", "float16", capsys=capsys)
    assert os.listdir(tmp_path / "new") == ["half"]
    weights, original = (folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (half, tiny))
    assert weights.stat().st_size < 0.6 * original.stat().st_size
    run(*DRAW, "--preset", half, "--out", tmp_path / "out.png", capsys=capsys)
    run("convert", tiny, half, error="exists already", capsys=capsys)


def test_convert_writes_nothing_where_it_fails(recorder, tmp_path, capsys, monkeypatch):
    def save_preset(self, folder, dtype):
        folder.mkdir()
        (folder / "half.safetensors").touch()
        raise KeyboardInterrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(Recorder, "save_preset", save_preset, raising=False)
    run("convert", "emoji", "target", error="Interrupted", code=130, capsys=capsys)
    assert sorted(os.listdir()) == before


def test_presets_are_listed_with_their_licences(capsys):
    out = run("presets", capsys=capsys)
    for line in ("emoji", "sd-v1-4", "hf://", "CreativeML OpenRAIL-M", "Apache-2.0"):
        assert line in out


# === Bad input ===


@pytest.mark.parametrize(
    "args, error, code",
    [
        (["--preset", "emojy"], "Did you mean 'emoji'", 1),
        (["--ckpt", "/nowhere/at/all"], "/nowhere/at/all", 1),
        (["--H", "63"], "height must be a multiple of 8", 1),
        (["--W", "0"], "--W/--width: must be an integer of at least 1; got '0'", 2),
        (["--steps", "0"], "must be an integer of at least 1; got '0'", 2),
        (["--steps", "many"], "got 'many'", 2),
        (["--steps", "2000"], "num_steps", 1),
        (["--sampler", "eular"], "Did you mean 'euler", 2),
        (["--sampler", "ddim", "--karras"], "does not take 'karras'", 2),
        (["--plms", "--ddim_eta", "0.5"], "does not take 'eta'", 2),
        (["--ddim_eta", "nan"], "must be a number from 0 to 1; got 'nan'", 2),
        (["--scale", "nan"], "guidance_scale", 1),
        (["--seed", "-3"], "--seed", 2),
        (["--prompt", "two"], "one prompt", 2),
        (["--dtype", "int8"], "--dtype", 2),
        (["--out", "a.jpg"], "must end in .png", 2),
        (["--outdir", "x"], "not allowed with", 2),
        (["--no-such-flag"], "--no-such-flag", 2),
    ],
)
def test_bad_arguments(tiny, tmp_path, capsys, args, error, code):
    preset = [] if {"--preset", "--ckpt"} & set(args) else ["--preset", tiny]
    run(*DRAW, *preset, "--out", tmp_path / "out.png", *args, error=error, code=code, capsys=capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [[], ["paint"], ["txt2img"], ["img2img", "x"], ["convert", "emoji"]])
def test_wrong_usage(args, capsys):
    run(*args, error="--help", code=2, capsys=capsys)


def test_missing_and_damaged_pictures(recorder, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    run("img2img", "x", "--init-img", "none.png", error="no file 'none.png'", capsys=capsys)
    run("inpaint", "x", "--init-img", "a.png", "--mask", "text.png", error="text.png", capsys=capsys)
    assert not recorder  # said before anything is loaded


def test_damaged_weights(tiny, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "out.png"
    run(*DRAW, "--preset", broken, "--out", out, error="diffusion_pytorch_model.safetensors", capsys=capsys)
    assert not out.exists()


def test_hostile_checkpoint(tmp_path, capsys):
    import torch

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it ran'}",)

    torch.save({"state_dict": {"x": Hostile()}}, tmp_path / "model.ckpt")
    out = tmp_path / "out.png"
    run(*DRAW, "--ckpt", tmp_path / "model.ckpt", "--out", out, error="model.ckpt", capsys=capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]


def test_output_that_cannot_be_written(recorder, tmp_path, capsys):
    for args in (["--out", "a.png/b.png"], ["--outdir", "a.png"], ["--outdir", "a.png/folder"]):
        run(*DRAW, *args, error="Cannot write", capsys=capsys)
    (tmp_path / "folder.png").mkdir()
    run(*DRAW, "--out", "folder.png", error="is a folder", capsys=capsys)
    run("convert", "emoji", "a.png/folder", error="Cannot write", capsys=capsys)
    assert not recorder  # said before anything is loaded


def test_disk_that_fills_up(recorder, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    error = "Error: Cannot write 'folder/00000.png': No space left on device"
    run(*DRAW, "--outdir", "folder", error=error, capsys=capsys)
    assert not os.listdir("folder")


@pytest.mark.parametrize(
    "raised, error, code",
    [
        (KeyboardInterrupt(), "Interrupted", 130),
        (RuntimeError("first\n  second"), "Error: RuntimeError: first second", 1),
        (MemoryError(), "Error: MemoryError", 1),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "Error: No such file or directory: 'x.json'", 1),
    ],
)
def test_whatever_stops_a_run(recorder, capsys, monkeypatch, raised, error, code):
    def stop(self, *args, **kwargs):
        raise raised

    before = sorted(os.listdir())
    monkeypatch.setattr(Recorder, "text_to_image", stop, raising=False)
    run(*DRAW, error=error, code=code, capsys=capsys)
    assert sorted(os.listdir()) == before
    if code == 1:
        monkeypatch.setenv("KERAS_SD_TRACEBACK", "1")
        with pytest.raises(type(raised)):
            main(DRAW)


def test_jax_keeps_what_it_compiled(recorder, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_SD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # what the command sets is taken back at the end
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert main(DRAW) == 0 and os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "home" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert main(DRAW) == 0 and os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


# === As a process ===


def test_usage_needs_no_keras():
    calls = [
        ["presets"],
        ["txt2img"],
        ["--help"],
        ["txt2img", "x", "--sampler", "eular"],
        ["txt2img", "x", "--out", "/"],
    ]
    code = (
        f"import sys; from keras_sd.__main__ import main; [main(call) for call in {calls}]\n"
        "assert not {'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_drawing_imports_nothing_that_it_does_not_use(tmp_path):
    code = (
        "import sys; from keras_sd.__main__ import main\n"
        "assert main(['txt2img', 'rocket', '--preset', 'emoji', '--steps', '1', '--out', 'rocket.png']) == 0\n"
        "names = {'pandas', 'matplotlib', 'IPython', 'cv2'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | PATH)


def test_process_that_fails(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "keras_sd", *DRAW, "--preset", str(tmp_path / "empty"), "--out", "out.png"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | PATH)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "empty" in result.stderr
    assert os.listdir(tmp_path) == ["empty"]


def test_process_that_is_interrupted(tiny, tmp_path):
    """The first pictures come; then ^C in the middle of one. What is there is whole, and nothing else is said."""
    command = [sys.executable, "-m", "keras_sd", *DRAW, "--preset", tiny, "--outdir", tmp_path, "--n_iter", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ | PATH, **pipes) as process:
        assert process.stdout.readline().startswith(f"{tmp_path / '00000.png'}: seed ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "Interrupted\n"
    for path in tmp_path.iterdir():
        assert path.suffix == ".png" and read_parameters(path)["Steps"] == "2"
