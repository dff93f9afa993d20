"""Twin critics in one Triton kernel, their gradient in one more, and the draw of `select` from their values.

    h = activation(W_s s + W_a a + b)              # [R, H]
    h = activation(W_i h + b_i)                    # layers 1 .. L-1
    Q = w_out . h + b_out                          # [R], of each of two networks

(Diffusion-QL, arXiv 2208.06193, section 3; `dql.TwinCritic` is the same in torch.) A program takes one network through
all layers for a tile of ROWS rows. With N candidates a state, the state's part is computed once a state. In tf32 and
bf16 the operands of products are rounded; h of the last layer and its weight, which no tensor core multiplies, are not,
nor is d_z of the first layer before the products that it is handed to.

What a kernel is handed lies in two buffers, for n networks run, of which the first is number FIRST:
    floats:    packed floats [2] | state part [2, B, HP]
    operands:  packed operands [2] | with a backward pass: the same transposed [2] | without one: two activations of
               each tile [n, tiles, 2, ROWS, HP]; with one: activations [n, L, RP, HP] | slopes [n, L, RP, HP]

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, S state size, A action size, AP padded, HP
padded hidden width, L hidden layers, P size of the flat buffer.
"""

# What annotates a kernel's parameters is for launch.py, and no type of Python's.
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..layout import ACTIVATIONS, CriticSpec
from ..limits import check_memory, too_many
from .critic_gradients import CriticGradients
from .launch import INTERPRETED, Kernel, architecture, fitting, multiprocessors
from .layers import narrow_product, product
from .ops import activate, activate_with_slope, dot, edge_operand, rounded_operand, stored, uniform
from .packing import cdiv, packed_sizes
from .prologue import Prologue, edge_precision
from .runner import seed_arguments
from .tiles import Shape, Tile, next_smaller
from .tiles import choose as choose_tile

Tensor = torch.Tensor


@triton.jit
def _critic_fwd(
    floats: "*fp32",  # see the module
    operands: "*op",
    actions: "*fp32 any",  # [R, A]
    q: "*fp32",  # [n, R], written
    FIRST: "i32",
    R: "i32",
    B: "i32",
    N: "i32",
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    KIND: tl.constexpr,  # of activation
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products in hidden layers
    EDGE: tl.constexpr,  # ... in the first
    SAVE: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    nth, n = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    network = FIRST + nth
    RP = tiles * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dim, column = tl.arange(0, AP), tl.arange(0, HP)
    place = tl.arange(0, ROWS)[:, None] * HP + column[None, :]  # in a tile of activations

    FLOATS: tl.constexpr = (L - 1) * HP + AP + HP * AP + HP
    biases = floats + network * FLOATS
    output_bias = biases + (L - 1) * HP
    w_x = output_bias + AP
    w_out = w_x + HP * AP
    state_part = floats + 2 * FLOATS + network * B * HP
    weights = operands + network * (L - 1) * HP * HP
    activations = operands + (L - 1) * HP * HP * (4 if SAVE else 2)
    slopes = activations + (n + nth) * L * RP * HP  # with SAVE
    if SAVE:
        activations += nth * L * RP * HP
    else:
        activations += (nth * tiles + tile) * 2 * ROWS * HP

    x = tl.load(actions + row[:, None] * A + dim[None, :], (row < R)[:, None] & (dim < A)[None, :], 0.0)  # [ROWS, AP]
    w_action = tl.load(w_x + column[None, :] * AP + dim[:, None])  # [AP, HP]
    z = tl.load(state_part + (tl.minimum(row, R - 1) // N)[:, None] * HP + column[None, :])  # [ROWS, HP]
    z = dot(edge_operand(x, EDGE, EMULATE), w_action, z, EDGE, EMULATE)
    hidden = activations
    for layer in tl.static_range(L):
        if layer > 0:
            bias = tl.load(biases + (layer - 1) * HP + column)[None, :]
            z = product(bias + tl.zeros((ROWS, HP), tl.float32), hidden, weights + (layer - 1) * HP * HP,
                        HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION, False, False, EMULATE)  # fmt: skip
        if SAVE:
            h, slope = activate_with_slope(z, KIND)
            at = (layer * RP + tile * ROWS) * HP
            hidden = activations + at
            tl.store(slopes + at + place, stored(slope, BF16, EMULATE))
            tl.store(hidden + place, rounded_operand(h, BF16, PRECISION, EMULATE))
        else:
            h = activate(z, KIND)
            if layer < L - 1:
                hidden = activations + (layer % 2) * ROWS * HP
                tl.store(hidden + place, rounded_operand(h, BF16, PRECISION, EMULATE))
        if layer < L - 1:
            tl.debug_barrier()
    value = tl.sum(h * tl.load(w_out + column)[None, :], axis=1) + tl.load(output_bias)  # [ROWS]
    tl.store(q + nth * R + row, value, row < R)


@triton.jit
def _critic_bwd(
    floats: "*fp32",  # what _critic_fwd was handed and saved
    operands: "*op",
    d_q: "*fp32 any",  # [n, R]
    d_first: "*fp32",  # with PRODUCTS, written: d_z of the first layer [n, RP, HP]
    d_operands: "*op",  # written: d_z of the others [n, L - 1, RP, HP]
    d_actions: "*fp32",  # with ACTIONS, written: [n, R, A]; with ONLY [R, A]
    only_at: "*fp32 any",  # with ONLY: [2], a 1 for the one that has a gradient and a 0, if only_in_memory
    FIRST: "i32",
    R: "i32",
    only: "i32",  # otherwise: its number, 0 or 1
    only_in_memory: "i32",
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    ACTIONS: tl.constexpr,
    PRODUCTS: tl.constexpr,  # the gradients of parameters or states are wanted too
    ONLY: tl.constexpr,  # of both, which were run, one has a gradient
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    nth, n = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    out = nth
    if ONLY:
        given = tl.load(only_at + 1, only_in_memory != 0, 0.0)
        nth, n = tl.where(only_in_memory != 0, (given != 0.0).to(tl.int64), only.to(tl.int64)), 2
    network = FIRST + nth
    RP = tl.num_programs(0).to(tl.int64) * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dim, column = tl.arange(0, AP), tl.arange(0, HP)
    place = tl.arange(0, ROWS)[:, None] * HP + column[None, :]

    FLOATS: tl.constexpr = (L - 1) * HP + AP + HP * AP + HP
    w_x = floats + network * FLOATS + (L - 1) * HP + AP
    w_out = w_x + HP * AP
    turned = operands + (2 + network) * (L - 1) * HP * HP
    slopes = operands + 4 * (L - 1) * HP * HP + (n + nth) * L * RP * HP
    of_layer = d_operands + nth * (L - 1) * RP * HP

    d = tl.load(d_q + nth * R + row, row < R, 0.0)  # [ROWS]
    d_h = d[:, None] * tl.load(w_out + column)[None, :]  # [ROWS, HP]
    for up in tl.static_range(L):
        layer = L - 1 - up
        d_z = d_h * tl.load(slopes + (layer * RP + tile * ROWS) * HP + place).to(tl.float32)
        if layer > 0:
            here = of_layer + ((layer - 1) * RP + tile * ROWS) * HP
            tl.store(here + place, rounded_operand(d_z, BF16, PRECISION, EMULATE))
            tl.debug_barrier()
            d_h = product(tl.zeros((ROWS, HP), tl.float32), here, turned + (layer - 1) * HP * HP,
                          HP, 1, ROWS, HP, HP, CHUNK, STAGES, PRECISION, False, False, EMULATE)  # fmt: skip
    if PRODUCTS:
        tl.store(d_first + (nth * RP + tile * ROWS) * HP + place, d_z)
    if ACTIONS:
        d_z = rounded_operand(d_z, False, EDGE, EMULATE)
        d_x = narrow_product(d_z, w_x, 1, AP, ROWS, HP, AP, GROUPS, EDGE, False, EMULATE)  # [ROWS, AP]
        live = (row < R)[:, None] & (dim < A)[None, :]
        tl.store(d_actions + out * R * A + row[:, None] * A + dim[None, :], d_x, live)


@triton.jit
def _pessimistic(q, n, N, R):
    """min(Q_1, Q_2) of candidates n of a state whose first is at q; NaN if one is, -infinity from N on."""
    first = tl.load(q + n, n < N, float("-inf"))
    second = tl.load(q + R + n, n < N, float("-inf"))
    return tl.minimum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _choose(
    q: "*fp32",  # [2, R]
    actions: "*fp32",  # [R, A]
    seed_at: "*i64 any",  # where the seed is, if seed_in_memory
    chosen: "*fp32",  # [B, A], written
    seed: "i64",  # otherwise
    R: "i64",
    N: "i32",
    seed_in_memory: "i32",
    A: tl.constexpr,
    AP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    q += b * N
    seed = tl.load(seed_at, seed_in_memory != 0, seed)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, N, BLOCK):
        highest = tl.maximum(highest, _pessimistic(q, start + tl.arange(0, BLOCK), N, R))
    highest = tl.max(highest)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        sums += tl.where(n < N, tl.exp(_pessimistic(q, n, N, R) - highest), 0.0)
    # A critic that has become NaN makes the sum NaN: nothing is below it, and the first candidate is taken.
    bar = uniform(seed, b, 0) * tl.sum(sums)
    before = tl.zeros((), tl.float32)
    passed = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        p = tl.where(n < N, tl.exp(_pessimistic(q, n, N, R) - highest), 0.0)
        passed += tl.sum(((before + tl.cumsum(p) <= bar) & (n < N)).to(tl.int32))
        before += tl.sum(p)
    dim = tl.arange(0, AP)
    action = tl.load(actions + (b * N + tl.minimum(passed, N - 1)) * A + dim, dim < A)
    tl.store(chosen + b * A + dim, action, dim < A)


@dataclass(eq=False)
class CriticSaved:
    """What `CriticRunner.backward` needs of a forward pass."""

    floats: Tensor
    operands: Tensor
    rows: int  # RP, whole tiles of `tile` too
    which: tuple[int, ...]
    tile: Tile  # of the backward pass


class CriticRunner:
    """Twin critics of one size on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the critics.
        precision: "fp32", "tf32" or "bf16"; the first and the last layer never have operands of bf16.
        device: where the tensors are.
    """

    def __init__(self, spec: CriticSpec, precision: str, device: torch.device) -> None:
        self.spec, self.precision, self.device = spec, precision, device
        self.sizes = packed_sizes(spec)
        self.arch, self.processors = architecture(device), multiprocessors(device)
        self._prologues = {save: Prologue(spec, precision, save, device) for save in (False, True)}
        self._gradients = CriticGradients(spec, precision, device)
        self.operand = torch.bfloat16 if precision == "bf16" and not INTERPRETED else torch.float32

    def forward(
        self, flat: Tensor, states: Tensor, actions: Tensor, candidates: int, which: tuple[int, ...], save: bool
    ) -> tuple[Tensor, CriticSaved | None]:
        """The Q values of the critics that `which` names.

        Args:
            flat: parameters of both critics [P].
            states: [B, S], contiguous.
            actions: [R, A], contiguous; row b * N + n is candidate n of state b.
            candidates: N.
            which: (0, 1), (0,) or (1,).
            save: keep what `backward` needs.

        Returns:
            (q [len(which), R], saved or None).

        Raises:
            ValueError: `which` is none of the three; more rows than the kernels' numbers of 32 bits count.
        """
        if which not in ((0, 1), (0,), (1,)):
            raise ValueError(f"which must be (0, 1), (0,) or (1,), the critics to run, got {which!r}")
        B, n, s = states.size(0), len(which), self.sizes
        R = B * candidates
        if (limit := too_many(R, 1)) is not None:
            raise ValueError(f"backend 'triton': {limit}")
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            actions=(actions, R * self.spec.action_dim),
        )
        kernel = self._fitting("saving" if save else "forward", n * R)
        tile: Tile = kernel.tile
        back: Tile = self._fitting("backward", n * R).tile if save else tile
        whole = max(tile.rows, back.rows)
        RP = cdiv(R, whole) * whole
        n_operands = 2 * s.operands * (1 + save) + n * RP * s.HP * (2 * s.L if save else 2)
        floats = torch.empty(2 * s.floats + 2 * B * s.HP, dtype=torch.float32, device=self.device)
        operands = torch.empty(n_operands, dtype=self.operand, device=self.device)
        q = torch.empty(n, R, dtype=torch.float32, device=self.device)
        self._prologues[save].launch(flat, None, 0, states, floats, operands)
        kernel.launch((RP // tile.rows, n, 1), floats, operands, actions, q, which[0], R, B, candidates)
        return q, CriticSaved(floats, operands, RP, which, back) if save else None

    def backward(
        self,
        flat: Tensor,
        saved: CriticSaved,
        states: Tensor,
        actions: Tensor,
        d_q: Tensor,
        need_parameters: bool,
        need_states: bool,
        need_actions: bool,
        only: int | Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradient of `forward`; the same arguments give the same bits.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous, as they were.
            actions: [R, A], contiguous, as they were.
            d_q: [len(which), R], contiguous.
            need_parameters: compute d_flat.
            need_states: compute d_states.
            need_actions: compute d_actions.
            only: of both critics the one whose d_q is not zero, 1 or 2, or float32 [2] on the device with a 1 for it
                and a 0. Of what is needed, actions alone are made the cheaper by it.
            into: where d_flat is written [P], contiguous; None: new memory.

        Returns:
            (d_flat [P], d_states [B, S], d_actions [R, A]), None where not needed. Where no parameter lies, or one of
            a critic that was not run, d_flat is zero.
        """
        (n, R), A, s, RP = d_q.shape, self.spec.action_dim, self.sizes, saved.rows
        if not (need_parameters or need_states or need_actions):
            return None, None, None
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, states.size(0) * self.spec.state_dim),
            actions=(actions, R * self.spec.action_dim),
            d_q=(d_q, len(saved.which) * R),
            only=(only if isinstance(only, Tensor) else None, 2),
            into=(into, self.spec.layout.size),
        )
        tile, products = saved.tile, need_parameters or need_states
        if only is not None and not products and n == 2:
            return None, None, self._of_only(saved, d_q, only)
        d_first = torch.empty(n, RP, s.HP, dtype=torch.float32, device=self.device) if products else None
        d_operands = torch.empty(n, s.L - 1, RP, s.HP, dtype=self.operand, device=self.device)
        each_actions = torch.empty(n, R, A, dtype=torch.float32, device=self.device) if need_actions else None
        critic_bwd_kernel(self.spec, self.precision, tile, need_actions, products).launch(
            (RP // tile.rows, n, 1),
            saved.floats, saved.operands, d_q, d_first, d_operands, each_actions, d_q, saved.which[0], R, 0, 0,
        )  # fmt: skip
        return self._gradients.compute(
            flat, states, actions, saved.operands, d_q, d_first, d_operands, each_actions, saved.which[0], RP,
            need_parameters, need_states, into,
        )  # fmt: skip

    def _of_only(self, saved: CriticSaved, d_q: Tensor, only: int | Tensor) -> Tensor:
        """d_actions [R, A] of the one critic that has a gradient, in one launch."""
        R, s, RP, tile = d_q.size(1), self.sizes, saved.rows, saved.tile
        at, number = (only, 0) if isinstance(only, Tensor) else (d_q, only - 1)
        d_operands = torch.empty(2, s.L - 1, RP, s.HP, dtype=self.operand, device=self.device)
        d_actions = torch.empty(R, self.spec.action_dim, dtype=torch.float32, device=self.device)
        critic_bwd_kernel(self.spec, self.precision, tile, True, False, True).launch(
            (RP // tile.rows, 1, 1),
            saved.floats, saved.operands, d_q, None, d_operands, d_actions, at, 0, R, number, int(at is only),
        )  # fmt: skip
        return d_actions

    def _fitting(self, kind: str, rows: int) -> Kernel:
        """The kernel for the tile that is chosen for a kind of a Shape, or the next smaller one that fits."""
        shape = Shape(kind, self.sizes.HP, self.precision == "bf16", rows, self.sizes.AP)
        tile = choose_tile(self.arch, self.processors, shape)
        if kind == "backward":  # with all its results it needs the most
            return fitting(critic_bwd_kernel(self.spec, self.precision, tile, True, True), self.device)
        return fitting(critic_fwd_kernel(self.spec, self.precision, tile, kind == "saving"), self.device)


def choose(q: Tensor, actions: Tensor, candidates: int, draw_seed: int | Tensor) -> Tensor:
    """Draws a candidate a state from softmax(min(Q_1, Q_2)): the first whose cumulative probability exceeds
    `dql.noise.uniform(draw_seed)`; of a critic that has become NaN, the first.

    Args:
        q: [2, R], contiguous, row b * N + n being candidate n of state b.
        actions: [R, A], contiguous.
        candidates: N.
        draw_seed: 0 .. 2^64 - 1, or an int64 tensor [1] on the device, read when the kernel runs.

    Returns:
        [B, A].
    """
    R, A = actions.shape
    chosen = torch.empty(R // candidates, A, dtype=torch.float32, device=actions.device)
    at, number, in_memory = seed_arguments(draw_seed, actions.device)
    kernel = choose_kernel(A, choose_block(candidates))
    kernel.launch((R // candidates, 1, 1), q, actions, at, chosen, number, R, candidates, in_memory)
    return chosen


def choose_block(candidates: int) -> int:
    """How many candidates the choosing kernel reads at a time."""
    return min(1024, max(32, 1 << (candidates - 1).bit_length()))


@lru_cache(maxsize=256)
def critic_fwd_kernel(spec: CriticSpec, precision: str, tile: Tile, save: bool) -> Kernel:
    """The forward kernel for critics, a precision and a tile."""

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else critic_fwd_kernel(spec, precision, less, save)

    return Kernel.of(
        _critic_fwd,
        num_warps=tile.warps,
        num_stages=tile.stages,
        tile=tile,
        smaller=smaller,
        **_sizes(spec, tile),
        KIND=ACTIVATIONS.index(spec.activation),
        **_precisions(precision),
        SAVE=save,
    )


@lru_cache(maxsize=256)
def critic_bwd_kernel(
    spec: CriticSpec, precision: str, tile: Tile, actions: bool, products: bool, only: bool = False
) -> Kernel:
    """The backward kernel for critics, a precision and a tile.

    Args:
        spec: sizes of the critics.
        precision: "fp32", "tf32" or "bf16".
        tile: how rows are laid on the GPU.
        actions: it writes the actions' gradient.
        products: it writes what the gradients of parameters and states are made of.
        only: of both critics one has a gradient, and it alone is run.
    """

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else critic_bwd_kernel(spec, precision, less, actions, products, only)

    return Kernel.of(
        _critic_bwd,
        num_warps=tile.warps,
        num_stages=tile.stages,
        tile=tile,
        smaller=smaller,
        **_sizes(spec, tile),
        GROUPS=min(tile.warps, packed_sizes(spec).HP // 16),
        **_precisions(precision),
        ACTIONS=actions,
        PRODUCTS=products,
        ONLY=only,
    )


@lru_cache(maxsize=256)
def choose_kernel(action_dim: int, block: int) -> Kernel:
    """The kernel that draws a candidate a state, reading `block` of them at a time."""
    AP = triton.next_power_of_2(action_dim)
    warps = 1 if block <= 256 else 4
    return Kernel.of(_choose, num_warps=warps, A=action_dim, AP=AP, BLOCK=block)


def _sizes(spec: CriticSpec, tile: Tile) -> dict[str, int]:
    s = packed_sizes(spec)
    sizes = {"A": spec.action_dim, "AP": s.AP, "HP": s.HP, "L": s.L, "ROWS": tile.rows}
    return sizes | {"CHUNK": min(tile.chunk, s.HP), "STAGES": tile.stages}


def _precisions(precision: str) -> dict[str, Any]:
    edge = edge_precision(precision)
    return {"PRECISION": edge, "EDGE": edge, "BF16": precision == "bf16", "EMULATE": INTERPRETED}
