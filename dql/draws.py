"""The randomness of an update: its seeds, and what is drawn or scheduled from them before anything is computed."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from dql import noise

if TYPE_CHECKING:
    from dql.backend.base import Backend


@dataclass(frozen=True)
class UpdateSeeds:
    """The seeds of one update's randomness, see `dql.noise`."""

    target: int
    """Chain of the next actions: normal(target, K, B * N, A)."""
    bc_t: int
    """Timesteps of the bc_loss: integers(bc_t, T, B)."""
    bc_noise: int
    """Noise of the bc_loss: normal(bc_noise, 1, B, A)[0]."""
    actor: int
    """Chain of the actor's actions: normal(actor, K, B, A)."""
    coin: int
    """integers(coin, 2, 1): 1 if Q_1 is maximised and |Q_2| divides, else the other way round."""

    @classmethod
    def of(cls, seed: int, step: int) -> "UpdateSeeds":
        return cls(*(noise.derive(seed, name, step) for name in ("target", "bc_t", "bc_noise", "actor", "coin")))


class Part(Protocol):
    """A process's part of a batch, see `dql.parallel`."""

    @property
    def size(self) -> int:
        """How many parts there are."""

    def first_row(self, rows: int) -> int:
        """The number, in the whole batch, of the first of its so many rows."""

    def mean_(self, tensor: Tensor) -> Tensor:
        """Averages over the parts, in place."""


@dataclass(frozen=True)
class Draws:
    """What one update has of its own: numbers, or tensors on the device that hold them while it is recorded."""

    target: int | Tensor
    """Seed, as in UpdateSeeds; a tensor is int64 [1] with its bits."""
    bc_noise: int | Tensor
    """Seed."""
    actor: int | Tensor
    """Seed."""
    t: Tensor
    """Timesteps of the bc_loss, int64 [B] on the device."""
    maximised: int | Tensor
    """Which Q is maximised, 1 or 2; a tensor is [2] with a 1 for it, and a 0."""
    lr_scale: float | Tensor
    """Factor of the learning rates; a tensor is a scalar."""
    ema_weight: float | Tensor
    """How far the averaged actor goes towards the actor; 0 in most updates."""
    shard: "Part | None" = None
    """Which part of a larger batch the rows are, where several processes share one."""

    def of_chain(
        self, seed: int | Tensor, K: int, shape: tuple[int, ...], like: Tensor, backend: "Backend"
    ) -> dict[str, Any]:
        """What a chain of actions of that shape, [B, A] or [B, N, A], is handed: its seed or, of a part of a batch, the
        noise of its rows."""
        if self.shard is None:
            return {"seed": seed}
        *rows, A = shape
        return {"noise": self.normal(seed, K, math.prod(rows), A, like, backend).reshape(K, *shape)}

    def normal(self, seed: int | Tensor, K: int, B: int, A: int, like: Tensor, backend: "Backend") -> Tensor:
        """Noise [K, B, A] of these rows: of a part of a batch, that which they have in the whole, all of which is drawn
        (in one launch, where the backend has a kernel for it)."""
        if self.shard is None:
            return backend.normal(seed, K, B, A, like)
        first = self.shard.first_row(B)
        return backend.normal(seed, K, B * self.shard.size, A, like)[:, first : first + B]


SEEDS = ("target", "bc_noise", "actor")  # those that kernels read, in the order in which they stand


def derived(seed: int, first: int, n: int) -> list[tuple[int, ...]]:
    """Of each of n updates from `first` on the seeds of SEEDS, of the bc_loss's timesteps and of the coin."""
    of_each = (noise.derived(seed, name, first, n).tolist() for name in (*SEEDS, "bc_t", "coin"))
    return list(zip(*of_each, strict=True))


def drawn(seed: int, first: int, n: int, T: int, B: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `UpdateSeeds` of n updates from `first` on amount to, in one pass.

    Returns:
        the bits of the seeds of SEEDS, int64 [n, 3]; the timesteps of the bc_loss, int64 [n, B]; the coins, int64 [n].
    """
    of = {name: noise.derived(seed, name, first, n) for name in (*SEEDS, "bc_t", "coin")}
    t, coins = noise.integers_of((of["bc_t"], T, B), (of["coin"], 2, 1))
    return np.stack([of[name] for name in SEEDS], axis=1).view(np.int64), t, coins[:, 0]
