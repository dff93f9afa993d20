"""The reverse-diffusion chain in one Triton kernel, and its gradient in one more: the backend "triton".

    x = noise[0]                                                            # [R, A]
    for k in 0 .. K-1:
        eps = denoiser(x, t_k, s)
        x0  = clamp(a_k x - b_k eps, -max, +max)
        x   = c0_k x0 + cx_k x + cp_k x0_prev + s_k noise[k+1]              # s_{K-1} = 0
    action = clamp(x, -max, +max)

(Diffusion-QL, arXiv 2208.06193, eq. 1; `reference.chain_fwd` is the same in torch.) A program runs all K steps for a
tile of ROWS rows. x, x0 and the activations of the last layer stay in registers; see `tile_layers` for the others.

What a kernel is handed lies in two buffers, made by `chain_runner.ChainPlan` for every call:
    floats:    packed floats | time table [K, HP] | state part [B, HP] | x [RP, AP], with a backward pass [K, RP, AP] |
               with a backward pass: a_k x - b_k eps, and last the action, before clamping [K + 1, RP, AP]
    operands:  packed operands | without a backward pass: two activations of each tile [tiles, 2, ROWS, HP]; with one:
               activations [L, K, RP, HP] | slopes [L, K, RP, HP]

A launch of `actor` has rows of the noise-prediction loss too, of one step each, in programs of their own. What is saved
of a step k has a plane of RP rows; what is saved of them is one plane more, number K (planes = K + LOSS, in x,
a_k x - b_k eps, activations and slopes). Behind the floats lie how far the predictions are off [RP, AP], their targets
[RP, AP], and the part of their first layer that states and times make [RP, HP]. The time table has all T timesteps; K
is T, or 0 where there is no chain.

In tf32 and bf16 the operands of every product are rounded, once each. x lies in memory as the operand that it is there,
as do activations and d_z; slopes, which are none, have the operands' dtype alone. In registers x, d_z and d_eps go on
exact, and so does d_eps in memory, whose sum is the gradient of the output's bias.

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, A action size, AP padded, HP padded hidden
width, L hidden layers, K steps.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from ..layout import ACTIVATIONS, DenoiserSpec
from .launch import INTERPRETED, Kernel
from .layers import narrow_product, narrow_product_from, product
from .ops import activate, activate_with_slope, dot, edge_operand, normals, rounded_operand, stored
from .packing import PackedSizes, packed_sizes
from .prologue import edge_precision
from .tiles import Tile, next_smaller

NARROW = tl.constexpr(8192)  # AP * HP from which on the first layer's weight does not fit into the registers


@triton.jit
def rows_forward(
    floats, operands, steps, noise, data, t, q_sample, actions, errors, seed, max_action, of_loss, R, B, N, K, times,
    A: tl.constexpr, AP: tl.constexpr, HP: tl.constexpr, L: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, NOISE: tl.constexpr, SAVE: tl.constexpr, LOSS: tl.constexpr, OF_NOISE: tl.constexpr,
    BF16: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """What a program does for its tile of rows, see `_chain_fwd`; with LOSS see `actor._actor_fwd`.

    With LOSS, where of_loss is 1, not 0, the tile's rows are no chain's but each one prediction at its timestep t, of
    noise (OF_NOISE) or of the action itself, for data noised with the factors q_sample[t]; N is 1, SAVE set.

    data, t, q_sample: [R, A], [R], [T, 2].
    errors: [tiles], written if of_loss: the sum of squares of what the predictions are off.
    times: rows of the time table.
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.num_programs(0).to(tl.int64)
    RP = tiles * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dim, column = tl.arange(0, AP), tl.arange(0, HP)
    live = (row < R)[:, None] & (dim < A)[None, :]  # [ROWS, AP]
    cell = row[:, None] * A + dim[None, :]
    corner = row[:, None] * AP + dim[None, :]
    plane = R.to(tl.int64) * A  # of the noise
    place = tl.arange(0, ROWS)[:, None] * HP + column[None, :]  # in a tile of activations

    biases = floats
    output_bias = biases + (L - 1) * HP
    w_x = output_bias + AP
    w_out = w_x + HP * AP
    time_table = w_out + AP * HP
    state_part = time_table + times * HP
    xs = state_part + B.to(tl.int64) * HP
    planes = K + LOSS
    raws = xs + planes * RP * AP
    weights = operands
    activations = weights + (L - 1) * HP * HP * (2 if SAVE else 1)
    slopes = activations + L * planes * RP * HP

    of_row = (tl.minimum(row, R - 1) // N)[:, None] * HP + column[None, :]  # [ROWS, HP]
    at_state = state_part + of_row
    if HOLD and not LOSS:
        of_state = tl.load(at_state)
    if AP * HP < NARROW:
        w_action = tl.load(w_x + column[None, :] * AP + dim[:, None])  # [AP, HP]
        if BF16:  # otherwise packed as an operand
            w_action = edge_operand(w_action, EDGE, EMULATE)
    b_out = tl.load(output_bias + dim)[None, :]

    if NOISE:
        x = tl.load(noise + cell, live, 0.0)  # [ROWS, AP]
    else:
        x = tl.where(live, normals(seed, row, 0, 0, AP), 0.0)
    begin, end = 0, K
    if LOSS:
        begin, end = of_loss * K, K + of_loss
        # In registers these would be kept by a chain's programs too.
        targets = raws + (planes + 2) * RP * AP
        own_part = targets + RP * AP
        if of_loss != 0:
            action = tl.load(data + cell, live, 0.0)
            tl.store(targets + corner, x if OF_NOISE else action)
            own_t = tl.load(t + tl.minimum(row, R - 1))  # [ROWS]
            x = tl.load(q_sample + 2 * own_t)[:, None] * action + tl.load(q_sample + 2 * own_t + 1)[:, None] * x
            at_time = time_table + (times - 1 - own_t)[:, None] * HP + column[None, :]  # row k: timestep T - 1 - k
            tl.store(own_part + row[:, None] * HP + column[None, :], tl.load(at_state) + tl.load(at_time))
            tl.debug_barrier()
        at_state = tl.where(of_loss != 0, own_part, state_part) + of_row
        if HOLD:
            of_state = tl.load(at_state)
    x0_previous = tl.zeros((ROWS, AP), tl.float32)
    turn = 0
    hidden = activations
    for k in range(begin, end):
        step = steps + k * 8
        if not HOLD:
            of_state = tl.load(at_state)
        if LOSS:  # whose rows have theirs
            z = tl.load(time_table + k * HP + column, column < (K - k) * HP, 0.0)[None, :] + of_state
        else:
            z = tl.load(time_table + k * HP + column)[None, :] + of_state
        x_at = xs + (k if SAVE else 0) * RP * AP
        x_operand = edge_operand(x, EDGE, EMULATE)
        if SAVE or AP * HP >= NARROW:
            tl.store(x_at + corner, x_operand)
        if AP * HP < NARROW:
            z = dot(x_operand, w_action, z, EDGE, EMULATE)  # [ROWS, HP]
        else:
            tl.debug_barrier()
            z = product(z, x_at + tile * ROWS * AP, w_x, AP, 1, ROWS, HP, AP, 16, 2, EDGE, False, BF16, EMULATE)
        for layer in tl.static_range(L):
            if layer > 0:
                bias = tl.load(biases + (layer - 1) * HP + column)[None, :]
                z = product(bias + tl.zeros((ROWS, HP), tl.float32), hidden, weights + (layer - 1) * HP * HP,
                            HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION, False, False, EMULATE)  # fmt: skip
            at = ((layer * planes + k) * RP + tile * ROWS) * HP
            if SAVE:
                h, slope = activate_with_slope(z, KIND)
                tl.store(slopes + at + place, stored(slope, BF16, EMULATE))
                hidden = activations + at
            else:
                h = activate(z, KIND)
                if layer < L - 1 or GROUPS == 0:  # what is stored goes to the two places in turn
                    hidden = activations + (tile * 2 + turn) * ROWS * HP
                    turn = 1 - turn
            h = rounded_operand(h, BF16, PRECISION, EMULATE)
            if SAVE or layer < L - 1 or GROUPS == 0:
                tl.store(hidden + place, h)
            if layer < L - 1 or GROUPS == 0:
                tl.debug_barrier()
        if GROUPS > 0:
            eps = narrow_product(h, w_out, HP, 1, ROWS, HP, AP, GROUPS, PRECISION, BF16, EMULATE)  # [ROWS, AP]
        else:
            eps = narrow_product_from(hidden, w_out, HP, 1, ROWS, HP, AP, CHUNK, STAGES, PRECISION, BF16, EMULATE)
        eps += b_out
        raw = tl.load(step) * x - tl.load(step + 1) * eps
        x0 = tl.where(raw > max_action, max_action, tl.where(raw < -max_action, -max_action, raw))
        if LOSS:  # no prediction is clamped
            predicted = tl.full((ROWS, AP), 0, tl.int32) + of_loss != 0
            tl.store(raws + k * RP * AP + corner, tl.where(predicted, 0.0, raw))
        elif SAVE:
            tl.store(raws + k * RP * AP + corner, raw)
        x = tl.load(step + 2) * x0 + tl.load(step + 3) * x + tl.load(step + 4) * x0_previous
        if LOSS:
            x = tl.where(predicted, raw - tl.load(targets + corner, predicted, 0.0), x)
        if k + 1 < K:  # no noise in the last step: the posterior variance is 0 there
            if NOISE:
                drawn = tl.load(noise + (k + 1) * plane + cell, live, 0.0)
            else:
                drawn = tl.where(live, normals(seed, row, k + 1, 0, AP), 0.0)
            x += tl.load(step + 5) * drawn
        x0_previous = x0
    if LOSS:
        x = tl.where(live, x, 0.0)
        tl.store(raws + (planes + of_loss) * RP * AP + corner, x)
    elif SAVE:
        tl.store(raws + planes * RP * AP + corner, x)
    bounded = tl.where(x > max_action, max_action, tl.where(x < -max_action, -max_action, x))
    if LOSS:
        if of_loss != 0:
            tl.store(errors + tile, tl.sum(tl.sum(x * x, axis=1), axis=0))
        else:
            tl.store(actions + cell, bounded, live)
    else:
        tl.store(actions + cell, bounded, live)


@triton.jit
def _chain_fwd(
    floats: "*fp32",  # see the module
    operands: "*op",
    steps: "*fp32",  # [K, 8]: a, b, c0, cx, cp, s, 0, 0
    noise: "*fp32 any",  # [K, R, A], or null without NOISE
    seed_at: "*i64 any",  # where the seed is, if seed_in_memory: in a CUDA graph, whose replays have one each
    actions: "*fp32",  # [R, A], written
    seed: "i64",  # otherwise
    max_action: "fp32",
    R: "i32",
    B: "i32",
    N: "i32",
    K: "i32",
    seed_in_memory: "i32",
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    KIND: tl.constexpr,  # of activation
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    HOLD: tl.constexpr,  # the states' part stays in registers
    PRECISION: tl.constexpr,  # of float32 products in hidden layers
    EDGE: tl.constexpr,  # ... in the first and the last
    NOISE: tl.constexpr,
    SAVE: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    seed = tl.load(seed_at, seed_in_memory != 0, seed)
    rows_forward(
        floats, operands, steps, noise, None, None, None, actions, None, seed, max_action, 0, R, B, N, K, K,
        A, AP, HP, L, KIND, ROWS, CHUNK, STAGES, GROUPS, HOLD, PRECISION, EDGE, NOISE, SAVE, 0, True, BF16, EMULATE,
    )  # fmt: skip


@triton.jit
def rows_backward(
    floats, operands, steps, d_actions, d_floats, d_operands, max_action, weight, of_loss, R, B, K, times,
    A: tl.constexpr, AP: tl.constexpr, HP: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    LOSS: tl.constexpr, BF16: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """What a program does for its tile of rows, see `_chain_bwd`; with LOSS see `actor._actor_bwd`.

    With LOSS, where of_loss is 1, the gradient of a prediction is `weight` times what it is off, and d_z of the first
    layer goes to a second plane of those sums.
    """
    tile = tl.program_id(0).to(tl.int64)
    RP = tl.num_programs(0).to(tl.int64) * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dim, column = tl.arange(0, AP), tl.arange(0, HP)
    live = (row < R)[:, None] & (dim < A)[None, :]  # [ROWS, AP]
    corner = row[:, None] * AP + dim[None, :]
    place = tl.arange(0, ROWS)[:, None] * HP + column[None, :]

    w_x = floats + L * HP - HP + AP
    w_out = w_x + HP * AP
    planes = K + LOSS
    raws = w_out + AP * HP + (times + B.to(tl.int64)) * HP + planes * RP * AP
    turned = operands + (L - 1) * HP * HP
    slopes = turned + (L - 1) * HP * HP + L * planes * RP * HP
    if AP * HP < NARROW and (HOLD or not LOSS):
        w_back = tl.load(w_out + dim[:, None] * HP + column[None, :])  # [AP, HP]
        if BF16:  # otherwise packed as an operand
            w_back = edge_operand(w_back, EDGE, EMULATE)

    sums = d_floats + planes * RP * AP + (tile * ROWS) * HP + place
    begin, end, acting = 0, K, live
    if LOSS:  # number K is before the chain's last
        begin, end, acting = -of_loss, K * (1 - of_loss), live & (dim < A * (1 - of_loss))[None, :]
        sums += of_loss * RP * HP
    last = tl.load(raws + planes * RP * AP + corner)
    d_x = tl.load(d_actions + row[:, None] * A + dim[None, :], acting, 0.0)  # [ROWS, AP]
    d_x = tl.where(tl.abs(last) <= max_action, d_x, 0.0)
    d_x0_carried = tl.zeros((ROWS, AP), tl.float32)  # from the next step's cp * x0_prev
    if LOSS:  # of which a prediction makes its d_eps: its b is -1
        predicted = tl.full((ROWS, AP), 0, tl.int32) + of_loss != 0
        d_x0_carried = weight * tl.load(raws + (planes + 1) * RP * AP + corner, predicted, 0.0)
    if HOLD:
        d_state_part = tl.zeros((ROWS, HP), tl.float32)
    elif LOSS:
        tl.store(sums, tl.zeros((ROWS, HP), tl.float32))
    for back in range(begin, end):
        k = planes - LOSS - 1 - back
        step = steps + k * 8
        raw = tl.load(raws + k * RP * AP + corner)
        d_raw = tl.where(tl.abs(raw) <= max_action, tl.load(step + 2) * d_x + d_x0_carried, 0.0)
        d_x0_carried = tl.load(step + 4) * d_x
        d_eps = -tl.load(step + 1) * d_raw
        tl.store(d_floats + k * RP * AP + corner, d_eps)
        if AP * HP < NARROW:
            if LOSS and not HOLD:  # kept, it is what is too much for the registers of sm_120
                w_back = tl.load(w_out + dim[:, None] * HP + column[None, :])
                if BF16:
                    w_back = edge_operand(w_back, EDGE, EMULATE)
            d_h = dot(edge_operand(d_eps, EDGE, EMULATE), w_back, None, EDGE, EMULATE)  # [ROWS, HP]
        else:
            tl.debug_barrier()
            d_h = product(tl.zeros((ROWS, HP), tl.float32), d_floats + (k * RP + tile * ROWS) * AP, w_out,
                          1, HP, ROWS, HP, AP, 16, 2, EDGE, True, BF16, EMULATE)  # fmt: skip
        for up in tl.static_range(L):
            layer = L - 1 - up
            at = ((layer * planes + k) * RP + tile * ROWS) * HP
            d_z = d_h * tl.load(slopes + at + place).to(tl.float32)
            d_z_operand = rounded_operand(d_z, BF16, PRECISION, EMULATE)
            tl.store(d_operands + at + place, d_z_operand)
            if layer > 0 or GROUPS == 0:
                tl.debug_barrier()
            if layer > 0:
                d_h = product(tl.zeros((ROWS, HP), tl.float32), d_operands + at, turned + (layer - 1) * HP * HP,
                              HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION, False, False, EMULATE)  # fmt: skip
        if HOLD:
            d_state_part += d_z
        elif LOSS:  # in memory: the barriers above order this after the store of the step before
            tl.store(sums, tl.load(sums) + d_z)
        else:
            tl.store(sums, tl.load(sums, mask=tl.full((ROWS, HP), 0, tl.int32) + back > 0, other=0.0) + d_z)
        # In the last turn nobody needs it; Triton 3.6 and 3.7 cannot compile this under a condition.
        d_x = tl.load(step + 3) * d_x + tl.load(step) * d_raw
        if GROUPS > 0:
            d_x += narrow_product(d_z_operand, w_x, 1, AP, ROWS, HP, AP, GROUPS, PRECISION, BF16, EMULATE)
        else:
            d_x += narrow_product_from(
                d_operands + at, w_x, 1, AP, ROWS, HP, AP, CHUNK, STAGES, PRECISION, BF16, EMULATE
            )
    if HOLD:
        tl.store(sums, d_state_part)


@triton.jit
def _chain_bwd(
    floats: "*fp32",  # what _chain_fwd was handed and saved
    operands: "*op",
    steps: "*fp32",
    d_actions: "*fp32 any",  # [R, A]
    d_floats: "*fp32",  # written: d_eps [K, RP, AP] | d_z of the first layer, summed over steps [RP, HP]
    d_operands: "*op",  # written: d_z [L, K, RP, HP]
    max_action: "fp32",
    R: "i32",
    B: "i32",
    K: "i32",
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    HOLD: tl.constexpr,  # the states' part stays in registers
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    rows_backward(
        floats, operands, steps, d_actions, d_floats, d_operands, max_action, 0.0, 0, R, B, K, K,
        A, AP, HP, L, ROWS, CHUNK, STAGES, GROUPS, HOLD, PRECISION, EDGE, 0, BF16, EMULATE,
    )  # fmt: skip


def small(tile: Tile, s: PackedSizes) -> bool:
    """Whether registers hold more than one tile of activations: found by compiling for sm_80 to sm_120."""
    return tile.rows <= 16 and NARROW.value > s.AP * s.HP


def groups(tile: Tile, s: PackedSizes) -> int:
    """Of `narrow_product`; 0 sends the last layer's inputs through memory."""
    return min(tile.warps, s.HP // 16) if small(tile, s) else 0


@lru_cache(maxsize=256)
def chain_fwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile, noise: bool, save: bool) -> Kernel:
    """The forward kernel for a denoiser, a precision and a tile."""
    kind = ACTIVATIONS.index(spec.activation)

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else chain_fwd_kernel(spec, precision, less, noise, save)

    return kernel_of_rows(_chain_fwd, spec, precision, tile, smaller, KIND=kind, NOISE=noise, SAVE=save)


@lru_cache(maxsize=256)
def chain_bwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile) -> Kernel:
    """The backward kernel for a denoiser, a precision and a tile."""

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else chain_bwd_kernel(spec, precision, less)

    return kernel_of_rows(_chain_bwd, spec, precision, tile, smaller)


def kernel_of_rows(
    function: Any,
    spec: DenoiserSpec,
    precision: str,
    tile: Tile,
    smaller: Callable[[], Kernel | None],
    max_registers: int | None = None,
    **constants: Any,
) -> Kernel:
    """A kernel around `rows_forward` or `rows_backward`, with what both are told."""
    s = packed_sizes(spec)
    return Kernel.of(
        function,
        num_warps=tile.warps,
        num_stages=tile.stages,
        max_registers=max_registers,
        tile=tile,
        smaller=smaller,
        A=spec.action_dim,
        AP=s.AP,
        HP=s.HP,
        L=s.L,
        ROWS=tile.rows,
        CHUNK=min(tile.chunk, s.HP),
        STAGES=tile.stages,
        GROUPS=groups(tile, s),
        HOLD=small(tile, s),
        PRECISION=edge_precision(precision),
        EDGE=edge_precision(precision),
        BF16=precision == "bf16",
        EMULATE=INTERPRETED,
        **constants,
    )
