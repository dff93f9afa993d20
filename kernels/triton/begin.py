"""What an update begins with, in one launch: its batch, gathered from a dataset or copied, and all that it draws.

    row b     number integers(seed, n, ...)[first + b] of the dataset's n
    t[b]      integers(bc_t, T, B)[b]
    coin      integers(coin, 2, 1)

with integers(seed, high, ...)[i] = w high >> 32 for the word w of number i % 4 at Philox's counter (i // 4, 2^32 - 2,
0, 0), see `dql.noise`. All of it goes to memory that stays where it is: a recorded update reads it there.

Letters: B rows of the batch, n of the dataset, S state size, A action size, T steps.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..limits import check_memory
from .launch import Kernel, fixed
from .packing import cdiv, rounded

Tensor = torch.Tensor
_ROWS = 32  # a program
_INTEGER_STEP = tl.constexpr(0xFFFFFFFE)  # stands for k in dql.noise.integers; no chain has that many steps


@triton.jit
def _integers(seed, index, high):
    """integers(seed, high, ...)[index], int64 of index's shape; index and high are int64, high 2^32 at most."""
    counter, word = (index // 4).to(tl.uint32), index % 4
    zero, step = tl.cast(0, tl.uint32), tl.cast(_INTEGER_STEP, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, step, zero, zero)
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return ((w.to(tl.uint64) * high.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _copy_rows(source, to, row, b, B, WIDTH: tl.constexpr, SLICE: tl.constexpr):
    """to[b] = source[row] for rows b < B of WIDTH elements."""
    for start in range(0, WIDTH, SLICE):
        i = start + tl.arange(0, SLICE)
        there = (b < B)[:, None] & (i < WIDTH)[None, :]
        tl.store(
            to + b[:, None] * WIDTH + i[None, :], tl.load(source + row[:, None] * WIDTH + i[None, :], there), there
        )


@triton.jit
def _begin(
    states: "*fp32 any",  # of the dataset or the batch: [n, S]
    actions: "*fp32 any",  # [n, A]
    rewards: "*fp32 any",  # [n]
    next_states: "*fp32 any",  # [n, S]
    masks: "*fp32 any",  # [n]
    to_states: "*fp32 any",  # written [B, S], ...
    to_actions: "*fp32 any",
    to_rewards: "*fp32 any",
    to_next_states: "*fp32 any",
    to_masks: "*fp32 any",
    t: "*i64 any",  # written [B]
    seeds: "*i64 any",  # written [6]: in each second one
    scalars: "*fp32 any",  # written [4]
    n: "i64",  # 0: row b is number b
    rows_seed: "i64",
    first: "i64",
    bc_t: "i64",
    coin: "i64",
    target: "i64",
    bc_noise: "i64",
    actor: "i64",
    lr_scale: "fp32",
    ema: "fp32",
    B: "i32",
    T: "i32",
    S: tl.constexpr,
    A: tl.constexpr,
    OF_STATES: tl.constexpr,  # elements of a row at a time
    OF_ACTIONS: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = b
    if n > 0:
        row = _integers(rows_seed, first + b, n)
    _copy_rows(states, to_states, row, b, B, S, OF_STATES)
    _copy_rows(next_states, to_next_states, row, b, B, S, OF_STATES)
    _copy_rows(actions, to_actions, row, b, B, A, OF_ACTIONS)
    tl.store(to_rewards + b, tl.load(rewards + row, b < B), b < B)
    tl.store(to_masks + b, tl.load(masks + row, b < B), b < B)
    tl.store(t + b, _integers(bc_t, b, T.to(tl.int64)), b < B)
    if tl.program_id(0) == 0:
        tl.store(seeds, target)
        tl.store(seeds + 2, bc_noise)
        tl.store(seeds + 4, actor)
        i = tl.arange(0, 2)
        heads = _integers(coin, tl.zeros((2,), tl.int64), tl.cast(2, tl.int64)).to(tl.float32)
        tl.store(scalars + i, tl.where(i == 0, heads, 1.0 - heads))
        tl.store(scalars + 2, lr_scale)
        tl.store(scalars + 3, ema)


class Beginning:
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
        self._to = [fixed(tensor) for tensor in self.held]
        self._kernel = begin_kernel(S, self.sizes[2])

    def _check(self, tensors: Sequence[Tensor], rows: int) -> None:
        _, S, A = self.sizes
        names = ("states", "actions", "rewards", "next_states", "masks")
        counts = (rows * S, rows * A, rows, rows * S, rows)
        check_memory(self.device, **dict(zip(names, zip(tensors, counts, strict=True), strict=True)))

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
        if not 0 < n <= 1 << 32:
            raise ValueError(f"a dataset has from 1 to 2^32 rows, got {n}")
        child, first = rows or (0, 0)
        target, bc_noise, actor, bc_t, coin = (_bits(seed) for seed in seeds)
        self._kernel.launch(
            (cdiv(B, _ROWS), 1, 1),
            *source, *self._to, 0 if rows is None else n, _bits(child), first, bc_t, coin, target, bc_noise, actor,
            lr_scale, ema, B, self.T,
        )  # fmt: skip


def _bits(seed: int) -> int:
    """Those of a number of 64 bits as a signed one."""
    return seed - (1 << 64) if seed >> 63 else seed


@lru_cache(maxsize=64)
def begin_kernel(state_dim: int, action_dim: int) -> Kernel:
    """The kernel for rows of these sizes."""
    return Kernel.of(
        _begin,
        num_warps=4,
        S=state_dim,
        A=action_dim,
        OF_STATES=min(64, rounded(state_dim)),
        OF_ACTIONS=rounded(action_dim),
        ROWS=_ROWS,
    )
