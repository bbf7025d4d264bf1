"""ControlNets to and from files: diffusers' folders and files, and the original naming.

| on disk | naming |
|---|---|
| folder with `config.json` | diffusers |
| `.safetensors`, `.bin` with `controlnet_cond_embedding.…` | diffusers (and `config.json` beside it, if any) |
| `.pth`, `.safetensors`, `.ckpt` with `control_model.…`, or without that prefix | that of the original code |

A file of the original code may hold the whole Stable Diffusion that the network was trained with: that is not used.

Reference: https://github.com/lllyasviel/ControlNet, `cldm/cldm.py`; the config and state dict of diffusers 0.42.
"""

import pathlib
import re

from keras_sd.models import ControlNet
from keras_sd.presets import locate_model
from keras_sd.weights.assign import assign_state_dict, to_state_dict, without_values
from keras_sd.weights.diffusers_folder import (
    WEIGHT_FILES,
    diffusion_model_arguments,
    diffusion_model_config,
    require,
    unet_state_dict,
    weight_file,
)
from keras_sd.weights.files import read_arrays, read_json, write_json, write_safetensors
from keras_sd.weights.single_file import IGNORED, OPEN_CLIP, TEXT, UNET, VAE, unet_names

FILES = WEIGHT_FILES["unet"]  # diffusers names the two alike
PREFIX = "control_model."
EMBEDDING = "controlnet_cond_embedding"
HINT_WIDTHS = 16, 32, 96, 256  # of configs that do not say it


def load_control_net(path, dtype=None):
    """Opens a ControlNet.

    Args:
        path: folder or file in one of the forms above, or `hf://owner/name[/file][@revision]`. Where no `config.json`
            says it, heads are counted as Stable Diffusion has them: 8 in v1, one for 64 channels in v2.
        dtype: Keras dtype policy; by default Keras' own setting.

    Returns:
        `ControlNet`.

    Raises:
        FileNotFoundError: nothing is there, or the folder lacks its config or weights.
        ValueError: it is no ControlNet for Stable Diffusion v1 or v2, or damaged; the first key that does not fit is
            named. Nothing in a file is executed.
    """
    path = locate_model(path)
    if not path.exists():
        raise FileNotFoundError(f"No ControlNet at {str(path)!r}: give a folder, a file or hf://owner/name.")
    source, config = repr(str(path)), None
    if path.is_dir():
        config, path = read_json(path / "config.json"), weight_file(path, FILES)
    arrays = read_arrays(path)
    if f"{EMBEDDING}.conv_in.weight" not in arrays:
        arrays = original_state_dict(arrays, source)
    elif config is None and (path.parent / "config.json").is_file():
        beside = read_json(path.parent / "config.json")
        config = beside if beside.get("_class_name") == "ControlNetModel" else None
    arguments = control_net_arguments(config_of(arrays, source) if config is None else config)
    with without_values():
        net = ControlNet(**arguments, dtype=dtype)
    assign_state_dict(net, unet_state_dict(arrays, arguments["use_linear_projection"]), source)
    return net


def save_control_net(net, folder, dtype=None):
    """Writes a ControlNet as a folder that diffusers opens.

    Args:
        net: a `ControlNet`.
        folder: where to; it is made. Each file appears when it is whole.
        dtype: NumPy dtype of the weights, e.g. "float16"; by default that of the variables.
    """
    folder, arrays = pathlib.Path(folder), to_state_dict(net)
    if dtype:
        arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    write_safetensors(folder / FILES[0], arrays)
    write_json(folder / "config.json", control_net_config(net))


# === Configs ===


def control_net_arguments(config):
    """Arguments of `ControlNet` from diffusers' config."""
    require(
        config,
        "control_net",
        _class_name=("ControlNetModel",),
        conditioning_channels=(3,),
        controlnet_conditioning_channel_order=("rgb",),
        only_cross_attention=(False,),
        num_class_embeds=(None,),
    )
    arguments = diffusion_model_arguments(config, "control_net")
    for name in ("out_channels", "only_cross_attention", "num_class_embeds"):
        del arguments[name]
    return arguments | {
        "conditioning_embedding_out_channels": tuple(config.get("conditioning_embedding_out_channels") or HINT_WIDTHS),
        "global_pool_conditions": config.get("global_pool_conditions", False),
    }


def control_net_config(net):
    """diffusers' config of a `ControlNet`."""
    config = diffusion_model_config(net, None)
    for name in ("center_input_sample", "sample_size", "up_block_types"):
        del config[name]
    return config | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 3,
        "controlnet_conditioning_channel_order": "rgb",
    }


def config_of(arrays, source):
    """The config that the shapes of a state dict in diffusers' naming tell.

    Raises:
        ValueError: it is no ControlNet's; the message names what is missing.
    """

    def shape(key):
        if key not in arrays:
            raise ValueError(f"{source} is no ControlNet of Stable Diffusion v1 or v2: it has no {key}.")
        return arrays[key].shape

    def count(pattern):
        return max((int(found[1]) for key in arrays if (found := re.match(pattern, key))), default=-1) + 1

    levels, blocks = count(r"down_blocks\.(\d+)\."), count(rf"{EMBEDDING}\.blocks\.(\d+)\.")
    widths = [shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)]
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in arrays for level in range(levels)]
    linear = len(shape("mid_block.attentions.0.proj_in.weight")) == 2
    hint = [shape(f"{EMBEDDING}.blocks.{block}.weight")[0] for block in range(1, blocks, 2)]
    return {
        "in_channels": shape("conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "cross_attention_dim": shape("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "conditioning_embedding_out_channels": [shape(f"{EMBEDDING}.conv_in.weight")[0], *hint],
    }


# === The original naming ===


def original_names(levels, layers_per_block, down_attention, hint_blocks):
    """Table of a ControlNet's modules: name in the original code → diffusers' name.

    Args:
        levels, layers_per_block, down_attention: as in `keras_sd.weights.single_file.unet_names`.
        hint_blocks: convolutions between the first and the last of the picture's embedding.
    """
    unet = unet_names(layers_per_block, down_attention, [False] * levels)
    names = {old: new for old, new in unet.items() if not old.startswith(("output_blocks.", "out."))}
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (layers_per_block + 1))}
    names["middle_block_out.0"] = "controlnet_mid_block"
    hint = ["conv_in", *(f"blocks.{i}" for i in range(hint_blocks)), "conv_out"]
    return names | {f"input_hint_block.{2 * i}": f"{EMBEDDING}.{name}" for i, name in enumerate(hint)}


def original_state_dict(arrays, source):
    """The state dict of a file in the original naming, in diffusers' naming.

    Raises:
        ValueError: the file holds no ControlNet, or a key is not understood; the message names it.
    """
    prefix = PREFIX if any(key.startswith(PREFIX) for key in arrays) else ""
    own, foreign = {}, (UNET, VAE, TEXT, OPEN_CLIP)
    for key, array in arrays.items():
        if key.startswith(prefix) and (prefix or not IGNORED.fullmatch(key)):
            own[key.removeprefix(prefix)] = array
        elif not key.startswith(foreign) and not IGNORED.fullmatch(key):
            raise ValueError(f"{source} holds {key!r}, which belongs to no ControlNet of Stable Diffusion v1 or v2.")
    blocks = _numbers(own, r"input_blocks\.(\d+)\.")
    hint = _numbers(own, r"input_hint_block\.(\d+)\.")
    if not blocks or not hint:
        first = next(iter(own), next(iter(arrays), "nothing"))
        raise ValueError(f"{source} is no ControlNet: it has no input_hint_block (its first key is {first!r}).")
    downsamplers = [i for i in blocks if f"input_blocks.{i}.0.op.weight" in own]
    layers = max(min(downsamplers, default=len(blocks)) - 1, 1)
    starts = range(1, len(blocks), layers + 1)
    attention = tuple(f"input_blocks.{start}.1.norm.weight" in own for start in starts)
    table = original_names(len(starts), layers, attention, len(hint) - 2)
    renamed = {}
    for key, array in own.items():
        module, _, kind = key.rpartition(".")
        if module not in table or kind not in ("weight", "bias"):
            raise ValueError(f"{source} holds {prefix + key!r}, which belongs to no ControlNet of this layout.")
        renamed[f"{table[module]}.{kind}"] = array
    return renamed


def _numbers(keys, pattern):
    """The different numbers that `pattern` finds at the beginning of keys."""
    return sorted({int(found[1]) for key in keys if (found := re.match(pattern, key))})
