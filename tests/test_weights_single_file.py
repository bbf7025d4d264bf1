"""The oracle is diffusers' own conversion of single files, and the key names of the published SD v1 and v2 files."""

import json
import re

import numpy as np
import pytest

from keras_sd.weights.files import read_arrays, write_safetensors
from keras_sd.weights.single_file import (
    OPEN_CLIP,
    TEXT,
    prediction_type_beside,
    single_file_config,
    split_single_file,
    to_single_file,
    unet_names,
    vae_names,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
oracle = pytest.importorskip("diffusers.loaders.single_file_utils")


def arrays_of(model, old_names=False):
    arrays = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    return (
        {"text_model." + key.removeprefix("text_model."): array for key, array in arrays.items()}
        if old_names
        else arrays
    )


def make_models(version, layers_per_block=2):
    """SD's topology with narrow channels, random weights."""
    torch.manual_seed(0)
    width, text_layers, linear = (24, 3, False) if version == 1 else (32, 23, True)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        cross_attention_dim=width,
        attention_head_dim=2,
        use_linear_projection=linear,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 12, 12),
        layers_per_block=layers_per_block,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=text_layers,
            num_attention_heads=2,
            hidden_act="quick_gelu" if version == 1 else "gelu",
        )
    )
    for model in (unet, vae, text):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return {"unet": unet, "vae": vae, "text_encoder": text}


@pytest.fixture(scope="module", params=[1, 2])
def sd(request):
    """(version, models, components, the single file with all that published files hold besides)"""
    models = make_models(request.param)
    components = {name: arrays_of(model, name == "text_encoder") for name, model in models.items()}
    file = to_single_file(components, open_clip=request.param == 2)
    file |= {
        "betas": np.zeros(1000),
        "sqrt_one_minus_alphas_cumprod": np.zeros(1000),
        "posterior_mean_coef1": np.zeros(1000),
        "model_ema.decay": np.array(0.9999),
        "model_ema.num_updates": np.array(3),
        "first_stage_model.loss.logvar": np.zeros(()),
        "global_step": np.array(470000),
    }
    if request.param == 1:
        file[f"{TEXT}text_model.embeddings.position_ids"] = np.arange(77)[None]
    else:
        last = [key for key in file if "resblocks.22." in key]
        file |= {key.replace("resblocks.22.", "resblocks.23."): file[key] + 1 for key in last}
        file |= {f"{OPEN_CLIP}text_projection": np.ones((32, 32), "float32"), f"{OPEN_CLIP}logit_scale": np.array(1.0)}
    return request.param, models, components, file


def assert_same(arrays, expected):
    assert set(arrays) == set(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)


# === Against diffusers ===


def test_diffusers_converts_our_file_alike(sd):
    version, models, components, file = sd
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in file.items()}
    theirs = {
        "unet": oracle.convert_ldm_unet_checkpoint(tensors, models["unet"].config),
        "vae": oracle.convert_ldm_vae_checkpoint(tensors, models["vae"].config),
        "text_encoder": oracle.convert_ldm_clip_checkpoint(tensors)
        if version == 1
        else oracle.convert_open_clip_checkpoint(models["text_encoder"], tensors),
    }
    theirs["text_encoder"].pop("text_model.embeddings.position_ids", None)
    ours = split_single_file(file)
    for component, expected in theirs.items():
        assert_same(ours[component], {key: tensor.numpy() for key, tensor in expected.items()})
        assert_same(ours[component], components[component])


def test_diffusers_opens_our_file(sd, tmp_path):
    """`from_single_file` of diffusers' own models, with only the configuration that we infer."""
    _, models, _, file = sd
    write_safetensors(tmp_path / "sd.safetensors", file)
    config = single_file_config(file, heads=2, text_heads=2)
    for name, groups in (("unet", 8), ("vae", 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config[name] | {"norm_num_groups": groups}))
        theirs = type(models[name]).from_single_file(str(tmp_path / "sd.safetensors"), config=str(folder))
        assert_same(arrays_of(theirs), arrays_of(models[name]))


@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_other_depths(layers_per_block):
    models = make_models(1, layers_per_block)
    components = {name: arrays_of(models[name]) for name in ("unet", "vae")}
    file = to_single_file(components)
    ours = split_single_file(file)
    tensors = {key: torch.from_numpy(array) for key, array in file.items()}
    theirs = oracle.convert_ldm_unet_checkpoint(tensors, models["unet"].config)
    for component, expected in components.items():
        assert_same(ours[component], expected)
    assert_same(ours["unet"], {key: tensor.numpy() for key, tensor in theirs.items()})
    assert single_file_config(file)["unet"]["layers_per_block"] == layers_per_block


# === Against the published files ===


def test_names_of_the_published_files():
    unet = unet_names(2, (True, True, True, False), (False, True, True, True))
    vae = vae_names(2, 4)
    assert unet["input_blocks.3.0.op"] == "down_blocks.0.downsamplers.0.conv"
    assert unet["input_blocks.4.0.skip_connection"] == "down_blocks.1.resnets.0.conv_shortcut"
    assert unet["input_blocks.11.0.out_layers.3"] == "down_blocks.3.resnets.1.conv2"
    assert unet["output_blocks.2.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert unet["output_blocks.5.2.conv"] == "up_blocks.1.upsamplers.0.conv"
    query = "transformer_blocks.0.attn2.to_q"
    assert unet[f"output_blocks.11.1.{query}"] == f"up_blocks.3.attentions.2.{query}"
    assert unet[f"middle_block.1.{query}"] == f"mid_block.attentions.0.{query}"
    assert vae["decoder.up.3.block.0.conv1"] == "decoder.up_blocks.0.resnets.0.conv1"
    assert vae["decoder.up.1.upsample.conv"] == "decoder.up_blocks.2.upsamplers.0.conv"
    assert vae["encoder.mid.attn_1.proj_out"] == "encoder.mid_block.attentions.0.to_out.0"
    for table in (unet, vae):
        assert len(set(table.values())) == len(table)


def test_key_counts_of_the_published_files(sd):
    _, _, components, file = sd
    counts = [
        sum(key.startswith(prefix) for key in file) for prefix in ("model.diffusion_model.", "first_stage_model.")
    ]
    assert counts == [686, 248 + 1]  # as in sd-v1-4.ckpt, and the one of the loss that we added
    assert [len(components[name]) for name in ("unet", "vae")] == [686, 248]


# === Configuration ===


def test_config(sd):
    version, models, _, file = sd
    config = single_file_config(file)
    for component in ("unet", "vae"):
        theirs = dict(models[component].config)
        for key in set(config[component]) - {"norm_num_groups", "attention_head_dim", "_class_name"}:
            expected = theirs[key]
            assert config[component][key] == (list(expected) if isinstance(expected, tuple) else expected), key
        assert config[component]["_class_name"] == type(models[component]).__name__
    theirs = models["text_encoder"].config.to_dict()
    for key in set(config["text_encoder"]) - {"architectures", "num_attention_heads"}:
        assert config["text_encoder"][key] == theirs[key], key
    assert config["unet"]["attention_head_dim"] == (8 if version == 1 else [1, 1, 1, 1])
    assert config["tokenizer"]["pad_token"] == ("<|endoftext|>" if version == 1 else "!")
    assert config["scheduler"]["prediction_type"] == ("epsilon" if version == 1 else "v_prediction")


def test_config_is_asked_or_told(sd):
    _, _, _, file = sd
    assert single_file_config(file, prediction_type="sample")["scheduler"]["prediction_type"] == "sample"
    assert single_file_config(file, heads=[1, 2, 3, 4])["unet"]["attention_head_dim"] == [1, 2, 3, 4]
    base = file | {"global_step": np.array(875000)}
    assert single_file_config(base)["scheduler"]["prediction_type"] == "epsilon"


def test_heads_of_the_full_size():
    """SD v2's widths, without its memory: the same keys with arrays that are all one number."""

    def array(*shape):
        return np.broadcast_to(np.float32(0), shape)

    root, widths = "model.diffusion_model.", (320, 640, 1280, 1280)
    file = {f"{root}input_blocks.{1 + 3 * i}.0.out_layers.3.weight": array(w, w, 3, 3) for i, w in enumerate(widths)}
    file |= {f"{root}input_blocks.{i}.0.op.weight": array(w, w, 3, 3) for i, w in zip((3, 6, 9), widths)}
    file |= {f"{root}input_blocks.{i}.1.norm.weight": array(1) for i in (1, 4, 7)}
    file |= {f"{root}output_blocks.{i}.1.norm.weight": array(1) for i in (3, 6, 9)}
    file |= {
        f"{root}input_blocks.0.0.weight": array(320, 9, 3, 3),
        f"{root}out.2.weight": array(4, 320, 3, 3),
        f"{root}output_blocks.11.0.out_layers.0.weight": array(1),
        f"{root}middle_block.1.proj_in.weight": array(1280, 1280),
        f"{root}middle_block.1.transformer_blocks.0.attn2.to_k.weight": array(1280, 1024),
    }
    config = single_file_config(file)["unet"]
    assert config["attention_head_dim"] == [5, 10, 20, 20] and config["cross_attention_dim"] == 1024
    assert config["in_channels"] == 9 and config["down_block_types"][2:] == ["CrossAttnDownBlock2D", "DownBlock2D"]
    file[f"{root}middle_block.1.proj_in.weight"] = array(1280, 1280, 1, 1)
    assert single_file_config(file)["unet"]["attention_head_dim"] == 8


def test_prediction_type_beside(tmp_path):
    path = tmp_path / "v2-1_768.ckpt"
    assert prediction_type_beside(path) is None
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n    timesteps: 1000\n')
    assert prediction_type_beside(path) == "v_prediction"
    path.with_suffix(".yaml").write_text("model:\n  params:\n    timesteps: 1000\n")
    assert prediction_type_beside(path) == "epsilon"


# === Variants and bad files ===


def test_ckpt_file(sd, tmp_path):
    _, _, components, file = sd
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in file.items() if key != "global_step"}
    torch.save({"state_dict": tensors, "global_step": 3, "epoch": 1}, tmp_path / "sd.ckpt")
    for component, arrays in split_single_file(read_arrays(tmp_path / "sd.ckpt")).items():
        assert_same(arrays, components[component])


def test_moving_averages(sd):
    _, _, components, file = sd
    with pytest.raises(ValueError, match=r"ema=True\): there is no model_ema\.diffusion_model"):
        split_single_file(file, ema=True)
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): array + 1
        for key, array in file.items()
        if key.startswith("model.diffusion_model.")
    }
    ours = split_single_file(file | averages, ema=True)
    assert_same(ours["unet"], {key: array + 1 for key, array in components["unet"].items()})
    assert_same(split_single_file(file | averages)["unet"], components["unet"])


def test_text_encoder_without_its_prefix(sd):
    version, _, components, file = sd
    if version == 1:
        file = {key.replace(f"{TEXT}text_model.", TEXT): array for key, array in file.items()}
        assert_same(split_single_file(file)["text_encoder"], components["text_encoder"])
        assert single_file_config(file)["text_encoder"]["num_hidden_layers"] == 3
    else:  # a file converted from diffusers has no 24th layer
        file = {key: array for key, array in file.items() if not re.search("resblocks.23|text_projection", key)}
        assert_same(split_single_file(file)["text_encoder"], components["text_encoder"])


def test_half_precision_stays(sd):
    _, _, _, file = sd
    half = split_single_file({key: np.zeros(array.shape, "float16") for key, array in file.items()})
    assert {array.dtype for arrays in half.values() for array in arrays.values()} == {np.dtype("float16")}


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.9.weight",
        "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.1.1.norm.scale",
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.encoder.down.0.attn.0.q.weight",
        "cond_stage_model.model.visual.proj",
        "something.else",
    ],
)
def test_keys_not_understood(sd, key):
    with pytest.raises(ValueError, match=rf"key {re.escape(key)} is not understood"):
        split_single_file(sd[3] | {key: np.zeros((3, 3))})


def test_other_families_and_other_files(sd):
    file = sd[3]
    for key in ("conditioner.embedders.0.x", "control_model.time_embed.0.weight"):
        for function in (split_single_file, single_file_config):
            with pytest.raises(ValueError, match=f"another family .* it holds {key}"):
                function(file | {key: np.zeros(3)})
    with pytest.raises(ValueError, match=r"no Stable Diffusion single file: .*its first is conv_in\.weight"):
        split_single_file({"conv_in.weight": np.zeros(3)})
    with pytest.raises(ValueError, match="its first is nothing"):
        split_single_file({})
    cut = {key: array for key, array in file.items() if "output_blocks" in key or "input_blocks" in key}
    with pytest.raises(ValueError, match="damaged: it has no model.diffusion_model.middle_block"):
        single_file_config(cut)
    with pytest.raises(ValueError, match="no place in a single file"):
        to_single_file({"unet": {"down_blocks.0.resnets.0.norm9.weight": np.zeros(3)}})
