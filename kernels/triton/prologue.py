"""What a fused kernel needs before it starts, in one launch: packed weights, the time table, the states' part.

    packed weights   the gathers of `packing`, rounded to the operands that products take
    time table       [K, HP]: W_t time_mlp(embedding_k) + b of the denoiser's first layer
    state part       [B, HP]: W_s s; of critics, which have no time, [2, B, HP]: W_s s + b

All of it depends on parameters and states alone, none of it on another part: each program does one piece of one part.

Letters: B states, S state size, D time size, DP and TP padded D and 2 D, HP padded hidden width, K steps.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..layout import ACTIVATIONS, CriticSpec, DenoiserSpec
from .launch import INTERPRETED, Kernel, fixed
from .ops import activate, dot, edge_operand, stored
from .packing import cdiv, first_layer, gather_index, packed_sizes, rounded

Tensor = torch.Tensor
_BLOCK = 1024 if not INTERPRETED else 1 << 16  # elements a program gathers
_STEPS = 16  # a program of the time table
_STATES = 16  # a program of the state part


@triton.jit
def _prologue(
    flat: "*fp32",  # [P]
    index_floats: "*i32",
    index_operands: "*i32",
    embedding: "*fp32",  # [K, D]; null for critics
    states: "*fp32 any",  # [B, S]
    floats: "*fp32",  # written: packed floats, time table, state part
    operands: "*op",  # written: packed operands
    told: "*i32",  # [1], set to 1 if a state holds NaN or infinity, if tell; on the device or in pinned memory
    n_floats: "i32",
    n_operands: "i32",
    K: "i32",  # 0 for critics
    B: "i32",
    tell: "i32",
    counter: "*i32",  # with COUNT: [1], set to 0
    S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    W_1: tl.constexpr,  # offsets in flat: time_mlp.1.weight, its bias, ...
    B_1: tl.constexpr,
    W_3: tl.constexpr,
    B_3: tl.constexpr,
    W_TIME: tl.constexpr,  # the first layer's time columns, its state columns, the distance of its rows, its bias
    W_STATE: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    APART: tl.constexpr,  # from the first critic to the second; 0 for a denoiser
    FLOATS: tl.constexpr,  # size of a network's packed floats
    FROM: tl.constexpr,  # of them FROM .. TO - 1 are packed as operands of float32 products
    TO: tl.constexpr,
    KIND: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
    SLICE: tl.constexpr,  # of S at a time
    COUNT: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pid = tl.program_id(0)
    float_blocks, operand_blocks = tl.cdiv(n_floats, BLOCK), tl.cdiv(n_operands, BLOCK)
    step_blocks = tl.cdiv(K, STEPS)
    column = tl.arange(0, HP)
    if COUNT:
        tl.store(counter, 0, pid == 0)
    if pid < float_blocks:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(index_floats + i, i < n_floats, -1)
        number = tl.load(flat + at, at >= 0, 0.0)
        of_product = (i % FLOATS >= FROM) & (i % FLOATS < TO)
        tl.store(floats + i, tl.where(of_product, edge_operand(number, EDGE, EMULATE), number), i < n_floats)
    elif pid < float_blocks + operand_blocks:
        i = (pid - float_blocks) * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(index_operands + i, i < n_operands, -1)
        number = tl.load(flat + at, at >= 0, 0.0)
        if BF16:
            operand = stored(number, BF16, EMULATE)
        else:
            operand = edge_operand(number, EDGE, EMULATE)
        tl.store(operands + i, operand, i < n_operands)
    elif pid < float_blocks + operand_blocks + step_blocks:
        if D > 0:
            k = (pid - float_blocks - operand_blocks) * STEPS + tl.arange(0, STEPS)
            d, t = tl.arange(0, DP), tl.arange(0, TP)
            d_in, t_in = d < D, t < 2 * D
            e = tl.load(embedding + k[:, None] * D + d[None, :], (k < K)[:, None] & d_in[None, :], 0.0)  # [STEPS, DP]
            w = tl.load(flat + W_1 + t[None, :] * D + d[:, None], d_in[:, None] & t_in[None, :], 0.0)  # [DP, TP]
            e, w = edge_operand(e, EDGE, EMULATE), edge_operand(w, EDGE, EMULATE)
            z = dot(e, w, None, EDGE, EMULATE) + tl.load(flat + B_1 + t, t_in, 0.0)[None, :]
            h = edge_operand(activate(z, KIND), EDGE, EMULATE)  # [STEPS, TP]
            w = tl.load(flat + W_3 + d[None, :] * (2 * D) + t[:, None], t_in[:, None] & d_in[None, :], 0.0)  # [TP, DP]
            w = edge_operand(w, EDGE, EMULATE)
            features = dot(h, w, None, EDGE, EMULATE) + tl.load(flat + B_3 + d, d_in, 0.0)[None, :]
            w = tl.load(flat + W_TIME + column[None, :] * STRIDE + d[:, None],
                        d_in[:, None] & (column < H)[None, :], 0.0)  # fmt: skip  # [DP, HP]
            features, w = edge_operand(features, EDGE, EMULATE), edge_operand(w, EDGE, EMULATE)
            row = dot(features, w, None, EDGE, EMULATE) + tl.load(flat + BIAS + column, column < H, 0.0)[None, :]
            tl.store(floats + n_floats + k[:, None] * HP + column[None, :], row, (k < K)[:, None])
    else:
        tiles = tl.cdiv(B, STATES)
        pid -= float_blocks + operand_blocks + step_blocks
        network, tile = pid // tiles, (pid % tiles).to(tl.int64)
        b = tile * STATES + tl.arange(0, STATES)
        weight = flat + W_STATE + network * APART
        part = tl.zeros((STATES, HP), tl.float32)
        if D == 0:
            part += tl.load(flat + BIAS + network * APART + column, column < H, 0.0)[None, :]
        seen = tl.zeros((STATES, SLICE), tl.int32)
        for start in range(0, S, SLICE):
            i = start + tl.arange(0, SLICE)
            s = tl.load(states + b[:, None] * S + i[None, :], (b < B)[:, None] & (i < S)[None, :], 0.0)
            seen = tl.where(tl.abs(s) < float("inf"), seen, 1)  # 1: NaN or infinity
            w = tl.load(weight + column[None, :] * STRIDE + i[:, None], (i < S)[:, None] & (column < H)[None, :], 0.0)
            s, w = edge_operand(s, EDGE, EMULATE), edge_operand(w, EDGE, EMULATE)
            part = dot(s, w, part, EDGE, EMULATE)
        # Of a bad state every column is NaN, and with it all that follows from that state: infinity alone might end as
        # an action within the bounds.
        bad = tl.max(seen, axis=1) > 0  # [STATES]
        part = tl.where(bad[:, None], float("nan"), part)
        if tell != 0:
            tl.store(told + tl.zeros((STATES,), tl.int32), 1, bad)
        out = floats + n_floats + K.to(tl.int64) * HP + network.to(tl.int64) * B * HP
        tl.store(out + b[:, None] * HP + column[None, :], part, (b < B)[:, None])


class Prologue:
    """The prologue of one network: its kernel, prepared for a precision, with or without transposed weights, with or
    without a counter that it sets to 0 for the kernel after it."""

    def __init__(
        self,
        spec: DenoiserSpec | CriticSpec,
        precision: str,
        transposed: bool,
        device: torch.device,
        count: bool = False,
    ) -> None:
        self.index = gather_index(spec, transposed, device)
        self.kernel = prologue_kernel(spec, precision, count)
        self.networks = packed_sizes(spec).networks
        self.lengths = [len(index) for index in self.index]
        self._fixed = [fixed(index) for index in self.index]
        self.blocks = sum(cdiv(length, _BLOCK) for length in self.lengths)

    def launch(
        self,
        flat: Tensor,
        embedding: Tensor | int | None,
        K: int,
        states: Tensor,
        floats: Tensor | int,
        operands: Tensor | int,
        told: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> None:
        """Fills the heads of `floats` and `operands`; these and the embedding [K, D] are tensors or addresses.

        Where a state holds NaN or infinity, its part is NaN throughout and `told` (int32 [1], on the device or in
        pinned memory, or None) is set to 1. Of one with a counter, that is int32 [1].
        """
        B = states.size(0)
        programs = self.blocks + cdiv(K, _STEPS) + self.networks * cdiv(B, _STATES)
        on_floats, on_operands = self._fixed
        self.kernel.launch(
            (programs, 1, 1),
            flat, on_floats, on_operands, embedding, states, floats, operands,
            on_floats if told is None else told, *self.lengths, K, B, int(told is not None),
            on_floats if counter is None else counter,
        )  # fmt: skip


@lru_cache(maxsize=256)
def prologue_kernel(spec: DenoiserSpec | CriticSpec, precision: str, count: bool = False) -> Kernel:
    """The kernel for a network of these sizes; with `count` it sets a counter to 0."""
    slots = {slot.name: slot.offset for slot in spec.layout.slots}
    first, s = first_layer(spec), packed_sizes(spec)
    # W_x and W_out. A critic's W_out is no operand; in bf16 a denoiser's are operands of tf32 in one pass and of bf16
    # in the other, and are rounded there: once, not twice.
    of_products = (s.L - 1) * s.HP + s.AP
    end = s.floats
    if isinstance(spec, CriticSpec):
        end = of_products + s.HP * s.AP
    elif precision == "bf16":
        end = of_products
    time: dict[str, Any]
    if isinstance(spec, DenoiserSpec):
        D = spec.time_dim
        offsets = [slots[f"time_mlp.{i}.{part}"] for i in (1, 3) for part in ("weight", "bias")]
        time = {"D": D, "DP": rounded(D), "TP": rounded(2 * D), "APART": 0, "W_TIME": first.states - D}
    else:
        offsets = [0] * 4
        time = {"D": 0, "DP": 16, "TP": 16, "APART": first_layer(spec, 1).states - first.states, "W_TIME": 0}
    time_mlp: dict[str, Any] = dict(zip(("W_1", "B_1", "W_3", "B_3"), offsets, strict=True))
    return Kernel.of(
        _prologue,
        num_warps=8,
        S=spec.state_dim,
        **time,
        H=spec.hidden_dim,
        HP=s.HP,
        **time_mlp,
        W_STATE=first.states,
        STRIDE=first.stride,
        BIAS=first.bias,
        FLOATS=s.floats,
        FROM=of_products,
        TO=end,
        KIND=ACTIVATIONS.index(spec.activation),
        EDGE=edge_precision(precision),
        BLOCK=_BLOCK,
        STEPS=_STEPS,
        STATES=_STATES,
        SLICE=min(16 if precision == "fp32" else 32, rounded(spec.state_dim)),
        COUNT=count,
        BF16=precision == "bf16",
        EMULATE=INTERPRETED,
    )


def edge_precision(precision: str) -> str:
    """How `ops.dot` multiplies float32: three products of tf32 parts make one that is as exact as float32's own. One
    product of "tf32" is of operands that `ops.edge_operand` rounded: tensor cores would cut them off."""
    return "tf32x3" if precision == "fp32" else "tf32"
