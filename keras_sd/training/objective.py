"""What a diffusion model is trained on, as pure functions: noise, targets, and the weights of the errors."""

import numpy as np
from keras import ops


def at_timestep(table, timestep, ndim=1):
    """`table[timestep]` with axes of 1 appended: a (T,) array and int32 (B,) → float32 (B, 1, …) of `ndim` axes."""
    values = ops.take(ops.convert_to_tensor(np.asarray(table, "float32")), timestep, axis=0)
    return ops.reshape(values, (-1,) + (1,) * (ndim - 1))


def noisy(scheduler, latent, noise, timestep):
    """The forward process: float32 (B, h, w, C), (B, h, w, C), int32 (B,) → (B, h, w, C).

    Reference: Ho et al. (2020), arXiv 2006.11239, equation 4.
    """
    signal, noise_level = (at_timestep(t, timestep, 4) for t in (scheduler.signal, scheduler.noise_level))
    return signal * latent + noise_level * noise


def target(scheduler, latent, noise, timestep):
    """What the model should predict, by the scheduler's `prediction_type`: ε, v or the latent itself; (B, h, w, C).

    Reference: Salimans & Ho (2022), arXiv 2202.00512, appendix D (v = α ε - σ x0).
    """
    if scheduler.prediction_type == "epsilon":
        return noise
    if scheduler.prediction_type == "sample":
        return latent
    signal, noise_level = (at_timestep(t, timestep, 4) for t in (scheduler.signal, scheduler.noise_level))
    return signal * noise - noise_level * latent


def offset_noise(noise, offset, strength):
    """Noise whose mean varies, so that the model learns very bright and very dark pictures.

    Args:
        noise: unit noise (B, h, w, C).
        offset: unit noise (B, 1, 1, C).
        strength: its factor, e.g. 0.1.

    Reference: Guttenberg (2023), Diffusion with Offset Noise, crosslabs.org/blog/diffusion-with-offset-noise.
    """
    return noise + strength * offset


def min_snr_weights(scheduler, gamma):
    """Weight of the squared error at each timestep, float64 (T,): it clips the weight of the clean picture's error,
    the signal-to-noise ratio, at `gamma` (5 in the paper).

    ε: min(SNR, γ) / SNR; v: min(SNR, γ) / (SNR + 1); the picture itself: min(SNR, γ).

    Reference: Hang et al. (2023), arXiv 2303.09556, section 3.4.
    """
    with np.errstate(divide="ignore"):
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        if scheduler.prediction_type == "epsilon":
            return np.minimum(1.0, gamma / snr)  # 1 where the ratio is 0, at zero terminal SNR
    clipped = np.minimum(snr, gamma)
    return clipped if scheduler.prediction_type == "sample" else clipped / (snr + 1)


def drop_captions(context, unconditional_context, drop):
    """The unconditional context where `drop` is true: a model so trained can be guided.

    Args:
        context: (B, 77·n, width).
        unconditional_context: (1, 77, width), repeated for every chunk of the context.
        drop: bool (B,).

    Reference: Ho & Salimans (2022), arXiv 2207.12598, algorithm 1.
    """
    unconditional_context = ops.cast(unconditional_context, context.dtype)
    chunks = ops.shape(context)[1] // unconditional_context.shape[1]
    return ops.where(drop[:, None, None], ops.tile(unconditional_context, (1, chunks, 1)), context)


def loss(error, prior=None, prior_weight=1.0):
    """Mean over a batch; where it holds prior-preservation pictures, these are averaged apart.

    Args:
        error: float32 (B,), the weighted mean squared error of each item.
        prior: bool (B,), which items are prior-preservation pictures.
        prior_weight: λ, the factor of their mean.

    Reference: Ruiz et al. (2023), DreamBooth, arXiv 2208.12242, equation 2.
    """
    if prior is None:
        return ops.mean(error)
    prior = ops.cast(prior, error.dtype)
    own, preserved = (ops.sum(error * part) / ops.maximum(ops.sum(part), 1.0) for part in (1.0 - prior, prior))
    return own + prior_weight * preserved
