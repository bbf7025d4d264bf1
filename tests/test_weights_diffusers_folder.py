"""Diffusers folders of any age: every tensor is used or the error names it; what we write, the peers open."""

import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers

from keras_sd.tokenizer import CLIPTokenizer
from keras_sd.weights import diffusers_folder
from keras_sd.weights.assign import assign_state_dict, to_state_dict
from keras_sd.weights.diffusers_folder import (
    autoencoder_arguments,
    autoencoder_config,
    build_decoder,
    build_diffusion_model,
    build_image_encoder,
    build_text_encoder,
    diffusion_model_arguments,
    diffusion_model_config,
    read_component,
    text_encoder_arguments,
    text_encoder_config,
    write_component,
)
from keras_sd.weights.files import write_safetensors

BUILDERS = {"text_encoder": build_text_encoder, "unet": build_diffusion_model, "vae": build_decoder}
PEERS = {
    "text_encoder": transformers.CLIPTextModel,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}
ARGUMENTS = {
    "text_encoder": text_encoder_arguments,
    "unet": diffusion_model_arguments,
    "vae": autoencoder_arguments,
}
A_KEY = {
    "text_encoder": "text_model.encoder.layers.1.mlp.fc1.weight",
    "unet": "down_blocks.0.resnets.0.conv1.weight",
    "vae": "decoder.mid_block.attentions.0.to_q.weight",
}


def load(folder, component, **options):
    return BUILDERS[component](*read_component(folder, component, **options), str(folder))


def assert_same_weights(model, other):
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), a.path)


def arrays_of(folder, component):
    """Config and the state dict as it is read, the text encoder's keys with `text_model.` whoever wrote them."""
    config, arrays = read_component(folder, component)
    if component == "text_encoder":
        arrays = diffusers_folder.text_encoder_state_dict(arrays)
    return config, dict(arrays)


def rewrite(folder, component, arrays, to):
    """A copy of one component with other arrays."""
    (to / component).mkdir(parents=True)
    shutil.copy(folder / component / "config.json", to / component)
    write_safetensors(to / component / diffusers_folder.WEIGHT_FILES[component][0], arrays)
    return to


# === Total loading ===


@pytest.mark.parametrize("component", BUILDERS)
def test_missing_renamed_extra_and_misshapen_tensors_are_named(tiny, component):
    config, arrays = arrays_of(tiny, component)
    key = A_KEY[component]
    without = {k: v for k, v in arrays.items() if k != key}
    bad = {
        rf"lacks '{key}' of the \w+\.": without,
        rf"lacks '{key}'.* holds 'decoder.renamed'": {**without, "decoder.renamed": arrays[key]},
        "holds 'decoder.extra.weight', which": {**arrays, "decoder.extra.weight": arrays[key]},
        rf"{key} has shape .*; the \w+ needs \({arrays[key].shape[0]}, ": {**arrays, key: arrays[key][:-1]},
    }
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=f"here: {message}|here {message}"):
            BUILDERS[component](config, wrong, "here")


def test_two_axes_swapped_are_noticed(tiny):
    config, arrays = arrays_of(tiny, "text_encoder")
    key = A_KEY["text_encoder"]
    with pytest.raises(ValueError, match=rf"{key} has shape \(32, 64\); the text_encoder needs \(64, 32\)"):
        build_text_encoder(config, {**arrays, key: arrays[key].T}, "here")


def test_nothing_is_assigned_when_one_tensor_is_wrong(tiny):
    config, arrays = arrays_of(tiny, "text_encoder")
    model = diffusers_folder.TextEncoder(**text_encoder_arguments(config))
    before = [np.array(v) for v in model.variables]
    wrong = {**arrays, "text_model.final_layer_norm.bias": np.zeros(3, "float32")}
    with pytest.raises(ValueError, match="final_layer_norm.bias has shape"):
        assign_state_dict(model, wrong, "here")
    for a, b in zip(before, model.variables):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("component", BUILDERS)
def test_truncated_files_are_named(tiny, component, tmp_path):
    shutil.copytree(tiny / component, tmp_path / component)
    path = tmp_path / component / diffusers_folder.WEIGHT_FILES[component][0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
        read_component(tmp_path, component)


def test_missing_and_damaged_parts_of_a_folder(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json' is missing"):
        read_component(tmp_path / "nowhere", "unet")
    (tmp_path / "unet").mkdir()
    shutil.copy(tiny / "unet" / "config.json", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="No weights in .*diffusion_pytorch_model.safetensors"):
        read_component(tmp_path, "unet")
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": ')
    with pytest.raises(ValueError, match="config.json' is not valid JSON"):
        read_component(tmp_path, "unet")


# === Files ===


@pytest.mark.parametrize("component", BUILDERS)
def test_bin_sharded_and_half_precision_files(tiny, component, tmp_path):
    expected = load(tiny, component)
    peer = PEERS[component].from_pretrained(tiny / component)
    torch_name = diffusers_folder.WEIGHT_FILES[component][2]
    for name in ("bin", "shards", "fp16", "both"):
        (tmp_path / name / component).mkdir(parents=True)
    shutil.copy(tiny / component / "config.json", tmp_path / "bin" / component)
    torch.save(peer.state_dict(), tmp_path / "bin" / component / torch_name)
    assert_same_weights(load(tmp_path / "bin", component), expected)

    peer.save_pretrained(tmp_path / "shards" / component, max_shard_size="50KB")
    assert len(list((tmp_path / "shards" / component).glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path / "shards", component), expected)

    # The variant is asked for, or is the only one there.
    peer.save_pretrained(tmp_path / "both" / component)
    peer = peer.half()
    for name in ("fp16", "both"):
        peer.save_pretrained(tmp_path / name / component, variant="fp16")
    assert_same_weights(load(tmp_path / "both", component), expected)
    half = load(tmp_path / "fp16", component)
    assert_same_weights(load(tmp_path / "both", component, variant="fp16"), half)
    for a, b in zip(half.variables, expected.variables):
        assert a.dtype == "float32"
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype("float16").astype("float32"))


def test_half_precision_models_keep_half_precision_weights(tiny):
    expected = load(tiny, "unet")
    model = build_diffusion_model(*read_component(tiny, "unet"), str(tiny), dtype="bfloat16")
    for a, b in zip(model.variables, expected.variables):
        assert a.dtype == "bfloat16"
        np.testing.assert_allclose(np.asarray(a).astype("float32"), b, rtol=2**-8)


# === Checkpoints of other years ===


def test_text_encoder_keys_with_and_without_prefix_and_position_ids(tiny, tmp_path):
    expected = load(tiny, "text_encoder")
    _, arrays = arrays_of(tiny, "text_encoder")
    position_ids = np.arange(77)[None]
    old = {**arrays, "text_model.embeddings.position_ids": position_ids}
    new = {key.removeprefix("text_model."): array for key, array in old.items()}
    for name, dialect in {"old": old, "new": new}.items():
        assert_same_weights(load(rewrite(tiny, "text_encoder", dialect, tmp_path / name), "text_encoder"), expected)


@pytest.mark.parametrize("convolutions", [False, True])
def test_vae_of_2022(tiny, convolutions, tmp_path):
    _, arrays = arrays_of(tiny, "vae")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, array in arrays.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if convolutions and ".attentions." in key and array.ndim == 2:
            array = array[:, :, None, None]
        old[key] = array
    assert sum(".proj_attn." in key for key in old) == 4
    folder = rewrite(tiny, "vae", old, tmp_path)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert load(folder, "vae").arguments["scaling_factor"] == 0.18215
    for build in (build_decoder, build_image_encoder):
        assert_same_weights(build(*read_component(folder, "vae"), "here"), build(*read_component(tiny, "vae"), "here"))


def test_unet_projections_take_either_shape(tiny, v2_like):
    for folder, reshape in ((tiny, lambda a: a[:, :, 0, 0]), (v2_like, lambda a: a[:, :, None, None])):
        config, arrays = arrays_of(folder, "unet")
        other = {k: reshape(v) if ".proj_" in k and k.endswith("weight") else v for k, v in arrays.items()}
        assert_same_weights(build_diffusion_model(config, other, "here"), load(folder, "unet"))


def test_vae_of_two_levels(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    peer = diffusers.AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5)
    peer.save_pretrained(tmp_path / "vae")
    component = read_component(tmp_path, "vae")
    encoder, decoder = build_image_encoder(*component, "here"), build_decoder(*component, "here")
    image = np.random.default_rng(0).uniform(-1, 1, (1, 12, 20, 3)).astype("float32")
    latent = encoder(image)
    with torch.no_grad():
        mean = peer.encode(torch.from_numpy(image.transpose(0, 3, 1, 2))).latent_dist.mean
        decoded = peer.decode(mean).sample
    np.testing.assert_allclose(latent, 0.5 * mean.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(decoder(latent), decoded.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    assert latent.shape == (1, 6, 10, 4)


# === Configs ===


@pytest.mark.parametrize("component", BUILDERS)
def test_fields_at_their_defaults_need_not_be_written(narrow_v1, component):
    """What a config leaves out means what the peers take it to mean."""
    config = read_component(narrow_v1, component)[0]
    peer = transformers.CLIPTextConfig if component == "text_encoder" else PEERS[component]
    defaults = {name: p.default for name, p in inspect.signature(peer.__init__).parameters.items()}
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    short = {k: v for k, v in config.items() if k not in defaults or defaults[k] != v}
    assert len(short) < len(config) - 4
    assert ARGUMENTS[component](short) == ARGUMENTS[component](config)


UNSUPPORTED = [
    ("text_encoder", "hidden_act", "gelu_new"),
    ("text_encoder", "layer_norm_eps", 1e-6),
    ("unet", "act_fn", "gelu"),
    ("unet", "addition_embed_type", "text_time"),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "conv_in_kernel", 1),
    ("unet", "cross_attention_dim", [32, 64]),
    ("unet", "cross_attention_norm", "layer_norm"),
    ("unet", "down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
    ("unet", "dual_cross_attention", True),
    ("unet", "encoder_hid_dim", 4096),
    ("unet", "flip_sin_to_cos", False),
    ("unet", "layers_per_block", [1, 2]),
    ("unet", "mid_block_only_cross_attention", True),
    ("unet", "mid_block_type", None),
    ("unet", "only_cross_attention", True),
    ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "time_cond_proj_dim", 256),
    ("unet", "time_embedding_dim", 512),
    ("unet", "timestep_post_act", "silu"),
    ("unet", "transformer_layers_per_block", [1, 2]),
    ("unet", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
    ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("vae", "latents_mean", [0.0]),
    ("vae", "mid_block_add_attention", False),
    ("vae", "shift_factor", 0.1),
    ("vae", "use_quant_conv", False),
]


@pytest.mark.parametrize("component,field,value", UNSUPPORTED)
def test_fields_that_change_the_numbers_are_refused(tiny, component, field, value):
    config = {**read_component(tiny, component)[0], field: value}
    with pytest.raises(ValueError, match=rf"{component}/config\.json: {field} "):
        ARGUMENTS[component](config)


# === Writing ===


@pytest.mark.parametrize("checkpoint,dtype", [("tiny", None), ("tiny", "float16"), ("v2_like", None)])
def test_peers_open_what_we_write_and_compute_the_same(checkpoint, dtype, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    text, unet, decoder = (load(folder, component) for component in BUILDERS)
    encoder = build_image_encoder(*read_component(folder, "vae"), "here")
    tokenizer = CLIPTokenizer.from_folder(folder / "tokenizer")
    write_component(tmp_path, "text_encoder", text_encoder_config(text, tokenizer), [text], dtype)
    write_component(tmp_path, "unet", diffusion_model_config(unet, 8), [unet], dtype)
    write_component(tmp_path, "vae", autoencoder_config(decoder, 64), [encoder, decoder], dtype)
    inputs = {
        "text_encoder": [torch.arange(77)[None]],
        "unet": [torch.randn(1, 4, 8, 8), 500.5, torch.randn(1, 77, text.arguments["hidden_size"])],
        "vae": [torch.randn(1, 3, 64, 64)],
    }
    for component, peer in PEERS.items():
        before, after = (peer.from_pretrained(f / component).eval() for f in (folder, tmp_path))
        assert {p.dtype for p in after.parameters()} == {torch.float32}  # they work together whatever is stored
        arrays = arrays_of(tmp_path, component)[1]
        assert {array.dtype for array in arrays.values()} == {np.dtype(dtype or "float32")}
        with torch.no_grad():
            expected, got = before(*inputs[component])[0], after(*inputs[component])[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02 if dtype else 0)
        if dtype is None:
            original = arrays_of(folder, component)[1]
            assert arrays.keys() == original.keys()
            assert all(np.array_equal(arrays[key], original[key]) for key in arrays)
            again = ARGUMENTS[component](read_component(tmp_path, component)[0])
            assert again == ARGUMENTS[component](read_component(folder, component)[0])


def test_state_dicts_are_contiguous_and_in_the_dtype_of_the_variables(tiny):
    model = build_text_encoder(*read_component(tiny, "text_encoder"), "here", dtype="bfloat16")
    for key, array in to_state_dict(model).items():
        assert array.dtype == "bfloat16" and array.flags.c_contiguous, key


def test_a_failed_write_leaves_no_file(tiny, tmp_path):
    model = load(tiny, "unet")
    with pytest.raises(TypeError, match="safetensors does not hold"):
        write_component(tmp_path, "unet", {}, [model], "complex64")
    assert not list((tmp_path / "unet").glob("*model*"))
