"""ControlNets: pictures against diffusers' pipelines, files in both namings, the Canny edges, bad input."""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import diffusers
import keras
import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS, write_checkpoint
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

import keras_sd
from keras_sd import ControlNet, StableDiffusion, load_control_net, save_control_net
from keras_sd.control import Control, conditioning, control_scales
from keras_sd.layers import timestep_embedding
from keras_sd.noise import initial_noise
from keras_sd.weights.assign import to_state_dict
from keras_sd.weights.control_net import control_net_arguments, original_names

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype="uint8")
EDGES, DEPTH = (np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype="uint8") for seed in (1, 2))
MASK = np.zeros((64, 96), bool)
MASK[13:45, 20:75] = True
START = initial_noise(3, 1, (8, 12, 4))


def write_control_net(checkpoint, folder, seed=1, **kwargs):
    """Writes a ControlNet with random weights for a checkpoint's U-Net, with diffusers; returns the folder."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    net = diffusers.ControlNetModel.from_unet(unet, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets(tiny, tmp_path_factory):
    """[(our net, diffusers' net)], of two random ones."""
    folders = [write_control_net(tiny, tmp_path_factory.mktemp("net"), seed) for seed in (1, 2)]
    return [(load_control_net(folder), diffusers.ControlNetModel.from_pretrained(folder)) for folder in folders]


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def open_peer(kind, folder, nets):
    nets = nets[0] if len(nets) == 1 else nets
    peer = getattr(diffusers, kind).from_pretrained(folder, controlnet=nets, safety_checker=None)
    peer.scheduler = diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=peer.scheduler.config.prediction_type,
    )
    peer.set_progress_bar_config(disable=True)
    return peer


def draw_theirs(peer, images, scales, **kwargs):
    images, scales = (images[0], float(scales[0])) if len(images) == 1 else (images, [*map(float, scales)])
    options = {"num_inference_steps": 5, "output_type": "np", "controlnet_conditioning_scale": scales} | kwargs
    if "latents" not in inspect.signature(peer.__call__).parameters or "strength" in options:
        drawn = peer("an apple", control_image=images, **options).images
    else:
        latents = torch.from_numpy(np.moveaxis(START, -1, 1).copy())
        drawn = peer("an apple", image=images, latents=latents, height=64, width=96, **options).images
    return np.round(drawn * 255).astype("uint8")


def draw_ours(sd, control, **kwargs):
    options = {"num_steps": 5, "diffusion_noise": START, "sampler": "ddim", "progress": False}
    return sd.text_to_image("an apple", height=64, width=96, control=control, **options, **kwargs)


def assert_close(ours, theirs):
    assert (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean() >= 0.999


def assert_differ(first, second):
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 0.2


def pil(array):
    return Image.fromarray(array)


# === Pictures ===

# Each other net and mode compiles the step anew: tests of the same ones stand together.


def test_one_net(sd, nets, tiny):
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [theirs])
    drawn = draw_ours(sd, [(ours, EDGES)])
    assert_close(drawn, draw_theirs(peer, [pil(EDGES)], [1.0]))
    plain = draw_ours(sd, None)
    assert_differ(drawn, plain)
    assert_close(draw_ours(sd, [(ours, EDGES, 0.4)]), draw_theirs(peer, [pil(EDGES)], [0.4]))
    for nothing in ([], [(ours, EDGES, 0.0)]):
        np.testing.assert_array_equal(draw_ours(sd, nothing), plain)


@pytest.mark.parametrize("start, end", [(0.0, 0.6), (0.4, 1.0), (0.3, 0.7)])
def test_interval(sd, nets, tiny, start, end):
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [theirs])
    drawn = draw_ours(sd, [(ours, EDGES, 1.0, start, end)])
    kwargs = {"control_guidance_start": start, "control_guidance_end": end}
    assert_close(drawn, draw_theirs(peer, [pil(EDGES)], [1.0], **kwargs))


def test_rule_of_the_interval_is_diffusers():
    """Row i of n counts where start ≤ i / n and (i + 1) / n ≤ end."""
    for rows in (1, 5, 21, 50):
        for start, end in ((0.0, 1.0), (0.1, 0.3), (0.25, 0.75), (0.6, 0.9)):
            kept = [1.0 - float(i / rows < start or (i + 1) / rows > end) for i in range(rows)]
            ours = control_scales([Control(None, None, 0.5, start, end)], rows)
            np.testing.assert_array_equal(ours[:, 0], 0.5 * np.array(kept, "float32"))


def with_our_noise(peer, monkeypatch):
    """Lets a peer start from the same noise and take the autoencoder's mean, as we do."""
    module = inspect.getmodule(type(peer))
    start = torch.from_numpy(np.moveaxis(START, -1, 1).copy())
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: start)
    monkeypatch.setattr(module, "retrieve_latents", lambda output, **k: output.latent_dist.mode())


def test_image_to_image(sd, nets, tiny, monkeypatch):
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetImg2ImgPipeline", tiny, [theirs])
    with_our_noise(peer, monkeypatch)
    kwargs = {"strength": 0.6, "control_guidance_start": 0.3, "control_guidance_end": 1.0}
    expected = draw_theirs(peer, [pil(EDGES)], [0.8], image=pil(PICTURE), **kwargs)
    options = {"num_steps": 5, "diffusion_noise": START, "sampler": "ddim", "progress": False}
    control = [(ours, EDGES, 0.8, 0.3, 1.0)]
    assert_close(sd.image_to_image(PICTURE, "an apple", 0.6, control=control, **options), expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(sd, nets, tiny, tmp_path, monkeypatch, channels):
    """Blended, and with a U-Net that sees mask and masked picture, of which the ControlNet sees the latent alone."""
    folder = tiny
    if channels == 9:
        recipe = CHECKPOINTS["tiny"]
        monkeypatch.setitem(CHECKPOINTS, "painted", {**recipe, "unet": {**recipe["unet"], "in_channels": 9}})
        folder = write_checkpoint("painted", tmp_path)
        sd = StableDiffusion.from_preset(folder)
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetInpaintPipeline", folder, [theirs])
    with_our_noise(peer, monkeypatch)
    mask = np.uint8(255 * MASK)
    expected = draw_theirs(peer, [pil(EDGES)], [0.8], image=pil(PICTURE), mask_image=pil(mask), strength=1.0)
    options = {"num_steps": 5, "diffusion_noise": START, "sampler": "ddim", "progress": False}
    drawn = sd.inpaint(PICTURE, mask, "an apple", control=[(ours, EDGES, 0.8)], **options)
    assert_close(drawn[:, MASK], expected[:, MASK])
    assert (drawn[0][~MASK] == PICTURE[~MASK]).all()


def test_pictures_of_any_size_and_kind(sd, nets, tmp_path):
    """Scaled to cover the picture, middle taken; at the second size of `hires` again; alike for a batch."""
    (ours, _), _ = nets
    grey = Image.fromarray(EDGES[:50, :61]).convert("L")
    grey.save(tmp_path / "a.png")
    seen = conditioning([Control(ours, tmp_path / "a.png")], 64, 96, 8)
    assert seen.shape == (1, 1, 64, 96, 3) and seen.min() >= 0 and seen.max() <= 1
    assert (conditioning([Control(ours, EDGES)], 64, 96, 8)[0, 0] == EDGES / np.float32(255)).all()
    options = {"num_steps": 2, "progress": False, "control": [(ours, tmp_path / "a.png", 0.5)], "seed": 3}
    drawn = sd.text_to_image("an apple", height=64, width=96, **options)
    batch = sd.text_to_image("an apple", height=64, width=96, batch_size=2, **options)
    assert np.abs(batch[0].astype(int) - drawn[0]).max() <= 1
    large = sd.text_to_image("an apple", height=32, width=32, hires=2.0, **options)
    assert large.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_guess_mode(sd, nets, tiny, guidance):
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [theirs])
    drawn = draw_ours(sd, [(ours, EDGES, 0.9)], guess_mode=True, unconditional_guidance_scale=guidance)
    expected = draw_theirs(peer, [pil(EDGES)], [0.9], guess_mode=True, guidance_scale=guidance)
    assert_close(drawn, expected)


def test_two_nets(sd, nets, tiny):
    (one, _), (other, _) = nets
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [theirs for _, theirs in nets])
    drawn = draw_ours(sd, [(one, EDGES, 0.7), (other, DEPTH, -0.5)])
    assert_close(drawn, draw_theirs(peer, [pil(EDGES), pil(DEPTH)], [0.7, -0.5]))
    drawn = draw_ours(sd, [(one, EDGES, 1.0, 0.0, 0.5), (other, DEPTH, 0.8, 0.4, 0.9)])
    kwargs = {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.5, 0.9]}
    assert_close(drawn, draw_theirs(peer, [pil(EDGES), pil(DEPTH)], [1.0, 0.8], **kwargs))


@pytest.mark.parametrize("guess_mode", [False, True])
def test_in_two_passes(nets, tiny, guess_mode):
    """Low memory implies them; nets stay, which are the user's."""
    (ours, theirs), _ = nets
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [theirs])
    expected = draw_theirs(peer, [pil(EDGES)], [0.9], guess_mode=guess_mode)
    frugal = StableDiffusion.from_preset(tiny, low_memory=True)
    assert_close(draw_ours(frugal, [(ours, EDGES, 0.9)], guess_mode=guess_mode), expected)


def test_averaged_residuals(sd, tiny, tmp_path):
    """The "shuffle" network: its residuals are averaged over the picture, which implies guess mode."""
    folder = write_control_net(tiny, tmp_path, 4)
    config = json.loads((folder / "config.json").read_text()) | {"global_pool_conditions": True}
    (folder / "config.json").write_text(json.dumps(config))
    peer = open_peer("StableDiffusionControlNetPipeline", tiny, [diffusers.ControlNetModel.from_pretrained(folder)])
    assert_close(draw_ours(sd, [(load_control_net(folder), EDGES)]), draw_theirs(peer, [pil(EDGES)], [1.0]))


@pytest.mark.parametrize("backend", ["jax", "torch", "openvino"])
def test_other_backends(backend, sd, nets, tiny, tmp_path):
    save_control_net(nets[0][0], tmp_path)
    script = """
import sys
import numpy as np
from keras_sd import StableDiffusion, load_control_net
preset, folder = sys.argv[1:]
control = [(load_control_net(folder), np.full((64, 64, 3), 40, "uint8"), 0.8)]
options = dict(num_steps=1, seed=3, progress=False, control=control, unconditional_guidance_scale=1.0)
np.save(f"{folder}/out.npy", StableDiffusion.from_preset(preset).text_to_image("an apple", **options))
"""
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # JAX would take a minute to compile
    subprocess.run([sys.executable, "-c", script, str(tiny), str(tmp_path)], env=env, check=True)
    control = [(nets[0][0], np.full((64, 64, 3), 40, "uint8"), 0.8)]
    options = {"num_steps": 1, "seed": 3, "progress": False, "control": control, "unconditional_guidance_scale": 1.0}
    drawn = sd.text_to_image("an apple", **options)
    assert np.abs(np.load(tmp_path / "out.npy").astype(int) - drawn).max() <= 2


# === The model ===


@pytest.mark.parametrize("name", ["narrow_v1", "v2_like"])
def test_residuals(name, request, tmp_path):
    """The topologies of SD v1 and v2; sizes that are no multiple of 64."""
    checkpoint = request.getfixturevalue(name)
    folder = write_control_net(checkpoint, tmp_path)
    theirs, ours = diffusers.ControlNetModel.from_pretrained(folder), load_control_net(folder)
    random, width = np.random.default_rng(0), ours.arguments["block_out_channels"][0]
    timestep = np.array([801, 20])
    inputs = {
        "latent": random.standard_normal((2, 9, 12, 4), "float32"),
        "context": random.standard_normal((2, 154, 128), "float32"),
        "conditioning": random.random((2, 72, 96, 3), "float32"),
        "timestep_embedding": np.array(timestep_embedding(timestep, width)),
    }
    latent, picture = (torch.from_numpy(np.moveaxis(inputs[k], -1, 1).copy()) for k in ("latent", "conditioning"))
    with torch.no_grad():
        context = torch.from_numpy(inputs["context"])
        down, middle = theirs(latent, torch.from_numpy(timestep), context, picture, return_dict=False)
    residuals = ours(inputs)
    assert len(residuals) == len(down) + 1 == 13
    for residual, expected in zip(residuals, [*down, middle]):
        expected = np.moveaxis(expected.numpy(), 1, -1)
        np.testing.assert_allclose(np.array(residual), expected, atol=1e-5 * np.abs(expected).max())


def test_a_new_net_adds_nothing(tiny):
    """It begins as the U-Net's own way down, and steers nothing before it is trained."""
    model = StableDiffusion.from_preset(tiny).diffusion_model
    net = ControlNet.from_diffusion_model(model)
    copied = {v.path: np.array(v) for v in model.variables}
    shared = [v for v in net.variables if v.path in copied]
    assert len(shared) > 50 and all((np.array(v) == copied[v.path]).all() for v in shared)
    inputs = {
        "latent": START[:, :7, :9],
        "timestep_embedding": np.array(timestep_embedding(np.array([500.0]), 32)),
        "context": np.random.default_rng(0).standard_normal((1, 77, 32), "float32"),
    }
    inputs = {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}
    residuals = net({**inputs, "conditioning": keras.ops.ones((1, 56, 72, 3))})
    assert all(float(keras.ops.max(keras.ops.abs(x))) == 0 for x in residuals)
    np.testing.assert_array_equal(model.controlled({**inputs, "residuals": residuals}), model(inputs))
    again, other = (ControlNet.from_diffusion_model(model, seed=seed) for seed in (0, 1))
    assert_same_weights(net, again)
    assert any((a != b).any() for a, b in zip(weights(net), weights(other)))
    assert net.factor == 8 and ControlNet.from_config(net.get_config()).arguments == net.arguments


# === Files ===


def weights(net):
    return [np.array(v) for v in net.variables]


def assert_same_weights(first, second):
    assert len(first.variables) == len(second.variables)
    assert all((a == b).all() for a, b in zip(weights(first), weights(second)))


def original_file(net, prefix="control_model."):
    """The arrays of one of our nets under the names of the original code."""
    folder = net.arguments
    layers, levels = folder["layers_per_block"], len(folder["block_out_channels"])
    hint = 2 * (len(folder["conditioning_embedding_out_channels"]) - 1)
    table = {new: old for old, new in original_names(levels, layers, folder["attention_levels"], hint).items()}
    arrays = {key.rpartition("."): array for key, array in to_state_dict(net).items()}
    return {f"{prefix}{table[module]}.{kind}": array for (module, _, kind), array in arrays.items()}


@pytest.fixture(scope="module")
def narrow(narrow_v1, tmp_path_factory):
    """Folder of a net with the topology of SD v1."""
    return write_control_net(narrow_v1, tmp_path_factory.mktemp("narrow"), 5)


def test_original_naming(narrow, tmp_path):
    net = load_control_net(narrow)
    own = original_file(net)
    published = {  # of control_sd15_canny.pth
        "control_model.time_embed.2.bias",
        "control_model.zero_convs.0.0.weight",
        "control_model.zero_convs.11.0.bias",
        "control_model.input_hint_block.0.weight",
        "control_model.input_hint_block.14.bias",
        "control_model.input_blocks.0.0.weight",
        "control_model.input_blocks.3.0.op.weight",
        "control_model.input_blocks.4.0.skip_connection.weight",
        "control_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "control_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "control_model.middle_block.2.out_layers.3.weight",
        "control_model.middle_block_out.0.bias",
    }
    assert published <= own.keys() and len(own) == 340  # tensors in that file's control_model
    config = json.loads((narrow / "config.json").read_text())
    tensors = {key: torch.from_numpy(array.copy()) for key, array in own.items()}
    expected = diffusers.ControlNetModel.from_pretrained(narrow).state_dict()
    theirs = convert_controlnet_checkpoint(tensors, config)
    assert theirs.keys() == expected.keys() and all(torch.equal(theirs[key], expected[key]) for key in expected)
    whole = {"model.diffusion_model.out.0.weight": np.zeros(3, "float32"), "betas": np.zeros(3, "float32")}
    save_file({**own, **whole}, tmp_path / "control_sd15_canny.safetensors")
    assert_same_weights(load_control_net(tmp_path / "control_sd15_canny.safetensors"), net)
    torch.save({"state_dict": tensors}, tmp_path / "control.pth")
    assert_same_weights(load_control_net(tmp_path / "control.pth"), net)
    save_file(original_file(net, ""), tmp_path / "bare.safetensors")
    assert_same_weights(load_control_net(tmp_path / "bare.safetensors"), net)


def test_original_naming_of_v2(v2_like, tmp_path):
    net = load_control_net(write_control_net(v2_like, tmp_path))
    save_file(original_file(net), tmp_path / "v2.safetensors")
    opened = load_control_net(tmp_path / "v2.safetensors")
    assert opened.arguments["num_attention_heads"] == (1, 2, 3, 3) and opened.arguments["use_linear_projection"]
    assert_same_weights(opened, net)


def test_single_file_of_diffusers(narrow, nets, tmp_path):
    """Alone its shapes say everything; with a config beside it, that does."""
    net = load_control_net(narrow)
    assert_same_weights(load_control_net(narrow / "diffusion_pytorch_model.safetensors"), net)
    path = tmp_path / "net.safetensors"
    path.write_bytes((narrow / "diffusion_pytorch_model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text("{}")  # of something else
    opened = load_control_net(path)
    assert_same_weights(opened, net)
    assert {**opened.arguments, "num_attention_heads": None} == {**net.arguments, "num_attention_heads": None}
    save_control_net(nets[0][0], tmp_path / "tiny")
    beside = load_control_net(tmp_path / "tiny" / "diffusion_pytorch_model.safetensors")
    assert beside.arguments == nets[0][0].arguments  # 8 groups and 4 heads, which no shape tells


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_diffusers_opens_what_is_saved(narrow, tmp_path, dtype):
    net = load_control_net(narrow)
    save_control_net(net, tmp_path, dtype)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    theirs, expected = (diffusers.ControlNetModel.from_pretrained(folder) for folder in (tmp_path, narrow))
    same = torch.equal if dtype is None else lambda a, b: torch.equal(a, b.half().float())
    pairs = zip(theirs.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(same(a, b) for a, b in pairs)
    fields = {
        k for k, v in expected.config.items() if not k.startswith("_") and k != "conditioning_embedding_out_channels"
    }
    differing = {k: (expected.config[k], theirs.config[k]) for k in fields if expected.config[k] != theirs.config[k]}
    assert differing == {}
    if dtype:
        assert load_file(tmp_path / files[1])["conv_in.weight"].dtype == np.float16
        assert load_control_net(tmp_path, dtype="bfloat16").variables[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    "change, error",
    [
        ({"block_out_channels": [32, 64, 128, 160]}, "down_blocks.3.resnets.0.conv_shortcut.bias"),
        ({"norm_num_groups": 7}, "7"),
        ({"conditioning_channels": 1}, "control_net/config.json: conditioning_channels is 1"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "is 'bgr'; only 'rgb' is supported"),
        ({"addition_embed_type": "text_time"}, "control_net/config.json: addition_embed_type is 'text_time'"),
        ({"down_block_types": ["DownBlock"] * 4}, "control_net/config.json: down_block_types holds 'DownBlock'"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
    ],
)
def test_bad_configs(narrow, tmp_path, change, error):
    config = json.loads((narrow / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.symlink(narrow / "diffusion_pytorch_model.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=error):
        load_control_net(tmp_path)


def test_bad_files(narrow, tiny, tmp_path):
    def refused(arrays, error):
        save_file(arrays, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=error):
            load_control_net(tmp_path / "bad.safetensors")

    arrays = original_file(load_control_net(narrow))
    zeros = np.zeros(3, "float32")
    refused({**arrays, "control_model.zero_convs.12.0.bias": zeros}, "'control_model.zero_convs.12.0.bias'")
    refused({**arrays, "lora_up": zeros}, "'lora_up'")
    missing = {key: array for key, array in arrays.items() if "zero_convs.3." not in key}
    refused(missing, "lacks 'controlnet_down_blocks.3.bias' and 1 more tensors of the control_net")
    refused({"conv_in.weight": zeros}, "is no ControlNet")
    known = load_file(narrow / "diffusion_pytorch_model.safetensors")
    refused({**known, "conv_in.bias": zeros}, r"conv_in.bias has shape \(3,\)")
    refused({**known, "extra": zeros}, "'extra'")
    with pytest.raises(ValueError, match="is no ControlNet"):
        load_control_net(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileNotFoundError, match="No ControlNet at"):
        load_control_net(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_control_net(tmp_path)


def test_defaults_are_those_of_the_published_ones():
    """lllyasviel/control_v11p_sd15_canny's config."""
    config = {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "class_embed_type": None,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
        "upcast_attention": False,
        "use_linear_projection": False,
    }
    defaults = {name: p.default for name, p in inspect.signature(ControlNet).parameters.items()}
    assert control_net_arguments(config) == {k: v for k, v in defaults.items() if k not in ("name", "dtype")}


# === Edges ===


def test_canny_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    assert (keras_sd.canny(PICTURE)[..., 0] == cv2.Canny(PICTURE, 100, 200)).all()
    square = np.zeros((32, 32, 3), "uint8")
    square[8:24, 8:24] = 255
    edges = keras_sd.canny(Image.fromarray(square), 50, 100)
    assert edges.shape == (32, 32, 3) and set(np.unique(edges)) == {0, 255} and 40 < (edges[..., 0] > 0).sum() < 80
    with pytest.raises(ValueError, match="low 300 and high 200"):
        keras_sd.canny(square, 300, 200)


def test_canny_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        keras_sd.canny(PICTURE)


# === Bad input ===


@pytest.mark.parametrize(
    "control, error",
    [
        ("edges.png", "control must be a list of"),
        (["edges.png"], "control must be a list of"),
        ([("net", EDGES)], r"net being a ControlNet; got \(str, ndarray\)"),
        (lambda net: [(net, EDGES, 1.0, 0.5)], "net being a ControlNet; got .ControlNet, ndarray, float, float."),
        (lambda net: (net, EDGES), "control must be a list of"),
        (lambda net: [(net, EDGES, "strong")], "scale must be a number; got 'strong'"),
        (lambda net: [(net, EDGES, 1.0, 0.5, 0.5)], "start 0.5 and end 0.5"),
        (lambda net: [(net, EDGES, 1.0, 0.0, 1.5)], "start 0 and end 1.5"),
        (lambda net: [(net, "none.png")], "control image: there is no file 'none.png'"),
        (lambda net: [(net, np.zeros((8, 8)) - 1)], "control image must be from 0 to 1"),
    ],
)
def test_bad_controls(sd, nets, control, error):
    control = control(nets[0][0]) if callable(control) else control
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=error):
        draw_ours(sd, control)


def test_nets_for_other_models(sd, narrow):
    with pytest.raises(ValueError, match=r"its block_out_channels is \(32, 64, 128, 128\), here \(32, 64\)"):
        draw_ours(sd, [(load_control_net(narrow), EDGES)])
    options = {**ControlNet.from_diffusion_model(sd.diffusion_model).arguments}
    net = ControlNet(**{**options, "conditioning_embedding_out_channels": (16, 32, 96)})
    with pytest.raises(ValueError, match="takes 4 pixels per latent position, here 8"):
        draw_ours(sd, [(net, EDGES)])
    with pytest.raises(ValueError, match="its cross_attention_dim is 64, here 32"):
        draw_ours(sd, [(ControlNet(**{**options, "cross_attention_dim": 64}), EDGES)])
