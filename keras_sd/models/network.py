"""What the networks have in common."""

import keras

from keras_sd.layers.backend_fixes import FixedShapes


class Network(FixedShapes, keras.Model):
    """A functional model that is made again from `arguments`, those of its constructor with their defaults."""

    def get_config(self):
        return dict(self.arguments)

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def forget_traces(model):
    """Lets the next call of `fit`, `predict` … compile anew: what was compiled knows the old variables."""
    model.train_function = model.test_function = model.predict_function = None
    model.ov_compiled_model = None
