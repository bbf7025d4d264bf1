"""Augmentation: keras-cv's layers, told what to do instead of drawing it.

keras-cv draws from a generator with a state, which depends on all that was drawn before. Here the draws come with the
pictures, as their labels: a picture is changed alike in any process, after any restart and in any shard.
"""

import keras
import keras_cv
import tensorflow as tf


class Crop(keras_cv.layers.RandomCrop):
    """Cuts `height` × `width` out of pictures at least as large.

    Call arguments:
        dict with `images` (B, H, W, 3) or (H, W, 3) and `labels` float32 (B, 2) or (2,) in [0, 1): where to cut, from
        top to bottom and from left to right.
    """

    def get_random_transformation_batch(self, batch_size, images=None, labels=None, **_):
        # whole pixels: between them keras-cv's cut repeats some and skips others
        room = tf.cast(tf.shape(images)[1:3] - [self.height, self.width], "float32")
        offsets = tf.floor(labels * (room + 1.0)) / tf.maximum(room, 1.0)
        return {"tops": offsets[:, :1], "lefts": offsets[:, 1:]}


class Flip(keras_cv.layers.RandomFlip):
    """Turns pictures left to right.

    Call arguments:
        dict with `images` (B, H, W, 3) and `labels` bool (B,): which ones to turn.
    """

    def get_random_transformation_batch(self, batch_size, labels=None, **_):
        turn = tf.cast(labels, "float32")[:, None]
        return {"flip_horizontals": turn, "flip_verticals": tf.zeros_like(turn)}


def cropped(buckets):
    """A function for `tf.data` (image (H, W, 3), place float32 (2,), index of its bucket int32 ()) → the cut image."""
    layers = [Crop(height, width, dtype="float32") for height, width in buckets]

    def crop(image, place, bucket):
        def cut(layer):
            return lambda: layer({"images": image, "labels": place})["images"]

        return tf.switch_case(bucket, [cut(layer) for layer in layers]) if len(layers) > 1 else cut(layers[0])()

    return crop


def flipped():
    """A function for `tf.data` (images (B, H, W, 3), turn bool (B,)) → images."""
    layer = Flip(dtype="float32")
    return lambda images, turn: layer({"images": images, "labels": turn})["images"]


def rescaled():
    """A function for `tf.data`: pixels 0 … 255 → float32 in [-1, 1]."""
    return keras.layers.Rescaling(1.0 / 127.5, -1.0, dtype="float32")
