"""The safety checker of Stable Diffusion v1: is what a picture shows close to one of seventeen concepts?

A picture's CLIP embedding is compared with the embeddings of the concepts, which were published without their names.
Each has a threshold; where one of three special concepts is near, all thresholds are lowered.

Reference: Rando et al. (2022), Red-Teaming the Stable Diffusion Safety Filter, arXiv 2210.04610; the numbers are those
of diffusers' `StableDiffusionSafetyChecker`.
"""

import pathlib

import numpy as np
from PIL import Image

from keras_sd.feature_extractor import extract, read_feature_extractor
from keras_sd.weights.vision_encoder import build_vision_encoder, read_vision_folder, vision_encoder_arguments

CONCEPTS = "concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights"
ADJUSTMENT = 0.01  # what a special concept lowers the thresholds by


class SafetyChecker:
    """Concepts, thresholds and how pictures are prepared; the vision encoder is apart, a model like the others.

    Args:
        folder: `safety_checker/` of a model in the diffusers layout, `feature_extractor/` beside it; or the model's.

    Raises:
        FileNotFoundError: config or weights are not there.
        ValueError: they are no safety checker's.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        folder = folder / "safety_checker" if (folder / "safety_checker").is_dir() else folder
        self.folder = folder
        self._config, arrays = read_vision_folder(folder)
        if missing := [key for key in CONCEPTS if key not in arrays]:
            raise ValueError(f"{str(folder)!r} is no safety checker: it holds no {missing[0]}.")
        self._concepts = [np.asarray(arrays.pop(key), "float32") for key in CONCEPTS]
        self._arrays = arrays
        size = vision_encoder_arguments(self._config)["image_size"]
        beside = folder.parent / "feature_extractor"
        self._preparation = read_feature_extractor(beside if beside.is_dir() else folder, size)

    def build_encoder(self, dtype=None):
        """The `VisionEncoder` that pictures are looked at with."""
        return build_vision_encoder(self._config, self._arrays, str(self.folder), dtype)

    def prepare(self, images):
        """uint8 (B, H, W, 3) → what the vision encoder takes, float32 (B, S, S, 3)."""
        return extract([Image.fromarray(image) for image in images], self._preparation)

    def flags(self, embeddings):
        """Which pictures are to be blacked out.

        Args:
            embeddings: (B, width), the vision encoder's.

        Returns:
            bool (B,).
        """
        concepts, thresholds, special, special_thresholds = self._concepts
        near = np.round(_cosines(embeddings, special) - special_thresholds, 3) > 0
        adjustment = np.where(near.any(axis=1, keepdims=True), np.float32(ADJUSTMENT), np.float32(0))
        return (np.round(_cosines(embeddings, concepts) - thresholds + adjustment, 3) > 0).any(axis=1)


def _cosines(a, b):
    """Cosines of the angles between (B, width) and (N, width): (B, N)."""
    a, b = (np.asarray(x, "float32") for x in (a, b))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T
