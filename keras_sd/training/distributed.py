"""Training on several devices and machines.

| backend | devices of one process | several processes |
|---|---|---|
| JAX | `keras.distribution.DataParallel` | the same, over all devices of all processes |
| TensorFlow | `tf.distribute.MirroredStrategy` | |

On JAX a batch that is spread over devices is one batch: noise, timesteps and gradients are those of a single device
with the whole of it. On TensorFlow each device draws its own noise, and a step whose gradients are not finite is not
left out. Each process brings its own part, see `num_shards` of `keras_sd.training.batches.batches`.
"""

import contextlib

import keras


def start_processes(coordinator, num_processes, process_id):
    """Joins the processes of a run. To be called before anything is computed.

    Args:
        coordinator: "HOST:PORT" of process 0, which all can reach.
        num_processes: how many there are; one needs no joining.
        process_id: which of them this is, from 0 on.

    Raises:
        ValueError: an argument is missing or out of range, or the backend is another one than JAX.
    """
    if num_processes == 1:
        return
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"num_processes = {num_processes} needs KERAS_BACKEND=jax; the backend is {keras.backend.backend()!r}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be from 0 to {num_processes - 1}; got {process_id}.")
    if coordinator is None or not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be the HOST:PORT of process 0; got {coordinator!r}.")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for machines without accelerators
    keras.distribution.initialize(job_addresses=coordinator, num_processes=num_processes, process_id=process_id)


@contextlib.contextmanager
def all_devices():
    """What is built and trained within is on all devices; yields their number. With a single one nothing changes.

    Raises:
        ValueError: the backend cannot train on several devices.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        if jax.device_count() == 1:
            yield 1
            return
        # each process feeds its own part of a batch
        with keras.distribution.DataParallel(auto_shard_dataset=False).scope():
            yield jax.device_count()
    elif backend == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        if len(devices) == 1:
            yield 1
            return
        with tf.distribute.MirroredStrategy([device.name for device in devices]).scope():
            yield len(devices)
    else:
        yield 1
