"""Datasets: Minari and D4RL files -> TransitionDataset (flat float32 tensors on one device) -> Batch.

    load_dataset("mujoco/hopper/medium-v0")                              a local Minari dataset
    load_dataset("mujoco/hopper/medium-v0+mujoco/hopper/expert-v0")      both, one after the other
    load_dataset("mujoco/hopper/medium-expert-v0")                       the same, where only the halves exist
    load_dataset("path/to/dataset")                                      a Minari folder (holds data/main_data.hdf5)
    load_dataset("hopper_medium-v2.hdf5")                                a D4RL file (see `dql.datasets.d4rl`)

Every transition keeps its true next observation, and `masks = 1 - terminations`: an episode that was cut by a time
limit still bootstraps. Observations are flattened by one written rule (`dql.datasets.observations`); AntMaze episodes
of Minari end at their first success. The flat arrays are cached in $DQL_CACHE, or ~/.cache/dql.

Whatever cannot be used (NaN, mismatched lengths, actions outside their bounds, a discrete action space, a missing or
half-downloaded file, ...) is refused by a `DatasetError`: one sentence with the dataset, the episode and the remedy.
"""

import contextlib
import copy
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from dql import noise
from dql.checkpoint import checked_device
from dql.datasets.info import (
    ACTION_TOLERANCE,
    FIELDS,
    DatasetError,
    DatasetInfo,
    DatasetNotFoundError,
    FlatData,
    row_blocks,
)
from dql.datasets.mapped import RowsAhead, in_order, read_rows_at_random
from dql.datasets.sources import DatasetSummary, list_datasets, resolve
from dql.datasets.spool import Spool
from dql.memory import available_memory
from dql.shown import shown
from dql.tensors import plain

__all__ = [
    "REWARD_TUNES",
    "Batch",
    "DatasetError",
    "DatasetInfo",
    "DatasetNotFoundError",
    "DatasetSummary",
    "TransitionDataset",
    "describe",
    "list_datasets",
    "load_dataset",
]

REWARD_TUNES = ("none", "normalize", "iql_antmaze", "iql_locomotion", "cql_antmaze", "antmaze")
SHARE = 0.5  # of the memory that is available, which a dataset may fill before it is left on disk
BLOCK_STEPS = 256  # steps whose rows are drawn at once; part of the stream: another value draws other rows


@dataclass(frozen=True)
class Batch:
    """Transitions as the learner takes them, float32 tensors on one device."""

    states: torch.Tensor  # [B, S]
    actions: torch.Tensor  # [B, A]
    rewards: torch.Tensor  # [B]
    next_states: torch.Tensor  # [B, S]
    masks: torch.Tensor  # [B]; 1 - termination, a truncation keeps 1

    def __len__(self) -> int:
        return len(self.rewards)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`."""
        return Batch(*(getattr(self, name).to(device) for name in FIELDS))

    def __repr__(self) -> str:
        return f"Batch({_shapes(self)}, device={self.rewards.device})"


def _shapes(tensors: Any) -> str:
    return ", ".join(f"{name} {list(getattr(tensors, name).shape)}" for name in FIELDS)


def _all_finite(values: torch.Tensor) -> bool:
    return bool(values.abs().amax().isfinite())  # one pass; amax hands NaN on


def _first_row(bad: torch.Tensor) -> list[int]:
    """The index of the first true element of a vector, in a list, or none."""
    return bad.nonzero()[:1, 0].tolist()


def _blocks(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the first row, rows) of all rows, a part at a time."""
    return ((rows.start, values[rows]) for rows in row_blocks(len(values), math.prod(values.shape[1:])))


class TransitionDataset:
    """All transitions of a dataset on one device, drawn from by a stateless rule.

    Attributes:
        states, actions, rewards, next_states, masks: float32 [N, S], [N, A], [N], [N, S], [N].
        info: where they come from.
        reward_tune: how the rewards were changed; `info.episode_returns` are raw always.
    """

    def __init__(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_states: torch.Tensor,
        masks: torch.Tensor,
        info: DatasetInfo,
        *,
        reward_tune: str = "none",
    ) -> None:
        """Takes tensors that fit together, and looks at every value, as the readers of files do.

        Actions that lie outside of [-info.max_action, info.max_action] by rounding only are clipped, in a copy; what
        next_states hold that is not finite becomes 0, in a copy, where the mask is 0: nothing looks at it.

        Raises:
            TypeError: something else than tensors.
            ValueError: a dtype other than float32, no rows, or shapes or devices that do not fit.
            DatasetError: NaN or infinity, actions outside of the action space, masks other than 0 and 1.
        """
        tensors: list[torch.Tensor] = []
        for name, value in zip(FIELDS, (states, actions, rewards, next_states, masks), strict=True):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a float32 tensor, got {type(value).__name__}; use torch.as_tensor")
            value = plain(name, value, whole=True)  # with memory of its own
            tensors.append(value.detach() if value.requires_grad or type(value) is not torch.Tensor else value)
        if not isinstance(info, DatasetInfo):
            raise TypeError(f"info must be a DatasetInfo, got {shown(info)}")
        states, actions, rewards, next_states, masks = tensors
        self.states, self.actions, self.rewards, self.next_states, self.masks = tensors
        self.info, self.reward_tune = info, reward_tune
        if states.ndim != 2 or actions.ndim != 2 or len(states) == 0:
            raise ValueError(f"states and actions must be [N, size] with N > 0, got {_shapes(self)}")
        N, S = states.shape
        expected = {"states": (N, S), "actions": (N, actions.shape[1]), "next_states": (N, S)}
        for name in FIELDS:
            tensor = getattr(self, name)
            if tuple(tensor.shape) != expected.get(name, (N,)):
                raise ValueError(f"{name} must be {list(expected.get(name, (N,)))}, got {_shapes(self)}")
            if tensor.dtype != torch.float32 or tensor.device != states.device:
                raise ValueError(f"{name} must be float32 on {states.device}, got {tensor.dtype} on {tensor.device}")
        if 0 in (S, actions.shape[1]):
            raise ValueError(f"states and actions must have a dimension at least, got {_shapes(self)}")
        self._ahead = RowsAhead(())  # of the files that are the tensors' memory
        self._check_values()
        self._block: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def _check_values(self) -> None:
        name, bound = self.info.dataset_id, self.info.max_action
        is_real = isinstance(bound, numbers.Real)
        if not is_real or not 0 < bound < float("inf"):
            raise DatasetError(f"dataset {name} has max_action {shown(bound)}, which must be a positive number")
        named, held = (self.info.state_dim, self.info.action_dim), (self.state_dim, self.action_dim)
        if any(n not in (None, h) for n, h in zip(named, held, strict=True)):
            raise DatasetError(f"dataset {name} has states and actions of {held}, its info says {named}")
        for first, masks in _blocks(self.masks):
            if bad := _first_row((masks != 0) & (masks != 1)):
                row, value = first + bad[0], masks[bad[0]].item()
                raise DatasetError(f"dataset {name}, row {row}: masks are 1 - termination, 0 or 1, got {value:g}")
        if not all(_all_finite(rows) for _, rows in _blocks(self.next_states)):
            hidden = ~self.next_states.isfinite() & (self.masks == 0)[:, None]
            self.next_states = self.next_states.masked_fill(hidden, 0.0)
        for what in ("states", "actions", "rewards", "next_states"):
            for first, values in _blocks(getattr(self, what)):
                if not _all_finite(values):
                    (row,) = _first_row(~values.reshape(len(values), -1).isfinite().all(dim=1))
                    raise DatasetError(
                        f"dataset {name}, row {first + row}: {what} hold NaN or infinity: remove or repair that "
                        "transition"
                    )
        largest, row = 0.0, 0
        for first, actions in _blocks(self.actions):
            sizes = actions.abs().amax(dim=1)
            if (most := float(sizes.max())) > largest:
                largest, row = most, first + int(sizes.argmax())
        if largest > bound * (1 + ACTION_TOLERANCE):
            raise DatasetError(
                f"dataset {name}, row {row}: an action of size {largest:.6g} lies outside the action space "
                f"[-{bound:g}, {bound:g}]: rescale or clip the actions to it, or give info.max_action"
            )
        if largest > torch.tensor(float(bound), dtype=torch.float32).item():  # else the clipped ones are the same
            self.actions = self.actions.clamp(-bound, bound)

    @property
    def state_dim(self) -> int:
        """S."""
        return self.states.shape[1]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.actions.shape[1]

    @property
    def max_action(self) -> float:
        """The action space is [-max_action, max_action] in every dimension."""
        return self.info.max_action

    @property
    def size(self) -> int:
        """N, the number of transitions."""
        return len(self.rewards)

    def __len__(self) -> int:
        return self.size

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.states.device

    @property
    def on_disk(self) -> bool:
        """Whether the tensors are a file's, on the CPU, fetched row by row when somebody looks at them.

        They are tensors like others: all reads see the file, what is written in place stays in memory.
        """
        return bool(self._ahead.mappings)

    @property
    def nbytes(self) -> int:
        """Bytes of the five tensors."""
        return sum(getattr(self, name).nbytes for name in FIELDS)

    def in_order(self) -> contextlib.AbstractContextManager[None]:
        """For passes over all rows: while the block lasts, the file is read ahead, if there is one.

        Raises:
            DatasetError: the file was changed by somebody else.
        """
        return in_order(self._ahead.mappings)

    def __repr__(self) -> str:
        tune = "" if self.reward_tune == "none" else f", reward_tune={self.reward_tune!r}"
        disk = ", on disk" if self.on_disk else ""
        return (
            f"TransitionDataset({self.info.dataset_id!r}: {_shapes(self)}, {self.info.num_episodes} episodes, "
            f"max_action={self.max_action:g}{tune}, device={self.device}{disk})"
        )

    def to(self, device: torch.device | str) -> "TransitionDataset":
        """The dataset on `device`; tensors that are there already are shared, not copied."""
        device = checked_device(device)
        moved = copy.copy(self)  # its values were looked at
        with self.in_order():
            for name in FIELDS:
                setattr(moved, name, getattr(self, name).to(device))
        if moved.device.type != "cpu":
            moved._ahead = RowsAhead(())
        moved._block = None
        return moved

    def tune_rewards(self, name: str) -> "TransitionDataset":
        """A dataset with rewards changed as the paper's tasks ask; the other tensors are shared.

        none             r
        normalize        (r - mean) / std, the unbiased standard deviation of all rewards
        iql_antmaze      r - 1
        iql_locomotion   1000 r / (best - worst episode return)
        cql_antmaze      4 (r - 0.5)
        antmaze          2 (r - 0.25)

        In `iql_locomotion` an episode ends by a termination or a truncation, as in IQL. The published Diffusion-QL
        code ends it at terminations only: for an environment that never terminates (HalfCheetah) it finds no episode,
        elsewhere it adds up the returns of all episodes up to the next termination.

        Raises:
            DatasetError: an unknown name, rewards tuned already, or equal rewards or returns that leave nothing to
                divide by.
        """
        dataset_id, r = self.info.dataset_id, self.rewards
        if name not in REWARD_TUNES:
            raise DatasetError(f"reward_tune must be one of {', '.join(REWARD_TUNES)}, got {shown(name)}")
        if name == "none":
            return self
        if self.reward_tune != "none":
            raise DatasetError(
                f"dataset {dataset_id} has its rewards tuned by {self.reward_tune!r} already: tune the raw dataset"
            )
        if name == "normalize":
            exact = r.double()
            std = exact.std().item() if len(r) > 1 else 0.0
            if std == 0:
                raise DatasetError(f"dataset {dataset_id} has equal rewards, which cannot be normalised: use 'none'")
            rewards = exact.sub_(exact.mean()).div_(std).float()
        elif name == "iql_locomotion":
            returns = self.info.episode_returns
            spread = float(returns.max() - returns.min()) if len(returns) else 0.0
            if spread == 0:
                raise DatasetError(
                    f"dataset {dataset_id} has {len(returns)} complete episodes and no two different returns, which "
                    "iql_locomotion divides by: use 'none' or 'normalize'"
                )
            rewards = r * (1000.0 / spread)
        else:
            scale, shift = {"iql_antmaze": (1.0, 1.0), "cql_antmaze": (4.0, 0.5), "antmaze": (2.0, 0.25)}[name]
            rewards = scale * (r - shift)
        tuned = copy.copy(self)  # the other values were looked at
        tuned.rewards, tuned.reward_tune = rewards, name
        if not _all_finite(rewards):
            raise DatasetError(f"dataset {dataset_id} has rewards too large for {name} in float32: use 'none'")
        return tuned

    def indices(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """Rows of the batch of `step`, int64 [B] on the data's device: uniform with replacement.

        A function of (seed, step, batch_size, N) alone, so that a resumed run goes on with the rows it would have
        drawn. The rows of BLOCK_STEPS steps are drawn on the host at once and kept.

        Raises:
            ValueError: a negative step, no batch, or a bad seed.
        """
        return self.rows(batch_size, seed, step)[0]

    def rows(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """The `indices` of `step` and of those after it that are drawn with it: int64 [n, B], n from 1 to BLOCK_STEPS.

        Raises:
            ValueError: as `indices`.
        """
        child, first = self.draw(batch_size, seed, step)
        key = (seed, batch_size, step // BLOCK_STEPS)
        cached = self._block
        if cached is None or cached[0] != key:
            rows = noise.integers(child, self.size, BLOCK_STEPS * batch_size).view(BLOCK_STEPS, batch_size)
            cached = self._block = (key, rows.to(self.device, non_blocking=True))
        return cached[1][first // batch_size :]

    def draw(self, batch_size: int, seed: int, step: int) -> tuple[int, int]:
        """(seed, first): the rows of a step's batch are noise.integers(seed, N, ...)[first : first + batch_size].

        Raises:
            ValueError: as `indices`.
        """
        if batch_size < 1 or step < 0:
            raise ValueError(f"batch_size must be at least 1 and step at least 0, got {batch_size} and {step}")
        block, row = divmod(step, BLOCK_STEPS)
        return noise.derive(seed, "data", block), row * batch_size

    def sample(self, batch_size: int, seed: int, step: int) -> Batch:
        """The batch of `step`: see `indices`.

        Raises:
            DatasetError: the data are on disk, and their file was changed by somebody else.
        """
        return self.batch(self.indices(batch_size, seed, step))

    def batch(self, rows: torch.Tensor) -> Batch:
        """The transitions of these rows, int64 [B] on the data's device.

        Raises:
            DatasetError: as `sample`.
        """
        self.fetch(rows)
        return Batch(*(getattr(self, name).index_select(0, rows) for name in FIELDS))

    def fetch(self, rows: torch.Tensor) -> None:
        """To be called before these rows [B] of the tensors are looked at: of data on disk, it has them read.

        Raises:
            DatasetError: the file was changed by somebody else.
        """
        if self.on_disk:
            tensors = (getattr(self, name) for name in FIELDS)
            self._ahead.fetch(((t.data_ptr(), t[0].nbytes) for t in tensors), rows.numpy())


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    reward_tune: str = "none",
    device: torch.device | str = "cpu",
    cache: bool = True,
    download: bool = False,
    drop_broken: bool = False,
    in_memory: bool | Literal["auto"] = "auto",
) -> TransitionDataset:
    """Loads a dataset; the forms of its name stand at the top of this module.

    Args:
        name_or_path: Minari id, several ids joined by `+`, a Minari folder or a D4RL `.hdf5` file.
        reward_tune: of REWARD_TUNES, see `TransitionDataset.tune_rewards`.
        device: where the tensors go.
        cache: read and write the flat arrays in $DQL_CACHE (default ~/.cache/dql).
        download: fetch a Minari id that is not on this machine.
        drop_broken: leave out episodes of a Minari dataset that lack something or hold NaN, infinity or actions outside
            of the action space, instead of refusing it; `info.note` names them.
        in_memory: whether the arrays are read into memory. If not, they stay in the cache's file and are mapped, with
            the same batches; so they do in the memory of the CPU alone. "auto" reads what takes less than SHARE of the
            memory that is available.

    Raises:
        DatasetError: it cannot be used; DatasetNotFoundError (also a FileNotFoundError): it is not there.
        ValueError: a device that is not there; data on disk without the cache, or on another device.
    """
    from dql.datasets.cache import cached

    if reward_tune not in REWARD_TUNES:
        raise DatasetError(f"reward_tune must be one of {', '.join(REWARD_TUNES)}, got {shown(reward_tune)}")
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"a dataset is named by a string or a path, got {shown(name_or_path)}")
    device, name = checked_device(device), str(os.fspath(name_or_path))
    if not isinstance(in_memory, bool) and not (isinstance(in_memory, str) and in_memory == "auto"):
        raise ValueError(f'in_memory must be True, False or "auto", got {shown(in_memory)}')
    if in_memory is False and not cache:
        raise ValueError("in_memory=False maps the cache's file, and cache=False has none; leave one of them out")
    if in_memory is False and device.type != "cpu":
        raise ValueError(f"in_memory=False leaves the data on disk, and not on {device}; leave one of them out")
    most_bytes = math.inf if in_memory is True else 0 if in_memory is False else bytes_in_memory()
    sources = [replace(source, drop_broken=drop_broken) for source in resolve(name, download)]
    parts = [cached(source, _read, enabled=cache, most_bytes=most_bytes / len(sources)) for source in sources]
    flat = parts[0] if len(parts) == 1 else _concatenate(parts, name, most_bytes if cache else math.inf)
    tensors = {field: torch.from_numpy(getattr(flat, field)).to(device) for field in FIELDS}
    data = TransitionDataset(**tensors, info=flat.info, reward_tune="none")
    if device.type == "cpu":
        data._ahead = RowsAhead(flat.mappings)
        read_rows_at_random(flat.mappings)
    return data.tune_rewards(reward_tune)


def bytes_in_memory() -> float:
    """What a dataset may take of the memory: SHARE of what is available; infinity where the system does not say."""
    available = available_memory()
    return math.inf if available is None else max(1.0, SHARE * available)  # 0 would be an order


def _read(source: Any, spool: Spool) -> FlatData:
    if source.kind == "d4rl":
        from dql.datasets.d4rl import read_d4rl

        return read_d4rl(source, spool)
    from dql.datasets.minari import read_minari

    return read_minari(source, spool)


def _concatenate(parts: Sequence[FlatData], name: str, most_bytes: float) -> FlatData:
    """The parts one after the other, under the name that was asked for, beyond `most_bytes` on disk.

    Raises:
        DatasetError: parts of different sizes, action bounds, environments or reference scores.
    """
    from dql.datasets.cache import cache_dir
    from dql.recorded_env import same_evaluation

    infos, goals = _with_goals([part.info for part in parts])
    first = infos[0]
    must_agree = (
        "state_dim",
        "action_dim",
        "max_action",
        "observation_rule",
        "observation_layout",
        "first_success",
        "env_id",
        "ref_min_score",
        "ref_max_score",
    )
    for info in infos[1:]:
        for what in must_agree:
            values = getattr(first, what), getattr(info, what)
            if values[0] != values[1]:
                raise DatasetError(
                    f"datasets {first.dataset_id} and {info.dataset_id} cannot be joined: their {what} are "
                    f"{values[0]} and {values[1]}; join datasets of one environment and one pair of reference scores"
                )
    for info in infos[1:]:
        if not same_evaluation(first.env_spec, info.env_spec):
            raise DatasetError(
                f"datasets {first.dataset_id} and {info.dataset_id} cannot be joined: they were made in "
                f"{first.env_id} with other arguments, wrappers or limits of steps; join datasets of one environment"
            )
    truncations = [info.num_truncations for info in infos if info.num_truncations is not None]
    info = replace(
        first,
        dataset_id=name,
        num_episodes=sum(info.num_episodes for info in infos),
        episode_returns=np.concatenate([info.episode_returns for info in infos]),
        episode_lengths=np.concatenate([info.episode_lengths for info in infos]),
        num_truncations=sum(truncations) if len(truncations) == len(infos) else None,
        note="; ".join(dict.fromkeys(info.note for info in infos if info.note)),
    )
    spool = Spool(name, None if most_bytes == math.inf else cache_dir(), most_bytes)
    for part, goal in zip(parts, goals, strict=True):
        for rows in row_blocks(len(part.masks), first.state_dim or 1):
            block = {field: getattr(part, field)[rows] for field in FIELDS}
            if goal is not None:
                block |= {field: _with_goal(block[field], goal) for field in ("states", "next_states")}
            spool.add(**block)
    arrays = {field: spool.array(field) for field in FIELDS}
    return FlatData(**arrays, info=info, mappings=tuple(spool.mappings))


def _with_goals(infos: list[DatasetInfo]) -> tuple[list[DatasetInfo], list[dict[str, Any] | None]]:
    """(the infos of the parts, the goal that is put into the rows of each): those without their goal get it where the
    parts have others, for their rows would not tell the tasks apart."""
    dropped = [info.dropped_goal for info in infos]
    wide = {goal["rule"] for goal in dropped if goal is not None}
    others = any(info.observation_rule in wide for info in infos)
    if not others and all(goal == dropped[0] for goal in dropped):
        return infos, [None] * len(infos)
    return [
        info
        if goal is None
        else replace(
            info,
            observation_rule=goal["rule"],
            observation_layout=goal["layout"],
            state_dim=(info.state_dim or 0) + len(goal["values"]),
            dropped_goal=None,
        )
        for info, goal in zip(infos, dropped, strict=True)
    ], dropped


def _with_goal(rows: np.ndarray, goal: dict[str, Any]) -> np.ndarray:
    at, values = goal["at"], np.asarray(goal["values"], np.float32)
    columns = np.broadcast_to(values, (len(rows), len(values)))
    return np.concatenate([rows[:, :at], columns, rows[:, at:]], axis=1)


def describe(dataset: TransitionDataset) -> dict[str, Any]:
    """The figures of `dql data info`; plain numbers, lists and None, ready for JSON."""
    info = dataset.info

    def spread(values: np.ndarray) -> dict[str, float] | None:
        if len(values) == 0:
            return None
        return {
            "mean": values.mean().item(),
            "std": values.std().item(),
            "min": values.min().item(),
            "max": values.max().item(),
        }

    def bounds(tensor: torch.Tensor) -> dict[str, list[float]]:
        return {"min": tensor.amin(0).tolist(), "max": tensor.amax(0).tolist()}

    scores = info.normalized_score(info.episode_returns)
    with dataset.in_order():
        extremes = {
            "rewards": {"min": dataset.rewards.min().item(), "max": dataset.rewards.max().item()},
            "actions": bounds(dataset.actions),
            "states": bounds(dataset.states),
        }
        terminations = dataset.size - int(dataset.masks.count_nonzero())
    return {
        "dataset_id": info.dataset_id,
        "env_id": info.env_id,
        "steps": dataset.size,
        "episodes": info.num_episodes,
        "complete_episodes": len(info.episode_returns),
        "state_dim": dataset.state_dim,
        "action_dim": dataset.action_dim,
        "max_action": info.max_action,
        "observation_rule": info.observation_rule,
        "episode_return": spread(info.episode_returns),
        "normalized_score": None if scores is None else spread(scores),
        "episode_length": spread(info.episode_lengths),
        "terminations": terminations,
        "truncations": info.num_truncations,
        "reward_tune": dataset.reward_tune,
        **extremes,
        "ref_min_score": info.ref_min_score,
        "ref_max_score": info.ref_max_score,
        "note": info.note,
    }
