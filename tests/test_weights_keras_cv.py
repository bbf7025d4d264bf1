"""KerasCV's .h5 files: models of keras-cv itself against ours with the same weights, in both layouts."""

import json
import pathlib

import h5py
import keras
import keras_cv
import numpy as np
import pytest
from keras_cv.src.models.stable_diffusion import diffusion_model as peer_unet
from keras_cv.src.models.stable_diffusion import text_encoder as peer_text

from keras_sd import Decoder, DiffusionModel, ImageEncoder, StableDiffusion, TextEncoder
from keras_sd.layers import GroupNorm
from keras_sd.weights.keras_cv import assign_keras_cv, build_from_keras_cv, read_keras_cv, write_keras_cv

LAYOUT = pathlib.Path(__file__).parents[2] / "shared" / "legacy_h5_layout.json"


def randomised(model, seed=0):
    """Gives every weight a value that matters, scaled so that outputs stay about 1."""
    random = np.random.default_rng(seed)
    for w in model.weights:
        spread = 0.02 if "embeddings" in w.path else 0.1 if len(w.shape) == 1 else 1 / np.prod(w.shape[:-1]) ** 0.5
        one = 1.0 if "gamma" in w.path else 0.0
        w.assign((one + spread * random.standard_normal(w.shape)).astype("float32"))
    return model


def text_encoder(width=128, layers=3, activation=peer_text.quick_gelu):
    """keras-cv's text encoder, wired as it wires it, with other widths."""
    tokens = keras.Input((77,), dtype="int32", name="tokens")
    positions = keras.Input((77,), dtype="int32", name="positions")
    x = peer_text.CLIPEmbedding(300, width, 77)([tokens, positions])
    for _ in range(layers):
        x = peer_text.CLIPEncoderLayer(width, width // 64, activation=activation)(x)
    x = keras.layers.LayerNormalization(epsilon=1e-5)(x)
    return randomised(keras.Model([tokens, positions], x))


def diffusion_model(widths=(64, 128, 192, 192), linear=False, context_width=128, size=8):
    """keras-cv's U-Net, wired as it wires it, with other widths."""
    context = keras.Input((77, context_width), name="context")
    time = keras.Input((widths[0],), name="timestep_embedding")
    latent = keras.Input((size, size, 4), name="latent")

    def transformer(level, x):
        heads = widths[level] // 64 if linear else 8
        layer = peer_unet.SpatialTransformer(heads, widths[level] // heads, fully_connected=linear)
        return layer([x, context])

    t = keras.layers.Dense(4 * widths[0])(time)
    t = keras.layers.Dense(4 * widths[0])(keras.layers.Activation("swish")(t))
    x = peer_unet.PaddedConv2D(widths[0], 3, padding=1)(latent)
    outputs = [x]
    for level, width in enumerate(widths):
        for _ in range(2):
            x = peer_unet.ResBlock(width)([x, t])
            x = transformer(level, x) if level < 3 else x
            outputs.append(x)
        if level < 3:
            x = peer_unet.PaddedConv2D(width, 3, strides=2, padding=1)(x)
            outputs.append(x)
    x = peer_unet.ResBlock(widths[-1])([x, t])
    x = peer_unet.ResBlock(widths[-1])([transformer(3, x), t])
    for level in (3, 2, 1, 0):
        for _ in range(3):
            x = keras.layers.Concatenate()([x, outputs.pop()])
            x = peer_unet.ResBlock(widths[level])([x, t])
            x = transformer(level, x) if level < 3 else x
        x = peer_unet.Upsample(widths[level])(x) if level else x
    x = keras.layers.Activation("swish")(keras.layers.GroupNormalization(epsilon=1e-5)(x))
    return randomised(keras.Model([latent, time, context], peer_unet.PaddedConv2D(4, kernel_size=3, padding=1)(x)))


PEERS = {
    "text_encoder": text_encoder,
    "text_encoder_v2": lambda: text_encoder(1024, 2, keras.ops.gelu),
    "diffusion_model": diffusion_model,
    "diffusion_model_v2": lambda: diffusion_model(linear=True),
    "decoder": lambda: randomised(keras_cv.models.stable_diffusion.Decoder(64, 72, download_weights=False)),
    "image_encoder": lambda: randomised(keras_cv.models.stable_diffusion.ImageEncoder(download_weights=False)),
}
# Relative L2 that KerasCV's epsilon of 1e-5 everywhere, and its tanh-GELU, leave. Measured: 2e-4 in the U-Nets and the
# text encoder of SD v2, 2e-5 in the image encoder, 7e-6 in the decoder, 0 in the text encoder of SD v1.
TOLERANCE = {"text_encoder": 1e-6, "decoder": 5e-5, "image_encoder": 5e-5}


def inputs_of(name):
    """(inputs of keras-cv's model, of ours)."""
    random = np.random.default_rng(1)
    if name.startswith("text"):
        tokens = random.integers(0, 300, (2, 77), dtype="int32")
        return [tokens, np.arange(77, dtype="int32")[None].repeat(2, 0)], {"tokens": tokens}
    if name.startswith("diffusion"):
        latent, time, context = (random.standard_normal(s, "float32") for s in ((2, 8, 8, 4), (2, 64), (2, 77, 128)))
        return [latent, time, context], {"latent": latent, "timestep_embedding": time, "context": context}
    picture = random.uniform(-1, 1, (1, 64, 72, 3)).astype("float32")
    latent = random.standard_normal((1, 8, 9, 4), "float32")
    return (latent, latent) if name == "decoder" else (picture, picture)


def distance(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", list(PEERS))
def test_files_of_keras_cv_load_and_outputs_agree(name, tmp_path):
    peer = PEERS[name]()
    peer.save_weights(tmp_path / "keras_cv.weights.h5")
    ours = build_from_keras_cv(tmp_path / "keras_cv.weights.h5")
    theirs, own = inputs_of(name)
    expected = peer(theirs)
    assert distance(ours(own), expected) < TOLERANCE.get(name, 5e-4)
    # With its epsilons and its GELU, the same numbers.
    for layer in ours._flatten_layers():
        if isinstance(layer, GroupNorm):
            layer.epsilon = 1e-5
    with pytest.MonkeyPatch.context() as patch:
        gelu = keras.ops.gelu
        patch.setattr(keras.ops, "gelu", lambda x, approximate: gelu(x, True))
        assert distance(ours(own), expected) < 1e-5
    # The published layout, which Keras still reads into keras-cv's model by the order of its layers.
    write_keras_cv(ours, tmp_path / "published.h5")
    randomised(peer, seed=2)
    assert distance(peer(theirs), expected) > 0.1
    peer.load_weights(tmp_path / "published.h5")
    assert distance(peer(theirs), expected) < 1e-6
    again = build_from_keras_cv(tmp_path / "published.h5")
    for a, b in zip(ours.weights, again.weights):
        np.testing.assert_array_equal(a, b)


# The widths of SD v1 divided by a number: {published: (divisor of the widths, their common unit, our model)}.
NARROW = {
    "text": (8, 768, lambda: TextEncoder(hidden_size=96, intermediate_size=384)),
    "unet": (10, 320, lambda: DiffusionModel(block_out_channels=(32, 64, 128, 128))),
    "dec": (4, 128, lambda: Decoder(block_out_channels=(32, 64, 128, 128))),
    "enc": (4, 128, lambda: ImageEncoder(block_out_channels=(32, 64, 128, 128))),
}


@pytest.mark.skipif(not LAYOUT.exists(), reason="the layout of the published files is not at hand")
@pytest.mark.parametrize("key", NARROW)
def test_names_order_and_shapes_are_those_of_the_published_files(key, tmp_path):
    divisor, unit, build = NARROW[key]
    write_keras_cv(build(), tmp_path / "ours.h5")
    with h5py.File(tmp_path / "ours.h5") as file:
        text = lambda values: [value.decode() for value in values]  # noqa: E731
        ours = [
            [layer, [[name, list(file[layer][name].shape)] for name in text(file[layer].attrs["weight_names"])]]
            for layer in text(file.attrs["layer_names"])
        ]
    published = [
        [layer, [[name, [n // divisor if n % unit == 0 else n for n in shape]] for name, shape in weights]]
        for layer, weights in json.loads(LAYOUT.read_text())[key]
    ]
    assert ours == published


def test_files_are_assigned_whole_or_not_at_all(tmp_path):
    widths = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "vocab_size": 300}
    model, other, longer = (TextEncoder(**widths, num_hidden_layers=n) for n in (1, 1, 2))
    write_keras_cv(model, tmp_path / "model.h5")
    before = other.get_weights()
    with h5py.File(tmp_path / "model.h5", "r+") as file:  # the last array is misshapen
        name = "layer_normalization_2/layer_normalization_2/beta:0"
        del file[name]
        file[name] = np.zeros(63)
    with pytest.raises(
        ValueError, match=r"model\.h5: text_model.final_layer_norm/beta needs shape \(64,\); got \(63,\)"
    ):
        assign_keras_cv(other, tmp_path / "model.h5")
    for a, b in zip(before, other.weights):
        np.testing.assert_array_equal(a, b)
    write_keras_cv(model, tmp_path / "model.h5")
    assign_keras_cv(other, tmp_path / "model.h5")
    for a, b in zip(model.weights, other.weights):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="another model than this text_encoder"):
        assign_keras_cv(longer, tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        del file["clip_encoder_layer"]
    with pytest.raises(ValueError, match=r"model\.h5.*clip_encoder_layer"):
        read_keras_cv(tmp_path / "model.h5")


def test_unknown_arrays_of_a_keras_3_file_are_noticed(tmp_path):
    text_encoder().save_weights(tmp_path / "keras_cv.weights.h5")
    with h5py.File(tmp_path / "keras_cv.weights.h5", "r+") as file:
        file["layers/dense/vars/0"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match="1 arrays more than are known"):
        read_keras_cv(tmp_path / "keras_cv.weights.h5")


def test_large_attributes_come_in_chunks(tmp_path):
    model = TextEncoder(vocab_size=300, hidden_size=64, num_attention_heads=1, num_hidden_layers=11)
    write_keras_cv(model, tmp_path / "chunks.h5")
    with h5py.File(tmp_path / "chunks.h5", "r+") as file:
        names = file.attrs["layer_names"]
        del file.attrs["layer_names"]
        for i, name in enumerate(names):  # eleven chunks and more: 10 comes after 9, not after 1
            file.attrs[f"layer_names{i}"] = np.array([name])
    again = build_from_keras_cv(tmp_path / "chunks.h5")
    for a, b in zip(model.weights, again.weights):
        np.testing.assert_array_equal(a, b)


def test_four_formats_of_one_model_draw_the_same_picture(narrow_v1, tmp_path):
    from keras_sd.weights.files import write_safetensors
    from keras_sd.weights.single_file import to_single_file

    torch = pytest.importorskip("torch")
    sd = StableDiffusion.from_preset(narrow_v1)
    folder, single = tmp_path / "keras_cv", tmp_path / "model.safetensors"
    folder.mkdir()
    names = {"kcv_encoder.h5": sd.text_encoder, "kcv_diffusion_model.h5": sd.diffusion_model}
    for name, model in {**names, "kcv_decoder.h5": sd.decoder, "vae_encoder.h5": sd.image_encoder}.items():
        write_keras_cv(model, folder / name)
    from keras_sd.weights.diffusers_folder import read_component

    arrays = to_single_file({c: read_component(narrow_v1, c)[1] for c in ("unet", "vae", "text_encoder")})
    write_safetensors(single, arrays)
    torch.save({"state_dict": {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}}, tmp_path / "model.ckpt")
    options = {"num_steps": 4, "seed": 3, "height": 64, "width": 64, "progress": False}
    expected = sd.text_to_image("an apple", **options).astype(int)
    for source in (folder, single, tmp_path / "model.ckpt"):
        other = StableDiffusion.from_preset(source, tokenizer=narrow_v1 / "tokenizer")
        difference = np.abs(other.text_to_image("an apple", **options).astype(int) - expected)
        assert (difference <= 1).mean() >= 0.999, source


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_keras_cv(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"text\.h5"):
        read_keras_cv(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["layer_names"] = np.array([b"dense"])
        file.create_group("dense").attrs["weight_names"] = np.array([b"k"])
        file["dense/k"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"other\.h5.*layout of a KerasCV model"):
        read_keras_cv(tmp_path / "other.h5")
    model = TextEncoder(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    write_keras_cv(model, tmp_path / "narrow.h5")
    with pytest.raises(ValueError, match=r"narrow\.h5: .*needs shape"):
        build_from_keras_cv(tmp_path / "narrow.h5", hidden_size=32)
    with pytest.raises(ValueError, match="KerasCV has no model"):
        small = DiffusionModel(block_out_channels=(32, 32), attention_levels=(True, False), cross_attention_dim=8)
        write_keras_cv(small, tmp_path / "small.h5")
    assert not (tmp_path / "small.h5").exists()
