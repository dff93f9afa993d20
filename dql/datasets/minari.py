"""The reader of Minari datasets: every episode once, only the arrays that are used -> flat arrays.

An episode stores T + 1 observations, so every step keeps its true next one, also at a time limit. AntMaze episodes are
cut at their first success, with a termination there, as in D4RL: Minari's never terminate and go on rewarding.

A goal environment's `desired_goal` is part of the state where it is not the same in all rows, but never in AntMaze.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dql.datasets.info import (
    FIELDS,
    DatasetError,
    DatasetInfo,
    DatasetNotFoundError,
    FlatData,
    broken_file,
    check_transitions,
    is_antmaze,
)
from dql.datasets.observations import WITH_GOAL, flatten_rows, observation_layout, observation_rule
from dql.datasets.sources import (
    MAIN_FILE,
    Source,
    again,
    env_spec_json,
    read_metadata,
    reference_scores,
    whole_number,
)
from dql.datasets.spaces import action_bound, goal_columns, read_space
from dql.datasets.spool import Spool
from dql.datasets.stored import address, member, open_file, read_array, rows_of
from dql.recorded_env import missing_wrappers, reward_wrappers

CUT_NOTE = "episodes end at their first success (a termination), as in D4RL"
GOAL_NOTE = "desired_goal differs between rows and is no part of the state, as in D4RL's AntMaze"
MOST_EPISODES_NAMED = 20
MOST_MISSING = 10_000  # episodes that metadata may count beyond what the file holds


@dataclass(frozen=True)
class _Reading:
    """How the episodes of one dataset are read; the rule is the widest, with the desired goal."""

    name: str
    observation_space: Any
    action_space: Any
    rule: str
    bound: float
    antmaze: bool
    limit: int | None  # of an episode's steps, where a shorter truncated one was cut by the end of the recording
    goal: slice | None  # its columns, where the goal may be left out


@dataclass
class _Found:
    """What was found in the episodes that are kept; their transitions are in the spool, states of the widest rule."""

    numbers: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    goal: np.ndarray | None = None  # of the first row
    goal_varies: bool = False


@dataclass(frozen=True)
class _Episode:
    observations: np.ndarray  # [T + 1, S] float32
    actions: np.ndarray  # [T, A]
    rewards: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    truncations: np.ndarray  # [T] bool
    cut: bool  # by the end of the recording, not of the environment

    @property
    def complete(self) -> bool:
        return bool(self.terminations[-1] or self.truncations[-1]) and not self.cut


def read_minari(source: Source, spool: Spool) -> FlatData:
    """Reads every episode of a Minari dataset once; one h5py file, only the arrays that are used.

    Args:
        source: the dataset.
        spool: an empty one, whose rows become the arrays: no more than an episode of them is elsewhere.

    Raises:
        DatasetError: see the module `dql.data`.
    """
    name, metadata = source.name, read_metadata(source)
    observation_space, action_space = (
        read_space(metadata, key, source) for key in ("observation_space", "action_space")
    )
    bound = action_bound(action_space, name)
    try:
        rule = observation_rule(observation_space)
    except ValueError as error:
        raise DatasetError(f"dataset {name} cannot be used: {error}") from error
    spec = env_spec_json(metadata)
    antmaze = is_antmaze(_given_name(source, metadata), None if spec is None else json.loads(spec)["id"])

    wide = WITH_GOAL.get(rule, rule)
    limit = _time_limit(metadata) if name.startswith("dql/") else None
    columns = goal_columns(observation_space, wide) if wide != rule else None
    reading = _Reading(name, observation_space, action_space, wide, bound, antmaze, limit, columns)
    found = _read_episodes(source, metadata, reading, spool)
    note = [CUT_NOTE] if antmaze else []
    dropped_goal = None
    if columns is not None:
        goal = found.goal
        assert goal is not None  # of an episode at least
        if found.goal_varies and not antmaze:
            rule = wide
        else:
            if not antmaze and np.isfinite(goal).all():  # else nothing that could be compared with
                layout = observation_layout(observation_space, wide)
                dropped_goal = {"at": columns.start, "values": goal.tolist(), "rule": wide, "layout": layout}
            for key in ("states", "next_states"):
                spool.change(key, lambda rows: np.delete(rows, np.r_[columns], axis=1))
            note += [GOAL_NOTE] if found.goal_varies else []
    if changed := reward_wrappers(metadata.get("env_spec")):  # the one that was recorded in
        note.append(
            f"its rewards were changed by {' and '.join(changed)}; evaluations score the environment's own reward"
        )
    if spec is not None and (missing := missing_wrappers(metadata.get("env_spec"), spec)):
        note.append(
            f"it was recorded through {' and '.join(missing)[:200]}, which its environment for evaluations lacks: "
            "there a policy sees or does something else than in the data"
        )
    if dropped := found.dropped:
        told = ", ".join(map(str, dropped[:MOST_EPISODES_NAMED]))
        more = f" and {len(dropped) - MOST_EPISODES_NAMED} more" if len(dropped) > MOST_EPISODES_NAMED else ""
        note.append(f"left out for what they lack or hold: episodes {told}{more}")
    arrays = {key: spool.array(key) for key in FIELDS}
    lengths, complete = np.array(found.lengths), np.array(found.complete)
    ends = np.cumsum(lengths)
    # A cut episode's return is 0 or 1, whatever the uncut task's reference scores are.
    ref_min, ref_max = (0.0, 1.0) if antmaze else reference_scores(metadata)
    info = DatasetInfo(
        dataset_id=name,
        env_spec=spec,
        ref_min_score=ref_min,
        ref_max_score=ref_max,
        num_episodes=len(lengths),
        episode_returns=np.array(found.returns)[complete],
        observation_rule=rule,
        max_action=bound,
        state_dim=arrays["states"].shape[1],
        action_dim=arrays["actions"].shape[1],
        episode_lengths=lengths[complete],
        num_truncations=sum(found.truncated),
        note="; ".join(note),
        observation_layout=observation_layout(observation_space, rule),
        first_success=antmaze,
        dropped_goal=dropped_goal,
    )
    data = FlatData(**arrays, info=info, mappings=tuple(spool.mappings))
    check_transitions(name, lambda row: f"episode {found.numbers[int(np.searchsorted(ends, row, side='right'))]}", data)
    return data


def _given_name(source: Source, metadata: Mapping[str, Any]) -> str:
    """What the dataset is called, and no folder above it."""
    given = metadata.get("dataset_id")
    return given if isinstance(given, str) else source.path.parent.name


def _time_limit(metadata: Mapping[str, Any]) -> int | None:
    """Of the environment that was recorded in."""
    text = metadata.get("env_spec")
    try:
        limit = json.loads(text).get("max_episode_steps") if isinstance(text, str) else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return limit if isinstance(limit, int) else None


def _read_episodes(source: Source, metadata: Mapping[str, Any], reading: _Reading, spool: Spool) -> _Found:
    name = source.name
    count = whole_number(metadata, "total_episodes", source)
    if count == 0:
        raise DatasetError(f"dataset {name} is empty (0 episodes): {again(source)}")
    found = _Found()
    unreadable = (OSError, RuntimeError) if source.drop_broken else ()  # else they are the file's
    seen: dict[Any, int] = {}
    with _stored(source, metadata) as (stored, held):
        if held is not None and count > held + MOST_MISSING:
            raise DatasetError(
                f"dataset {name}: its metadata says {count:,} episodes, and its file holds {held:,}: {again(source)}"
            )
        for i in range(count):
            try:
                group = stored(i)
                if (place := address(group)) is not None and seen.setdefault(place, i) != i:
                    raise ValueError(f"it is episode {seen[place]} under another name")
                episode = _read_episode(group, reading)
                if source.drop_broken:
                    _check_episode(episode, reading)
            except (KeyError, ValueError, TypeError, *unreadable) as error:
                if not source.drop_broken:
                    raise _broken_episode(source, i, error) from error
                if isinstance(error, RecursionError) or (isinstance(error, OSError) and error.errno is not None):
                    raise  # the disk's or the network's fault, and not the episode's
                found.dropped.append(i)
            else:
                _add(episode, i, reading, found, spool)
    if not found.numbers:
        raise DatasetError(f"dataset {name}: none of its {count:,} episodes can be used: {again(source)}")
    return found


def _add(episode: _Episode, number: int, reading: _Reading, found: _Found, spool: Spool) -> None:
    o = episode.observations
    with np.errstate(over="ignore", invalid="ignore"):
        spool.add(
            states=o[:-1],
            actions=episode.actions.astype(np.float32, copy=False),
            rewards=episode.rewards.astype(np.float32, copy=False),
            next_states=o[1:],
            masks=1.0 - episode.terminations.astype(np.float32),
        )
    found.numbers.append(number)
    found.lengths.append(len(episode.rewards))
    found.returns.append(episode.rewards.sum(dtype=np.float64))
    found.complete.append(episode.complete)
    found.truncated.append(bool(episode.truncations[-1] and not episode.terminations[-1]))
    if reading.goal is not None:
        if found.goal is None:
            found.goal = o[0, reading.goal].copy()
        found.goal_varies = found.goal_varies or bool((o[:, reading.goal] != found.goal).any())


@contextlib.contextmanager
def _stored(source: Source, metadata: Mapping[str, Any]) -> Iterator[tuple[Callable[[int], Any], int | None]]:
    """(a function that gives an episode's group of an HDF5 file, or its dict of arrays in Minari's other formats; how
    many there are, where that is known)."""
    path = source.path / MAIN_FILE
    if metadata.get("data_format", "hdf5") == "hdf5":
        if not path.exists():
            raise DatasetNotFoundError(f"dataset {source.name} is only half there (no {path}): {again(source)}")
        with open_file(path, source.name, again(source)) as file:
            yield lambda i: member(file, f"episode_{i}") if f"episode_{i}" in file else {}, len(file)
        return
    try:
        from minari.dataset.minari_storage import MinariStorage

        storage = MinariStorage.read(source.path)
        yield lambda i: next(iter(storage.get_episodes([i]))), None
    except DatasetError:
        raise
    except Exception as error:  # of pyarrow and of what it reads
        raise broken_file(source.name, source.path, error, again(source)) from error


def _broken_episode(source: Source, i: int, error: Exception) -> DatasetError:
    missing = isinstance(error, KeyError)
    told = str(error.args[0] if missing and error.args else error)[:250]
    remedy = again(source) if missing else "record that episode again"
    return DatasetError(
        f"dataset {source.name}, episode {i}: {told}: {remedy}, or leave such episodes out with drop_broken "
        "(--drop-broken)"
    )


def _read_episode(stored: Any, reading: _Reading) -> _Episode:
    if not hasattr(stored, "keys"):
        raise ValueError("it is an array where a group is needed")
    missing = {"observations", "actions", "rewards", "terminations", "truncations"} - set(stored.keys())
    if missing:
        raise KeyError(f"it has no {', '.join(sorted(missing))}, so it was not written or downloaded to its end")
    rows = rows_of(member(stored, "observations"), "observations")
    observations = flatten_rows(rows, reading.observation_space, reading.rule)
    actions = read_array(stored, "actions")
    rewards, terminations, truncations = (
        _column(read_array(stored, key), key) for key in ("rewards", "terminations", "truncations")
    )
    T = len(rewards)
    if T == 0:
        raise ValueError("it has no steps")
    lengths = {"actions": len(actions), "terminations": len(terminations), "truncations": len(truncations)}
    if actions.shape[1:] != reading.action_space.shape:
        shapes = f"{actions.shape[1:]} where the space says {reading.action_space.shape}"
        raise ValueError(f"its actions have the shape {shapes}")
    for what, length in lengths.items():
        if length != T:
            raise ValueError(f"it has {T} rewards but {length} {what}")
    if len(observations) != T + 1:
        raise ValueError(f"it has {T} rewards but {len(observations)} observations where Minari stores {T + 1}")
    cut = _is_cut(stored, reading, T, bool(terminations[-1]))
    if reading.antmaze:
        hits = np.flatnonzero(_successes(stored, rewards))
        if hits.size:
            T, cut = int(hits[0]) + 1, False
            terminations, truncations = np.arange(T) == T - 1, np.zeros(T, bool)
    return _Episode(
        observations[: T + 1],
        actions.reshape(len(actions), -1)[:T],
        rewards[:T],
        terminations[:T],
        truncations[:T],
        cut,
    )


def _is_cut(stored: Any, reading: _Reading, T: int, terminated: bool) -> bool:
    """Whether the end of the recording cut it: `dql data make` writes that down; before it did, the limit tells."""
    told = getattr(stored, "attrs", {}).get("cut")
    if told is not None:
        return bool(np.asarray(told).any())
    return reading.limit is not None and not terminated and reading.limit > T


def _column(array: np.ndarray, key: str) -> np.ndarray:
    """[T]; of terminations and truncations as bool."""
    if array.ndim == 0 or array.size != len(array):
        raise ValueError(f"its {key} have the shape {array.shape} where [T] is needed")
    array = array.reshape(-1)
    if key == "rewards" or array.dtype == bool:
        return array
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"its {key} hold other values than 0 and 1")
    return array.astype(bool)


def _check_episode(episode: _Episode, reading: _Reading) -> None:
    """Raises DatasetError where `check_transitions` would refuse the dataset for this episode."""
    o = episode.observations
    with np.errstate(over="ignore", invalid="ignore"):
        actions, rewards = episode.actions.astype(np.float32), episode.rewards.astype(np.float32)
    info = DatasetInfo(reading.name, None, None, None, 1, np.zeros(0), reading.rule, reading.bound)
    masks = 1.0 - episode.terminations.astype(np.float32)
    check_transitions(reading.name, str, FlatData(o[:-1], actions, rewards, o[1:].copy(), masks, info))


def _successes(stored: Any, rewards: np.ndarray) -> np.ndarray:
    """Success after each step [T]: infos["success"] where it was recorded, else reward > 0 (the sparse reward)."""
    infos = member(stored, "infos") if "infos" in stored else None
    if infos is None or "success" not in infos:
        if not np.isin(rewards, (0, 1)).all():
            raise ValueError("it has no infos/success, and its rewards are not 0 and 1, which tell AntMaze's success")
        return rewards > 0
    success = read_array(infos, "success").reshape(-1).astype(bool)
    if len(success) not in (len(rewards), len(rewards) + 1):
        raise ValueError(f"it has {len(rewards)} rewards but {len(success)} success flags")
    return success[-len(rewards) :]  # T+1 rows begin with the info of reset
