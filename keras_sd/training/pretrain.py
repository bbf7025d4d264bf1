"""The recipe of the embedded model: `python -m keras_sd.training.pretrain --runs runs/emoji`.

Six stages, each skipped where its result is there and resumed where it was stopped:

1. captions      which emoji and backgrounds, which pairs are held out → captions.json, and a tokenizer of its own
2. autoencoder   ImageEncoder and Decoder, on pictures drawn while training
3. latents       the training pictures, encoded once
4. diffusion     TextEncoder and DiffusionModel together, v-prediction, exponential moving average
5. decoder       the decoder alone, on the latents that the encoder, now frozen, gave
6. preset        the folder that ships: weights in float16, tokenizer, scheduler, captions, model card

`python -m keras_sd.training.pretrain --help` lists the arguments.
"""

import argparse
import json
import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_sd.layers import timestep_embedding
from keras_sd.models import Decoder, DiffusionModel, ImageEncoder, TextEncoder
from keras_sd.noise_scheduler import NoiseScheduler
from keras_sd.tokenizer import CLIPTokenizer
from keras_sd.training import emoji_pictures
from keras_sd.training.bpe import train_bpe
from keras_sd.weights.diffusers_folder import write_folder, write_json

SIDE = 64
NUM_MERGES = 1500
AUTOENCODER = dict(block_out_channels=(24, 48, 96, 192), layers_per_block=1, norm_num_groups=8)
TEXT_ENCODER = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
DIFFUSION_MODEL = dict(
    block_out_channels=(128, 192),
    layers_per_block=1,
    attention_levels=(True, True),
    num_attention_heads=4,
    cross_attention_dim=128,
    norm_num_groups=16,
)
NOISES_PER_CAPTION = 4  # each caption is encoded once and trained on at several noise levels
EPOCH = 200  # steps between two saves


def read_captions(runs):
    """Stage 1: captions.json and the tokenizer, made once."""
    path = runs / "captions.json"
    if not path.exists():
        emoji, backgrounds = emoji_pictures.choose_emoji(), emoji_pictures.BACKGROUNDS
        held_out = emoji_pictures.choose_held_out(emoji, backgrounds)
        captions = {"emoji": emoji, "backgrounds": backgrounds, "held_out": held_out}
        texts = [
            emoji_pictures.caption(name, background, *composition)
            for name in emoji
            for background in backgrounds
            for composition in emoji_pictures.compositions()
        ]
        CLIPTokenizer(train_bpe(texts, NUM_MERGES)).save(runs / "tokenizer")
        write_json(path, captions)
    return json.loads(path.read_text()), CLIPTokenizer.from_folder(runs / "tokenizer")


def training_pairs(captions):
    """All [name, background] but those held out."""
    held_out = {tuple(pair) for pair in captions["held_out"]}
    return [(n, b) for n in captions["emoji"] for b in captions["backgrounds"] if (n, b) not in held_out]


# === Autoencoder ===


def picture_error(expected, drawn):
    """L1 and L2 error of the pixels, and L1 error of the differences between neighbours, which keeps edges sharp."""
    error = drawn - expected
    edges = ops.mean(ops.abs(error[:, 1:] - error[:, :-1])) + ops.mean(ops.abs(error[:, :, 1:] - error[:, :, :-1]))
    return ops.mean(ops.abs(error)) + 2.0 * ops.mean(ops.square(error)) + 0.5 * edges


@keras.saving.register_keras_serializable(package="keras_sd")
class AutoencoderTrainer(keras.Model):
    """Learns to draw again what it sees, with a little KL divergence of the latent.

    Reference: Rombach et al. (2022), arXiv 2112.10752, appendix G (without the discriminator: flat emoji need none).
    """

    KL_WEIGHT = 2e-4

    def __init__(self, dtype=None, **widths):
        super().__init__()
        self.encoder = ImageEncoder(**widths, scaling_factor=1.0, dtype=dtype)
        self.decoder = Decoder(**widths, scaling_factor=1.0, dtype=dtype)
        self.moments = self.encoder.moments
        self.seed = keras.random.SeedGenerator(0)
        self.built = True

    def call(self, image):
        mean, log_variance = (ops.cast(x, "float32") for x in self.moments(image))
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        self.add_loss(self.KL_WEIGHT * 0.5 * ops.mean(ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance))
        return ops.cast(self.decoder(mean + ops.exp(0.5 * log_variance) * noise), "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return picture_error(y, y_pred) + sum(self.losses)


def picture_batches(captions, batch_size, start):
    """Endless (image, image) float32 (B, 64, 64, 3) in [-1, 1]; half of them standard, half of any composition."""
    pairs, compositions = training_pairs(captions), emoji_pictures.compositions()
    step = start
    while True:
        random = np.random.default_rng((1, step))
        images = []
        for i in random.integers(len(pairs), size=batch_size):
            name, background = pairs[i]
            size, place = compositions[random.integers(len(compositions))] if random.random() < 0.5 else ("", "")
            rgb = captions["backgrounds"][background]
            images.append(emoji_pictures.render(captions["emoji"][name], tuple(rgb), size, place, SIDE))
        images = np.stack(images).astype("float32") / 127.5 - 1.0
        yield images, images
        step += 1


# === Diffusion ===


@keras.saving.register_keras_serializable(package="keras_sd")
class DiffusionTrainer(keras.Model):
    """Text encoder and U-Net, trained together on v-prediction.

    Reference: Salimans & Ho (2022), arXiv 2202.00512, appendix D (v = α ε - σ x0).
    """

    def __init__(self, vocab_size, dtype=None):
        super().__init__()
        self.text_encoder = TextEncoder(vocab_size=vocab_size, **TEXT_ENCODER, dtype=dtype)
        self.diffusion_model = DiffusionModel(**DIFFUSION_MODEL, dtype=dtype)
        self.built = True

    def call(self, x):
        context = ops.repeat(self.text_encoder({"tokens": x["tokens"]}), NOISES_PER_CAPTION, axis=0)
        embedding = timestep_embedding(x["timestep"], DIFFUSION_MODEL["block_out_channels"][0])
        prediction = self.diffusion_model({"latent": x["latent"], "timestep_embedding": embedding, "context": context})
        return ops.cast(prediction, "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred - y))


def encode_pictures(captions, encoder, path):
    """Stage 3: the latent mean of every training pair in every composition, float16 (pairs, compositions, 8, 8, 4)."""
    pairs, compositions = training_pairs(captions), emoji_pictures.compositions()
    latents = np.zeros((len(pairs), len(compositions), SIDE // 8, SIDE // 8, 4), "float16")
    for i, (name, background) in enumerate(pairs):
        rgb = tuple(captions["backgrounds"][background])
        images = [emoji_pictures.render(captions["emoji"][name], rgb, *c, SIDE) for c in compositions]
        latents[i] = encoder.predict_on_batch(np.stack(images).astype("float32") / 127.5 - 1.0)
        if i % 500 == 0:
            print(f"latents {i}/{len(pairs)}", flush=True)
    with open(path.with_suffix(".part"), "wb") as file:
        np.save(file, latents)
    os.replace(path.with_suffix(".part"), path)


def latent_batches(captions, tokenizer, latents, batch_size, start):
    """Endless ({"tokens", "latent", "timestep"}, v): `batch_size` captions at several noise levels each.

    Six in ten captions have no size or place, one in ten is empty (for guidance), one in thirty names no background.
    Half of the noise leans towards the picture, as strong guidance makes it do: the network learns to come back from
    there (input perturbation, Ning et al., 2023, arXiv 2301.11706, with guidance's own direction).
    """
    scheduler = NoiseScheduler()
    signal = np.sqrt(scheduler.alphas_cumprod)
    sigma = np.sqrt(1.0 - scheduler.alphas_cumprod)
    pairs, compositions = training_pairs(captions), emoji_pictures.compositions()
    standard = compositions.index(("", ""))
    mean = latents[:, standard].astype("float32").mean(axis=0)
    count = batch_size * NOISES_PER_CAPTION
    step = start
    while True:
        random = np.random.default_rng((2, step))
        pair = random.integers(len(pairs), size=batch_size)
        composition = random.integers(len(compositions), size=batch_size)
        composition = np.where(random.random(batch_size) < 0.6, standard, composition)
        texts = [emoji_pictures.caption(*pairs[p], *compositions[c]) for p, c in zip(pair, composition)]
        fate = random.random(batch_size)
        texts = ["" if f < 0.1 else t.split(" on a ")[0] if f < 0.13 else t for f, t in zip(fate, texts)]
        x0 = np.repeat(latents[pair, composition].astype("float32"), NOISES_PER_CAPTION, axis=0)
        noise = random.standard_normal(x0.shape, dtype="float32")
        # Stratified timesteps: each batch covers the whole range evenly.
        timestep = (random.permutation(count) + random.random(count)) * len(signal) // count
        a, s = (c[timestep.astype(int)].astype("float32")[:, None, None, None] for c in (signal, sigma))
        lean = random.uniform(0.0, 1.5, (count, 1, 1, 1)) * (random.random((count, 1, 1, 1)) < 0.5)
        noise += lean.astype("float32") * a * (x0 - mean)
        x = {"tokens": tokenizer(texts), "latent": a * x0 + s * noise, "timestep": timestep.astype("float32")}
        yield x, a * noise - s * x0
        step += 1


# === Decoder ===


@keras.saving.register_keras_serializable(package="keras_sd")
class DecoderTrainer(keras.Model):
    """Learns to draw the pictures from their latents, and from latents a little off, as the U-Net gives them."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.built = True

    def call(self, latent):
        return ops.cast(self.decoder(latent), "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return picture_error(y, y_pred)


def decoder_batches(captions, latents, batch_size, start):
    """Endless (latent, image): half of them standard, half of any composition; latents with noise of 0 … 0.1 σ."""
    pairs, compositions = training_pairs(captions), emoji_pictures.compositions()
    standard = compositions.index(("", ""))
    spread = float(latents[:100].astype("float32").std())
    step = start
    while True:
        random = np.random.default_rng((3, step))
        pair = random.integers(len(pairs), size=batch_size)
        composition = random.integers(len(compositions), size=batch_size)
        composition = np.where(random.random(batch_size) < 0.5, standard, composition)
        images = [
            emoji_pictures.render(captions["emoji"][name], tuple(captions["backgrounds"][background]), *c, SIDE)
            for (name, background), c in ((pairs[p], compositions[c]) for p, c in zip(pair, composition))
        ]
        latent = latents[pair, composition].astype("float32")
        scale = random.uniform(0.0, 0.1 * spread, (batch_size, 1, 1, 1)).astype("float32")
        latent += scale * random.standard_normal(latent.shape, dtype="float32")
        yield latent, np.stack(images).astype("float32") / 127.5 - 1.0
        step += 1


# === Preset ===

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


def write_preset(folder, captions, tokenizer, diffusion, autoencoder, scaling_factor):
    """Stage 6: everything in one folder in the diffusers layout."""
    widths = {**AUTOENCODER, "scaling_factor": scaling_factor}
    encoder, decoder = ImageEncoder(**widths), Decoder(**widths)
    encoder.set_weights(autoencoder.encoder.get_weights())
    decoder.set_weights(autoencoder.decoder.get_weights())
    models = (diffusion.text_encoder, diffusion.diffusion_model, encoder, decoder)
    write_folder(folder, tokenizer, *models, SCHEDULER, (SIDE, SIDE), "float16")
    write_json(folder / "captions.json", captions)


# === All ===


def train(model, batches, path, steps, learning_rate, ema_momentum=None):
    """Trains to `steps` and saves to `path` every epoch; a second call goes on where the first one stopped."""
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate * 0.02, steps - EPOCH, alpha=0.02, warmup_target=learning_rate, warmup_steps=EPOCH
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=1e-4,
        beta_2=0.99,
        global_clipnorm=1.0,
        use_ema=ema_momentum is not None,
        ema_momentum=ema_momentum or 0.99,
    )
    model.compile(optimizer=optimizer, jit_compile=keras.backend.backend() == "jax")
    optimizer.build(model.trainable_variables)
    if path.exists():
        model.load_weights(path)
    done = int(optimizer.iterations)
    if done >= steps:
        if ema_momentum:
            optimizer.finalize_variable_values(model.trainable_variables)
        return

    def save(epoch, logs):
        part = path.with_name("part." + path.name)
        model.save_weights(part, overwrite=True)
        os.replace(part, path)
        print(f"{path.name} step {int(optimizer.iterations)}/{steps} loss {logs['loss']:.4f}", flush=True)

    model.fit(
        batches(done),
        steps_per_epoch=EPOCH,
        initial_epoch=done // EPOCH,
        epochs=steps // EPOCH,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=save)],
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m keras_sd.training.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=pathlib.Path, default="runs/emoji", help="folder of checkpoints and latents")
    parser.add_argument("--autoencoder-steps", type=int, default=6000, help="steps of the autoencoder (default 6000)")
    parser.add_argument("--autoencoder-batch", type=int, default=16, help="pictures a step (default 16)")
    parser.add_argument("--diffusion-steps", type=int, default=6000, help="steps of the U-Net (default 6000)")
    parser.add_argument("--diffusion-batch", type=int, default=32, help="captions a step (default 32)")
    parser.add_argument("--decoder-steps", type=int, default=3000, help="further steps of the decoder (default 3000)")
    parser.add_argument("--preset", type=pathlib.Path, default="runs/emoji/preset", help="folder to write at the end")
    parser.add_argument("--dtype", default="mixed_bfloat16", help="Keras dtype policy of the U-Net")
    args = parser.parse_args(arguments)
    args.runs.mkdir(parents=True, exist_ok=True)
    captions, tokenizer = read_captions(args.runs)

    autoencoder = AutoencoderTrainer(**AUTOENCODER)
    train(
        autoencoder,
        lambda start: picture_batches(captions, args.autoencoder_batch, start),
        args.runs / "autoencoder.weights.h5",
        args.autoencoder_steps,
        learning_rate=1e-3,
    )
    latents_path = args.runs / "latents.npy"
    if not latents_path.exists():
        encode_pictures(captions, autoencoder.encoder, latents_path)
    latents = np.load(latents_path)
    scaling_factor = float(1.0 / latents.astype("float32").std())
    print(f"scaling factor {scaling_factor:.5f}", flush=True)

    diffusion = DiffusionTrainer(tokenizer.vocab_size, args.dtype)
    scaled = latents * np.float16(scaling_factor)
    train(
        diffusion,
        lambda start: latent_batches(captions, tokenizer, scaled, args.diffusion_batch, start),
        args.runs / "diffusion.weights.h5",
        args.diffusion_steps,
        learning_rate=1e-3,
        ema_momentum=0.999,
    )
    train(
        DecoderTrainer(autoencoder.decoder),
        lambda start: decoder_batches(captions, latents, args.autoencoder_batch, start),
        args.runs / "decoder.weights.h5",
        args.decoder_steps,
        learning_rate=5e-4,
    )
    write_preset(args.preset, captions, tokenizer, diffusion, autoencoder, scaling_factor)


if __name__ == "__main__":
    main()
