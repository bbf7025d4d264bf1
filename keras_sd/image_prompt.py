"""A picture as a prompt: an IP-Adapter, and how pictures come to it."""

import pathlib

import keras
import numpy as np

from keras_sd.feature_extractor import extract, read_feature_extractor
from keras_sd.images import read_image
from keras_sd.presets import locate_model
from keras_sd.weights.ip_adapter import read_ip_adapter
from keras_sd.weights.vision_encoder import build_vision_encoder, read_vision_folder, vision_encoder_arguments


class ImagePrompt:
    """An `IPAdapter` and the preparation of its pictures; the vision encoder is apart, a model like the others.

    Args:
        path: the adapter's file; see `keras_sd.weights.ip_adapter`.
        image_encoder: folder of the vision encoder; by default `image_encoder/` beside the file.
        diffusion_model: the `DiffusionModel` that it is for.
        dtype: Keras dtype policy.

    Raises:
        FileNotFoundError, ValueError: something is not there, or does not fit; the message says what.
    """

    def __init__(self, path, image_encoder, diffusion_model, dtype=None):
        folder = _locate_encoder(str(path), image_encoder)
        self.adapter = read_ip_adapter(locate_model(path), diffusion_model, dtype)
        self.folder = folder
        self._config, self._arrays = read_vision_folder(folder)
        arguments, needed = vision_encoder_arguments(self._config), self.adapter.projection.kernel.shape[0]
        if arguments["projection_dim"] != needed:
            raise ValueError(
                f"image_encoder: {str(folder)!r} makes {arguments['projection_dim']} numbers of a picture; "
                f"the IP-Adapter {str(path)!r} needs {needed}."
            )
        self._preparation = read_feature_extractor(folder, arguments["image_size"])

    def build_encoder(self, dtype=None):
        """The `VisionEncoder` that pictures are looked at with."""
        return build_vision_encoder(self._config, self._arrays, str(self.folder), dtype)

    def prepare(self, pictures, batch_size):
        """One picture or a list of `batch_size` ones → what the vision encoder takes, float32 (1 or B, S, S, 3)."""
        pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        if len(pictures) not in (1, batch_size):
            raise ValueError(f"image_prompt has {len(pictures)} pictures; give one, or {batch_size}, one per picture.")
        return extract([read_image(picture, "image_prompt") for picture in pictures], self._preparation)

    def tokens(self, embeddings, batch_size):
        """Embeddings (1 or B, width) → the tokens of the pictures, and those of none, float32 (B, 4, width) each."""
        embeddings = np.repeat(np.asarray(embeddings, "float32"), batch_size // len(embeddings), axis=0)
        both = (self.adapter(one) for one in (embeddings, np.zeros_like(embeddings)))
        return [np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(one, "float32"))) for one in both]


def _locate_encoder(path, folder):
    """The vision encoder's folder; of an adapter on the Hub it is downloaded."""
    if folder is None and path.startswith("hf://"):
        file, at, revision = path.partition("@")
        folder = f"{file.rpartition('/')[0]}/image_encoder{at}{revision}"
    folder = pathlib.Path(path).parent / "image_encoder" if folder is None else folder
    if not str(folder).startswith("hf://"):
        if not pathlib.Path(folder).is_dir():
            raise FileNotFoundError(
                f"image_encoder: there is no folder {str(folder)!r}; an IP-Adapter comes with a CLIP vision encoder."
            )
        return pathlib.Path(folder)
    base, at, revision = str(folder).partition("@")
    files = [locate_model(f"{base}/{name}{at}{revision}") for name in ("config.json", "model.safetensors")]
    return files[0].parent
