"""Pictures as CLIP's vision encoder takes them: scaled, cut, and normalized as it was trained with them.

Reference: the preprocessing of openai/CLIP, and `CLIPImageProcessor` of transformers.
"""

import numpy as np
from PIL import Image

from keras_sd.weights.files import read_json

CLIP = {
    "size": 224,
    "crop_size": 224,
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def read_feature_extractor(folder, default_size=224):
    """The numbers of a `preprocessor_config.json`; CLIP's own, for pictures of `default_size`, where there is none.

    Returns:
        dict with `size` (shortest edge in pixels), `crop_size` (height, width), `resample` (a Pillow filter's number),
        `image_mean` and `image_std` (3 numbers each).
    """
    file = folder / "preprocessor_config.json"
    given = read_json(file) if file.is_file() else {"size": default_size, "crop_size": default_size}
    config = {name: given.get(name, value) for name, value in CLIP.items()}
    size, crop = config["size"], config["crop_size"]
    config["size"] = size.get("shortest_edge") if isinstance(size, dict) else size
    if not isinstance(config["size"], int):
        raise ValueError(f"{str(file)!r}: size is {size!r}; only a shortest edge is supported.")
    config["crop_size"] = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    return config


def extract(images, config):
    """Pictures for a `VisionEncoder`.

    Args:
        images: list of PIL images in RGB.
        config: of `read_feature_extractor`.

    Returns:
        float32 (B, *crop_size, 3).
    """
    return np.stack([_extract(image, config) for image in images])


def _extract(image, config):
    short, (height, width) = config["size"], config["crop_size"]
    shortest = min(image.size)
    image = image.resize([short * side // shortest for side in image.size], Image.Resampling(config["resample"]))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))  # black where it is smaller
    pixels = np.asarray(image, "float32") / 255
    return (pixels - np.asarray(config["image_mean"], "float32")) / np.asarray(config["image_std"], "float32")
