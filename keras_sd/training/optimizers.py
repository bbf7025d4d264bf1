"""Optimizers with little state, learning rates with warm-up, and what makes any Keras optimizer fit for long runs."""

import math

import keras
import numpy as np
from keras import ops

SCHEDULES = ("constant", "linear", "cosine")


@keras.saving.register_keras_serializable(package="keras_sd")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises from 0, linearly, and then stays or falls to 0.

    Args:
        kind: "constant", "linear" or "cosine".
        peak: the highest learning rate.
        steps: updates of the whole run, those of the warm-up included.
        warmup_steps: updates until the peak.

    Raises:
        ValueError: `kind` is unknown, or the warm-up is longer than the run.
    """

    def __init__(self, kind, peak, steps, warmup_steps=0):
        if kind not in SCHEDULES:
            raise ValueError(f"The schedule must be one of {', '.join(SCHEDULES)}; got {kind!r}.")
        if not 0 <= warmup_steps <= steps:
            raise ValueError(f"warmup_steps must be 0 … {steps}, the number of all steps; got {warmup_steps!r}.")
        self.kind, self.peak, self.steps, self.warmup_steps = kind, peak, steps, warmup_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = step / max(1, self.warmup_steps)
        progress = ops.clip((step - self.warmup_steps) / max(1, self.steps - self.warmup_steps), 0.0, 1.0)
        after = {
            "constant": ops.ones_like(progress),
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + ops.cos(math.pi * progress)),
        }[self.kind]
        return self.peak * ops.where(step < self.warmup_steps, rising, after)

    def get_config(self):
        return {"kind": self.kind, "peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps}


@keras.saving.register_keras_serializable(package="keras_sd")
class GuardedOptimizer(keras.optimizers.Optimizer):
    """Around any Keras optimizer: it leaves out steps whose gradients are not finite, accumulates and averages.

    It takes over `global_clipnorm`, `gradient_accumulation_steps`, `use_ema` and `ema_momentum` of the optimizer that
    it wraps, which then sees whole updates alone: learning-rate schedules and averages advance once an update (in Keras
    itself once a batch), and the weights are not overwritten by their averages when `fit` ends.

    Args:
        inner_optimizer: a Keras optimizer, not yet built.
        ema_warmup: let the momentum of update t be at most t / (9 + t), so that the average of a short run is not
            mostly its start.

    Under a strategy of several TensorFlow devices no update can be conditional: there every step is taken, and
    gradients are not accumulated; `DiffusionTrainer.compile` sees to it.

    Attributes:
        conditional: whether a step may be left out.
        averages: list of float32 variables in the order of the trained ones, or None. After the first update they are
            the weights, after each further one `momentum · average + (1 - momentum) · weights`.
        taken: integer variable, number of batches whose gradients were finite.
    """

    def __init__(self, inner_optimizer, ema_warmup=False, name=None):
        super().__init__(learning_rate=0.0, name=name)  # its own is never used; see `learning_rate`
        if inner_optimizer.built or inner_optimizer.ema_overwrite_frequency:
            raise ValueError("The optimizer must be a fresh one, without ema_overwrite_frequency.")
        self.inner_optimizer, self.ema_warmup, self.averages = inner_optimizer, ema_warmup, None
        self.conditional = True
        self.accumulation_steps = inner_optimizer.gradient_accumulation_steps or 1
        self.momentum = inner_optimizer.ema_momentum if inner_optimizer.use_ema else None
        self.max_norm = inner_optimizer.global_clipnorm
        inner_optimizer.gradient_accumulation_steps, inner_optimizer.use_ema = None, False
        inner_optimizer.global_clipnorm = None

    def build(self, variables):
        self.inner_optimizer.build(variables)
        if self.accumulation_steps > 1:
            self._sums = [_slot(self, v, "sum", v.shape) for v in variables]
        if self.momentum is not None:
            # float32 also for narrower weights: a ten-thousandth of one would be rounded away
            same = "only_first_replica"  # each device computes it alike
            self.averages = [_slot(self, v, "average", v.shape, aggregation=same) for v in variables]
            for average, variable in zip(self.averages, variables):
                average.assign(ops.copy(ops.cast(variable, "float32")))  # JAX gives buffers away, so none is shared
        super().build(variables)

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def taken(self):
        return self._iterations

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    def apply(self, grads, trainable_variables=None):
        variables = list(trainable_variables or self._trainable_variables)
        if not self.built:
            self.build(variables)
        grads = [None if g is None else ops.convert_to_tensor(g) for g in grads]  # also TensorFlow's sparse ones
        norm = _global_norm(grads)  # one pass tells whether to take the gradients, and how to clip them
        finite = ops.isfinite(norm)
        self._iterations.assign_add(ops.cast(finite, self._iterations.dtype))
        if self.accumulation_steps == 1:
            self._where(finite, lambda: self._update(grads, variables, norm))
            return
        sums = [self._sums[self._get_variable_index(v)] for v in variables]
        self._where(finite, lambda: self._accumulate(grads, sums))
        complete = ops.equal(self._iterations % self.accumulation_steps, 0)
        self._where(ops.logical_and(finite, complete), lambda: self._update_from(sums, grads, variables))

    def _accumulate(self, grads, sums):
        for total, grad in zip(sums, grads):
            if grad is not None:
                total.assign_add(ops.cast(grad, "float32"))

    def _update_from(self, sums, grads, variables):
        means = [None if g is None else ops.cast(s / self.accumulation_steps, g.dtype) for s, g in zip(sums, grads)]
        self._update(means, variables, _global_norm(means))
        for total in sums:
            total.assign(ops.zeros(total.shape, "float32"))

    def _update(self, grads, variables, norm):
        if self.max_norm:
            scale = self.max_norm / ops.maximum(norm, self.max_norm)
            grads = [None if g is None else g * ops.cast(scale, g.dtype) for g in grads]
        self.inner_optimizer.apply(grads, variables)
        if self.averages is None:
            return
        update = ops.cast(self.inner_optimizer.iterations, "float32")
        momentum = ops.minimum(self.momentum, update / (9.0 + update)) if self.ema_warmup else self.momentum
        momentum = ops.where(update > 1.0, momentum, 0.0)
        for variable in variables:
            average = self.averages[self._get_variable_index(variable)]
            average.assign_add((1.0 - momentum) * (ops.cast(variable, "float32") - average))

    def _where(self, condition, update):
        """Runs `update`, which assigns variables, only where the condition is true."""
        if not self.conditional:
            update()
            return
        if keras.backend.backend() != "jax":
            ops.cond(condition, update, lambda: None)
            return
        variables = [*self.variables, *self._trainable_variables]
        before = [ops.convert_to_tensor(v) for v in variables]

        def updated():  # JAX's branches cannot assign: they return the new values
            with keras.StatelessScope(state_mapping=zip(variables, before)):
                update()
                return [ops.convert_to_tensor(v) for v in variables]

        for variable, value in zip(variables, ops.cond(condition, updated, lambda: before)):
            variable.assign(value)

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        inner["config"].update(
            global_clipnorm=self.max_norm,
            gradient_accumulation_steps=self.accumulation_steps if self.accumulation_steps > 1 else None,
            use_ema=self.momentum is not None,
        )
        return {"inner_optimizer": inner, "ema_warmup": self.ema_warmup, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects)
        return cls(**{**config, "inner_optimizer": inner})


def _global_norm(grads):
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in grads if g is not None]
    return ops.sqrt(ops.sum(ops.stack(squares)))


def _slot(optimizer, variable, name, shape, dtype="float32", **kwargs):
    return optimizer.add_variable(shape, dtype=dtype, name=f"{variable.path.replace('/', '_')}_{name}", **kwargs)


# === Optimizers ===


@keras.saving.register_keras_serializable(package="keras_sd")
class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW with epsilon added to the corrected second moment, as in the paper and in torch, so that a recipe
    made for torch does the same here. (In Keras epsilon weighs 30 times as much at the first step.) Arguments as there.

    Reference: Kingma & Ba (2015), arXiv 1412.6980, algorithm 1; Loshchilov & Hutter (2019), arXiv 1711.05101.
    """

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        momentum, velocity = self._momentums[i], self._velocities[i]
        gradient = ops.cast(gradient, variable.dtype)
        self.assign_add(momentum, (gradient - momentum) * (1.0 - self.beta_1))
        self.assign_add(velocity, (ops.square(gradient) - velocity) * (1.0 - self.beta_2))
        self._descend(variable, self._change(momentum, ops.sqrt(velocity), learning_rate), learning_rate)

    def _apply_weight_decay(self, variables):
        """Nothing: `_descend` does it, which saves two passes over the weights."""

    def _descend(self, variable, change, learning_rate):
        if self.weight_decay and self._use_weight_decay(variable):
            kept = 1.0 - ops.cast(learning_rate, "float32") * self.weight_decay
            self.assign(variable, variable * ops.cast(kept, variable.dtype) - change)
        else:
            self.assign_sub(variable, change)

    def _change(self, momentum, root, learning_rate):
        step = ops.cast(self.iterations + 1, "float32")
        correction = ops.sqrt(1.0 - ops.power(self.beta_2, step))
        rate = ops.cast(learning_rate, "float32") * correction / (1.0 - ops.power(self.beta_1, step))
        rate, epsilon = (ops.cast(x, root.dtype) for x in (rate, self.epsilon * correction))
        return rate * momentum / (root + epsilon)


@keras.saving.register_keras_serializable(package="keras_sd")
class Adafactor(keras.optimizers.Adafactor):
    """Keras' Adafactor without the full-size second moments that it keeps beside their factors: arguments as there.

    Its state has the size of rows and columns, not of the weights.

    Reference: Shazeer & Stern (2018), arXiv 1804.04235, algorithm 4.
    """

    def build(self, variables):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self._rows, self._columns, self._whole = [], [], []
        for v in variables:
            factored = len(v.shape) >= 2
            self._rows.append(_slot(self, v, "row", v.shape[:-1]) if factored else None)
            self._columns.append(_slot(self, v, "column", (*v.shape[:-2], v.shape[-1])) if factored else None)
            self._whole.append(None if factored else _slot(self, v, "velocity", v.shape))

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        gradient, weight = ops.cast(gradient, "float32"), ops.cast(variable, "float32")
        step = ops.cast(self.iterations + 1, "float32")
        rate = ops.minimum(ops.cast(learning_rate, "float32"), 1.0 / ops.sqrt(step))
        decay = 1.0 - ops.power(step, self.beta_2_decay)
        square = ops.square(gradient) + self.epsilon_1

        def averaged(slot, new):
            self.assign(slot, decay * slot + (1.0 - decay) * new)
            return ops.convert_to_tensor(slot)

        if self._whole[i] is None:
            row = averaged(self._rows[i], ops.mean(square, axis=-1))
            column = averaged(self._columns[i], ops.mean(square, axis=-2))
            row = row / ops.mean(row, axis=-1, keepdims=True)
            change = gradient * ops.rsqrt(row)[..., None] * ops.rsqrt(column)[..., None, :]
        else:
            change = gradient * ops.rsqrt(averaged(self._whole[i], square))
        change = change / ops.maximum(1.0, self._rms(change) / self.clip_threshold)
        scale = ops.maximum(self.epsilon_2, self._rms(weight)) * rate
        self.assign_sub(variable, ops.cast(scale * change, variable.dtype))


def dynamic_map(signed):
    """The 256 numbers of dynamic tree quantization in [-1, 1], or [0, 1]: float32, rising.

    Reference: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 1.3.
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        boundaries = np.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        means = 10.0 ** (i - 6) * (boundaries[:-1] + boundaries[1:]) / 2
        numbers += [*means, *(-means if signed else [])]
    return np.sort(np.array(numbers, "float32"))


@keras.saving.register_keras_serializable(package="keras_sd")
class AdamW8bit(AdamW):
    """AdamW whose moments take 8 bits a weight, quantized in blocks: a quarter of the state. Arguments as AdamW's.

    The second moment is kept as its square root: quantized itself, small ones would become 0 and steps explode.
    Weights of fewer than 4096 numbers keep moments of 32 bits.

    Reference: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """

    BLOCK = 256
    SMALL = 4096

    def build(self, variables):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self._momentums, self._velocities, self._codes, self._scales = [], [], [], []
        for v in variables:
            blocks = math.ceil(math.prod(v.shape) / self.BLOCK)
            if math.prod(v.shape) < self.SMALL:
                codes, scales = (), ()
                slots = [self.add_variable_from_reference(v, name) for name in ("momentum", "velocity")]
            else:
                slots, names = (None, None), ("momentum", "velocity")
                codes = [_slot(self, v, f"{name}_codes", (blocks, self.BLOCK), "uint8") for name in names]
                scales = [_slot(self, v, f"{name}_scales", (blocks, 1)) for name in names]
            self._momentums.append(slots[0])
            self._velocities.append(slots[1])
            self._codes.append(codes)
            self._scales.append(scales)

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        if self._momentums[i] is not None:
            return super().update_step(gradient, variable, learning_rate)
        size = math.prod(variable.shape)
        gradient = ops.pad(ops.reshape(ops.cast(gradient, "float32"), (-1,)), (0, -size % self.BLOCK))
        gradient = ops.reshape(gradient, (-1, self.BLOCK))
        momentum, root = (
            # zero before the first step, since the scales are
            ops.take(ops.convert_to_tensor(dynamic_map(signed)), ops.cast(codes, "int32"), axis=0) * scales
            for signed, codes, scales in zip((True, False), self._codes[i], self._scales[i])
        )
        momentum = momentum + (1.0 - self.beta_1) * (gradient - momentum)
        root = ops.sqrt(self.beta_2 * ops.square(root) + (1.0 - self.beta_2) * ops.square(gradient))
        change = ops.reshape(self._change(momentum, root, learning_rate), (-1,))[:size]
        self._descend(variable, ops.cast(ops.reshape(change, variable.shape), variable.dtype), learning_rate)
        for signed, new, codes, scales in zip((True, False), (momentum, root), self._codes[i], self._scales[i]):
            scale = ops.max(ops.abs(new), axis=-1, keepdims=True)
            numbers = dynamic_map(signed)
            relative = ops.reshape(new / ops.maximum(scale, 1e-30), (-1,))
            nearest = ops.searchsorted(ops.convert_to_tensor((numbers[1:] + numbers[:-1]) / 2), relative)
            self.assign(codes, ops.cast(ops.reshape(nearest, codes.shape), "uint8"))
            self.assign(scales, scale)


OPTIMIZERS = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "adafactor": Adafactor}
