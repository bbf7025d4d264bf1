"""Training of ControlNets: steps against torch and diffusers, what batches hold, `finetune.py --train controlnet`."""

import csv
import json
import os
import subprocess
import sys

import diffusers
import keras
import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import ROOT, SCHEDULER
from train_steps import batch, small_unet

import finetune
from keras_sd import ControlNet, NoiseScheduler, StableDiffusion, canny, load_control_net
from keras_sd.training.batches import Pictures, batches
from keras_sd.training.control_net import ControlNetTrainer
from keras_sd.training.dataset import CaptionedImages
from keras_sd.training.examples import read_examples
from keras_sd.training.latent_cache import build_latent_cache
from keras_sd.training.optimizers import AdamW
from keras_sd.weights.assign import state_dict_key, to_torch_layout
from keras_sd.weights.control_net import save_control_net

EDGES = np.random.default_rng(9).random((4, 64, 64, 3), "float32")


# === Steps ===


def torch_loop(folder, net_folder, steps):
    """Steps as diffusers' train_controlnet.py makes them: losses, and the state dict afterwards."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    net = diffusers.ControlNetModel.from_pretrained(net_folder).train()
    scheduler = diffusers.DDPMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2, eps=1e-8)
    losses = []
    for arrays in steps:
        latent, noise, edges = (
            torch.from_numpy(arrays[key]).permute(0, 3, 1, 2) for key in ("mean", "noise", "conditioning")
        )
        timestep, context = torch.from_numpy(arrays["timestep"]).long(), torch.from_numpy(arrays["context"])
        noisy = scheduler.add_noise(latent, noise, timestep)
        down, middle = net(noisy, timestep, context, edges, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        loss = torch.nn.functional.mse_loss(unet(noisy, timestep, context, **residuals).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach().numpy() for name, value in net.state_dict().items()}


def test_steps_equal_those_of_diffusers(tiny, tmp_path):
    steps = [{**batch(seed, width=32), "conditioning": EDGES} for seed in range(3)]
    model = StableDiffusion.from_preset(tiny).diffusion_model
    before = [np.array(v) for v in model.variables]
    net = ControlNet.from_diffusion_model(model)
    save_control_net(net, tmp_path)
    trainer = ControlNetTrainer(model, NoiseScheduler(), control_net=net)
    trainer.compile(AdamW(1e-3, weight_decay=1e-2, epsilon=1e-8, global_clipnorm=1.0), run_eagerly=True)
    assert len(trainer.trainable_variables) == len(net.variables)
    losses = [float(trainer.train_on_batch(arrays)) for arrays in steps]
    expected, state = torch_loop(tiny, tmp_path, steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    differences = [
        np.abs(to_torch_layout(np.array(v)) - state[state_dict_key(v)]).max()
        for v in net.variables
        if state_dict_key(v).startswith("controlnet_")
    ]
    assert max(differences) < 1e-4
    assert all((np.array(v) == old).all() for v, old in zip(model.variables, before))


def test_on_jax_no_buffer_is_shared():
    """A step gives the buffers of all variables away, the U-Net's too, so a new network needs its own."""
    script = """
from train_steps import small_unet
from keras_sd import ControlNet
model = small_unet()
net = ControlNet.from_diffusion_model(model)
own, others = ({v.value.unsafe_buffer_pointer() for v in one.variables} for one in (net, model))
assert len(own) == len(net.variables) and not own & others
"""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    env = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)


def test_mixed_precision_and_gradient_checkpointing():
    model = small_unet("mixed_float16")
    net = ControlNet.from_diffusion_model(model, conditioning_embedding_out_channels=(4, 4, 4, 4))
    trainer = ControlNetTrainer(model, NoiseScheduler(), control_net=net, gradient_checkpointing=True)
    assert net.gradient_checkpointing and model.gradient_checkpointing
    trainer.compile(keras.optimizers.AdamW(1e-3), run_eagerly=True)
    arrays = {**batch(0), "conditioning": EDGES}
    losses = [float(trainer.train_on_batch(arrays)) for _ in range(2)]
    assert np.isfinite(losses).all() and all(v.dtype == "float32" for v in net.variables)


def test_what_does_not_fit_is_said(tiny):
    model = StableDiffusion.from_preset(tiny).diffusion_model
    net = ControlNet.from_diffusion_model(model)
    with pytest.raises(ValueError, match='must hold "conditioning"'):
        ControlNetTrainer(model, NoiseScheduler(), control_net=net)(batch(0, width=32))
    other = ControlNet(**{**net.arguments, "cross_attention_dim": 64})
    with pytest.raises(ValueError, match="its cross_attention_dim is 64, here 32"):
        ControlNetTrainer(model, NoiseScheduler(), control_net=other)


# === Pictures ===


def draw(folder, sizes, column=True):
    """Captioned pictures, with inverted ones as their conditioning images."""
    random = np.random.default_rng(0)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "conditioning_image"][: 2 + column])
        for i, (height, width) in enumerate(sizes):
            picture = random.integers(0, 256, (height, width, 3), "uint8")
            Image.fromarray(picture).save(folder / f"{i}.png")
            if column:
                (folder / "seen").mkdir(exist_ok=True)
                Image.fromarray(255 - picture).save(folder / "seen" / f"{i}.png")
            table.writerow([f"{i}.png", f"drawing number {i}", f"seen/{i}.png"][: 2 + column])
    return folder


@pytest.fixture(scope="module")
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


@pytest.mark.parametrize("random_crop", [False, True])
def test_pictures_and_what_is_seen_are_cut_and_turned_alike(tmp_path, sd, random_crop):
    examples, rejected = read_examples(draw(tmp_path, [(40, 32), (32, 48), (32, 32)]))
    assert rejected == [] and [example.conditioning.name for example in examples] == ["0.png", "1.png", "2.png"]
    pictures = Pictures(examples, sd.tokenizer, 32, 32, flip=True, random_crop=random_crop, conditioning=canny)
    for arrays in batches(pictures, 3, epochs=3):
        image, seen = arrays["image"].numpy(), arrays["conditioning"].numpy()
        assert seen.shape == image.shape == (3, 32, 32, 3)
        np.testing.assert_allclose(1.0 - seen, (image + 1.0) / 2.0, atol=2 / 255)


def test_edges_of_pictures_without_their_own(tmp_path, sd):
    examples, _ = read_examples(draw(tmp_path, [(32, 32), (40, 40)], column=False))
    pictures = Pictures(examples, sd.tokenizer, 32, 32, conditioning=canny)
    (arrays,) = batches(pictures, 2)
    for image, seen in zip(arrays["image"].numpy(), arrays["conditioning"].numpy()):
        expected = canny(np.round((image + 1.0) * 127.5).astype("uint8"))
        np.testing.assert_array_equal(seen, expected / np.float32(255))
    without = Pictures(examples, sd.tokenizer, 32, 32)
    assert "conditioning" not in next(iter(batches(without, 2)))


def test_latent_cache(tmp_path, sd):
    """What is seen is not cached, and comes turned with the latents."""
    (tmp_path / "set").mkdir()
    examples, _ = read_examples(draw(tmp_path / "set", [(40, 32), (32, 48), (32, 32)]))
    pictures = Pictures(examples, sd.tokenizer, 32, 32, flip=True, conditioning=canny)
    cache = build_latent_cache(tmp_path / "cache", pictures, sd, progress=False)
    for cached, arrays in zip(batches(cache, 3, epochs=2), batches(pictures, 3, epochs=2)):
        assert cached["mean"].shape == (3, 4, 4, 4) and "context" in cached
        np.testing.assert_allclose(cached["conditioning"], arrays["conditioning"], atol=1e-6)


def test_conditioning_images_that_cannot_be_used(tmp_path, sd):
    draw(tmp_path, [(32, 32)] * 4)
    (tmp_path / "seen" / "0.png").unlink()
    (tmp_path / "seen" / "1.png").write_bytes(b"no picture")
    text = (tmp_path / "metadata.csv").read_text().replace("seen/2.png", "")
    (tmp_path / "metadata.csv").write_text(text)
    examples, rejected = read_examples(tmp_path)
    assert [example.name for example in examples] == ["3.png"]
    reasons = dict(rejected)
    assert "there is no file" in reasons["0.png"] and "cannot be read" in reasons["1.png"]
    assert reasons["2.png"] == "has no conditioning_image"
    with pytest.raises(ValueError, match="holds no conditioning images"):
        CaptionedImages(examples)


def test_some_with_and_some_without(tmp_path, sd):
    lines = [{"file_name": "0.png", "text": "a", "conditioning_image": "1.png"}, {"file_name": "1.png", "text": "b"}]
    for i in (0, 1):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    examples, rejected = read_examples(tmp_path)
    assert rejected == [] and len(Pictures(examples, sd.tokenizer, 32, 32).examples) == 2
    with pytest.raises(ValueError, match="1.png has no conditioning image, but others have"):
        Pictures(examples, sd.tokenizer, 32, 32, conditioning=canny)


# === finetune.py ===


def test_finetune(tiny, sd, tmp_path, capsys, monkeypatch):
    (tmp_path / "set").mkdir()
    draw(tmp_path / "set", [(40, 32)] * 3, column=False)
    line = (
        f"--train controlnet --preset {tiny} --dataset_archive {tmp_path / 'set'} --img_height 32 --img_width 32 "
        f"--batch_size 1 --lr 1e-2 --ema 0 --canny_low 50 --quiet --max_steps 2 --out {tmp_path / 'out'} "
        "--validation_prompt drawing"
    ).split()
    assert finetune.main(line) == 0, capsys.readouterr().err
    assert str(tmp_path / "out" / "control_net") in capsys.readouterr().out
    diffusers.ControlNetModel.from_pretrained(tmp_path / "out" / "control_net")
    net = load_control_net(tmp_path / "out" / "control_net")
    assert any(np.array(v).any() for v in net.variables if "controlnet_down_blocks" in v.path)

    # which is where another run can begin, and what validation draws with
    args = finetune.build_parser().parse_args([*line, "--control_net", str(tmp_path / "out" / "control_net")])
    args.precision = "float32"
    trainer = finetune.make_trainer(args, sd)
    assert all((np.array(a) == np.array(b)).all() for a, b in zip(trainer.control_net.variables, net.variables))
    drawn = []
    monkeypatch.setattr(sd, "text_to_image", lambda prompt, **options: drawn.append((prompt, options)))
    finetune.validation(args, sd, trainer, finetune.open_pictures(args, sd))()
    ((prompt, options),) = drawn
    ((steering, edges),) = options["control"]
    picture = Image.open(tmp_path / "set" / "0.png").crop((0, 4, 32, 36))
    assert prompt == ["drawing"] and steering is trainer.control_net and (edges == canny(picture, 50, 200)).all()


@pytest.mark.parametrize(
    "line, error",
    [
        ("--train controlnet --export models", "--export writes the model, which --train controlnet leaves as it is"),
        ("--train lora --control_net a", "--control_net is for --train controlnet; got lora"),
        ("--train controlnet --canny_low 300", "--canny_low must be at most --canny_high; got 300 and 200"),
        ("--train controlnet --train_text_encoder", "--train_text_encoder is for --train unet and lora"),
    ],
)
def test_wrong_usage(line, error, capsys):
    assert finetune.main(line.split()) == 2
    assert error in capsys.readouterr().err
