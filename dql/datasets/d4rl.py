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

from dql.datasets.info import (
    FIELDS,
    DatasetError,
    DatasetInfo,
    FlatData,
    check_transitions,
    is_antmaze,
    row_blocks,
    word,
)
from dql.datasets.sources import Source
from dql.datasets.spool import Spool
from dql.datasets.stored import open_file, read_array, stored_array


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


def read_d4rl(source: Source, spool: Spool) -> FlatData:
    """Reads a D4RL file; actions are taken to be of [-1, 1], as in all D4RL tasks.

    Args:
        source: the file.
        spool: an empty one, whose rows become the arrays: elsewhere are a block of them, rewards and flags.

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
        stored = {key: _checked(name, key, stored_array(file, key)) for key in _MATRICES if key in keys}
        columns = {key: _column(name, key, read_array(file, key)) for key in _COLUMNS if key in keys}
        N = len(columns["rewards"])
        if N == 0:
            raise DatasetError(f"dataset {name} is empty (0 rows): download {source.path.name} again")
        for key, array in (stored | columns).items():
            if len(array) != N:
                raise DatasetError(
                    f"dataset {name}: it has {N} rewards but {len(array)} {key}: download the file again"
                )
        has_next = "next_observations" in stored
        if has_next and stored["next_observations"].shape != stored["observations"].shape:
            raise DatasetError(
                f"dataset {name}: its next_observations have the shape {stored['next_observations'].shape} and its "
                f"observations {stored['observations'].shape}: download the file again"
            )
        rewards, terminals = columns["rewards"], columns["terminals"]
        timeouts = _timeouts(stored, columns.get("timeouts"), terminals, task, name)
        keep = np.ones(N, bool)
        if not has_next:
            keep = ~timeouts
            keep[-1] = False
        if not keep.any():
            raise DatasetError(f"dataset {name} has no row with a next state: it needs `next_observations`")
        state_dim, action_dim = stored["observations"].shape[1], stored["actions"].shape[1]
        for block in row_blocks(N, state_dim):
            kept = keep[block]
            observations = _rows(stored["observations"], block.start, block.stop + 1)
            if has_next:
                next_states = _rows(stored["next_observations"], block.start, block.stop)
            else:
                next_states = observations[1:]  # of the last row there is none, which is not kept
                kept = kept[: len(next_states)]
            n = len(kept)
            spool.add(
                states=observations[:n][kept],
                actions=_rows(stored["actions"], block.start, block.start + n)[kept],
                rewards=rewards[block][:n][kept],
                next_states=next_states[:n][kept],
                masks=1.0 - terminals[block][:n][kept].astype(np.float32),
            )

    antmaze = task is not None and is_antmaze("", task.env_id)
    ends = np.flatnonzero(terminals | timeouts)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(0, int)
    info = DatasetInfo(
        dataset_id=name,
        env_spec=None if task is None else _env_spec(task),
        ref_min_score=None if task is None else task.ref_min_score,
        ref_max_score=None if task is None else task.ref_max_score,
        num_episodes=len(ends) + int(not len(ends) or ends[-1] != N - 1),
        episode_returns=_sums(rewards, starts, ends + 1),
        observation_rule="achieved_goal+observation" if antmaze else "box",
        first_success=antmaze,
        max_action=1.0,
        state_dim=state_dim,
        action_dim=action_dim,
        episode_lengths=ends + 1 - starts,
        num_truncations=int((timeouts & ~terminals).sum()),
        note="D4RL file: its data were made in -v2 environments, the evaluation environment is today's",
    )
    arrays = {key: spool.array(key) for key in FIELDS}
    data = FlatData(**arrays, info=info, mappings=tuple(spool.mappings))
    check_transitions(name, lambda row: f"row {np.flatnonzero(keep)[row]}", data)
    return data


def _sums(rewards: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Of the rewards from each start up to its stop, in float64."""
    sums = np.zeros(len(rewards) + 1)
    np.cumsum(rewards, dtype=np.float64, out=sums[1:])
    return sums[stops] - sums[starts]


_MATRICES = ("observations", "actions", "next_observations")
_COLUMNS = ("rewards", "terminals", "timeouts")


def _checked(name: str, key: str, stored: Any) -> Any:
    if stored.ndim != 2 or stored.shape[1] == 0:
        raise DatasetError(f"dataset {name}: its {key} have the shape {stored.shape} where [N, size] is needed")
    return stored


def _rows(stored: Any, first: int, last: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return stored[first:last].astype(np.float32, copy=False)


def _column(name: str, key: str, stored: np.ndarray) -> np.ndarray:
    """float32 [N] of rewards, bool [N] of flags."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32, copy=False)
    if array.size != len(array) if array.ndim else True:
        raise DatasetError(f"dataset {name}: its {key} have the shape {array.shape} where [N] is needed")
    if key != "rewards" and not np.isin(array, (0.0, 1.0)).all():
        raise DatasetError(f"dataset {name}: its {key} hold other values than 0 and 1: repair the file")
    return array.reshape(-1) if key == "rewards" else array.reshape(-1).astype(bool)


def _timeouts(
    stored: dict[str, Any],
    told: np.ndarray | None,
    terminals: np.ndarray,
    task: D4RLTask | None,
    name: str,
) -> np.ndarray:
    if told is not None:
        return told
    timeouts = np.zeros(len(terminals), bool)
    if task is not None:
        bounds = np.concatenate([[-1], np.flatnonzero(terminals), [len(terminals) - 1]])
        for before, last in itertools.pairwise(bounds):
            timeouts[before + task.max_episode_steps : last + 1 : task.max_episode_steps] = True
    elif "next_observations" in stored:  # where the next row is another state, an episode ended
        for block in row_blocks(len(terminals) - 1, stored["observations"].shape[1]):
            found = _rows(stored["next_observations"], block.start, block.stop)
            expected = _rows(stored["observations"], block.start + 1, block.stop + 1)
            timeouts[block] = (found != expected).any(axis=1) & ~terminals[block]
    else:
        raise DatasetError(
            f"dataset {name} has neither `timeouts` nor `next_observations` and its file name tells no D4RL task, so "
            "the ends of its episodes are unknown: give the file its D4RL name, e.g. hopper_medium-v2.hdf5"
        )
    return timeouts
