"""LoRA: pictures against diffusers with PEFT in every naming, weights restored, files for others, training."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import diffusers
import keras
import numpy as np
import peft
import pytest
import tensorflow as tf
import torch
from safetensors.numpy import load_file, save_file

from keras_sd import DiffusionModel, StableDiffusion
from keras_sd.lora import TARGETS, Adapters, add_lora, kernel_layers, lora_factors, remove_lora
from keras_sd.noise import initial_noise
from keras_sd.weights.assign import from_torch_layout
from keras_sd.weights.lora import delta, find_lora, module_table, read_lora

START = initial_noise(3, 1, (8, 8, 4))


@pytest.fixture(scope="module")
def shared(tiny):
    return StableDiffusion.from_preset(tiny)


@pytest.fixture
def sd(shared):
    """A pipeline without LoRAs, compiled once."""
    yield shared
    shared.unload_lora()


@pytest.fixture
def theirs(tiny):
    return open_peer(tiny)


def open_peer(folder):
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    return peer


def draw(sd):
    return sd.text_to_image("an apple", num_steps=3, diffusion_noise=START, sampler="ddim", progress=False)


def draw_theirs(peer):
    start = torch.from_numpy(np.moveaxis(START, -1, 1).copy())
    peer.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=peer.scheduler.config.prediction_type,
    )
    image = peer("an apple", height=64, width=64, latents=start, num_inference_steps=3, output_type="np").images
    return np.round(image * 255).astype("uint8")


def assert_close(ours, theirs):
    assert (np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean() >= 0.999


def assert_differ(first, second):
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 0.2


def weights(sd):
    return [np.array(v) for model in (sd.diffusion_model, sd.text_encoder) for v in model.variables]


def assert_same_weights(sd, before):
    after = weights(sd)
    assert len(after) == len(before) and all(a.tobytes() == b.tobytes() for a, b in zip(after, before))


def kohya(peer, path, seed=0, rank=4, alpha=2.0, te="lora_te_text_model", only="", strength=0.15):
    """Writes a file in kohya's naming with random factors for all layers; returns its arrays."""
    random = np.random.default_rng(seed)
    arrays = {}
    for prefix, model in (("lora_unet", peer.unet), (te, peer.text_encoder)):
        for name, module in model.named_modules():
            if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) or only not in name:
                continue
            out, width, *kernel = module.weight.shape
            key = f"{prefix}_{name.replace('.', '_')}"
            arrays[f"{key}.lora_down.weight"] = random.standard_normal((rank, width, *kernel)) * strength
            arrays[f"{key}.lora_up.weight"] = random.standard_normal((out, rank, *[1] * len(kernel))) * strength
            arrays[f"{key}.alpha"] = np.asarray(alpha)
    arrays = {key: array.astype("float32") for key, array in arrays.items()}
    save_file(arrays, path)
    return arrays


def peft_layers(model, seed, config):
    """Adds an adapter with random factors to a torch model; returns its state dict."""
    model.add_adapter(config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return peft.get_peft_model_state_dict(model)


# === Pictures ===


def test_kohya(sd, theirs, tmp_path):
    before, plain, path = weights(sd), draw(sd), tmp_path / "style.safetensors"
    kohya(theirs, path)
    theirs.load_lora_weights(path, adapter_name="style")
    assert sd.load_lora(path) == "style" and sd.loras == {"style": 1.0}
    drawn = draw(sd)
    assert_differ(drawn, plain)
    assert_close(drawn, draw_theirs(theirs))
    sd.set_lora_scale("style", 0.4)
    theirs.set_adapters("style", 0.4)
    assert_close(draw(sd), draw_theirs(theirs))
    sd.unload_lora("style")
    assert_same_weights(sd, before)
    np.testing.assert_array_equal(draw(sd), plain)


def test_dense_and_one_by_one_convolutions_go_for_one_another(tmp_path):
    """Files of SD v1 hold `proj_in` as a convolution, those of v2 as a dense layer; both fit both."""
    arrays = {"lora_down.weight": np.ones((2, 32, 1, 1)), "lora_up.weight": np.ones((32, 2)), "alpha": np.ones(1)}
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{name}.{part}": array for part, array in arrays.items()}, tmp_path / "a.safetensors")
    for linear in (False, True):
        model = DiffusionModel(
            block_out_channels=(32, 32),
            attention_levels=(True, False),
            layers_per_block=1,
            cross_attention_dim=32,
            use_linear_projection=linear,
        )
        kernel = kernel_layers(model)["down_blocks.0.attentions.0.proj_in"]._kernel
        before = np.array(kernel)
        Adapters({"unet": lambda model=model: model}).load(tmp_path / "a.safetensors", 0.5, "a")
        np.testing.assert_allclose(np.array(kernel) - before, 0.5, atol=1e-6)


@pytest.mark.parametrize("metadata", [False, True])
def test_diffusers_naming(sd, theirs, tmp_path, metadata):
    """With metadata the scale is lora_alpha / r, with exceptions; without it is 1."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6 if metadata else 4,
        target_modules=["to_q", "to_k", "to_out.0", "ff.net.0.proj", "proj_in", "conv1"],
        rank_pattern={"to_k": 2} if metadata else {},
        alpha_pattern={"to_q": 1.0} if metadata else {},
        use_rslora=metadata,
    )
    unet = peft_layers(theirs.unet, 1, config)
    text = peft_layers(theirs.text_encoder, 2, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    adapters = diffusers.training_utils._collate_lora_metadata(
        {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    )
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet, text, **(adapters if metadata else {}))
    sd.load_lora(tmp_path, 1.0, "both")
    assert_close(draw(sd), draw_theirs(theirs))
    sd.unload_lora()


def test_two_at_once(sd, theirs, tmp_path):
    before, paths = weights(sd), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        kohya(theirs, path, seed, rank=2 + seed, alpha=3.0, only="" if seed else "attn")
    for path in paths:
        theirs.load_lora_weights(path, adapter_name=path.stem)
        sd.load_lora(path, 0.8)
    sd.set_lora_scale("b", -0.5)
    theirs.set_adapters(["a", "b"], [0.8, -0.5])
    assert sd.loras == {"a": 0.8, "b": -0.5}
    assert_close(draw(sd), draw_theirs(theirs))
    sd.unload_lora("a")
    theirs.set_adapters(["b"], [-0.5])
    assert_close(draw(sd), draw_theirs(theirs))
    sd.set_lora_scale("b", 0)
    assert_same_weights(sd, before)
    sd.load_lora(paths[0])
    sd.unload_lora()
    assert_same_weights(sd, before) and sd.loras == {}


KINDS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "conv1", "time_emb_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=6, target_modules=["to_q", "conv1"]),
    "loha, effective": peft.LoHaConfig(r=3, alpha=6, target_modules=["conv1", "conv2"], use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_folder(sd, theirs, tmp_path, kind):
    plain = draw(sd)
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs.unet, KINDS[kind])
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hada_" in name:
            torch.nn.init.normal_(parameter, std=0.15 if "lora" in kind else 0.3)
    model.save_pretrained(tmp_path / "cat")
    theirs.unet = model.base_model.model
    assert sd.load_lora(tmp_path / "cat") == "cat"
    drawn = draw(sd)
    assert_differ(drawn, plain)
    assert_close(drawn, draw_theirs(theirs))
    sd.unload_lora()


def test_old_and_rare_names_mean_the_same(sd, theirs, tmp_path):
    """The same factors in seven namings, and split by `lora_mid`, give the same weights."""
    arrays = kohya(theirs, tmp_path / "new.safetensors", alpha=4.0, only="attn")
    torch_names = {name.replace(".", "_"): name for name, _ in theirs.unet.named_modules()}
    text_names = {name.replace(".", "_"): name for name, _ in theirs.text_encoder.named_modules()}

    def renamed(unet, text, down, up):
        """The file in another naming; `unet` and `text` make a name of a module's."""
        result = {}
        for key, array in arrays.items():
            module, _, part = key.partition(".")
            if part == "alpha":
                continue
            if module.startswith("lora_unet_"):
                name = unet(torch_names[module.removeprefix("lora_unet_")])
            else:
                name = text(text_names[module.removeprefix("lora_te_text_model_")])
            result[name + (down if "down" in part else up)] = array
        return result

    def processor(name):
        return "unet." + name.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")

    def old_text(name):
        return "text_encoder.text_model." + name.replace("q_proj", "to_q").replace("k_proj", "to_k").replace(
            "v_proj", "to_v"
        ).replace("out_proj", "to_out")

    down, up = ".lora.down.weight", ".lora.up.weight"
    letters = ".lora_A.default.weight", ".lora_B.default.weight"
    files = {
        "current": renamed("unet.{}".format, "text_encoder.text_model.{}".format, down, up),
        "flat": renamed("unet.{}".format, "text_encoder.{}".format, *letters),
        "bare": renamed("{}".format, "text_encoder.text_model.{}".format, down, up),
        "linear": renamed(
            "unet.{}".format,
            "text_encoder.text_model.{}".format,
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        "processor": renamed(processor, old_text, "_lora.down.weight", "_lora.up.weight"),
        "peft": renamed("base_model.model.{}".format, "base_model.model.text_model.{}".format, *letters),
        "te1": {key.replace("lora_te_", "lora_te1_"): array for key, array in arrays.items()},
    }
    sd.load_lora(tmp_path / "new.safetensors")
    wanted = weights(sd)
    sd.unload_lora()
    for name, content in files.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        sd.load_lora(tmp_path / f"{name}.safetensors")
        assert all(np.array_equal(a, b) for a, b in zip(weights(sd), wanted)), name
        sd.unload_lora()


def test_compvis_names_and_tucker(sd, theirs, tmp_path):
    random = np.random.default_rng(0)
    shape = {"lora_down": (2, 32, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (32, 2, 1, 1)}
    parts = {part: random.standard_normal(size).astype("float32") for part, size in shape.items()}
    wanted = np.einsum(
        "or,rshw,si->oihw", parts["lora_up"][..., 0, 0], parts["lora_mid"], parts["lora_down"][..., 0, 0]
    )
    kernel = kernel_layers(sd.diffusion_model)["down_blocks.0.resnets.0.conv1"]._kernel
    before = np.array(kernel)
    for name in ("lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_input_blocks_1_0_in_layers_2"):
        content = {f"{name}.{part}.weight": array for part, array in parts.items()}
        save_file(content | {f"{name}.alpha": np.float32([1.0])}, tmp_path / "x.safetensors")
        sd.load_lora(tmp_path / "x.safetensors")
        np.testing.assert_allclose(np.array(kernel) - before, wanted.transpose(2, 3, 1, 0) / 2, atol=1e-5)
        sd.unload_lora()


def test_torch_files(sd, theirs, tmp_path):
    arrays = kohya(theirs, tmp_path / "a.safetensors", only="attn")
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, tmp_path / "b.pt")
    sd.load_lora(tmp_path / "a.safetensors")
    wanted = weights(sd)
    sd.unload_lora()
    sd.load_lora(tmp_path / "b.pt")
    assert_same_weights(sd, wanted)
    sd.unload_lora()


# === Weights ===


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_restored(tiny, theirs, tmp_path, dtype):
    sd = StableDiffusion.from_preset(tiny, dtype=dtype)
    before = weights(sd)
    kohya(theirs, tmp_path / "a.safetensors")
    sd.load_lora(tmp_path / "a.safetensors", 0.7)
    assert not np.array_equal(weights(sd)[0], before[0])
    sd.unload_lora()
    assert_same_weights(sd, before)


def test_fused_weights_are_saved(tiny, theirs, tmp_path):
    sd = StableDiffusion.from_preset(tiny)
    kohya(theirs, tmp_path / "a.safetensors")
    sd.load_lora(tmp_path / "a.safetensors", 0.8)
    merged = weights(sd)
    sd.fuse_lora()
    sd.unload_lora()
    assert sd.loras == {}
    assert_same_weights(sd, merged)
    sd.save_preset(tmp_path / "fused")
    assert_same_weights(StableDiffusion.from_preset(tmp_path / "fused"), merged)


def test_another_model_is_left_alone(tiny, theirs, tmp_path):
    """A U-Net that is assigned while a LoRA is loaded has none; unloading does not bring the old one's weights."""
    sd, other = StableDiffusion.from_preset(tiny), StableDiffusion.from_preset(tiny)
    kohya(theirs, tmp_path / "a.safetensors")
    sd.load_lora(tmp_path / "a.safetensors")
    model = other.diffusion_model
    model.set_weights([2 * w for w in model.get_weights()])
    before = [np.array(v) for v in model.variables]
    sd.diffusion_model = model
    sd.unload_lora()
    assert all(np.array_equal(v, b) for v, b in zip(model.variables, before))


# === What does not fit ===


def change(arrays, **changed):
    return {key: array for key, array in (arrays | changed).items() if array is not None}


@pytest.mark.parametrize(
    "key, array, error",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 7), "(4, 32)"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight", (64, 3), "(64, 4)"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight", None, "missing"),
        ("lora_unet_down_blocks_2_attentions_0_proj_in.lora_down.weight", (4, 7), "another architecture"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 7), "another architecture"),
        ("lora_unet_conv_in.dora_scale", (4, 1), "not supported"),
        ("unet.conv_in.lokr_w1", (4, 4), "not supported"),
        ("unet.conv_in.lora_A.weight", (4, 4, 1, 1), "(4, 4, 3, 3)"),
    ],
)
def test_another_architecture_is_refused(sd, theirs, tmp_path, key, array, error):
    before = weights(sd)
    arrays = kohya(theirs, tmp_path / "a.safetensors", only="attn")
    first = {key: array if array is None else np.zeros(array, "float32")}
    if key.startswith("unet."):
        first["unet.conv_in.lora_B.weight"] = np.zeros((32, 4, 1, 1), "float32")
    save_file(change(first | arrays, **first), tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as raised:
        sd.load_lora(tmp_path / "a.safetensors")
    named = key if array is not None else key.replace("up", "down")
    assert named in str(raised.value) and error in str(raised.value) and "a.safetensors" in str(raised.value)
    assert_same_weights(sd, before) and sd.loras == {}


def test_a_lora_of_a_larger_model_is_refused(sd, narrow_v1, tmp_path):
    kohya(open_peer(narrow_v1), tmp_path / "v1.safetensors", only="attn")
    with pytest.raises(ValueError, match="v1.safetensors': lora_te_text_model_\\S+ .*another architecture"):
        sd.load_lora(tmp_path / "v1.safetensors")


def test_unknown_keys_are_reported(sd, theirs, tmp_path):
    arrays = kohya(theirs, tmp_path / "a.safetensors", only="attn")
    sd.load_lora(tmp_path / "a.safetensors")
    wanted = weights(sd)
    sd.unload_lora()
    save_file(arrays | {"bundle_emb.cat": np.zeros(3), "note": np.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="bundle_emb.cat, note"):
        sd.load_lora(tmp_path / "a.safetensors")
    assert_same_weights(sd, wanted)
    sd.unload_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_file({"note": np.zeros(1)}, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match="holds no LoRA: note"):
            sd.load_lora(tmp_path / "b.safetensors")


def test_bad_arguments(sd, theirs, tmp_path):
    path = tmp_path / "a.safetensors"
    kohya(theirs, path, only="attn")
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        sd.load_lora(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        sd.load_lora(tmp_path / "empty")
    for scale in (float("nan"), "much", None, True):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            sd.load_lora(path, scale)
    sd.load_lora(path)
    with pytest.raises(ValueError, match="'a' is loaded already"):
        sd.load_lora(path)
    sd.load_lora(path, name="again")
    for call in (lambda: sd.unload_lora("b"), lambda: sd.set_lora_scale("b", 1)):
        with pytest.raises(ValueError, match="No LoRA 'b' is loaded; loaded: a, again"):
            call()
    sd.unload_lora()
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut.safetensors"):
        sd.load_lora(tmp_path / "cut.safetensors")


def test_find_lora(tmp_path):
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    for path in ("a.v1.safetensors", "deep/a.safetensors", "deep/b.pt"):
        (tmp_path / path).touch()
    found = {"a.v1": "a.v1.safetensors", "a": "deep/a.safetensors", "b": "deep/b.pt", "folder": "deep/folder"}
    for name, path in found.items():
        assert find_lora(tmp_path, name) == tmp_path / path
    with pytest.raises(FileNotFoundError, match="no LoRA 'c' in .*; there are: a, a.v1"):
        find_lora(tmp_path, "c")


# === Factors to train ===


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Folder of what was trained (random numbers), in each naming, and the picture that it draws."""
    folder = tmp_path_factory.mktemp("trained")
    sd = StableDiffusion.from_preset(tiny)
    before, plain = weights(sd), draw(sd)
    layers = [*kernel_layers(sd.diffusion_model), *kernel_layers(sd.text_encoder)]
    assert sd.add_lora(rank=4, alpha=6, targets=tuple(TARGETS), text_encoder=True) == len(layers)
    assert_close(draw(sd), plain)  # what is new has no effect
    with pytest.raises(ValueError, match="fuse_lora"):
        sd.save_preset(folder / "preset")
    random = np.random.default_rng(0)
    for model in (sd.diffusion_model, sd.text_encoder):
        for variable in model.trainable_variables:
            variable.assign(random.standard_normal(variable.shape) * 0.1)
    drawn = draw(sd)
    assert_differ(drawn, plain)
    for naming in ("kohya", "diffusers"):
        sd.save_lora(folder / f"{naming}.safetensors", naming)
    sd.save_lora(folder / "peft", "peft")
    sd.save_lora(folder / "half.safetensors", dtype="float16")
    sd.unload_lora()
    assert_same_weights(sd, before)
    assert all(v.trainable for v in sd.diffusion_model.variables)
    np.testing.assert_array_equal(draw(sd), plain)
    return folder, drawn


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "peft"])
def test_others_open_what_was_trained(sd, theirs, trained, naming):
    folder, drawn = trained
    path = folder / ("peft" if naming == "peft" else f"{naming}.safetensors")
    if naming == "peft":
        theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, path / "unet").base_model.model
        encoder = peft.PeftModel.from_pretrained(theirs.text_encoder, path / "text_encoder")
        theirs.text_encoder = encoder.base_model.model
        config = json.loads((path / "unet" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 6)
    else:
        theirs.load_lora_weights(path)
    assert_close(draw_theirs(theirs), drawn)
    sd.load_lora(path)
    assert_close(draw(sd), drawn)
    sd.unload_lora()


def test_half_precision_files(sd, trained):
    folder, drawn = trained
    arrays = load_file(folder / "half.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype("float16")}
    sd.load_lora(folder / "half.safetensors")
    assert np.abs(draw(sd).astype(int) - drawn).max() <= 2
    sd.unload_lora()


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_fusing_what_was_trained(tiny, dtype):
    model = StableDiffusion.from_preset(tiny, dtype=dtype).diffusion_model
    before = {name: np.array(layer._kernel) for name, layer in kernel_layers(model).items()}
    names = add_lora(model, rank=3, alpha=1.5, targets=("attention", "convolution"))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.standard_normal(variable.shape))
    change = {name: delta(f, f["up"].shape[:1] + f["down"].shape[1:]) for name, f in lora_factors(model).items()}
    assert remove_lora(model, fuse=True) and not lora_factors(model) and not remove_lora(model)
    for name, layer in kernel_layers(model).items():
        expected = before[name] + (from_torch_layout(0.5 * change[name]) if name in names else 0)
        np.testing.assert_allclose(layer._kernel, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_only_the_factors_learn(tiny, dtype):
    """Fitted to another target, all else stays as it was, and the factors are float32."""
    model = StableDiffusion.from_preset(tiny, dtype=dtype).diffusion_model
    add_lora(model, rank=2, targets=("attention", "convolution"))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert all("/lora_kernel_" in v.path for v in model.trainable_variables)
    before = {v.path: np.array(v) for v in model.variables}
    random = np.random.default_rng(0)
    inputs = {"latent": (2, 8, 8, 4), "timestep_embedding": (2, 32), "context": (2, 77, 32)}
    inputs = {name: random.standard_normal(shape).astype("float32") for name, shape in inputs.items()}
    model.compile(optimizer=keras.optimizers.Adam(3e-2), loss="mse", run_eagerly=True)
    losses = model.fit(inputs, np.ones((2, 8, 8, 4)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    changed = {v.path for v in model.variables if not np.array_equal(v, before[v.path])}
    assert {v.path for v in model.trainable_variables} >= changed and len(changed) > 20


def test_factors_start_as_in_peft(tiny):
    """Uniform in ±1/√fan_in; the same for the same seed."""
    model = StableDiffusion.from_preset(tiny).diffusion_model
    add_lora(model, rank=64, targets=("attention", "convolution"), seed=5)
    first = lora_factors(model)
    for factors in first.values():
        bound = 1 / np.sqrt(np.prod(factors["down"].shape[1:]))
        assert 0.97 * bound < np.abs(factors["down"]).max() <= bound and not factors["up"].any()
    remove_lora(model)
    add_lora(model, rank=64, targets=("attention", "convolution"), seed=5)
    assert all(np.array_equal(f["down"], first[name]["down"]) for name, f in lora_factors(model).items())


def test_targets(tiny):
    sd = StableDiffusion.from_preset(tiny)
    model = sd.diffusion_model
    by_target = {target: add_and_remove(model, (target,)) for target in TARGETS}
    assert sorted(name for names in by_target.values() for name in names) == sorted(kernel_layers(model))
    assert add_and_remove(model, r".*attn2\.to_k") == [n for n in by_target["attention"] if n.endswith("attn2.to_k")]
    for targets, named in ((("attention", "atention"), "atention"), ((), r"\[\]")):
        with pytest.raises(ValueError, match=f"{named}.*attention, feed_forward, projection"):
            add_lora(model, targets=targets)
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank must be an integer"):
            add_lora(model, rank)
    add_lora(model)
    with pytest.raises(ValueError, match="already"):
        add_lora(model)
    with pytest.raises(ValueError, match="naming must be one of kohya, diffusers, peft"):
        sd.save_lora("x.safetensors", "civitai")
    with pytest.raises(ValueError, match=r"must end in .safetensors; got 'x.pt'"):
        sd.save_lora("x.pt")
    remove_lora(model)
    with pytest.raises(ValueError, match="no LoRA factors to save"):
        sd.save_lora("x.safetensors")


def add_and_remove(model, targets):
    names = add_lora(model, 1, targets=targets)
    remove_lora(model)
    return names


def test_maps_are_pure(sd, theirs, tmp_path):
    """Reading changes nothing, and does not need the models."""
    arrays = kohya(theirs, tmp_path / "a.safetensors")
    shapes = {
        "unet": {name: m.weight.shape for name, m in theirs.unet.named_modules() if hasattr(m, "weight")},
        "text_encoder": {
            f"text_model.{name}": m.weight.shape
            for name, m in theirs.text_encoder.named_modules()
            if hasattr(m, "weight")
        },
    }
    factors, unknown = read_lora(tmp_path / "a.safetensors", shapes, module_table(shapes, 1, (True, False)))
    assert not unknown and len(factors) == len(arrays) / 3


# === Elsewhere ===


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_on_other_backends(sd, tiny, theirs, tmp_path, backend):
    """Kernels are assigned in place on torch, and compiled in by OpenVINO."""
    kohya(theirs, tmp_path / "a.safetensors")
    script = pathlib.Path(__file__).with_name("draw_lora.py")
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, tiny, tmp_path / "a.safetensors", tmp_path / "drawn.npy"]
    subprocess.run(command, env=env, check=True)
    sd.load_lora(tmp_path / "a.safetensors", 0.8)
    drawn = sd.text_to_image("an apple", num_steps=1, seed=3, progress=False)
    assert np.abs(np.load(tmp_path / "drawn.npy").astype(int) - drawn).max() <= 1


def test_exported_models_have_it(tiny, theirs, tmp_path):
    from export.__main__ import main

    kohya(theirs, tmp_path / "a.safetensors")
    save_file({"<cat>": np.ones((2, 32), "float32")}, tmp_path / "b.safetensors")
    flags = ["--lora", f"{tmp_path}/a.safetensors:0.5", "--embedding", f"{tmp_path}/b.safetensors"]
    main(["--preset", str(tiny), "--out", str(tmp_path / "models"), "--only", "text_encoder", *flags])
    served = tf.saved_model.load(str(tmp_path / "models" / "text_encoder" / "1"))
    context = served.signatures["encode_prompt"](prompt=tf.constant(["an apple <cat>"]))["context"]
    sd = StableDiffusion.from_preset(tiny)
    sd.load_textual_inversion(tmp_path / "b.safetensors")
    plain = sd.encode_text("an apple <cat>")
    sd.load_lora(tmp_path / "a.safetensors", 0.5)
    np.testing.assert_allclose(context, sd.encode_text("an apple <cat>"), atol=1e-5)
    assert np.abs(context - plain).max() > 0.01
