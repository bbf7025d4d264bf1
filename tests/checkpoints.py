"""Checkpoints with random weights, written by diffusers and transformers: what our numbers are compared with."""

import diffusers
import torch
import transformers

from keras_sd.tokenizer import CLIPTokenizer

MERGES = ["a p", "ap p", "l e</w>", "app le</w>", "a n</w>", "p e", "a r</w>", "pe ar</w>", "t w", "tw o</w>"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V1_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)

# What each checkpoint is made with; `text`, `unet` and `vae` are fields of the peers' configs.
CHECKPOINTS = {
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "unet": {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "sample_size": 8,
        },
        "vae": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
        "scheduler": diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
        ),
    },
    "narrow_v1": {
        "text": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 2},
        "unet": {
            "block_out_channels": (32, 64, 128, 128),
            "down_block_types": V1_BLOCKS,
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "sample_size": 8,
        },
        "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
        "scheduler": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    },
    "v2_like": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 23,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        },
        "unet": {
            "block_out_channels": (64, 128, 192, 192),
            "down_block_types": V1_BLOCKS,
            "layers_per_block": 2,
            "attention_head_dim": [1, 2, 3, 3],
            "use_linear_projection": True,
            "sample_size": 8,
        },
        "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
        "scheduler": diffusers.DDIMScheduler(
            **BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        "pad_token": "!",
    },
    # stabilityai/stable-diffusion-x4-upscaler, narrow and with one block per level
    "upscaler": {
        "text": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        },
        "unet": {
            "in_channels": 7,
            "block_out_channels": (32, 64, 64, 128),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            "only_cross_attention": (True, True, True, False),
            "num_class_embeds": 1000,
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "use_linear_projection": True,
            "sample_size": 16,
        },
        "vae": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "scaling_factor": 0.08333},
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        "low_res_scheduler": diffusers.DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"),
        "pad_token": "!",
    },
}


def write_checkpoint(name, folder):
    """Writes a diffusers folder with random weights and a tokenizer of its own; returns the folder."""
    recipe = CHECKPOINTS[name]
    torch.manual_seed(len(name))
    tokenizer = CLIPTokenizer(
        [merge.split(" ") for merge in MERGES], pad_token=recipe.get("pad_token", "<|endoftext|>")
    )
    tokenizer.save(folder / "tokenizer")
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    text = {"hidden_act": "quick_gelu", **recipe["text"], **ids, "vocab_size": tokenizer.vocab_size}
    down = recipe["unet"]["down_block_types"]
    levels = len(recipe["vae"]["block_out_channels"])
    models = {
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        "unet": diffusers.UNet2DConditionModel(
            **recipe["unet"],
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
            cross_attention_dim=recipe["text"]["hidden_size"],
        ),
        "vae": diffusers.AutoencoderKL(
            **recipe["vae"],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=64,
        ),
    }
    with torch.no_grad():  # norms start as the identity, biases as zero: every tensor should matter
        for model in models.values():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    parts = {
        **models,
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": recipe["scheduler"],
        "safety_checker": None,
        "feature_extractor": None,
    }
    if "low_res_scheduler" in recipe:
        parts["low_res_scheduler"] = recipe["low_res_scheduler"]
        pipeline = diffusers.StableDiffusionUpscalePipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder
