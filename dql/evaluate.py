"""Rollouts in vectorised Gymnasium environments, normalised scores, and model selection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dql import noise

if TYPE_CHECKING:
    import gymnasium

    from dql.data import DatasetInfo

_WAVE = 100  # environments stepped together


class Actor(Protocol):
    """Whatever acts: a DiffusionQL, a DiffusionBC, or anything with their `act`."""

    def act(self, states: np.ndarray, *, seed: int | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Evaluation:
    """Returns of some episodes.

    Attributes:
        returns: undiscounted [E].
        lengths: steps [E].
        normalized: 100 (R - random) / (expert - random) [E], or None where the dataset has no reference scores.
    """

    returns: np.ndarray
    lengths: np.ndarray
    normalized: np.ndarray | None

    @property
    def return_mean(self) -> float:
        return float(self.returns.mean())

    @property
    def return_std(self) -> float:
        return float(self.returns.std())

    @property
    def return_interval(self) -> tuple[float, float]:
        return confidence_interval(self.returns)

    @property
    def normalized_score(self) -> float | None:
        return None if self.normalized is None else float(self.normalized.mean())

    @property
    def normalized_interval(self) -> tuple[float, float] | None:
        return None if self.normalized is None else confidence_interval(self.normalized)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        low, high = self.return_interval
        values: dict[str, Any] = {
            "episodes": len(self.returns),
            "return_mean": self.return_mean,
            "return_std": self.return_std,
            "return_low": low,
            "return_high": high,
            "length_mean": float(self.lengths.mean()),
            "normalized_score": self.normalized_score,
        }
        return values


def confidence_interval(values: np.ndarray, level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the mean over episodes (percentile method, fixed seed: the same values, the same interval).

    It covers the luck of the episodes, not that of the training seed.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    chunk = max(1, 10_000_000 // len(values))  # resamples at a time: thousands of episodes would fill the memory
    means = [
        values[rng.integers(len(values), size=(min(chunk, resamples - i), len(values)))].mean(axis=1)
        for i in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def evaluate(
    actor: Actor, info: "DatasetInfo", *, episodes: int = 10, seed: int = 0, make: Callable[[], Any] | None = None
) -> Evaluation:
    """Rolls the actor out for whole episodes.

    Episode i has its own environment, reset with a seed of its own, and its own rows of noise, so every episode
    counts once however long the others take, and it does not matter how many there are.

    Args:
        actor: its `act` is called once a step, with the states of all environments.
        info: of the dataset: which environment, how its observations are flattened, the reference scores.
        episodes: how many.
        seed: of environments and actions.
        make: builds one environment; None builds the one that `info` names (`dql.environments.make_env`).

    Raises:
        ValueError: no episodes, or observations with NaN.
        DatasetError: the environment cannot be made here; the sentence says what to install.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if make is None:
        from dql.environments import make_env

        def make() -> Any:
            return make_env(info)

    returns, lengths = [], []
    for first in range(0, episodes, _WAVE):
        r, n = _wave(actor, make, min(_WAVE, episodes - first), first, seed)
        returns.append(r)
        lengths.append(n)
    all_returns = np.concatenate(returns)
    return Evaluation(all_returns, np.concatenate(lengths), info.normalized_score(all_returns))


def _wave(
    actor: Actor, make: Callable[[], "gymnasium.Env"], count: int, first: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Episodes first .. first + count, side by side."""
    from gymnasium.vector import SyncVectorEnv

    environments = SyncVectorEnv([make] * count)
    try:
        resets: list[int | None] = [noise.derive(seed, "episode", first + i) % 2**31 for i in range(count)]
        states, _ = environments.reset(seed=resets)
        returns, lengths = np.zeros(count), np.zeros(count, np.int64)
        running = np.ones(count, bool)
        step = 0
        while running.any():
            actions = actor.act(states, seed=noise.derive(seed, "act", first, step))
            states, rewards, terminated, truncated, _ = environments.step(actions)
            # The vector environment starts a finished one anew; what it earns then is nobody's.
            returns[running] += rewards[running]
            lengths[running] += 1
            running &= ~(terminated | truncated)
            step += 1
    finally:
        environments.close()
    return returns, lengths


@dataclass(frozen=True)
class Scored:
    """One evaluation during a run."""

    step: int
    return_mean: float
    bc_loss: float
    """Mean since the evaluation before, as the published code ranks it."""


def select_checkpoints(evaluations: Sequence[Scored], top_k: int) -> dict[str, int]:
    """Which step each rule of model selection takes.

    last: the final evaluation. best: the highest return ("online" in the paper; a maximum over evaluations, so it is
    biased upwards: report it as such). offline: rank `top_k` by bc_loss, 0 being the lowest; no environment needed.

    Raises:
        ValueError: no evaluations.
    """
    if not evaluations:
        raise ValueError("no evaluations to select from; train with --eval-every")
    by_loss = sorted(evaluations, key=lambda e: e.bc_loss)
    return {
        "last": evaluations[-1].step,
        "best": max(evaluations, key=lambda e: e.return_mean).step,
        "offline": by_loss[min(top_k, len(by_loss) - 1)].step,
    }


def worth_keeping(evaluations: Sequence[Scored], top_k: int) -> set[int]:
    """Steps whose checkpoints a selection may still ask for: the best, and the top_k + 1 lowest by bc_loss."""
    if not evaluations:
        return set()
    by_loss = sorted(evaluations, key=lambda e: e.bc_loss)
    return {e.step for e in by_loss[: top_k + 1]} | {max(evaluations, key=lambda e: e.return_mean).step}
