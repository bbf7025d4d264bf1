"""Textual inversion: a new token learns to mean what the pictures show; every weight stays as it is.

    ids = start_token(sd, "<cat-toy>", "toy", num_vectors=2)
    trainer = TextualInversionTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, token_ids=ids)
    trainer.compile(keras.optimizers.AdamW(5e-3))
    trainer.fit(batches)  # of "tokens" of captions with <cat-toy>
    trainer.write_rows()
    save_token(sd, "<cat-toy>", "cat-toy.safetensors")

Reference: Gal et al. (2022), An Image is Worth One Word, arXiv 2208.01618.
"""

import keras
import numpy as np
from keras import ops

from keras_sd.training.trainer import DiffusionTrainer
from keras_sd.weights.textual_inversion import write_textual_inversion


class TextualInversionTrainer(DiffusionTrainer):
    """Trains rows of the token embedding, and nothing else.

    The rows are variables of the trainer, so that the optimizer holds the state of these alone, not of 49,408 others.
    The text encoder has them after `write_rows`.

    Args:
        diffusion_model, scheduler, image_encoder: as in `DiffusionTrainer`.
        text_encoder: a `TextEncoder` that has the tokens.
        token_ids: ids of the rows to train: the last ones of the embedding.
        **kwargs: as in `DiffusionTrainer`.

    Raises:
        ValueError: the ids are not the last ones.
    """

    def __init__(self, diffusion_model, scheduler, text_encoder, image_encoder=None, *, token_ids, **kwargs):
        super().__init__(diffusion_model, scheduler, text_encoder, image_encoder, **kwargs)
        diffusion_model.trainable = text_encoder.trainable = False
        self.embeddings = text_encoder.get_layer("text_model.embeddings")
        self.transformer = keras.Model(self.embeddings.output, text_encoder.output, name="transformer")
        table = self.embeddings.token_embedding.embeddings
        self.first_id = int(token_ids[0])
        if [*token_ids] != [*range(self.first_id, table.shape[0])]:
            raise ValueError(f"token_ids must be the last of the {table.shape[0]} tokens; got {[*token_ids]}.")
        self.first_rows = np.array(ops.convert_to_numpy(table), "float32")[self.first_id :]
        self.rows = self.add_weight(self.first_rows.shape, initializer="zeros", dtype="float32", name="rows")
        self.rows.assign(self.first_rows)

    def _context(self, batch):
        if "tokens" not in batch:
            raise ValueError(f'A batch must hold "tokens", the captions with the new one; it holds {sorted(batch)}.')
        return super()._context({**batch, "context": self._encode(ops.cast(batch["tokens"], "int32"))})

    def _encode(self, tokens):
        """The text encoder, with what the rows have learned added behind the embedding."""
        learned = ops.take(self.rows - self.first_rows, ops.maximum(tokens - self.first_id, 0), axis=0)
        learned = ops.where((tokens >= self.first_id)[..., None], learned, 0.0)
        embedded = self.embeddings(tokens)
        return self.transformer(embedded + ops.cast(learned, embedded.dtype))

    def write_rows(self):
        """Puts the rows into the text encoder, as they are now."""
        variable = self.embeddings.token_embedding.embeddings
        table = np.array(ops.convert_to_numpy(variable), "float32")
        table[self.first_id :] = ops.convert_to_numpy(self.rows)
        variable.assign(table)


def start_token(sd, token, init_token, num_vectors=1):
    """Adds a token to a pipeline whose vectors are, to begin with, those of known words.

    Args:
        sd: a `StableDiffusion`.
        token: what to write in prompts, e.g. "<cat-toy>".
        init_token: a word or several; with more vectors than that has tokens they come again.
        num_vectors: number of vectors.

    Returns:
        their ids.

    Raises:
        ValueError: the token is known already, or `init_token` is empty.
    """
    known = sd.tokenizer.encode(init_token)[1:-1]
    if not known or num_vectors < 1:
        raise ValueError(
            f"init_token must be a known word and num_vectors at least 1; got {init_token!r}, {num_vectors}."
        )
    table = sd.text_encoder.get_layer("text_model.embeddings").token_embedding.embeddings
    rows = ops.take(table, [known[i % len(known)] for i in range(num_vectors)], axis=0)
    return sd.add_token(token, np.array(ops.convert_to_numpy(rows), "float32"))


def save_token(sd, token, path):
    """Writes a token's vectors as a file that diffusers and the web UI open; see `write_textual_inversion`."""
    table = sd.text_encoder.get_layer("text_model.embeddings").token_embedding.embeddings
    rows = ops.take(table, sd.tokenizer.token_ids(token), axis=0)
    write_textual_inversion(path, token, ops.convert_to_numpy(rows))
