"""Samplers as data: every solver is a table of coefficients, computed here in float64 with NumPy alone.

A sampler is a short function named after its method that returns a `SamplerTable`, one row per network evaluation:

    m    = guided network output at (input_scale * x, timestep), with guidance
    d_0  = sample_coef * x + output_coef * m                            # what this solver remembers: the noise, x0, …
    x    ← carry * x + Σ_j history_j * d_j + noise * z                  # d_j: the j-th most recent, j = 0 … 4

A sampler writes its update formula with the vectors X, D[0] … D[4] and Z, the basis of all such combinations, so that
it reads like its paper and the row falls out of the arithmetic.

    >>> table = make_table("dpmpp_2m", NoiseScheduler(), num_steps=25, karras=True)
    >>> x = table.run(model, table.init_noise_scale * noise)            # model(x, timestep) -> output
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers

import numpy as np

HISTORY = 5  # remembered outputs: PLMS's fifth row and UniPC of order 3 reach back this far
COLUMNS = ("input_scale", "timestep", "guidance", "sample_coef", "output_coef", "carry")
COLUMNS += (*(f"history_{j}" for j in range(HISTORY)), "noise", "signal", "sigma")
SPACINGS = ("leading", "linspace", "trailing")
_CHOICES = (SPACINGS, ("zero", "sigma_min"), ("midpoint", "heun"), ("bh1", "bh2"), ("x0", "noise"))
_CHOICES += (("fixed_small", "fixed_large"),)  # an option takes the words that its default is among
SAMPLERS = {}  # name -> function(scheduler, num_steps, **options) -> SamplerTable, in the order of this file


# === The table ===


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SamplerTable:
    """A sampler's coefficients: float64 columns of length n, one entry per network evaluation.

    Attributes:
        input_scale: factor of x at the network's input.
        timestep: the network's timestep, a float (Karras spacing gives 749.25).
        guidance: classifier-free guidance scale of the row; 1 is no guidance.
        sample_coef, output_coef: make `d_0` of x and the network's output.
        carry, history, noise: make the next x of x, the remembered outputs (n, 5) and fresh unit noise.
        signal, sigma: the noise level of x as row i receives it, in the solver's own scale:
            `x_i = signal_i * x0 + sigma_i * z`. Image-to-image starts from `signal[0] * latent + sigma[0] * noise`.
        init_noise_scale: factor of unit noise that starts text-to-image.
    """

    input_scale: np.ndarray
    timestep: np.ndarray
    guidance: np.ndarray
    sample_coef: np.ndarray
    output_coef: np.ndarray
    carry: np.ndarray
    history: np.ndarray
    noise: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    init_noise_scale: float = 1.0

    def __len__(self):
        return len(self.timestep)

    def __repr__(self):
        return f"<SamplerTable of {len(self)} rows, timesteps {self.timestep[0]:g} to {self.timestep[-1]:g}>"

    @property
    def rows(self):
        """The table as a float32 matrix (n, len(COLUMNS)), columns in the order of `COLUMNS`."""
        names = [field.name for field in dataclasses.fields(self)[:-1]]
        return np.column_stack([getattr(self, name) for name in names]).astype("float32")

    @classmethod
    def from_rows(cls, rows, init_noise_scale=1.0):
        """The inverse of `rows`: a table from a matrix (n, len(COLUMNS)); ValueError for any other shape."""
        rows = np.asarray(rows, "float64")
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS):
            raise ValueError(f"rows must have the shape (n, {len(COLUMNS)}), got {rows.shape}.")
        first, history, last = np.split(rows.T, [6, 6 + HISTORY])
        return cls(*first, history.T, *last, init_noise_scale=float(init_noise_scale))

    @property
    def stochastic(self):
        """True if any row adds fresh noise."""
        return bool(np.any(self.noise))

    @property
    def levels(self):
        """(n + 1, 2): `signal, sigma` before every row, then (1, 0), as what the last row leaves counts as clean.

        Inpainting blends after row i with the known latent at `levels[i + 1]`.
        """
        return np.vstack([np.stack([self.signal, self.sigma], 1), [1.0, 0.0]])

    def run(self, model, x, noise=None, callback=None):
        """Executes the table, in the floating-point type of `x`: the reference for compiled executors.

        Args:
            model: callable (input_scale * x, timestep) -> output in the shape of x; guidance is its business.
            x: the starting sample, e.g. `table.init_noise_scale * unit_noise`.
            noise: callable (row) -> unit noise in the shape of x; needed where a row's `noise` is not 0.
            callback: callable (row, number of rows, x), called after every row.

        Raises:
            ValueError: if the table adds noise and `noise` is not callable.
        """
        if self.stochastic and not callable(noise):
            count = np.count_nonzero(self.noise)
            raise ValueError(
                f"This sampler adds fresh noise in {count} of its {len(self)} rows: noise must be a callable "
                f"(row) -> array, e.g. `lambda row: rng.standard_normal(x.shape)`, got {noise!r}."
            )
        remembered = []
        for i in range(len(self)):
            output = model(float(self.input_scale[i]) * x, float(self.timestep[i]))
            remembered.insert(0, float(self.sample_coef[i]) * x + float(self.output_coef[i]) * output)
            x = float(self.carry[i]) * x
            for coefficient, d in zip(self.history[i], remembered[:HISTORY]):
                x = x + float(coefficient) * d
            if self.noise[i]:
                x = x + float(self.noise[i]) * noise(i)
            if callback is not None:
                callback(i, len(self), x)
        return x


def make_table(name, scheduler, num_steps, **options):
    """Builds the table of a named sampler.

    Args:
        name: one of `SAMPLERS`.
        scheduler: the `NoiseScheduler` that the model was trained with.
        num_steps: integer from 1 to `scheduler.train_timesteps`. Rows: `num_steps`, but one more for `plms` and
            `2 * num_steps - 1` for `heun`, `dpm2` and `dpm2_a`.
        **options: those of the sampler (its signature shows them), and of every sampler:
            strength: in (0, 1]; 0.6 builds the last 60 % of the steps, with the solver's warm-up at the first of them.
            guidance_scale: a number, or a sequence with one number per row; 7.5 by default.
            guidance_interval: `(start, stop)` in fractions of the run, 0 being its first row; outside of it guidance
                is 1 (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    Raises:
        ValueError: for an unknown name or option, or a value out of its range; the message says what would do.
    """
    if name not in SAMPLERS:
        close = difflib.get_close_matches(str(name).lower(), SAMPLERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown sampler {name!r}.{hint} Samplers: {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](scheduler, num_steps, **options)


# === What samplers are written with ===

COMMON_OPTIONS = {"strength": 1.0, "guidance_scale": 7.5, "guidance_interval": None}  # options of every sampler
_SERVED = (*COMMON_OPTIONS, "karras", "timestep_spacing", "steps_offset")  # options that a `_Run` keeps and serves

X, *D, Z = np.eye(1 + HISTORY + 1)  # a combination: coefficients of the sample, the remembered outputs, fresh noise


class _Run:
    """A table under construction: the scheduler, the range of steps to build, and the rows so far."""

    def __init__(self, scheduler, num_steps, options):
        total = scheduler.train_timesteps
        if isinstance(num_steps, bool) or not isinstance(num_steps, numbers.Integral) or not 1 <= num_steps <= total:
            raise ValueError(f"num_steps must be an integer from 1 to {total} (train_timesteps), got {num_steps!r}.")
        self.scheduler, self.num_steps, self.options = scheduler, int(num_steps), options
        strength = options["strength"]
        self.start = self.num_steps - int(self.num_steps * strength)
        if self.start == num_steps:
            raise ValueError(f"strength {strength} leaves no step of {num_steps}: use at least {1 / num_steps:.3g}.")
        self.init_noise_scale = 1.0
        self.rows, self.updates = [], []

    @property
    def steps(self):
        """The steps to build: all of them, or the last ones where `strength` is below 1."""
        return range(self.start, self.num_steps)

    def row(self, timestep, signal, sigma, remember, update):
        """Adds a row: evaluates at a noise level, remembers "x0", "noise" or the "output", moves x to `update`."""
        scale = 1 / math.hypot(signal, sigma)
        if remember == "output":
            sample_coef, output_coef = 0.0, 1.0
        else:
            x0, noise = self.split(np.array([1.0, 0.0]), np.array([0.0, 1.0]), signal, sigma)
            sample_coef, output_coef = x0 if remember == "x0" else noise
        self.updates.append(update)
        self.rows.append([scale, timestep, 1.0, sample_coef, output_coef, *update, signal, sigma])

    def split(self, x, output, signal, sigma):
        """The clean sample and the noise that x and a network output at this level stand for."""
        if self.scheduler.prediction_type == "epsilon":
            if signal == 0:
                raise ValueError(
                    "prediction_type 'epsilon' says nothing about the picture where the schedule leaves only noise "
                    "(rescale_zero_terminal_snr): use 'v_prediction', or timestep_spacing 'leading'."
                )
            return (x - sigma * output) / signal, output
        if self.scheduler.prediction_type == "sample":
            return output, (x - signal * output) / sigma
        scale = math.hypot(signal, sigma)
        x0 = (signal * x / scale - sigma * output) / scale
        return x0, (sigma * x / scale + signal * output) / scale

    def recall(self, combination, rows=1):
        """A combination formed `rows` rows ago, in terms of the present sample and outputs."""
        for carry, *history, fresh in self.updates[len(self.updates) - rows :]:
            assert fresh == 0 or combination[0] == 0, "a sample from before fresh noise cannot be recalled"
            outputs = combination[1:-1] - combination[0] / carry * np.array(history)  # x was (x - Σ history·d) / carry
            combination = np.array([combination[0] / carry, 0.0, *outputs[:-1], 0.0])
        return combination

    def timesteps(self, skip_zero=False):
        """num_steps falling timesteps; `skip_zero` spaces one more and leaves out the last, as DPM-Solvers do."""
        spacing, offset = self.options["timestep_spacing"], self.options["steps_offset"]
        total, count = self.scheduler.train_timesteps, self.num_steps + skip_zero
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, count)[::-1]
        elif spacing == "leading":
            timesteps = np.arange(count)[::-1] * (total // count)
            timesteps = timesteps + min(int(offset), total - 1 - int(timesteps[0]))
        else:
            timesteps = np.arange(total, 0, -total / self.num_steps).round() - 1
        return timesteps[: self.num_steps].astype("float64")

    @functools.cached_property
    def train_alphas(self):
        """alphas_cumprod as diffusers has it: products of alphas that are rounded to float32.

        The rounding moves σ at timestep 0 by 1e-5, and fractional timesteps of Karras spacing by 1e-3.
        """
        return np.cumprod(1 - self.scheduler.betas.astype("float32"), dtype="float64")

    def alphas(self, timesteps, final_alpha_one=False):
        """alphas_cumprod at integer timesteps; at those below 0 that of timestep 0, or 1."""
        alphas = self.train_alphas
        final = 1.0 if final_alpha_one else alphas[0]
        return np.where(timesteps < 0, final, alphas[np.maximum(timesteps, 0).astype(int)])

    @functools.cached_property
    def train_sigmas(self):
        """σ = noise / signal at every training timestep, where zero signal counts as 2^-12."""
        alphas = np.where(self.train_alphas == 0, 2.0**-24, self.train_alphas)
        return np.sqrt((1 - alphas) / alphas)

    def timestep_of(self, sigma):
        """The fractional timestep of a σ, linear in log σ."""
        return np.interp(np.log(sigma), np.log(self.train_sigmas), np.arange(len(self.train_sigmas)))

    def sigmas(self, final_sigma="zero"):
        """Timesteps (n,) and σ (n + 1,) of the solvers that work on x0 + σ·noise; sets their init_noise_scale."""
        timesteps = self.timesteps()
        sigmas = np.interp(timesteps, np.arange(len(self.train_sigmas)), self.train_sigmas)
        if self.options["karras"]:
            sigmas = _karras(sigmas[0], sigmas[-1], self.num_steps)
            timesteps = self.timestep_of(sigmas)
        self.init_noise_scale = sigmas.max()
        if self.options["timestep_spacing"] == "leading":
            self.init_noise_scale = math.hypot(self.init_noise_scale, 1)
        return timesteps, np.append(sigmas, self._final_sigma(final_sigma))

    def half_log_snr(self, final_sigma="zero", rounding=np.round):
        """Timesteps (n,), then signal α, noise σ and λ = log(α/σ), each (n + 1,), of the DPM-Solver family."""
        timesteps = self.timesteps(skip_zero=self.options["timestep_spacing"] != "trailing").round()
        sigmas = self.train_sigmas[timesteps.astype(int)]
        if self.options["karras"]:
            sigmas = _karras(self.train_sigmas[-1], self.train_sigmas[0], self.num_steps)
            timesteps = rounding(self.timestep_of(sigmas))
        if np.any(np.diff(sigmas) >= 0):
            raise ValueError(f"num_steps {self.num_steps} puts two steps on one timestep for this sampler: use fewer.")
        sigmas = np.append(sigmas, self._final_sigma(final_sigma))
        alphas = 1 / np.hypot(sigmas, 1)
        return timesteps, alphas, alphas * sigmas, -np.log(sigmas)

    def _final_sigma(self, final_sigma):
        return 0.0 if final_sigma == "zero" else self.train_sigmas[0]

    def table(self):
        """The finished table."""
        rows = np.array(self.rows)
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"These options have no solution at num_steps {self.num_steps}: a step divides by zero.")
        guidance = self.options["guidance_scale"], self.options["guidance_interval"]
        rows[:, COLUMNS.index("guidance")] = _guidance(*guidance, len(rows))
        return SamplerTable.from_rows(rows, self.init_noise_scale)


def _check_choice(name, value, choices):
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")


def _check_option(name, value, default):
    if isinstance(default, str):
        _check_choice(name, value, next(choices for choices in _CHOICES if default in choices))
        return
    valid, wanted = True, ""
    if isinstance(default, bool):
        valid, wanted = isinstance(value, (bool, np.bool_)), "True or False"
    elif name == "steps_offset":
        valid, wanted = isinstance(value, numbers.Integral) and value >= 0, "an integer ≥ 0"
    elif name == "eta":
        valid, wanted = isinstance(value, numbers.Real) and 0 <= value <= 1, "a number from 0 (no fresh noise) to 1"
    elif name == "strength":
        valid, wanted = isinstance(value, numbers.Real) and 0 < value <= 1, "a number above 0 and up to 1"
    elif name == "timestep_scaling":
        valid, wanted = isinstance(value, numbers.Real) and value > 0, "a number above 0"
    elif name == "disable_corrector":
        valid, wanted = isinstance(value, (tuple, list)), "a list of steps"
    if not valid:
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def _guidance(scale, interval, rows):
    def numbers_of(value):
        try:
            return np.asarray(value, "float64")
        except (TypeError, ValueError):
            return np.array(np.nan)

    column, ends = numbers_of(scale), numbers_of((0, 1) if interval is None else interval)
    if column.shape not in ((), (rows,)) or not np.all(np.isfinite(column)):
        raise ValueError(f"guidance_scale must be a number or {rows} numbers, one per row, got {scale!r}.")
    if ends.shape != (2,) or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(f"guidance_interval must be (start, stop) with 0 ≤ start < stop ≤ 1, got {interval!r}.")
    progress = np.arange(rows) / rows
    return np.where((progress >= ends[0]) & (progress < ends[1]), column, 1.0)


def _karras(largest, smallest, count, rho=7.0):
    """Karras et al. 2022, arXiv:2206.00364, Eq. 5."""
    sigmas = np.linspace(largest ** (1 / rho), smallest ** (1 / rho), count) ** rho
    sigmas[-1], sigmas[0] = smallest, largest
    return sigmas


def _lagrange(nodes):
    """The polynomials that are 1 at their own node and 0 at the others."""
    products = [np.poly1d([other for k, other in enumerate(nodes) if k != j], r=True) for j in range(len(nodes))]
    return [product / product(node) for product, node in zip(products, nodes)]


def _sampler(**options):
    """Registers `build(run, *, its own options)` as the sampler `name(scheduler, num_steps, *, all options)`.

    All options are `options`, `build`'s own and those of every sampler. `run` keeps those that it can serve itself.
    """

    def register(build):
        own = [p for p in inspect.signature(build).parameters.values() if p.kind == p.KEYWORD_ONLY]
        defaults = options | {p.name: p.default for p in own} | COMMON_OPTIONS

        @functools.wraps(build)
        def sampler(scheduler, num_steps, **chosen):
            unknown = sorted(chosen.keys() - defaults.keys())
            if unknown:
                takes = ", ".join(defaults)
                raise ValueError(f"Sampler {build.__name__!r} does not take {unknown[0]!r}; it takes {takes}.")
            for name, value in chosen.items():
                _check_option(name, value, defaults[name])
            chosen = defaults | chosen
            run = _Run(scheduler, num_steps, {name: chosen.pop(name) for name in _SERVED if name in chosen})
            with np.errstate(all="ignore"):  # λ = inf at σ = 0 is meant; `table` rejects what is not finite
                build(run, **chosen)
            return run.table()

        parameter = inspect.Parameter
        shown = [parameter(key, parameter.POSITIONAL_OR_KEYWORD) for key in ("scheduler", "num_steps")]
        shown += [parameter(key, parameter.KEYWORD_ONLY, default=default) for key, default in defaults.items()]
        sampler.__signature__ = inspect.Signature(shown)
        SAMPLERS[build.__name__] = sampler
        return sampler

    return register


_DISCRETE = {"timestep_spacing": "leading", "steps_offset": 1}
_CONTINUOUS = {"karras": False, "timestep_spacing": "linspace", "steps_offset": 1}
_MULTISTEP = {"solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "final_sigma": "zero"}


# === Samplers on the training timesteps, x = √ᾱ·x0 + √(1-ᾱ)·noise ===


@_sampler(**_DISCRETE)
def ddpm(run, *, variance="fixed_small"):
    """Ancestral sampling: Ho, Jain and Abbeel 2020, arXiv:2006.11239, Eqs. 6 and 7."""
    t = run.timesteps().round()
    a = np.append(run.alphas(t), 1.0)
    for i in run.steps:
        now, to = a[i], a[i + 1]
        beta = 1 - now / to
        mean = (math.sqrt(to) * beta * D[0] + math.sqrt(now / to) * (1 - to) * X) / (1 - now)
        std = math.sqrt(beta * ((1 - to) / (1 - now) if variance == "fixed_small" else 1)) if t[i] > 0 else 0
        run.row(t[i], math.sqrt(now), math.sqrt(1 - now), "x0", mean + std * Z)


@_sampler(**_DISCRETE)
def ddim(run, *, final_alpha_one=False, eta=0.0):
    """Denoising diffusion implicit models: Song, Meng and Ermon 2021, arXiv:2010.02502, Eqs. 12 and 16."""
    t = run.timesteps().round()
    a = run.alphas(t)
    b = run.alphas(t - run.scheduler.train_timesteps // run.num_steps, final_alpha_one)
    for i in run.steps:
        now, to = a[i], b[i]
        std = eta * math.sqrt((1 - to) / (1 - now) * (1 - now / to))
        noise = (X - math.sqrt(now) * D[0]) / math.sqrt(1 - now)
        update = math.sqrt(to) * D[0] + math.sqrt(max(1 - to - std**2, 0)) * noise + std * Z
        run.row(t[i], math.sqrt(now), math.sqrt(1 - now), "x0", update)


@_sampler(**_DISCRETE)
def plms(run, *, final_alpha_one=False):
    """Pseudo linear multistep: Liu, Ren, Lin and Zhao 2022, arXiv:2202.09778, Eqs. 11 and 12.

    Starts as Stable Diffusion's PLMS does, with a repeated first step in place of Runge-Kutta (which is not linear in
    few outputs): the first two outputs are averaged, then Adams-Bashforth grows from order 2 to 4. A later start cuts
    the list of n + 1 timesteps, whose second and third are one, before the warm-up. That is diffusers' image-to-image,
    and skips a level: a cut list repeats no timestep.
    """
    t = run.timesteps().round()
    t = np.concatenate([t[:2], t[1:]])[run.start :]
    stride = run.scheduler.train_timesteps // run.num_steps
    weights = {2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12]}
    for k, timestep in enumerate(t):
        if k < 2:
            output = (D[0] + D[k]) / 2
        else:  # the outputs of all rows but the second, newest first
            recent = [D[j] for j in range(5) if j <= k and j != k - 1]
            output = sum(w * d for w, d in zip(weights.get(k, [55 / 24, -59 / 24, 37 / 24, -9 / 24]), recent))
        x, now = (run.recall(X), timestep + stride) if k == 1 else (X, timestep)
        here, now, to = run.alphas(np.array([timestep, now, now - stride]), final_alpha_one)
        x0, noise = run.split(x, output, math.sqrt(now), math.sqrt(1 - now))
        update = math.sqrt(to) * x0 + math.sqrt(1 - to) * noise
        run.row(timestep, math.sqrt(here), math.sqrt(1 - here), "output", update)


# === Samplers on x = x0 + σ·noise, dx/dσ = noise ===


@_sampler(**_CONTINUOUS)
def lms(run, *, order=4):
    """Linear multistep (Adams-Bashforth on σ): Crowson 2022, k-diffusion, `sample_lms`.

    A later start has diffusers' weights: those of the full order, while the outputs before the start count as 0.
    """
    _check_choice("order", order, (1, 2, 3, 4))
    t, sigma = run.sigmas()
    for i in run.steps:
        nodes = [sigma[i - j] - sigma[i] for j in range(min(order, i + 1))]
        weights = [p.integ()(sigma[i + 1] - sigma[i]) for p in _lagrange(nodes)]
        known = zip(weights, D[: i - run.start + 1])
        run.row(t[i], 1.0, sigma[i], "noise", X + sum(w * d for w, d in known))


@_sampler(**_CONTINUOUS)
def euler(run, *, final_sigma="zero"):
    """Euler steps: Karras et al. 2022, arXiv:2206.00364, Algorithm 2 without churn and second order."""
    t, sigma = run.sigmas(final_sigma)
    for i in run.steps:
        run.row(t[i], 1.0, sigma[i], "noise", X + (sigma[i + 1] - sigma[i]) * D[0])


@_sampler(**_CONTINUOUS)
def euler_a(run):
    """Euler steps to σ_down, then fresh noise up to σ: Crowson 2022, k-diffusion, `sample_euler_ancestral`."""
    t, sigma = run.sigmas()
    for i in run.steps:
        down, up = _ancestral(sigma[i], sigma[i + 1])
        run.row(t[i], 1.0, sigma[i], "noise", X + (down - sigma[i]) * D[0] + up * Z)


@_sampler(**_CONTINUOUS)
def heun(run):
    """Heun's second-order steps: Karras et al. 2022, arXiv:2206.00364, Algorithm 1; two rows a step, but the last."""
    t, sigma = run.sigmas()
    for i in run.steps:
        h = sigma[i + 1] - sigma[i]
        run.row(t[i], 1.0, sigma[i], "noise", X + h * D[0])
        if i + 1 < run.num_steps:
            run.row(t[i + 1], 1.0, sigma[i + 1], "noise", run.recall(X) + h * (D[0] + D[1]) / 2)


@_sampler(**_CONTINUOUS)
def dpm2(run):
    """Midpoint steps in log σ, as DPM-Solver-2: Lu et al. 2022, arXiv:2206.00927; two rows a step, but the last."""
    _midpoint(run, lambda now, to: (to, 0.0))


@_sampler(**_CONTINUOUS)
def dpm2_a(run):
    """`dpm2` to σ_down, then fresh noise up to σ: Crowson 2022, k-diffusion, `sample_dpm_2_ancestral`."""
    _midpoint(run, _ancestral)


def _midpoint(run, target):
    t, sigma = run.sigmas()
    t = t.round() if run.options["karras"] else t
    for i in run.steps:
        down, up = target(sigma[i], sigma[i + 1])
        middle = math.sqrt(sigma[i] * down)
        run.row(t[i], 1.0, sigma[i], "noise", X + (middle - sigma[i]) * D[0])
        if i + 1 < run.num_steps:
            update = run.recall(X) + (down - sigma[i]) * D[0] + up * Z
            run.row(run.timestep_of(middle), 1.0, middle, "noise", update)


def _ancestral(now, to):
    """σ_down and σ_up of an ancestral step: down² + up² = to²."""
    up = math.sqrt(to**2 * (now**2 - to**2) / now**2)
    return math.sqrt(to**2 - up**2), up


# === Exponential integrators in λ = log(α/σ), x = α·x0 + σ·noise ===


def _phis(h):
    """The weights of an output's Taylor terms, φ_k(h) = ∫₀ʰ exp(s - h)·(s/h)ᵏ/k! ds for k = 0, 1, 2."""
    phi0 = -math.expm1(-h)
    phi1 = 1 - phi0 / h
    return phi0, phi1, 0.5 - phi1 / h


def _exponential_step(predict, alpha, sigma, lam, now, to):
    """Factor of x, factor of the integral, and signed step h from level `now` to `to`.

    For the x0-prediction of DPM-Solver++ x/σ is integrated over λ, for the noise-prediction of DPM-Solver x/α over -λ.
    """
    h = lam[to] - lam[now]
    return (sigma[to] / sigma[now], alpha[to], h) if predict == "x0" else (alpha[to] / alpha[now], sigma[to], -h)


@_sampler(**_CONTINUOUS)
def dpmpp_2s(run, *, order=2, solver_type="midpoint", lower_order_final=False, final_sigma="zero", predict="x0"):
    """Singlestep DPM-Solver++: Lu et al. 2022, arXiv:2211.01095, Algorithm 1; `order` 3: arXiv:2206.00927, Algorithm 2.

    Steps are grouped by `order`; each group starts anew from the sample at its first step.
    """
    _check_choice("order", order, (1, 2, 3))
    t, alpha, sigma, lam = run.half_log_snr(final_sigma)
    orders = [i % order + 1 for i in range(run.num_steps)]
    if final_sigma == "zero" or (lower_order_final and run.num_steps % order == 0):
        orders[-1] = 1
    for i in run.steps:
        p = min(orders[i], i - run.start + 1)
        first = i - p + 1
        ratio, gain, h = _exponential_step(predict, alpha, sigma, lam, first, i + 1)
        phi0, phi1, phi2 = _phis(h)
        update = ratio * run.recall(X, p - 1) + gain * phi0 * D[p - 1]
        if p > 1:
            r = [(lam[i - j] - lam[first]) / (lam[i + 1] - lam[first]) for j in range(p - 1)]
            slope = [(D[j] - D[p - 1]) / r[j] for j in range(p - 1)]
            if p == 3 and solver_type == "heun":
                derivative = (r[0] * slope[1] - r[1] * slope[0]) / (r[0] - r[1])
                update = update + gain * phi1 * derivative + gain * phi2 * 2 * (slope[0] - slope[1]) / (r[0] - r[1])
            else:
                update = update + gain * (phi0 / 2 if p == 2 and solver_type == "midpoint" else phi1) * slope[0]
        run.row(t[i], alpha[i], sigma[i], predict, update)


@_sampler(**_CONTINUOUS, **_MULTISTEP)
def dpmpp_2m(run, *, order=2, predict="x0", **options):
    """Multistep DPM-Solver++: Lu et al. 2022, arXiv:2211.01095, Algorithm 2; with `predict="noise"` DPM-Solver."""
    _check_choice("order", order, (1, 2, 3))
    _dpm_multistep(run, order, predict, **options)


@_sampler(**_CONTINUOUS, **_MULTISTEP)
def dpmpp_3m(run, *, order=3, predict="x0", **options):
    """`dpmpp_2m` with steps of the third order: Lu et al. 2022, arXiv:2211.01095."""
    _check_choice("order", order, (1, 2, 3))
    _dpm_multistep(run, order, predict, **options)


@_sampler(**_CONTINUOUS, **_MULTISTEP)
def dpmpp_2m_sde(run, *, order=2, **options):
    """Multistep SDE-DPM-Solver++, which adds fresh noise: Lu et al. 2022, arXiv:2211.01095."""
    _check_choice("order", order, (1, 2))
    _dpm_multistep(run, order, "x0", sde=True, **options)


def _dpm_multistep(run, order, predict, *, solver_type, lower_order_final, euler_at_final, final_sigma, sde=False):
    """Fewer than 15 steps end with lower orders where `lower_order_final`; a last step to σ = 0 is of order 1."""
    rounding = np.trunc if run.scheduler.beta_schedule == "squaredcos_cap_v2" else np.round
    t, alpha, sigma, lam = run.half_log_snr(final_sigma, rounding)
    lower_order_final = lower_order_final and run.num_steps < 15
    for i in run.steps:
        left = run.num_steps - i
        p = min(order, i - run.start + 1, left if lower_order_final else order)
        ratio, gain, h = _exponential_step(predict, alpha, sigma, lam, i, i + 1)
        if left == 1 and (euler_at_final or abs(h) in (0, math.inf)):
            p = 1
        fresh = 0.0
        if sde:
            ratio, fresh = ratio * math.exp(-h), sigma[i + 1] * math.sqrt(-math.expm1(-2 * h))
            h = 2 * h
        phi0, phi1, phi2 = _phis(h)
        update = ratio * X + gain * phi0 * D[0] + fresh * Z
        if p > 1:
            h = lam[i + 1] - lam[i]
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (D[0] - D[1]) / r0
            if p == 2:
                update = update + gain * (phi0 / 2 if solver_type == "midpoint" else phi1) * d1
            else:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                d2 = (d1 - (D[1] - D[2]) / r1) / (r0 + r1)
                update = update + gain * phi1 * (d1 + r0 * d2) + gain * phi2 * d2
        run.row(t[i], alpha[i], sigma[i], predict, update)


@_sampler(**_CONTINUOUS)
def deis(run, *, order=2, lower_order_final=True):
    """Adams-Bashforth DEIS: Zhang and Chen 2023, arXiv:2204.13902; the polynomials are in log ρ, ρ = σ/α."""
    _check_choice("order", order, (1, 2, 3))
    t, alpha, sigma, lam = run.half_log_snr("sigma_min")
    for i in run.steps:
        p = min(order, i - run.start + 1)
        if lower_order_final and run.num_steps < 15:
            p = min(p, run.num_steps - i)
        end = lam[i] - lam[i + 1]  # log ρ, counted from that of this row
        update = alpha[i + 1] / alpha[i] * X
        for polynomial, d in zip(_lagrange([lam[i] - lam[i - j] for j in range(p)]), D):
            inner = sum((-1) ** k * polynomial.deriv(k) for k in range(p))  # ∫ P(u) e^u du = inner(u) e^u
            update = update + alpha[i + 1] * sigma[i] / alpha[i] * (inner(end) * math.exp(end) - inner(0)) * d
        run.row(t[i], alpha[i], sigma[i], "noise", update)


@_sampler(**_CONTINUOUS)
def unipc(
    run, *, order=2, solver_type="bh2", lower_order_final=True, final_sigma="zero", predict="x0", disable_corrector=()
):
    """Multistep unified predictor-corrector: Zhao, Bai, Rao, Zhou and Lu 2023, arXiv:2302.04867.

    The corrector needs the output at the point it corrects, so a row corrects the sample that it was given, then
    predicts the next from the corrected one. `disable_corrector` lists the steps that are not corrected.
    """
    _check_choice("order", order, (1, 2, 3))
    t, alpha, sigma, lam = run.half_log_snr(final_sigma)

    def update(x, now, outputs, others):
        """From x at level `now` to the next: `outputs[0]` is that at `now`; `others` are the levels of the rest."""
        ratio, gain, h = _exponential_step(predict, alpha, sigma, lam, now, now + 1)
        phi, scale = math.expm1(-h), (-h if solver_type == "bh1" else math.expm1(-h))
        r = [(lam[level] - lam[now]) / (lam[now + 1] - lam[now]) for level in others]
        moments, moment = [], phi / -h - 1
        for k in range(1, len(r) + 1):
            moments.append(moment * math.factorial(k) / scale)
            moment = moment / -h - 1 / math.factorial(k + 1)
        weights = [0.5] if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, moments) if r else []
        x = ratio * x - gain * phi * outputs[0]
        for weight, output, r_k in zip(weights, outputs[1:], r):
            x = x - gain * scale * weight * (output - outputs[0]) / r_k
        return x

    x, p = X, 0
    for i in run.steps:
        if i > run.start and i - 1 not in disable_corrector:
            x = update(run.recall(x), i - 1, [*D[1 : p + 1], D[0]], [*range(i - 2, i - 1 - p, -1), i])
        else:
            x = X
        p = min(order, i - run.start + 1, run.num_steps - i if lower_order_final else order)
        run.row(t[i], alpha[i], sigma[i], predict, update(x, i, D[:p], range(i - 1, i - p, -1)))


# === Samplers of distilled models ===


def _distilled(run, original_steps):
    """num_steps of the `original_steps` timesteps that the student was distilled on, and those that follow them."""
    total = run.scheduler.train_timesteps
    if not isinstance(original_steps, numbers.Integral) or not run.num_steps <= original_steps <= total:
        raise ValueError(
            f"original_steps must be an integer from num_steps ({run.num_steps}) to {total}, got {original_steps!r}; "
            "distilled models take few steps."
        )
    student = (np.arange(original_steps, 0, -1) * (total // original_steps) - 1).astype("float64")
    return student[np.linspace(0, original_steps, run.num_steps, endpoint=False).astype(int)]


@_sampler()
def lcm(run, *, original_steps=50, timestep_scaling=10.0):
    """Latent consistency models: Luo et al. 2023, arXiv:2310.04378, multistep sampling."""
    t = _distilled(run, original_steps)
    a = run.alphas(t)
    for i in run.steps:
        scaled = t[i] * timestep_scaling
        clean = (0.25 * X + scaled * math.hypot(scaled, 0.5) * D[0]) / (scaled**2 + 0.25)
        update = clean
        if i + 1 < run.num_steps:
            update = math.sqrt(a[i + 1]) * clean + math.sqrt(1 - a[i + 1]) * Z
        run.row(t[i], math.sqrt(a[i]), math.sqrt(1 - a[i]), "x0", update)


@_sampler()
def tcd(run, *, original_steps=50, eta=0.3):
    """Trajectory consistency distillation: Zheng et al. 2024, arXiv:2402.19159, strategic stochastic sampling.

    `eta` is the paper's γ: 0 adds no fresh noise, 1 is multistep consistency sampling.
    """
    t = np.append(_distilled(run, original_steps), 0.0)
    between = np.floor(np.float32(1 - eta) * t.astype("float32"))  # float32 as in diffusers: a floor can tell
    a, b = run.alphas(t), run.alphas(between)
    for i in run.steps:
        noise = (X - math.sqrt(a[i]) * D[0]) / math.sqrt(1 - a[i])
        update = math.sqrt(b[i + 1]) * D[0] + math.sqrt(1 - b[i + 1]) * noise
        if i + 1 < run.num_steps:
            ratio = a[i + 1] / b[i + 1]
            update = math.sqrt(ratio) * update + math.sqrt(1 - ratio) * Z
        run.row(t[i], math.sqrt(a[i]), math.sqrt(1 - a[i]), "x0", update)
