"""The one ABI of all kernels: where each weight lies in a network's flat buffer, and the columns of a step table.

A network's parameters are views into one flat buffer [P] (or [M, P] for M agents). Each tensor starts at a multiple of
16 elements (64 bytes of float32), so a kernel may use aligned vector loads; the gaps hold zeros and stay zero under
Adam, EMA and target updates, because their gradient is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGNMENT = 16  # elements
STEP_COLUMNS = ("a", "b", "c0", "cx", "cp", "s")  # x0 = a x - b eps;  x' = c0 x0 + cx x + cp x0_prev + s noise
ACTIVATIONS = ("mish", "relu", "silu")


@dataclass(frozen=True)
class Slot:
    """One tensor of a flat buffer: row-major, `size` elements from `offset`."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n


@dataclass(frozen=True)
class FlatLayout:
    """The slots of a flat buffer in order, and its padded size P."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def build(cls, shapes: Mapping[str, tuple[int, ...]]) -> "FlatLayout":
        slots = []
        offset = 0
        for name, shape in shapes.items():
            slot = Slot(name, shape, offset)
            slots.append(slot)
            offset += -(-slot.size // ALIGNMENT) * ALIGNMENT
        return cls(tuple(slots), offset)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Named views into `flat` [..., P]; the leading dimensions (M agents) stay in front."""
        lead = flat.shape[:-1]
        return {s.name: flat[..., s.offset : s.offset + s.size].view(*lead, *s.shape) for s in self.slots}


@dataclass(frozen=True)
class DenoiserSpec:
    """Sizes of a denoiser: concat [x (A), time embedding (D), state (S)] -> H x num_hidden -> A."""

    state_dim: int
    action_dim: int
    hidden_dim: int = 256
    num_hidden: int = 3
    time_dim: int = 16
    activation: str = "mish"

    @cached_property
    def layout(self) -> FlatLayout:
        return _denoiser_layout(self)


@dataclass(frozen=True)
class CriticSpec:
    """Sizes of twin critics: concat [state (S), action (A)] -> H x num_hidden -> 1, twice."""

    state_dim: int
    action_dim: int
    hidden_dim: int = 256
    num_hidden: int = 3
    activation: str = "mish"

    @cached_property
    def layout(self) -> FlatLayout:
        return _critic_layout(self)


def hidden_names(num_hidden: int) -> list[str]:
    """Published names of the hidden layers: `mid_layer.0`, `mid_layer.2`, ... (the odd places are activations)."""
    return [f"mid_layer.{2 * i}" for i in range(num_hidden)]


def _denoiser_layout(spec: DenoiserSpec) -> FlatLayout:
    H, D = spec.hidden_dim, spec.time_dim
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = [("time_mlp.1", 2 * D, D), ("time_mlp.3", D, 2 * D)]
    fan_in = spec.action_dim + D + spec.state_dim
    for name in hidden_names(spec.num_hidden):
        sizes.append((name, H, fan_in))
        fan_in = H
    sizes.append(("final_layer", spec.action_dim, H))
    for name, rows, columns in sizes:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)
    return FlatLayout.build(shapes)


def _critic_layout(spec: CriticSpec) -> FlatLayout:
    shapes: dict[str, tuple[int, ...]] = {}
    for q in ("q1_model", "q2_model"):
        fan_in = spec.state_dim + spec.action_dim
        for i in range(spec.num_hidden + 1):
            rows = spec.hidden_dim if i < spec.num_hidden else 1
            shapes[f"{q}.{2 * i}.weight"] = (rows, fan_in)
            shapes[f"{q}.{2 * i}.bias"] = (rows,)
            fan_in = rows
    return FlatLayout.build(shapes)
