"""What is fast but not exact: reuse of deep features and token merging, against references written out by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_sd import ControlNet, Denoiser, DiffusionModel, NoiseScheduler, StableDiffusion, make_table
from keras_sd.layers import timestep_embedding
from keras_sd.layers.token_merging import token_merging

RANDOM = np.random.default_rng(0)
WIDTHS = {"block_out_channels": (16, 32), "num_attention_heads": 4, "cross_attention_dim": 24, "norm_num_groups": 4}
MODELS = {
    "one block": {"layers_per_block": 1, "attention_levels": (True, False)},
    "two blocks": {"layers_per_block": 2, "attention_levels": (True, True), "use_linear_projection": True},
    "upscaler": {"attention_levels": (False, True), "layers_per_block": 1, "in_channels": 7, "num_class_embeds": 9},
}
TEXT, EMPTY = RANDOM.standard_normal((2, 2, 7, 24)).astype("float32")
START = RANDOM.standard_normal((2, 6, 9, 4)).astype("float32")
EXTRA = RANDOM.standard_normal((2, 6, 9, 3)).astype("float32")


def draw(sd, **kwargs):
    return sd.text_to_image("an apple", num_steps=3, seed=2, progress=False, **kwargs)


# === Reuse of deep features ===


def network(name, **kwargs):
    keras.utils.set_random_seed(1)
    return DiffusionModel(**WIDTHS, **MODELS[name], **kwargs)


def by_hand(model, inputs, deep=None):
    """The U-Net layer by layer; with `deep` given only what does not depend on it. Returns (prediction, deep)."""
    arguments = model.arguments
    blocks, levels = arguments["layers_per_block"], len(arguments["block_out_channels"])
    layers = {layer.name: layer for layer in model.layers}
    time = layers["time_embedding.linear_2"](ops.silu(layers["time_embedding.linear_1"](inputs["timestep_embedding"])))
    if "class_label" in inputs:
        time = time + layers["class_embedding"](inputs["class_label"])

    def block(x, name, i):
        x = layers[f"{name}.resnets.{i}"](x, time)
        transformer = layers.get(f"{name}.attentions.{i}")
        return x if transformer is None else transformer(x, inputs["context"])

    x = layers["conv_in"](inputs["latent"])
    first, last = x, f"up_blocks.{levels - 1}"
    if deep is None:
        skips = [x]
        for level in range(levels):
            for i in range(blocks):
                skips.append(x := block(x, f"down_blocks.{level}", i))
            if level < levels - 1:
                skips.append(x := layers[f"down_blocks.{level}.downsamplers.0"](x))
        x = block(block(x, "mid_block", 0), "mid_block", 1)
        for level in range(levels):
            for i in range(blocks + 1):
                if (level, i) == (levels - 1, blocks):
                    deep = x
                else:
                    x = block(ops.concatenate([x, skips.pop()], axis=-1), f"up_blocks.{level}", i)
            if level < levels - 1:
                x = layers[f"up_blocks.{level}.upsamplers.0"](x, like=skips[-1])
    x = block(ops.concatenate([deep, first], axis=-1), last, blocks)
    return layers["conv_out"](ops.silu(layers["conv_norm_out"](x))), deep


def reference(model, table, interval):
    """The latent after the table, deep features being renewed in every `interval`-th row and where guidance changes."""
    fixed = {"class_label": np.array([3, 4])} if model.arguments["num_class_embeds"] else {}
    row, known = -1, {}

    def predict(x, timestep):
        nonlocal row, known
        row += 1
        guidance = table.guidance[row]
        if row % interval == 0 or (guidance == 1) != (table.guidance[row - 1] == 1):
            known = {}
        x = np.concatenate([x, EXTRA], axis=-1) if model.arguments["in_channels"] == 7 else x
        embedding = timestep_embedding(np.full(2, timestep, "float32"), 16)
        outputs = []
        for name, context in (("text", TEXT), ("empty", EMPTY)):
            if name == "text" or guidance != 1:
                inputs = {"latent": x, "timestep_embedding": embedding, "context": context, **fixed}
                output, known[name] = by_hand(model, inputs, known.get(name))
                outputs.append(ops.convert_to_numpy(output))
        return outputs[0] if len(outputs) == 1 else outputs[1] + guidance * (outputs[0] - outputs[1])

    return table.run(predict, table.init_noise_scale * START)


def denoise(model, table, **options):
    extra = EXTRA if model.arguments["in_channels"] == 7 else None
    label = np.array([3, 4], "int32") if model.arguments["num_class_embeds"] else None
    start = table.init_noise_scale * START
    denoiser = Denoiser(model, **options)
    return denoiser.denoise(start, TEXT, EMPTY, table, extra=extra, class_label=label, progress=False)


def table_of(sampler="ddim", num_steps=5, **options):
    return make_table(sampler, NoiseScheduler(), num_steps, guidance_scale=3.0, **options)


@pytest.mark.parametrize("name, interval, two_passes", [("one block", 2, False), ("two blocks", 3, True)])
def test_reuse_equals_the_layers_run_by_hand(name, interval, two_passes):
    model, table = network(name), table_of("dpmpp_2m")
    drawn = denoise(model, table, cache_interval=interval, two_passes=two_passes)
    np.testing.assert_allclose(drawn, reference(model, table, interval), rtol=0, atol=2e-4)


def test_reuse_where_guidance_is_switched_on_and_off():
    """With a network that has classes, further channels and no attention in the block that is run again."""
    model, table = network("upscaler"), table_of(guidance_interval=(0.2, 0.8))
    drawn = denoise(model, table, cache_interval=100)
    np.testing.assert_allclose(drawn, reference(model, table, 100), rtol=0, atol=2e-4)


def test_a_first_row_is_exact():
    model, table = network("one block"), table_of(num_steps=1)
    np.testing.assert_allclose(denoise(model, table, cache_interval=2), denoise(model, table), rtol=0, atol=1e-6)


def test_reuse_in_half_precision():
    model, table = network("one block", dtype="bfloat16"), table_of(num_steps=2)
    drawn, expected = denoise(model, table, cache_interval=2), reference(model, table, 2)
    assert np.sqrt(np.mean((drawn - expected) ** 2)) < 0.05 * expected.std()


# === Token merging ===


def merged_by_hand(x, height, width, ratio):
    """(merged tokens, for each token the index of that which stands for it) of one picture (N, C)."""
    places = [(i, j) for i in range(height) for j in range(width)]
    targets = [n for n, (i, j) in enumerate(places) if i % 2 == 0 and j % 2 == 0]
    others = [n for n in range(len(places)) if n not in targets]
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    similarity = {n: [float(unit[n] @ unit[t]) for t in targets] for n in others}
    by_likeness = sorted(others, key=lambda n: -max(similarity[n]))
    count = min(int(ratio * len(places)), len(others))
    groups = [[t] for t in targets]
    for n in by_likeness[:count]:
        groups[int(np.argmax(similarity[n]))].append(n)
    groups += [[n] for n in by_likeness[count:]]
    place = {n: i for i, group in enumerate(groups) for n in group}
    return np.stack([x[group].mean(axis=0) for group in groups]), [place[n] for n in range(len(places))]


@pytest.mark.parametrize("height, width, ratio", [(4, 6, 0.5), (4, 6, 0.75), (5, 3, 0.25), (5, 7, 0.75), (4, 4, 0.0)])
@pytest.mark.parametrize("batch", [2, None])
def test_merging_equals_numpy(height, width, ratio, batch):
    x = RANDOM.standard_normal((2, height * width, 8)).astype("float32")

    @tf.function(input_signature=[tf.TensorSpec((batch, height * width, 8))], autograph=False)
    def function(x):
        merge, unmerge = token_merging(x, height, width, ratio)
        merged = merge(x)
        return merged, unmerge(merged)

    for one, merged, unmerged in zip(x, *(y.numpy() for y in function(x))):
        expected, place = merged_by_hand(one, height, width, ratio)
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(unmerged, expected[place], rtol=0, atol=1e-5)


def test_the_outermost_self_attentions_alone_merge():
    """At the highest level that has any; nothing is left behind in the model."""
    several = {"block_out_channels": (16, 16, 16), "attention_levels": (False, True, True)}
    model = DiffusionModel(**WIDTHS | several, layers_per_block=1)
    cross = DiffusionModel(**WIDTHS | several | {"attention_levels": True}, only_cross_attention=(True, False, False))
    for one, count in ((model, 3), (cross, 5)):
        with one.merging_tokens(0.5):
            merging = [x.name for x in one.layers if getattr(x, "token_merging", 0.0) == 0.5]
        assert len(merging) == count and all(x.startswith(("down_blocks.1.", "up_blocks.1.")) for x in merging)
        assert not any(getattr(x, "token_merging", 0.0) for x in one.layers)


def test_a_transformer_that_merges_equals_the_parts_run_by_hand():
    model = network("two blocks")
    layer = model.get_layer("down_blocks.0.attentions.0")
    x = RANDOM.standard_normal((2, 6, 9, 16)).astype("float32")
    with model.merging_tokens(0.5):
        drawn = layer(x, TEXT)
    tokens = ops.reshape(layer.proj_in(layer.norm(x)), (2, 54, 16))
    hidden = ops.convert_to_numpy(layer.block.norm1(tokens))
    merged, places = zip(*(merged_by_hand(one, 6, 9, 0.5) for one in hidden))
    attended = ops.convert_to_numpy(layer.block.attn1(np.stack(merged)))
    tokens = tokens + np.stack([one[place] for one, place in zip(attended, places)])
    tokens = tokens + layer.block.attn2(layer.block.norm2(tokens), TEXT)
    tokens = tokens + layer.block.dense(layer.block.geglu(layer.block.norm3(tokens)))
    expected = x + layer.proj_out(ops.reshape(tokens, (2, 6, 9, 16)))
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-5)


# === The pipeline ===


@pytest.mark.parametrize("option", [{"cache_interval": 2}, {"token_merging": 0.5}])
def test_options_may_be_changed_between_calls(tiny, option):
    sd = StableDiffusion.from_preset(tiny)
    exact, (name, value) = draw(sd), *option.items()
    default = getattr(sd, name)
    setattr(sd, name, value)
    changed = draw(sd)
    assert (changed != exact).any() and np.abs(changed.astype(int) - exact).mean() < 20
    other = StableDiffusion.from_preset(tiny, **option, low_memory=True)  # which reads the model again
    assert np.abs(draw(other).astype(int) - changed).max() <= 1
    setattr(sd, name, default)
    np.testing.assert_array_equal(draw(sd), exact)


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "2", None])
def test_bad_intervals(interval):
    with pytest.raises(ValueError, match="cache_interval must be an integer of at least 1"):
        StableDiffusion(cache_interval=interval)


@pytest.mark.parametrize("ratio", [-0.1, 0.76, True, "0.5", None, float("nan")])
def test_bad_ratios(tiny, ratio):
    with pytest.raises(ValueError, match=r"token_merging must be in \[0, 0.75\]"):
        StableDiffusion(token_merging=ratio)
    sd = StableDiffusion.from_preset(tiny)
    sd.token_merging = ratio
    with pytest.raises(ValueError, match="token_merging must be"):
        draw(sd)


def test_control_nets_take_no_interval(tiny):
    sd = StableDiffusion.from_preset(tiny, cache_interval=2)
    control = [(ControlNet.from_diffusion_model(sd.diffusion_model), np.zeros((64, 64, 3), "uint8"))]
    with pytest.raises(ValueError, match="cache_interval must be 1 with ControlNets"):
        draw(sd, control=control)
    sd.cache_interval, sd.token_merging = 1, 0.5
    assert (draw(sd, control=control) == draw(sd)).all()
