"""Single-file checkpoints (CompVis and Stability names) to diffusers names and back.

A file's layout follows from three numbers of its U-Net and two of its VAE, so each mapping is a table, written out
for that layout: every module of the file, and what diffusers calls it. Tables are total and work both ways.

Reference: https://github.com/CompVis/stable-diffusion, https://github.com/Stability-AI/stablediffusion.
"""

import json
import re
from pathlib import Path

import numpy as np

from keras_sd.weights.files import read_arrays, read_metadata, write_safetensors

UNET, VAE, TEXT, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)

# Tensors that drawing a picture does not need.
IGNORED = re.compile(
    r"model_ema\..*"  # the moving averages, unless they are asked for
    r"|(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|scale_factor)"
    r"|global_step|denoiser\.sigmas"
    r"|first_stage_model\.(loss|model_ema)\..*"
    r"|cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|cond_stage_model\.((transformer|model)\.)?(logit_scale|text_projection(\.weight)?|attn_mask)"
)


# === Tables of names ===

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = ["norm", "proj_in", "proj_out"] + [
    f"transformer_blocks.0.{name}"
    for name in [f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")]
    + ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
]
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _under(prefix, new_prefix, names):
    return {f"{prefix}.{old}": f"{new_prefix}.{new}" for old, new in names.items()}


def unet_names(layers_per_block, down_attention, up_attention):
    """Table of the U-Net's modules: CompVis name -> diffusers name.

    Args:
        layers_per_block: residual blocks per level of the way down; the way up has one more.
        down_attention, up_attention: whether each level has spatial transformers, in order of execution.
    """
    transformer = {name: name for name in _TRANSFORMER}
    names, levels = dict(_UNET_ENDS), len(down_attention)
    for level in range(levels):
        first = 1 + level * (layers_per_block + 1)
        for layer in range(layers_per_block):
            old, new = f"input_blocks.{first + layer}", f"down_blocks.{level}"
            names |= _under(f"{old}.0", f"{new}.resnets.{layer}", _UNET_RESNET)
            if down_attention[level]:
                names |= _under(f"{old}.1", f"{new}.attentions.{layer}", transformer)
        if level < levels - 1:
            names[f"input_blocks.{first + layers_per_block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(layers_per_block + 1):
            old, new = f"output_blocks.{level * (layers_per_block + 1) + layer}", f"up_blocks.{level}"
            names |= _under(f"{old}.0", f"{new}.resnets.{layer}", _UNET_RESNET)
            if up_attention[level]:
                names |= _under(f"{old}.1", f"{new}.attentions.{layer}", transformer)
        if level < levels - 1:
            names[f"{old}.{2 if up_attention[level] else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    names |= _under("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    names |= _under("middle_block.1", "mid_block.attentions.0", transformer)
    return names | _under("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)


def vae_names(layers_per_block, levels):
    """Table of the autoencoder's modules: CompVis name -> diffusers name. CompVis counts the way up backwards."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        for old, new in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
            names[f"{side}.{old}"] = f"{side}.{new}"
        for i in (0, 1):
            names |= _under(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}", _VAE_RESNET)
        names |= _under(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers_per_block):
            names |= _under(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
        for layer in range(layers_per_block + 1):
            names |= _under(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
        if level < levels - 1:
            names[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return names


# === What a file's own keys and shapes say ===


def _count(keys, pattern):
    """One more than the highest number that `pattern` finds."""
    return max((int(found[1]) for key in keys if (found := re.match(pattern, key))), default=-1) + 1


def _tables(arrays):
    """The U-Net's and the VAE's table for the layout of a single file; an empty one for a model that is not there."""
    unet = vae = {}
    blocks = _count(arrays, re.escape(UNET) + r"input_blocks\.(\d+)\.")
    if blocks > 1:
        downsamplers = [i for i in range(blocks) if f"{UNET}input_blocks.{i}.0.op.weight" in arrays]
        layers = min(downsamplers, default=blocks) - 1
        starts = range(0, _count(arrays, re.escape(UNET) + r"output_blocks\.(\d+)\."), layers + 1)
        down = tuple(f"{UNET}input_blocks.{1 + start}.1.norm.weight" in arrays for start in starts)
        up = tuple(f"{UNET}output_blocks.{start}.1.norm.weight" in arrays for start in starts)
        unet = {"layers_per_block": max(layers, 1), "down_attention": down, "up_attention": up}
    levels = _count(arrays, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    if levels:
        layers = _count(arrays, re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\.")
        vae = {"layers_per_block": layers, "levels": levels}
    return unet, vae


def _open_clip_layers(arrays):
    """(layers in the file, layers that Stable Diffusion 2 uses of them)."""
    layers = _count(arrays, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.")
    # SD v2 reads the output before the last layer; files that were converted from diffusers no longer have that layer
    whole_tower = f"{OPEN_CLIP}text_projection" in arrays or layers == 24
    return layers, layers - whole_tower


def single_file_config(arrays, prediction_type=None, heads=None, text_heads=None):
    """The configuration of each model in a single file, as diffusers and transformers write it in `config.json`.

    Args:
        arrays: dict name -> array, the file as `read_arrays` gives it.
        prediction_type: `"epsilon"` or `"v_prediction"`. Weights do not tell; by default it is `"epsilon"` for v1 and
            for a v2 file whose `global_step` is that of v2-base (875000), else `"v_prediction"`, as in diffusers.
        heads: attention heads of the U-Net: a number, or one per level; 8 for v1, 64 channels each for v2.
        text_heads: attention heads of the text encoder; 64 channels each.

    Returns:
        Dict with `scheduler` and `tokenizer`, and `unet`, `vae`, `text_encoder` as far as the file holds them.

    Raises:
        ValueError: the file is no Stable Diffusion v1 or v2 single file.
    """
    _check_family(arrays)
    open_clip = any(key.startswith(OPEN_CLIP) for key in arrays)
    unet, vae = _tables(arrays)
    config = {}
    if unet:
        config["unet"] = _unet_config(arrays, heads, **unet)
        open_clip |= config["unet"]["use_linear_projection"]  # of a file that holds no text encoder
    if vae:
        config["vae"] = _vae_config(arrays, **vae)
    text = _text_config(arrays, text_heads)
    if text:
        config["text_encoder"] = text
    if prediction_type is None:
        base = int(arrays.get("global_step", 0)) == 875000
        prediction_type = "v_prediction" if open_clip and not base else "epsilon"
    config["scheduler"] = {
        "_class_name": "DDIMScheduler" if open_clip else "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    config["tokenizer"] = {"pad_token": "!" if open_clip else "<|endoftext|>", "model_max_length": 77}
    return config


def prediction_type_beside(path):
    """`prediction_type` as the `.yaml` of the same name beside a checkpoint states it; None where there is none."""
    yaml = Path(path).with_suffix(".yaml")
    if not yaml.is_file():
        return None
    found = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", yaml.read_text("utf-8", "replace"), re.MULTILINE)
    return "v_prediction" if found and found[1] == "v" else "epsilon"


def _shape(arrays, key):
    if key not in arrays:
        raise ValueError(f"The checkpoint is damaged: it has no {key}.")
    return arrays[key].shape


def _unet_config(arrays, heads, layers_per_block, down_attention, up_attention):
    def shape(key):
        return _shape(arrays, f"{UNET}{key}.weight")

    starts = [1 + level * (layers_per_block + 1) for level in range(len(down_attention))]
    channels = [shape(f"input_blocks.{start}.0.out_layers.3")[0] for start in starts]
    linear = len(shape("middle_block.1.proj_in")) == 2
    if heads is None:
        heads = [max(width // 64, 1) for width in channels] if linear else 8
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shape("input_blocks.0.0")[1],
        "out_channels": shape("out.2")[0],
        "block_out_channels": channels,
        "layers_per_block": layers_per_block,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in down_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up_attention],
        "cross_attention_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k")[1],
        "attention_head_dim": heads,  # diffusers means the number of heads by this name
        "use_linear_projection": linear,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
    }


def _vae_config(arrays, layers_per_block, levels):
    def shape(key):
        return _shape(arrays, f"{VAE}{key}.weight")

    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shape("encoder.conv_in")[1],
        "out_channels": shape("decoder.conv_out")[0],
        "latent_channels": shape("decoder.conv_in")[1],
        "block_out_channels": [shape(f"encoder.down.{level}.block.0.conv2")[0] for level in range(levels)],
        "layers_per_block": layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "act_fn": "silu",
    }


def _text_config(arrays, heads):
    if any(key.startswith(OPEN_CLIP) for key in arrays):
        _, layers = _open_clip_layers(arrays)
        positions, words = f"{OPEN_CLIP}positional_embedding", f"{OPEN_CLIP}token_embedding.weight"
        hidden, activation = f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight", "gelu"
    elif any(key.startswith(TEXT) for key in arrays):
        root = f"{TEXT}text_model." if any(key.startswith(f"{TEXT}text_model.") for key in arrays) else TEXT
        layers = _count(arrays, re.escape(root) + r"encoder\.layers\.(\d+)\.")
        positions, words = (f"{root}embeddings.{name}_embedding.weight" for name in ("position", "token"))
        hidden, activation = f"{root}encoder.layers.0.mlp.fc1.weight", "quick_gelu"
    else:
        return None
    width = _shape(arrays, words)[1]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": _shape(arrays, words)[0],
        "max_position_embeddings": _shape(arrays, positions)[0],
        "hidden_size": width,
        "intermediate_size": _shape(arrays, hidden)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads or max(width // 64, 1),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def _check_family(arrays):
    if any(key.startswith((UNET, VAE, TEXT, OPEN_CLIP)) for key in arrays):
        foreign = next(
            (key for key in arrays if key.startswith(("conditioner.", "text_encoders.", "control_model."))), None
        )
        if foreign is None:
            return
        raise ValueError(f"The checkpoint is of another family than Stable Diffusion v1 or v2: it holds {foreign}.")
    first = next(iter(arrays), "nothing")
    raise ValueError(
        "The checkpoint is no Stable Diffusion single file: "
        f"no key begins with {UNET}, {VAE} or cond_stage_model. (its first is {first})."
    )


# === Files ===


METADATA = "keras_sd.config"  # JSON: `single_file_config` of the model, of which names and shapes tell the most only


def read_single_file(path):
    """Reads a single file.

    Returns:
        (config as of `single_file_config`, components as of `split_single_file`). What the file's metadata says is more
        than names and shapes do; only files from here have it.

    Raises: as `read_arrays`, `single_file_config` and `split_single_file`.
    """
    arrays = read_arrays(path)
    config = single_file_config(arrays, prediction_type_beside(path))
    return config | metadata_config(path), split_single_file(arrays)


def metadata_config(path):
    """The configs that `write_single_file` put into a file; an empty dict where there are none."""
    try:
        return json.loads(read_metadata(path).get(METADATA, "{}"))
    except json.JSONDecodeError:
        raise ValueError(f"{str(path)!r} is damaged: its metadata {METADATA} is no JSON.") from None


def write_single_file(path, models, config, dtype=None):
    """Writes models as a `.safetensors` file, whole or not at all.

    Args:
        path: file to write.
        models: dict with `text_encoder`, `unet`, `vae`; each a list of the Keras models whose variables it holds.
        config: dict with the configs of those and of the `scheduler`, as in a diffusers folder.
        dtype: NumPy dtype of the weights; by default that of the variables.

    Raises:
        ValueError: a tensor has no place in a single file; the message names it.
    """
    from keras_sd.weights.int8 import float_state_dict  # which imports Keras

    components = {}
    for name, parts in models.items():
        components[name] = {key: array for part in parts for key, array in float_state_dict(part, dtype).items()}
    open_clip = config["text_encoder"]["hidden_act"] == "gelu"
    arrays = to_single_file(components, open_clip)
    again = split_single_file(arrays)
    lost = [key for name, own in components.items() for key in own if key not in again.get(name, {})]
    if lost:
        raise ValueError(f"The key {lost[0]} has no place in a single file of Stable Diffusion v1 or v2.")
    if open_clip and config["scheduler"].get("prediction_type", "epsilon") == "epsilon":
        arrays["global_step"] = np.asarray(875000)  # the step of v2-base, by which readers tell it from v2
    write_safetensors(path, arrays, {"format": "pt", METADATA: json.dumps(config)})


# === Renaming ===


def unet_entry(key, array, table):
    """`(key, array)` of the file -> `[("unet", diffusers key, array)]`; None where the table does not hold it."""
    module, _, kind = key.removeprefix(UNET).rpartition(".")
    return [("unet", f"{table[module]}.{kind}", array)] if module in table and kind in ("weight", "bias") else None


def vae_entry(key, array, table):
    """`(key, array)` -> `[("vae", diffusers key, array)]`: CompVis's 1×1 convolutions in the attention are dense."""
    module, _, kind = key.removeprefix(VAE).rpartition(".")
    if module not in table or kind not in ("weight", "bias"):
        return None
    name = f"{table[module]}.{kind}"
    return [("vae", name, array.reshape(array.shape[:2]) if _is_vae_projection(name) else array)]


def text_entry(key, array):
    """`(key, array)` of SD v1 -> `[("text_encoder", transformers key, array)]`; some files lack `text_model.`"""
    return [("text_encoder", "text_model." + key.removeprefix(TEXT).removeprefix("text_model."), array)]


def open_clip_entry(key, array, layers):
    """`(key, array)` of SD v2 -> `[("text_encoder", transformers key, array), …]`: q, k and v come apart.

    The layers after the first `layers` are not used and give an empty list.
    """
    key = key.removeprefix(OPEN_CLIP)
    if key in _OPEN_CLIP_ENDS:
        return [("text_encoder", _OPEN_CLIP_ENDS[key], array)]
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", key)
    if not found:
        return None
    layer, module, kind = found.groups()
    if int(layer) >= layers:
        return []
    root = f"text_model.encoder.layers.{layer}"
    if module == "attn.in_proj":
        parts = zip("qkv", np.split(array, 3))
        return [("text_encoder", f"{root}.self_attn.{part}_proj.{kind}", values) for part, values in parts]
    if module in _OPEN_CLIP_LAYER:
        return [("text_encoder", f"{root}.{_OPEN_CLIP_LAYER[module]}.{kind}", array)]
    return None


def _is_vae_projection(name):
    return re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name) is not None


def split_single_file(arrays, ema=False):
    """Rename a whole single file.

    Args:
        arrays: dict name -> array, the file as `read_arrays` gives it.
        ema: take the U-Net's moving averages (`model_ema.*`), which some files hold beside the raw weights.

    Returns:
        Dict of `unet`, `vae` and `text_encoder`, as far as the file holds them; each a dict diffusers (transformers)
        name -> array. Arrays are views of those given.

    Raises:
        ValueError: a key is not understood, or averages are asked for and not there; the message names the key.
    """
    _check_family(arrays)
    unet, vae = _tables(arrays)
    unet = unet_names(**unet) if unet else {}
    vae = vae_names(**vae) if vae else {}
    _, layers = _open_clip_layers(arrays)
    components = {}
    for key, array in arrays.items():
        entries = None
        if IGNORED.fullmatch(key):
            entries = []
        elif key.startswith(UNET):
            entries = unet_entry(key, _average(arrays, key) if ema else array, unet)
        elif key.startswith(VAE):
            entries = vae_entry(key, array, vae)
        elif key.startswith(TEXT):
            entries = text_entry(key, array)
        elif key.startswith(OPEN_CLIP):
            entries = open_clip_entry(key, array, layers)
        if entries is None:
            raise ValueError(
                f"The checkpoint's key {key} is not understood: it belongs to no Stable Diffusion v1 or v2."
            )
        for component, name, values in entries:
            components.setdefault(component, {})[name] = values
    return components


def _average(arrays, key):
    name = "model_ema." + key.removeprefix("model.").replace(".", "")
    if name not in arrays:
        raise ValueError(f"The checkpoint holds no moving averages (ema=True): there is no {name}.")
    return arrays[name]


def to_single_file(components, open_clip=False):
    """The inverse of `split_single_file`.

    Args:
        components: dict with `unet`, `vae`, `text_encoder`, or some of them; each a dict diffusers name -> array.
        open_clip: write the text encoder in OpenCLIP's names, as SD v2 files have them.

    Returns:
        Dict name -> array with the names of CompVis's checkpoints.
    """
    file = {}
    if unet := components.get("unet"):
        levels = range(_count(unet, r"(?:down|up)_blocks\.(\d+)\."))
        down, up = (
            tuple(f"{way}_blocks.{level}.attentions.0.norm.weight" in unet for level in levels)
            for way in ("down", "up")
        )
        layers = _count(unet, r"down_blocks\.0\.resnets\.(\d+)\.")
        file |= _inverted(unet, unet_names(layers, down, up), UNET)
    if vae := components.get("vae"):
        levels = _count(vae, r"encoder\.down_blocks\.(\d+)\.")
        layers = _count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
        arrays = {key: array[..., None, None] if _is_vae_projection(key) else array for key, array in vae.items()}
        file |= _inverted(arrays, vae_names(layers, levels), VAE)
    text = {
        "text_model." + key.removeprefix("text_model."): array
        for key, array in components.get("text_encoder", {}).items()
    }
    if not open_clip:
        return file | {TEXT + key: array for key, array in text.items()}
    ends = {new: old for old, new in _OPEN_CLIP_ENDS.items()}
    modules = {new: old for old, new in _OPEN_CLIP_LAYER.items()}
    for key, array in text.items():
        if key in ends:
            file[OPEN_CLIP + ends[key]] = array
            continue
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        layer, module, kind = found.groups() if found else (None, None, None)
        if module in modules:
            file[f"{OPEN_CLIP}transformer.resblocks.{layer}.{modules[module]}.{kind}"] = array
        elif module == "self_attn.q_proj":
            parts = [text[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            file[f"{OPEN_CLIP}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = np.concatenate(parts)
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"The text encoder's key {key} has no place in a single file.")
    return file


def _inverted(arrays, table, prefix):
    table = {new: old for old, new in table.items()}
    file = {}
    for key, array in arrays.items():
        module, _, kind = key.rpartition(".")
        if module not in table:
            raise ValueError(f"The key {key} has no place in a single file of Stable Diffusion v1 or v2.")
        file[f"{prefix}{table[module]}.{kind}"] = array
    return file
