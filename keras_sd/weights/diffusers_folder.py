"""Models to and from a folder in the diffusers layout: `text_encoder/`, `unet/`, `vae/`, each a config and weights.

Reference: the configs and state dicts of diffusers 0.42 and transformers 5, and the checkpoints of 2022 that lack some
of their fields.
"""

import functools
import pathlib
import re
import shutil

import numpy as np

from keras_sd.models import Decoder, DiffusionModel, ImageEncoder, TextEncoder
from keras_sd.weights.assign import assign_state_dict, to_state_dict, without_values
from keras_sd.weights.files import atomic_file, read_arrays, read_json, write_json, write_safetensors
from keras_sd.weights.int8 import expect_int8, float_state_dict, int8_state_dict

COMPONENTS = ("text_encoder", "unet", "vae")
COMPANIONS = ("safety_checker", "feature_extractor", "image_encoder")


def _weight_files(stem, torch_stem):
    """Names to look for, the best first; `.bin` is read with torch."""
    names = f"{stem}.safetensors", f"{torch_stem}.bin"
    return tuple(name + suffix for name in names for suffix in ("", ".index.json"))


WEIGHT_FILES = {
    "text_encoder": _weight_files("model", "pytorch_model"),
    "unet": _weight_files("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": _weight_files("diffusion_pytorch_model", "diffusion_pytorch_model"),
}

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NO_IMAGE_ENCODER = ("image_encoder", "requires_safety_checker")  # fields that the ×4 upscaler's index does not have

ATTENTION_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}

# === Configs → arguments of the models ===


def text_encoder_arguments(config):
    """Arguments of `TextEncoder` from a transformers CLIP text config."""
    require(config, "text_encoder", layer_norm_eps=(1e-5,), hidden_act=("quick_gelu", "gelu"))
    defaults = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
    }
    return {name: config.get(name, default) for name, default in defaults.items()}


def diffusion_model_arguments(config, component="unet"):
    """Arguments of `DiffusionModel` from a `UNet2DConditionModel` config; errors call it that of `component`."""
    widths = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(widths)
    require(
        config,
        component,
        act_fn=("silu", "swish"),
        center_input_sample=(False,),
        flip_sin_to_cos=(True,),
        freq_shift=(0,),
        downsample_padding=(1,),
        mid_block_scale_factor=(1, 1.0),
        mid_block_type=("UNetMidBlock2DCrossAttn",),
        norm_eps=(1e-5,),
        transformer_layers_per_block=(1, [1] * levels),
        mid_block_only_cross_attention=(None, False),
        dual_cross_attention=(False,),
        cross_attention_norm=(None,),
        resnet_time_scale_shift=("default",),
        resnet_skip_time_act=(False,),
        resnet_out_scale_factor=(1, 1.0),
        time_embedding_type=("positional",),
        time_embedding_dim=(None, 4 * widths[0]),
        time_embedding_act_fn=(None,),
        timestep_post_act=(None,),
        conv_in_kernel=(3,),
        conv_out_kernel=(3,),
        attention_type=("default",),
        class_embed_type=(None,),
        addition_embed_type=(None,),
        encoder_hid_dim=(None,),
        time_cond_proj_dim=(None,),
        class_embeddings_concat=(False,),
    )
    for block in config.get("down_block_types", ()):
        if block not in ATTENTION_BLOCKS:
            raise ValueError(
                f"{component}/config.json: down_block_types holds {block!r}; known: {sorted(ATTENTION_BLOCKS)}."
            )
    attention = [ATTENTION_BLOCKS[block] for block in config.get("down_block_types", _default_down_blocks(levels))]
    up = [block.replace("Up", "Down") for block in config.get("up_block_types", ())]
    if up and [ATTENTION_BLOCKS.get(block) for block in reversed(up)] != attention:
        raise ValueError(
            f"{component}/config.json: up_block_types {config['up_block_types']} do not mirror down_block_types."
        )
    # diffusers calls the number of heads "attention_head_dim", a name that its first checkpoints made permanent.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    only_cross_attention = config.get("only_cross_attention", False)
    if only_cross_attention is True:  # then that of the middle block follows it
        raise ValueError(
            f"{component}/config.json: only_cross_attention is True; only False or one per level is supported."
        )
    return dict(
        in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4),
        block_out_channels=widths,
        layers_per_block=_one_number(config.get("layers_per_block", 2), f"{component}/config.json: layers_per_block"),
        attention_levels=tuple(attention),
        num_attention_heads=heads if isinstance(heads, int) else tuple(heads),
        cross_attention_dim=_one_number(
            config.get("cross_attention_dim", 1280), f"{component}/config.json: cross_attention_dim"
        ),
        use_linear_projection=config.get("use_linear_projection", False),
        norm_num_groups=config.get("norm_num_groups", 32),
        only_cross_attention=tuple(only_cross_attention) if only_cross_attention else False,
        num_class_embeds=config.get("num_class_embeds"),
    )


def autoencoder_arguments(config):
    """Arguments that `ImageEncoder` and `Decoder` share, from an `AutoencoderKL` config."""
    widths = tuple(config.get("block_out_channels", (64,)))
    require(
        config,
        "vae",
        down_block_types=(["DownEncoderBlock2D"] * len(widths),),
        up_block_types=(["UpDecoderBlock2D"] * len(widths),),
        act_fn=("silu", "swish"),
        mid_block_add_attention=(True,),
        use_quant_conv=(True,),
        use_post_quant_conv=(True,),
        shift_factor=(None, 0),
        latents_mean=(None,),
        latents_std=(None,),
        in_channels=(3,),
        out_channels=(3,),
    )
    return dict(
        latent_channels=config.get("latent_channels", 4),
        block_out_channels=widths,
        layers_per_block=config.get("layers_per_block", 1),
        norm_num_groups=config.get("norm_num_groups", 32),
        # The checkpoints of 2022 do not carry it.
        scaling_factor=config.get("scaling_factor", 0.18215),
    )


# === Models → configs ===


def text_encoder_config(model, tokenizer=None):
    """The transformers config of a `TextEncoder`; with the special tokens' ids where a tokenizer is given."""
    arguments = _widths(model)
    ids = {"bos_token_id": "start_id", "eos_token_id": "end_id", "pad_token_id": "pad_id"}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **arguments,
        "attention_dropout": 0.0,
        **({} if tokenizer is None else {field: getattr(tokenizer, name) for field, name in ids.items()}),
        "layer_norm_eps": 1e-5,
        "projection_dim": arguments["hidden_size"],
        # Whatever the file holds: transformers would open the text encoder in its dtype, diffusers the rest in float32.
        "dtype": "float32",
    }


def diffusion_model_config(model, sample_size):
    """The `UNet2DConditionModel` config of a `DiffusionModel`; `sample_size` is the latent's default side."""
    arguments = _widths(model)
    attends = arguments.pop("attention_levels")
    heads = arguments.pop("num_attention_heads")
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.0",
        **arguments,
        "attention_head_dim": heads,
        "sample_size": sample_size,
        "act_fn": "silu",
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
    }


def autoencoder_config(model, sample_size):
    """The `AutoencoderKL` config of an `ImageEncoder` or `Decoder`; `sample_size` is the picture's default side."""
    arguments = _widths(model)
    levels = len(arguments["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.0",
        **arguments,
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": sample_size,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


# === State dicts ===


def text_encoder_state_dict(arrays):
    """The state dict in the naming of `TextEncoder`, whatever version of transformers wrote it."""
    prefix = "" if any(key.startswith("text_model.") for key in arrays) else "text_model."
    return {prefix + key: array for key, array in arrays.items() if not key.endswith(".position_ids")}


def unet_state_dict(arrays, linear):
    """The state dict in the naming of `DiffusionModel`; projections are Dense with `linear`, else 1×1 convolutions."""
    return {key: _projection(array, linear) if ".proj_" in key else array for key, array in arrays.items()}


def vae_state_dict(arrays):
    """The state dict in the naming of `ImageEncoder` and `Decoder`, whatever its age."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, array in arrays.items():
        key = re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)
        renamed[key] = _projection(array, True) if ".attentions.0.to_" in key else array
    return renamed


def is_encoder_key(key):
    """Whether a key of the VAE belongs to the encoder half."""
    return key.startswith(("encoder.", "quant_conv."))


def _projection(array, linear):
    if array.ndim == 4 and linear:
        return array[:, :, 0, 0]
    if array.ndim == 2 and not linear:
        return array[:, :, None, None]
    return array


# === Folders ===


def read_component(folder, component, variant=None):
    """Config and state dict of one component of a diffusers folder.

    Args:
        folder: path of the model's folder.
        component: "text_encoder", "unet" or "vae".
        variant: e.g. "fp16", for `diffusion_pytorch_model.fp16.safetensors`; also found where it is the only file.

    Returns:
        (config, dict of key → array).

    Raises:
        FileNotFoundError: the folder lacks the config or every weight file.
    """
    folder = pathlib.Path(folder) / component
    config = read_json(folder / "config.json")
    return config, read_arrays(weight_file(folder, WEIGHT_FILES[component], variant))


def weight_file(folder, names, variant=None):
    """The first of the files that is there, as in `read_component`; `variant` as there."""
    variants = [re.sub(r"^(\w+)\.", rf"\1.{v}.", name) for v in ([variant] if variant else ["fp16"]) for name in names]
    candidates = [*variants, *names] if variant else [*names, *variants]
    path = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"No weights in {str(folder)!r}; one of {', '.join(names)} should be there.")
    return path


def build_text_encoder(config, arrays, source, dtype=None):
    """A `TextEncoder` with the given weights."""
    with without_values():
        model = TextEncoder(**text_encoder_arguments(config), dtype=dtype)
    assign_state_dict(model, text_encoder_state_dict(arrays), source)
    return model


def build_diffusion_model(config, arrays, source, dtype=None):
    """A `DiffusionModel` with the given weights."""
    with without_values():
        model = DiffusionModel(**diffusion_model_arguments(config), dtype=dtype)
        expect_int8(model, arrays, source)
    assign_state_dict(model, unet_state_dict(arrays, model.arguments["use_linear_projection"]), source)
    return model


def build_image_encoder(config, arrays, source, dtype=None):
    """An `ImageEncoder` with the encoder half of a VAE's weights."""
    return _build_half(ImageEncoder, True, config, arrays, source, dtype)


def build_decoder(config, arrays, source, dtype=None):
    """A `Decoder` with the decoder half of a VAE's weights."""
    return _build_half(Decoder, False, config, arrays, source, dtype)


def _build_half(cls, encoder, config, arrays, source, dtype):
    with without_values():
        model = cls(**autoencoder_arguments(config), dtype=dtype)
    halves = {key: array for key, array in vae_state_dict(arrays).items() if is_encoder_key(key) == encoder}
    assign_state_dict(model, halves, source)
    return model


def write_component(folder, component, config, models, dtype=None):
    """Writes config and weights of one component, each file under a temporary name first.

    Args:
        folder: path of the model's folder; it is made where it does not exist.
        component: "text_encoder", "unet" or "vae".
        config: dict for `config.json`.
        models: the Keras models whose variables the file holds.
        dtype: NumPy dtype to store the weights in; by default that of the variables. "int8" is kernels in int8, and
            the rest in that of the variables, see `keras_sd.weights.int8`.
    """
    folder = pathlib.Path(folder) / component
    state_dict = to_state_dict
    if dtype:
        state_dict = int8_state_dict if np.dtype(dtype) == "int8" else functools.partial(float_state_dict, dtype=dtype)
    arrays = {key: array for model in models for key, array in state_dict(model).items()}
    write_json(folder / "config.json", config)
    write_safetensors(folder / WEIGHT_FILES[component][0], arrays)


def write_folder(
    folder,
    tokenizer,
    text_encoder,
    diffusion_model,
    image_encoder,
    decoder,
    scheduler,
    image_size,
    dtype=None,
    upscaler=None,
    companions=None,
):
    """Writes a whole model in the diffusers layout, `model_index.json` last.

    Args:
        folder: path; it is made where it does not exist.
        tokenizer: a `CLIPTokenizer`.
        text_encoder, diffusion_model, image_encoder, decoder: the four models.
        scheduler: config of the scheduler, a dict in the fields of diffusers.
        image_size: default (height, width) in pixels.
        dtype: NumPy dtype of the weights; by default that of the variables. "int8" is the U-Net's, see
            `keras_sd.weights.int8`; the others then keep that of their variables.
        upscaler: of a ×4 upscaler, (config of the low-resolution picture's scheduler, largest noise level).
        companions: what is copied beside it, as `companions` gives it.
    """
    folder = pathlib.Path(folder)
    factor = 2 ** (len(decoder.arguments["block_out_channels"]) - 1)
    side = max(image_size)
    tokenizer.save(folder / "tokenizer")
    other = None if dtype and np.dtype(dtype) == "int8" else dtype
    write_component(folder, "text_encoder", text_encoder_config(text_encoder, tokenizer), [text_encoder], other)
    write_component(folder, "unet", diffusion_model_config(diffusion_model, side // factor), [diffusion_model], dtype)
    write_component(folder, "vae", autoencoder_config(decoder, side), [image_encoder, decoder], other)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {**MODEL_INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
    for name, (source, entry) in (companions or {}).items():
        _copy_folder(source, folder / name)
        index |= {name: entry} | ({"requires_safety_checker": True} if name == "safety_checker" else {})
    if upscaler:
        low_res_scheduler, max_noise_level = upscaler
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", low_res_scheduler)
        index = {key: value for key, value in index.items() if key not in NO_IMAGE_ENCODER} | {
            "_class_name": "StableDiffusionUpscalePipeline",
            "low_res_scheduler": ["diffusers", low_res_scheduler["_class_name"]],
            "max_noise_level": max_noise_level,
            "watermarker": [None, None],
        }
    write_json(folder / "model_index.json", index)


def require(config, component, **allowed):
    """Raises where a field of the config has a value that the model does not implement."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"{component}/config.json: {name} is {config[name]!r}; only {known} is supported.")


def companions(folder):
    """What a folder holds beside what drawing needs: dict name → (its folder, its entry in `model_index.json`)."""
    folder = pathlib.Path(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    names = [name for name in COMPANIONS if (folder / name).is_dir() and any(index.get(name) or ())]
    return {name: (folder / name, index[name]) for name in names}


def _copy_folder(source, target):
    for path in pathlib.Path(source).rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file() and not (copy.exists() and copy.samefile(path)):
            with open(path, "rb") as file, atomic_file(copy) as part:
                shutil.copyfileobj(file, part)


def _one_number(value, name):
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ValueError(f"{name} is {value!r}; only one value for all levels is supported.")
    return values.pop()


def _default_down_blocks(levels):
    return ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]


def _widths(model):
    arguments = {k: v for k, v in model.arguments.items() if k not in ("name", "dtype")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
