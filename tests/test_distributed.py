"""Several processes and devices train as one: each test runs processes of its own."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 3
CODE = """
import sys
import numpy as np
import keras
from keras_sd.training.distributed import all_devices, start_processes

backend, processes, process, coordinator, out = sys.argv[1:]
if backend == "tensorflow" and processes == "mirrored":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    processes = 1
start_processes(coordinator, int(processes), int(process))
from keras_sd import DiffusionModel, NoiseScheduler
from keras_sd.training.trainer import DiffusionTrainer
import tensorflow as tf

keras.utils.set_random_seed(0)
with all_devices() as devices:
    widths = dict(block_out_channels=(8,), layers_per_block=1, attention_levels=(True,))
    model = DiffusionModel(**widths, num_attention_heads=1, cross_attention_dim=8, norm_num_groups=4)
    trainer = DiffusionTrainer(model, NoiseScheduler(), seed=3, min_snr_gamma=5.0)
    trainer.compile(keras.optimizers.AdamW(1e-3, epsilon=1e-4, global_clipnorm=GLOBAL_CLIPNORM))
    random = np.random.default_rng(0)
    size = 8 // int(processes)
    part = slice(int(process) * size, (int(process) + 1) * size)
    batches = []
    for _ in range(STEPS):
        mean, std, noise = random.standard_normal((3, 8, 8, 8, 4)).astype("float32")
        context = random.standard_normal((8, 7, 8)).astype("float32")
        batch = {"mean": mean, "std": np.abs(std), "context": context}
        if backend == "tensorflow":  # each replica draws its own
            batch |= {"std": 0 * std, "noise": noise, "timestep": random.integers(1000, size=8).astype("int32")}
        batches.append({name: value[part] for name, value in batch.items()})
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature={k: tf.TensorSpec(v.shape, v.dtype) for k, v in batches[0].items()}
    )
    losses = []
    log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: losses.append(logs["loss"]))
    trainer.fit(data, epochs=1, verbose=0, callbacks=[log])
    weights = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    if int(process) == 0:
        np.savez(out, losses=losses, devices=devices, *weights)
"""


def start(backend, processes, process, coordinator, out, clipnorm="1.0"):
    code = CODE.replace("GLOBAL_CLIPNORM", clipnorm).replace("STEPS", str(STEPS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, backend, str(processes), str(process), coordinator, str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]


def assert_same_run(path, wanted, devices):
    found, wanted = np.load(path), np.load(wanted)
    assert int(found["devices"]) == devices and int(wanted["devices"]) == 1
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=1e-5)
    arrays = [name for name in wanted.files if name.startswith("arr_")]
    assert len(arrays) > 30
    for name in arrays:
        np.testing.assert_allclose(found[name], wanted[name], atol=2e-5)


def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    with socket.socket() as one:
        one.bind(("localhost", 0))
        coordinator = f"localhost:{one.getsockname()[1]}"
    finish(start("jax", 1, 0, "", tmp_path / "one.npz"))
    finish(*(start("jax", 2, i, coordinator, tmp_path / "two.npz") for i in range(2)))
    assert_same_run(tmp_path / "two.npz", tmp_path / "one.npz", devices=2)


def test_two_devices_of_one_machine_are_one(tmp_path):
    for processes in (1, "mirrored"):
        finish(start("tensorflow", processes, 0, "", tmp_path / f"{processes}.npz", clipnorm="None"))
    assert_same_run(tmp_path / "mirrored.npz", tmp_path / "1.npz", devices=2)


def test_bad_processes(monkeypatch):
    from keras_sd.training.distributed import start_processes

    with pytest.raises(ValueError, match="num_processes = 2 needs KERAS_BACKEND=jax"):
        start_processes("localhost:1", 2, 0)
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    with pytest.raises(ValueError, match="process_id must be from 0 to 1; got 2"):
        start_processes("localhost:1", 2, 2)
    with pytest.raises(ValueError, match="coordinator must be the HOST:PORT"):
        start_processes(None, 2, 0)
