"""Enlarging: the network against a torch definition, the ×4 upscaler against diffusers, the latent's second pass."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from PIL import Image
from torch import nn

from keras_sd import RRDBNet, StableDiffusion, read_rrdbnet
from keras_sd.__main__ import main
from keras_sd.noise import initial_noise
from keras_sd.png import read_parameters
from keras_sd.super_resolution import enlarge
from keras_sd.weights.files import write_safetensors

# === RRDBNet ===


class DenseBlock(nn.Module):
    """ESRGAN, figure 4: five convolutions, each seeing all before it; the last one's output is scaled by 0.2."""

    def __init__(self, width, growth):
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", nn.Conv2d(width + i * growth, growth if i < 4 else width, 3, padding=1))

    def forward(self, x):
        seen = [x]
        for i in range(1, 5):
            seen.append(nn.functional.leaky_relu(getattr(self, f"conv{i}")(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(seen, 1))


class Block(nn.Module):
    """ESRGAN, figure 4: three dense blocks inside another scaled residual."""

    def __init__(self, width, growth):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(width, growth) for _ in range(3))

    def forward(self, x):
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class TorchRRDBNet(nn.Module):
    """ESRGAN, section 3.1, with Real-ESRGAN's pixel-unshuffle for scales below 4."""

    def __init__(self, width=16, blocks=2, growth=8, scale=4):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(4 // scale)
        self.conv_first = nn.Conv2d(3 * (4 // scale) ** 2, width, 3, padding=1)
        self.body = nn.Sequential(*(Block(width, growth) for _ in range(blocks)))
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            setattr(self, name, nn.Conv2d(width, width, 3, padding=1))
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        first = self.conv_first(self.unshuffle(x))
        x = first + self.conv_body(self.body(first))
        for conv in (self.conv_up1, self.conv_up2):
            x = nn.functional.leaky_relu(conv(nn.functional.interpolate(x, scale_factor=2)), 0.2)
        return self.conv_last(nn.functional.leaky_relu(self.conv_hr(x), 0.2))


def torch_rrdbnet(**arguments):
    torch.manual_seed(0)
    network = TorchRRDBNet(**arguments).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(1.5)
    return network


def picture(height, width, seed=0):
    """A smooth random picture, uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype="uint8")
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def old_name(key, blocks=2):
    """A key in the naming of 2018."""
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3"}
    names |= {"conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    layer, suffix = key.rsplit(".", 1)
    return f"{names.get(layer) or layer.replace('body', 'model.1.sub').replace('rdb', 'RDB') + '.0'}.{suffix}"


def esrgan_name(key):
    """A key in the naming of ESRGAN's own repository."""
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    layer, suffix = key.rsplit(".", 1)
    return f"{names.get(layer) or layer.replace('body', 'RRDB_trunk').replace('rdb', 'RDB')}.{suffix}"


@pytest.fixture(scope="module")
def esrgan(tmp_path_factory):
    """Path of a small ×4 checkpoint as Real-ESRGAN writes them."""
    path = tmp_path_factory.mktemp("esrgan") / "Tiny_x4.pth"
    torch.save({"params_ema": torch_rrdbnet().state_dict()}, path)
    return path


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_rrdbnet_equals_the_torch_definition(scale, tmp_path):
    theirs = torch_rrdbnet(scale=scale)
    torch.save({"params": {}, "params_ema": theirs.state_dict()}, tmp_path / "net.pth")
    ours = read_rrdbnet(tmp_path / "net.pth")
    assert ours.arguments["scale"] == scale and ours.arguments["num_blocks"] == 2
    x = torch.rand(2, 3, 12, 20)
    drawn = ours.predict_on_batch(x.permute(0, 2, 3, 1).numpy())
    expected = theirs(x).permute(0, 2, 3, 1).numpy()
    assert expected.shape == drawn.shape == (2, 12 * scale, 20 * scale, 3)
    assert expected.std() > 0.01
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-4)


def test_checkpoints_of_every_age_are_read(tmp_path):
    arrays = {key: tensor.numpy() for key, tensor in torch_rrdbnet().state_dict().items()}
    torch.save({"params_ema": torch_rrdbnet().state_dict(), "params": {"other": torch.zeros(1)}}, tmp_path / "a.pth")
    torch.save({old_name(key): torch.from_numpy(array) for key, array in arrays.items()}, tmp_path / "b.pth")
    write_safetensors(tmp_path / "c.safetensors", {esrgan_name(key): array for key, array in arrays.items()})
    write_safetensors(tmp_path / "d.safetensors", {key: array.astype("float16") for key, array in arrays.items()})
    expected = read_rrdbnet(tmp_path / "a.pth").get_weights()
    for name, atol in (("b.pth", 0), ("c.safetensors", 0), ("d.safetensors", 1e-3)):
        for ours, theirs in zip(read_rrdbnet(tmp_path / name).get_weights(), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_default_is_real_esrgan_x4plus():
    assert sum(p.numel() for p in TorchRRDBNet(64, 23, 32).parameters()) == RRDBNet().count_params() == 16_697_987


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    arrays = {key: tensor.numpy() for key, tensor in torch_rrdbnet().state_dict().items()}

    def read(**changed):
        write_safetensors(tmp_path / "x.safetensors", {k: v for k, v in {**arrays, **changed}.items() if v is not None})
        return read_rrdbnet(tmp_path / "x.safetensors")

    for changed, words in (
        ({"conv_hr.bias": None}, "lacks 'conv_hr.bias'"),
        ({"body.1.rdb2.conv3.weight": None}, "lacks 'body.1.rdb2.conv3.weight'"),
        ({"upsampler.weight": np.zeros(3, "float32")}, "holds 'upsampler.weight'"),
        ({"conv_up1.weight": np.zeros((16, 8, 3, 3), "float32")}, "conv_up1.weight has shape"),
        ({"conv_first.weight": None}, "is no RRDBNet"),
        ({"conv_first.weight": np.zeros((16, 5, 3, 3), "float32")}, "conv_first takes 5 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            read(**changed)
    with pytest.raises(ValueError, match="scale must be 1, 2 or 4"):
        RRDBNet(scale=3)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("height, width", [(61, 150), (1, 3), (64, 64)])
def test_tiles_equal_the_whole(scale, height, width, tmp_path):
    theirs = torch_rrdbnet(scale=scale, width=8, blocks=1)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    network = read_rrdbnet(tmp_path / "net.pth")
    image = picture(height, width)
    tiled, whole = (enlarge(image, network, tile, overlap) for tile, overlap in ((64, 48), (160, 4)))
    assert tiled.shape == whole.shape == (scale * height, scale * width, 3) and tiled.dtype == np.uint8
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    if not (height * scale * width) % 4 and height == 64:
        x = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]
        expected = np.round(theirs(x)[0].permute(1, 2, 0).numpy().clip(0, 1) * 255)
        assert np.abs(whole - expected).max() <= 1


# === The ×4 upscaler ===


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    return write_checkpoint("upscaler", tmp_path_factory.mktemp("upscaler"))


@pytest.fixture(scope="module")
def x4(upscaler):
    return StableDiffusion.from_preset(upscaler)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, "float32"), -1, 1).copy())


def upscale_with_diffusers(folder, image, latents, image_noise, monkeypatch, **kwargs):
    peer = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    monkeypatch.setattr(inspect.getmodule(type(peer)), "randn_tensor", lambda *a, **k: to_torch(image_noise))
    image = Image.fromarray(image)
    images = peer(image=image, latents=to_torch(latents), output_type="np", **kwargs).images
    return np.round(images * 255).astype("uint8")


def close(ours, theirs):
    """The part of pixels within 1/255."""
    return (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean()


@pytest.mark.parametrize(
    "noise_level, guidance, shape", [(20, 7.5, (16, 24)), (350, 1.0, (20, 12)), (0, 3.0, (16, 16))]
)
def test_upscaler_equals_diffusers(x4, upscaler, noise_level, guidance, shape, monkeypatch):
    image = picture(*shape)
    latents, image_noise = initial_noise(1, 1, (*shape, 4)), initial_noise(2, 1, (*shape, 3))
    theirs = upscale_with_diffusers(
        upscaler,
        image,
        latents,
        image_noise,
        monkeypatch,
        prompt="an apple",
        negative_prompt="a pear",
        noise_level=noise_level,
        num_inference_steps=4,
        guidance_scale=guidance,
    )
    drawn = x4.upscale(
        image,
        "an apple",
        negative_prompt="a pear",
        noise_level=noise_level,
        image_noise=image_noise,
        diffusion_noise=latents,
        num_steps=4,
        unconditional_guidance_scale=guidance,
        progress=False,
    )
    assert drawn.shape == theirs.shape == (1, 4 * shape[0], 4 * shape[1], 3)
    assert close(drawn, theirs) >= 0.999


def test_diffusers_opens_the_upscaler_that_we_save(x4, upscaler, tmp_path, monkeypatch):
    x4.save_preset(tmp_path / "saved")
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path / "saved", upscaler))
    assert ours.keys() - {"_name_or_path"} == theirs.keys() - {"_name_or_path"}
    latents, image_noise = initial_noise(1, 1, (16, 16, 4)), initial_noise(2, 1, (16, 16, 3))
    arguments = picture(16, 16), latents, image_noise, monkeypatch
    before, after = (
        upscale_with_diffusers(folder, *arguments, prompt="an apple", num_inference_steps=2)
        for folder in (upscaler, tmp_path / "saved")
    )
    assert (before == after).all()
    saved = StableDiffusion.from_preset(tmp_path / "saved", two_pass_guidance=True)
    drawn = [sd.upscale(picture(16, 16), num_steps=2, seed=1, progress=False) for sd in (saved, x4)]
    assert close(*drawn) == 1.0


def test_a_seed_gives_the_same_enlargement_at_any_batch_size(x4):
    options = dict(num_steps=2, progress=False, noise_level=100)
    together = x4.upscale(picture(16, 16), ["an apple", "a pear"], seed=5, **options)
    alone = x4.upscale(picture(16, 16), "a pear", seed=6, **options)
    assert together.shape == (2, 64, 64, 3) and close(together[1:], alone) == 1.0
    odd = x4.upscale(picture(9, 15), "a pear", 3, seed=6, **options)
    assert odd.shape == (1, 27, 45, 3)


# === The latent, enlarged and changed again ===


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


def test_the_latent_is_enlarged_and_changed(sd, monkeypatch):
    image, noise = picture(64, 72), initial_noise(3, 1, (12, 14, 4))
    larger = torch.nn.functional.interpolate(
        to_torch(sd.encode(Image.fromarray(image))), size=(12, 14), mode="bilinear"
    )
    larger = larger.permute(0, 2, 3, 1).numpy()
    options = dict(num_steps=5, diffusion_noise=noise, progress=False)
    drawn = sd.upscale(image, "an apple", 1.5, strength=0.6, **options)
    with monkeypatch.context() as patch:  # the second pass is image-to-image from that latent
        patch.setattr(sd, "encode", lambda _: larger)
        assert close(drawn, sd.image_to_image(picture(96, 112), "an apple", 0.6, **options)) == 1.0
    assert drawn.shape == (1, 96, 112, 3)
    assert sd.upscale(image, "an apple", num_steps=2, seed=1, batch_size=2, progress=False).shape == (2, 128, 144, 3)
    assert (sd.upscale(image, "an apple", 1.5, strength=0) == sd.decode(larger)).mean() > 0.99


def test_hires_is_text_to_image_and_a_second_pass(sd, monkeypatch):
    rows = []
    options = dict(num_steps=4, seed=7, progress=False)
    drawn = sd.text_to_image("an apple", hires=2.0, hires_strength=0.5, callback=lambda *a: rows.append(a), **options)
    assert drawn.shape == (1, 128, 128, 3)
    assert [(i, n, x.shape[1]) for i, n, x in rows] == [(i, 4, 8) for i in range(4)] + [(i, 2, 16) for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sd, "encode", lambda _: rows[3][2])
        again = sd.image_to_image(picture(64, 64), "an apple", 0.5, latent_scale=2, **options)
    assert close(drawn, again) == 1.0
    assert (drawn == sd.text_to_image(["an apple"] * 2, hires=2.0, hires_strength=0.5, **options)[0]).mean() > 0.99
    stopped = sd.text_to_image("an apple", hires=2.0, callback=lambda *_: False, **options)
    assert stopped.shape == (1, 64, 64, 3)


def test_the_embedded_model_enlarges_better_than_lanczos():
    sd, prompt = StableDiffusion.from_preset("emoji"), "rocket on a yellow background"
    large = sd.text_to_image(prompt, num_steps=20, seed=3, progress=False)[0]
    small = Image.fromarray(large).resize((32, 32), Image.Resampling.BOX)
    drawn = sd.upscale(small, prompt, num_steps=20, seed=8, progress=False)[0]
    errors = [
        np.abs(x - large.astype(float)).mean()
        for x in (drawn, np.asarray(small.resize((64, 64), Image.Resampling.LANCZOS)))
    ]
    assert errors[0] < 0.8 * errors[1], errors


def test_a_network_first(sd, esrgan):
    nothing = StableDiffusion.from_preset("emoji")
    image = picture(20, 30)
    enlarged = nothing.upscale(image, model=esrgan)
    assert (enlarged[0] == enlarge(image, read_rrdbnet(esrgan))).all()
    assert not {"decoder", "diffusion_model", "text_encoder"} & vars(nothing).keys()
    assert nothing.upscale(image, scale=2.5, model=read_rrdbnet(esrgan)).shape == (1, 50, 75, 3)
    options = dict(num_steps=5, seed=1, progress=False)
    drawn = sd.upscale(image, "an apple", model=esrgan, **options)
    assert (drawn == sd.image_to_image(enlarged[0], "an apple", 0.35, **options)).all() and drawn.shape[1:3] == (
        80,
        120,
    )


# === Bad input ===


@pytest.mark.parametrize(
    "which, arguments, words",
    [
        ("sd", {}, "needs a prompt .* or a model"),
        ("sd", {"prompt": "an apple", "scale": 1}, "scale must be a number above 1; got 1"),
        ("sd", {"prompt": "an apple", "scale": "2"}, "scale must be a number"),
        ("sd", {"prompt": "an apple", "strength": 1.5}, "strength must be in"),
        ("sd", {"prompt": "an apple", "noise_level": 20}, "×4 upscaler; this one is not"),
        ("sd", {"prompt": "an apple", "colour": 1}, "colour"),
        ("sd", {"prompt": "an apple", "image": "no.png"}, "no file 'no.png'"),
        ("sd", {"model": "no.pth"}, "No checkpoint file at 'no.pth'"),
        ("sd", {"model": "ESRGAN", "seed": 1}, "seed only with a prompt"),
        ("sd", {"model": "ESRGAN", "tile": 30}, "tile"),
        ("x4", {"strength": 0.5}, "noise_level"),
        ("x4", {"model": "ESRGAN", "prompt": "an apple"}, "takes no model"),
        ("x4", {"noise_level": 351}, "at most 350"),
        ("x4", {"noise_level": -1}, "noise_level must be an integer"),
        ("x4", {"image_noise": np.zeros((8, 8, 4))}, "image_noise must have shape"),
        ("x4", {"seed": 1, "diffusion_noise": np.zeros((8, 8, 4))}, "exclude each other"),
    ],
)
def test_bad_arguments(which, arguments, words, esrgan, request):
    if arguments.get("model") == "ESRGAN":
        arguments = {**arguments, "model": esrgan}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        request.getfixturevalue(which).upscale(**{"image": picture(8, 8), **arguments})


def test_bad_hires(sd, x4):
    for arguments, words in (
        ({"hires": 0.5}, "hires must be a number above 1"),
        ({"hires": 2, "hires_strength": 0}, "strength"),
        ({"hires": 2, "diffusion_noise": np.zeros((8, 8, 4))}, "hires draws at two sizes"),
    ):
        with pytest.raises(ValueError, match=words):
            sd.text_to_image("an apple", num_steps=2, progress=False, **arguments)
    with pytest.raises(ValueError, match="takes 7 channels, not 4: it is for enlarging: use upscale"):
        x4.text_to_image("an apple", num_steps=2, progress=False)


def test_damaged_networks_are_said(esrgan):
    network = read_rrdbnet(esrgan)
    network.variables[0].assign(np.full(network.variables[0].shape, np.nan))
    with pytest.raises(ValueError, match="not finite"):
        enlarge(picture(8, 8), network)


# === The command line ===


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The working folder has a picture `small.png`."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(16, 24)).save("small.png")


def test_upscale_on_the_command_line(small, esrgan, tiny, upscaler, capsys):
    assert main(["upscale", "small.png", "--model", str(esrgan), "--outscale", "2", "--out", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n"
    expected = StableDiffusion().upscale("small.png", scale=2, model=esrgan)[0]
    assert (np.asarray(Image.open("a.png")) == expected).all()
    fields = read_parameters("a.png")
    assert (fields["Size"], fields["Postprocess upscale by"]) == ("48x32", "2")
    assert fields["Postprocess upscaler"] == "Tiny_x4" and fields["prompt"] == ""

    common = ["--steps", "2", "--seed", "3", "--quiet"]
    assert main(["upscale", "small.png", "an apple", "--preset", str(tiny), "--out", "b.png", *common]) == 0
    assert Image.open("b.png").size == (48, 32)
    assert (
        main(["upscale", "small.png", "--noise_level", "30", "--ckpt", str(upscaler), "--out", "c.png", *common]) == 0
    )
    assert Image.open("c.png").size == (96, 64) and read_parameters("c.png")["Noise level"] == "30"
    drawing = ["txt2img", "an apple", "--preset", str(tiny), "--H", "16", "--W", "24", "--out", "d.png", *common]
    assert main([*drawing, "--hires", "1.5"]) == 0
    assert Image.open("d.png").size == (32, 24)  # latents 2 × 3 → 3 × 4 (of 4.5, the even neighbour)
    fields = read_parameters("d.png")
    assert (fields["Hires upscale"], fields["Hires upscaler"], fields["Denoising strength"]) == ("1.5", "Latent", "0.7")


@pytest.mark.parametrize(
    "flags, words, code",
    [
        (["small.png"], "upscale needs a prompt", 1),
        (["none.png", "an apple"], "picture: there is no file 'none.png'", 1),
        (["small.png", "--model", "none.pth"], "--model: there is no file 'none.pth'", 1),
        (["small.png", "--model", "small.png"], "its name must end in .safetensors or", 1),
        (["small.png", "--model", "ESRGAN", "--n_samples", "2"], "--n_samples", 2),
        (["small.png", "an apple", "--outscale", "0.5"], "must be a number of at least 1; got '0.5'", 2),
        (["small.png", "an apple", "--noise_level", "5"], "this one is not", 1),
    ],
)
def test_errors_on_the_command_line(flags, words, code, small, esrgan, capsys):
    assert main(["upscale", *(str(esrgan) if flag == "ESRGAN" else flag for flag in flags)]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
