"""Evaluation environments that show observations exactly as the data have them.

Imports gymnasium: import this module where environments are needed, not at the start of a program.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np

from dql.datasets.info import DatasetError, DatasetInfo
from dql.datasets.observations import WITH_GOAL, flatten_observation, observation_layout, observation_rule
from dql.datasets.spaces import goal_columns
from dql.recorded_env import SpecRefusedError, make_recorded, make_typed
from dql.shown import said

_MUJOCO_REMEDY = 'pip install "diffusion-ql[mujoco]"'
_OTHER_SPACES = "evaluate in the environment that recorded the data, in the version that recorded it"


class FlatObservation(gymnasium.wrappers.TransformObservation):
    """Observations as rows of the data; NaN for what a finished episode shows last, where that is no observation.

    Args of the constructor:
        differs: whether an episode's first observation has another goal than the data, which leave theirs out.
        told: what to warn of then.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        func: Callable[[Any], Any],
        space: gymnasium.Space,
        differs: Callable[[Any], bool] | None = None,
        told: str = "",
    ) -> None:
        super().__init__(env, func, space)
        self._differs, self._told = differs, told

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        if self._differs is not None and self._differs(observation):
            warnings.warn(self._told, stacklevel=2)
        return self.func(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        try:
            row = self.func(observation)
        except Exception:  # whatever an environment shows
            if not (terminated or truncated):
                raise
            row = np.full(self.observation_space.shape or (), np.nan, np.float32)
        return row, reward, terminated, truncated, info


class FirstSuccess(gymnasium.Wrapper):
    """AntMaze as D4RL scores it: the episode terminates at the first success, with reward 1; else every reward is 0.

    Success is infos["success"] where the environment reports it, else a positive reward, as in the data.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; nothing after a success is seen."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "success" not in info and float(reward) not in (0.0, 1.0):
            raise ValueError(f"the environment reports no success, and the reward {float(reward):g} is not 0 or 1")
        success = bool(info["success"]) if "success" in info else float(reward) > 0
        return observation, float(success), bool(terminated) or success, bool(truncated), info


@contextlib.contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Keeps mujoco from writing MUJOCO_LOG.TXT into the working directory about HalfCheetah's model file."""
    try:
        import mujoco
    except ImportError:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(
        lambda text: None if "settotalmass" in str(text) else warnings.warn(str(text), stacklevel=2)
    )
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def make_env(info: DatasetInfo) -> gymnasium.Env:
    """Builds the dataset's evaluation environment, with flat float32 observations [S] by the dataset's rule.

    AntMaze ends at its first success and scores 0 or 1. Nothing that a dataset or a run folder records runs as code:
    `dql.recorded_env` has the rule, `info.with_env(id)` names an environment beyond it.

    Raises:
        DatasetError: the dataset names no environment, its record is not followed, its package is not installed, or the
            environment's spaces are not those of the data.
    """
    if info.env_spec is None:
        raise DatasetError(
            f"dataset {info.dataset_id} names no environment (Minari records none whose wrappers hold NumPy arrays or "
            "functions), so it cannot be evaluated by rollouts: name one with --env, or record it with `env=...`"
        )
    with quiet_mujoco():
        env = _make(info)
    space = env.observation_space
    try:
        rule = observation_rule(space)
    except ValueError as error:
        raise DatasetError(f"environment {info.env_id} of dataset {info.dataset_id} cannot be used: {error}") from error
    if info.observation_rule not in (rule, WITH_GOAL.get(rule)):
        raise DatasetError(
            f"environment {info.env_id} has observations of the rule {rule!r} but dataset {info.dataset_id} has "
            f"{info.observation_rule!r}: {_OTHER_SPACES}"
        )
    rule = info.observation_rule
    flatten = functools.partial(flatten_observation, space=space, rule=rule)
    size = flatten(space.sample()).shape[0]
    _check_sizes(info, size, env.action_space)
    if (layout := observation_layout(space, rule)) != (info.observation_layout or layout):
        raise DatasetError(
            f"environment {info.env_id} has the observations {layout[:200]} but dataset {info.dataset_id} has "
            f"{str(info.observation_layout)[:200]}: {_OTHER_SPACES}"
        )
    flat_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
    env = FlatObservation(env, flatten, flat_space, *_other_goal(info, space))
    return FirstSuccess(env) if info.is_antmaze else env


def _other_goal(info: DatasetInfo, space: gymnasium.Space) -> tuple[Callable[[Any], bool], str] | tuple[()]:
    """What notices an episode whose goal is not the one that all episodes of the data had, and what it says."""
    goal = info.dropped_goal
    if goal is None or goal.get("rule") != WITH_GOAL.get(info.observation_rule):
        return ()
    flatten = functools.partial(flatten_observation, space=space, rule=goal["rule"])
    columns, values = goal_columns(space, goal["rule"]), np.asarray(goal["values"], np.float32)

    def differs(observation: Any) -> bool:
        try:
            shown = flatten(observation)[columns]
        except Exception:  # whatever it shows as a goal: a policy does not see it, so the evaluation goes on
            return True
        return shown.shape != values.shape or not np.allclose(shown, values, rtol=1e-5, atol=1e-6)

    return differs, (
        f"environment {info.env_id} does not have the goal {goal['values']!s:.80} that all episodes of dataset "
        f"{info.dataset_id} have: a policy does not see the goal, so these returns are those of another task"
    )


def _make(info: DatasetInfo) -> gymnasium.Env:
    what = f"environment {info.env_id} of dataset {info.dataset_id}"
    try:
        return make_typed(str(info.env_id)) if info.env_is_typed else make_recorded(str(info.env_spec))
    except SpecRefusedError as error:
        raise DatasetError(
            f"{what} is not made: {error}; if you trust it, name it with --env (`info.with_env` in Python)"
        ) from error
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        reason = str(error).split(".  ")[0].split(". (")[0].rstrip(".")
        if getattr(error, "name", None) == "gymnasium_robotics" or "gymnasium_robotics" in str(error):
            raise DatasetError(
                f"{what} needs the package gymnasium-robotics: "
                "pip install gymnasium-robotics==1.4.2 (kitchen also needs mujoco from 3.1.6 to 3.3.7)"
            ) from error
        if "mujoco" in str(error).lower():
            raise DatasetError(f"{what} needs mujoco ({reason}): {_MUJOCO_REMEDY}") from error
        raise DatasetError(f"{what} cannot be imported ({reason}): install the package that registers it") from error
    except gymnasium.error.Error as error:
        reason = str(error).strip().rstrip(".")
        raise DatasetError(
            f"{what} is not known to Gymnasium {gymnasium.__version__} ({reason}): "
            "install the package that registers it"
        ) from error
    except Exception as error:  # whatever an environment raises when it is made
        raise DatasetError(
            f"{what} cannot be made ({said(error)}): name another with --env, or train without evaluations, "
            "--eval-every 0"
        ) from error


def _check_sizes(info: DatasetInfo, state_dim: int, action_space: Any) -> None:
    if info.state_dim is not None and info.state_dim != state_dim:
        raise DatasetError(
            f"environment {info.env_id} has {state_dim} observations a step but dataset {info.dataset_id} has "
            f"{info.state_dim}: install the version of the environment that recorded the data"
        )
    if not isinstance(action_space, gymnasium.spaces.Box):
        raise DatasetError(f"environment {info.env_id} has no continuous actions: evaluate in another environment")
    low, high = -info.max_action, info.max_action
    fits = info.action_dim is None or action_space.shape == (info.action_dim,)
    if not fits or (action_space.low != low).any() or (action_space.high != high).any():
        raise DatasetError(
            f"environment {info.env_id} has the actions {action_space} but dataset {info.dataset_id} has "
            f"[{low:g}, {high:g}] in {info.action_dim} dimensions: evaluate in the environment that recorded the data"
        )
