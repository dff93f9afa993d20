"""Noise schedules and step tables, computed in float64 on the host.

A `NoiseSchedule` is what a policy is trained with: T betas and what follows from them. A `StepTable` is what a sampler
runs: K rows of six coefficients. DDPM, DDIM and DPM-Solver++(2M) are three ways to fill the same table, so a kernel
that runs tables runs them all.
"""

import itertools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dql.backend.kept import Kept
from dql.shown import shown

LARGEST = 1e30  # of a table's numbers and of max_action: float32's own largest would leave no room for sums


def vp_beta_schedule(T: int) -> np.ndarray:
    """Variance-preserving betas [T]: 1 - exp(-0.1 / T - 0.5 (10 - 0.1)(2 t - 1) / T^2), t = 1 .. T.

    Source: Xiao, Kreis, Vahdat, "Tackling the generative learning trilemma" (arXiv 2112.07804); Diffusion-QL's default.
    """
    t = np.arange(1, T + 1, dtype=np.float64)
    beta_min, beta_max = 0.1, 10.0
    return 1 - np.exp(-beta_min / T - 0.5 * (beta_max - beta_min) * (2 * t - 1) / T**2)


def linear_beta_schedule(T: int) -> np.ndarray:
    """T betas evenly from 1e-4 to 2e-2, whatever T is. Source: Ho et al., arXiv 2006.11239, as Diffusion-QL uses it."""
    return np.linspace(1e-4, 2e-2, T)


def cosine_beta_schedule(T: int) -> np.ndarray:
    """Cosine betas [T], clipped to [0, 0.999], at the points the published code uses.

    Those are T + 1 points from 0 to T + 1 inclusive, not the usual spacing of Nichol and Dhariwal (arXiv 2102.09672).
    """
    points = np.linspace(0, T + 1, T + 1)
    alphas_cumprod = np.cos((points / (T + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


_BETAS = {"vp": vp_beta_schedule, "linear": linear_beta_schedule, "cosine": cosine_beta_schedule}
BETA_SCHEDULES = tuple(_BETAS)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) of T steps; every array is float64 [T] and indexed by t = 0 .. T - 1.

    Args:
        name: "vp" (the paper's), "linear" or "cosine".
        T: diffusion steps; the paper's is 5.

    Raises:
        ValueError: unknown name, or T is not in 1 .. 1000.
    """

    name: str = "vp"
    T: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _BETAS:
            raise ValueError(f"unknown beta schedule {shown(self.name)}; known: {', '.join(BETA_SCHEDULES)}")
        T: Any = self.T
        whole = isinstance(T, numbers.Integral) and not isinstance(T, bool)
        if not whole or not 1 <= T <= 1000:
            raise ValueError(f"T must be an integer from 1 to 1000, got {shown(T)}")
        object.__setattr__(self, "T", int(T))

    @cached_property
    def betas(self) -> np.ndarray:
        return _BETAS[self.name](self.T)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        return np.sqrt(1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)


@dataclass(frozen=True)
class StepTable:
    """The rows that a sampler runs.

    Row k is (a, b, c0, cx, cp, s) and belongs to `timesteps[k]`, descending:
        x0 = clamp(a x - b eps);  x' = c0 x0 + cx x + cp x0_prev + s noise[k + 1]

    Attributes:
        sampler: which rule filled it.
        rows: K tuples of six floats.
        timesteps: K integers, T - 1 first.
        predict_epsilon: whether a and b take the denoiser's output for the noise (True) or for x_0.
    """

    sampler: str
    rows: tuple[tuple[float, float, float, float, float, float], ...]
    timesteps: tuple[int, ...]
    predict_epsilon: bool = True
    kept: Kept = field(default_factory=Kept, init=False, repr=False, compare=False)
    """What backends derive from the table and keep with it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        object.__setattr__(self, "timesteps", tuple(self.timesteps))

    @property
    def num_steps(self) -> int:
        return len(self.rows)

    @classmethod
    def ddpm(
        cls, schedule: NoiseSchedule, num_steps: int | None = None, *, predict_epsilon: bool = True
    ) -> "StepTable":
        """Ancestral sampling (arXiv 2006.11239, eq. 6 and 7), the paper's sampler.

        With fewer steps than T the posterior is that of the chosen timesteps: alpha_t becomes
        alphas_cumprod(t) / alphas_cumprod(next chosen t), as in arXiv 2102.09672, section 4.

        Args:
            schedule: what the policy was trained with.
            num_steps: K, 1 .. T; None means T.
            predict_epsilon: False for a denoiser that predicts x_0.
        """
        timesteps, bar, bar_next = _respace(schedule, num_steps)
        alpha = bar / bar_next
        c0 = (1 - alpha) * np.sqrt(bar_next) / (1 - bar)
        cx = (1 - bar_next) * np.sqrt(alpha) / (1 - bar)
        s = np.sqrt((1 - alpha) * (1 - bar_next) / (1 - bar))
        return cls._fill("ddpm", timesteps, bar, c0, cx, np.zeros_like(bar), s, predict_epsilon)

    @classmethod
    def ddim(
        cls,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        stochasticity: float = 0.0,
        predict_epsilon: bool = True,
    ) -> "StepTable":
        """DDIM (arXiv 2010.02502, eq. 12 and 16), eps taken from the clamped x0.

        Args:
            schedule: what the policy was trained with.
            num_steps: K, 1 .. T; None means T.
            stochasticity: the paper's eta: 0 is deterministic after x_T, 1 is DDPM.
            predict_epsilon: False for a denoiser that predicts x_0.

        Raises:
            ValueError: stochasticity is not in [0, 1].
        """
        if not 0 <= stochasticity <= 1:
            raise ValueError(f"stochasticity must be from 0 to 1, got {shown(stochasticity)}")
        timesteps, bar, bar_next = _respace(schedule, num_steps)
        s = stochasticity * np.sqrt((1 - bar_next) / (1 - bar) * (1 - bar / bar_next))
        towards_x = np.sqrt(np.maximum(1 - bar_next - s**2, 0))
        cx = towards_x / np.sqrt(1 - bar)
        c0 = np.sqrt(bar_next) - cx * np.sqrt(bar)
        return cls._fill("ddim", timesteps, bar, c0, cx, np.zeros_like(bar), s, predict_epsilon)

    @classmethod
    def dpm_solver_pp_2m(
        cls, schedule: NoiseSchedule, num_steps: int | None = None, *, predict_epsilon: bool = True
    ) -> "StepTable":
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): data prediction, multistep of order 2, deterministic.

        The first step has no history and the last goes to zero noise, where the log-SNR is infinite: both are of
        first order.

        Args:
            schedule: what the policy was trained with.
            num_steps: K, 1 .. T; None means T.
            predict_epsilon: False for a denoiser that predicts x_0.
        """
        timesteps, bar, bar_next = _respace(schedule, num_steps)
        cx = np.sqrt((1 - bar_next) / (1 - bar))  # sigma_next / sigma
        log_snr = 0.5 * np.log(bar / (1 - bar))  # lambda; [K]
        h = np.diff(log_snr)  # of every step but the last
        towards_data = np.sqrt(bar_next)  # alpha_next (1 - exp(-h)); exp(-h) = 0 in the last step
        towards_data[:-1] *= -np.expm1(-h)
        extrapolate = np.zeros_like(bar)  # 1 / (2 r), r = h_previous / h
        extrapolate[1:-1] = h[1:] / (2 * h[:-1])
        c0 = towards_data * (1 + extrapolate)
        cp = -towards_data * extrapolate
        return cls._fill("dpm-solver++", timesteps, bar, c0, cx, cp, np.zeros_like(bar), predict_epsilon)

    @classmethod
    def make(
        cls, sampler: str, schedule: NoiseSchedule, num_steps: int | None = None, *, predict_epsilon: bool = True
    ) -> "StepTable":
        """The table of a sampler by name, one of `SAMPLERS`; "ddim" has stochasticity 0.

        Raises:
            ValueError: unknown sampler, or num_steps is not in 1 .. T.
        """
        if not isinstance(sampler, str):
            raise ValueError(_unknown(sampler))
        if num_steps is not None and not isinstance(num_steps, numbers.Number):
            _respace(schedule, num_steps)  # raises: before it is looked up, for which it may be of no use
        return _make(sampler, schedule, num_steps, predict_epsilon)

    @classmethod
    def _fill(
        cls,
        sampler: str,
        timesteps: np.ndarray,
        bar: np.ndarray,
        c0: np.ndarray,
        cx: np.ndarray,
        cp: np.ndarray,
        s: np.ndarray,
        predict_epsilon: bool,
    ) -> "StepTable":
        a = 1 / np.sqrt(bar) if predict_epsilon else np.zeros_like(bar)
        b = np.sqrt(1 / bar - 1) if predict_epsilon else np.full_like(bar, -1.0)
        s = s.copy()
        s[-1] = 0.0  # x' of the last row is the action
        rows = np.stack([a, b, c0, cx, cp, s], axis=1).tolist()
        return cls(sampler, rows, tuple(int(t) for t in timesteps), predict_epsilon)


def _respace(schedule: NoiseSchedule, num_steps: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K timesteps, evenly from T - 1 down to 0, with alphas_cumprod there and at the next (1 after the last)."""
    T = schedule.T
    K = T if num_steps is None else num_steps
    if isinstance(K, bool) or not isinstance(K, int) or not 1 <= K <= T:
        raise ValueError(
            f"num_steps must be an integer from 1 to the {T} steps the policy was trained with, got {shown(K)}"
        )
    timesteps = np.round(np.linspace(T - 1, 0, K)).astype(int)
    bar = schedule.alphas_cumprod[timesteps]
    return timesteps, bar, np.append(bar[1:], 1.0)


_TABLES: dict[str, Callable[..., StepTable]] = {
    "ddpm": StepTable.ddpm,
    "ddim": StepTable.ddim,
    "dpm-solver++": StepTable.dpm_solver_pp_2m,
}
SAMPLERS = tuple(_TABLES)


@lru_cache(maxsize=256, typed=True)  # True and 2.0 are no step counts, though they equal 1 and 2
def _make(sampler: str, schedule: NoiseSchedule, num_steps: int | None, predict_epsilon: bool) -> StepTable:
    if sampler not in _TABLES:
        raise ValueError(_unknown(sampler))
    return _TABLES[sampler](schedule, num_steps, predict_epsilon=predict_epsilon)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real)
    return is_real and -LARGEST <= value <= LARGEST  # NaN is not


def _unknown(sampler: object) -> str:
    return (
        f"unknown sampler {shown(sampler)}; known: {', '.join(SAMPLERS)}, or a StepTable, "
        "e.g. StepTable.ddim(policy.schedule, stochasticity=0.5)"
    )


def check_rows(rows: Sequence[Sequence[float]], timesteps: Sequence[int], T: int) -> None:
    """Refuses a hand-made table that no policy with T steps can run.

    Raises:
        ValueError: naming what is wrong.
    """
    if len(rows) != len(timesteps) or not rows:
        raise ValueError(f"a step table needs one timestep per row, got {len(rows)} rows, {len(timesteps)} timesteps")
    if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        raise ValueError(f"a step table's timesteps must descend, got {tuple(timesteps)}")
    if any(not 0 <= t < T for t in timesteps):
        raise ValueError(f"the table's timesteps {tuple(timesteps)} do not fit a policy trained with T = {T}")
    for k, row in enumerate(rows):
        if len(row) != 6 or not all(_is_number(value) for value in row):
            raise ValueError(
                f"row {k} of a step table must be six finite numbers (a, b, c0, cx, cp, s), none above {LARGEST:g}, "
                f"got {row}"
            )
    if rows[0][4] != 0:
        raise ValueError("the first row of a step table has no x0 before it: its cp must be 0")
    if rows[-1][5] != 0:
        raise ValueError("the last row of a step table adds noise: its s must be 0")
