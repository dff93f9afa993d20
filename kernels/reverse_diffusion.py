"""The reverse-diffusion chain in one Triton kernel, and its gradient in one more: the backend "triton".

    x = noise[0]                                                            # [R, A]
    for k in 0 .. K-1:
        eps = denoiser(x, t_k, s)
        x0  = clamp(a_k x - b_k eps, -max, +max)
        x   = c0_k x0 + cx_k x + cp_k x0_prev + s_k noise[k+1]              # s_{K-1} = 0
    action = clamp(x, -max, +max)

(Diffusion-QL, arXiv 2208.06193, eq. 1; `reference.chain_fwd` is the same in torch.) A program runs all K steps for a
tile of ROWS rows. x, x0 and the activations of the last layer stay in registers; see `tile_layers` for the others.

What a kernel is handed lies in two buffers, both made by `chain_buffers`:
    floats:    packed floats | time table [K, HP] | state part [B, HP] | x [RP, AP], with a backward pass [K, RP, AP] |
               with a backward pass: a_k x - b_k eps, and last the action, before clamping [K + 1, RP, AP]
    operands:  packed operands | without a backward pass: two activations of each tile [tiles, 2, ROWS, HP]; with one:
               activations [L, K, RP, HP] | slopes [L, K, RP, HP]

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, A action size, AP padded, HP padded hidden
width, L hidden layers, K steps.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel, architecture, multiprocessors
from .layout import ACTIVATIONS, DenoiserSpec
from .packing import PackedSizes, packed_sizes
from .prologue import Prologue, edge_precision
from .tile_layers import narrow_product, narrow_product_from, product
from .tiles import Shape, Tile, choose
from .triton_ops import activate, activate_with_slope, normals, rounded_operand
from .weight_gradients import ChainGradients

Tensor = torch.Tensor
NARROW = tl.constexpr(8192)  # AP * HP from which on the first layer's weight does not fit into the registers


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
    state_part = time_table + K * HP
    xs = state_part + B.to(tl.int64) * HP
    raws = xs + K * RP * AP
    weights = operands
    activations = weights + (L - 1) * HP * HP * (2 if SAVE else 1)
    slopes = activations + L * K * RP * HP

    seed = tl.load(seed_at, seed_in_memory != 0, seed)
    at_state = state_part + (tl.minimum(row, R - 1) // N)[:, None] * HP + column[None, :]  # [ROWS, HP]
    if HOLD:
        of_state = tl.load(at_state)
    if AP * HP < NARROW:
        w_action = tl.load(w_x + column[None, :] * AP + dim[:, None])  # [AP, HP]
    b_out = tl.load(output_bias + dim)[None, :]

    if NOISE:
        x = tl.load(noise + cell, live, 0.0)  # [ROWS, AP]
    else:
        x = tl.where(live, normals(seed, row, 0, 0, AP), 0.0)
    x0_previous = tl.zeros((ROWS, AP), tl.float32)
    turn = 0
    hidden = activations
    for k in range(K):
        step = steps + k * 8
        if not HOLD:
            of_state = tl.load(at_state)
        z = tl.load(time_table + k * HP + column)[None, :] + of_state
        x_at = xs + (k if SAVE else 0) * RP * AP
        if SAVE or AP * HP >= NARROW:
            tl.store(x_at + corner, x)
        if AP * HP < NARROW:
            z = tl.dot(x, w_action, z, input_precision=EDGE)  # [ROWS, HP]
        else:
            tl.debug_barrier()
            z = product(z, x_at + tile * ROWS * AP, w_x, AP, 1, ROWS, HP, AP, 16, 2, EDGE)
        for layer in tl.static_range(L):
            if layer > 0:
                bias = tl.load(biases + (layer - 1) * HP + column)[None, :]
                z = product(bias + tl.zeros((ROWS, HP), tl.float32), hidden, weights + (layer - 1) * HP * HP,
                            HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION)  # fmt: skip
            at = ((layer * K + k) * RP + tile * ROWS) * HP
            if SAVE:
                h, slope = activate_with_slope(z, KIND)
                tl.store(slopes + at + place, rounded_operand(slope, BF16, EMULATE))
                hidden = activations + at
            else:
                h = activate(z, KIND)
                if layer < L - 1 or GROUPS == 0:  # what is stored goes to the two places in turn
                    hidden = activations + (tile * 2 + turn) * ROWS * HP
                    turn = 1 - turn
            h = rounded_operand(h, BF16, EMULATE)
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
        if SAVE:
            tl.store(raws + k * RP * AP + corner, raw)
        x = tl.load(step + 2) * x0 + tl.load(step + 3) * x + tl.load(step + 4) * x0_previous
        if k + 1 < K:  # no noise in the last step: the posterior variance is 0 there
            if NOISE:
                drawn = tl.load(noise + (k + 1) * plane + cell, live, 0.0)
            else:
                drawn = tl.where(live, normals(seed, row, k + 1, 0, AP), 0.0)
            x += tl.load(step + 5) * drawn
        x0_previous = x0
    if SAVE:
        tl.store(raws + K * RP * AP + corner, x)
    tl.store(actions + cell, tl.where(x > max_action, max_action, tl.where(x < -max_action, -max_action, x)), live)


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
    tile = tl.program_id(0).to(tl.int64)
    RP = tl.num_programs(0).to(tl.int64) * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dim, column = tl.arange(0, AP), tl.arange(0, HP)
    live = (row < R)[:, None] & (dim < A)[None, :]  # [ROWS, AP]
    corner = row[:, None] * AP + dim[None, :]
    place = tl.arange(0, ROWS)[:, None] * HP + column[None, :]

    w_x = floats + L * HP - HP + AP
    w_out = w_x + HP * AP
    raws = w_out + AP * HP + (K + B.to(tl.int64)) * HP + K * RP * AP
    turned = operands + (L - 1) * HP * HP
    slopes = turned + (L - 1) * HP * HP + L * K * RP * HP
    if AP * HP < NARROW:
        w_back = tl.load(w_out + dim[:, None] * HP + column[None, :])  # [AP, HP]

    last = tl.load(raws + K * RP * AP + corner)
    d_x = tl.load(d_actions + row[:, None] * A + dim[None, :], live, 0.0)  # [ROWS, AP]
    d_x = tl.where(tl.abs(last) <= max_action, d_x, 0.0)
    d_x0_carried = tl.zeros((ROWS, AP), tl.float32)  # from the next step's cp * x0_prev
    sums = d_floats + K * RP * AP + (tile * ROWS) * HP + place
    if HOLD:
        d_state_part = tl.zeros((ROWS, HP), tl.float32)
    for back in range(K):
        k = K - 1 - back
        step = steps + k * 8
        raw = tl.load(raws + k * RP * AP + corner)
        d_raw = tl.where(tl.abs(raw) <= max_action, tl.load(step + 2) * d_x + d_x0_carried, 0.0)
        d_x0_carried = tl.load(step + 4) * d_x
        d_eps = -tl.load(step + 1) * d_raw
        tl.store(d_floats + k * RP * AP + corner, d_eps)
        if AP * HP < NARROW:
            d_h = tl.dot(d_eps, w_back, input_precision=EDGE)  # [ROWS, HP]
        else:
            tl.debug_barrier()
            d_h = product(tl.zeros((ROWS, HP), tl.float32), d_floats + (k * RP + tile * ROWS) * AP, w_out,
                          1, HP, ROWS, HP, AP, 16, 2, EDGE)  # fmt: skip
        for up in tl.static_range(L):
            layer = L - 1 - up
            at = ((layer * K + k) * RP + tile * ROWS) * HP
            d_z = d_h * tl.load(slopes + at + place).to(tl.float32)
            d_z_operand = rounded_operand(d_z, BF16, EMULATE)
            tl.store(d_operands + at + place, d_z_operand)
            if layer > 0 or GROUPS == 0:
                tl.debug_barrier()
            if layer > 0:
                d_h = product(tl.zeros((ROWS, HP), tl.float32), d_operands + at, turned + (layer - 1) * HP * HP,
                              HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION)  # fmt: skip
        if HOLD:
            d_state_part += d_z
        else:  # in memory: the barriers above order this after the store of the step before
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


@dataclass(eq=False)
class ChainSaved:
    """What `ChainRunner.backward` needs of a forward pass."""

    floats: Tensor
    operands: Tensor
    rows: int  # RP


class ChainRunner:
    """Chains of one denoiser on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the denoiser.
        table: [K, 8], the rows of the step table, padded with two zeros.
        embedding: [K, D], of the timesteps.
        max_action: bound of actions and predicted x0.
        precision: "fp32", "tf32" or "bf16".
    """

    def __init__(self, spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str) -> None:
        self.spec, self.table, self.embedding, self.precision = spec, table, embedding, precision
        self.max_action = max_action
        self.sizes = packed_sizes(spec)
        self.device = table.device
        self.arch, self.processors = architecture(self.device), multiprocessors(self.device)
        self._prologues = {save: Prologue(spec, precision, save, self.device) for save in (False, True)}
        self._gradients = ChainGradients(spec, precision, self.device)
        self.operand = torch.bfloat16 if precision == "bf16" and not INTERPRETED else torch.float32

    def forward(
        self, flat: Tensor, states: Tensor, candidates: int, noise: Tensor | None, seed: int | Tensor, save: bool
    ) -> tuple[Tensor, ChainSaved | None]:
        """Runs the chain.

        Args:
            flat: parameters [P].
            states: [B, S], contiguous.
            candidates: N.
            noise: [K, R, A], contiguous, or None: then the seed's stream.
            seed: 0 .. 2^64 - 1; or an int64 tensor [1] on the device, read when the kernel runs.
            save: keep what `backward` needs.

        Returns:
            (actions [R, A], saved or None).
        """
        B = len(states)
        plan = self.plan(B, candidates, noise is not None, save)
        actions = torch.empty(B * candidates, self.spec.action_dim, dtype=torch.float32, device=self.device)
        floats, operands = plan.run(flat, states, noise, seed, actions)
        return actions, ChainSaved(floats, operands, plan.rows) if save else None

    def plan(self, B: int, candidates: int = 1, noise: bool = False, save: bool = False) -> "ChainPlan":
        """Everything about a forward pass that its tensors do not change."""
        K, s, R = len(self.table), self.sizes, B * candidates
        tile = self._tile("saving" if save else "forward", R)
        tiles = triton.cdiv(R, tile.rows)
        RP = tiles * tile.rows
        n_floats = s.floats + (K + B) * s.HP + (2 * K + 1 if save else 1) * RP * s.AP
        n_operands = s.operands * (1 + save) + s.HP * (2 * s.L * K * RP if save else 2 * RP)
        kernel = chain_fwd_kernel(self.spec, self.precision, tile, noise, save)
        return ChainPlan(self, self._prologues[save], kernel, tiles, RP, n_floats, n_operands, (R, B, candidates, K))

    def _tile(self, kind: str, rows: int) -> Tile:
        return choose(
            self.arch, self.processors, Shape(kind, self.sizes.HP, self.precision == "bf16", rows, self.sizes.AP)
        )

    def backward(
        self,
        flat: Tensor,
        saved: ChainSaved,
        states: Tensor,
        d_actions: Tensor,
        need_parameters: bool,
        need_states: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of `forward`.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous.
            d_actions: [R, A], contiguous.
            need_parameters: compute d_flat.
            need_states: compute d_states.

        Returns:
            (d_flat [P], d_states [B, S]), None where not needed. Where no parameter lies, d_flat holds anything.
        """
        B, R, K, s, RP = len(states), len(d_actions), len(self.table), self.sizes, saved.rows
        tile = self._tile("backward", R)
        while RP % tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        d_floats = torch.empty(K * RP * s.AP + RP * s.HP, dtype=torch.float32, device=self.device)
        d_operands = torch.empty(s.L * K * RP * s.HP, dtype=self.operand, device=self.device)
        chain_bwd_kernel(self.spec, self.precision, tile).launch(
            (RP // tile.rows, 1, 1),
            saved.floats, saved.operands, self.table, d_actions, d_floats, d_operands, self.max_action, R, B, K,
        )  # fmt: skip
        return self._gradients.compute(
            flat, self.embedding, states, saved.floats, saved.operands, d_floats, d_operands, RP, R,
            need_parameters, need_states,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChainPlan:
    """A forward pass of fixed size, ready to be run on any tensors of that size."""

    runner: ChainRunner
    prologue: Prologue
    kernel: Kernel
    tiles: int
    rows: int  # RP
    n_floats: int
    n_operands: int
    sizes: tuple[int, int, int, int]  # R, B, N, K

    def run(
        self, flat: Tensor, states: Tensor, noise: Tensor | None, seed: int | Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fills actions [R, A]; the other arguments are those of `ChainRunner.forward`. Returns (floats, operands)."""
        runner, device = self.runner, self.runner.device
        floats = torch.empty(self.n_floats, dtype=torch.float32, device=device)
        operands = torch.empty(self.n_operands, dtype=runner.operand, device=device)
        self.prologue.launch(flat, runner.embedding, states, floats, operands)
        at, number, in_memory = seed_arguments(seed, device)
        self.kernel.launch(
            (self.tiles, 1, 1),
            floats, operands, runner.table, noise, at, actions, number, runner.max_action, *self.sizes, in_memory,
        )  # fmt: skip
        return floats, operands


def small(tile: Tile, s: PackedSizes) -> bool:
    """Whether registers hold more than one tile of activations: found by compiling for sm_80 to sm_120."""
    return tile.rows <= 16 and NARROW.value > s.AP * s.HP


def groups(tile: Tile, s: PackedSizes) -> int:
    """Of `narrow_product`; 0 sends the last layer's inputs through memory."""
    return min(tile.warps, s.HP // 16) if small(tile, s) else 0


def seed_arguments(seed: int | Tensor, device: torch.device) -> tuple[Tensor, int, int]:
    """What kernels are told of a seed: (where it is, or anything; its bits as a signed number; whether it is there)."""
    if isinstance(seed, Tensor):
        return seed, 0, 1
    return _nowhere(device), seed - (1 << 64) if seed >> 63 else seed, 0


@lru_cache(maxsize=64)
def _nowhere(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def chain_fwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile, noise: bool, save: bool) -> Kernel:
    """The forward kernel for a denoiser, a precision and a tile."""
    s = packed_sizes(spec)
    return Kernel.of(
        _chain_fwd,
        num_warps=tile.warps,
        num_stages=tile.stages,
        A=spec.action_dim,
        AP=s.AP,
        HP=s.HP,
        L=s.L,
        KIND=ACTIVATIONS.index(spec.activation),
        ROWS=tile.rows,
        CHUNK=min(tile.chunk, s.HP),
        STAGES=tile.stages,
        GROUPS=groups(tile, s),
        HOLD=small(tile, s),
        PRECISION=edge_precision(precision),
        EDGE=edge_precision(precision),
        NOISE=noise,
        SAVE=save,
        BF16=precision == "bf16",
        EMULATE=INTERPRETED,
    )


@lru_cache(maxsize=256)
def chain_bwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile) -> Kernel:
    """The backward kernel for a denoiser, a precision and a tile."""
    s = packed_sizes(spec)
    return Kernel.of(
        _chain_bwd,
        num_warps=tile.warps,
        num_stages=tile.stages,
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
    )
