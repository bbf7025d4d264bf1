"""Textual inversion: pictures against diffusers in every file format, prompts, tokenizers, training."""

import diffusers
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from safetensors.numpy import load_file, save_file

from keras_sd import StableDiffusion
from keras_sd.noise import initial_noise
from keras_sd.training.textual_inversion import TextualInversionTrainer, save_token, start_token
from keras_sd.weights.textual_inversion import read_textual_inversion, write_textual_inversion

START = initial_noise(3, 1, (8, 8, 4))
VECTORS = np.random.default_rng(0).standard_normal((3, 32)).astype("float32")
PROMPTS = ("an apple <cat> and a pear", "a two")  # with a negative one


@pytest.fixture
def sd(tiny):
    return StableDiffusion.from_preset(tiny)


@pytest.fixture
def theirs(tiny):
    return open_peer(tiny)


def open_peer(folder):
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    return peer


def context(peer, prompt):
    """diffusers' context of a prompt."""
    return peer.encode_prompt(prompt, "cpu", 1, False)[0].detach().numpy()


# === Files ===


def write_file(kind, folder, vectors, name="<cat>"):
    """Writes a file as other tools do; returns its path."""
    tensor = torch.from_numpy(vectors)
    if kind == "diffusers bin":
        torch.save({name: tensor if len(vectors) > 1 else tensor[0]}, folder / "learned_embeds.bin")
        return folder / "learned_embeds.bin"
    if kind == "diffusers folder":
        save_file({name: vectors}, folder / "learned_embeds.safetensors")
        return folder
    path = folder / ("<cat>.safetensors" if "safetensors" in kind else "<cat>.pt")
    if kind == "webui pt":
        rest = {"string_to_token": {"*": 265}, "name": name, "step": 7, "sd_checkpoint": None}
        torch.save({"string_to_param": {"*": tensor}, **rest}, path)
    elif kind == "original pt":
        parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})
        torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, path)
    elif kind == "tensor":
        torch.save(tensor, path)
    else:
        save_file({"emb_params" if "webui" in kind else name: vectors.astype("float16")}, path)
    return path


KINDS = (
    "diffusers bin",
    "diffusers folder",
    "diffusers safetensors",
    "webui pt",
    "webui safetensors",
    "original pt",
    "tensor",
)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, count, tmp_path):
    token, vectors = read_textual_inversion(write_file(kind, tmp_path, VECTORS[:count]))
    assert token == "<cat>" and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, VECTORS[:count], atol=1e-3 if "safetensors" in kind else 0)


@pytest.mark.parametrize("count", [1, 3])
def test_others_open_what_is_written(theirs, tmp_path, count):
    write_textual_inversion(tmp_path / "x.safetensors", "<cat>", VECTORS[:count])
    theirs.load_textual_inversion(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(theirs.text_encoder.get_input_embeddings().weight.detach()[-count:], VECTORS[:count])
    token, vectors = read_textual_inversion(tmp_path / "x.safetensors")
    assert token == "<cat>" and np.array_equal(vectors, VECTORS[:count])


# === Pictures ===


@pytest.mark.parametrize("kind", ["diffusers bin", "webui pt"])
def test_pictures_equal_diffusers(sd, theirs, tmp_path, kind):
    path = write_file(kind, tmp_path, VECTORS)
    assert sd.load_textual_inversion(path) == "<cat>"
    theirs.load_textual_inversion(path)
    start = torch.from_numpy(np.moveaxis(START, -1, 1).copy())
    for prompt, negative in (PROMPTS, PROMPTS[::-1]):
        drawn = sd.text_to_image(prompt, negative, num_steps=2, diffusion_noise=START, progress=False)
        image = theirs(
            prompt, 64, 64, 2, negative_prompt=negative, latents=start, output_type="np", guidance_scale=7.5
        ).images
        assert (np.abs(drawn - np.round(image * 255)) <= 1).mean() >= 0.999


def test_several_tokens(sd, theirs, tmp_path):
    """One inside another's name, one or more vectors, tokens that touch, upper case."""
    for name, count in (("<cat>", 3), ("sks", 1), ("<cat-toy>", 2)):
        write_textual_inversion(tmp_path / "x.safetensors", name, VECTORS[:count] * count)
        sd.load_textual_inversion(tmp_path / "x.safetensors")
        theirs.load_textual_inversion(tmp_path / "x.safetensors")
    for prompt in ("<cat>", "a <cat-toy>, <cat> pear", "<cat><cat-toy>sks", "SKS apple", "risks", "two", ""):
        np.testing.assert_allclose(sd.encode_text(prompt), context(theirs, prompt), atol=1e-5)


def test_a_token_of_ones_own(sd, theirs, tmp_path):
    path = write_file("webui safetensors", tmp_path, VECTORS[:1])
    assert sd.load_textual_inversion(path, token="Pear2") == "Pear2"
    theirs.load_textual_inversion(path, token="Pear2")
    for prompt in ("a Pear2!", "a pear2!"):
        np.testing.assert_allclose(sd.encode_text(prompt), context(theirs, prompt), atol=1e-5)


def test_emphasis_and_chunks_know_the_token(sd):
    sd.add_token("<cat>", VECTORS)
    weighted, plain = sd.encode_text("an (<cat>:1.5) apple"), sd.encode_text("an <cat> apple")
    assert np.abs(weighted - plain).max() > 0.1
    assert sd.encode_text("<cat> " * 26).shape == (1, 154, 32)


def test_all_else_stays(sd, tmp_path):
    before = {v.path: np.array(v) for v in sd.text_encoder.variables}
    plain = sd.encode_text(["an apple", ""])
    sd.load_textual_inversion(write_file("tensor", tmp_path, VECTORS))
    np.testing.assert_array_equal(sd.encode_text(["an apple", ""]), plain)
    for variable in sd.text_encoder.variables:
        old = before[variable.path]
        np.testing.assert_array_equal(np.array(variable)[: len(old)], old)


def test_with_a_lora(sd, tmp_path):
    """A LoRA of the text encoder stays, and goes as exactly, when a token comes."""
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    arrays = {f"{name}.lora_down.weight": np.ones((2, 32)), f"{name}.lora_up.weight": np.ones((64, 2))}
    save_file(arrays, tmp_path / "a.safetensors")
    sd.load_textual_inversion(write_file("tensor", tmp_path, VECTORS[:1], "<dog>"), "<dog>")
    before = [np.array(v) for v in sd.text_encoder.variables[:-1]]
    sd.load_lora(tmp_path / "a.safetensors")
    merged = sd.encode_text("apple <dog>")
    sd.load_textual_inversion(write_file("tensor", tmp_path, VECTORS))
    np.testing.assert_allclose(sd.encode_text("apple <dog>"), merged, atol=1e-6)
    sd.unload_lora()
    for variable, old in zip(sd.text_encoder.variables, before):
        np.testing.assert_array_equal(np.array(variable)[: len(old)], old)


def test_presets_keep_the_token(sd, tmp_path):
    sd.add_token("<cat>", VECTORS)
    sd.save_preset(tmp_path / "cat")
    expected = sd.encode_text("a <cat>")
    np.testing.assert_array_equal(StableDiffusion.from_preset(tmp_path / "cat").encode_text("a <cat>"), expected)
    np.testing.assert_allclose(context(open_peer(tmp_path / "cat"), "a <cat>"), expected, atol=1e-5)


def test_the_graph_tokenizer_knows_it(sd):
    from export.bpe import GraphTokenizer

    sd.add_token("<cat>", VECTORS)
    sd.add_token("a\\1", VECTORS[:2])
    prompts = ["a <cat> pear", "<cat><cat>", "<CAT>", "<cat>_1", "a\\1", "<cat> " * 30]
    with pytest.warns(UserWarning, match="longer"):
        expected = sd.tokenizer(prompts)
    np.testing.assert_array_equal(GraphTokenizer(sd.tokenizer)(tf.constant(prompts))[0], expected)


# === What does not fit ===


def test_bad_files(sd, tmp_path):
    before = sd.text_encoder, sd.tokenizer
    save_file({"clip_l": VECTORS, "clip_g": VECTORS}, tmp_path / "xl.safetensors")
    save_file({"<cat>": np.zeros((2, 768), "float32")}, tmp_path / "wide.safetensors")
    save_file({"<cat>": np.zeros((2, 3, 32), "float32")}, tmp_path / "deep.safetensors")
    torch.save({"string_to_param": {"*": "none"}}, tmp_path / "text.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    (tmp_path / "empty").mkdir()
    for name, error in (
        ("xl.safetensors", "it holds clip_g, clip_l|it holds clip_l, clip_g"),
        ("wide.safetensors", "768 numbers; the text encoder needs 32"),
        ("deep.safetensors", "no vectors"),
        ("text.pt", "no vectors"),
        ("cut.pt", "damaged"),
    ):
        with pytest.raises(ValueError, match=error) as raised:
            sd.load_textual_inversion(tmp_path / name)
        assert name in str(raised.value)
    for name in ("none.pt", "none.safetensors", "empty"):
        with pytest.raises(FileNotFoundError, match=name.partition(".")[0]):
            sd.load_textual_inversion(tmp_path / name)
    assert before == (sd.text_encoder, sd.tokenizer)
    with pytest.raises(ValueError, match=r"must end in .safetensors; got 'x.pt'"):
        write_textual_inversion("x.pt", "<cat>", VECTORS)


def test_tokens_that_are_taken(sd):
    sd.add_token("<cat>", VECTORS)
    for token in ("<cat>", "<CAT>", "<cat>_1", "<|endoftext|>", "", "apple</w>"):
        with pytest.raises(ValueError, match="in the vocabulary already, or empty; give another token"):
            sd.add_token(token, VECTORS)
    assert sd.text_encoder.arguments["vocab_size"] == sd.tokenizer.vocab_size


def test_hostile_files_are_not_run(tmp_path, sd):
    class Hostile:
        def __reduce__(self):
            return __import__("os").system, (f"touch {tmp_path / 'it ran'}",)

    torch.save({"string_to_param": {"*": Hostile()}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="hostile"):
        sd.load_textual_inversion(tmp_path / "x.pt")
    assert not (tmp_path / "it ran").exists()


# === Training ===


def captioned_batches(sd, count):
    """Batches of latents with captions, noise and timesteps."""
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "mean": random.standard_normal((2, 8, 8, 4)).astype("float32"),
            "std": np.zeros((2, 8, 8, 4), "float32"),
            "noise": random.standard_normal((2, 8, 8, 4)).astype("float32"),
            "timestep": random.integers(0, 1000, 2).astype("int32"),
            "tokens": sd.tokenizer(["an <cat> apple", "a two"]),
        }


def test_training_equals_a_torch_loop(sd, theirs, tmp_path):
    """Rows after some steps of Adam, and losses; everything else stays as it was."""
    ids = start_token(sd, "<cat>", "apple two", num_vectors=3)
    first = np.array(sd.text_encoder.get_layer("text_model.embeddings").token_embedding.embeddings)[ids]
    np.testing.assert_array_equal(first[0], first[2])
    models = sd.diffusion_model, sd.text_encoder
    before = [np.array(v) for model in models for v in model.variables]
    trainer = TextualInversionTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, token_ids=ids)
    assert [v.shape for v in trainer.trainable_variables] == [(3, 32)]
    trainer.compile(keras.optimizers.Adam(1e-2, epsilon=1e-8), run_eagerly=True)
    losses = [float(trainer.train_on_batch(batch)) for batch in captioned_batches(sd, 4)]

    write_textual_inversion(tmp_path / "x.safetensors", "<cat>", first)
    theirs.load_textual_inversion(tmp_path / "x.safetensors")
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table = theirs.text_encoder.get_input_embeddings().weight
    optimizer = torch.optim.Adam([table], 1e-2)
    for ours, batch in zip(losses, captioned_batches(sd, 4)):
        latent, noise = (torch.from_numpy(np.moveaxis(batch[key], -1, 1).copy()) for key in ("mean", "noise"))
        timestep = torch.from_numpy(batch["timestep"]).long()
        context = theirs.text_encoder(torch.from_numpy(batch["tokens"]).long()).last_hidden_state
        prediction = theirs.unet(scheduler.add_noise(latent, noise, timestep), timestep, context).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        table.grad[: ids[0]] = 0
        optimizer.step()
        assert abs(ours - loss.item()) <= 1e-4 * loss.item()
    rows = table.detach().numpy()[ids]
    assert np.abs(rows - first).max() > 0.01
    np.testing.assert_allclose(keras.ops.convert_to_numpy(trainer.rows), rows, atol=1e-3)

    after = [np.array(v) for model in models for v in model.variables]
    assert all(np.array_equal(a, b) for a, b in zip(after, before))
    trainer.write_rows()
    save_token(sd, "<cat>", tmp_path / "learned.safetensors")
    np.testing.assert_allclose(load_file(tmp_path / "learned.safetensors")["<cat>"], rows, atol=1e-3)
    np.testing.assert_allclose(sd.encode_text("a <cat>"), context_of(theirs, sd, "a <cat>"), atol=1e-2)


def context_of(peer, sd, prompt):
    tokens = torch.from_numpy(sd.tokenizer([prompt])).long()
    return peer.text_encoder(tokens).last_hidden_state.detach().numpy()


def test_bad_training(sd):
    for init, count in (("", 1), ("apple", 0)):
        with pytest.raises(ValueError, match="init_token must be a known word"):
            start_token(sd, "<cat>", init, count)
    ids = start_token(sd, "<cat>", "apple")
    with pytest.raises(ValueError, match="must be the last"):
        TextualInversionTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, token_ids=[3])
    with pytest.raises(ValueError, match="no token '<dog>'"):
        save_token(sd, "<dog>", "x.safetensors")
    trainer = TextualInversionTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, token_ids=ids)
    with pytest.raises(ValueError, match='must hold "tokens"'):
        trainer({"mean": np.zeros((1, 8, 8, 4)), "std": np.zeros((1, 8, 8, 4)), "context": np.zeros((1, 77, 32))})
