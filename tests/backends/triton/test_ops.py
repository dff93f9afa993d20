"""The Triton kernels' building blocks against float64 and the noise stream; interpreted where no CUDA device is."""

# ruff: noqa: F722  (the annotations of a kernel are what launch.py reads, not Python types)

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dql import noise
from dql.kernels.layout import ACTIVATIONS

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux only)")

import triton.language as tl  # noqa: E402

from dql.kernels.triton import ops  # noqa: E402
from dql.kernels.triton.launch import INTERPRETED, Kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported",
)
INF, NAN = float("inf"), float("nan")
LARGEST_TF32 = float.fromhex("0x1.ffcp127")
EXACT = {"mish": F.mish, "relu": torch.relu, "silu": F.silu}
TOLERANCES = {  # relative to each element, absolute, why
    "value": (1.2e-6, 1e-7, "the exponent of exp is rounded; interpreted 8e-7, a GPU's exp and reciprocal an ulp each"),
    "slope": (1.2e-6, 3e-7, "... and two terms of size 0.4 cancel where it is zero; interpreted 1.1e-7"),
    "normal": (1e-6, 0.0, "radius, cosine, product: interpreted 2.1e-7; a GPU's root is approximate, to 1.2e-7"),
    "part": (5e-7, 0.0, "interpreted 1.3e-7 over all words; a GPU fuses the polynomials' steps, and its root"),
}
SEEDS = [0, 7, (1 << 63) + 5, (1 << 64) - 1]
STREAM = [  # AP, A, id of the first row, offset
    (16, 3, 0, 0),
    (16, 3, (1 << 31) - 3, 5),
    (64, 64, (1 << 32) - 8, 0),
    (64, 64, 1 << 31, (1 << 32) - 1),
]


@triton.jit
def _activate(x: "*fp32", h: "*fp32", h2: "*fp32", d: "*fp32", KIND: tl.constexpr, C: tl.constexpr):
    i = (tl.program_id(0) * 16 + tl.arange(0, 16))[:, None] * C + tl.arange(0, C)[None, :]  # [16, C]
    z = tl.load(x + i)
    tl.store(h + i, ops.activate(z, KIND))
    value, slope = ops.activate_with_slope(z, KIND)
    tl.store(h2 + i, value)
    tl.store(d + i, slope)


@triton.jit
def _normals(out: "*fp32", rows: "*i64", stream: "*i64", R: tl.constexpr, AP: tl.constexpr, NARROW: tl.constexpr):
    r, k = tl.arange(0, R), tl.program_id(0)
    row = tl.load(rows + r)  # [R]
    if NARROW:
        row = row.to(tl.int32)
    n = ops.normals(tl.load(stream), row, k, tl.load(stream + 1), AP)  # [R, AP]
    tl.store(out + k * R * AP + r[:, None] * AP + tl.arange(0, AP)[None, :], n)


@triton.jit
def _uniform(out: "*fp32", rows: "*i64", stream: "*i64", R: tl.constexpr):
    r = tl.arange(0, R)
    tl.store(out + r, ops.uniform(tl.load(stream), tl.load(rows + r), tl.load(stream + 1)))


@triton.jit
def _polar(words: "*i32", radius: "*fp32", cosine: "*fp32", sine: "*fp32", N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.load(words + i).to(tl.uint32, bitcast=True)
    c, s = ops._circle(word)
    tl.store(radius + i, ops._radius(word))
    tl.store(cosine + i, c)
    tl.store(sine + i, s)


@triton.jit
def _round(x: "*fp32", out: "*fp32", N: tl.constexpr, BF16: tl.constexpr, HOW: tl.constexpr, EDGE: tl.constexpr,
           EMULATE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * N + tl.arange(0, N)
    if EDGE:
        y = ops.edge_operand(tl.load(x + i), HOW, EMULATE)
    else:
        y = ops.rounded_operand(tl.load(x + i), BF16, HOW, EMULATE)
    tl.store(out + i, y.to(tl.float32))


@triton.jit
def _apart(x: "*fp32", big: "*fp32", small: "*fp32", N: tl.constexpr, EMULATE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    of_big, of_small = ops.apart(tl.load(x + i), EMULATE)
    tl.store(big + i, of_big)
    tl.store(small + i, of_small)


@triton.jit
def _dot(a: "*fp32", b: "*fp32", z: "*fp32", out: "*fp32", M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
         ADD: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    at = m[:, None] * N + n[None, :]
    if ADD:
        y = ops.dot(left, right, tl.load(z + at), "tf32x3", EMULATE)
    else:
        y = ops.dot(left, right, None, "tf32x3", EMULATE)
    tl.store(out + at, y)


def poisoned(*shape):
    return torch.full(shape, NAN, device=DEVICE)


def stream(seed, offset):
    """The seed's bits and the offset, as kernels read them from memory."""
    return torch.tensor([seed - (1 << 64) if seed >> 63 else seed, offset], device=DEVICE)


def assert_near(got, want, tolerance, what):
    rel, absolute, why = TOLERANCES[tolerance]
    torch.testing.assert_close(
        got.cpu().double(), want, rtol=rel, atol=absolute, equal_nan=True, msg=lambda m: f"{what} ({why})\n{m}"
    )


def activated(kind, z):
    """(value, slope) of z [n] from `activate_with_slope`, n up to any size; `activate` is asserted to agree."""
    C = 256
    programs = -(-z.numel() // (16 * C))
    padded = torch.zeros(programs * 16 * C, device=DEVICE)
    padded[: z.numel()] = z
    h, h2, d = (poisoned(padded.numel()) for _ in range(3))
    kernel = Kernel.of(_activate, num_warps=8, KIND=ACTIVATIONS.index(kind), C=C)
    kernel.launch((programs, 1, 1), padded, h, h2, d)
    torch.testing.assert_close(
        h, h2, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{kind} with and without slope {m}"
    )
    return h2[: z.numel()].cpu(), d[: z.numel()].cpu()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_equals_float64(kind):
    """Values and slopes over [-100, 100], more densely where they bend, and around both bounds of exp's argument."""
    bounds = torch.tensor([-104.0, -103.9, -87.4, -87.3, 20.1, 20.1012688, 20.11, 43.9, 44.4, 88.7, 88.8])
    far = torch.tensor([1e-38, 1e-30, 105.0, 1e10, 3e38])
    z = torch.cat([torch.linspace(-100, 100, 150_001), torch.linspace(-5, 5, 100_001), bounds, far, -far])
    h, d = activated(kind, z)
    exact = z.double().requires_grad_()
    value = EXACT[kind](exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    assert_near(h, value.detach(), "value", f"{kind}(z)")
    assert_near(d, slope, "slope", f"{kind}'(z)")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_of_what_is_no_number(kind):
    h, d = activated(kind, torch.tensor([NAN, INF, -INF, 0.0, -0.0]))
    at_zero = {"mish": 0.6, "relu": 0.0, "silu": 0.5}[kind]
    assert_near(h, torch.tensor([NAN, INF, 0.0, 0.0, 0.0]).double(), "value", kind)
    assert_near(d, torch.tensor([NAN, 1.0, 0.0, at_zero, at_zero]).double(), "slope", kind)


@pytest.mark.parametrize("narrow", [False, True], ids=["int64", "int32"])
@pytest.mark.parametrize(("AP", "A", "first", "offset"), STREAM)
@pytest.mark.parametrize("seed", SEEDS)
def test_normals_are_the_noise_stream(seed, AP, A, first, offset, narrow):
    """An int32 row id beyond 2^31 has wrapped to a negative number and still is the same row."""
    K, R = 3, 8
    rows = torch.arange(first, first + R, device=DEVICE)
    out = poisoned(K, R, AP)
    Kernel.of(_normals, num_warps=4, R=R, AP=AP, NARROW=narrow).launch((K, 1, 1), out, rows, stream(seed, offset))
    want = noise.normal(seed, K, R, A, offset=offset, row_offset=first, dtype=torch.float64)
    assert_near(out[:, :, :A], want, "normal", f"normals of seed {seed}, rows from {first}, offset {offset}")
    assert out.isfinite().all()


def test_normals_of_every_word():
    """Radius, cosine and sine for all 2^23 values that a word can give."""
    count = 1 << 23
    words = torch.from_numpy((np.arange(count, dtype=np.uint32) << 9).view(np.int32)).to(DEVICE)
    words |= 0x155  # the bits that do not count
    radius, cosine, sine = (poisoned(count) for _ in range(3))
    N = 1 << (16 if INTERPRETED else 10)
    Kernel.of(_polar, num_warps=4, N=N).launch((count // N, 1, 1), words, radius, cosine, sine)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert_near(radius, (u.log() * -2.0).sqrt(), "part", "radius")
    assert_near(cosine, (2 * torch.pi * u).cos(), "part", "cosine")
    assert_near(sine, (2 * torch.pi * u).sin(), "part", "sine")


@pytest.mark.parametrize("offset", [0, 9, (1 << 32) - 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_is_the_noise_stream_exactly(seed, offset):
    R = 64
    out = poisoned(R)
    Kernel.of(_uniform, num_warps=1, R=R).launch((1, 1, 1), out, torch.arange(R, device=DEVICE), stream(seed, offset))
    want = noise.uniform(seed, R, offset=offset)
    assert torch.equal(out.cpu().double(), want)


def numbers_to_round(bits_cut):
    """float32: many with any bits and with those that decide, at and beside ties, of either sign, and the special."""
    generator = torch.Generator().manual_seed(0)
    half = 1 << (bits_cut - 1)
    upper = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), generator=generator) >> bits_cut << bits_cut
    ties = torch.cat([upper + low for low in (0, 1, half - 1, half, half + 1, 2 * half - 1)])
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 0, 1, 0x8000, 0x8001])
    at_the_end = 0x7F800000 - torch.tensor([1, half - 1, half, half + 1, 2 * half])  # may round to infinity
    anything = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), generator=generator)
    bits = torch.cat([ties, anything, *(x - sign for x in (special, at_the_end) for sign in (0, 1 << 31))])
    x = torch.zeros(-(-bits.numel() // 1024) * 1024)
    x[: bits.numel()] = bits.to(torch.int32).view(torch.float32)
    return x


def rounded(x, emulate, bf16=False, how="tf32", edge=False):
    out = poisoned(x.numel())
    kernel = Kernel.of(_round, num_warps=4, N=1024, BF16=bf16, HOW=how, EDGE=edge, EMULATE=emulate)
    kernel.launch((x.numel() // 1024, 1, 1), x.to(DEVICE), out)
    return out.cpu()


def assert_rounded(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~want.isnan()], want.signbit()[~want.isnan()])


@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "compiled"])
def test_bf16_operand_is_rounded_to_nearest_even(emulate):
    if INTERPRETED and not emulate:
        pytest.skip("the interpreter's conversion to bfloat16 truncates; it needs a CUDA device")
    x = numbers_to_round(16)
    assert_rounded(rounded(x, emulate, bf16=True), x.bfloat16().float())


@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "compiled"])
def test_tf32_operand_is_rounded_to_nearest_away_from_zero(emulate):
    """To 10 bits of fraction; what rounds to 2^128 is infinite, and what is no number stays none.

    NaN here is as arithmetic makes it: the machine code of cvt.rna.tf32 masks the lowest 13 bits of any.
    """
    if INTERPRETED and not emulate:
        pytest.skip("the interpreter has no PTX; it needs a CUDA device")
    x = numbers_to_round(13)
    x[x.isnan()] = NAN
    exact = x.double()
    _, exponent = torch.frexp(exact)  # |x| of [1/2, 1) 2^exponent
    last = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-125) - 11)  # below 2^-126 the spacing stays
    want = torch.where(exact.isfinite(), exact.sign() * ((exact / last).abs() + 0.5).floor() * last, exact)
    assert_rounded(rounded(x, emulate), want.float().copysign(x))


@pytest.mark.parametrize("emulate", [True, False])
def test_float32_operand_is_left_alone(emulate):
    """But for a caller's finite numbers beyond tf32's largest, of which most would round to infinity."""
    x = numbers_to_round(13)
    assert torch.equal(rounded(x, emulate, how="tf32x3").view(torch.int32), x.view(torch.int32))
    beyond = (x.abs() > LARGEST_TF32) & x.isfinite()
    assert beyond.any()
    want = torch.where(beyond, x.sign() * LARGEST_TF32, x)
    assert torch.equal(rounded(x, emulate, how="tf32x3", edge=True).view(torch.int32), want.view(torch.int32))


# float32's product of three of tf32


def in_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    big, small = poisoned(x.numel()), poisoned(x.numel())
    kernel = Kernel.of(_apart, num_warps=4, N=1024, EMULATE=INTERPRETED)
    kernel.launch((x.numel() // 1024, 1, 1), x.to(DEVICE), big, small)
    return big.cpu(), small.cpu()


def test_a_number_is_taken_apart():
    """Into the nearest tf32 number and the rest, of which a tensor core takes the first bits: 2^-23 is lost at most."""
    x = numbers_to_round(13)
    x = x[(x.abs() <= LARGEST_TF32) & (x.abs() > 1e-30)]  # below, what is small has fewer bits than float32's least
    x = F.pad(x, (0, -len(x) % 1024), value=1.0)
    big, small = in_parts(x)
    assert not (big.view(torch.int32) & 0x1FFF).any()
    assert torch.equal(big, rounded(x, True))
    cut = (small.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    assert ((big.double() + cut - x.double()).abs() <= 2.0**-23 * x.abs().double()).all()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_what_is_no_number_does_not_come_back_as_one():
    x = torch.tensor([NAN, -NAN, INF, -INF]).repeat(256)
    x[:256] = torch.arange(0x7F800001, 0x7F800101, dtype=torch.int32).view(torch.float32)
    x[256:512] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert in_parts(x)[1].isnan().all()


def multiplied(a: torch.Tensor, b: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    """z + a @ b of [M, K] and [K, N]; without z of 0."""
    (M, K), N = a.shape, b.shape[1]
    out = poisoned(M * N).view(M, N)
    kernel = Kernel.of(_dot, num_warps=4, M=M, K=K, N=N, ADD=z is not None, EMULATE=INTERPRETED)
    kernel.launch((1, 1, 1), *(None if x is None else x.contiguous().to(DEVICE) for x in (a, b, z)), out)
    return out.cpu()


@pytest.mark.parametrize("scale", [1.0, 1e18, 1e-18])
@pytest.mark.parametrize("add", [True, False])
def test_float32_product_is_as_exact_as_float32(scale, add):
    """The bound allows for sums that are cut off twelve times; without one of the three products it is broken."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator) * scale
    z = torch.randn(64, 64, generator=generator) * scale if add else None
    exact = a.double() @ b.double() + (0 if z is None else z.double())
    allowed = 2.0**-20 * (a.abs().double() @ b.abs().double() + (0 if z is None else z.abs().double()))
    assert ((multiplied(a, b, z).double() - exact).abs() <= allowed).all()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here
def test_only_the_row_of_what_is_no_number_is_none():
    """Infinity times a number is NaN, too: an overflow does not end as an action within the bounds."""
    a, b = torch.ones(16, 32), torch.ones(32, 16)
    a[3, 5], a[7, 0], a[11, 31] = NAN, INF, -INF
    got = multiplied(a, b, None)
    assert got[[3, 7, 11]].isnan().all()
    spared = [i for i in range(16) if i not in (3, 7, 11)]
    assert (got[spared] == 32).all()


def test_the_largest_operands_are_numbers():
    """What a caller hands over, made an operand, is finite in its parts if it is finite."""
    largest = torch.finfo(torch.float32).max
    a = torch.full((16, 64), largest)
    a[1::2] *= -1
    operand = rounded(a.reshape(-1), INTERPRETED, how="tf32x3", edge=True).view(16, 64)
    assert not multiplied(operand, torch.zeros(64, 16), None).any()
    torch.testing.assert_close(
        multiplied(operand, torch.full((64, 16), 1e-3), None), a[:, :16] * 0.064, rtol=2**-10, atol=0
    )
