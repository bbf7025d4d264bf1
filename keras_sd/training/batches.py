"""Batches of captioned pictures: which ones they are depends on the seed and the step, and on nothing else.

All random choices of an epoch (order, caption, flip, cut) are made at once from (seed, epoch). So any process can begin
at any step, and a worker of several makes its part of a batch without knowing of the others.

A batch has pictures of one size. Where those of a bucket do not fill its last batch, it is filled with further ones of
the same bucket: every batch is whole, every picture is seen, and an epoch has the sum over buckets of
ceil(pictures · repeats / batch size) steps.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from keras_sd.images import fit
from keras_sd.training.buckets import choose_buckets, make_buckets


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Examples and how they become arrays; a source of `batches`, and what a latent cache is made of.

    Attributes:
        examples: list of `keras_sd.training.examples.Example`.
        tokenizer: `CLIPTokenizer`.
        height, width: pixels of a training picture, multiples of 8. Pictures are scaled to cover it.
        bucketed: train in aspect-ratio buckets of about the area `height · width` instead of in this one size.
        flip: turn half of the pictures left to right, other ones each epoch.
        random_crop: cut out of the scaled picture anywhere, elsewhere each epoch, instead of in its middle.
        conditioning: for a ControlNet, function of a picture, uint8 (H, W, 3) → what the network sees of it, alike;
            e.g. `keras_sd.canny`. It is for examples that have no `conditioning` image of their own.

    Raises:
        ValueError: there are no examples, a size is no multiple of 8, prior-preservation pictures stand alone or are
            bucketed, or with `conditioning` only some examples have images of their own.
    """

    examples: list
    tokenizer: object
    height: int
    width: int
    bucketed: bool = False
    flip: bool = False
    random_crop: bool = False
    conditioning: Callable | None = None

    def __post_init__(self):
        if not self.examples:
            raise ValueError("examples is empty: give at least one captioned picture.")
        make_buckets(self.height, self.width)  # checks the sizes
        if self.prior.all():
            raise ValueError("All examples are prior-preservation pictures: give pictures of the subject, too.")
        if self.prior.any() and self.bucketed:
            raise ValueError("Prior-preservation pictures are not bucketed: each batch pairs them with the subject's.")
        without = [example.name for example in self.examples if example.conditioning is None]
        if self.conditioning is not None and 0 < len(without) < len(self.examples):
            raise ValueError(f"{without[0]} has no conditioning image, but others have: give one for all, or for none.")

    @functools.cached_property
    def prior(self):
        """bool (N,): which examples are prior-preservation pictures."""
        return np.array([example.prior for example in self.examples], bool)

    @functools.cached_property
    def num_captions(self):
        """int64 (N,)."""
        return np.array([len(example.captions) for example in self.examples], "int64")

    @functools.cached_property
    def sizes(self):
        """int64 (N, 2): height and width in which each example is trained on."""
        buckets = make_buckets(self.height, self.width) if self.bucketed else [(self.height, self.width)]
        return choose_buckets([(example.height, example.width) for example in self.examples], buckets)

    @functools.cached_property
    def buckets(self):
        """([(height, width)] of the buckets in use, int64 (N,) index of each example's)."""
        sizes, index = np.unique(self.sizes, axis=0, return_inverse=True)
        return [tuple(map(int, size)) for size in sizes], index.reshape(-1)

    def picture(self, i):
        """Example i as uint8 (height, width, 3), its middle; with `random_crop` as large as it covers that size."""
        height, width = map(int, self.sizes[i])
        image = self.examples[i].read()
        if not self.random_crop:
            return np.asarray(fit(image, height, width, 8))
        scale = max(height / image.height, width / image.width)
        size = max(round(image.width * scale), width), max(round(image.height * scale), height)
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))

    def seen(self, i, picture):
        """What a ControlNet sees of example i, whose `picture` is given: uint8, of the same size."""
        if self.examples[i].conditioning is None:
            return self.conditioning(picture)
        height, width = picture.shape[:2]
        image = self.examples[i].read_conditioning()
        if self.random_crop:
            return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
        return np.asarray(fit(image, height, width, 8))

    def dataset(self, draws):
        """`draws` as a `tf.data.Dataset` of its batches → {"image": (B, H, W, 3) in [-1, 1], "tokens": (B, 77)}, and
        "conditioning" (B, H, W, 3) in [0, 1] for a ControlNet."""
        import tensorflow as tf

        from keras_sd.training.augment import cropped, flipped, rescaled

        buckets, bucket_of = self.buckets
        crop, turned, rescale = cropped(buckets), flipped(), rescaled()
        # a single size is known to the graph, so that a model is traced for it once
        height, width = buckets[0] if len(buckets) == 1 else (None, None)

        channels = 3 if self.conditioning is None else 6  # cut and turned together

        def read(i, caption):
            picture = self.picture(i)
            if self.conditioning is not None:
                picture = np.concatenate([picture, self.seen(i, picture)], axis=-1)
            return picture, self.tokenizer([self.examples[i].captions[caption]])[0], np.int32(bucket_of[i])

        def load(draw):
            types = tf.uint8, tf.int32, tf.int32
            image, tokens, bucket = tf.numpy_function(read, (draw["example"], draw["caption"]), types, stateful=False)
            image = tf.ensure_shape(image, (None, None, channels))
            tokens, bucket = tf.ensure_shape(tokens, (self.tokenizer.max_length,)), tf.ensure_shape(bucket, ())
            if self.random_crop:
                image = crop(image, draw["place"], bucket)
            return {**draw, "image": tf.ensure_shape(image, (height, width, channels)), "tokens": tokens}

        def finish(batch):
            image = turned(batch["image"], batch["turn"]) if self.flip else batch["image"]
            finished = {"image": rescale(image[..., :3]), "tokens": batch["tokens"]}
            if self.conditioning is not None:
                finished["conditioning"] = tf.cast(image[..., 3:], "float32") / 255.0
            return finished

        size = draws.element_spec["example"].shape[0]
        rows = draws.unbatch().map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return rows.batch(size, drop_remainder=True).map(finish)


def steps_per_epoch(source, batch_size, repeats=1, num_shards=1):
    """Number of steps of an epoch of `batches`, known before anything is read."""
    pictures = _pictures(source)
    whole = _check("batch_size", batch_size) * _check("num_shards", num_shards)
    if pictures.prior.any():
        if batch_size % 2:
            raise ValueError(f"batch_size must be even with prior-preservation pictures; got {batch_size}.")
        whole //= 2
    counts = np.bincount(pictures.buckets[1][~pictures.prior]) * _check("repeats", repeats)
    return int((-(-counts // whole)).sum())


def batches(source, batch_size, *, seed=0, epochs=1, start_step=0, repeats=1, num_shards=1, shard_index=0):
    """Batches for `DiffusionTrainer`.

    Args:
        source: `Pictures`, or a `LatentCache`.
        batch_size: pictures in a batch, of this shard. With prior-preservation pictures every second one is such.
        seed: integer from 0 on.
        epochs: number of epochs in all, those before `start_step` included.
        start_step: where to begin, e.g. the number of steps done before a restart. Nothing before it is read.
        repeats: how often an epoch has each picture.
        num_shards, shard_index: this is worker `shard_index` of `num_shards`, and makes its part of each batch of
            `batch_size · num_shards`: together the workers see what one with that batch size sees.

    Returns:
        `tf.data.Dataset` of dicts with B rows: "image" and "tokens" of `Pictures`, "mean", "std" and "context" of a
        `LatentCache`, "conditioning" for a ControlNet, and "prior" bool (B,) where there are prior-preservation
        pictures. Its length is known.

    Raises:
        ValueError: an argument is out of its range.
    """
    import tensorflow as tf

    pictures = _pictures(source)
    _check("epochs", epochs)
    _check("seed", seed, 0)
    _check("shard_index", shard_index, 0)
    if shard_index >= num_shards:
        raise ValueError(f"shard_index must be below num_shards = {num_shards}; got {shard_index}.")
    steps = steps_per_epoch(source, batch_size, repeats, num_shards)
    if _check("start_step", start_step, 0) > steps * epochs:
        raise ValueError(f"start_step must be at most {steps * epochs}, the end of {epochs} epochs; got {start_step}.")
    mine = slice(shard_index * batch_size, (shard_index + 1) * batch_size)

    def draws():
        epoch, draw = None, None
        for step in range(start_step, steps * epochs):
            if step // steps != epoch:
                epoch = step // steps
                draw = draw_epoch(pictures, batch_size * num_shards, seed, epoch, repeats)
            yield {name: values[step % steps, mine] for name, values in draw.items()}

    spec = {
        "example": tf.TensorSpec((batch_size,), tf.int64),
        "caption": tf.TensorSpec((batch_size,), tf.int64),
        "turn": tf.TensorSpec((batch_size,), tf.bool),
        "place": tf.TensorSpec((batch_size, 2), tf.float32),
    }
    drawn = tf.data.Dataset.from_generator(draws, output_signature=spec)
    dataset = source.dataset(drawn)
    if pictures.prior.any():  # every second row, whatever the step
        prior = np.arange(batch_size) % 2 == 1
        dataset = dataset.map(lambda batch: {**batch, "prior": tf.constant(prior)})
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps * epochs - start_step))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF  # it is sharded
    dataset = dataset.with_options(options)
    return dataset.prefetch(tf.data.AUTOTUNE)


def draw_epoch(pictures, batch_size, seed, epoch, repeats=1):
    """All random choices of an epoch.

    Args:
        pictures: `Pictures`.
        batch_size: of all workers together.
        seed, epoch, repeats: integers.

    Returns:
        dict of arrays (steps, batch_size): "example" int64, its index; "caption" int64, which one of its captions;
        "turn" bool, whether to turn it left to right; and "place" float32 (steps, batch_size, 2) in [0, 1), where to
        cut it out.
    """
    random = np.random.default_rng((seed, epoch))
    bucket_of, prior = pictures.buckets[1], pictures.prior
    if prior.any():
        pairs = _shuffled(np.flatnonzero(~prior), batch_size // 2, repeats, random)
        others = _stream(np.flatnonzero(prior), epoch * pairs.size, pairs.size, seed).reshape(pairs.shape)
        example = np.stack([pairs, others], axis=-1).reshape(len(pairs), -1)
    else:
        members = (np.flatnonzero(bucket_of == bucket) for bucket in range(len(pictures.buckets[0])))
        example = np.concatenate([_shuffled(one, batch_size, repeats, random) for one in members])
        example = example[random.permutation(len(example))]
    caption = (random.random(example.shape) * pictures.num_captions[example]).astype("int64")
    turn = (random.random(example.shape) < 0.5) & pictures.flip
    place = random.random((*example.shape, 2), dtype="float32")
    return {"example": example, "caption": caption, "turn": turn, "place": place}


def _shuffled(members, batch_size, repeats, random):
    """Each member `repeats` times, shuffled, in whole batches: int64 (steps, batch_size)."""
    rows = random.permutation(np.repeat(members, repeats))
    return np.concatenate([rows, _endless(members, -len(rows) % batch_size, random)]).reshape(-1, batch_size)


def _endless(members, count, random):
    """The first `count` of one permutation of the members after the other."""
    rounds = -(-count // len(members))
    return np.concatenate([members[:0], *(random.permutation(members) for _ in range(rounds))])[:count]


def _stream(members, start, count, seed):
    """Part of one permutation of the members after the other, which goes on from epoch to epoch."""
    rounds = range(start // len(members), (start + count - 1) // len(members) + 1)
    shuffled = np.concatenate([np.random.default_rng((seed, one, 1)).permutation(members) for one in rounds])
    return shuffled[start % len(members) :][:count]


def _pictures(source):
    return source if isinstance(source, Pictures) else source.pictures


def _check(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return int(value)
