"""The networks of Stable Diffusion, and the one that enlarges pictures, as functional Keras models."""

from keras_sd.models.control_net import ControlNet
from keras_sd.models.decoder import Decoder
from keras_sd.models.diffusion_model import DiffusionModel
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.ip_adapter import IPAdapter
from keras_sd.models.rrdbnet import RRDBNet
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.vision_encoder import VisionEncoder

__all__ = [
    "ControlNet",
    "Decoder",
    "DiffusionModel",
    "IPAdapter",
    "ImageEncoder",
    "RRDBNet",
    "TextEncoder",
    "VisionEncoder",
]
