"""CLIP vision encoders from folders in the layout of transformers, each a config and weights.

Reference: the configs and state dicts of transformers 5 (`CLIPVisionModelWithProjection`) and of diffusers'
`StableDiffusionSafetyChecker`, of which older ones write `vision_model.` twice.
"""

import re

from keras_sd.models.vision_encoder import VisionEncoder
from keras_sd.weights.assign import assign_state_dict, without_values
from keras_sd.weights.diffusers_folder import WEIGHT_FILES, weight_file
from keras_sd.weights.files import read_arrays, read_json

DEFAULTS = {  # of transformers' CLIPVisionConfig
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "projection_dim": 512,
}


def vision_encoder_arguments(config):
    """Arguments of `VisionEncoder` from a transformers CLIP vision config, or from a CLIP config that holds one.

    Raises:
        ValueError: a field has a value that the model does not implement.
    """
    vision = config.get("vision_config") or config
    if vision.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"layer_norm_eps of the vision encoder is {vision['layer_norm_eps']}; only 1e-5 is supported.")
    arguments = {name: vision.get(name, default) for name, default in DEFAULTS.items()}
    if vision is not config:  # the width that pictures and texts share
        arguments["projection_dim"] = config.get("projection_dim", 512)
    return arguments


def vision_encoder_state_dict(arrays):
    """The state dict in the naming of `VisionEncoder`, whatever its age."""
    renamed = {}
    for key, array in arrays.items():
        key = re.sub(r"^(vision_model\.)+", "vision_model.", key)
        if key.endswith(".class_embedding"):
            key, array = f"{key}.weight", array[None]
        if not key.endswith(".position_ids"):
            renamed[key] = array
    return renamed


def read_vision_folder(folder):
    """(config, state dict in the naming of `VisionEncoder`) of a folder; arrays beside the encoder keep their names.

    Raises:
        FileNotFoundError: the folder lacks the config or the weights.
    """
    config = read_json(folder / "config.json")
    return config, vision_encoder_state_dict(read_arrays(weight_file(folder, WEIGHT_FILES["text_encoder"])))


def build_vision_encoder(config, arrays, source, dtype=None):
    """A `VisionEncoder` with the given weights."""
    with without_values():
        model = VisionEncoder(**vision_encoder_arguments(config), dtype=dtype)
    assign_state_dict(model, arrays, source)
    return model
