"""One written rule from an observation to a flat float32 row, for the data and for the environments alike.

    rule                                      used for                              row
    box                                       a Box observation                     the numbers, row-major
    achieved_goal+observation                 goal environments (AntMaze, ...)      [achieved_goal, observation]
    achieved_goal+desired_goal+observation    the same where the goal varies        all three
    observation                               a nested goal (kitchen)               observation
    desired_goal+observation                  the same where the goal varies        [desired_goal, observation]
    flatten                                   every other space                     all members

Members of a Dict follow each other in the order of their sorted names, at every level, those of a Tuple in their own:
Minari's reader sorts names, an environment may have them in any order. Discrete and MultiDiscrete members are one-hot,
as in gymnasium.spaces.flatten.

The first goal rule is D4RL's AntMaze: the position is part of the state, the desired goal is not, although it moves a
little there. In other datasets the desired goal is left out where it is the same in every row. In kitchen the goal is
constant and the achieved goal repeats the observation.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

GOAL_KEYS = {"achieved_goal", "desired_goal", "observation"}
WITH_GOAL = {
    "achieved_goal+observation": "achieved_goal+desired_goal+observation",
    "observation": "desired_goal+observation",
}
MOST_ONE_HOT = 1 << 28  # numbers of an episode
RULES = ("box", "flatten", *WITH_GOAL, *WITH_GOAL.values())


def observation_rule(space: Any) -> str:
    """The rule for a Gymnasium observation space, of a goal space that without the desired goal.

    Raises:
        ValueError: the space holds something with no flat real-valued form (text, graphs, sequences).
    """
    from gymnasium import spaces

    _check_flat(space)
    if isinstance(space, spaces.Box):
        return "box"
    if isinstance(space, spaces.Dict) and set(space.spaces) == GOAL_KEYS:
        nested = isinstance(space["achieved_goal"], (spaces.Dict, spaces.Tuple))
        return "observation" if nested else "achieved_goal+observation"
    return "flatten"


def observation_layout(space: Any, rule: str) -> str:
    """What of the space enters a row, with names, shapes and nesting: "{angle: [1], speed: [2, 3]}".

    Equal texts mean equal rows: two spaces of one total size may differ in everything else.
    """
    if rule in ("box", "flatten"):
        return _layout(space)
    return "{" + ", ".join(f"{key}: {_layout(space[key])}" for key in rule.split("+")) + "}"


def _layout(space: Any) -> str:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return "{" + ", ".join(f"{key}: {_layout(space[key])}" for key in sorted(space.spaces)) + "}"
    if isinstance(space, spaces.Tuple):
        return "(" + ", ".join(_layout(child) for child in space.spaces) + ")"
    if isinstance(space, spaces.Discrete):
        return f"one of {space.start} to {space.start + space.n - 1}"
    if isinstance(space, spaces.MultiDiscrete):
        return f"each one of {space.nvec.tolist()} from {space.start.tolist()}"
    return str([int(n) for n in space.shape])


def _check_flat(space: Any) -> None:
    from gymnasium import spaces

    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for child in space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces:
            _check_flat(child)
    elif isinstance(space, spaces.Box) and space.dtype == np.uint8 and _is_image(space.shape):
        raise ValueError(f"its observations are images {space.shape}: only vector observations can be used")
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(f"its observations hold a {type(space).__name__} space, which has no fixed row of numbers")


def _is_image(shape: tuple[int, ...]) -> bool:
    """A small board of bytes is none."""
    return len(shape) >= 3 or (len(shape) == 2 and min(shape) >= 32)


def flatten_rows(rows: Any, space: Any, rule: str) -> np.ndarray:
    """Flattens a stack of observations.

    Args:
        rows: what `space` says, each leaf with a leading axis [T].
        space: the Gymnasium observation space of one row.
        rule: of RULES.

    Returns:
        float32 [T, S].

    Raises:
        ValueError: leaves of different lengths, not of the space's shape, or not of real numbers.
        KeyError: a key of the space is missing.
    """
    if rule in ("box", "flatten"):
        leaves = list(_leaves(rows, space))
    else:
        leaves = [leaf for key in rule.split("+") for leaf in _leaves(_member(rows, key), space[key])]
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"its observation parts have different lengths {sorted(lengths)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes inf, which the caller finds
        flat = [leaf.reshape(len(leaf), -1).astype(np.float32, copy=False) for leaf in leaves]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)  # [T, S]


def _member(rows: Any, key: str) -> Any:
    try:
        return rows[key]
    except (KeyError, IndexError, TypeError, ValueError):
        raise KeyError(f"its observations have no {key!r}, which the observation space names") from None


def _leaves(rows: Any, space: Any) -> Iterator[np.ndarray]:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key in sorted(space.spaces):
            yield from _leaves(_member(rows, key), space[key])
    elif isinstance(space, spaces.Tuple):
        if hasattr(rows, "as_tuple"):
            rows = rows.as_tuple()
        if not isinstance(rows, (tuple, list)) or len(rows) != len(space.spaces):
            raise ValueError(f"its observations are no tuple of {len(space.spaces)}, as the space says")
        for child_rows, child in zip(rows, space.spaces, strict=True):
            yield from _leaves(child_rows, child)
    elif hasattr(rows, "keys") or hasattr(rows, "as_tuple") or isinstance(rows, (tuple, list)):
        raise ValueError("its observations have members where the space has numbers")
    else:
        array = rows[()] if hasattr(rows, "shape") else np.asarray(rows)  # [()] is h5py's fast way to read all
        if array.dtype.kind not in "fiub":
            raise ValueError(f"its observations hold {array.dtype} where real numbers are needed")
        if array.shape[1:] != space.shape:
            raise ValueError(f"its observations have the shape {array.shape[1:]} where the space says {space.shape}")
        if isinstance(space, spaces.Discrete):
            array = _one_hot(array[:, None], np.array([space.n]), np.array([space.start]))
        elif isinstance(space, spaces.MultiDiscrete):
            array = _one_hot(array.reshape(len(array), -1), space.nvec.reshape(-1), space.start.reshape(-1))
        yield array


def _one_hot(values: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of integers [T, M] with `sizes` [M] values each, from `starts` [M] on: float32 [T, sum of sizes]."""
    if len(values) * int(sizes.sum()) > MOST_ONE_HOT:
        raise ValueError(
            f"its observations have {int(sizes.sum()):,} values to choose from, in {len(values):,} rows more than fit "
            "as numbers of their own"
        )
    inside = (values >= starts) & (values < starts + sizes) & (values == np.round(values))
    if not inside.all():
        row, column = np.argwhere(~inside)[0]
        low, high = int(starts[column]), int(starts[column] + sizes[column] - 1)
        raise ValueError(f"its observation {values[row, column]} is no integer from {low} to {high}, as the space says")
    columns = [values[:, [i]] == starts[i] + np.arange(n) for i, n in enumerate(sizes)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def flatten_observation(observation: Any, space: Any, rule: str) -> np.ndarray:
    """One observation of an environment as the row [S] that the data has."""
    return flatten_rows(_add_axis(observation), space, rule)[0]


def _add_axis(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: _add_axis(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_add_axis(value) for value in observation)
    return np.asarray(observation)[None]
