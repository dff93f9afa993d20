"""Rollouts in vectorised Gymnasium environments, normalised scores, and model selection."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dql import noise

if TYPE_CHECKING:
    import gymnasium

    from dql.data import DatasetInfo

WAVE = 100  # environments of an actor stepped together
MOST = 200  # ... and of several


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


def seed_interval(values: np.ndarray) -> tuple[float, float]:
    """95% t interval of the mean over seeds, whose results are taken as normal: [n] -> (low, high).

    Of three to ten numbers the bootstrap's is too narrow (of three it covers the mean in about 3 cases of 4). Of one
    number there is none: both ends are that number.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values[0]), float(values[0])
    half = _t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean - half, mean + half


def _t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t: of few degrees of freedom as tabulated, else by Cornish and Fisher's series
    in 1 / freedom, which is right to 0.001 from 5 on."""
    if freedom <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z, n = 1.959964, freedom
    series = (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    series += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + series


class EvaluationStopped(Exception):
    """`evaluate` was asked to stop; the episodes so far say nothing."""


def time_limit(env: "gymnasium.Env") -> int | None:
    """Steps after which Gymnasium truncates an episode of this environment; None if nothing does."""
    from gymnasium.wrappers import TimeLimit

    layer: Any = env
    while layer is not None:
        if isinstance(layer, TimeLimit):
            return int(layer._max_episode_steps)
        layer = layer.__dict__.get("env")
    spec = getattr(env.unwrapped, "spec", None)
    limit = None if spec is None else spec.max_episode_steps
    return limit if limit is not None and limit > 0 else None


def make_limited(info: "DatasetInfo", max_episode_steps: int | None) -> "gymnasium.Env":
    """The environment that `info` names (`dql.environments.make_env`), known to end its episodes.

    Raises:
        DatasetError: it cannot be made here, or has no time limit and `max_episode_steps` is None.
    """
    from dql.datasets.info import DatasetError
    from dql.environments import make_env

    env = make_env(info)
    if max_episode_steps is None and time_limit(env) is None:
        env.close()
        raise DatasetError(
            f"environment {info.env_id} has no time limit, so an episode might never end: cut its episodes with "
            "--eval-max-steps N (in Python: evaluate(max_episode_steps=N), RunConfig(eval_max_steps=N))"
        )
    return env


def evaluate(
    actor: Actor,
    info: "DatasetInfo",
    *,
    episodes: int = 10,
    seed: int = 0,
    make: Callable[[], Any] | None = None,
    max_episode_steps: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Rolls the actor out for whole episodes.

    Episode i has its own environment, reset with a seed of its own, and its own rows of noise, so every episode
    counts once however long the others take, and it does not matter how many there are.

    Args:
        actor: its `act` is called once a step, with the states of all environments; zeros stand for those whose
            episodes have ended.
        info: of the dataset: which environment, how its observations are flattened, the reference scores.
        episodes: how many.
        seed: of environments and actions.
        make: builds one environment, which has to end its episodes by itself or by `max_episode_steps`; None builds
            the one that `info` names (`dql.environments.make_env`).
        max_episode_steps: an episode is cut after so many steps; None leaves that to the environment.
        stop: asked before every step of every environment whether to give up.

    Raises:
        ValueError: no episodes, no steps, or an environment whose observations are not finite or whose rewards are no
            finite numbers.
        DatasetError: the environment cannot be made here, and the sentence says what to install; or it has no time
            limit, and `max_episode_steps` is None.
        EvaluationStopped: `stop` said so.
        RuntimeError: the environment or the actor wanted to end the process (sys.exit).
    """
    rollout = _rollout(info, episodes, seed, make, max_episode_steps, stop)
    try:
        states, act_seed = _staying(next, rollout)
        while True:
            states, act_seed = _staying(rollout.send, _acted(actor, states, act_seed))
    except StopIteration as ended:
        return ended.value
    finally:
        _staying(rollout.close)


def evaluate_all(
    actors: Sequence[Actor],
    infos: Sequence["DatasetInfo"],
    *,
    episodes: int = 10,
    seeds: Sequence[int],
    max_episode_steps: int | None = None,
    stop: Callable[[], bool] | None = None,
    workers: int = 1,
) -> list[Evaluation | Exception]:
    """`evaluate` of several actors side by side: all their environments are stepped in turn by this thread, and the
    actors act at the same time.

    Each result is what `evaluate` gives for that actor alone, and so is each failure: it costs the others nothing.

    Args:
        actors: M.
        infos: of each, as in `evaluate`; so are the arguments that follow.
        seeds: of each.
        workers: threads in which actors act.

    Returns:
        for each actor its evaluation, or what was raised in it.

    Raises:
        EvaluationStopped: `stop` said so.
    """
    found: dict[int, Evaluation | Exception] = {}
    together = max(1, MOST // min(episodes, WAVE)) if episodes > 0 else 1
    for first in range(0, len(actors), together):
        rollouts = {
            i: _rollout(infos[i], episodes, seeds[i], None, max_episode_steps, stop)
            for i in range(first, min(first + together, len(actors)))
        }
        with contextlib.ExitStack() as closing:
            for rollout in rollouts.values():
                closing.callback(_closed, rollout)
            pool = closing.enter_context(ThreadPoolExecutor(workers)) if workers > 1 and len(rollouts) > 1 else None
            steps: dict[int, Callable[[], Any]] = {i: functools.partial(next, r) for i, r in rollouts.items()}
            while steps:
                acts: dict[int, Callable[[], Any]] = {}
                for i, step in steps.items():
                    try:
                        states, act_seed = _staying(step)
                    except StopIteration as ended:
                        found[i] = ended.value
                    except EvaluationStopped:
                        raise
                    except Exception as error:
                        found[i] = _closed(rollouts[i]) or error
                    else:
                        acts[i] = functools.partial(_acted, actors[i], states, act_seed)
                        if pool is not None:
                            acts[i] = pool.submit(acts[i]).result
                steps = {i: _sender(rollouts[i], act) for i, act in acts.items()}
    return [found[i] for i in range(len(actors))]


def _closed(rollout: "Rollout") -> Exception | None:
    """Closes a rollout's environments; gives what one of them raised in that, which `evaluate` would raise."""
    try:
        _staying(rollout.close)
    except Exception as error:
        return error
    return None


def _sender(rollout: "Rollout", act: Callable[[], np.ndarray]) -> Callable[[], Any]:
    return lambda: rollout.send(act())


def _acted(actor: Actor, states: np.ndarray, seed: int) -> np.ndarray:
    try:
        return actor.act(states, seed=seed)
    except (SystemExit, GeneratorExit, StopIteration) as error:  # the last would end a loop over rollouts
        raise _leaving(error) from error


def _leaving(error: BaseException) -> RuntimeError:
    return RuntimeError(f"the environment or the actor raised {type(error).__name__}")


def _staying(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls what an environment may end the process in, with code 0 perhaps."""
    try:
        return call(*arguments, **options)
    except (SystemExit, GeneratorExit) as error:
        raise _leaving(error) from error


Rollout = Generator[tuple[np.ndarray, int], np.ndarray, Evaluation]
"""Asks for actions by (states [E, S], seed), is sent them [E, A], and returns the evaluation."""


def _rollout(
    info: "DatasetInfo",
    episodes: int,
    seed: int,
    make: Callable[[], Any] | None,
    max_episode_steps: int | None,
    stop: Callable[[], bool] | None,
) -> Rollout:
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
    if make is None:

        def make() -> Any:
            return make_limited(info, max_episode_steps)

    returns, lengths = [], []
    for first in range(0, episodes, WAVE):
        count = min(WAVE, episodes - first)
        r, n = yield from _wave(make, count, first, seed, max_episode_steps or sys.maxsize, stop or (lambda: False))
        returns.append(r)
        lengths.append(n)
    all_returns = np.concatenate(returns)
    return Evaluation(all_returns, np.concatenate(lengths), info.normalized_score(all_returns))


def _wave(
    make: Callable[[], "gymnasium.Env"],
    count: int,
    first: int,
    seed: int,
    max_episode_steps: int,
    stop: Callable[[], bool],
) -> Generator[tuple[np.ndarray, int], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Episodes first .. first + count, side by side; an environment is left alone once its episode has ended."""

    def go_on() -> None:
        if stop():
            raise EvaluationStopped

    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    with contextlib.ExitStack() as closing:
        environments: list[gymnasium.Env] = []
        for _ in range(count):
            go_on()
            environments.append(make())
            closing.callback(environments[-1].close)
        space = environments[0].observation_space
        states = np.zeros((count, *(space.shape or ())), space.dtype)
        for i, environment in enumerate(environments):
            go_on()
            observation, _ = environment.reset(seed=noise.derive(seed, "episode", first + i) % 2**31)
            _show(states[i], observation, first + i, 0)
        running = list(range(count))
        step = 0
        while running:
            go_on()
            actions = yield states.copy(), noise.derive(seed, "act", first, step)
            step += 1
            for i in tuple(running):
                go_on()
                observation, reward, terminated, truncated, _ = environments[i].step(actions[i])
                returns[i] += _number(reward, first + i, step)
                lengths[i] += 1
                if terminated or truncated or step >= max_episode_steps:
                    running.remove(i)
                    states[i] = 0  # nobody acts on it: what a finished episode shows last may be anything
                else:
                    _show(states[i], observation, first + i, step)
    return returns, lengths


def _show(state: np.ndarray, observation: Any, episode: int, step: int) -> None:
    """Writes the observation into its row of the states."""
    if (shape := np.shape(observation)) != state.shape:
        raise ValueError(
            f"the environment's observation must be {list(state.shape)}, got {list(shape)} (episode {episode}, "
            f"step {step})"
        )
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused
        state[...] = observation
    if not np.isfinite(state).all():
        raise ValueError(f"the environment's observation holds NaN or infinity (episode {episode}, step {step})")


def _number(reward: Any, episode: int, step: int) -> float:
    array = np.asarray(reward)
    if array.ndim or array.dtype.kind not in "fiub" or not np.isfinite(array):
        raise ValueError(
            f"the environment's reward must be one finite number, got {reward!r:.80} (episode {episode}, step {step})"
        )
    return float(array)


@dataclass(frozen=True)
class Scored:
    """One evaluation during a run."""

    step: int
    return_mean: float
    """NaN where the evaluation failed."""
    bc_loss: float
    """Mean since the evaluation before, as the published code ranks it."""


def select_checkpoints(evaluations: Sequence[Scored], top_k: int) -> dict[str, int]:
    """Which step each rule of model selection takes.

    last: the final evaluation. best: the highest return ("online" in the paper; a maximum over evaluations, so it is
    biased upwards: report it as such); there is none if every evaluation failed. offline: rank `top_k` by bc_loss, 0
    being the lowest; no environment needed.

    Raises:
        ValueError: no evaluations.
    """
    if not evaluations:
        raise ValueError("no evaluations to select from; train with --eval-every")
    by_loss = sorted(evaluations, key=lambda e: e.bc_loss)
    chosen = {"last": evaluations[-1].step, "offline": by_loss[min(top_k, len(by_loss) - 1)].step}
    for step in _best(evaluations):
        chosen["best"] = step
    return {name: chosen[name] for name in ("last", "best", "offline") if name in chosen}


def worth_keeping(evaluations: Sequence[Scored], top_k: int) -> set[int]:
    """Steps whose checkpoints a selection may still ask for: the best, and the top_k + 1 lowest by bc_loss."""
    by_loss = sorted(evaluations, key=lambda e: e.bc_loss)
    return {e.step for e in by_loss[: top_k + 1]} | _best(evaluations)


def _best(evaluations: Sequence[Scored]) -> set[int]:
    """The step of the highest return, the first of equals; none if every evaluation failed."""
    succeeded = [e for e in evaluations if not math.isnan(e.return_mean)]
    return {max(succeeded, key=lambda e: e.return_mean).step} if succeeded else set()
