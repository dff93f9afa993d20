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

from .. import beginning
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


class Beginning(beginning.Beginning):
    """By `_begin`."""

    def __init__(self, batch: Sequence[Tensor], t: Tensor, seeds: Tensor, scalars: Tensor, T: int) -> None:
        super().__init__(batch, t, seeds, scalars, T)
        self._to = [fixed(tensor) for tensor in self.held]
        self._kernel = begin_kernel(*self.sizes[1:])

    def _launch(
        self,
        source: Sequence[Tensor],
        size: int,
        rows: tuple[int, int],
        seeds: Sequence[int],
        lr_scale: float,
        ema: float,
    ) -> None:
        (child, first), B = rows, self.sizes[0]
        target, bc_noise, actor, bc_t, coin = (_bits(seed) for seed in seeds)
        self._kernel.launch(
            (cdiv(B, _ROWS), 1, 1),
            *source, *self._to, size, _bits(child), first, bc_t, coin, target, bc_noise, actor,
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
