"""Checkpoint files to and from a dict name -> NumPy array. No pickle is executed here.

Arrays read from `.safetensors` and from zipped torch files are views of the file on disk: a 4 GB checkpoint costs no
memory until its values are used. Treat them as read-only.
"""

import json
import mmap
import os
import pickletools
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
TORCH_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
WRAPPERS = ("state_dict", "params_ema", "params")  # what training frameworks put around a model, the best one first

# Functions and types that torch itself restores tensors with.
_TORCH_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout|torch\.(\w*float\w+|u?int\d+|complex\d+|bool|device)"
    r"|torch\.(?!nn\.modules\.container\.)([\w.]+\.)?[A-Z]\w*"
)
# Besides tensors, checkpoints mention classes of any package. Of the standard library and of functions, only these.
_DATA_NAMES = re.compile(
    r"collections\.(defaultdict|deque)|argparse\.Namespace|pathlib\.\w*Path|typing\.\w+|copyreg\._reconstructor"
    r"|datetime\.(date|datetime|timedelta|timezone)|uuid\.UUID|decimal\.Decimal|enum\.\w+"
    r"|numpy\.(dtype|ndarray|bool_?|\w+\d)|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|builtins\.(object|type|bool|int|float|complex|str|bytes|bytearray|tuple|list|dict|set|frozenset|slice|range)"
)

# === Reading ===


def read_arrays(path):
    """Read a checkpoint file.

    Args:
        path: a `.safetensors`, `.ckpt`, `.bin`, `.pt` or `.pth` file, or the `….index.json` of a sharded one. The
            `state_dict` or `params` that training frameworks wrap around a model is unwrapped, averages preferred.

    Returns:
        Dict name -> array, in the file's order and data types (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no checkpoint, or is a pickle that asks for more than data.
        ImportError: a torch file, and torch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {str(path)!r}.")
    with open(path, "rb") as file:
        if file.read(7) == b"version":  # of "version https://git-lfs.github.com/spec/v1"
            raise ValueError(f"{str(path)!r} is a Git LFS pointer, not the file itself; run `git lfs pull` there.")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(
        f"{str(path)!r} is no checkpoint: its name must end in .safetensors or {', '.join(TORCH_SUFFIXES)}."
    )


def _damaged(path, reason):
    # torch's first line advises to load the file unsafely; its reason comes later
    found = re.search(r"WeightsUnpickler error: (.+)", str(reason))
    reason = found[1] if found else str(reason).strip().split("\n")[0] or type(reason).__name__
    return ValueError(f"{str(path)!r} is damaged or is not a checkpoint ({reason}).")


def _read_shards(path):
    try:
        names = json.loads(path.read_text("utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    if any(Path(file).name != file for file in files):
        raise _damaged(path, "it names files outside its own folder")
    shards = {file: read_arrays(path.parent / file) for file in files}
    missing = [name for name, file in names.items() if name not in shards[file]]
    if missing:
        raise _damaged(path, f"{names[missing[0]]} does not hold {missing[0]}")
    return {name: shards[file][name] for name, file in names.items()}


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # opening checks that the header fits the file, tensor by tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    data = np.memmap(path, mode="r").view(np.ndarray)
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    arrays = {}
    for name, tensor in header.items():
        if tensor["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{str(path)!r}: the data type {tensor['dtype']} of {name} is not supported.")
        begin, end = tensor["data_offsets"]
        values = data[start + begin : start + end].view(SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


def let_go(array):
    """Gives back the memory that a file's array has taken by being read; it is read again where it is used again."""
    mapped = array
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        start = array.__array_interface__["data"][0] - np.frombuffer(mapped, "uint8").__array_interface__["data"][0]
        first, end = -(-start // mmap.PAGESIZE), (start + array.nbytes) // mmap.PAGESIZE
        if end > first:
            mapped.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)


def read_metadata(path):
    """The dict of strings that a `.safetensors` file carries beside its tensors; empty for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__") or {}


def read_nested(path):
    """Read a torch file as it is: nested dicts and lists, with arrays for tensors; for files that are no model.

    Raises: as `read_arrays`.
    """
    torch, checkpoint = _load_torch(Path(path))

    def convert(value):
        if isinstance(value, torch.Tensor):
            return _to_numpy(torch, value)
        if isinstance(value, _Inert):  # of torch.nn.ParameterDict
            value = value.state.get("_parameters", {}) if isinstance(value.state, dict) else {}
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    return convert(checkpoint)


def _load_torch(path):
    """(torch, what the file holds)."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"Reading {path.name} needs PyTorch: `pip install torch`, or use .safetensors.") from error
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {str(path)!r}.")
    try:
        return torch, _load_inertly(torch, path)
    except _Hostile as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        raise _damaged(path, error) from error


def _read_torch(path):
    torch, checkpoint = _load_torch(path)
    extra = {}
    while wrapper := isinstance(checkpoint, dict) and next(
        (key for key in WRAPPERS if isinstance(checkpoint.get(key), dict)), None
    ):
        if isinstance(checkpoint.get("global_step"), int):
            extra["global_step"] = np.asarray(checkpoint["global_step"])  # tells the SD v2 checkpoints apart
        checkpoint = checkpoint[wrapper]
    tensors = checkpoint.items() if isinstance(checkpoint, dict) else ()
    arrays = {name: _to_numpy(torch, tensor) for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    if not arrays:
        raise _damaged(path, "it holds no tensors")
    return arrays | extra


def _to_numpy(torch, tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# === Pickles, read as data ===


class _Hostile(Exception):
    pass


class _Inert:
    """Stands in for a class that a pickle names: takes any arguments and any state, and does nothing."""

    state = None

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def _load_inertly(torch, path):
    """`torch.load(weights_only=True)`, in which classes unknown to torch are inert stand-ins."""
    names = [name for name in _globals(path) if not _TORCH_NAMES.fullmatch(name)]
    for name in names:
        if not _is_plausible(name):
            raise _Hostile(
                f"{str(path)!r} asks to call {name}, which is no class of a training framework: "
                "it may be hostile, so it is not opened, and nothing of it was run."
            )
    base = dict.fromkeys(names, object)
    while True:
        stand_ins = {name: type("Inert", (_Inert,), {"__qualname__": f"<{name}>"}) for name in names}
        for name, kind in base.items():
            if kind is not object:  # __new__ gives a plain container, the only kind that torch fills
                stand_ins[name].__new__ = lambda cls, *args, kind=kind, **kwargs: kind()
        safe = [(stand_in, name) for name, stand_in in stand_ins.items()]
        try:
            with torch.serialization.safe_globals(safe):
                mmap = zipfile.is_zipfile(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            # a subclass of dict or list shows only when it is filled; then read again with it as one
            found = re.search(r"Can only (SETITEM|append|extend).*<class '.*<(.+)>'>", str(error))
            if not found or base.get(found[2]) is not object:
                raise
            base[found[2]] = OrderedDict if found[1] == "SETITEM" else list


def _is_plausible(name):
    module, _, attribute = name.rpartition(".")
    package = module.partition(".")[0]
    if _DATA_NAMES.fullmatch(name):
        return True
    return attribute.lstrip("_")[:1].isupper() and package not in sys.stdlib_module_names and bool(package)


def _globals(path):
    """The names of all classes and functions in a torch file, found by reading its opcodes."""
    names = OrderedDict()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            streams = [archive.open(name) for name in archive.namelist() if name.endswith("data.pkl")]
            for stream in streams:
                names.update(_globals_of_pickle(stream))
    else:
        with open(path, "rb") as file:
            for _ in range(5):  # torch's old format: magic number, protocol, system, the object, storage keys
                names.update(_globals_of_pickle(file))
    return list(names)


def _globals_of_pickle(file):
    names, strings = {}, []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, name = argument.split(" ", 1)
        elif opcode.name == "STACK_GLOBAL":
            module, name = [None, None, *strings][-2:]
        else:
            if isinstance(argument, str):
                strings.append(argument)
            continue
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        names[f"{module}.{name}"] = None
    return names


# === Writing ===


@contextmanager
def atomic_file(path):
    """Open a binary file that appears as `path` when the block ends well, and not at all when it does not.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, f"Cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_safetensors(path, arrays, metadata=None):
    """Write a dict name -> array as a `.safetensors` file, whole or not at all.

    Args:
        path: file to write; its folder is made.
        arrays: dict name -> array of the types in `SAFETENSORS_DTYPES`; written one by one, never copied at once.
        metadata: dict of strings; `{"format": "pt"}` by default, which transformers insists on.

    Raises:
        TypeError: an array has another data type.
        OSError: `path` cannot be written.
    """
    dtypes = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": metadata or {"format": "pt"}}, 0
    # widest types first keeps every array aligned
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, array in arrays.items():
        if array.dtype not in dtypes:
            raise TypeError(
                f"{name} is {array.dtype}, which safetensors does not hold; use one of {[*map(str, dtypes)]}."
            )
        end = offset + array.nbytes
        header[name] = {"dtype": dtypes[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).view("uint8").data if array.ndim else array.tobytes())


# === JSON ===


def read_json(path):
    """Reads a JSON file; a missing or damaged one is an error that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{str(path)!r} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from None


def write_json(path, value):
    """Writes a JSON file under a temporary name and renames it."""
    with atomic_file(path) as part:
        part.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
