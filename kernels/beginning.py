"""What brings an update's batch and draws to memory that stays where it is, and what is asked of that memory. The
kernels are in cuda/update.py and triton/begin.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .limits import check_memory

Tensor = torch.Tensor
_NAMES = ("states", "actions", "rewards", "next_states", "masks")
MOST_ROWS = 1 << 32  # of a dataset: beyond, integers() draws none


class Beginning(ABC):
    """Brings what an update begins with to memory that stays where it is: for one that was recorded.

    Args:
        batch: states [B, S], actions [B, A], rewards [B], next states [B, S], masks [B], to be written.
        t: int64 [B], to be written.
        seeds: int64 [6], to be written: in each second one of a chain's noise.
        scalars: float32 [4], to be written.
        T: timesteps are 0 .. T - 1.

    Raises:
        ValueError: one is not of that shape and dtype, or not in one piece.
    """

    def __init__(self, batch: Sequence[Tensor], t: Tensor, seeds: Tensor, scalars: Tensor, T: int) -> None:
        self.device, self.held, self.T = t.device, (*batch, t, seeds, scalars), T
        B, S = batch[0].shape
        self.sizes = (B, S, batch[1].shape[1])
        self._check(batch, B)
        check_memory(self.device, scalars=(scalars, 4))
        for name, tensor, count in (("t", t, B), ("seeds", seeds, 6)):
            if tensor.shape != (count,) or tensor.dtype is not torch.int64 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be int64 [{count}] in one piece, got {tensor.dtype} {list(tensor.shape)}"
                )

    def _check(self, tensors: Sequence[Tensor], rows: int) -> None:
        _, S, A = self.sizes
        counts = (rows * S, rows * A, rows, rows * S, rows)
        check_memory(self.device, **dict(zip(_NAMES, zip(tensors, counts, strict=True), strict=True)))

    def run(
        self, source: Sequence[Tensor], rows: tuple[int, int] | None, seeds: Sequence[int], lr_scale: float, ema: float
    ) -> None:
        """Writes all of it, in one launch.

        Args:
            source: the five of a dataset, [n, ...], or of a batch of B rows.
            rows: (seed, first): row b is that of number integers(seed, n, ...)[first + b]; None: row b.
            seeds: of both chains' noise and the loss's (target, bc_noise, actor), of the timesteps and of the coin.
            lr_scale: goes to scalars[2], behind a 1 for the Q that the coin chooses and a 0.
            ema: goes to scalars[3].

        Raises:
            ValueError: the source is not of such rows.
        """
        n, B = source[2].size(0), self.sizes[0]
        self._check(source, n)
        if rows is None and n != B:
            raise ValueError(f"a batch has {B} rows, got {n}")
        if not 0 < n <= MOST_ROWS:
            raise ValueError(f"a dataset has from 1 to 2^32 rows, got {n}")
        self._launch(source, 0 if rows is None else n, rows or (0, 0), seeds, lr_scale, ema)

    @abstractmethod
    def _launch(
        self,
        source: Sequence[Tensor],
        size: int,
        rows: tuple[int, int],
        seeds: Sequence[int],
        lr_scale: float,
        ema: float,
    ) -> None:
        """`run`, of what was looked at; a size of 0 stands for a batch, whose rows are taken as they are."""
