"""IP-Adapters from files: the base version, `ip-adapter_sd15.safetensors` or `.bin` and their like.

| key | what it is |
|---|---|
| `image_proj.proj.weight`, `.bias`, `image_proj.norm.…` | the picture's embedding → 4 tokens |
| `ip_adapter.N.to_k_ip.weight`, `…to_v_ip.weight` | key and value of the cross-attentions, N = 1, 3, 5, … |

A `.bin` nests the two parts. The versions Plus, Full Face and FaceID project other things and are refused.

Reference: https://github.com/tencent-ailab/IP-Adapter, and the order in which diffusers counts the attentions.
"""

import pathlib
import types

from keras_sd.models.ip_adapter import IPAdapter, cross_attentions
from keras_sd.weights.assign import assign_state_dict
from keras_sd.weights.files import read_arrays, read_nested

PROJECTION = {"image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias"}
NUM_TOKENS = 4


def read_ip_adapter(path, diffusion_model, dtype=None):
    """An `IPAdapter` with the weights of a file.

    Args:
        path: a `.safetensors`, `.bin`, `.pt` or `.pth` file.
        diffusion_model: the `DiffusionModel` that it is to be attached to.
        dtype: Keras dtype policy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is none of the base version, or is for another architecture; the first key that
            does not fit is named.
    """
    path = pathlib.Path(path)
    arrays = _flat(read_arrays(path) if path.suffix == ".safetensors" or not path.is_file() else read_nested(path))
    projection = {key for key in arrays if key.startswith("image_proj.")}
    if projection != PROJECTION:
        strange = sorted(projection - PROJECTION) or sorted(PROJECTION - projection)
        raise ValueError(
            f"{str(path)!r} is no IP-Adapter of the base version: "
            f"it {'holds' if projection - PROJECTION else 'lacks'} {strange[0]!r}."
        )
    if diffusion_model.arguments["only_cross_attention"]:
        raise ValueError("An IP-Adapter is for models of Stable Diffusion v1 and v2, not for the ×4 upscaler.")
    width, embedding = arrays["image_proj.proj.weight"].shape
    needed = diffusion_model.arguments["cross_attention_dim"]
    if width != NUM_TOKENS * needed:
        raise ValueError(
            f"{str(path)!r} is for another architecture: image_proj.proj.weight makes {NUM_TOKENS} tokens of "
            f"{width / NUM_TOKENS:g} numbers; this model's have {needed}."
        )
    widths = [layer.dim for layer in cross_attentions(diffusion_model)]
    adapter = IPAdapter(widths, needed, embedding, NUM_TOKENS, dtype=dtype)
    variables = [variable for variable in adapter.variables if variable is not adapter.scale]
    assign_state_dict(types.SimpleNamespace(name="IP-Adapter", variables=variables), arrays, repr(str(path)))
    return adapter


def _flat(arrays):
    """`{"image_proj": {"proj.weight": …}}` as `{"image_proj.proj.weight": …}`."""
    flat = {}
    for key, value in arrays.items():
        flat |= {f"{key}.{name}": array for name, array in value.items()} if isinstance(value, dict) else {key: value}
    return flat
