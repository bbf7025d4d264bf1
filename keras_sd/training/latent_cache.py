"""Text contexts and autoencoder moments of a data set, computed once, since both networks are frozen.

A cache is a folder of TFRecord files, each of which appears when it is whole:

    contexts-00000-<fingerprint>.tfrecord     {"context"} of different captions, the empty one first
    moments-00000-<fingerprint>.tfrecord      {"mean", "std"} of pictures, and of turned ones

A file's name carries the fingerprint of all that it was computed from: the bytes of its pictures, their sizes and
turns, or the tokens of its captions, and the network's weights. What exists under its name is right; what is missing is
computed, be it after a kill, a new picture or another checkpoint; what no name asks for any more is removed. Where each
record begins is read off the files, so batches are read in any order.
"""

import dataclasses
import errno
import functools
import hashlib
import os
import pathlib
import re
import time

import numpy as np

from keras_sd.images import fit, to_model
from keras_sd.stable_diffusion import StableDiffusion
from keras_sd.weights.files import atomic_file
from keras_sd.weights.hub import sha256_of

VERSION = b"1"  # of what is computed and how it is written; another one invalidates all caches
_NAME = re.compile(r"\.?(contexts|moments)-\d{5}-[0-9a-f]{32}\.tfrecord(\.\d+\.tmp)?")


def build_latent_cache(
    folder, pictures, sd, *, contexts=True, items_per_file=256, batch_size=4, beam_options=None, progress=True
):
    """Computes what a cache lacks, and opens it. A killed run is taken up at the file that it was writing.

    Args:
        folder: where the cache is; it holds this one alone.
        pictures: `Pictures`, without `random_crop`.
        sd: the `StableDiffusion` whose `text_encoder` and `image_encoder` compute it.
        contexts: False where the text encoder is trained, too: batches then have "tokens" in place of "context".
        items_per_file: pictures, or captions, in a file.
        batch_size: pictures that the autoencoder takes at once.
        beam_options: `apache_beam.options.pipeline_options.PipelineOptions`: the files are written by the workers of
            a Beam pipeline, which open `sd.preset` anew; `folder` and the pictures must be where they can reach them.
        progress: show a progress bar.

    Returns:
        `LatentCache`.

    Raises:
        ValueError: `pictures` are cut at random, or a worker's preset has other weights than `sd`.
        ImportError: Beam is not installed.
        OSError: the folder cannot be written, or the disk is full; what was complete before stays.
    """
    if pictures.random_crop:
        raise ValueError("A latent cache holds one cut of each picture: random_crop must be False.")
    folder = pathlib.Path(folder)
    plan = _plan(folder, pictures, sd, contexts, items_per_file)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for files in plan.values() for file in files if _offsets(file.path) is None]
    if beam_options is None:
        from tqdm import tqdm

        work = tqdm(missing, desc="latent cache", unit="file", disable=None if progress else True)
        for file in work:
            _write(file, sd, batch_size)
    elif missing:
        _run_beam(missing, sd, batch_size, beam_options)
    _remove_others(folder, plan)
    return LatentCache(pictures, *(_Records([file.path for file in plan[kind]]) for kind in plan))


class LatentCache:
    """A source of `batches` that reads contexts and moments instead of computing them; see `build_latent_cache`.

    Attributes:
        pictures: the `Pictures` that it was computed from.
        unconditional_context: (1, 77, width), of the empty caption; None where contexts are not cached.
    """

    def __init__(self, pictures, moments, contexts=None):
        self.pictures, self._moments, self._contexts = pictures, moments, contexts
        self.unconditional_context = None if contexts is None else contexts[0]["context"][None]
        index = {caption: i for i, caption in enumerate(_captions(pictures))}
        self._context_of = [[index[caption] for caption in example.captions] for example in pictures.examples]

    def row(self, example, caption=0, turn=False):
        """One example: {"mean", "std" float32 (h, w, 4) of the scaled latent, "context" (77, width) or "tokens"}.

        For a ControlNet also "conditioning" float32 (H, W, 3) in [0, 1], which is not cached: it is read or computed.
        """
        row = self._moments[(1 + self.pictures.flip) * int(example) + int(turn)]
        if self.pictures.conditioning is not None:
            seen = self.pictures.seen(example, self.pictures.picture(example))
            row["conditioning"] = np.asarray(seen[:, ::-1] if turn else seen, "float32") / 255.0
        if self._contexts is None:
            return {**row, "tokens": self.pictures.tokenizer([self.pictures.examples[example].captions[caption]])[0]}
        return {**row, **self._contexts[self._context_of[example][caption]]}

    def dataset(self, draws):
        """`draws` as a `tf.data.Dataset` of its batches → dicts of what `row` has, (B, …) each."""
        import tensorflow as tf

        first = self.row(0)
        types = [tf.as_dtype(value.dtype) for value in first.values()]

        def read(*draw):
            rows = [self.row(*one) for one in zip(*draw)]
            return [np.stack([row[name] for row in rows]) for name in first]

        def load(draw):
            given = draw["example"], draw["caption"], draw["turn"]
            values = tf.numpy_function(read, given, types, stateful=False)
            return {
                name: tf.ensure_shape(x, (draw["example"].shape[0], *self._shape(like)))
                for (name, like), x in zip(first.items(), values)
            }

        return draws.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _shape(self, like):
        """Static shape of a row's part: the size of a latent is another one in each bucket."""
        bucketed = like.ndim == 3 and len(self.pictures.buckets[0]) > 1
        return (None, None, like.shape[-1]) if bucketed else like.shape


# === What is in which file ===


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of the cache.

    `items` is what it holds: token arrays (77,), or (example, (height, width), whether turned left to right).
    `weights` is the digest of the network that computes it.
    """

    path: pathlib.Path
    kind: str
    items: tuple
    weights: str


def _plan(folder, pictures, sd, contexts, items_per_file):
    """{"moments": files, "contexts": files}."""
    single = [(example, tuple(map(int, size))) for example, size in zip(pictures.examples, pictures.sizes)]
    digests = [_digest(example) for example, _ in single]
    turns = (False, True) if pictures.flip else (False,)
    items = [(example, size, turn) for example, size in single for turn in turns]
    keys = [f"{digest} {size} {turn}".encode() for digest, (_, size) in zip(digests, single) for turn in turns]
    plan = {"moments": _files(folder, "moments", items, keys, _weights_digest(sd.image_encoder), items_per_file)}
    if contexts:
        tokens = [pictures.tokenizer([caption])[0] for caption in _captions(pictures)]
        keys = [one.tobytes() for one in tokens]
        plan["contexts"] = _files(folder, "contexts", tokens, keys, _weights_digest(sd.text_encoder), items_per_file)
    return plan


def _files(folder, kind, items, keys, weights, count):
    files = []
    for number, start in enumerate(range(0, len(items), count)):
        fingerprint = hashlib.sha256(VERSION + weights.encode())
        for key in keys[start : start + count]:
            fingerprint.update(hashlib.sha256(key).digest())
        name = f"{kind}-{number:05d}-{fingerprint.hexdigest()[:32]}.tfrecord"
        files.append(_File(folder / name, kind, tuple(items[start : start + count]), weights))
    return files


def _captions(pictures):
    """All different captions, the empty one first."""
    return list(dict.fromkeys(["", *(caption for example in pictures.examples for caption in example.captions)]))


def _digest(example):
    if isinstance(example.image, (str, os.PathLike)):
        return sha256_of(example.image)
    image = example.read()
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _weights_digest(model):
    digest = hashlib.sha256(f"{sorted(model.get_config().items())} {model.output.dtype}".encode())
    for value in model.get_weights():
        digest.update(np.ascontiguousarray(value).view("uint8").data)
    return digest.hexdigest()


def _remove_others(folder, plan):
    """Removes files of earlier fingerprints, and what killed runs left half-written."""
    wanted = {file.path.name for files in plan.values() for file in files}
    for path in folder.iterdir():
        # a young temporary file may be another process's
        old = not path.name.endswith(".tmp") or path.stat().st_mtime < time.time() - 3600
        if _NAME.fullmatch(path.name) and path.name not in wanted and old:
            path.unlink(missing_ok=True)


# === Computing ===


def _write(file, sd, batch_size):
    import tensorflow as tf

    compute = {"moments": _moments, "contexts": _contexts}[file.kind]
    rows = compute(file.items, sd, batch_size)
    with atomic_file(file.path) as opened:
        try:
            with tf.io.TFRecordWriter(opened.name) as writer:
                for row in rows:
                    writer.write(_to_record(row))
        except tf.errors.OpError as error:
            full = "No space left" in error.message
            raise OSError(errno.ENOSPC if full else errno.EIO, error.message) from error


def _contexts(tokens, sd, batch_size):
    """Token arrays → [{"context"}]."""
    dtype = "float16" if sd.text_encoder.output.dtype == "float16" else "float32"  # NumPy has no bfloat16
    size = 8 * batch_size
    encoded = [
        np.asarray(sd.text_encoder.predict_on_batch({"tokens": batch}), dtype)[:count]
        for batch, count in _padded_batches(tokens, size)
    ]
    return [{"context": context} for context in np.concatenate(encoded)]


def _moments(items, sd, batch_size):
    """(example, size, turn) → [{"mean", "std"}] of the scaled latent, in their order."""
    encoder, scale = _moments_model(sd.image_encoder), sd.image_encoder.scaling_factor
    rows = [None] * len(items)
    for size in sorted({size for _, size, _ in items}):
        chosen = [i for i, item in enumerate(items) if item[1] == size]
        for batch, count in _padded_batches(chosen, batch_size):
            images = np.concatenate([_model_input(*items[i]) for i in batch])
            mean, log_variance = (np.asarray(x, "float32") for x in encoder.predict_on_batch(images))
            for i, m, v in zip(batch[:count], mean, log_variance):
                rows[i] = {"mean": scale * m, "std": scale * np.exp(0.5 * v)}
    return rows


@functools.lru_cache(1)
def _moments_model(image_encoder):
    model = image_encoder.moments
    model.compile(jit_compile=image_encoder.jit_compile)
    return model


def _model_input(example, size, turn):
    image = np.asarray(fit(example.read(), *size, 8))
    return to_model(image[:, ::-1] if turn else image)


def _padded_batches(items, size):
    """(array of `size` items, number of them that count): the last ones repeat, so that a model is traced once."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield np.asarray(batch + batch[-1:] * (size - len(batch))), len(batch)


# === Beam ===


def _run_beam(missing, sd, batch_size, options):
    try:
        import apache_beam as beam
    except ImportError as error:
        raise ImportError("beam_options needs Apache Beam, which is an extra: `pip install apache-beam`.") from error
    write = functools.partial(_write_on_worker, preset=sd.preset, dtype=sd.dtype, batch_size=batch_size)
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(missing) | beam.Reshuffle() | beam.Map(write)


def _write_on_worker(file, preset, dtype, batch_size):
    sd = _opened(preset, dtype)
    model = sd.image_encoder if file.kind == "moments" else sd.text_encoder
    if _weights_digest(model) != file.weights:
        raise ValueError(f"The preset {str(preset)!r} that a worker opens has other weights than the model given.")
    _write(file, sd, batch_size)


@functools.lru_cache(1)
def _opened(preset, dtype):
    return StableDiffusion(preset=preset, dtype=dtype)


# === TFRecord files ===


def _to_record(row):
    import tensorflow as tf

    features = {name: tf.make_tensor_proto(value).SerializeToString() for name, value in row.items()}
    features = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for name, v in features.items()}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)


def _from_record(record):
    import tensorflow as tf
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    features = tf.train.Example.FromString(record).features.feature
    return {name: tf.make_ndarray(TensorProto.FromString(features[name].bytes_list.value[0])) for name in features}


def _offsets(path):
    """[(start, length)] of the records of a file; None where it is missing or cut off.

    A record is its length (uint64), a checksum (4 bytes), the data and another checksum (4 bytes).
    """
    found, position = [], 0
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            while position < size:
                file.seek(position)
                length = int.from_bytes(file.read(8), "little")
                found.append((position + 12, length))
                position += 16 + length
    except FileNotFoundError:
        return None
    return found if found and position == size else None


class _Records:
    """The records of several files as one sequence of dicts of arrays."""

    def __init__(self, paths):
        self.places = [(path, *place) for path in paths for place in _offsets(path)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        path, start, length = self.places[i]
        with open(path, "rb", buffering=0) as file:
            return _from_record(os.pread(file.fileno(), length, start))
