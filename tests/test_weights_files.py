import collections
import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from keras_sd.weights.files import atomic_file, read_arrays, write_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "half": RNG.normal(size=(3, 5)).astype("float16"),
    "brain": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "single": RNG.normal(size=(2, 3, 1, 1)).astype("float32"),
    "double": RNG.normal(size=(2,)),
    "byte": np.arange(3, dtype="uint8"),
    "truth": np.array([True, False]),
    "number": np.array(1000, "int64"),
    "empty": np.zeros((0, 4), "float32"),
    "transposed": RNG.normal(size=(4, 3)).astype("float32").T,
}


def assert_same(arrays, expected):
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape, name
        np.testing.assert_array_equal(arrays[name], array)


# === safetensors ===


def test_safetensors_round_trip(tmp_path):
    write_safetensors(tmp_path / "new" / "model.safetensors", ARRAYS, {"format": "pt", "made_by": "keras_sd"})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    assert_same(read_arrays(tmp_path / "new" / "model.safetensors"), ARRAYS)


def test_safetensors_opens_what_we_write_and_we_what_it_writes(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    write_safetensors(tmp_path / "ours.safetensors", ARRAYS)
    theirs = safetensors_torch.load_file(tmp_path / "ours.safetensors")
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor.double().numpy(), ARRAYS[name].astype("float64"))
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors_torch.save_file(theirs, tmp_path / "theirs.safetensors")
    assert_same(read_arrays(tmp_path / "theirs.safetensors"), ARRAYS)


def test_reading_maps_the_file(tmp_path):
    path = tmp_path / "big.safetensors"
    write_safetensors(path, {"w": np.zeros(2**20, "float32")})
    array = read_arrays(path)["w"]
    assert not array.flags.writeable and not array.flags.owndata


def test_sharded(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": ARRAYS["half"]})
    write_safetensors(tmp_path / "b.safetensors", {"y": ARRAYS["single"]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert_same(read_arrays(index), {"x": ARRAYS["half"], "y": ARRAYS["single"]})
    index.write_text(json.dumps({"weight_map": {"z": "a.safetensors"}}))
    with pytest.raises(ValueError, match="does not hold z"):
        read_arrays(index)
    index.write_text(json.dumps({"weight_map": {"z": "../../a.safetensors"}}))
    with pytest.raises(ValueError, match="outside its own folder"):
        read_arrays(index)
    index.write_text(json.dumps({"weight_map": {"z": "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        read_arrays(index)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="words is <U2"):
        write_safetensors(tmp_path / "x.safetensors", {"words": np.array(["no"])})
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "x.safetensors") as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="Cannot write .*file/x.safetensors"):
        write_safetensors(tmp_path / "file" / "x.safetensors", ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint file at"):
        read_arrays(tmp_path / "none.safetensors")
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, ARRAYS)
    data = whole.read_bytes()
    bad = {
        "cut.safetensors": data[:-5],
        "head.safetensors": data[:20],
        "empty.safetensors": b"",
        "page.safetensors": b"<html>404</html>",
        "cut.index.json": b'{"weight',
        "list.index.json": b"[]",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' is damaged or is not a checkpoint"):
            read_arrays(tmp_path / name)
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_arrays(tmp_path / "x.safetensors")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.ckpt"):
        read_arrays(tmp_path / "x.txt")


# === torch ===


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def state_dict(torch):
    names = [name for name in ARRAYS if name != "brain"]
    tensors = {name: torch.from_numpy(np.array(ARRAYS[name])) for name in names}
    return tensors | {"brain": torch.from_numpy(ARRAYS["brain"].astype("float32")).bfloat16()}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_torch_files(torch, tmp_path, suffix, new):
    path = tmp_path / f"model{suffix}"
    torch.save(state_dict(torch), path, _use_new_zipfile_serialization=new)
    assert_same(read_arrays(path), ARRAYS)


def test_state_dict_is_unwrapped_and_parameters_are_arrays(torch, tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save({"state_dict": model.state_dict(), "global_step": 875000, "epoch": 3, "lr": [0.1]}, tmp_path / "m.ckpt")
    arrays = read_arrays(tmp_path / "m.ckpt")
    assert list(arrays) == ["weight", "bias", "global_step"] and arrays["global_step"] == 875000
    torch.save(collections.OrderedDict(w=model.weight, note="text"), tmp_path / "p.pt")
    assert list(read_arrays(tmp_path / "p.pt")) == ["w"]


def make_foreign_modules(monkeypatch):
    """Classes such as a training framework of 2022 would pickle; importing them again must not be needed."""
    made = {}

    def define(module, name, base=object):
        cls = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for i in range(len(parts)):
            package = ".".join(parts[: i + 1])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, cls)
        made[name] = cls

    define("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    define("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    define("omegaconf.dictconfig", "DictConfig")
    define("omegaconf.listconfig", "ListConfig", list)
    return made


@pytest.mark.parametrize("new", [True, False])
def test_classes_of_training_frameworks_are_passed_over(torch, tmp_path, monkeypatch, new):
    with monkeypatch.context() as patch:
        classes = make_foreign_modules(patch)
        config = classes["DictConfig"]()
        config._content = {"lr": 1e-4, "kind": collections.defaultdict(list, a=[1])}
        parameters = classes["AttributeDict"](lr=0.1)
        parameters["more"] = config
        checkpoint = {
            "callbacks": {
                classes["ModelCheckpoint"]: {"best": np.float64(0.1), "array": np.arange(3), "dir": tmp_path}
            },
            "hyper_parameters": parameters,
            "sizes": classes["ListConfig"]([1, 2, 3]),
            "global_step": np.int64(470000),
            "state_dict": state_dict(torch),
        }
        torch.save(checkpoint, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=new)
    assert "omegaconf.dictconfig" not in sys.modules
    assert_same(read_arrays(tmp_path / "sd.ckpt"), ARRAYS)
    assert "omegaconf.dictconfig" not in sys.modules
    assert not any(
        isinstance(item, tuple) for item in torch.serialization.get_safe_globals()
    )  # stand-ins are gone again


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def protocol_0_instance(command):
    return b"(S'" + command.encode() + b"'\nios\nsystem\n."  # the INST opcode calls while it reads


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["value", "key", "tail"])
def test_hostile_pickles_are_refused_and_nothing_runs(torch, tmp_path, protocol, new, where):
    mark = tmp_path / "pwned"
    for function, arguments in [
        (os.system, (f"touch {mark}",)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (exec, (f"open({str(mark)!r}, 'w')",)),
        (__import__("subprocess").check_call, (["touch", str(mark)],)),
        (__import__("shutil").copy, (__file__, str(mark))),
        (__import__("runpy").run_path, (str(mark),)),
        (torch.hub.load, (str(mark), "x")),
        (np.save, (str(mark), np.zeros(3))),
    ]:
        call = Call(function, *arguments)
        good = state_dict(torch)
        checkpoint = {"value": {**good, "x": call}, "key": {call: 1, **good}, "tail": [good, call]}[where]
        path = tmp_path / "hostile.ckpt"
        torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on the protocol
            with pytest.raises(ValueError, match=rf"hostile\.ckpt' asks to call \S*\.{function.__name__}, which"):
                read_arrays(path)
        assert not mark.exists() and not mark.with_suffix(".npy").exists()


def test_other_hostile_files(torch, tmp_path):
    mark, path = tmp_path / "pwned", tmp_path / "x.ckpt"
    plain = pickle.dumps(Call(os.system, f"touch {mark}"))
    nested = pickle.dumps(Call(torch.storage._load_from_bytes, plain), 2)
    indirect = b"\x80\x02cbuiltins\ngetattr\ncos\n__dict__\n\x86R."
    for content in (plain, nested, indirect, protocol_0_instance(f"touch {mark}")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt'"):
            read_arrays(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
        with pytest.raises(ValueError, match=r"x\.ckpt'"):
            read_arrays(path)
        assert not mark.exists()


def test_a_class_that_acts_when_made_is_not_made(torch, tmp_path, monkeypatch):
    made = []
    module = types.ModuleType("some_framework")
    module.Bomb = type(
        "Bomb", (), {"__module__": "some_framework", "__setstate__": lambda self, state: made.append(state)}
    )
    monkeypatch.setitem(sys.modules, "some_framework", module)  # importable, and yet not imported from
    bomb = module.Bomb()
    bomb.x = 1
    torch.save({"w": torch.zeros(2), "bomb": bomb}, tmp_path / "x.ckpt")
    assert list(read_arrays(tmp_path / "x.ckpt")) == ["w"] and not made


def test_damaged_torch_files(torch, tmp_path):
    whole, path = tmp_path / "whole.ckpt", tmp_path / "bad.ckpt"
    for new in (True, False):
        torch.save(state_dict(torch), whole, _use_new_zipfile_serialization=new)
        data = whole.read_bytes()
        for content in (
            data[:100],
            data[: len(data) // 2],
            data[:-30],
            b"",
            b"<html>404</html>",
            b"PK\x03\x04",
            os.urandom(99),
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"bad\.ckpt' is damaged or is not a checkpoint \(.+\)\.$"):
                read_arrays(path)
    torch.save({"lr": 3, "steps": [1, 2]}, path)
    with pytest.raises(ValueError, match="it holds no tensors"):
        read_arrays(path)
    path.write_bytes(pickle.dumps({"lr": 3}, 2) + struct.pack("<q", 3))
    with pytest.raises(ValueError, match=r"bad\.ckpt' is damaged"):
        read_arrays(path)


def test_without_torch(tmp_path, monkeypatch):
    (tmp_path / "x.ckpt").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"Reading x\.ckpt needs PyTorch: `pip install torch`"):
        read_arrays(tmp_path / "x.ckpt")
