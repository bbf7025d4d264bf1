"""Loads a SavedModel with TensorFlow's C++ loader, through its C API, and runs `decoder`: no Python TensorFlow.

python tests/c_loader.py FOLDER/1 …   prints the shape of what each `serving_default` of a decoder draws.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

PACKAGE = Path(importlib.util.find_spec("tensorflow").origin).parent
ctypes.CDLL(str(PACKAGE / "libtensorflow_framework.so.2"), ctypes.RTLD_GLOBAL)
library = ctypes.CDLL(str(PACKAGE / "libtensorflow_cc.so.2"), ctypes.RTLD_GLOBAL)
pointer, text = ctypes.c_void_p, ctypes.c_char_p


class Output(ctypes.Structure):
    _fields_ = [("operation", pointer), ("index", ctypes.c_int)]


def call(name, *arguments, result=pointer):
    function = library[name]
    function.restype = result
    return function(*arguments)


status = pointer(call("TF_NewStatus"))


def check(what):
    if call("TF_GetCode", status, result=ctypes.c_int):
        sys.exit(f"{what}: {call('TF_Message', status, result=text).decode()}")


def load(folder):
    graph, options = pointer(call("TF_NewGraph")), pointer(call("TF_NewSessionOptions"))
    tags = (text * 1)(b"serve")
    session = call(
        "TF_LoadSessionFromSavedModel", options, None, text(str(folder).encode()), tags, 1, graph, None, status
    )
    check(folder)
    return pointer(session), graph


def operation(graph, name):
    return Output(call("TF_GraphOperationByName", graph, text(name.encode())), 0)


def run_decoder(folder, latent):
    session, graph = load(folder)
    names = json.loads(sys.stdin.read())
    shape = (ctypes.c_int64 * latent.ndim)(*latent.shape)
    tensor = pointer(call("TF_AllocateTensor", 1, shape, latent.ndim, ctypes.c_size_t(latent.nbytes)))
    ctypes.memmove(call("TF_TensorData", tensor), latent.ctypes.data, latent.nbytes)
    inputs, outputs = (Output * 1)(operation(graph, names["input"])), (Output * 1)(operation(graph, names["output"]))
    fed, fetched = (pointer * 1)(tensor), (pointer * 1)()
    call("TF_SessionRun", session, None, inputs, fed, 1, outputs, fetched, 1, None, 0, None, status)
    check("run")
    found = pointer(fetched[0])
    size = call("TF_TensorByteSize", found, result=ctypes.c_size_t)
    return np.frombuffer(ctypes.string_at(call("TF_TensorData", found), size), "uint8")


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        load(folder)
    pixels = run_decoder(sys.argv[1], np.zeros((1, 8, 8, 4), "float32"))
    print(pixels.size, int(pixels.sum()))
