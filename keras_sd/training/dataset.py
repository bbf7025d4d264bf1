"""Captioned pictures as a TensorFlow Datasets data set: many small files become a few large ones."""

import functools
import hashlib
import io
import os

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from keras_sd.training.examples import Example, read_examples

_PLAIN = ("PNG", "JPEG")  # what TensorFlow decodes as Pillow does, where it is 8-bit RGB and upright


class CaptionedImages(tfds.core.GeneratorBasedBuilder):
    """A data set of the examples of `read_examples`.

    Each picture is kept as it is in the file, if that is an upright RGB PNG or JPEG, else as a PNG in RGB.

    Args:
        source: list of `Example`, or what `read_examples` takes.
        beam: make it with Apache Beam (an extra), for large sets: pass the pipeline's options to `download_and_prepare`
            as `tfds.download.DownloadConfig(beam_options=…)`.
        config: name of the data set under `data_dir`; by default a fingerprint of the examples.
        **kwargs: of `tfds.core.GeneratorBasedBuilder`, e.g. `data_dir`.

    Example:

        builder = CaptionedImages("pokemon.tar.gz", data_dir="data")
        builder.download_and_prepare()
        pictures = Pictures(builder.examples(), sd.tokenizer, 512, 512)
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source, *, beam=False, config=None, file_format="array_record", **kwargs):
        self._examples = source if isinstance(source, list) else read_examples(source)[0]
        if of_control_nets := [example.name for example in self._examples if example.conditioning is not None]:
            raise ValueError(f"This data set holds no conditioning images; {of_control_nets[0]} has one.")
        self._beam = beam
        if config is None:
            config = hashlib.sha256(repr([*map(_facts, self._examples)]).encode()).hexdigest()[:16]
        if isinstance(config, str):
            config = tfds.core.BuilderConfig(name=config, version=self.VERSION)
        super().__init__(config=config, file_format=file_format, **kwargs)

    def _info(self):
        return self.dataset_info_from_configs(
            description="Captioned pictures.",
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "height": tfds.features.Scalar(np.int32),
                    "width": tfds.features.Scalar(np.int32),
                    "prior": tfds.features.Scalar(np.bool_),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        if self._beam:
            beam = tfds.core.lazy_imports.apache_beam
            return beam.Create(self._examples) | beam.Reshuffle() | beam.Map(_keyed)
        return map(_keyed, self._examples)

    def examples(self):
        """The examples of the data set, whose pictures are read from it; `download_and_prepare` comes before."""
        folder = str(self.data_path)
        return [
            Example(
                row["name"].decode(),
                functools.partial(_stored, folder, i),
                tuple(text.decode() for text in row["captions"]),
                int(row["height"]),
                int(row["width"]),
                bool(row["prior"]),
            )
            for i, row in enumerate(_source(folder))
        ]


def _facts(example):
    """What changes with an example; a file is not read again for it."""
    file = None if callable(example.image) else os.stat(example.image)
    written = file and (file.st_size, file.st_mtime_ns)
    return example.name, example.captions, example.height, example.width, example.prior, written


def _keyed(example):
    """(key, row) of an example."""
    return example.name, {
        "name": example.name,
        "image": io.BytesIO(_encoded(example)),
        "captions": list(example.captions),
        "height": example.height,
        "width": example.width,
        "prior": example.prior,
    }


def _encoded(example):
    """Bytes of a PNG or JPEG file."""
    if not callable(example.image):
        with Image.open(example.image) as image:
            upright = image.getexif().get(0x0112, 1) == 1
            if image.format in _PLAIN and image.mode == "RGB" and upright and "transparency" not in image.info:
                with open(example.image, "rb") as file:
                    return file.read()
    data = io.BytesIO()
    example.read().save(data, "PNG")
    return data.getvalue()


@functools.lru_cache(8)
def _source(folder):
    """The rows of a finished data set, pictures as the bytes of their files."""
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})


def _stored(folder, i):
    return Image.open(io.BytesIO(_source(folder)[i]["image"]))
