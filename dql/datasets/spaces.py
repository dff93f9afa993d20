"""Spaces as a dataset's metadata name them: the bound of the actions, sizes, where the goal stands in a row."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from dql.datasets.info import DatasetError
from dql.datasets.sources import Source, again

MOST_NUMBERS = 1 << 20  # in one observation or action


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
    if space.high.size == 0:
        raise DatasetError(f"dataset {name} has actions of no dimension {space.shape}: there is nothing to learn")
    high = float(space.high.flat[0])
    if not np.isfinite(high) or high <= 0 or (space.high != high).any() or (space.low != -high).any():
        raise DatasetError(
            f"dataset {name} has the action bounds {space.low.min():g} .. {space.high.max():g}, which are not one "
            "finite [-m, m] for all dimensions: record it again under gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)"
        )
    return high


def read_space(metadata: Mapping[str, Any], key: str, source: Source) -> Any:
    """A Gymnasium space of the metadata, whose sizes are looked at before anything is allocated for them.

    Raises:
        DatasetError: it is none.
    """
    from minari.serialization import deserialize_space

    try:
        text = metadata[key]
        written = json.loads(text) if isinstance(text, str) else text
        _check_space(written)
        return deserialize_space(written)
    except (Exception, RecursionError) as error:  # assertions and what else Gymnasium and Minari raise of bad fields
        reason = f"{type(error).__name__}: {str(error)[:150]}"
        raise DatasetError(
            f"dataset {source.name}: its metadata has no readable {key} ({reason}): {again(source)}"
        ) from error


def _check_space(written: Any, depth: int = 0) -> None:
    if not isinstance(written, dict) or depth > 32:
        raise ValueError("it is no JSON object, or nested too deeply")
    below = written.get("subspaces", ())
    for child in below.values() if isinstance(below, dict) else below:
        _check_space(child, depth + 1)
    shape = written.get("shape", [])
    sizes = [*(shape if isinstance(shape, list) else [shape]), 1]
    n = written.get("n", 1)
    sizes += n if isinstance(n, list) else [n]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise ValueError("its sizes are no whole numbers")
    sizes.append(_total(written.get("nvec", 1)))
    product = 1
    for size in sizes:
        product *= max(size, 1)
    if product > MOST_NUMBERS:
        raise ValueError(f"it has {product:,} numbers, more than {MOST_NUMBERS:,}")


def _total(values: Any, depth: int = 0) -> int:
    """Sum of integers in lists of lists."""
    if isinstance(values, list) and depth < 32:
        return sum(_total(value, depth + 1) for value in values)
    if isinstance(values, bool) or not isinstance(values, int) or values < 0:
        raise ValueError("its sizes are no whole numbers")
    return values


def goal_columns(space: Any, rule: str) -> slice:
    """Where the desired goal stands in a row of a rule that has it."""
    sizes = {key: _width(space[key]) for key in rule.split("+")}
    first = sum(size for key, size in sizes.items() if key < "desired_goal")  # achieved_goal, which stands before it
    return slice(first, first + sizes["desired_goal"])


def _width(space: Any) -> int:
    from gymnasium import spaces

    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        below = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return sum(_width(child) for child in below)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape))
