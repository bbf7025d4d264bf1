import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from export import litert, onnx, openvino  # noqa: E402
from export.litert_runner import draw, load  # noqa: E402
from export.part_files import write_folder  # noqa: E402
from export.parts import parts  # noqa: E402
from keras_sd import DiffusionModel, StableDiffusion  # noqa: E402
from keras_sd.png import read_parameters  # noqa: E402
from keras_sd.tokenizer import CLIPTokenizer  # noqa: E402

ROOT = Path(__file__).parents[1]
PROMPT, SETTINGS = "red apple on a blue background", {"num_steps": 8, "seed": 7, "progress": False}
PRECISIONS = {"float32": 60, "float16": 60, "int8": 30}  # PSNR in dB; the embedded weights are float16


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.from_preset("emoji")


@pytest.fixture(scope="module", params=PRECISIONS)
def files(request, sd, tmp_path_factory):
    pytest.importorskip("ai_edge_litert")
    folder = tmp_path_factory.mktemp("litert") / request.param
    folder.mkdir()  # an empty one will do
    litert.write(sd, folder, 64, 64, precision=request.param)
    return folder


def psnr(image, wanted):
    return 10 * np.log10(255**2 / max(np.mean((image.astype("float64") - wanted) ** 2), 1e-9))


def relative(found, wanted):
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("options", [{}, {"sampler": "euler_a"}, {"sampler": "unipc", "negative_prompt": "green"}])
def test_litert_draws_the_same_picture(files, sd, options):
    wanted = sd.text_to_image(PROMPT, **SETTINGS, **options)[0]
    image = draw(files, PROMPT, **SETTINGS, **options)
    assert image.shape == wanted.shape and image.dtype == np.uint8
    assert psnr(image, wanted) >= PRECISIONS[files.name]


def test_a_folder_is_complete(files, sd):
    names = {"text_encoder.tflite", "denoising_step.tflite", "decoder.tflite", "scheduler_config.json", "tokenizer"}
    assert {path.name for path in files.iterdir()} == names
    assert [path.name for path in files.parent.iterdir()] == [files.name]
    assert json.loads((files / "scheduler_config.json").read_text()) == sd.checkpoint.scheduler()
    assert CLIPTokenizer.from_folder(files / "tokenizer").encode(PROMPT) == sd.tokenizer.encode(PROMPT)
    size = sum(path.stat().st_size for path in files.glob("*.tflite"))
    weights = sum(model.count_params() for model in (sd.text_encoder, sd.diffusion_model, sd.decoder))
    assert size < 1.1 * {"float32": 4, "float16": 2, "int8": 1}[files.name] * weights + 10**6
    shapes = {name: load(files / f"{name}.tflite").shapes for name in ("text_encoder", "denoising_step", "decoder")}
    wanted = {name: {key: shape for key, (shape, _) in part.inputs.items()} for name, part in parts(sd, 64, 64).items()}
    assert shapes == wanted


def test_the_runner_needs_neither_keras_nor_tensorflow(files, tmp_path):
    code = f"""
import sys
from export.litert_runner import main
main([{str(files)!r}, {PROMPT!r}, "--out", "a.png", "--steps", "2", "--seed", "5", "--sampler", "euler_a"])
print([name for name in ("keras", "tensorflow", "torch", "jax") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["a.png", "[]"]
    fields = {"Steps": "2", "Seed": "5", "Sampler": "Euler a", "CFG scale": "7.5", "Size": "64x64"}
    assert fields.items() <= read_parameters(tmp_path / "a.png").items()


@pytest.fixture(scope="module")
def inpainting():
    """A pipeline with all that the embedded one lacks: nine channels, linear projections."""
    sd = StableDiffusion.from_preset("emoji")
    sd.diffusion_model = DiffusionModel(
        in_channels=9,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(True, False),
        num_attention_heads=(2, 4),
        cross_attention_dim=128,
        use_linear_projection=True,
    )
    return sd


def test_litert_converts_other_architectures(inpainting, tmp_path):
    pytest.importorskip("ai_edge_litert")
    inpainting.denoiser.two_passes = True  # every weight is read twice
    part, path = parts(inpainting, 40, 24)["denoising_step"], tmp_path / "step.tflite"
    inputs = part.example()
    assert inputs["extra"].shape == (1, 5, 3, 5)
    for precision, limit in {"float32": 1e-4, "int8": 2e-1}.items():
        litert.convert(part, path, precision)
        found, wanted = load(path)(inputs), part(inputs)
        assert found.keys() == wanted.keys() == {"latent", "history"}
        assert all(relative(found[key], wanted[key]) < limit for key in wanted)
    inpainting.denoiser.two_passes = False


@pytest.mark.parametrize("format", [openvino, onnx])
def test_openvino_and_onnx(format, inpainting, tmp_path):
    for package in {openvino: ("openvino",), onnx: ("onnx", "onnxruntime", "tf2onnx")}[format]:
        pytest.importorskip(package)
    folder = tmp_path / "deep" / "files"
    format.write(inpainting, folder, 40, 24)
    assert CLIPTokenizer.from_folder(folder / "tokenizer").encode(PROMPT) == inpainting.tokenizer.encode(PROMPT)
    assert not list(folder.glob("*.npz"))
    for name, part in parts(inpainting, 40, 24, batch_size=None).items():
        inputs = {key: np.concatenate([value, value[..., ::-1]]) for key, value in part.example().items()}
        inputs |= {"row": np.repeat(inputs["row"][:1], 2, axis=0)} if "row" in inputs else {}
        found, wanted = format.load(folder / f"{name}{format.SUFFIX}")(inputs), part.with_unique_names()(inputs)
        assert found.keys() == wanted.keys()
        assert all(relative(found[key], wanted[key]) < 5e-3 for key in wanted), name


def test_nothing_is_overwritten(sd, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is there already, and is not overwritten"):
            litert.write(sd, folder, 64, 64)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("change, message", [(1.5, "differs from Keras by"), (np.nan, "differs from Keras by nan")])
def test_wrong_files_are_not_kept(sd, tmp_path, change, message):
    pytest.importorskip("ai_edge_litert")
    part = parts(sd, 64, 64)["text_encoder"]
    wrong = {"text_encoder": part}

    def write_part(part, path):
        kernel = part.model.get_layer("text_model.final_layer_norm").gamma
        right = np.asarray(kernel)
        kernel.assign(right * change)
        litert.convert(part, path, "float32")
        kernel.assign(right)

    with pytest.raises(ValueError, match=message):
        write_folder(sd, tmp_path / "new", wrong, "export.litert_runner", write_part, 1e-2)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(sd, tmp_path):
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8; got 'int4'"):
        litert.write(sd, tmp_path / "new", 64, 64, precision="int4")
    with pytest.raises(ValueError, match="height must be a multiple of 8; got 60"):
        litert.write(sd, tmp_path / "new", 60, 64)
    with pytest.raises(ValueError, match="dtype of the text_encoder is bfloat16; this format starts from float32"):
        litert.write(StableDiffusion.from_preset("emoji", dtype="bfloat16"), tmp_path / "new", 64, 64)
    with pytest.raises(FileNotFoundError, match="is no folder that `python -m export --format litert` wrote"):
        draw(tmp_path, PROMPT)
    with pytest.raises(FileNotFoundError, match="No LiteRT file at"):
        load(tmp_path / "none.tflite")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch, sd, tmp_path):
    for package, call in {
        "openvino": lambda: openvino.write(sd, tmp_path / "new", 64, 64),
        "tf2onnx": lambda: onnx.write(sd, tmp_path / "new", 64, 64),
        "onnxruntime": lambda: onnx.load(tmp_path / "none.onnx"),
        "ai_edge_litert.interpreter": lambda: load(tmp_path / "none.tflite"),
    }.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match="pip install"):
            call()
