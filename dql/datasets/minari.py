"""The reader of Minari datasets: every episode once, only the arrays that are used -> flat arrays.

An episode stores T + 1 observations, so every step keeps its true next one, also at a time limit. AntMaze episodes are
cut at their first success, with a termination there, as in D4RL: Minari's never terminate and go on rewarding.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from dql.datasets.info import (
    DatasetError,
    DatasetInfo,
    DatasetNotFoundError,
    FlatData,
    broken_file,
    check_transitions,
    is_antmaze,
)
from dql.datasets.observations import flatten_rows, observation_rule
from dql.datasets.sources import MAIN_FILE, Source, again, env_spec_json, read_metadata, reference_scores

CUT_NOTE = "episodes end at their first success (a termination), as in D4RL"
Episode = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def action_bound(space: Any, name: str) -> float:
    """max_action of a symmetric Box that is the same in every dimension.

    Raises:
        DatasetError: any other space.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"dataset {name} has a {type(space).__name__} action space: Diffusion-QL needs continuous actions (Box), "
            "choose a dataset of an environment that has them"
        )
    high = float(space.high.flat[0])
    if not np.isfinite(high) or high <= 0 or (space.high != high).any() or (space.low != -high).any():
        raise DatasetError(
            f"dataset {name} has the action bounds {space.low.min():g} .. {space.high.max():g}, which are not one "
            "finite [-m, m] for all dimensions: record it again under gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)"
        )
    return high


def read_minari(source: Source) -> FlatData:
    """Reads every episode of a Minari dataset once; one h5py file, only the arrays that are used.

    Raises:
        DatasetError: see the module `dql.data`.
    """
    from minari.serialization import deserialize_space

    name, metadata = source.name, read_metadata(source)
    try:
        observation_space, action_space = (
            deserialize_space(metadata[key]) for key in ("observation_space", "action_space")
        )
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"dataset {name}: its metadata has no readable spaces ({error}): {again(source)}") from error
    bound = action_bound(action_space, name)
    try:
        rule = observation_rule(observation_space)
    except ValueError as error:
        raise DatasetError(f"dataset {name} cannot be used: {error}") from error
    spec = env_spec_json(metadata)
    antmaze = is_antmaze(name, None if spec is None else json.loads(spec)["id"])

    episodes = _read_episodes(
        source, metadata, lambda stored: _read_episode(stored, observation_space, action_space, rule, antmaze)
    )
    observations, actions, rewards, terminations, truncations = zip(*episodes, strict=True)
    lengths = np.array([len(r) for r in rewards])
    ends = np.cumsum(lengths)
    complete = np.array([t[-1] or u[-1] for t, u in zip(terminations, truncations, strict=True)])
    # A cut episode's return is 0 or 1, whatever the uncut task's reference scores are.
    ref_min, ref_max = (0.0, 1.0) if antmaze else reference_scores(metadata)
    info = DatasetInfo(
        dataset_id=name,
        env_spec=spec,
        ref_min_score=ref_min,
        ref_max_score=ref_max,
        num_episodes=len(episodes),
        episode_returns=np.array([r.sum(dtype=np.float64) for r in rewards])[complete],
        observation_rule=rule,
        max_action=bound,
        state_dim=observations[0].shape[1],
        action_dim=actions[0].shape[1],
        episode_lengths=lengths[complete],
        num_truncations=sum(bool(u[-1] and not t[-1]) for t, u in zip(terminations, truncations, strict=True)),
        note=CUT_NOTE if antmaze else "",
    )
    with np.errstate(over="ignore", invalid="ignore"):
        data = FlatData(
            states=np.concatenate([o[:-1] for o in observations]),
            actions=np.concatenate(actions).astype(np.float32, copy=False),
            rewards=np.concatenate(rewards).astype(np.float32, copy=False),
            next_states=np.concatenate([o[1:] for o in observations]),
            masks=1.0 - np.concatenate(terminations).astype(np.float32),
            info=info,
        )
    check_transitions(name, lambda row: f"episode {int(np.searchsorted(ends, row, side='right'))}", data)
    return data


def _read_episodes(source: Source, metadata: Mapping[str, Any], read: Callable[[Any], Episode]) -> list[Episode]:
    name, path = source.name, source.path / MAIN_FILE
    count = int(metadata.get("total_episodes", 0))
    if count == 0:
        raise DatasetError(f"dataset {name} is empty (0 episodes): {again(source)}")
    with ExitStack() as stack:
        episodes: list[Episode] = []
        try:
            if metadata.get("data_format", "hdf5") == "hdf5":
                if not path.exists():
                    raise DatasetNotFoundError(f"dataset {name} is only half there (no {path}): {again(source)}")
                import h5py

                file = stack.enter_context(h5py.File(path, "r"))
                stored = (file.get(f"episode_{i}", {}) for i in range(count))
            else:
                from minari.dataset.minari_storage import MinariStorage

                stored = iter(MinariStorage.read(source.path).get_episodes(range(count)))
            for episode in stored:
                episodes.append(read(episode))
        except DatasetError:
            raise
        except KeyError as error:
            raise DatasetError(f"dataset {name}, episode {len(episodes)}: {error.args[0]}: {again(source)}") from error
        except ValueError as error:
            raise DatasetError(
                f"dataset {name}, episode {len(episodes)}: {error}: record that episode again"
            ) from error
        except (OSError, RuntimeError, ImportError) as error:
            raise broken_file(name, path, error, again(source)) from error
    return episodes


def _as_rows(stored: Any) -> Any:
    """An HDF5 group as the dict or tuple that the observation space says; arrays stay unread."""
    if not hasattr(stored, "keys"):
        return stored
    if all(key.startswith("_index_") for key in stored):
        return tuple(_as_rows(stored[f"_index_{i}"]) for i in range(len(stored)))
    return {key: _as_rows(stored[key]) for key in stored}


def _read_episode(stored: Mapping[str, Any], space: Any, action_space: Any, rule: str, antmaze: bool) -> Episode:
    """observations [T+1, S] float32, actions [T, A], rewards [T], terminations [T], truncations [T]."""
    missing = {"observations", "actions", "rewards", "terminations", "truncations"} - set(stored.keys())
    if missing:
        raise KeyError(f"it has no {', '.join(sorted(missing))}, so it was not written or downloaded to its end")
    observations = flatten_rows(_as_rows(stored["observations"]), space, rule)
    actions = stored["actions"][()]
    rewards, terminations, truncations = (
        stored[key][()].reshape(-1) for key in ("rewards", "terminations", "truncations")
    )
    T = len(rewards)
    if T == 0:
        raise ValueError("it has no steps")
    lengths = {"actions": len(actions), "terminations": len(terminations), "truncations": len(truncations)}
    if actions.shape[1:] != action_space.shape:
        raise ValueError(f"its actions have the shape {actions.shape[1:]} where the space says {action_space.shape}")
    for what, length in lengths.items():
        if length != T:
            raise ValueError(f"it has {T} rewards but {length} {what}")
    if len(observations) != T + 1:
        raise ValueError(f"it has {T} rewards but {len(observations)} observations where Minari stores {T + 1}")
    if antmaze:
        hits = np.flatnonzero(_successes(stored, rewards))
        if hits.size:
            T = int(hits[0]) + 1
            terminations, truncations = np.arange(T) == T - 1, np.zeros(T, bool)
    return (
        observations[: T + 1],
        actions.reshape(len(actions), -1)[:T],
        rewards[:T],
        terminations[:T],
        truncations[:T],
    )


def _successes(stored: Mapping[str, Any], rewards: np.ndarray) -> np.ndarray:
    """Success after each step [T]: infos["success"] where it was recorded, else reward > 0 (the sparse reward)."""
    infos = stored.get("infos")
    if infos is None or "success" not in infos:
        return rewards > 0
    success = infos["success"][()].reshape(-1).astype(bool)
    if len(success) not in (len(rewards), len(rewards) + 1):
        raise ValueError(f"it has {len(rewards)} rewards but {len(success)} success flags")
    return success[-len(rewards) :]  # T+1 rows begin with the info of reset
