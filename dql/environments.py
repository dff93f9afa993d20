"""Evaluation environments that show observations exactly as the data have them.

Imports gymnasium: import this module where environments are needed, not at the start of a program.
"""

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from dql.datasets.info import DatasetError, DatasetInfo
from dql.datasets.observations import flatten_observation, observation_rule

_MUJOCO_REMEDY = 'pip install "diffusion-ql[mujoco]"'
_ROBOTICS = ("AntMaze", "PointMaze", "FrankaKitchen", "AdroitHand", "Fetch")


class FirstSuccess(gymnasium.Wrapper):
    """AntMaze as D4RL scores it: the episode terminates at the first success, with reward 1; else every reward is 0.

    Success is infos["success"] where the environment reports it, else a positive reward, as in the data.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; nothing after a success is seen."""
        observation, reward, terminated, truncated, info = self.env.step(action)
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

    AntMaze ends at its first success and scores 0 or 1.

    Raises:
        DatasetError: the dataset names no environment, its package is not installed, or the environment's spaces are
            not those of the data.
    """
    if info.env_spec is None:
        raise DatasetError(
            f"dataset {info.dataset_id} names no environment, so it cannot be evaluated by rollouts: record it with "
            "`env=...`, or step an environment of your own with `agent.act`"
        )
    with quiet_mujoco():
        env = _make(info)
    space = env.observation_space
    try:
        rule = observation_rule(space)
    except ValueError as error:
        raise DatasetError(f"environment {info.env_id} of dataset {info.dataset_id} cannot be used: {error}") from error
    if rule != info.observation_rule:
        raise DatasetError(
            f"environment {info.env_id} has observations of the rule {rule!r} but dataset {info.dataset_id} has "
            f"{info.observation_rule!r}: install the version of the environment that recorded the data"
        )
    flatten = functools.partial(flatten_observation, space=space, rule=rule)
    size = flatten(space.sample()).shape[0]
    _check_sizes(info, size, env.action_space)
    flat_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
    env = gymnasium.wrappers.TransformObservation(env, flatten, flat_space)
    return FirstSuccess(env) if info.is_antmaze else env


def _make(info: DatasetInfo) -> gymnasium.Env:
    spec = json.loads(info.env_spec or "{}")
    env_id = spec["id"]
    entry_point = spec.get("entry_point")
    named_only = entry_point is None  # its package registers it
    if "gymnasium_robotics" in str(entry_point) or (named_only and env_id.startswith(_ROBOTICS)):
        try:
            import gymnasium_robotics
        except ImportError as error:
            raise DatasetError(
                f"environment {env_id} of dataset {info.dataset_id} needs the package gymnasium-robotics: "
                "pip install gymnasium-robotics==1.4.2 (kitchen also needs mujoco from 3.1.6 to 3.3.7)"
            ) from error
        gymnasium.register_envs(gymnasium_robotics)
    try:
        if named_only:
            return gymnasium.make(env_id, max_episode_steps=spec.get("max_episode_steps"), **spec.get("kwargs", {}))
        known = {field.name for field in dataclasses.fields(EnvSpec) if field.init}
        spec = {"additional_wrappers": [], **{key: value for key, value in spec.items() if key in known}}
        return gymnasium.make(EnvSpec.from_json(json.dumps(spec)))
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        reason = str(error).split(".  ")[0].split(". (")[0].rstrip(".")
        if "mujoco" in str(error).lower() or "mujoco" in str(entry_point):
            raise DatasetError(
                f"environment {env_id} of dataset {info.dataset_id} needs mujoco ({reason}): {_MUJOCO_REMEDY}"
            ) from error
        raise DatasetError(
            f"environment {env_id} of dataset {info.dataset_id} cannot be imported ({reason}): install its package"
        ) from error
    except gymnasium.error.Error as error:
        reason = str(error).strip().rstrip(".")
        raise DatasetError(
            f"environment {env_id} of dataset {info.dataset_id} is not known to Gymnasium {gymnasium.__version__} "
            f"({reason}): install the package that registers it"
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
