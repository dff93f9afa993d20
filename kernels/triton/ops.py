"""Building blocks of the Triton kernels: activations, the noise stream, operands, element by element; their product.

The formulas and polynomials are those of csrc/cpu/activation.h and csrc/cpu/noise.h, with no branch and no slow path,
so that all a thread needs stays in registers. Every function is for use inside kernels. A multiplication and an
addition may become one instruction that rounds once, which the interpreter does not do: the last bits differ from it.
"""

import triton
import triton.language as tl

from .launch import INTERPRETED

# Indices into layout.ACTIVATIONS.
MISH = tl.constexpr(0)
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.44269504)
# Below, exp and with it every value and slope is 0 in float32: it stands in for -infinity, which times 0 is NaN.
_LOWEST = tl.constexpr(-104.0)
# Above, a value is z itself and its slope 1. It is 29 / log2(e), so that e is 2^29 there: its square does not overflow,
# and the reciprocals are powers of two too, so that t is 1, not nearly 1.
_HIGHEST = tl.constexpr(20.1012688)

_LARGEST_TF32 = tl.constexpr(3.4011621342146535e38)  # 2^128 - 2^117
_UNIFORM_STEP = tl.constexpr(0xFFFFFFFF)  # stands for k in dql.noise.uniform; no chain has that many steps
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, which the lowest bits then hold


@triton.jit
def _reciprocal(x):
    """1 / x for x of [1, 2^60], to an ulp.

    Triton's own division scales numbers at the ends of float32's range first: seven instructions more.
    """
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _gate(z, KIND: tl.constexpr):
    """(z without -infinity, z within both bounds, e, r, t); the value is z t. With e = exp(z) and w = e (e + 2), which
    no sign of z makes cancel,

        mish:  r = 1 / (w + 2),  t = w r        (arXiv 1908.08681: tanh(ln(1 + e)) = w / (w + 2))
        silu:  r = 1 / (e + 1),  t = e r
    """
    z = tl.maximum(z, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    bounded = tl.minimum(z, _HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(bounded * _LOG2_E)
    if KIND == MISH:
        w = e * (e + 2.0)
        r = _reciprocal(w + 2.0)
        t = w * r
    else:
        tl.static_assert(KIND == SILU, "KIND is an index into layout.ACTIVATIONS: 0, 1 or 2")
        r = _reciprocal(e + 1.0)
        t = e * r
    return z, bounded, e, r, t


@triton.jit
def activate(z, KIND: tl.constexpr):
    """h = mish(z) = z tanh(ln(1 + exp z)), relu(z) = max(z, 0) or silu(z) = z / (1 + exp(-z)); float32, any shape.

    NaN gives NaN, +inf gives +inf, -inf gives 0. It is the h of `activate_with_slope`. In the interpreter values and
    slopes for z of [-10, 100] are within 1e-6, relative, or (slopes near their zero) within 1e-7; below, where they are
    under 5e-4, within 3e-10: the exponent of exp is rounded before exp is taken.
    """
    if KIND == RELU:
        h = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        z, _bounded, _e, _r, t = _gate(z, KIND)
        h = z * t
    return h


@triton.jit
def activate_with_slope(z, KIND: tl.constexpr):
    """(h, dh/dz), float32, any shape. h is that of `activate`; with e, r and t of `_gate` the slopes are

        mish':  t + 4 z e (e + 1) r^2
        silu':  t + z t r
        relu':  1 where z > 0, else 0

    NaN gives NaN twice, +inf gives (+inf, 1), -inf gives (0, 0).
    """
    if KIND == RELU:
        h = activate(z, KIND)
        slope = tl.where(z > 0.0, 1.0, tl.where(z != z, z, 0.0))
    else:
        z, bounded, e, r, t = _gate(z, KIND)
        h = z * t
        if KIND == MISH:
            s = 2.0 * r
            er = e * s
            slope = t + (bounded * er) * (s + er)
        else:
            slope = t + (bounded * t) * r
    return h, slope


@triton.jit
def _unit(word):
    """u = ((word >> 9) + 1/2) / 2^23 of (0, 1), exact in float32."""
    # With the exponent of 1 and 23 bits of the word in the fraction it is 1 + (word >> 9) / 2^23.
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = ((word >> 9) + 1/2) / 2^23; float32.

    Within 1.2e-7, relative, of float64 for all 2^23 values of u in the interpreter.

    u = 2^e f with f of [2/3, 4/3), so that near u = 1, where e = 0, the logarithm is its series in s = f - 1, which is
    exact: nothing cancels.
    """
    bits = _unit(word).to(tl.int32, bitcast=True)
    octave = (bits - 0x3F2AAAAB) >> 23
    s = (bits - (octave << 23)).to(tl.float32, bitcast=True) - 1.0
    # The octave in the lowest bits of _WHOLE: a conversion of integers is eight times slower than an addition.
    e = (octave + 0x4B400000).to(tl.float32, bitcast=True) - _WHOLE
    p = s * -0.299652874 + 0.30679068  # (2 s - 2 ln(1 + s)) / s^2, to 2.1e-8 of the logarithm of u
    p = p * s - 0.275281489
    p = p * s + 0.328606516
    p = p * s - 0.400579244
    p = p * s + 0.500129998
    p = p * s - 0.666655481
    p = p * s + 0.999999464
    # The approximate root: within 2^-23 of itself, and its argument is at least 1.1e-7, far from its slow cases.
    return tl.sqrt(e * -1.38629436 + ((s * s) * p - 2.0 * s))


@triton.jit
def _circle(word):
    """(cos, sin) of 2 pi u = (q + f) pi / 2 with whole q and f of [-1/2, 1/2], both exact; float32.

    Within 1.3e-7, relative, of float64 for all 2^23 values of u in the interpreter, next to the zeros too.
    """
    # With the exponent of 4 and 23 bits of the word in the fraction it is 4 + 4 (word >> 9) / 2^23.
    quarters = ((word >> 9) | 0x40800000).to(tl.float32, bitcast=True) - 3.99999976158142
    shifted = quarters + _WHOLE
    q = shifted.to(tl.uint32, bitcast=True)
    f = quarters - (shifted - _WHOLE)
    x = f * f
    s = x * -4.60014539e-3 + 7.96795785e-2
    s = s * x - 6.4596343e-1
    s = s * x - 4.88437344e-8
    s = f * s + f * 1.57079637  # the first coefficient in two parts
    c = x * 8.9448638e-4 - 2.08555963e-2
    c = c * x + 2.53668547e-1
    c = c * x - 1.23370051
    c = c * x + 1.0
    odd = (q & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((q + 1) << 30) & 0x80000000)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((q << 30) & 0x80000000)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def normals(seed, row, k, offset, AP: tl.constexpr):
    """Standard normals of dims 0 .. AP - 1, float32 [R, AP]: `dql.noise.normal`, element (k, row, dim).

    Philox4x32-10 at the counter (row, k, dim // 4, offset) gives w0 .. w3 and with u(w) = ((w >> 9) + 1/2) / 2^23
        n0, n1 = sqrt(-2 ln u(w0)) * (cos, sin)(2 pi u(w1)),   n2, n3 likewise from w2, w3        (Box and Muller)

    Args:
        seed: int64 scalar, the bits of the unsigned 64-bit seed.
        row: [R] int32 or int64, ids of the rows; their low 32 bits count, unsigned.
        k: int32 scalar, the step.
        offset: integer scalar, number of the draw with this seed; its low 32 bits count.
        AP: padded action size, a power of two from 16 up.
    """
    R: tl.constexpr = row.shape[0]
    c0 = row.to(tl.uint32)[:, None]  # [R, 1]
    c2 = tl.arange(0, AP // 4).to(tl.uint32)[None, :]  # [1, AP / 4]
    w0, w1, w2, w3 = tl.philox(seed, c0, tl.cast(k, tl.uint32), c2, tl.cast(offset, tl.uint32))  # each [R, AP / 4]
    length = _radius(tl.join(w0, w2))  # [R, AP / 4, pair]
    cosine, sine = _circle(tl.join(w1, w3))  # each [R, AP / 4, pair]
    return tl.reshape(tl.join(length * cosine, length * sine), (R, AP))  # from [R, AP / 4, pair, cos | sin]


@triton.jit
def uniform(seed, row, offset):
    """The number of (0, 1) by which `select` draws a row's candidate, float32 of row's shape: `dql.noise.uniform`.

    It is u(w0), exact in float32, of the counter (row, 2^32 - 1, 0, offset); arguments as for `normals`.
    """
    zero = tl.cast(0, tl.uint32)
    step = tl.cast(_UNIFORM_STEP, tl.uint32)
    w0, _w1, _w2, _w3 = tl.philox(seed, row.to(tl.uint32), step, zero, tl.cast(offset, tl.uint32))
    return _unit(w0)


@triton.jit
def tf32(x, EMULATE: tl.constexpr):
    """float32 x rounded to the nearest number with tf32's 10 bits of fraction, ties away from zero; it stays float32.

    Without it tensor cores cut the other 13 bits off: errors up to twice as large, all towards zero. What rounds beyond
    the largest number is infinite, NaN stays NaN. From sm_80 to sm_120 it is a comparison, an addition and a mask.
    EMULATE: by bit arithmetic, for the interpreter, which has no PTX.
    """
    if EMULATE:
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        y = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))  # a NaN's bits might carry over into a number
    else:
        y = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def edge_operand(x, EDGE: tl.constexpr, EMULATE: tl.constexpr):
    """float32 x as the operand of a `dot` whose PRECISION is EDGE: `tf32` of x; for "tf32x3", which takes it apart, x
    itself, or the largest tf32 number for the few finite ones beyond it."""
    if EDGE == "tf32":
        y = tf32(x, EMULATE)
    else:
        tl.static_assert(EDGE == "tf32x3", "EDGE is tf32 or tf32x3")
        y = tl.where(tl.abs(x) < float("inf"), tl.clamp(x, -_LARGEST_TF32, _LARGEST_TF32), x)
    return y


@triton.jit
def rounded_operand(x, BF16: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """float32 x that a layer made as the operand of a product: `stored` in bfloat16 if BF16, else `tf32` of x, or for
    "tf32x3" x itself: what overflows tf32 has all but overflowed float32, which `edge_operand` does not say of a
    caller's numbers."""
    if BF16:
        y = stored(x, BF16, EMULATE)
    elif PRECISION == "tf32x3":
        y = x
    else:
        y = edge_operand(x, PRECISION, EMULATE)
    return y


@triton.jit
def stored(x, BF16: tl.constexpr, EMULATE: tl.constexpr):
    """float32 x in the dtype that operands are stored in: x itself, or if BF16 rounded to the nearest bfloat16, ties to
    even. For slopes, which lie among the operands and are none.

    With EMULATE the rounded numbers stay float32: for the interpreter, whose bfloat16 is wrong (see launch.py).
    """
    if not BF16:
        y = x
    elif EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))  # a NaN's bits might carry over into a number
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def apart(x, EMULATE: tl.constexpr):
    """(big, small) of float32 x: the nearest tf32 number, ties away from zero, and x - big, which is exact.

    Three operations on what `edge_operand` gives: cvt.rna.tf32 would be two more, which look for infinity and NaN. Here
    NaN may leave big, but never small; of infinity small is NaN, and so is every sum that it is in.
    EMULATE: small is cut off as tensor cores do it, for the interpreter; 2^-23 of x is lost at most.
    """
    big = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    small = x - big
    if EMULATE:
        cut = (small.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        small = tl.where(small != small, small, cut)  # all of a NaN's bits may be among those cut off
    return big, small


@triton.jit
def dot(a, b, z, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """z + a @ b (z may be None) on tensor cores: of operands as they are, or where PRECISION is "tf32x3" of float32.

    float32 is big + small, each of tf32, and a @ b three products: small times small is 2^-22 of it at most. Triton's
    own "tf32x3" does the same in the same order, but looks for infinity and NaN in operands and sums on the way, so
    that infinity times a number stays infinity: here it is NaN. On sm_90 a hidden layer's loop is 7.4 to 8.6
    instructions for each of its tensor cores' with that, and 4.8 to 5.9 without.
    """
    if PRECISION == "tf32x3":
        a_big, a_small = apart(a, EMULATE)
        b_big, b_small = apart(b, EMULATE)
        y = tl.dot(a_small, b_big, input_precision="tf32")
        y = tl.dot(a_big, b_small, y, input_precision="tf32")
        y = tl.dot(a_big, b_big, y, input_precision="tf32")
        # Tensor cores cut sums off, an addition rounds: so z is not what they add to.
        if z is not None:
            y += z
    else:
        y = tl.dot(a, b, z, input_precision=PRECISION)
    return y
