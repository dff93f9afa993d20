"""What every reader hands over, a dataset's arrays and what it says about itself, and the errors it is refused with."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dql.shown import shown

if TYPE_CHECKING:
    from dql.datasets.mapped import Mapping

ACTION_TOLERANCE = 1e-5  # relative; what lies outside by less is rounding, and is clipped
BLOCK = 1 << 22  # numbers that are looked at in one go, where an array may be larger than the memory
FIELDS = ("states", "actions", "rewards", "next_states", "masks")  # of FlatData, TransitionDataset and Batch


class DatasetError(ValueError):
    """A dataset cannot be used as it is: one sentence with the dataset, the episode or file, and the remedy."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """There is no such dataset on this machine, or only a part of it."""


@dataclass(frozen=True, eq=False)
class DatasetInfo:
    """Everything about a dataset that is not a transition.

    Equality compares the JSON, so that two infos with the same returns are equal.
    """

    dataset_id: str
    """Minari id, ids joined by `+`, or the path that was loaded."""
    env_spec: str | None
    """Gymnasium `EnvSpec` JSON of the evaluation environment (`dql.environments.make_env` builds it), or None."""
    ref_min_score: float | None
    """Mean return of a random policy: normalised score 0."""
    ref_max_score: float | None
    """Mean return of the reference expert: normalised score 100."""
    num_episodes: int
    """Episodes stored, complete or not."""
    episode_returns: np.ndarray = field(repr=False)
    """Undiscounted raw return of each COMPLETE episode (ended by a termination or a truncation), float64 [E]."""
    observation_rule: str
    """How an observation becomes a flat row: see `dql.datasets.observations`."""
    max_action: float
    """The action space is [-max_action, max_action] in every dimension."""
    state_dim: int | None = None
    action_dim: int | None = None
    episode_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    """Steps of each complete episode, int64 [E], in the order of `episode_returns`."""
    num_truncations: int | None = None
    """Episodes cut short by a time limit and not terminated, where that is known."""
    note: str = ""
    """What a reader of the numbers has to know, e.g. that episodes were cut at their first success."""
    observation_layout: str | None = None
    """Names, shapes and nesting of what a row is made of (`dql.datasets.observations`), where that is known."""
    first_success: bool | None = None
    """Whether episodes end at their first success, as AntMaze's; None: `is_antmaze` goes by the names."""
    dropped_goal: dict[str, Any] | None = field(default=None, repr=False)
    """A desired_goal that is the same in all rows and no part of them: at which column it would stand, its values, and
    rule and layout of rows that have it; for datasets that are joined."""
    env_is_typed: bool = field(default=False, repr=False)
    """Whether `with_env` named the environment, by a user's hand; never read from JSON."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "episode_returns", np.asarray(self.episode_returns, np.float64).reshape(-1))
        object.__setattr__(self, "episode_lengths", np.asarray(self.episode_lengths, np.int64).reshape(-1))

    def with_env(self, env_id: str, *, typed: bool = True) -> "DatasetInfo":
        """The same with another environment to evaluate in.

        Args:
            env_id: of Gymnasium.
            typed: whether the user named it, and not a file: only then is the module of "module:Id" imported.

        Raises:
            ValueError: it is no id.
        """
        if not isinstance(env_id, str) or not env_id:
            raise ValueError(f"an environment's id is text as 'Hopper-v5', got {shown(env_id)}; name one (--env ID)")
        return dataclasses.replace(self, env_spec=json.dumps({"id": env_id}), env_is_typed=typed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatasetInfo) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def env_id(self) -> str | None:
        """Id of the evaluation environment, e.g. `Hopper-v5`."""
        try:
            return None if self.env_spec is None else str(json.loads(self.env_spec)["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return "without an id"

    @property
    def is_antmaze(self) -> bool:
        """Whether this is an AntMaze task, whose episodes end at the first success."""
        return is_antmaze(self.dataset_id, self.env_id) if self.first_success is None else self.first_success

    def normalized_score(self, returns: np.ndarray | float) -> np.ndarray | None:
        """100 (R - random) / (expert - random), as D4RL defines it; None without reference scores."""
        if self.ref_min_score is None or self.ref_max_score is None:
            return None
        return 100.0 * (np.asarray(returns) - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)

    def to_json(self) -> str:
        """One JSON object; floats keep every digit."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "env_is_typed"}
        return json.dumps(values, default=lambda array: array.tolist())

    @classmethod
    def from_json(cls, text: str) -> "DatasetInfo":
        """The inverse of `to_json`; keys that a later version added are left out.

        Raises:
            ValueError: it is not what `to_json` writes.
        """
        try:
            values = json.loads(text)
        except RecursionError:
            values = None
        if not isinstance(values, dict):
            raise ValueError("a dataset's info must be a JSON object")
        known = {f.name for f in dataclasses.fields(cls)} - {"env_is_typed"}
        values = {key: value for key, value in values.items() if key in known}
        for name, (kinds, may_be_none) in _KINDS.items():
            value = values.get(name)
            if (value is None and (name in values and not may_be_none)) or not isinstance(value, (*kinds, type(None))):
                raise ValueError(f"a dataset's info has the {name} {str(value)[:60]!r}")
            if (isinstance(value, bool) and bool not in kinds) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"a dataset's info has the {name} {value}")
        _check_goal(values.get("dropped_goal"))
        try:
            return cls(**values)
        except (TypeError, OverflowError, ValueError) as error:
            raise ValueError(f"a dataset's info is not whole: {error}") from error


_KINDS: dict[str, tuple[tuple[type, ...], bool]] = {
    **dict.fromkeys(("dataset_id", "observation_rule", "note"), ((str,), False)),
    **dict.fromkeys(("env_spec", "observation_layout"), ((str,), True)),
    **dict.fromkeys(("ref_min_score", "ref_max_score"), ((int, float), True)),
    "num_episodes": ((int,), False),
    "max_action": ((int, float), False),
    **dict.fromkeys(("state_dim", "action_dim", "num_truncations"), ((int,), True)),
    **dict.fromkeys(("episode_returns", "episode_lengths"), ((list,), False)),
    "first_success": ((bool,), True),
    "dropped_goal": ((dict,), True),
}


_LARGEST = float(np.finfo(np.float32).max)


def _check_goal(goal: Any) -> None:
    """Raises ValueError unless it is what a reader says of a goal that it left out, or nothing."""
    if goal is None:
        return
    numbers = goal.get("values")
    fine = isinstance(numbers, list) and all(type(x) in (int, float) and abs(x) <= _LARGEST for x in numbers)
    if not fine or type(goal.get("at")) is not int or not all(type(goal.get(key)) is str for key in ("rule", "layout")):
        raise ValueError(f"a dataset's info has the dropped_goal {str(goal)[:60]}")


def word(pattern: str) -> str:
    """A regular expression that finds `pattern` as words of a name: "grasshopper" has no "hopper"."""
    return rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])"


def is_antmaze(dataset_id: str, env_id: str | None) -> bool:
    """AntMaze by its dataset id, D4RL file name (`Ant_maze_...`) or environment id."""
    return any(re.search(word("ant[-_]?maze"), name.lower()) for name in (dataset_id, env_id or ""))


def row_blocks(count: int, width: int) -> Iterator[slice]:
    """All of `count` rows of `width` numbers, a part at a time."""
    step = max(1, BLOCK // max(width, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@dataclass
class FlatData:
    """Transitions as float32 arrays [N, ...], as they are cached."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_states: np.ndarray
    masks: np.ndarray
    info: DatasetInfo
    mappings: "tuple[Mapping, ...]" = ()
    """Of the files that the arrays lie in, where it is not the memory."""


def check_transitions(name: str, label: Callable[[int], str], data: FlatData) -> None:
    """Refuses what no learner can use, and clips actions that are outside by rounding only (in place).

    What a next state holds that is not finite becomes 0 where its mask is 0: nothing looks at it.

    Raises:
        DatasetError: NaN or infinity, or an action outside the action space.
    """
    width = data.states.shape[1]
    for what in ("states", "actions", "rewards", "next_states"):
        for rows in row_blocks(len(data.masks), width):
            array = getattr(data, what)[rows]
            finite = np.isfinite(array)
            if what == "next_states" and not finite.all():
                array[~finite & (data.masks[rows] == 0)[:, None]] = 0.0
                finite = np.isfinite(array)
            if not finite.all():
                row = rows.start + int(np.argwhere(~finite)[0, 0])
                raise DatasetError(
                    f"dataset {name}, {label(row)}: {what} hold NaN or infinity (in float32): remove or repair that "
                    "episode"
                )
    bound = data.info.max_action
    row, largest = 0, np.float32(0)
    for rows in row_blocks(len(data.masks), width):
        size = np.abs(data.actions[rows])
        if (most := size.max(initial=0.0)) > largest:
            row, largest = rows.start + int(size.max(axis=1).argmax()), most
    if largest > bound * (1 + ACTION_TOLERANCE):
        raise DatasetError(
            f"dataset {name}, {label(row)}: an action of size {largest:.6g} lies outside the action space "
            f"[-{bound:g}, {bound:g}]: rescale or clip the actions to it"
        )
    if largest > bound:
        for rows in row_blocks(len(data.masks), width):
            np.clip(data.actions[rows], -bound, bound, out=data.actions[rows])


def broken_file(name: str, path: Path, error: Exception, remedy: str) -> DatasetError:
    """The sentence for an HDF5 file that ends too early or is none."""
    return DatasetError(
        f"dataset {name}: {path} cannot be read and seems to be half-downloaded or damaged ({error}): {remedy}"
    )
