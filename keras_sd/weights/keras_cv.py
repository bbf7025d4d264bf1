"""KerasCV's `.h5` weights to models and back: the published files, and what `save_weights` writes under Keras 3.

KerasCV has two topologies, SD v1 and SD v2, so a file is an ordered list of layers, each a list of arrays. The
published layout (HDF5 of Keras 2) keeps that order; the layout of Keras 3 names every layer by its class, a counter and
the path of attributes inside. `LAYERS` says which layer of KerasCV holds which of our tensors, in the published order.

| file | model |
|---|---|
| `kcv_encoder.h5` | `TextEncoder` |
| `kcv_diffusion_model.h5` | `DiffusionModel` |
| `kcv_decoder.h5` | `Decoder` |
| `vae_encoder.h5` | `ImageEncoder` |
"""

import collections
import inspect
import json
import pathlib

import h5py
import numpy as np

from keras_sd.layers.int8 import refuse_int8
from keras_sd.models import Decoder, DiffusionModel, ImageEncoder, TextEncoder
from keras_sd.weights.assign import set_values, without_values
from keras_sd.weights.files import atomic_file

# KerasCV's layer → {path inside our layer: path inside theirs}, in the order of the published files.
LAYERS = {
    "clip_embedding": {"token_embedding": "token_embedding", "position_embedding": "position_embedding"},
    "clip_encoder_layer": {
        "layer_norm1": "layer_norm1",
        **{f"self_attn/{part}_proj": f"clip_attn/{part}_proj" for part in ("q", "k", "v", "out")},
        "layer_norm2": "layer_norm2",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    },
    "layer_normalization": {"": ""},
    "group_normalization": {"": ""},
    "dense": {"": ""},
    "padded_conv2d": {"": "conv2d", "conv": "conv2d"},
    "upsample": {"conv": "conv/conv2d"},
    "res_block": {
        "norm1": "entry_flow/group_normalization",
        "conv1": "entry_flow/padded_conv2d/conv2d",
        "time_emb_proj": "embedding_flow/dense",
        "norm2": "exit_flow/group_normalization",
        "conv2": "exit_flow/padded_conv2d/conv2d",
        "conv_shortcut": "residual_projection/conv2d",
    },
    "resnet_block": {
        "norm1": "norm1",
        "conv1": "conv1/conv2d",
        "norm2": "norm2",
        "conv2": "conv2/conv2d",
        "conv_shortcut": "residual_projection/conv2d",
    },
    "attention_block": {
        "group_norm": "norm",
        **{f"to_{part}": f"{part}/conv2d" for part in "qkv"},
        "to_out.0": "proj_out/conv2d",
    },
    "spatial_transformer": {
        "norm": "norm",
        "proj_in": "proj1",  # of SD v1: proj1/conv2d
        "transformer_blocks.0/norm1": "transformer_block/norm1",
        **{f"transformer_blocks.0/attn1/to_{part}": f"transformer_block/attn1/to_{part}" for part in "qkv"},
        "transformer_blocks.0/attn1/to_out.0": "transformer_block/attn1/out_proj",
        "transformer_blocks.0/norm2": "transformer_block/norm2",
        **{f"transformer_blocks.0/attn2/to_{part}": f"transformer_block/attn2/to_{part}" for part in "qkv"},
        "transformer_blocks.0/attn2/to_out.0": "transformer_block/attn2/out_proj",
        "transformer_blocks.0/norm3": "transformer_block/norm3",
        "transformer_blocks.0/ff.net.0/proj": "transformer_block/geglu/dense",
        "transformer_blocks.0/ff.net.2": "transformer_block/dense",
        "proj_out": "proj2",
    },
}
# Of the layers that hold further layers: the attribute in KerasCV's code → its class.
CONTAINERS = {
    "clip_attn": "clip_attention",
    "transformer_block": "basic_transformer_block",
    "attn1": "cross_attention",
    "attn2": "cross_attention",
    "geglu": "geglu",
}
V2_ARGUMENTS = {  # where SD v2 differs from v1
    TextEncoder: {
        "hidden_size": 1024,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu",
    },
    DiffusionModel: {
        "num_attention_heads": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
METADATA = "keras_sd"  # attribute of a file: what KerasCV's layout has no place for, as JSON; KerasCV passes over it
SUFFIXES = ("kernel", "gamma", "embeddings", "beta", "bias")  # the order of a layer's own variables


# === Topologies: (KerasCV's layer, our layer's name), in the order of the published files ===


def text_encoder_layers(num_layers):
    """The layers of a text encoder with `num_layers` transformer layers."""
    layers = [("clip_encoder_layer", f"text_model.encoder.layers.{i}") for i in range(num_layers)]
    final = ("layer_normalization", "text_model.final_layer_norm")
    return [("clip_embedding", "text_model.embeddings"), *layers, final]


def diffusion_model_layers():
    """The layers of the U-Net: 4 levels, the last without transformers, 2 blocks down and 3 up."""
    layers = [
        ("dense", "time_embedding.linear_1"),
        ("padded_conv2d", "conv_in"),
        ("dense", "time_embedding.linear_2"),
    ]
    for level in range(4):
        for i in range(2):
            layers.append(("res_block", f"down_blocks.{level}.resnets.{i}"))
            layers += [("spatial_transformer", f"down_blocks.{level}.attentions.{i}")] * (level < 3)
        layers += [("padded_conv2d", f"down_blocks.{level}.downsamplers.0")] * (level < 3)
    layers += [("res_block", "mid_block.resnets.0"), ("spatial_transformer", "mid_block.attentions.0")]
    layers += [("res_block", "mid_block.resnets.1")]
    for block in range(4):
        for i in range(3):
            layers.append(("res_block", f"up_blocks.{block}.resnets.{i}"))
            layers += [("spatial_transformer", f"up_blocks.{block}.attentions.{i}")] * (block > 0)
        layers += [("upsample", f"up_blocks.{block}.upsamplers.0")] * (block < 3)
    return [*layers, ("group_normalization", "conv_norm_out"), ("padded_conv2d", "conv_out")]


def _middle(half):
    resnets = [("resnet_block", f"{half}.mid_block.resnets.{i}") for i in range(2)]
    return [resnets[0], ("attention_block", f"{half}.mid_block.attentions.0"), resnets[1]]


def _end(half):
    return [("group_normalization", f"{half}.conv_norm_out"), ("padded_conv2d", f"{half}.conv_out")]


def decoder_layers():
    """The layers of the decoder: 4 levels of 3 blocks."""
    layers = [("padded_conv2d", "post_quant_conv"), ("padded_conv2d", "decoder.conv_in"), *_middle("decoder")]
    for block in range(4):
        layers += [("resnet_block", f"decoder.up_blocks.{block}.resnets.{i}") for i in range(3)]
        layers += [("padded_conv2d", f"decoder.up_blocks.{block}.upsamplers.0")] * (block < 3)
    return [*layers, *_end("decoder")]


def image_encoder_layers():
    """The layers of the image encoder: 4 levels of 2 blocks."""
    layers = [("padded_conv2d", "encoder.conv_in")]
    for level in range(4):
        layers += [("resnet_block", f"encoder.down_blocks.{level}.resnets.{i}") for i in range(2)]
        layers += [("padded_conv2d", f"encoder.down_blocks.{level}.downsamplers.0")] * (level < 3)
    return [*layers, *_middle("encoder"), *_end("encoder"), ("padded_conv2d", "quant_conv")]


# === Files ===


def read_keras_cv(path):
    """Reads a KerasCV weights file, in either layout.

    Args:
        path: an `.h5` file.

    Returns:
        (layers, arrays): the topology, one of those above, and for each of its layers the list of its arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, or its layers are those of no model of KerasCV.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weights file at {str(path)!r}.")
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            return _read_keras_2(root) if _has_attribute(root, "layer_names") else _read_keras_3(root)
    except OSError as error:
        raise ValueError(f"{str(path)!r} is damaged or no HDF5 file ({error}).") from None
    except KeyError as error:
        raise ValueError(f"{str(path)!r} is not in the layout of a KerasCV model: {error}.") from None


def write_keras_cv(model, path, dtype="float32", metadata=None):
    """Writes one of the four models in the published layout, whole or not at all.

    Args:
        model: a `TextEncoder`, `DiffusionModel`, `Decoder` or `ImageEncoder`.
        path: `.h5` file to write.
        dtype: "float32" or "float16".
        metadata: dict for JSON, to be read by `read_metadata`; the model's arguments are added.

    Raises:
        ValueError: the model's topology is not SD v1's or v2's, so that KerasCV has no model for it; or HDF5 does not
            have the dtype.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"KerasCV's .h5 files hold float32 or float16; got {dtype!r}.")
    refuse_int8(model, "KerasCV's .h5")
    layers = published_names(model)
    metadata = {"arguments": _arguments(model), **(metadata or {})}
    with atomic_file(path) as part, h5py.File(part, "w") as file:
        _write_attribute(file, "layer_names", [name for name, _, _ in layers])
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.12.0"
        file.attrs[METADATA] = json.dumps(metadata)
        for name, kind, variables in layers:
            group = file.create_group(name)
            _write_attribute(group, "weight_names", list(variables))
            for weight_name, variable in variables.items():
                group[weight_name] = _widened(np.asarray(variable, "float32").astype(dtype), kind)


def read_metadata(path):
    """What `write_keras_cv` added to the weights; empty for files of others."""
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs.get(METADATA, "{}"))


def has_published_widths(model):
    """Whether a model is SD v1's or v2's, which are those that KerasCV makes."""
    defaults = {name: one.default for name, one in inspect.signature(type(model)).parameters.items()}
    return any(_arguments(model) == _plain({**defaults, **v2.get(type(model), {})}) for v2 in ({}, V2_ARGUMENTS))


def _arguments(model):
    return _plain(model.arguments)


def _plain(arguments):
    """Arguments of a model as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in arguments.items() if k not in ("name", "dtype")}))


def published_names(model):
    """[(layer's name, its class, {weight's name: variable})], in the order and with the names of the published files.

    Keras 2 numbered objects by class, over the whole model; a residual projection is made late and has no number.
    """
    variables, counts, published = _variables(model), collections.Counter(), []

    def numbered(cls):
        counts[cls] += 1
        return f"{cls}_{counts[cls] - 1}" if counts[cls] > 1 else cls

    for kind, layer in _layers_of(model):
        names, weights = {"": numbered(kind)}, {}
        ordered = _in_order(kind, variables[layer], layer)
        convolutions = {inner for variable, inner in ordered if "conv2d" in inner or len(variable.shape) == 4}
        for variable, inner in ordered:
            path = [names[""]]
            for place, cls in _classes(kind, inner, variable, inner in convolutions):
                if place not in names:
                    names[place] = cls if inner.startswith("residual_projection") else numbered(cls)
                path.append(names[place])
            weights["/".join([*path, variable.path.rsplit("/", 1)[1] + ":0"])] = variable
        published.append((names[""], kind, weights))
    return published


def _classes(kind, inner, variable, convolution):
    """[(a place inside a layer of KerasCV, its class)] on the way to a variable."""
    parts = inner.split("/")
    outer = [("/".join(parts[: i + 1]), CONTAINERS[p]) for i, p in enumerate(parts) if p in CONTAINERS]
    suffix = variable.path.rsplit("/", 1)[1]
    if suffix == "embeddings":
        leaf = "embedding"
    elif suffix in ("gamma", "beta"):
        leaf = f"{'layer' if kind.startswith('clip') or 'transformer_block' in parts else 'group'}_normalization"
    elif convolution:
        padded = [] if kind == "padded_conv2d" else [(f"{inner} padded", "padded_conv2d")]
        return [*outer, *padded, (inner, "conv2d")]
    else:
        leaf = "dense"
    return [*outer, (inner, leaf)] if inner else outer


def _read_keras_2(root):
    groups = [root[name] for name in _attribute(root, "layer_names")]
    arrays = [[np.asarray(group[name]) for name in _attribute(group, "weight_names")] for group in groups]
    arrays = [own for own in arrays if own]
    return _topology(len(arrays), sum(map(len, arrays))), arrays


def _read_keras_3(root):
    root = root["layers"]
    if "clip_embedding" in root:
        layers = text_encoder_layers(sum(name.startswith("clip_encoder_layer") for name in root))
    elif "res_block" in root:
        layers = diffusion_model_layers()
    else:
        shape = root["padded_conv2d/conv2d/vars/0"].shape
        layers = image_encoder_layers() if shape[:2] == (3, 3) else decoder_layers()
    arrays = []
    for (kind, _), name in zip(layers, _count(layers)):
        own = []
        for theirs in dict.fromkeys(LAYERS[kind].values()):
            group = root[name]
            if theirs == "residual_projection/conv2d" and theirs not in group:
                continue
            group = group[theirs] if theirs else group
            values = group["conv2d/vars" if "conv2d" in group else "vars"]
            own += [np.asarray(values[i]) for i in sorted(values, key=int)]
        arrays.append(own)
    unknown = _count_arrays(root) - sum(map(len, arrays))
    if unknown:
        raise KeyError(f"it holds {unknown} arrays more than are known")
    return layers, arrays


def _count_arrays(group):
    return sum(1 if isinstance(item, h5py.Dataset) else _count_arrays(item) for item in group.values())


def _topology(num_layers, num_arrays):
    if num_layers > 2 and num_arrays == 16 * (num_layers - 2) + 4:
        return text_encoder_layers(num_layers - 2)
    for layers in (diffusion_model_layers(), decoder_layers(), image_encoder_layers()):
        if len(layers) == num_layers:
            return layers
    raise KeyError(f"{num_layers} layers with {num_arrays} arrays")


# === Models ===


def build_from_keras_cv(path, dtype=None, **arguments):
    """The model whose weights a file holds; widths are read off the arrays.

    Args:
        path: an `.h5` file of KerasCV.
        dtype: Keras dtype policy.
        **arguments: of the model, in place of what the metadata and the arrays say.

    Raises:
        FileNotFoundError, ValueError: as `read_keras_cv`; or an array has another shape than its place asks for.
    """
    layers, arrays = read_keras_cv(path)
    try:
        cls, widths = _class_and_widths(layers, arrays)
    except (IndexError, ValueError):
        raise ValueError(f"{str(path)!r} is not in the layout of a KerasCV model: a layer lacks arrays.") from None
    with without_values():
        model = cls(**{**widths, **read_metadata(path).get("arguments", {}), **arguments}, dtype=dtype)
    _assign(model, layers, arrays, str(path))
    return model


def _class_and_widths(layers, arrays):
    by_name = {layer: own for (_, layer), own in zip(layers, arrays)}
    if layers[0][0] == "clip_embedding":
        return TextEncoder, _text_encoder_arguments(by_name, len(layers) - 2)
    if layers[0][0] == "dense":
        return DiffusionModel, _diffusion_model_arguments(by_name)
    if layers[0][1] == "post_quant_conv":
        channels = [by_name[f"decoder.up_blocks.{3 - level}.resnets.2"][2].shape[-1] for level in range(4)]
        return Decoder, {"block_out_channels": channels, "latent_channels": by_name["post_quant_conv"][0].shape[-1]}
    channels = [by_name[f"encoder.down_blocks.{level}.resnets.1"][2].shape[-1] for level in range(4)]
    return ImageEncoder, {"block_out_channels": channels, "latent_channels": by_name["quant_conv"][0].shape[-1] // 2}


def _text_encoder_arguments(arrays, num_layers):
    tokens, positions = arrays["text_model.embeddings"]
    width = tokens.shape[1]
    return {
        "vocab_size": tokens.shape[0],
        "max_position_embeddings": positions.shape[0],
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(width // 64, 1),
        "intermediate_size": arrays["text_model.encoder.layers.0"][12].shape[1],
        "hidden_act": "gelu" if width == 1024 else "quick_gelu",  # KerasCV's SD v2 is the one with 1024
    }


def _diffusion_model_arguments(arrays):
    channels = [arrays[f"down_blocks.{level}.resnets.0"][2].shape[-1] for level in range(4)]
    transformer = arrays["down_blocks.0.attentions.0"]
    linear = transformer[2].ndim == 2
    return {
        "in_channels": arrays["conv_in"][0].shape[2],
        "out_channels": arrays["conv_out"][0].shape[3],
        "block_out_channels": channels,
        "num_attention_heads": [max(width // 64, 1) for width in channels] if linear else 8,
        "cross_attention_dim": transformer[14].shape[0],
        "use_linear_projection": linear,
    }


def assign_keras_cv(model, path):
    """Assigns every variable of one of the four models from a file, or none.

    Raises:
        FileNotFoundError, ValueError: as `build_from_keras_cv`; or the file is another model's.
    """
    _assign(model, *read_keras_cv(path), str(path))


def _assign(model, layers, arrays, source):
    variables, values = _variables(model), []
    if {layer for _, layer in layers} != variables.keys():
        raise ValueError(f"{source} holds the layers of another model than this {model.name}.")
    for (kind, layer), own in zip(layers, arrays):
        places = [variable for variable, _ in _in_order(kind, variables.pop(layer), layer)]
        if len(places) != len(own):
            raise ValueError(f"{source}: layer {layer} holds {len(own)} arrays; {len(places)} are needed.")
        for variable, array in zip(places, own):
            array = array.reshape(array.shape[2:]) if array.ndim == 4 and len(variable.shape) == 2 else array
            if array.shape != tuple(variable.shape):
                raise ValueError(f"{source}: {variable.path} needs shape {tuple(variable.shape)}; got {array.shape}.")
            values.append((variable, array))
    set_values(values)


def _layers_of(model):
    kinds = {
        TextEncoder: lambda: text_encoder_layers(model.arguments["num_hidden_layers"]),
        DiffusionModel: diffusion_model_layers,
        Decoder: decoder_layers,
        ImageEncoder: image_encoder_layers,
    }
    layers = kinds[type(model)]()
    if {layer for _, layer in layers} != _variables(model).keys():
        raise ValueError(f"The {model.name} has not the topology of SD v1 or v2; KerasCV has no model for it.")
    return layers


def _variables(model):
    """{layer's name: its variables}."""
    grouped = {}
    for variable in model.variables:
        grouped.setdefault(variable.path.split("/")[0], []).append(variable)
    return grouped


def _in_order(kind, variables, layer):
    """[(variable, path inside KerasCV's layer)] in the order of the published files."""
    parts = list(LAYERS[kind])

    def place(variable):
        *inner, suffix = variable.path.removeprefix(f"{layer}/").split("/")
        return parts.index("/".join(inner)), SUFFIXES.index(suffix)

    return [(v, LAYERS[kind][parts[place(v)[0]]]) for v in sorted(variables, key=place)]


def _widened(array, kind):
    return array[None, None] if kind == "attention_block" and array.ndim == 2 else array


def _count(layers):
    """KerasCV's names of the layers, with Keras' counters: dense, dense_1, …"""
    seen, names = {}, []
    for kind, _ in layers:
        names.append(f"{kind}_{seen[kind]}" if kind in seen else kind)
        seen[kind] = seen.get(kind, 0) + 1
    return names


# === HDF5 attributes, in chunks where they are larger than 64 kB ===


def _has_attribute(group, name):
    return name in group.attrs or f"{name}0" in group.attrs


def _attribute(group, name):
    if name in group.attrs:
        values = list(group.attrs[name])
    else:
        chunks = sorted((key for key in group.attrs if key.startswith(name)), key=lambda key: int(key[len(name) :]))
        values = [value for key in chunks for value in group.attrs[key]]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _write_attribute(group, name, values):
    group.attrs[name] = np.array([value.encode() for value in values])
