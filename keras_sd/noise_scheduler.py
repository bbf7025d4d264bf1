"""The forward process: how much of the picture and how much noise a sample holds at each training timestep.

Everything is NumPy in float64; nothing here needs Keras. Samplers read `alphas_cumprod`, training code makes constants
of `signal` and `noise_level`.
"""

import dataclasses
import functools
import numbers

import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class NoiseScheduler:
    """A variance-preserving diffusion: `x_t = sqrt(alphas_cumprod[t]) * x_0 + sqrt(1 - alphas_cumprod[t]) * noise`.

    The defaults are Stable Diffusion v1's. Instances are immutable, comparable and hashable.

    Args:
        train_timesteps: number of timesteps T that the model was trained with, at least 2.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).
        beta_schedule: `"linear"` (Ho et al. 2020, arXiv:2006.11239), `"scaled_linear"` (linear in the square root of
            beta; Rombach et al. 2022, arXiv:2112.10752) or `"squaredcos_cap_v2"` (Nichol and Dhariwal 2021,
            arXiv:2102.09672, Eq. 17), which needs neither `beta_start` nor `beta_end`.
        prediction_type: what the model predicts: `"epsilon"` (the noise), `"v_prediction"` (Salimans and Ho 2022,
            arXiv:2202.00512) or `"sample"` (the clean picture).
        rescale_zero_terminal_snr: shift and scale `sqrt(alphas_cumprod)` so that the last timestep is pure noise
            (Lin et al. 2023, arXiv:2305.08891, Algorithm 1).
        trained_betas: T betas that replace `beta_start`, `beta_end` and `beta_schedule`.

    Raises:
        ValueError: for an argument out of its range; the message names it.

    Example:
        >>> scheduler = NoiseScheduler()
        >>> noisy = scheduler.add_noise(latents, noise, timesteps)      # latents (B, h, w, 4), timesteps (B,)
    """

    train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self):
        def require(condition, name, wanted):
            if not condition:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")

        def number(value):
            return isinstance(value, numbers.Real) and not isinstance(value, bool)

        steps = self.train_timesteps
        require(
            isinstance(steps, numbers.Integral) and number(steps) and steps >= 2, "train_timesteps", "an integer ≥ 2"
        )
        require(number(self.beta_start) and 0 < self.beta_start < 1, "beta_start", "a number between 0 and 1")
        in_range = number(self.beta_end) and self.beta_start <= self.beta_end < 1
        require(in_range, "beta_end", f"a number from beta_start ({self.beta_start}) up to 1")
        require(self.beta_schedule in BETA_SCHEDULES, "beta_schedule", f"one of {', '.join(BETA_SCHEDULES)}")
        require(self.prediction_type in PREDICTION_TYPES, "prediction_type", f"one of {', '.join(PREDICTION_TYPES)}")
        rescale = self.rescale_zero_terminal_snr
        require(isinstance(rescale, (bool, np.bool_)), "rescale_zero_terminal_snr", "True or False")
        if self.trained_betas is not None:
            betas = tuple(np.asarray(self.trained_betas, "float64").ravel().tolist())
            object.__setattr__(self, "trained_betas", betas)
            if len(betas) != steps or not all(0 < beta < 1 for beta in betas):
                raise ValueError(f"trained_betas must be {steps} numbers between 0 and 1, got {len(betas)} numbers.")

    @functools.cached_property
    def betas(self):
        """(T,) float64: variance of the noise that each timestep adds."""
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_timesteps)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_timesteps) ** 2
        else:
            angles = (np.arange(self.train_timesteps + 1) / self.train_timesteps + 0.008) / 1.008 * np.pi / 2
            alphas_cumprod = np.cos(angles) ** 2
            betas = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
        return _read_only(_rescale_zero_terminal_snr(betas) if self.rescale_zero_terminal_snr else betas)

    @functools.cached_property
    def alphas_cumprod(self):
        """(T,) float64, falling from almost 1 to almost 0 (exactly 0 with zero-terminal-SNR rescaling)."""
        return _read_only(np.cumprod(1 - self.betas))

    @functools.cached_property
    def signal(self):
        """(T,) float64: factor of the clean sample at each timestep, `sqrt(alphas_cumprod)`."""
        return _read_only(np.sqrt(self.alphas_cumprod))

    @functools.cached_property
    def noise_level(self):
        """(T,) float64: factor of the unit noise at each timestep, `sqrt(1 - alphas_cumprod)`."""
        return _read_only(np.sqrt(1 - self.alphas_cumprod))

    def add_noise(self, sample, noise, timesteps):
        """The forward process, `signal * sample + noise_level * noise`.

        Args:
            sample, noise: arrays of one shape, (B, …), of any library whose arrays multiply with NumPy's.
            timesteps: integer, or (B,) integers, in [0, train_timesteps).

        Raises:
            ValueError: if a timestep is not an integer of that range.
        """
        return self._gather(self.signal, timesteps, sample) * sample + (
            self._gather(self.noise_level, timesteps, sample) * noise
        )

    def velocity(self, sample, noise, timesteps):
        """What a v-prediction model learns, `signal * noise - noise_level * sample`; arguments as in `add_noise`."""
        return self._gather(self.signal, timesteps, sample) * noise - (
            self._gather(self.noise_level, timesteps, sample) * sample
        )

    def snr(self, timesteps):
        """Signal-to-noise ratio `alphas_cumprod / (1 - alphas_cumprod)`, float64 in the shape of `timesteps`."""
        alphas_cumprod = self.alphas_cumprod[self._check(timesteps)]
        return alphas_cumprod / (1 - alphas_cumprod)

    def _check(self, timesteps):
        timesteps = np.asarray(timesteps)
        valid = np.issubdtype(timesteps.dtype, np.integer)
        if not valid or np.any(timesteps < 0) or np.any(timesteps >= self.train_timesteps):
            raise ValueError(f"timesteps must be integers from 0 to {self.train_timesteps - 1}, got {timesteps}.")
        return timesteps

    def _gather(self, table, timesteps, sample):
        """`table[timesteps]`, in the floating-point type of a NumPy `sample`, with axes of 1 appended to broadcast."""
        values = table[self._check(timesteps)]
        if not np.ndim(values):
            return float(values)
        if isinstance(sample, np.ndarray) and np.issubdtype(sample.dtype, np.floating):
            values = values.astype(sample.dtype)
        return values.reshape(values.shape + (1,) * (len(sample.shape) - values.ndim))


def _rescale_zero_terminal_snr(betas):
    signal = np.sqrt(np.cumprod(1 - betas))
    alphas_cumprod = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return 1 - np.append(alphas_cumprod[0], alphas_cumprod[1:] / alphas_cumprod[:-1])


def _read_only(array):
    array.flags.writeable = False
    return array
