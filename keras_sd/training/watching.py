"""Callbacks that watch a run: progress, scalars and pictures for TensorBoard, and an end to what went wrong."""

import io
import math
import pathlib
import re
import resource
import sys
import time

import keras
import numpy as np
from keras import ops
from PIL import Image
from tqdm.auto import tqdm

from keras_sd.weights.files import atomic_file


def peak_memory():
    """Most bytes in use so far: of the accelerator where the backend can tell, otherwise of this process."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        if statistics := jax.local_devices()[0].memory_stats():
            return statistics["peak_bytes_in_use"]
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    status = pathlib.Path("/proc/self/status")  # Linux; there getrusage's figure may be that of the parent process
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopWhenBroken(keras.callbacks.Callback):
    """Ends training where the loss or the gradients are not finite again and again.

    Such steps change no weight (see `GuardedOptimizer`), and a single one is no harm. Loss scaling begins with a few.

    Args:
        patience: number of such steps in a row.

    Raises:
        FloatingPointError: while training; `on_train_end` is not called then, so that no checkpoint replaces the last.
    """

    def __init__(self, patience=25):
        super().__init__()
        self.patience = patience

    def on_train_begin(self, logs=None):
        self.steps = self.broken = 0
        self.taken = self._taken()

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if math.isfinite(float(logs["loss"])):
            self.broken = 0
        else:
            self.broken += 1
            self.model.reset_metrics()  # the mean over the epoch would stay NaN
        if self.broken >= self.patience:
            self._stop("loss was")
        if self.steps % self.patience == 0:  # gradients may be infinite while the loss is not
            before, self.taken = self.taken, self._taken()
            if before is not None and before == self.taken:
                self._stop("gradients were")

    def _taken(self):
        guard = self.model.guard
        return None if guard is None else int(keras.ops.convert_to_numpy(guard.taken))

    def _stop(self, what):
        raise FloatingPointError(
            f"The {what} not finite for {self.patience} steps in a row, up to step {self.model.steps_done}; none "
            "of them changed a weight, and the last checkpoint stays. Try a lower learning rate or a wider dtype."
        )


class Progress(keras.callbacks.Callback):
    """A progress bar over the whole run: steps, time left, loss, images a second, peak memory.

    Args:
        steps: number of steps (batches) of the whole run, those before a restart included.
        batch_size: images in a step, of all devices.
    """

    def __init__(self, steps, batch_size):
        super().__init__()
        self.steps, self.batch_size = steps, batch_size

    def on_train_begin(self, logs=None):
        self.bar = tqdm(total=self.steps, initial=self.model.steps_done, unit="step")

    def on_train_batch_end(self, batch, logs=None):
        rate = self.bar.format_dict["rate"]
        shown = {"loss": f"{float(logs['loss']):.4f}", "memory": f"{peak_memory() / 1e9:.1f} GB"}
        if rate:
            shown["images/s"] = f"{rate * self.batch_size:.3g}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, logs=None):
        self.bar.close()


class Summaries:
    """Writes scalars and pictures that TensorBoard shows; TensorBoard itself need not be installed.

    Args:
        folder: TensorBoard's `--logdir`, or one in it.

    Raises:
        ImportError: TensorFlow is not installed.
    """

    def __init__(self, folder):
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ImportError("Summaries for TensorBoard are written by TensorFlow: pip install tensorflow.") from error
        self.tf, self.writer = tf, tf.summary.create_file_writer(str(folder))

    def scalar(self, name, value, step):
        self._write(name, self.tf.constant(float(value)), step, "scalars")

    def pictures(self, name, pictures, step):
        """Pictures: uint8 (N, H, W, 3)."""
        height, width = pictures.shape[1:3]
        self._write(name, self.tf.constant([f"{width}", f"{height}", *map(_png, pictures)]), step, "images")

    def _write(self, name, tensor, step, plugin):
        from tensorflow.core.framework.summary_pb2 import SummaryMetadata

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
        with self.writer.as_default():
            self.tf.summary.write(name, tensor, step=step, metadata=metadata)
        self.writer.flush()


class WriteScalars(keras.callbacks.Callback):
    """Writes loss, learning rate, loss scale, images a second and peak memory.

    Args:
        summaries: `Summaries`.
        batch_size: images in a step, of all devices.
        every: steps (batches) between two points.
    """

    def __init__(self, summaries, batch_size, every=10):
        super().__init__()
        self.summaries, self.batch_size, self.every = summaries, batch_size, every

    def on_train_begin(self, logs=None):
        self.step, self.time = self.model.steps_done, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % self.every:
            return
        optimizer, now = self.model.optimizer, time.perf_counter()
        values = {
            "loss": logs["loss"],
            "learning_rate": ops.convert_to_numpy(optimizer.learning_rate),
            "images_per_second": self.every * self.batch_size / (now - self.time),
            "peak_memory_bytes": peak_memory(),
        }
        if hasattr(optimizer, "dynamic_scale"):
            values["loss_scale"] = ops.convert_to_numpy(optimizer.dynamic_scale)
        for name, value in values.items():
            self.summaries.scalar(name, value, self.step)
        self.time = now


class DrawPictures(keras.callbacks.Callback):
    """Draws pictures with the moving averages of the weights, or with the weights where there are none.

    Args:
        draw: function without arguments → uint8 (N, H, W, 3), e.g. a `StableDiffusion.text_to_image` of fixed prompts
            and seed whose `diffusion_model` is the trainer's.
        folder: where `step-00000120.png`, the pictures in a row, is written.
        every: steps (batches) between two drawings.
        summaries: `Summaries`, or None.
    """

    def __init__(self, draw, folder, every, summaries=None):
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1; got {every!r}.")
        self.draw, self.folder, self.every, self.summaries = draw, pathlib.Path(folder), every, summaries

    def on_train_begin(self, logs=None):
        self.step = self.model.steps_done

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step % self.every:
            return
        with self.model.averaged_weights():
            pictures = np.asarray(self.draw())
        with atomic_file(self.folder / f"step-{self.step:08d}.png") as file:
            file.write(_png(np.concatenate(list(pictures), axis=1)))
        if self.summaries is not None:
            self.summaries.pictures("validation", pictures, self.step)


def _png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
