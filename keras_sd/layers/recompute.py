"""Gradient checkpointing: activations inside a block are computed again for its gradient instead of being kept."""

import keras


def maybe_recomputed(layer, forward, *inputs):
    """`forward(*inputs)`, computed again for the gradient where the layer's `gradient_checkpointing` is True.

    Args:
        layer: the layer whose part `forward` is.
        forward: function of tensors without random numbers: they would be drawn anew.
        inputs: its arguments; None, for those not given, may end them.

    Reference: Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """
    inputs = [x for x in inputs if x is not None]
    if not layer.gradient_checkpointing:
        return forward(*inputs)
    # a function of positional tensors alone: TensorFlow's recompute_grad takes neither None nor keywords in a graph
    return keras.remat(lambda *x: forward(*x))(*inputs)
