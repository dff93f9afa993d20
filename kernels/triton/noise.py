"""The noise stream on a GPU in one launch: `dql.noise.normal` in float32."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Kernel
from .ops import normals
from .packing import cdiv, rounded
from .runner import seed_arguments

Tensor = torch.Tensor
_ROWS = 64  # a program


@triton.jit
def _noise(
    out: "*fp32",  # [K, R, A], written
    seed_at: "*i64 any",  # where the seed is, if seed_in_memory: in a CUDA graph, whose replays have one each
    seed: "i64",  # otherwise
    seed_in_memory: "i32",
    R: "i64",
    A: tl.constexpr,
    AP: tl.constexpr,
    ROWS: tl.constexpr,
):
    k = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, AP)
    live = (row < R)[:, None] & (dim < A)[None, :]
    seed = tl.load(seed_at, seed_in_memory != 0, seed)
    tl.store(out + (k * R + row)[:, None] * A + dim[None, :], normals(seed, row, k, 0, AP), live)


@lru_cache(maxsize=64)
def noise_kernel(action_dim: int) -> Kernel:
    """The kernel for actions of this size."""
    return Kernel.of(_noise, num_warps=4, A=action_dim, AP=rounded(action_dim), ROWS=_ROWS)


def normal(seed: int | Tensor, K: int, R: int, A: int, device: torch.device) -> Tensor:
    """Standard normals [K, R, A], element (k, row, dim) of the seed's stream; A is 64 at most.

    The seed may be an int64 tensor [1] on the device, read when the kernel runs.
    """
    out = torch.empty(K, R, A, dtype=torch.float32, device=device)
    at, number, in_memory = seed_arguments(seed, device)
    noise_kernel(A).launch((cdiv(R, _ROWS), K, 1), out, at, number, in_memory, R)
    return out
