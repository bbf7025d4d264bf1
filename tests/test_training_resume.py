"""Whatever ends a run, it goes on as if nothing had been."""

import errno
import os
import pathlib
import random
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from train_steps import batch, make_trainer, small_unet, train

from keras_sd import NoiseScheduler
from keras_sd.training import checkpoints
from keras_sd.training.trainer import DiffusionTrainer
from keras_sd.weights.files import read_arrays

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted():
    """dict step → loss."""
    losses = {}
    train(make_trainer(), STEPS, losses.__setitem__)
    return losses


def run(folder, kill_after=None):
    """Trains in a process of its own, killed after a step if so wanted; dict step → loss."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "train_steps.py", folder, str(STEPS)]
    losses = {}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            step, loss = line.split()
            losses[int(step)] = float(loss)
            if int(step) == kill_after:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
        assert process.wait() == (-signal.SIGKILL if kill_after else 0)
    return losses


def test_kill_9_at_a_random_step_and_resume(tmp_path, uninterrupted):
    kill_after = random.randint(3, STEPS - 3)
    first = run(tmp_path, kill_after)
    files = sorted(tmp_path.glob("step-*.safetensors"))
    assert len(files) in (1, 2, 3) and all(read_arrays(path) for path in files)
    (tmp_path / ".step-00000099.safetensors.1.tmp").write_bytes(b"what a process leaves that is killed while it writes")
    second = run(tmp_path)
    assert list(second) == list(range(int(files[-1].stem[5:]) + 1, STEPS + 1)), kill_after
    for step, loss in {**first, **second}.items():
        np.testing.assert_allclose(loss, uninterrupted[step], rtol=1e-6, err_msg=f"step {step}, killed at {kill_after}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}.safetensors" for s in (STEPS - 2, STEPS)]


def test_a_checkpoint_holds_loss_scale_averages_and_half_an_accumulation(tmp_path):
    trainer, losses = make_trainer("mixed_float16"), {}
    trainer.optimizer.dynamic_scale.assign(128.0)
    train(trainer, 4, losses.__setitem__)
    path = checkpoints.save(trainer, tmp_path)
    state = {name: np.array(v) for name, v in checkpoints._state(trainer).items()}
    train(trainer, 7, losses.__setitem__)
    other = make_trainer("mixed_float16")
    assert checkpoints.restore(other, path) == 4
    for name, variable in checkpoints._state(other).items():
        np.testing.assert_array_equal(np.array(variable), state[name], err_msg=name)
    assert float(other.optimizer.dynamic_scale) == 128.0 and int(other.guard.iterations) == 1
    again = {}
    train(other, 7, again.__setitem__)
    assert again == {step: losses[step] for step in (5, 6, 7)}


def small_trainer(optimizer=None):
    trainer = DiffusionTrainer(small_unet(trained="conv_out"), NoiseScheduler())
    trainer.compile(optimizer or keras.optimizers.AdamW(1e-2))
    return trainer


def test_no_space_left(tmp_path, monkeypatch):
    trainer = small_trainer()
    safe = checkpoints.save(trainer, tmp_path)
    kept = safe.read_bytes()
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    with pytest.raises(OSError) as caught:
        callbacks = [checkpoints.SaveCheckpoints(tmp_path, every=1, keep=1)]
        trainer.fit(((batch(0),) for _ in range(2)), callbacks=callbacks, verbose=0)
    assert caught.value.errno == errno.ENOSPC
    for part in ("step-00000001.safetensors", "No space left", "stopped at step 1", f"{safe} is whole, resume from it"):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [safe.name] and safe.read_bytes() == kept
    assert checkpoints.restore(small_trainer(), tmp_path) == 0


def test_another_runs_checkpoint_is_refused(tmp_path):
    trainer = small_trainer()
    with pytest.raises(FileNotFoundError, match="step-"):
        checkpoints.restore(trainer, tmp_path)
    trainer.step.assign(7)
    path = checkpoints.save(trainer, tmp_path)
    other = small_trainer(keras.optimizers.SGD(1e-2, momentum=0.9))
    before = [np.array(v) for v in other.trainable_variables]
    with pytest.raises(ValueError, match="is of another run: only the checkpoint has 'optimizer/.*velocity'"):
        checkpoints.restore(other, path)
    assert all(np.array_equal(a, v) for a, v in zip(before, other.trainable_variables))
    with pytest.raises(ValueError, match="begins at step 0, but there is already .*step-00000007"):
        other.fit(((batch(0),) for _ in range(2)), callbacks=[checkpoints.SaveCheckpoints(tmp_path, 1)], verbose=0)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.restore(trainer, path)
