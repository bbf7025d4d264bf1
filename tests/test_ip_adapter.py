"""IP-Adapter: pictures against diffusers' `load_ip_adapter`, on random adapters of the base version."""

import diffusers
import numpy as np
import pytest
import torch
from clip_vision import VISION, write_image_encoder
from PIL import Image
from safetensors.numpy import load_file, save_file

from keras_sd import StableDiffusion
from keras_sd.__main__ import main
from keras_sd.models.ip_adapter import cross_attentions
from keras_sd.noise import initial_noise
from keras_sd.weights.control_net import load_control_net
from keras_sd.weights.ip_adapter import read_ip_adapter

START = initial_noise(3, 1, (8, 8, 4))


def write_adapter(folder, unet, file="ip-adapter.safetensors", seed=0):
    """A random adapter for a peer's U-Net, `image_encoder/` beside it; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    width = unet.config.cross_attention_dim
    shapes = {"proj.weight": (4 * width, VISION["projection_dim"]), "proj.bias": (4 * width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    arrays = {f"image_proj.{name}": random.standard_normal(shape) for name, shape in shapes.items()}
    modules = [(n, m) for n, m in unet.named_modules() if n.endswith(("attn1", "attn2"))]
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    for number, name in enumerate(names):
        module = dict(modules)[name]
        if name.endswith("attn2"):
            for part in ("k", "v"):
                shape = (module.to_k.out_features, width)
                arrays[f"ip_adapter.{number}.to_{part}_ip.weight"] = random.standard_normal(shape) * 3 / width**0.5
    arrays = {key: array.astype("float32") for key, array in arrays.items()}
    if file.endswith(".safetensors"):
        save_file(arrays, folder / file)
    else:
        nested = {"image_proj": {}, "ip_adapter": {}}
        for key, array in arrays.items():
            part, _, name = key.partition(".")
            nested[part][name] = torch.from_numpy(array)
        torch.save(nested, folder / file)
    write_image_encoder(folder / "image_encoder")
    return folder / file


def pictures(count=1):
    colours = np.random.default_rng(1).uniform(0, 255, (count, 3, 4, 3)).astype("uint8")
    return [Image.fromarray(one).resize((80, 60)) for one in colours]


@pytest.fixture(scope="module")
def peer(tiny, tmp_path_factory):
    """(diffusers' pipeline with an adapter, the adapter's file)."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    file = write_adapter(tmp_path_factory.mktemp("adapter"), theirs.unet)
    theirs.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    return theirs, file


@pytest.fixture(scope="module")
def loaded(tiny, peer):
    sd = StableDiffusion.from_preset(tiny)
    sd.load_ip_adapter(peer[1])
    return sd


def draw(sd, **options):
    options = {"diffusion_noise": START, "num_steps": 3, "progress": False} | options
    return sd.text_to_image("an apple", **options)


def draw_theirs(peer, prompt, scale=1.0, **options):
    peer.set_ip_adapter_scale(scale)
    noise = torch.from_numpy(np.moveaxis(START, -1, 1).copy())
    options = {"latents": noise, "num_inference_steps": 3, "output_type": "np"} | options
    return np.round(peer("an apple", ip_adapter_image=prompt, **options).images * 255)


def assert_close(ours, theirs):
    assert (np.abs(ours.astype(int) - theirs) <= 1).mean() >= 0.999


def assert_differ(first, second):
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 0.5


# === Pictures ===


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
def test_pictures_are_the_peers(scale, loaded, peer):
    (image,) = pictures()
    loaded.set_ip_adapter_scale(scale)
    ours = draw(loaded, image_prompt=image)
    assert_close(ours, draw_theirs(peer[0], image, scale))
    loaded.set_ip_adapter_scale(0.0)
    plain = draw(loaded, image_prompt=image)
    assert_differ(ours, plain) if scale else np.testing.assert_array_equal(ours, plain)
    loaded.set_ip_adapter_scale(1.0)


def test_a_picture_for_each(loaded, peer):
    """A batch with one picture for all, and one each; without guidance; in two passes."""
    images, start = pictures(2), np.repeat(START, 2, axis=0)
    both = loaded.text_to_image("an apple", batch_size=2, diffusion_noise=start, num_steps=3, image_prompt=images)
    for i, image in enumerate(images):
        assert_close(both[i : i + 1], draw_theirs(peer[0], image))
    same = loaded.text_to_image("an apple", batch_size=2, diffusion_noise=start, num_steps=3, image_prompt=images[0])
    np.testing.assert_allclose(same[1].astype(int), both[0], atol=1)
    alone = draw(loaded, image_prompt=images[0], unconditional_guidance_scale=1)
    assert_close(alone, draw_theirs(peer[0], images[0], guidance_scale=1.0))


def test_order_of_the_attentions(narrow_v1, tmp_path):
    """Several levels and blocks: the file, here a .bin, counts the way down, the way up, then the middle."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(narrow_v1, subfolder="unet")
    file = write_adapter(tmp_path, unet, "ip-adapter.bin")
    arrays = torch.load(file)["ip_adapter"]
    assert len(arrays) == 32 and "31.to_v_ip.weight" in arrays  # as in ip-adapter_sd15
    model = StableDiffusion.from_preset(narrow_v1).diffusion_model
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for name, attention in zip(names, cross_attentions(model), strict=True):
        assert attention.query.kernel.path.replace("/", ".") == f"{name}.to_q.kernel"
    adapter = read_ip_adapter(file, model)
    for number, attention in enumerate(adapter.attentions):
        np.testing.assert_array_equal(np.array(attention.value.kernel).T, arrays[f"{2 * number + 1}.to_v_ip.weight"])


def test_image_to_image_inpaint_and_interpolate(loaded, peer, tiny):
    (image,), start = pictures(), Image.fromarray(np.full((64, 64, 3), 90, "uint8"))
    mask = np.zeros((64, 64), "uint8")
    mask[:32] = 255
    calls = [
        lambda prompt: loaded.image_to_image(start, "an apple", seed=1, num_steps=3, image_prompt=prompt),
        lambda prompt: loaded.inpaint(start, mask, "an apple", seed=1, num_steps=3, image_prompt=prompt),
        lambda prompt: loaded.interpolate("an apple", "a pear", 1, frames=2, num_steps=2, image_prompt=prompt),
    ]
    for call in calls:
        assert_differ(call(image), call(pictures(2)[1]))


def test_low_memory(tiny, loaded, peer):
    (image,) = pictures()
    sd = StableDiffusion.from_preset(tiny, low_memory=True)
    sd.load_ip_adapter(peer[1])
    assert_close(draw(sd, image_prompt=image), draw(loaded, image_prompt=image).astype(int))
    assert "image_prompt_encoder" not in vars(sd) and "diffusion_model" not in vars(sd)


def test_beside_a_control_net(loaded, peer, tiny):
    """The ControlNet sees the text alone, as in diffusers."""
    (image,), hint = pictures(), np.full((64, 64, 3), 0.8, "float32")
    theirs, _ = peer
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet")  # no adapter in it
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 16, 16))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    both = diffusers.StableDiffusionControlNetPipeline(**theirs.components | {"controlnet": net})
    both.set_progress_bar_config(disable=True)
    net.save_pretrained(peer[1].parent / "control")
    ours = draw(loaded, image_prompt=image, control=[(load_control_net(peer[1].parent / "control"), hint)])
    assert_close(ours, draw_theirs(both, image, image=torch.full((1, 3, 64, 64), 0.8), height=64, width=64))
    assert_differ(ours, draw(loaded, image_prompt=image))


# === Loading and unloading ===


def test_unloading_gives_the_model_back(tiny, peer, tmp_path):
    sd = StableDiffusion.from_preset(tiny)
    before = draw(sd)
    weights = [np.array(v) for v in sd.diffusion_model.variables]
    sd.load_ip_adapter(peer[1])
    assert_differ(draw(sd, image_prompt=pictures()[0]), before)
    assert len(sd.diffusion_model.variables) == len(weights)
    sd.save_preset(tmp_path / "saved")  # the model's own weights
    sd.unload_ip_adapter()
    np.testing.assert_array_equal(draw(sd), before)
    for a, b in zip(sd.diffusion_model.variables, weights, strict=True):
        np.testing.assert_array_equal(a, b)
    saved = StableDiffusion.from_preset(tmp_path / "saved").diffusion_model
    for a, b in zip(saved.variables, weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_command_line(tiny, loaded, peer, tmp_path, capsys):
    (image,) = pictures()
    image.save(tmp_path / "a.png")
    flags = ["--preset", str(tiny), "--steps", "3", "--seed", "1", "--quiet", "--out", str(tmp_path / "out.png")]
    adapter = ["--ip-adapter", f"{peer[1]}:0.5", "--image-prompt", str(tmp_path / "a.png")]
    assert main(["txt2img", "an apple", *flags, *adapter]) == 0
    loaded.set_ip_adapter_scale(0.5)
    drawn = draw(loaded, image_prompt=image, diffusion_noise=None, seed=1)
    loaded.set_ip_adapter_scale(1.0)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), drawn[0])
    capsys.readouterr()
    assert main(["txt2img", "an apple", *flags, *adapter[:2]]) == 2
    assert "--ip-adapter and --image-prompt go together" in capsys.readouterr().err


def test_bad_input(tiny, narrow_v1, peer, tmp_path):
    sd = StableDiffusion.from_preset(tiny)
    theirs, file = peer
    with pytest.raises(ValueError, match="image_prompt needs an IP-Adapter"):
        draw(sd, image_prompt=pictures()[0])
    with pytest.raises(ValueError, match="No IP-Adapter is loaded"):
        sd.set_ip_adapter_scale(0.5)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sd.load_ip_adapter(file, image_encoder=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        sd.load_ip_adapter(tmp_path / "nothing.bin", image_encoder=file.parent / "image_encoder")
    with pytest.raises(ValueError, match="scale must be a finite number; got nan"):
        sd.load_ip_adapter(file, scale=float("nan"))
    arrays = load_file(file)
    encoder = file.parent / "image_encoder"
    changes = {
        "holds 'image_proj.latents'": {"image_proj.latents": np.zeros((1, 16, 32), "float32")},
        r"holds 'ip_adapter\.9\.to_k_ip\.weight'": {"ip_adapter.9.to_k_ip.weight": np.zeros((32, 32), "float32")},
        r"ip_adapter\.1\.to_k_ip\.weight has shape \(64, 32\)": {
            "ip_adapter.1.to_k_ip.weight": np.zeros((64, 32), "float32")
        },
        "makes 4 tokens of 64 numbers; this model's have 32": {
            "image_proj.proj.weight": np.zeros((256, VISION["projection_dim"]), "float32")
        },
    }
    for message, change in changes.items():
        save_file(arrays | change, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            sd.load_ip_adapter(tmp_path / "other.safetensors", encoder)
    del arrays["ip_adapter.1.to_v_ip.weight"]
    save_file(arrays, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'ip_adapter\.1\.to_v_ip\.weight' of the IP-Adapter"):
        sd.load_ip_adapter(tmp_path / "other.safetensors", encoder)
    write_image_encoder(tmp_path / "wide", projection_dim=8)
    with pytest.raises(ValueError, match="makes 8 numbers of a picture; the IP-Adapter .* needs 24"):
        sd.load_ip_adapter(file, tmp_path / "wide")
    sd.load_ip_adapter(file)
    with pytest.raises(ValueError, match="An IP-Adapter is loaded: give image_prompt"):
        draw(sd)
    with pytest.raises(ValueError, match="image_prompt has 3 pictures; give one, or 1"):
        draw(sd, image_prompt=pictures(3))
