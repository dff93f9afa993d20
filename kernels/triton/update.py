"""What an update does beside chains and critics: both losses of Q values with their gradients, and a step of Adam.

    critic:  y = r + mask * discount * min_i max_n Q_i'(s', a'_n)
             loss = mean (Q_1 - y)^2 + mean (Q_2 - y)^2
    actor:   q_loss = -mean(Q_i) / mean|Q_j|                                # j the other one; no gradient through it
    Adam:    m += (1 - b1) (g - m)
             v += (1 - b2) (g^2 - v)
             parameters -= lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps)

(Diffusion-QL, arXiv 2208.06193, section 3, and its code; Adam, arXiv 1412.6980, algorithm 1, as torch.optim.Adam.) A
loss is one launch of one program: a batch is small, and the gradient of the second needs its means. Adam is two, the
squares of the gradient in parts before the step that is clipped by them. Sums are in a fixed order: the same call gives
the same bits.

Letters: B states, N candidates, P size of a flat buffer.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..limits import check_memory
from .begin import Beginning as Beginning
from .launch import Kernel
from .packing import cdiv

Tensor = torch.Tensor
_BLOCK = 1024  # elements at a time
_MOST_PARTS = tl.constexpr(256)  # of the squares
_HEAD = tl.constexpr(16)  # floats before the parts: the norm, 1 - b1^step, sqrt(1 - b2^step)
_BETA_1, _BETA_2, _EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)
_LOG_BETA_1, _LOG_BETA_2 = tl.constexpr(math.log(0.9)), tl.constexpr(math.log(0.999))


@triton.jit
def _critic_loss(
    q_target: "*fp32 any",  # [2, B * N]
    rewards: "*fp32 any",  # [B]
    masks: "*fp32 any",  # [B]
    q: "*fp32 any",  # [2, B]
    d_q: "*fp32",  # [2, B], written
    metrics: "*fp32",  # [3], written
    discount: "fp32",
    B: "i32",
    N: "i32",
    BLOCK: tl.constexpr,
):
    squares, values = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    targets = tl.zeros((BLOCK,), tl.float32)
    count = B.to(tl.float32)
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        there = b < B
        at = q_target + b.to(tl.int64) * N
        first, second = tl.load(at, there, 0.0), tl.load(at + B.to(tl.int64) * N, there, 0.0)
        for n in range(1, N):
            first = tl.maximum(first, tl.load(at + n, there, 0.0), propagate_nan=tl.PropagateNan.ALL)
            other = tl.load(at + B.to(tl.int64) * N + n, there, 0.0)
            second = tl.maximum(second, other, propagate_nan=tl.PropagateNan.ALL)
        best = tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)
        y = tl.load(rewards + b, there, 0.0) + tl.load(masks + b, there, 0.0) * discount * best
        q_1, q_2 = tl.load(q + b, there, 0.0), tl.load(q + B + b, there, 0.0)
        off_1, off_2 = q_1 - y, q_2 - y
        tl.store(d_q + b, 2.0 * off_1 / count, there)
        tl.store(d_q + B + b, 2.0 * off_2 / count, there)
        squares += off_1 * off_1 + off_2 * off_2
        values += q_1 + q_2
        targets += y
    tl.store(metrics, tl.sum(squares, axis=0) / count)
    tl.store(metrics + 1, tl.sum(values, axis=0) / (2.0 * count))
    tl.store(metrics + 2, tl.sum(targets, axis=0) / count)


@triton.jit
def _q_loss(
    q: "*fp32 any",  # [2, B]
    maximised_at: "*fp32 any",  # [2], a 1 for the maximised one and a 0, if maximised_in_memory
    d_q: "*fp32",  # [2, B], written
    loss: "*fp32",  # [1], written
    eta: "fp32",
    maximised: "i32",  # otherwise: 1 or 2
    B: "i32",
    maximised_in_memory: "i32",
    BLOCK: tl.constexpr,
):
    first = maximised == 1
    if maximised_in_memory != 0:
        first = tl.load(maximised_at) != 0.0
    of_value, of_divisor = q + tl.where(first, 0, B), q + tl.where(first, B, 0)
    values, sizes = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        values += tl.load(of_value + b, b < B, 0.0)
        sizes += tl.abs(tl.load(of_divisor + b, b < B, 0.0))
    divisor = tl.sum(sizes, axis=0)  # the B of both means cancels
    tl.store(loss, -tl.sum(values, axis=0) / divisor)
    slope = -eta / divisor
    for start in range(0, B, BLOCK):
        b = start + tl.arange(0, BLOCK)
        tl.store(d_q + b, tl.where(first, slope, 0.0) + tl.zeros((BLOCK,), tl.float32), b < B)
        tl.store(d_q + B + b, tl.where(first, 0.0, slope) + tl.zeros((BLOCK,), tl.float32), b < B)


@triton.jit
def _squares(
    gradient: "*fp32",  # [P]
    step: "*fp32 any",  # [1], incremented
    work: "*fp32",  # written: corrections and parts
    P: "i64",
    BLOCK: tl.constexpr,
):
    pid, parts = tl.program_id(0), tl.num_programs(0)
    share = tl.cdiv(tl.cdiv(P, parts), BLOCK) * BLOCK
    first = pid * share
    last = tl.minimum(P, first + share)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(gradient + i, i < last, 0.0)
        total += g * g
    tl.store(work + _HEAD + pid, tl.sum(total, axis=0))
    if pid == 0:
        steps = tl.load(step) + 1.0
        tl.store(step, steps)
        # In float64: of the first steps 1 - b2^step is the small difference of two large numbers.
        tl.store(work + 1, (1.0 - tl.exp(steps.to(tl.float64) * _LOG_BETA_1)).to(tl.float32))
        tl.store(work + 2, tl.sqrt(1.0 - tl.exp(steps.to(tl.float64) * _LOG_BETA_2)).to(tl.float32))


@triton.jit
def _adam(
    flat: "*fp32",  # [P], changed
    gradient: "*fp32",  # [P], changed if it is clipped
    exp_avg: "*fp32",  # [P], changed
    exp_avg_sq: "*fp32",  # [P], changed
    average: "*fp32",  # with AVERAGE: [P], changed
    work: "*fp32",  # what _squares made; the norm is written
    lr_scale_at: "*fp32 any",  # a factor of lr, if lr_scale_in_memory
    weight_at: "*fp32 any",  # how far the average goes, if weight_in_memory
    lr: "fp32",
    weight: "fp32",  # otherwise
    max_norm: "fp32",  # 0: nothing is clipped
    P: "i64",
    parts: "i32",
    lr_scale_in_memory: "i32",
    weight_in_memory: "i32",
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.arange(0, _MOST_PARTS)
    norm = tl.sqrt(tl.sum(tl.load(work + _HEAD + part, part < parts, 0.0), axis=0))
    if tl.program_id(0) == 0:
        tl.store(work, norm)
    clip = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    clip = tl.where(max_norm > 0.0, clip, 1.0)
    rate = lr * tl.load(lr_scale_at, lr_scale_in_memory != 0, 1.0) / tl.load(work + 1)
    correction = tl.load(work + 2)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < P
    g = tl.load(gradient + i, there, 0.0) * clip
    tl.store(gradient + i, g, i < tl.where(clip != 1.0, P, 0))
    m = tl.load(exp_avg + i, there, 0.0)
    v = tl.load(exp_avg_sq + i, there, 0.0)
    m = _BETA_1 * m + (1.0 - _BETA_1) * g
    v = _BETA_2 * v + (1.0 - _BETA_2) * g * g
    x = tl.load(flat + i, there, 0.0) - rate * m / (tl.sqrt(v) / correction + _EPS)
    tl.store(exp_avg + i, m, there)
    tl.store(exp_avg_sq + i, v, there)
    tl.store(flat + i, x, there)
    if AVERAGE:
        w = tl.load(weight_at, weight_in_memory != 0, weight)
        a = tl.load(average + i, there, 0.0)
        off = x - a
        # From the nearer end, as torch.lerp. Where nothing moves nothing is written: 0 times infinity is NaN.
        tl.store(average + i, tl.where(w < 0.5, a + w * off, x - off * (1.0 - w)), i < tl.where(w != 0.0, P, 0))


def critic_loss(
    q_target: Tensor, rewards: Tensor, masks: Tensor, q: Tensor, discount: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """The critics' loss.

    Args:
        q_target: the target critics' [2, B * N], contiguous, row b * N + n being candidate n of state b.
        rewards: [B].
        masks: [B].
        q: [2, B], contiguous.
        discount: of the rewards.
        candidates: N.

    Returns:
        (d_q [2, B], metrics [3]: the loss, the mean of both Q, the mean of y).
    """
    B, device = rewards.size(0), q.device
    check_memory(device, q_target=(q_target, 2 * B * candidates), rewards=(rewards, B), masks=(masks, B), q=(q, 2 * B))
    d_q, metrics = torch.empty_like(q), torch.empty(3, dtype=torch.float32, device=device)
    critic_loss_kernel().launch((1, 1, 1), q_target, rewards, masks, q, d_q, metrics, discount, B, candidates)
    return d_q, metrics


def q_loss(q: Tensor, maximised: int | Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The Q term of the actor's loss.

    Args:
        q: [2, B], contiguous.
        maximised: i, 1 or 2, j being the other; or float32 [2] on the device with a 1 for it and a 0.
        eta: by which the gradient is multiplied.

    Returns:
        (d_q [2, B] of eta times the loss, the loss [1]).
    """
    B, device = q.size(1), q.device
    at, number = (maximised, 0) if isinstance(maximised, Tensor) else (None, maximised)
    check_memory(device, q=(q, 2 * B), maximised=(at, 2))
    d_q, loss = torch.empty_like(q), torch.empty(1, dtype=torch.float32, device=device)
    q_loss_kernel().launch((1, 1, 1), q, q if at is None else at, d_q, loss, eta, number, B, int(at is not None))
    return d_q, loss


def adam(
    flat: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    lr_scale: float | Tensor,
    max_norm: float,
    average: tuple[Tensor, float | Tensor] | None = None,
) -> Tensor:
    """A step of torch.optim.Adam (betas 0.9 and 0.999, eps 1e-8), and of an average towards what comes of it.

    Args:
        flat: parameters [P], changed.
        gradient: [P], left as it was clipped.
        exp_avg: [P], changed.
        exp_avg_sq: [P], changed.
        step: float32, of one number on the device: steps done, changed.
        lr: the learning rate.
        lr_scale: its factor, which may be float32, of one number on the device.
        max_norm: the gradient is scaled down to this norm if it has a larger one; 0: it is not.
        average: (a [P], weight): a goes so far towards the parameters; a weight of 0 leaves it alone. The weight may be
            float32, of one number on the device.

    Returns:
        the gradient's norm before clipping [1].
    """
    P, device = flat.numel(), flat.device
    scale_at = lr_scale if isinstance(lr_scale, Tensor) else None
    a, weight = (None, 0.0) if average is None else average
    weight_at = weight if isinstance(weight, Tensor) else None
    check_memory(
        device, flat=(flat, P), gradient=(gradient, P), exp_avg=(exp_avg, P), exp_avg_sq=(exp_avg_sq, P),
        step=(step, 1), lr_scale=(scale_at, 1), average=(a, P), weight=(weight_at, 1),
    )  # fmt: skip
    blocks = cdiv(P, _BLOCK)
    parts = min(blocks, _MOST_PARTS.value)
    work = torch.empty(_HEAD.value + parts, dtype=torch.float32, device=device)
    squares_kernel().launch((parts, 1, 1), gradient, step, work, P)
    adam_kernel(a is not None).launch(
        (blocks, 1, 1),
        flat, gradient, exp_avg, exp_avg_sq, work if a is None else a, work,
        work if scale_at is None else scale_at, work if weight_at is None else weight_at,
        lr if isinstance(lr_scale, Tensor) else lr * lr_scale, 0.0 if isinstance(weight, Tensor) else weight,
        max_norm, P, parts, int(scale_at is not None), int(weight_at is not None),
    )  # fmt: skip
    return work[:1]


@lru_cache(maxsize=1)
def critic_loss_kernel() -> Kernel:
    """The kernel of the critics' loss."""
    return Kernel.of(_critic_loss, num_warps=8, BLOCK=_BLOCK)


@lru_cache(maxsize=1)
def q_loss_kernel() -> Kernel:
    """The kernel of the Q term."""
    return Kernel.of(_q_loss, num_warps=8, BLOCK=_BLOCK)


@lru_cache(maxsize=1)
def squares_kernel() -> Kernel:
    """The kernel of a gradient's squares."""
    return Kernel.of(_squares, num_warps=4, BLOCK=_BLOCK)


@lru_cache(maxsize=2)
def adam_kernel(average: bool) -> Kernel:
    """The kernel of the step, with or without an average."""
    return Kernel.of(_adam, num_warps=4, AVERAGE=average, BLOCK=_BLOCK)
