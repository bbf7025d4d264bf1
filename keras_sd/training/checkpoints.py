"""Everything that a run needs to go on where it was, in one safetensors file per checkpoint.

`step-00000120.safetensors` holds the trained weights, the optimizer's state (moments, accumulated gradients, averages,
loss scale, counters), the state of the random numbers and the number of steps. It appears under its name when it is
whole, so that a process killed at any moment leaves nothing unreadable.
"""

import pathlib
import re

import keras
import numpy as np

from keras_sd.weights.files import read_arrays, write_safetensors


def save(trainer, folder, keep=2):
    """Writes a checkpoint, then removes those before the last `keep`.

    Args:
        trainer: a compiled `DiffusionTrainer`. In a callback on JAX, take it from `self.model`.
        folder: where to; it is made.
        keep: number of checkpoints that stay, at least 1.

    Returns:
        the file's path.

    Raises:
        OSError: it cannot be written, e.g. for want of space; the message names the last whole checkpoint.
    """
    folder = pathlib.Path(folder)
    for leftover in folder.glob(".step-*.tmp"):  # of a killed process
        leftover.unlink()
    path = folder / f"step-{trainer.steps_done:08d}.safetensors"
    try:
        write_safetensors(path, {name: _Later(variable) for name, variable in _state(trainer).items()})
    except OSError as error:
        last = latest(folder)
        safe = f"{last} is whole, resume from it" if last else "there is no earlier checkpoint"
        raise type(error)(
            error.errno, f"{error.strerror}. Training stopped at step {trainer.steps_done}; {safe}"
        ) from error
    for old in _all(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def latest(folder):
    """Path of the newest checkpoint in `folder`, or None."""
    return (_all(folder) or [None])[-1]


def restore(trainer, path):
    """Puts a trainer in the state of a checkpoint.

    Args:
        trainer: a `DiffusionTrainer`, made and compiled as the one that was saved.
        path: file, or the folder whose newest checkpoint is taken.

    Returns:
        number of steps (batches) done, where the batches should go on.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or of another model or optimizer. The trainer is not changed then.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = latest(path) or path / "step-*.safetensors"
    arrays, variables = read_arrays(path), _state(trainer)
    for name in sorted(arrays.keys() ^ variables.keys()):
        where = "the checkpoint" if name in arrays else "this run"
        raise ValueError(
            f"{path} is of another run: only {where} has {name!r}. Train the same with the same optimizer."
        )
    for name, variable in variables.items():
        found, dtype, shape = arrays[name], _dtype(variable), tuple(variable.shape)
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(
                f"{path} is of another run: {name!r} is {found.dtype} {found.shape} there, {dtype} {shape} here."
            )
    for name, variable in variables.items():
        variable.assign(np.array(arrays[name]))
    return trainer.steps_done


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves every `every` steps and at the end of `fit`.

    Args:
        folder, keep: as in `save`.
        every: steps (batches) between two checkpoints.

    Raises:
        ValueError: at the begin of training, if `folder` holds checkpoints of later steps: they are another run's.
        OSError: as `save`.
    """

    def __init__(self, folder, every, keep=2):
        super().__init__()
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}.")
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_begin(self, logs=None):
        self.step = self.saved = self.model.steps_done
        last = latest(self.folder)
        if last and _step(last) > self.step:
            raise ValueError(
                f"Training begins at step {self.step}, but there is already {last}: resume from it, or save elsewhere."
            )

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % self.every == 0:
            self._save()

    def on_train_end(self, logs=None):
        if self.saved != self.step:
            self._save()

    def _save(self):
        save(self.model, self.folder, self.keep)
        self.saved = self.step


class _Later:
    """A variable as `write_safetensors` sees an array; its values are copied only when they are written."""

    def __init__(self, variable):
        self.variable, self.shape, self.dtype = variable, tuple(variable.shape), _dtype(variable)
        self.ndim, self.nbytes = len(self.shape), int(np.prod(self.shape, dtype="int64")) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None):
        return np.asarray(keras.ops.convert_to_numpy(self.variable)).astype(self.dtype, copy=False)

    def tobytes(self):
        return self.__array__().tobytes()


def _all(folder):
    return sorted((p for p in pathlib.Path(folder).glob("step-*.safetensors") if _step(p) is not None), key=_step)


def _step(path):
    found = re.fullmatch(r"step-(\d+)", path.stem)
    return int(found[1]) if found else None


def _dtype(variable):
    return np.dtype(keras.backend.standardize_dtype(variable.dtype))


def _state(trainer):
    """dict name → variable of all that training changes, in an order that every process has alike."""
    groups = {
        "weights": trainer.trainable_variables,
        "optimizer": trainer.optimizer.variables,
        "trainer": [trainer.step, trainer.random.state],
    }
    state = {}
    for group, variables in groups.items():
        for variable in variables:
            # an optimizer's path starts with its name, which Keras numbers; its variables' names hold the weights'
            name = f"{group}/{variable.path if group == 'weights' else variable.name}"
            while name in state:
                name += "+"
            state[name] = variable
    return state
