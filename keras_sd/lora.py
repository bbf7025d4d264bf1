"""Low-rank adaptation (LoRA): factors to train beside frozen weights, and adapters merged into the weights.

Training needs the factors themselves: `add_lora` puts them into Dense and Conv2D layers and freezes all else. Drawing
needs their product alone: `Adapters` adds it to the kernels and keeps what they were, so that taking an adapter out
leaves every weight as it was, bit for bit, and a step costs no more than without.

Reference: Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
"""

import re
import warnings

import keras
import numpy as np

from keras_sd.layers.int8 import refuse_int8
from keras_sd.models.network import forget_traces
from keras_sd.weights.assign import from_torch_layout, kernel_layers, to_torch_layout
from keras_sd.weights.lora import delta, module_table, read_lora

# Names of layers as in a diffusers state dict, of the U-Net and of the text encoder.
TARGETS = {
    "attention": r".*\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)",
    "feed_forward": r".*\.(ff\.net\.0\.proj|ff\.net\.2|mlp\.fc[12])",
    "projection": r".*\.(proj_in|proj_out)",
    "convolution": r"(.*\.)?(conv|conv1|conv2|conv_shortcut|conv_in|conv_out)",
    "timestep": r"(.*\.)?(time_emb_proj|linear_1|linear_2)",
}

# === Factors to train ===


def add_lora(model, rank=8, alpha=None, targets=("attention",), seed=0):
    """Adds trainable factors to layers of a model, and freezes everything else.

    They are Keras' own (`Dense.enable_lora`, `Conv2D.enable_lora`): float32 in any dtype policy, and without effect
    until they are trained. Keras leaves biases and the other layers trainable; here they are frozen, too.

    Args:
        model: a `DiffusionModel` or `TextEncoder`.
        rank: number of columns of the factors.
        alpha: the factors' product is multiplied by alpha / rank; by default the rank.
        targets: names in `TARGETS`, or regular expressions that match whole layer names.
        seed: integer; of the first factors, which are uniform in ±1/√fan_in, as in kohya's and PEFT's. The second ones
            are 0.

    Returns:
        the names of the layers.

    Raises:
        ValueError: a target matches no layer, the rank is too small, or the model has factors already or int8 weights.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1; got {rank!r}.")
    refuse_int8(model, "add_lora")
    if lora_layers(model):
        raise ValueError(f"The {model.name} has LoRA factors already; fuse or remove them first.")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    matched = {target: target_layers(model, target) for target in targets}
    unmatched = [target for target, names in matched.items() if not names]
    if unmatched or not targets:
        known = ", ".join(TARGETS)
        raise ValueError(f"targets: {unmatched!r} matches no layer of the {model.name}; known names: {known}.")
    names = {name for names in matched.values() for name in names}
    chosen = {name: layer for name, layer in kernel_layers(model).items() if name in names}
    model.trainable = True
    for variable in model.variables:
        variable.trainable = False
    for i, layer in enumerate(chosen.values()):
        first = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seed + i)
        layer.enable_lora(rank, lora_alpha=alpha, a_initializer=first)
    forget_traces(model)
    return list(chosen)


def target_layers(model, target):
    """Names of the layers that a target, as in `add_lora`, matches."""
    return [name for name in kernel_layers(model) if re.fullmatch(TARGETS.get(target, target), name)]


def lora_factors(model):
    """The trained factors of a model.

    Returns:
        dict layer → dict with `down` and `up`, float32 arrays in torch's layout, and the number `alpha`.
    """
    factors = {}
    for name, layer in lora_layers(model).items():
        a, b = (_copy(x) for x in (layer.lora_kernel_a, layer.lora_kernel_b))
        b = b.reshape((1,) * (a.ndim - 2) + b.shape)
        factors[name] = {"down": to_torch_layout(a), "up": to_torch_layout(b), "alpha": float(layer.lora_alpha)}
    return factors


def remove_lora(model, fuse=False):
    """Takes the factors out of a model, whose variables become trainable again.

    Args:
        model: a model that `add_lora` was called with; one without factors stays as it is.
        fuse: add their product to the kernels first.

    Returns:
        whether there were any.
    """
    layers = lora_layers(model)
    for layer in layers.values():
        if fuse:  # in float32, unlike `layer.kernel`, which comes in the compute dtype
            kernel, a, b = (
                _copy(x).astype("float32") for x in (layer._kernel, layer.lora_kernel_a, layer.lora_kernel_b)
            )
            layer._kernel.assign(kernel + layer.lora_alpha / layer.lora_rank * (a @ b))
        layer._tracker.unlock()
        for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
            layer._untrack_variable(variable)
        layer._tracker.lock()
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
    if layers:
        for variable in model.variables:
            variable.trainable = True
        forget_traces(model)
    return bool(layers)


def lora_layers(model):
    """dict name → layer, of those that have factors."""
    return {name: layer for name, layer in kernel_layers(model).items() if layer.lora_enabled}


# === Adapters merged into the weights ===


class Adapters:
    """Adapters that are merged into the weights of models.

    Args:
        models: dict component ("unet", "text_encoder") → function () → model. A model may be replaced by another one
            later: adapters that are then changed are merged into that one.

    Attributes:
        scales: dict name → scale, in the order of loading.
    """

    def __init__(self, models):
        self.models = models
        self.scales = {}
        self._factors = {}  # name → dict (component, layer) → factors
        self._kept = {}  # component → (model, dict layer → kernel before any adapter)

    def load(self, path, scale, name):
        """Merges the LoRA at a path; see `StableDiffusion.load_lora`."""
        if name in self.scales:
            raise ValueError(f"A LoRA {name!r} is loaded already; unload it, change its scale, or give another name.")
        _check_scale(scale)
        refuse_int8(self.models["unet"](), "load_lora")
        kernels = {component: self._kernels(component) for component in self.models}
        shapes = {c: {layer: _torch_shape(kernel) for layer, kernel in k.items()} for c, k in kernels.items()}
        arguments = self.models["unet"]().arguments
        table = module_table(shapes, arguments["layers_per_block"], arguments["attention_levels"])
        factors, unknown = read_lora(path, shapes, table)
        if unknown:
            warnings.warn(f"{str(path)!r} holds what is no part of a LoRA, unused: {', '.join(unknown)}", stacklevel=3)
        self._factors[name], self.scales[name] = factors, float(scale)
        self._merge(factors)

    def set_scale(self, name, scale):
        """Changes how strong an adapter is."""
        self._check_name(name)
        self.scales[name] = float(_check_scale(scale))
        self._merge(self._factors[name])

    def unload(self, name=None):
        """Takes one adapter out, or all."""
        if name is not None:
            self._check_name(name)
        for one in [*self.scales] if name is None else [name]:
            del self.scales[one]
            self._merge(self._factors.pop(one))

    def fuse(self):
        """Makes the weights, as they are now, the model's own."""
        self.scales, self._factors, self._kept = {}, {}, {}

    def move(self, component, model):
        """Says that a model holds the weights of the one before it, adapters merged."""
        if component in self._kept:
            self._kept[component] = model, self._kept[component][1]

    def _merge(self, layers):
        """Computes the kernels of (component, layer) anew, from what they were before any adapter."""
        for component in {component for component, _ in layers}:
            model, kernels = self.models[component](), self._kernels(component)
            owner, kept = self._kept.get(component, (None, {}))
            kept = self._kept.setdefault(component, (model, {}))[1] if owner is model else {}
            self._kept[component] = model, kept
            for layer in (layer for c, layer in layers if c == component):
                kernel = kernels[layer]
                used = [name for name, factors in self._factors.items() if (component, layer) in factors]
                if used:
                    value = kept.setdefault(layer, _copy(kernel))
                elif layer in kept:
                    value = kept.pop(layer)
                else:  # another model than the one that had the adapter
                    continue
                scaled = [(self.scales[name], self._factors[name][component, layer]) for name in used]
                if changes := [s * delta(f, _torch_shape(kernel)) for s, f in scaled if s]:
                    value = np.asarray(value, "float32") + from_torch_layout(sum(changes))
                kernel.assign(value)
            if keras.backend.backend() == "openvino":  # which compiles the weights in
                forget_traces(model)

    def _kernels(self, component):
        """dict layer → kernel variable."""
        return {name: layer._kernel for name, layer in kernel_layers(self.models[component]()).items()}

    def _check_name(self, name):
        if name not in self.scales:
            raise ValueError(f"No LoRA {name!r} is loaded; loaded: {', '.join(self.scales) or 'none'}.")


def _copy(variable):
    """A NumPy array that later assignments do not reach, as they would with a view, which torch gives."""
    return np.array(keras.ops.convert_to_numpy(variable))


def _torch_shape(kernel):
    return to_torch_layout(np.broadcast_to(0, kernel.shape)).shape


def _check_scale(scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale!r}.")
    return scale
