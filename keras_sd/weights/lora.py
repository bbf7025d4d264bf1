"""LoRA files to and from the factors of each layer, in the namings of kohya, diffusers and PEFT.

| naming | key of a factor | scale |
|---|---|---|
| kohya | `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, `lora_te_text_model_…` | `….alpha` / rank |
| diffusers | `unet.down_blocks.0.attentions.0.proj_in.lora_A.weight` or `….lora.down.weight` | 1, or in the metadata |
| PEFT | `base_model.model.down_blocks.0.….lora_A.weight`, and `adapter_config.json` beside it | lora_alpha / r |

LyCORIS' LoCon (convolutions, `lora_mid`) and LoHa (`hada_…`) are read in each of them, CompVis' names of the U-Net's
modules (`lora_unet_input_blocks_1_1_…`) in kohya's. Every key is used, or refused with its name, or, where it says
nothing about a layer, reported as unknown.

Reference: Hu et al. (2021), LoRA, arXiv 2106.09685; Hyeon-Woo et al. (2022), FedPara (LoHa), arXiv 2108.06098;
https://github.com/kohya-ss/sd-scripts, https://github.com/KohakuBlueleaf/LyCORIS.
"""

import json
import math
import pathlib
import re

import numpy as np
import safetensors

from keras_sd.weights.files import read_arrays, read_json, write_json, write_safetensors
from keras_sd.weights.single_file import unet_names

COMPONENTS = ("unet", "text_encoder")
NAMINGS = ("kohya", "diffusers", "peft")
FILES = tuple(
    f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in ("pytorch_lora_weights", "adapter_model")
)
METADATA = "lora_adapter_metadata"  # where diffusers writes the PEFT config in a safetensors file

_PARTS = {
    r"(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight": "down",
    r"(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight": "up",
    r"lora_mid\.weight": "mid",
    r"alpha": "alpha",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
_KEY = re.compile(rf"(?:base_model\.model\.)?(?P<module>.+?)[._](?P<part>{'|'.join(_PARTS)})")
_HADA = {"w1_a", "w1_b", "w2_a", "w2_b"}

# === Names ===


def module_table(modules, layers_per_block, attention_levels):
    """What files call the layers.

    Args:
        modules: dict component ("unet", "text_encoder") → names of its layers, as in a diffusers state dict.
        layers_per_block, attention_levels: of the U-Net, for CompVis' names.

    Returns:
        dict name in a file, without the part → (component, layer).
    """
    levels = attention_levels
    compvis = {new: old for old, new in unet_names(layers_per_block, levels, levels[::-1]).items()}
    table = {}
    for component, names in modules.items():
        for name in names:
            aliases = [name, f"{component}.{name}", *_kohya_names(component, name)]
            if component == "unet" and name in compvis:
                aliases += _kohya_names(component, compvis[name])
            flat = name.removeprefix("text_model.")  # as transformers 5.6 and later have it
            aliases += [flat, f"{component}.{flat}"]
            # diffusers of early 2023: attn1.processor.to_out_lora.down.weight, self_attn.to_q_lora.down.weight
            old = re.sub(r"\.(attn[12])\.(to_[qkv]|to_out)(\.0)?$", r".\1.processor.\2", name)
            old = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", old)
            aliases += [old, f"{component}.{old}"]
            table |= dict.fromkeys(aliases, (component, name))
    return table


def _kohya_names(component, name):
    prefixes = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}[component]
    return [prefix + name.replace(".", "_") for prefix in prefixes]


def sort_keys(keys, table):
    """Sorts the keys of a file into layers.

    Args:
        keys: names of the file's tensors.
        table: from `module_table`.

    Returns:
        dict (component, layer) → dict part → key; dict key → what is wrong with it, for those that are of a layer that
        the models do not have, of an adapter that is not understood, or there twice; and the list of the keys that say
        nothing about a layer.
    """
    layers, misfits, unknown = {}, {}, []
    for key in keys:
        found = _KEY.fullmatch(key)
        if found is None:
            if table.keys().isdisjoint(_beginnings(key)):
                unknown.append(key)
            else:
                misfits[key] = "is of an adapter that is not supported; LoRA, LoCon and LoHa are"
            continue
        layer = table.get(found["module"])
        if layer is None:
            misfits[key] = "is of a layer that the models do not have: it is for another architecture"
            continue
        part = next(part for pattern, part in _PARTS.items() if re.fullmatch(pattern, found["part"]))
        if layers.setdefault(layer, {}).setdefault(part, key) != key:
            misfits[key] = f"and {layers[layer][part]} are the same part of the same layer"
    return layers, misfits, unknown


def _beginnings(key):
    key = key.removeprefix("base_model.model.")
    return {key[: match.start()] for match in re.finditer(r"[._]", key)}


# === Factors ===


def check_layer(parts, keys, shape):
    """What is wrong with the parts of one layer.

    Args:
        parts: dict part → array.
        keys: dict part → the file's name for it.
        shape: of the layer's weight in torch's layout, (out, in) or (out, in, height, width).

    Returns:
        dict key → what is wrong with it; empty where nothing is.
    """
    hada = not _HADA.isdisjoint(parts)
    needed = _HADA | ({"t1", "t2"} if {"t1", "t2"} & parts.keys() else set()) if hada else {"down", "up"}
    others = [keys[part] for part in sorted(parts, key="alpha".__eq__)]
    if missing := sorted(needed - parts.keys()):
        return {others[0]: f"is there, but {' and '.join(missing)} of the same layer is missing"}
    if extra := sorted(parts.keys() - needed - ({"alpha"} if hada else {"alpha", "mid"})):
        return {keys[extra[0]]: f"does not go with {others[0]}: they are parts of different adapters"}
    misfits = {}
    for part, wanted in _factor_shapes(parts, shape).items():
        if _squeezed(parts[part].shape) != _squeezed(wanted):
            misfits[keys[part]] = (
                f"has shape {parts[part].shape}; a layer with a weight of shape {tuple(shape)} needs {wanted}: "
                "it is for another architecture"
            )
    return misfits


def layer_factors(parts, shape, alpha=None, use_rslora=False):
    """The factors of one layer, scaled.

    Args:
        parts: dict part → array, in which `check_layer` found nothing wrong.
        shape: of the layer's weight in torch's layout.
        alpha: of the adapter's config, for files that do not hold it themselves; by default the rank.
        use_rslora: divide alpha by √rank rather than by the rank (Kalajdzievski, 2023, arXiv 2312.03732).

    Returns:
        dict of float32 arrays `down`, `up`, perhaps `mid`; or `w1_a` … `w2_b`, perhaps `t1`, `t2`; one of them
        multiplied by alpha / rank. See `delta`.
    """
    shapes = _factor_shapes(parts, shape)
    factors = {part: np.asarray(parts[part], "float32").reshape(wanted) for part, wanted in shapes.items()}
    alpha = float(np.asarray(parts["alpha"], "float32").reshape(())) if "alpha" in parts else alpha
    rank = max(_rank(parts), 1)
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if use_rslora else rank)
    scaled = "up" if "up" in factors else "w1_a"
    return factors | {scaled: factors[scaled] * np.float32(scale)}


def _rank(parts):
    return next(iter(parts["down" if "down" in parts else "w1_b"].shape), 0)


def _factor_shapes(parts, shape):
    """The shape of each part, for a layer with a weight of a shape."""
    (out, width), kernel, rank = shape[:2], tuple(shape[2:]), _rank(parts)
    ones = (1,) * len(kernel)
    if "down" in parts:
        middle = {"mid": (rank, rank, *kernel)} if "mid" in parts else {}
        return {"down": (rank, width, *(ones if middle else kernel)), "up": (out, rank, *ones), **middle}
    if "t1" in parts:
        shapes = {f"w{i}_{side}": (rank, size) for i in (1, 2) for side, size in (("a", out), ("b", width))}
        return shapes | {"t1": (rank, rank, *kernel), "t2": (rank, rank, *kernel)}
    flat = width * math.prod(kernel)
    return {f"w{i}_{side}": size for i in (1, 2) for side, size in (("a", (out, rank)), ("b", (rank, flat)))}


def _squeezed(shape):
    """Without height and width where they are 1: files hold 1×1 convolutions and dense layers for one another."""
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)


def delta(factors, shape):
    """What an adapter adds to a layer's weight, at scale 1.

    Args:
        factors: from `layer_factors`.
        shape: of the weight in torch's layout.

    Returns:
        float32 array of that shape: up · down (LoRA, and LoCon along the channels), or (w1_a · w1_b) ⊙ (w2_a · w2_b)
        (LoHa).
    """
    if "up" in factors:
        up, down = (factors[name].reshape(len(factors[name]), -1) for name in ("up", "down"))
        if "mid" not in factors:
            return (up @ down).reshape(shape)
        return np.einsum("oa,abhw,bi->oihw", up, factors["mid"], down, optimize=True)
    halves = [_hada_half(factors, i) for i in (1, 2)]
    return (halves[0] * halves[1]).reshape(shape)


def _hada_half(factors, i):
    a, b = factors[f"w{i}_a"], factors[f"w{i}_b"]
    return np.einsum("abhw,bi,ao->oihw", factors[f"t{i}"], b, a, optimize=True) if f"t{i}" in factors else a @ b


# === Reading ===


def read_lora(path, shapes, table):
    """Reads a LoRA.

    Args:
        path: a `.safetensors`, `.pt`, `.ckpt` or `.bin` file; or a folder with one under diffusers' or PEFT's name, or
            with PEFT's folders `unet` and `text_encoder`.
        shapes: dict component → dict layer → shape of its weight in torch's layout.
        table: from `module_table`.

    Returns:
        dict (component, layer) → factors, as from `layer_factors`, and the list of unknown keys.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged, holds no LoRA, or one for another architecture; the first key that does not
            fit is named.
    """
    factors, unknown = {}, []
    for file in lora_files(path):
        arrays, configs = read_arrays(file), _configs(file)
        layers, misfits, others = sort_keys(arrays, table)
        for (component, layer), keys in layers.items():
            parts, shape = {part: arrays[key] for part, key in keys.items()}, shapes[component][layer]
            if found := check_layer(parts, keys, shape):
                misfits |= found
            elif not misfits:
                options = _layer_config(configs.get(component, {}), layer)
                factors[component, layer] = layer_factors(parts, shape, **options)
        for key in arrays:
            if key in misfits:
                raise ValueError(f"{str(file)!r}: {key} {misfits[key]}.")
        unknown += others
    if not factors:
        raise ValueError(f"{str(path)!r} holds no LoRA: {unknown[0]} says nothing about a layer.")
    return factors, unknown


def lora_files(path):
    """The files of a LoRA at a path: one, or one per model."""
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"No LoRA at {str(path)!r}: give a .safetensors file or a folder.")
    for folders in ([path], [path / component for component in COMPONENTS]):
        found = [next((folder / name for name in FILES if (folder / name).is_file()), None) for folder in folders]
        if any(found):
            return [file for file in found if file]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{str(path)!r} holds {len(found)} .safetensors files and no {FILES[0]}; name the file."
        )
    return found


def find_lora(folder, name):
    """The path of `<lora:name:…>` in a folder or the folders below it.

    Raises:
        FileNotFoundError: there is no file (without its ending) or folder of that name.
    """
    folder, suffixes = pathlib.Path(folder), ("", ".safetensors", ".pt", ".ckpt", ".bin")
    for base in (folder, *sorted(p for p in folder.rglob("*") if p.is_dir())):
        for suffix in suffixes:
            if name and (base / f"{name}{suffix}").exists():
                return base / f"{name}{suffix}"
    there = sorted(p.stem for p in folder.rglob("*.safetensors"))
    raise FileNotFoundError(f"There is no LoRA {name!r} in {str(folder)!r}; there are: {', '.join(there) or 'none'}.")


def _configs(file):
    """dict component → PEFT config, from the file beside it or its metadata."""
    beside, flat = file.with_name("adapter_config.json"), "{}"
    if file.stem == "adapter_model" and beside.is_file():
        return dict.fromkeys(COMPONENTS, read_json(beside))
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="np") as opened:
            flat = (opened.metadata() or {}).get(METADATA, flat)
    try:
        items = json.loads(flat).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r}: {METADATA} in its metadata is no JSON object ({error}).") from None
    return {c: {key.removeprefix(f"{c}."): v for key, v in items if key.startswith(f"{c}.")} for c in COMPONENTS}


def _layer_config(config, layer):
    """`alpha` and `use_rslora` of a layer, as PEFT finds them."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    return {"alpha": alpha, "use_rslora": bool(config.get("use_rslora"))}


# === Writing ===


def write_lora(path, factors, naming="kohya", dtype="float32"):
    """Writes a LoRA so that other tools open it; each file appears whole or not at all.

    Args:
        path: `.safetensors` file to write; for "peft" a folder, which gets one folder per model.
        factors: dict (component, layer) → dict with `down` (rank, in[, height, width]), `up` (out, rank[, 1, 1]) and
            the number `alpha`.
        naming: "kohya" (AUTOMATIC1111's web UI, ComfyUI, diffusers), "diffusers", or "peft".
        dtype: NumPy dtype of the factors.

    Raises:
        ValueError: the naming is none of these, or the file has another ending.
        OSError: it cannot be written.
    """
    path = pathlib.Path(path)
    if naming not in NAMINGS:
        raise ValueError(f"naming must be one of {', '.join(NAMINGS)}; got {naming!r}.")
    if naming != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"A LoRA's file must end in .safetensors; got {str(path)!r}.")
    if naming == "kohya":
        arrays = {}
        for (component, layer), parts in factors.items():
            name = _kohya_names(component, layer)[0]
            arrays |= {f"{name}.lora_{part}.weight": parts[part] for part in ("down", "up")}
            arrays[f"{name}.alpha"] = np.asarray(parts["alpha"])
        rank, alpha = _most_common(factors)
        metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
        return _write(path, arrays, dtype, metadata)
    if naming == "diffusers":  # no alpha in it: the scale goes into the factors
        arrays = {}
        for (component, layer), parts in factors.items():
            scale = parts["alpha"] / len(parts["down"])
            arrays[f"{component}.{layer}.lora_A.weight"] = parts["down"]
            arrays[f"{component}.{layer}.lora_B.weight"] = parts["up"] * np.float32(scale)
        return _write(path, arrays, dtype)
    for component in sorted({component for component, _ in factors}):
        own = {layer.removeprefix("text_model."): parts for (c, layer), parts in factors.items() if c == component}
        letters = {"A": "down", "B": "up"}
        arrays = {
            f"base_model.model.{layer}.lora_{letter}.weight": parts[part]
            for layer, parts in own.items()
            for letter, part in letters.items()
        }
        rank, alpha = _most_common(own)
        ranks = {layer: len(parts["down"]) for layer, parts in own.items()}
        alphas = {layer: parts["alpha"] for layer, parts in own.items()}
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {re.escape(layer): r for layer, r in ranks.items() if r != rank},
            "alpha_pattern": {re.escape(layer): a for layer, a in alphas.items() if a != alpha},
            "target_modules": sorted(own),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        _write(path / component / "adapter_model.safetensors", arrays, dtype)
        write_json(path / component / "adapter_config.json", config)


def _write(path, arrays, dtype, metadata=None):
    arrays = {key: np.asarray(array).astype(dtype) for key, array in arrays.items()}
    write_safetensors(path, arrays, {"format": "pt"} | (metadata or {}))


def _most_common(factors):
    """(rank, alpha) that most layers have."""
    pairs = [(len(parts["down"]), parts["alpha"]) for parts in factors.values()]
    return max(set(pairs), key=pairs.count)
