"""What networks, sizes and memory the kernels take, of every backend alike: `eager` alone goes beyond."""

import dataclasses
from functools import cache
from typing import Any

import torch

from .layout import CriticSpec, DenoiserSpec

MAX_STATE_DIM, MAX_ACTION_DIM, MAX_HIDDEN_DIM, MAX_STEPS, MAX_ROWS = 512, 64, 512, 1000, 1 << 30
HIDDEN_LAYERS = (2, 4)
READ_OF_CRITICS = frozenset({"state_dim", "action_dim", "hidden_dim", "num_hidden", "activation"})
READ_OF_DENOISERS = READ_OF_CRITICS | {"time_dim"}
"""The fields that kernels read. A network in which another one is not as by default is refused, not run without it: a
new field works with `eager` first."""
CUT_OFF = "{name} have no memory for {count} numbers: their storage was made smaller; make them anew"
MANY = 1024
"""Elements from which on it is looked whether a storage was made smaller than its tensor: a third of a microsecond,
which the state and noise of one robot's action are not to pay."""


@cache
def _others(kind: Any, read: frozenset[str]) -> tuple[dataclasses.Field, ...]:
    return tuple(field for field in dataclasses.fields(kind) if field.name not in read)


def lacking(spec: DenoiserSpec | CriticSpec, read: frozenset[str]) -> str | None:
    """None if all that matters of a network is in the fields that are read, else the first that is not."""
    kind: Any = type(spec)
    for field in _others(kind, read):
        if getattr(spec, field.name) != field.default:
            return f"it has no {field.name}={getattr(spec, field.name)!r}"
    return None


def unfit(
    spec: DenoiserSpec | CriticSpec, max_time_dim: int | None = None, read: frozenset[str] | None = None
) -> str | None:
    """None if the kernels take such a network, else what they lack or the limit that its sizes break.

    Args:
        spec: of the network.
        max_time_dim: of the kernels in question.
        read: the fields that they read, where those are more than all kernels'.
    """
    usual = READ_OF_DENOISERS if isinstance(spec, DenoiserSpec) else READ_OF_CRITICS
    if (lacks := lacking(spec, read or usual)) is not None:
        return lacks
    sizes = [
        ("state_dim", spec.state_dim, 1, MAX_STATE_DIM),
        ("action_dim", spec.action_dim, 1, MAX_ACTION_DIM),
        ("hidden_dim", spec.hidden_dim, 1, MAX_HIDDEN_DIM),
        ("num_hidden", spec.num_hidden, *HIDDEN_LAYERS),
    ]
    if max_time_dim is not None and isinstance(spec, DenoiserSpec):
        sizes.append(("time_dim", spec.time_dim, 4, max_time_dim))
    for name, value, least, most in sizes:
        if not least <= value <= most:
            return f"it takes {name} from {least} to {most}, and this network has {value}"
    return None


def too_many(rows: int, steps: int) -> str | None:
    """None if the kernels run a chain of so many rows and steps, else the limit and the remedy."""
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS:,} rows a call; split the states"
    if steps > MAX_STEPS:
        return f"it runs up to {MAX_STEPS} steps, not {steps}; use backend='eager'"
    return None


def cut_off(tensor: torch.Tensor, count: int) -> bool:
    """Whether the storage of a tensor in one piece was made smaller than its `count` float32."""
    return tensor.untyped_storage().nbytes() < 4 * (tensor.storage_offset() + count)


def check_memory(device: torch.device, **wanted: tuple[torch.Tensor | None, int]) -> None:
    """Looks at what kernels are to read or write by its address: how many elements they take it to have.

    Args:
        device: whose the kernels are.
        **wanted: name -> (tensor, or None where there is none; its number of elements).

    Raises:
        ValueError: a tensor is not of that many float32 in one piece on the device, or its storage was made smaller:
            they would read or write beside it.
    """
    for name, (tensor, count) in wanted.items():
        if tensor is None:
            continue
        if not (
            tensor.numel() == count
            and tensor.dtype is torch.float32
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be {count} float32 numbers in one piece on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}; convert it"
            )
        if count >= MANY and cut_off(tensor, count):
            raise ValueError(CUT_OFF.format(name=name, count=count))
