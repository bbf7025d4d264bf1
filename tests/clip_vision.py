"""CLIP vision models with random weights, written by transformers and diffusers."""

import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 24,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def randomized(model, seed=0):
    """Every tensor should matter: norms start as the identity, biases as zero, embeddings close to it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "embed" in name else 0.1) * torch.randn_like(parameter))
    return model.eval()


def write_image_encoder(folder, **changes):
    """A `CLIPVisionModelWithProjection`; returns the model."""
    torch.manual_seed(0)
    model = randomized(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION | changes)))
    model.save_pretrained(folder)
    return model


def write_safety_checker(folder, threshold=0.1, special=0.1):
    """`safety_checker/` and `feature_extractor/` in a folder, with thresholds around a number; returns both."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    checker = randomized(StableDiffusionSafetyChecker(config))
    with torch.no_grad():
        for name, value in (("concept_embeds", threshold), ("special_care_embeds", special)):
            getattr(checker, name).copy_(torch.randn(getattr(checker, name).shape))
            weights = getattr(checker, f"{name}_weights")
            weights.copy_(value + 0.05 * torch.randn(weights.shape))
    processor = transformers.CLIPImageProcessorPil(size=56, crop_size=56)
    checker.save_pretrained(folder / "safety_checker")
    processor.save_pretrained(folder / "feature_extractor")
    return checker, processor
