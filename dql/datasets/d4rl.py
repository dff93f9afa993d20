"""The reader of D4RL `.hdf5` files: flat observations, actions, rewards, terminals, [timeouts], [next_observations].

Rows follow D4RL's own loader (`qlearning_dataset`): without `next_observations` the next state is row i + 1, so
timed-out rows and the last row, whose next state was not stored, are left out; a next state after a terminal is the
next episode's first and is masked. With `next_observations` every row stays. Without `timeouts` an episode ends at
every max_episode_steps-th row after a terminal, with the limit of the task recognised in the file's name.

The environments below are today's Gymnasium ones. D4RL's data and scores were made in `-v2` (Gym, mujoco-py): the
dynamics and observations are the same in kind, not digit for digit, so a score made here is near to D4RL's scale but
is not a D4RL score. Kitchen files have 60 observations (the goal is part of them) where today's environment has 59:
no evaluation environment is offered for them.
"""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from dql.datasets.info import DatasetError, DatasetInfo, FlatData, check_transitions, is_antmaze, word
from dql.datasets.sources import Source
from dql.datasets.stored import open_file, read_array


@dataclass(frozen=True)
class D4RLTask:
    """What a file name says: D4RL's reference scores and time limit, and the environment to evaluate in."""

    pattern: tuple[str, ...]
    """Words that follow each other in the name."""
    ref_min_score: float
    ref_max_score: float
    max_episode_steps: int
    env_id: str | None


TASKS = (
    D4RLTask((r"halfcheetah",), -280.178953, 12135.0, 1000, "HalfCheetah-v5"),
    D4RLTask((r"hopper",), -20.272305, 3234.3, 1000, "Hopper-v5"),
    D4RLTask((r"walker2d",), 1.629008, 4592.3, 1000, "Walker2d-v5"),
    # -v4 has D4RL's 27 + 2 observations; -v5 adds contact forces
    D4RLTask((r"ant[-_]?maze", r"u-?maze"), 0.0, 1.0, 700, "AntMaze_UMaze-v4"),
    D4RLTask((r"ant[-_]?maze", r"medium|big"), 0.0, 1.0, 1000, "AntMaze_Medium-v4"),
    D4RLTask((r"ant[-_]?maze", r"large|hardest"), 0.0, 1.0, 1000, "AntMaze_Large-v4"),
    D4RLTask((r"kitchen",), 0.0, 4.0, 280, None),
    D4RLTask((r"pen",), 96.262799, 3076.8331017826877, 100, "AdroitHandPen-v1"),
)


def recognise(file_name: str) -> D4RLTask | None:
    """The task of a D4RL file name such as `hopper_medium-v2.hdf5`; None for an unknown one."""
    name = file_name.lower()
    return next((task for task in TASKS if re.search(".*".join(map(word, task.pattern)), name)), None)


def _env_spec(task: D4RLTask) -> str | None:
    """EnvSpec JSON without an entry point: the environment's package registers it when it is made."""
    if task.env_id is None:
        return None
    spec: dict[str, Any] = {
        "id": task.env_id,
        "entry_point": None,
        "max_episode_steps": task.max_episode_steps,
        "kwargs": {},
        "additional_wrappers": [],
    }
    return json.dumps(spec)


def read_d4rl(source: Source) -> FlatData:
    """Reads a D4RL file; actions are taken to be of [-1, 1], as in all D4RL tasks.

    Raises:
        DatasetError: see the module `dql.data`.
    """
    name, task, remedy = source.name, recognise(source.path.name), f"download {source.path.name} again"
    with open_file(source.path, name, remedy) as file:
        keys = set(file.keys())
        missing = {"observations", "actions", "rewards", "terminals"} - keys
        if missing:
            raise DatasetError(
                f"dataset {name}: {source.path} has no {', '.join(sorted(missing))}: it is not a D4RL file "
                "(a Minari dataset is given by its id or its folder)"
            )
        arrays = {key: _array(name, key, read_array(file, key)) for key in _WANTED if key in keys}
    N = len(arrays["rewards"])
    if N == 0:
        raise DatasetError(f"dataset {name} is empty (0 rows): download {source.path.name} again")
    for key, array in arrays.items():
        if len(array) != N:
            raise DatasetError(f"dataset {name}: it has {N} rewards but {len(array)} {key}: download the file again")

    has_next = "next_observations" in arrays
    if has_next and arrays["next_observations"].shape != arrays["observations"].shape:
        raise DatasetError(
            f"dataset {name}: its next_observations have the shape {arrays['next_observations'].shape} and its "
            f"observations {arrays['observations'].shape}: download the file again"
        )
    terminals = arrays["terminals"].astype(bool)
    timeouts = _timeouts(arrays, terminals, task, name)
    keep = np.ones(N, bool)
    if has_next:
        next_states = arrays["next_observations"]
    else:
        keep = ~timeouts
        keep[-1] = False
        next_states = np.roll(arrays["observations"], -1, axis=0)
    if not keep.any():
        raise DatasetError(f"dataset {name} has no row with a next state: it needs `next_observations`")

    antmaze = task is not None and is_antmaze("", task.env_id)
    ends = np.flatnonzero(terminals | timeouts)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(0, int)
    sums = np.concatenate([[0.0], np.cumsum(arrays["rewards"], dtype=np.float64)])
    info = DatasetInfo(
        dataset_id=name,
        env_spec=None if task is None else _env_spec(task),
        ref_min_score=None if task is None else task.ref_min_score,
        ref_max_score=None if task is None else task.ref_max_score,
        num_episodes=len(ends) + int(not len(ends) or ends[-1] != N - 1),
        episode_returns=sums[ends + 1] - sums[starts],
        observation_rule="achieved_goal+observation" if antmaze else "box",
        first_success=antmaze,
        max_action=1.0,
        state_dim=arrays["observations"].shape[1],
        action_dim=arrays["actions"].shape[1],
        episode_lengths=ends + 1 - starts,
        num_truncations=int((timeouts & ~terminals).sum()),
        note="D4RL file: its data were made in -v2 environments, the evaluation environment is today's",
    )
    rows = np.flatnonzero(keep)
    data = FlatData(
        states=arrays["observations"][keep],
        actions=arrays["actions"][keep],
        rewards=arrays["rewards"][keep],
        next_states=next_states[keep],
        masks=1.0 - terminals[keep].astype(np.float32),
        info=info,
    )
    check_transitions(name, lambda row: f"row {rows[row]}", data)
    return data


_WANTED = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def _array(name: str, key: str, stored: np.ndarray) -> np.ndarray:
    """float32 [N, ...] of what was stored, flags and rewards as [N]."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32, copy=False)
    if key in ("rewards", "terminals", "timeouts"):
        if array.size != len(array) if array.ndim else True:
            raise DatasetError(f"dataset {name}: its {key} have the shape {array.shape} where [N] is needed")
        if key != "rewards" and not np.isin(array, (0.0, 1.0)).all():
            raise DatasetError(f"dataset {name}: its {key} hold other values than 0 and 1: repair the file")
        return array.reshape(-1)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DatasetError(f"dataset {name}: its {key} have the shape {array.shape} where [N, size] is needed")
    return array


def _timeouts(arrays: dict[str, np.ndarray], terminals: np.ndarray, task: D4RLTask | None, name: str) -> np.ndarray:
    if "timeouts" in arrays:
        return arrays["timeouts"].astype(bool)
    timeouts = np.zeros(len(terminals), bool)
    if task is not None:
        bounds = np.concatenate([[-1], np.flatnonzero(terminals), [len(terminals) - 1]])
        for before, last in itertools.pairwise(bounds):
            timeouts[before + task.max_episode_steps : last + 1 : task.max_episode_steps] = True
    elif "next_observations" in arrays:  # where the next row is another state, an episode ended
        breaks = (arrays["next_observations"][:-1] != arrays["observations"][1:]).any(axis=1)
        timeouts[:-1] = breaks & ~terminals[:-1]
    else:
        raise DatasetError(
            f"dataset {name} has neither `timeouts` nor `next_observations` and its file name tells no D4RL task, so "
            "the ends of its episodes are unknown: give the file its D4RL name, e.g. hopper_medium-v2.hdf5"
        )
    return timeouts
