"""Gradients of parameters and states from what the fused backward kernels leave behind: two launches, no atomics.

Every weight's gradient is one product d_z^T inputs over all rows of all steps. The first launch takes all of them at
once, a program for each tile of each of them; where that makes too few programs, the rows are split and each part goes
to an image of its own. The second adds the images in order and walks back through the time table. So the same call
gives the same bits. Operands of tf32 and bf16 are rounded before they are multiplied, never before they are added up:
but for d_z of the hidden layers, which is stored as an operand.

    image:  d_flat [P] | d_table [K, HP]

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, S state size, A action size, AP padded, H
hidden width, HP padded, L hidden layers, K steps, D time size, P size of the flat buffer.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..layout import ACTIVATIONS, DenoiserSpec
from .launch import INTERPRETED, Kernel, multiprocessors
from .ops import activate_with_slope, dot, edge_operand, rounded_operand
from .packing import cdiv, first_layer, packed_sizes, rounded
from .prologue import edge_precision

Tensor = torch.Tensor
_SIDE = 64  # of a tile of a gradient
_CHUNK = 32 if not INTERPRETED else 256  # rows at a time
_STEPS = 16  # of the time table at a time
_MAX_PARTS = 16  # of the rows: more make the adding up as long as the products
_COLUMNS = 32  # of the time table at a time


@triton.jit
def outer_product(
    d, x, out, bias, first, last, m, n, M, N, N_CANDIDATES,
    LDD: tl.constexpr, LDX: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    BIAS: tl.constexpr, SHARED: tl.constexpr, EXACT: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    more=None, last_of_more=0, MORE: tl.constexpr = False,
):  # fmt: skip
    """out[i, j] = sum over rows r of first .. last - 1 of d[r, i] x[r, j], for the tile of i and j at m and n.

    d, x, out: pointers; a row of d is LDD elements, one of x LDX, of which COLUMNS are there, one of out STRIDE.
    bias: pointer; with BIAS, bias[i] = the sum of d[r, i].
    M, N: elements with i < M, j < N alone are written.
    SHARED: x has one row for N_CANDIDATES rows of d, and is no operand yet.  EXACT: nor is d.
    MORE: a row of d below last_of_more is the sum of that and the same row of `more`.
    WIDE: operands are widened to float32 first.
    """
    i, j = m + tl.arange(0, TM), n + tl.arange(0, TN)
    total = tl.zeros((TM, TN), tl.float32)
    sums = tl.zeros((TM,), tl.float32)
    for start in tl.range(first, last, CHUNK, num_stages=STAGES):
        r = start + tl.arange(0, CHUNK)
        there = (r < last)[:, None]
        d_tile = tl.load(d + r[:, None] * LDD + i[None, :], there, 0.0)  # [CHUNK, TM]
        if MORE:
            d_tile += tl.load(more + r[:, None] * LDD + i[None, :], there & (r < last_of_more)[:, None], 0.0)
        if SHARED:
            x_tile = tl.load(x + (r // N_CANDIDATES)[:, None] * LDX + j[None, :], there & (j < COLUMNS)[None, :], 0.0)
        else:
            x_tile = tl.load(x + r[:, None] * LDX + j[None, :], there, 0.0)  # [CHUNK, TN]
        if BIAS:
            sums += tl.sum(d_tile.to(tl.float32), axis=0)
        if WIDE:
            d_tile, x_tile = d_tile.to(tl.float32), x_tile.to(tl.float32)
        if EXACT:
            d_tile = rounded_operand(d_tile, False, PRECISION, EMULATE)
        if SHARED:
            x_tile = edge_operand(x_tile, PRECISION, EMULATE)
        total = dot(d_tile.T, x_tile, total, PRECISION, EMULATE)
    tl.store(out + i[:, None] * STRIDE + j[None, :], total, (i < M)[:, None] & (j < N)[None, :])
    if BIAS:
        tl.store(bias + i, sums, i < M)


@triton.jit
def row_range(rows, CHUNK: tl.constexpr):
    """(first, last) of the rows that belong to this program's part of them, the part being program_id(1)."""
    share = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), CHUNK) * CHUNK
    first = tl.program_id(1) * share
    return first, tl.minimum(rows, first + share)


@triton.jit
def state_gradient(d, weight, d_states, tile, start, B, N, S: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
                    STRIDE: tl.constexpr, STATES: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr,
                    EDGE: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """d_states[b] = (sum over candidates n of d[b * N + n]) @ W_s, for the tile's STATES states and the SLICE of their
    elements at `start`; W_s is in `weight`. CHUNK of the HP sums at a time: all of them spill at HP = 512.
    """
    b = tile.to(tl.int64) * STATES + tl.arange(0, STATES)
    i = start + tl.arange(0, SLICE)
    part = tl.zeros((STATES, SLICE), tl.float32)
    for chunk in range(0, HP, CHUNK):
        column = chunk + tl.arange(0, CHUNK)
        total = tl.zeros((STATES, CHUNK), tl.float32)
        at = d + (b * N)[:, None] * HP + column[None, :]
        for _ in range(N):
            total += tl.load(at, (b < B)[:, None], 0.0)
            at += HP
        w = tl.load(weight + column[:, None] * STRIDE + i[None, :], (column < H)[:, None] & (i < S)[None, :], 0.0)
        total, w = rounded_operand(total, False, EDGE, EMULATE), edge_operand(w, EDGE, EMULATE)
        part = dot(total, w, part, EDGE, EMULATE)
    tl.store(d_states + b[:, None] * S + i[None, :], part, (b < B)[:, None] & (i < S)[None, :])


@triton.jit
def _chain_products(
    flat: "*fp32",  # [P]
    states: "*fp32 any",  # [B, S]
    floats: "*fp32",  # see reverse_diffusion
    operands: "*op",
    d_floats: "*fp32",
    d_operands: "*op",
    t: "*i64 any",  # with LOSS: [R], the timesteps of the rows of the noise-prediction loss
    images: "*fp32",  # [parts, P + K * HP], written
    d_states: "*fp32",  # [B, S], written
    R: "i32",
    RP: "i64",
    B: "i32",
    N: "i32",
    K: "i32",
    times: "i32",  # rows of the time table: K, or with LOSS more, if there is no chain
    of_chain: "i32",  # with LOSS: 1, or 0 if those rows alone have a gradient
    P: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    FLOATS: tl.constexpr,  # size of the packed floats
    W_X: tl.constexpr,  # offsets in flat: first layer's action and state columns, second layer, its bias, ...
    W_STATE: tl.constexpr,
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
    LOSS: tl.constexpr,  # there is one more plane of rows, see reverse_diffusion
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pid = tl.program_id(0)
    B64, KRP = B.to(tl.int64), (K + LOSS) * RP
    xs = floats + FLOATS + (times + B64) * HP
    activations = operands + 2 * (L - 1) * HP * HP
    d_state_part = d_floats + KRP * AP
    image = images + tl.program_id(1).to(tl.int64) * (P + times * HP)
    T: tl.constexpr = HP // SIDE
    HIDDEN: tl.constexpr = (L - 1) * T * T if PARAMETERS else 0
    OTHER: tl.constexpr = T if PARAMETERS else 0
    WITH_STATES: tl.constexpr = T * ((S + SS - 1) // SS) if PARAMETERS else 0
    if LOSS:
        skipped = (1 - of_chain) * K * RP
        first, last = row_range(KRP - skipped, CHUNK)
        first, last = first + skipped, last + skipped
    else:
        first, last = row_range(KRP, CHUNK)
    if pid < HIDDEN:
        layer, tile = pid // (T * T), pid % (T * T)
        outer_product(
            d_operands + (layer + 1) * KRP * HP, activations + layer * KRP * HP, image + W_HIDDEN + layer * NEXT,
            image + B_HIDDEN + layer * NEXT, first, last, tile // T * SIDE, tile % T * SIDE, H, H, 1,
            HP, HP, HP, H, False, True, False, False, SIDE, SIDE, CHUNK, STAGES, PRECISION, EMULATE,
        )  # fmt: skip
    elif pid < HIDDEN + OTHER:
        outer_product(
            d_operands, xs, image + W_X, image, first, last, (pid - HIDDEN) * SIDE, 0, H, A, 1,
            HP, AP, AP, STRIDE, True, False, False, False, SIDE, AP, CHUNK, 1, EDGE, EMULATE,
        )  # fmt: skip
    elif pid < HIDDEN + 2 * OTHER:
        outer_product(
            d_floats, activations + (L - 1) * KRP * HP, image + W_OUT, image + B_OUT, first, last, 0,
            (pid - HIDDEN - OTHER) * SIDE, A, H, 1,
            AP, HP, HP, H, True, True, False, True, AP, SIDE, CHUNK, 1, EDGE, EMULATE,
        )  # fmt: skip
    elif pid < HIDDEN + 2 * OTHER + WITH_STATES:
        tile = pid - HIDDEN - 2 * OTHER
        first, last = row_range(R.to(tl.int64), CHUNK)
        outer_product(
            d_state_part + LOSS * RP * HP, states, image + W_STATE, image, first, last, tile % T * SIDE, tile // T * SS,
            H, S, N, HP, S, S, STRIDE, True, False, True, True, SIDE, SS, CHUNK, 1, EDGE, EMULATE,
            d_state_part, of_chain * R, LOSS,
        )  # fmt: skip
    elif pid < HIDDEN + 2 * OTHER + WITH_STATES + OTHER * times:
        if PARAMETERS:
            tile = pid - HIDDEN - 2 * OTHER - WITH_STATES
            k, column = tile // T, tile % T * SIDE + tl.arange(0, SIDE)
            first, last = row_range(RP, CHUNK)
            sums = tl.zeros((SIDE,), tl.float32)
            for start in range(first, last, CHUNK):
                r = start + tl.arange(0, CHUNK)
                there = r < last
                if LOSS:  # without a chain (0) none
                    there = r < last * of_chain
                d_z = tl.load(d_operands + (k * RP + r)[:, None] * HP + column[None, :], there[:, None], 0.0)
                sums += tl.sum(d_z.to(tl.float32), axis=0)
                if LOSS:  # those of this step's timestep
                    there = (r < last) & (tl.load(t + r, (r < last) & (r < R), -1) == times - 1 - k)
                    d_z = tl.load(d_operands + (K * RP + r)[:, None] * HP + column[None, :], there[:, None], 0.0)
                    sums += tl.sum(d_z.to(tl.float32), axis=0)
            tl.store(image + P + k * HP + column, sums)
    elif tl.program_id(1) == 0:
        tile = pid - HIDDEN - 2 * OTHER - WITH_STATES - OTHER * times
        SLICES: tl.constexpr = (S + SS - 1) // SS
        state_gradient(d_state_part, flat + W_STATE, d_states, tile // SLICES, tile % SLICES * SS, B, N, S, H, HP,
                       STRIDE, STATES, SS, SIDE, EDGE, EMULATE)  # fmt: skip


@triton.jit
def _time_features(e, flat, W_1: tl.constexpr, B_1: tl.constexpr, W_3: tl.constexpr, B_3: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, TP: tl.constexpr, KIND: tl.constexpr,
                   EDGE: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """time_mlp of embeddings e [STEPS, DP], operands: (features [STEPS, DP], hidden [STEPS, TP], its slope); features
    and hidden as operands."""
    d, t = tl.arange(0, DP), tl.arange(0, TP)
    d_in, t_in = d < D, t < 2 * D
    w = tl.load(flat + W_1 + t[None, :] * D + d[:, None], d_in[:, None] & t_in[None, :], 0.0)  # [DP, TP]
    z = dot(e, edge_operand(w, EDGE, EMULATE), None, EDGE, EMULATE) + tl.load(flat + B_1 + t, t_in, 0.0)[None, :]
    h, slope = activate_with_slope(z, KIND)
    h = edge_operand(h, EDGE, EMULATE)
    w = tl.load(flat + W_3 + d[None, :] * (2 * D) + t[:, None], t_in[:, None] & d_in[None, :], 0.0)  # [TP, DP]
    w = edge_operand(w, EDGE, EMULATE)
    features = dot(h, w, None, EDGE, EMULATE) + tl.load(flat + B_3 + d, d_in, 0.0)[None, :]
    return edge_operand(features, EDGE, EMULATE), h, slope


@triton.jit
def _chain_finish(
    flat: "*fp32",  # [P]
    owners: "*i8",  # [P]: who writes an element of d_flat: see `_owners`
    embedding: "*fp32",  # [K, D]
    images: "*fp32",  # [parts, P + K * HP]
    d_flat: "*fp32",  # [P], written
    K: "i32",
    parts: "i32",
    P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    W_1: tl.constexpr,
    B_1: tl.constexpr,
    W_3: tl.constexpr,
    B_3: tl.constexpr,
    W_TIME: tl.constexpr,
    STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    STEPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (P + BLOCK - 1) // BLOCK
    T: tl.constexpr = HP // SIDE
    size = P + K.to(tl.int64) * HP
    d, t = tl.arange(0, DP), tl.arange(0, TP)
    d_in, t_in = d < D, t < 2 * D
    if pid < BLOCKS:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        owner = tl.load(owners + i, i < P, -1)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            total += tl.load(images + part * size + i, owner > 0, 0.0)
        tl.store(d_flat + i, total, owner >= 0)
    elif pid < BLOCKS + T:  # bias and time columns of the first layer, SIDE of its units
        column = (pid - BLOCKS) * SIDE + tl.arange(0, SIDE)
        d_bias = tl.zeros((SIDE,), tl.float32)
        d_weight = tl.zeros((SIDE, DP), tl.float32)
        for start in range(0, K, STEPS):
            k = start + tl.arange(0, STEPS)
            e = tl.load(embedding + k[:, None] * D + d[None, :], (k < K)[:, None] & d_in[None, :], 0.0)
            e = edge_operand(e, EDGE, EMULATE)
            features, _, _ = _time_features(e, flat, W_1, B_1, W_3, B_3, D, DP, TP, KIND, EDGE, EMULATE)
            d_table = tl.zeros((STEPS, SIDE), tl.float32)
            for part in range(parts):
                d_table += tl.load(images + part * size + P + k[:, None] * HP + column[None, :], (k < K)[:, None], 0.0)
            d_bias += tl.sum(d_table, axis=0)
            d_table = edge_operand(d_table, EDGE, EMULATE)
            d_weight = dot(d_table.T, features, d_weight, EDGE, EMULATE)
        tl.store(d_flat + BIAS + column, d_bias, column < H)
        tl.store(
            d_flat + W_TIME + column[:, None] * STRIDE + d[None, :], d_weight, (column < H)[:, None] & d_in[None, :]
        )
    else:  # the time MLP
        d_w1, d_b1 = tl.zeros((TP, DP), tl.float32), tl.zeros((TP,), tl.float32)
        d_w3, d_b3 = tl.zeros((DP, TP), tl.float32), tl.zeros((DP,), tl.float32)
        for start in range(0, K, STEPS):
            k = start + tl.arange(0, STEPS)
            e = tl.load(embedding + k[:, None] * D + d[None, :], (k < K)[:, None] & d_in[None, :], 0.0)
            e = edge_operand(e, EDGE, EMULATE)
            features, h, slope = _time_features(e, flat, W_1, B_1, W_3, B_3, D, DP, TP, KIND, EDGE, EMULATE)
            d_features = tl.zeros((STEPS, DP), tl.float32)
            for tile in range(T):
                column = tile * SIDE + tl.arange(0, SIDE)
                d_table = tl.zeros((STEPS, SIDE), tl.float32)
                for part in range(parts):
                    at = images + part * size + P + k[:, None] * HP + column[None, :]
                    d_table += tl.load(at, (k < K)[:, None], 0.0)
                w = tl.load(flat + W_TIME + column[:, None] * STRIDE + d[None, :],
                            (column < H)[:, None] & d_in[None, :], 0.0)  # fmt: skip  # [SIDE, DP]
                d_table, w = edge_operand(d_table, EDGE, EMULATE), edge_operand(w, EDGE, EMULATE)
                d_features = dot(d_table, w, d_features, EDGE, EMULATE)
            d_b3 += tl.sum(d_features, axis=0)
            d_features = edge_operand(d_features, EDGE, EMULATE)
            d_w3 = dot(d_features.T, h, d_w3, EDGE, EMULATE)
            w = tl.load(flat + W_3 + d[:, None] * (2 * D) + t[None, :], d_in[:, None] & t_in[None, :], 0.0)  # [DP, TP]
            d_z = dot(d_features, edge_operand(w, EDGE, EMULATE), None, EDGE, EMULATE) * slope  # [STEPS, TP]
            d_b1 += tl.sum(d_z, axis=0)
            d_w1 = dot(edge_operand(d_z, EDGE, EMULATE).T, e, d_w1, EDGE, EMULATE)
        tl.store(d_flat + W_1 + t[:, None] * D + d[None, :], d_w1, t_in[:, None] & d_in[None, :])
        tl.store(d_flat + B_1 + t, d_b1, t_in)
        tl.store(d_flat + W_3 + d[:, None] * (2 * D) + t[None, :], d_w3, d_in[:, None] & t_in[None, :])
        tl.store(d_flat + B_3 + d, d_b3, d_in)


class ChainGradients:
    """The gradients of chains of one denoiser on one device in one precision, or with `loss` those of its
    noise-prediction loss with or without a chain's; it holds no parameters."""

    def __init__(self, spec: DenoiserSpec, precision: str, device: torch.device, loss: bool = False) -> None:
        self.spec, self.sizes, self.device, self.loss = spec, packed_sizes(spec), device, loss
        self.products = {
            with_parameters: products_kernel(spec, precision, with_parameters, loss)
            for with_parameters in (False, True)
        }
        self.finish = finish_kernel(spec, precision)
        self.owners = _owners(spec).to(device)
        self.processors = multiprocessors(device)

    def compute(
        self,
        flat: Tensor,
        embedding: Tensor,
        states: Tensor,
        floats: Tensor,
        operands: Tensor,
        d_floats: Tensor,
        d_operands: Tensor,
        RP: int,
        R: int,
        need_parameters: bool,
        need_states: bool,
        t: Tensor | None = None,
        steps: int | None = None,
        of_chain: bool = True,
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(d_flat [P], d_states [B, S]), None where not needed, from the buffers that `reverse_diffusion` describes.

        With the noise-prediction loss its rows' timesteps t [B] are wanted, how many steps the chain has, which may be
        none, and whether it has a gradient; d_states is not to be had. d_flat is `into`, or new.
        """
        (B, S), (times, _), s = states.shape, embedding.shape, self.sizes
        K = times if steps is None else steps
        side = min(_SIDE, s.HP)
        T = s.HP // side
        P, size = self.spec.layout.size, self.spec.layout.size + times * s.HP
        d_states = torch.empty_like(states) if need_states else None
        programs = cdiv(B, _STATES) * cdiv(S, _state_side(S)) if need_states else 0
        parts, images = 1, d_floats  # never read where no parameter's gradient is asked for
        if need_parameters:
            squares = (s.L - 1) * T * T
            programs += squares + 2 * T + T * cdiv(S, _state_side(S)) + T * times
            parts = max(1, min(cdiv(2 * self.processors, squares), (K + self.loss) * RP // (4 * _CHUNK), _MAX_PARTS))
            images = torch.empty(parts * size, dtype=torch.float32, device=self.device)
        if programs:
            self.products[need_parameters].launch(
                (programs, parts, 1),
                flat, states, floats, operands, d_floats, d_operands, t, images,
                d_floats if d_states is None else d_states, R, RP, B, R // B, K, times, int(of_chain),
            )  # fmt: skip
        if not need_parameters:
            return None, d_states
        d_flat = torch.empty(P, dtype=torch.float32, device=self.device) if into is None else into
        blocks = cdiv(P, _BLOCK) + s.HP // min(_COLUMNS, s.HP) + 1
        self.finish.launch((blocks, 1, 1), flat, self.owners, embedding, images, d_flat, times, parts)
        return d_flat, d_states


_STATES = 16  # a program of the states' gradient
_BLOCK = 1024 if not INTERPRETED else 1 << 15  # elements a program adds


def _state_side(S: int) -> int:
    return min(_SIDE, rounded(S))


def _owners(spec: DenoiserSpec) -> Tensor:
    """int8 [P]: 1 where images are added, 0 where no parameter lies and d_flat is 0, -1 for what `_chain_finish` writes
    in other programs: the time MLP, the first layer's time columns and its bias."""
    owners = torch.zeros(spec.layout.size, dtype=torch.int8, device="cpu")
    for name, view in spec.layout.views(owners).items():
        view.fill_(-1 if name.startswith("time_mlp") or name == "mid_layer.0.bias" else 1)
        if name == "mid_layer.0.weight":
            view[:, spec.action_dim : spec.action_dim + spec.time_dim] = -1
    return owners


@lru_cache(maxsize=256)
def products_kernel(spec: DenoiserSpec, precision: str, with_parameters: bool, loss: bool = False) -> Kernel:
    """The kernel of all products, with or without the rows of a noise-prediction loss."""
    slots, s, first = {slot.name: slot.offset for slot in spec.layout.slots}, packed_sizes(spec), first_layer(spec)
    after = slots["mid_layer.4.weight"] if spec.num_hidden > 2 else slots["mid_layer.2.weight"]
    return Kernel.of(
        _chain_products,
        num_warps=4,
        max_registers=255,
        P=spec.layout.size,
        S=spec.state_dim,
        A=spec.action_dim,
        AP=s.AP,
        H=spec.hidden_dim,
        HP=s.HP,
        L=s.L,
        FLOATS=s.floats,
        W_X=slots["mid_layer.0.weight"],
        W_STATE=first.states,
        STRIDE=first.stride,
        W_HIDDEN=slots["mid_layer.2.weight"],
        B_HIDDEN=slots["mid_layer.2.bias"],
        NEXT=after - slots["mid_layer.2.weight"],
        W_OUT=slots["final_layer.weight"],
        B_OUT=slots["final_layer.bias"],
        SIDE=min(_SIDE, s.HP),
        SS=_state_side(spec.state_dim),
        CHUNK=_CHUNK,
        STAGES=3,
        PRECISION=edge_precision(precision),
        EDGE=edge_precision(precision),
        STATES=_STATES,
        PARAMETERS=with_parameters,
        LOSS=int(loss),
        BF16=precision == "bf16",
        EMULATE=INTERPRETED,
    )


@lru_cache(maxsize=256)
def finish_kernel(spec: DenoiserSpec, precision: str) -> Kernel:
    """The kernel that adds the images and walks back through the time table."""
    slots, s, first, D = (
        {x.name: x.offset for x in spec.layout.slots},
        packed_sizes(spec),
        first_layer(spec),
        spec.time_dim,
    )
    return Kernel.of(
        _chain_finish,
        num_warps=8,
        max_registers=255,
        P=spec.layout.size,
        D=D,
        DP=rounded(D),
        TP=rounded(2 * D),
        H=spec.hidden_dim,
        HP=s.HP,
        W_1=slots["time_mlp.1.weight"],
        B_1=slots["time_mlp.1.bias"],
        W_3=slots["time_mlp.3.weight"],
        B_3=slots["time_mlp.3.bias"],
        W_TIME=first.states - D,
        STRIDE=first.stride,
        BIAS=first.bias,
        KIND=ACTIVATIONS.index(spec.activation),
        EDGE=edge_precision(precision),
        BLOCK=_BLOCK,
        SIDE=min(_COLUMNS, s.HP),
        STEPS=_STEPS,
        EMULATE=INTERPRETED,
    )
