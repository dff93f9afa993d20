"""A hidden layer for a tile of rows, forward and backward: the blocks that every fused kernel is built of.

No multiprocessor holds a 256 x 256 weight and its operands at once, so a layer's product goes by chunks of its inputs,
loaded ahead in a ring of `STAGES`. A tile's activations take the way through memory (16 KB, which stay in the L1 and L2
caches): Triton cannot cut a tile in registers into chunks. Who stores activations calls `tl.debug_barrier()` before
anyone loads them, and never stores where the last layer but one may still be read.

Operands are rounded, to tf32 or bf16, where they are made: weights when they are packed, activations and their
gradients when they are stored. A product takes what it loads for an operand, unless told that it is EXACT. The
parts of float32 (`ops.dot`) are made where they are multiplied: packed, they would be 13 to 28% fewer instructions in a
layer's loop and twice the bytes that every program streams of weights, and holds of them in its ring.

Letters: ROWS rows a tile, HP padded hidden width, AP padded action size.
"""

import triton
import triton.language as tl

from .ops import dot, edge_operand, stored


@triton.jit
def product(z, inputs, weight, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, HP: tl.constexpr,
            INNER: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
            EXACT_INPUTS: tl.constexpr, EXACT_WEIGHT: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """z + inputs @ weight^T for a tile z [ROWS, HP], a pointer to inputs [ROWS, INNER] and weight[h, i], which is at
    h * ROW + i * COLUMN; both of the same dtype. EXACT_...: float32 that is no operand yet."""
    row, column = tl.arange(0, ROWS), tl.arange(0, HP)
    for start in tl.range(0, INNER, CHUNK, num_stages=STAGES):
        i = start + tl.arange(0, CHUNK)
        h = tl.load(inputs + row[:, None] * INNER + i[None, :])  # [ROWS, CHUNK]
        w = tl.load(weight + column[:, None] * ROW + i[None, :] * COLUMN)  # [HP, CHUNK]
        if EXACT_INPUTS:
            h = edge_operand(h, PRECISION, EMULATE)
        if EXACT_WEIGHT:
            w = edge_operand(w, PRECISION, EMULATE)
        z = dot(h, w.T, z, PRECISION, EMULATE)
    return z


@triton.jit
def narrow_product(h, weight, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, HP: tl.constexpr,
                   OUT: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, BF16: tl.constexpr,
                   EMULATE: tl.constexpr):  # fmt: skip
    """h @ weight^T [ROWS, OUT] for a tile of operands h [ROWS, HP] and few outputs; weight[o, i] is at o * ROW +
    i * COLUMN, float32: an operand, or exact if BF16.

    Each of GROUPS warps takes a share of the HP inputs: one after the other, they would wait for each product.
    """
    SHARE: tl.constexpr = HP // GROUPS
    h = tl.permute(tl.reshape(h, (ROWS, GROUPS, SHARE)), (1, 0, 2))  # [GROUPS, ROWS, SHARE]
    group, i, out = tl.arange(0, GROUPS), tl.arange(0, SHARE), tl.arange(0, OUT)
    w = tl.load(weight + out[None, None, :] * ROW + (group[:, None, None] * SHARE + i[None, :, None]) * COLUMN)
    return tl.sum(dot(h, stored(w, BF16, EMULATE), None, PRECISION, EMULATE), axis=0)


@triton.jit
def narrow_product_from(inputs, weight, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, HP: tl.constexpr,
                        OUT: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                        BF16: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """The same for a pointer to operands [ROWS, HP]: a large tile has no registers for a second copy of itself."""
    row, out = tl.arange(0, ROWS), tl.arange(0, OUT)
    z = tl.zeros((ROWS, OUT), tl.float32)
    for start in tl.range(0, HP, CHUNK, num_stages=STAGES):
        i = start + tl.arange(0, CHUNK)
        h = tl.load(inputs + row[:, None] * HP + i[None, :])  # [ROWS, CHUNK]
        w = tl.load(weight + out[None, :] * ROW + i[:, None] * COLUMN)  # [CHUNK, OUT]
        z = dot(h, stored(w, BF16, EMULATE), z, PRECISION, EMULATE)
    return z
