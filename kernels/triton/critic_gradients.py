"""Gradients of parameters and states from what the fused critic backward leaves behind: two launches, no atomics.

As in `weight_gradients`, every weight's gradient is one product d_z^T inputs over all rows, and the first launch takes
all of them at once, of both networks, rows split among images where that makes too few programs. The second adds the
images in order, and what the two networks say of states and actions.

    image:  d_flat [P]

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, S state size, A action size, AP padded, H
hidden width, HP padded, L hidden layers, P size of the flat buffer, n networks run.
"""

# What annotates a kernel's parameters is for launch.py, and no type of Python's.
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..layout import CriticSpec
from .chain_gradients import outer_product, row_range, state_gradient
from .launch import INTERPRETED, Kernel, multiprocessors
from .packing import cdiv, first_layer, packed_sizes, rounded
from .prologue import edge_precision

Tensor = torch.Tensor
_SIDE = 64  # of a tile of a gradient
_CHUNK = 32 if not INTERPRETED else 128  # rows at a time
_LEAST_ROWS = 128  # of a part
_STATES = 16  # a program of the states' gradient
_BLOCK = 1024 if not INTERPRETED else 1 << 15  # elements a program adds


@triton.jit
def _critic_products(
    flat: "*fp32",  # [P]
    states: "*fp32 any",  # [B, S]
    actions: "*fp32 any",  # [R, A]
    operands: "*op",  # see twin_critic
    d_q: "*fp32 any",  # [n, R]
    d_first: "*fp32",  # [n, RP, HP]
    d_operands: "*op",  # [n, L - 1, RP, HP]
    images: "*fp32",  # [parts, P], written where a parameter of a network that was run lies
    d_states: "*fp32",  # [n, B, S], written
    FIRST: "i32",  # number of the first network that was run
    R: "i32",
    RP: "i64",
    B: "i32",
    N: "i32",
    P: tl.constexpr,
    APART: tl.constexpr,  # in flat, from the first network to the second
    S: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    W_STATE: tl.constexpr,  # offsets in flat: first layer's state and action columns, its bias, second layer, ...
    W_X: tl.constexpr,
    BIAS: tl.constexpr,
    STRIDE: tl.constexpr,
    W_HIDDEN: tl.constexpr,
    B_HIDDEN: tl.constexpr,
    NEXT: tl.constexpr,  # from one hidden layer to the next
    W_OUT: tl.constexpr,
    B_OUT: tl.constexpr,
    SIDE: tl.constexpr,
    SS: tl.constexpr,  # side of a tile over states
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    STATES: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pid = tl.program_id(0)
    nth = tl.program_id(2).to(tl.int64)
    network = FIRST + nth
    activations = operands + 4 * (L - 1) * HP * HP + nth * L * RP * HP
    d_hidden = d_operands + nth * (L - 1) * RP * HP
    d_z = d_first + nth * RP * HP
    image = images + tl.program_id(1).to(tl.int64) * P + network * APART
    T: tl.constexpr = HP // SIDE
    HIDDEN: tl.constexpr = (L - 1) * T * T if PARAMETERS else 0
    OTHER: tl.constexpr = T if PARAMETERS else 0
    WITH_STATES: tl.constexpr = T * ((S + SS - 1) // SS) if PARAMETERS else 0
    first, last = row_range(R.to(tl.int64), CHUNK)
    if pid < HIDDEN:
        layer, tile = pid // (T * T), pid % (T * T)
        outer_product(
            d_hidden + layer * RP * HP, activations + layer * RP * HP, image + W_HIDDEN + layer * NEXT,
            image + B_HIDDEN + layer * NEXT, first, last, tile // T * SIDE, tile % T * SIDE, H, H, 1,
            HP, HP, HP, H, False, True, False, False, SIDE, SIDE, CHUNK, STAGES, PRECISION, EMULATE,
        )  # fmt: skip
    elif pid < HIDDEN + OTHER:
        # The actions' rows are not padded: as rows that are shared by one candidate each, their ends are masked.
        outer_product(
            d_z, actions, image + W_X, image + BIAS, first, last, (pid - HIDDEN) * SIDE, 0, H, A, 1,
            HP, A, A, STRIDE, True, True, True, True, SIDE, AP, CHUNK, 1, EDGE, EMULATE,
        )  # fmt: skip
    elif pid < HIDDEN + 2 * OTHER:
        if PARAMETERS:
            tile = pid - HIDDEN - OTHER
            column = tile * SIDE + tl.arange(0, SIDE)
            h_last = activations + (L - 1) * RP * HP
            d_weight, d_bias = tl.zeros((SIDE,), tl.float32), tl.zeros((CHUNK,), tl.float32)
            for start in range(first, last, CHUNK):
                r = start + tl.arange(0, CHUNK)
                d = tl.load(d_q + nth * R + r, r < last, 0.0)
                h = tl.load(h_last + r[:, None] * HP + column[None, :], (r < last)[:, None], 0.0)  # [CHUNK, SIDE]
                d_weight += tl.sum(d[:, None] * h.to(tl.float32), axis=0)
                d_bias += d
            tl.store(image + W_OUT + column, d_weight, column < H)
            if tile == 0:
                tl.store(image + B_OUT, tl.sum(d_bias))
    elif pid < HIDDEN + 2 * OTHER + WITH_STATES:
        tile = pid - HIDDEN - 2 * OTHER
        outer_product(
            d_z, states, image + W_STATE, image, first, last, tile % T * SIDE, tile // T * SS, H, S, N,
            HP, S, S, STRIDE, True, False, True, True, SIDE, SS, CHUNK, 1, EDGE, EMULATE,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        tile = pid - HIDDEN - 2 * OTHER - WITH_STATES
        SLICES: tl.constexpr = (S + SS - 1) // SS
        state_gradient(d_z, flat + W_STATE + network * APART, d_states + nth * B * S, tile // SLICES,
                        tile % SLICES * SS, B, N, S, H, HP, STRIDE, STATES, SS, SIDE, EDGE, EMULATE)  # fmt: skip


@triton.jit
def _add_planes(planes, out, block, size, n, BLOCK: tl.constexpr):
    """out[i] = the sum over n planes [n, size], in order, for the block's elements i."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for plane in range(n):
        total += tl.load(planes + plane * size + i, i < size, 0.0)
    tl.store(out + i, total, i < size)


@triton.jit
def _critic_finish(
    owners: "*i8",  # [P]: of which network the element is a parameter, or -1
    images: "*fp32",  # [parts, P]
    each_states: "*fp32",  # [n, B, S]
    each_actions: "*fp32",  # [n, R, A]
    d_flat: "*fp32",  # [P], written
    d_states: "*fp32",  # [B, S], written
    d_actions: "*fp32",  # [R, A], written
    FIRST: "i32",  # number of the first network that was run
    n: "i32",
    parts: "i32",
    P: "i64",  # 0 where d_flat is not needed, and so on
    n_states: "i64",
    n_actions: "i64",
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    flat_blocks, state_blocks = tl.cdiv(P, BLOCK), tl.cdiv(n_states, BLOCK)
    if pid < flat_blocks:
        i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        owner = tl.load(owners + i, i < P, -1)
        mine = (owner >= FIRST) & (owner < FIRST + n)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            total += tl.load(images + part * P + i, mine, 0.0)
        tl.store(d_flat + i, total, i < P)
    elif pid < flat_blocks + state_blocks:
        _add_planes(each_states, d_states, pid - flat_blocks, n_states, n, BLOCK)
    else:
        _add_planes(each_actions, d_actions, pid - flat_blocks - state_blocks, n_actions, n, BLOCK)


class CriticGradients:
    """The gradients of twin critics of one size on one device in one precision; it holds no parameters."""

    def __init__(self, spec: CriticSpec, precision: str, device: torch.device) -> None:
        self.spec, self.sizes, self.device = spec, packed_sizes(spec), device
        self.products = {
            parameters: critic_products_kernel(spec, precision, parameters) for parameters in (False, True)
        }
        self.finish = critic_finish_kernel()
        self.owners = _owners(spec).to(device)
        self.processors = multiprocessors(device)

    def compute(
        self,
        flat: Tensor,
        states: Tensor,
        actions: Tensor,
        operands: Tensor,
        d_q: Tensor,
        d_first: Tensor | None,
        d_operands: Tensor,
        each_actions: Tensor | None,
        first: int,
        RP: int,
        need_parameters: bool,
        need_states: bool,
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_flat [P], d_states [B, S], d_actions [R, A]), None where not needed, from `twin_critic`'s buffers.

        `each_actions` is [n, R, A], or None where d_actions is not needed; `first` is the first network that was run.
        d_flat is `into`, or new.
        """
        (B, S), (n, R), s = states.shape, d_q.shape, self.sizes
        T = s.HP // _side(s.HP)
        P, programs, parts = self.spec.layout.size if need_parameters else 0, 0, 1
        each_states = None
        if need_states:
            each_states = torch.empty(n, B, S, dtype=torch.float32, device=self.device)
            programs = cdiv(B, _STATES) * cdiv(S, _side(S))
        if need_parameters:
            squares = (s.L - 1) * T * T
            programs += squares + 2 * T + T * cdiv(S, _side(S))
            parts = max(1, min(cdiv(2 * self.processors, n * squares), RP // _LEAST_ROWS))
        images = torch.empty(parts * P, dtype=torch.float32, device=self.device)
        if programs:
            self.products[need_parameters].launch(
                (programs, parts, n),
                flat, states, actions, operands, d_q, d_first, d_operands, images, each_states, first, R, RP, B, R // B,
            )  # fmt: skip
        d_flat = None
        if need_parameters:
            d_flat = torch.empty(P, dtype=torch.float32, device=self.device) if into is None else into
        d_states, n_states = self._of_one(each_states, n)
        d_actions, n_actions = self._of_one(each_actions, n)
        blocks = sum(cdiv(size, _BLOCK) for size in (P, n_states, n_actions))
        if blocks:
            self.finish.launch(
                (blocks, 1, 1),
                self.owners, images, each_states, each_actions, d_flat, d_states, d_actions, first, n, parts,
                P, n_states, n_actions,
            )  # fmt: skip
        return d_flat, d_states, d_actions

    def _of_one(self, each: Tensor | None, n: int) -> tuple[Tensor | None, int]:
        """(where the sum over networks goes, how many elements are to be added): of one network there is no sum."""
        if each is None or n == 1:
            return None if each is None else each[0], 0
        return torch.empty(each.shape[1:], dtype=torch.float32, device=self.device), each[0].numel()


def _side(size: int) -> int:
    return min(_SIDE, rounded(size))


def _owners(spec: CriticSpec) -> Tensor:
    """int8 [P]: 0 or 1 where a parameter of that network lies, -1 in the gaps."""
    owners = torch.full((spec.layout.size,), -1, dtype=torch.int8, device="cpu")
    for name, view in spec.layout.views(owners).items():
        view.fill_(int(name.startswith("q2")))
    return owners


@lru_cache(maxsize=256)
def critic_products_kernel(spec: CriticSpec, precision: str, with_parameters: bool) -> Kernel:
    """The kernel of all products; without parameters that of the states' gradient alone."""
    slots, s, first = {slot.name: slot.offset for slot in spec.layout.slots}, packed_sizes(spec), first_layer(spec)
    return Kernel.of(
        _critic_products,
        num_warps=4,
        max_registers=255,
        P=spec.layout.size,
        APART=first_layer(spec, 1).states - first.states,
        S=spec.state_dim,
        A=spec.action_dim,
        AP=s.AP,
        H=spec.hidden_dim,
        HP=s.HP,
        L=s.L,
        W_STATE=first.states,
        W_X=first.states + spec.state_dim,
        BIAS=first.bias,
        STRIDE=first.stride,
        W_HIDDEN=slots["q1_model.2.weight"],
        B_HIDDEN=slots["q1_model.2.bias"],
        NEXT=slots["q1_model.4.weight"] - slots["q1_model.2.weight"],
        W_OUT=slots[f"q1_model.{2 * s.L}.weight"],
        B_OUT=slots[f"q1_model.{2 * s.L}.bias"],
        SIDE=_side(s.HP),
        SS=_side(spec.state_dim),
        CHUNK=_CHUNK,
        STAGES=3,
        PRECISION=edge_precision(precision),
        EDGE=edge_precision(precision),
        STATES=_STATES,
        PARAMETERS=with_parameters,
        BF16=precision == "bf16",
        EMULATE=INTERPRETED,
    )


@lru_cache(maxsize=1)
def critic_finish_kernel() -> Kernel:
    """The kernel that adds images and networks."""
    return Kernel.of(_critic_finish, num_warps=4, BLOCK=_BLOCK)
