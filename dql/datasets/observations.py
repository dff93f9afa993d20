"""One written rule from an observation to a flat float32 row, for the data and for the environments alike.

    rule                        used for                                          row
    box                         a Box observation                                 the numbers, row-major
    achieved_goal+observation   goal environments (AntMaze, PointMaze, ...)       [achieved_goal, observation]
    observation                 goal environments with a nested goal (kitchen)    observation
    flatten                     every other space                                 the order of gymnasium.spaces.flatten

The first goal rule is D4RL's AntMaze: the position is part of the state, the desired goal is not, because there it is
the same in every evaluation episode. In kitchen the goal is constant and the achieved goal repeats the observation.
"""

from typing import Any

import numpy as np

GOAL_KEYS = {"achieved_goal", "desired_goal", "observation"}


def observation_rule(space: Any) -> str:
    """The rule for a Gymnasium observation space.

    Raises:
        ValueError: the space holds something with no flat real-valued form (text, graphs, sequences).
    """
    from gymnasium import spaces

    _check_flat(space)
    if isinstance(space, spaces.Box):
        return "box"
    if isinstance(space, spaces.Dict) and set(space.spaces) == GOAL_KEYS:
        simple = isinstance(space["achieved_goal"], spaces.Box)
        return "achieved_goal+observation" if simple else "observation"
    return "flatten"


def _check_flat(space: Any) -> None:
    from gymnasium import spaces

    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for child in space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces:
            _check_flat(child)
    elif isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) >= 2:
        raise ValueError(f"its observations are images {space.shape}: only vector observations can be used")
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiBinary)):
        raise ValueError(f"its observations hold a {type(space).__name__} space, which has no fixed row of numbers")


def flatten_rows(rows: Any, space: Any, rule: str) -> np.ndarray:
    """Flattens a stack of observations.

    Args:
        rows: what `space` says, each leaf with a leading axis [T].
        space: the Gymnasium observation space of one row.
        rule: of `observation_rule`.

    Returns:
        float32 [T, S].

    Raises:
        ValueError: leaves of different lengths or not of the space's shape.
        KeyError: a key of the space is missing.
    """
    if rule in ("box", "flatten"):
        leaves = list(_leaves(rows, space))
    else:
        leaves = [leaf for key in rule.split("+") for leaf in _leaves(rows[key], space[key])]
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"its observation parts have different lengths {sorted(lengths)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes inf, which the caller finds
        flat = [leaf.reshape(len(leaf), -1).astype(np.float32, copy=False) for leaf in leaves]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)  # [T, S]


def _leaves(rows: Any, space: Any) -> Any:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from _leaves(rows[key], child)
    elif isinstance(space, spaces.Tuple):
        for child_rows, child in zip(rows, space.spaces, strict=True):
            yield from _leaves(child_rows, child)
    else:
        array = rows[()] if hasattr(rows, "shape") else np.asarray(rows)  # [()] is h5py's fast way to read all
        if array.shape[1:] != space.shape:
            raise ValueError(f"its observations have the shape {array.shape[1:]} where the space says {space.shape}")
        if isinstance(space, spaces.Discrete):  # one-hot, as gymnasium.spaces.flatten does
            array = (array[:, None] == space.start + np.arange(space.n)).astype(np.float32)
        yield array


def flatten_observation(observation: Any, space: Any, rule: str) -> np.ndarray:
    """One observation of an environment as the row [S] that the data has."""
    return flatten_rows(_add_axis(observation), space, rule)[0]


def _add_axis(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: _add_axis(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_add_axis(value) for value in observation)
    return np.asarray(observation)[None]
