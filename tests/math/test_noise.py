"""The noise stream: known answers, the transcription, independence of place and order, moments."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import transcription
from support.cases import TOLERANCES, assert_close

from dql import noise

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, output: Random123's kat_vectors, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # the digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, ONES, 1 << 32, 0x299F31D0A4093822, (1 << 64) - 1]


def philox_numpy(counter, seed):
    even, odd = noise._philox(
        *(np.array([[counter[i]], [counter[i + 2]]], np.uint64) for i in (0, 1)), noise._keys(seed)
    )
    return int(even[0, 0]), int(odd[0, 0]), int(even[1, 0]), int(odd[1, 0])


def philox_torch(counter, seed):
    return tuple(int(word) for word in noise._philox_torch(*(torch.tensor([word]) for word in counter), seed))


def philox_packed(counter, seed):
    """The counter in the last of three lanes, so that a carry out of the others would show."""
    words = tuple(ONES | ONES << 64 | word << 128 for word in counter)
    even, odd = noise._philox_packed(words, 3, seed)
    return int(even[0, 2]), int(odd[0, 2]), int(even[1, 2]), int(odd[1, 2])


@pytest.mark.parametrize("philox", [philox_numpy, philox_torch, philox_packed])
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(philox, counter, key, output):
    assert philox(counter, key[0] | key[1] << 32) == output


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("A", [1, 3, 4, 5, 24])
def test_normal_equals_the_transcription(seed, A):
    got = noise.normal(seed, 3, 7, A, dtype=torch.float64)
    want = transcription.philox_normal(seed, 3, 7, A)
    assert_close(got, want, TOLERANCES["noise"], what="normal", case=f"seed {seed}, A {A}")


def test_float32_is_float64_rounded_once():
    wide = noise.normal(3, 4, 50, 6, dtype=torch.float64)
    assert torch.equal(noise.normal(3, 4, 50, 6), wide.float())
    assert noise.normal(3, 4, 50, 6).dtype == torch.float32


def test_rows_do_not_depend_on_the_batch():
    whole = noise.normal(11, 5, 37, 6, dtype=torch.float64)
    pieces = {
        "the first rows": (noise.normal(11, 5, 20, 6, dtype=torch.float64), whole[:, :20]),
        "the last rows": (noise.normal(11, 5, 20, 6, row_offset=17, dtype=torch.float64), whole[:, 17:]),
        "fewer steps": (noise.normal(11, 2, 37, 6, dtype=torch.float64), whole[:2]),
        "fewer dims": (noise.normal(11, 5, 37, 3, dtype=torch.float64), whole[:, :, :3]),
        "one row": (noise.normal(11, 5, 1, 6, row_offset=30, dtype=torch.float64), whole[:, 30:31]),
    }
    for case, (got, want) in pieces.items():
        assert_close(got, want, TOLERANCES["noise"], what="normal", case=case)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(0, 1 << 20),
    st.integers(0, (1 << 64) - 1),
)
def test_every_element_has_its_own_counter(K, B, A, row_offset, seed):
    got = noise.normal(seed, K, B, A, row_offset=row_offset, dtype=torch.float64)
    assert got.shape == (K, B, A)
    if got.numel():
        k, row, dim = K - 1, B - 1, A - 1
        key = (seed & ONES, seed >> 32)
        words = transcription.philox4x32((row_offset + row, k, dim // 4, 0), key)
        first, second = words[:2] if dim % 4 < 2 else words[2:]
        angle = 2 * math.pi * transcription.uniform(second)
        radius = math.sqrt(-2 * math.log(transcription.uniform(first)))
        want = radius * (math.cos(angle) if dim % 2 == 0 else math.sin(angle))
        assert float(got[k, row, dim]) == pytest.approx(want, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("boundary", [noise._PACKED, noise._CHUNK])
def test_calls_of_every_size_give_the_same(boundary):
    """Small, middling and large calls are computed in different ways."""
    whole = noise.normal(5, 1, boundary + 1, 4, dtype=torch.float64)
    for rows in (boundary - 1, boundary):
        got = noise.normal(5, 1, rows, 4, dtype=torch.float64)
        assert_close(got, whole[:, :rows], TOLERANCES["noise"], what="normal", case=f"{rows} rows")
    last = noise.normal(5, 1, 2, 4, row_offset=boundary - 1, dtype=torch.float64)
    assert_close(last, whole[:, -2:], TOLERANCES["noise"], what="normal", case="the last rows alone")
    before = noise.normal(5, 2, 3, 4)
    noise.normal(5, 2, 3, 4, offset=7)  # must not change counters that are kept
    assert torch.equal(noise.normal(5, 2, 3, 4), before)


def test_offset_numbers_the_draws():
    seed, offset = 9, 3
    got = noise.normal(seed, 2, 3, 2, offset=offset, dtype=torch.float64)
    large = noise.normal(seed, 2, noise._PACKED, 2, offset=offset, dtype=torch.float64)
    assert_close(large[:, :3], got, TOLERANCES["noise"], what="normal", case="a larger call")
    words = transcription.philox4x32((2, 1, 0, offset), (seed, 0))
    radius = math.sqrt(-2 * math.log(transcription.uniform(words[0])))
    want = radius * math.cos(2 * math.pi * transcription.uniform(words[1]))
    assert float(got[1, 2, 0]) == pytest.approx(want, rel=1e-13)
    assert not torch.equal(got, noise.normal(seed, 2, 3, 2, dtype=torch.float64))


def test_moments():
    """A million normals. Bounds are five standard errors; the numbers are fixed, so the test cannot flicker."""
    x = noise.normal(7, 10, 5000, 20, dtype=torch.float64)
    n = x.numel()
    assert abs(float(x.mean())) < 5 / math.sqrt(n)
    assert abs(float((x**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert float(x.abs().max()) <= math.sqrt(-2 * math.log(2.0**-24))  # the smallest u is 2^-24
    # the distribution itself: Kolmogorov-Smirnov, whose statistic exceeds 1.95 once in a thousand
    cdf = torch.special.ndtr(x.flatten().sort().values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((cdf - steps).abs().max()) * math.sqrt(n) < 1.95


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["steps", "rows", "dims"])
def test_neighbours_are_uncorrelated(dimension):
    x = noise.normal(7, 10, 5000, 20, dtype=torch.float64)
    a, b = x.narrow(dimension, 0, x.shape[dimension] - 1), x.narrow(dimension, 1, x.shape[dimension] - 1)
    for f in (lambda v: v, lambda v: v**2 - 1):
        correlation = float((f(a) * f(b)).mean() / (f(a) ** 2).mean())
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_seeds_are_uncorrelated():
    x = noise.normal(1000, 1, 100_000, 1, dtype=torch.float64).flatten()
    for seed in (1001, 1000 + (1 << 32), noise.derive(1000, "child")):
        y = noise.normal(seed, 1, 100_000, 1, dtype=torch.float64).flatten()
        assert abs(float((x * y).mean())) < 5 / math.sqrt(100_000)


def test_uniform_by_hand_and_its_range():
    got = noise.uniform(5, 6, offset=2)
    want = [transcription.uniform(transcription.philox4x32((row, ONES, 0, 2), (5, 0))[0]) for row in range(6)]
    assert got.dtype == torch.float64
    assert got.tolist() == want
    many = noise.uniform(6, 100_000)
    assert float(many.min()) > 0
    assert float(many.max()) < 1
    assert torch.equal(many.float().double(), many)  # float32 holds them exactly
    assert abs(float(many.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 100_000)
    assert torch.equal(noise.uniform(6, 10), many[:10])


@pytest.mark.parametrize("high", [1, 2, 5, 1000, 1 << 32])
def test_integers_by_hand_and_their_range(high):
    words = [w for i in range(3) for w in transcription.philox4x32((i, ONES - 1, 0, 0), (5, 0))]
    assert noise.integers(5, high, 11).tolist() == [w * high >> 32 for w in words[:11]]
    many = noise.integers(6, high, 20_000)
    assert many.dtype == torch.int64
    assert 0 <= int(many.min()) <= int(many.max()) < high
    if 1 < high <= 1000:
        counts = torch.bincount(many, minlength=high).double()
        chi2 = float(((counts - 20_000 / high) ** 2 / (20_000 / high)).sum())
        assert abs(chi2 - (high - 1)) < 5 * math.sqrt(2 * (high - 1))
    assert torch.equal(noise.integers(6, high, 7), many[:7])
    assert not torch.equal(noise.integers(6, high, 50, offset=1), many[:50]) or high == 1


def test_integers_refuse_an_empty_range():
    for high in (0, -3, (1 << 32) + 1):
        with pytest.raises(ValueError, match=r"high must be from 1 to 2\^32, got " + str(high)):
            noise.integers(0, high, 4)


def test_uniform_and_integers_do_not_meet_the_normals():
    """One seed for all three, as `select` uses it: the counters differ, so no word is shared."""
    counters = {(row, k, block, 0) for row in range(50) for k in range(1000) for block in range(2)}
    assert not counters & {(row, noise.UNIFORM_STEP, 0, 0) for row in range(50)}
    assert not counters & {(row, noise.INTEGER_STEP, 0, 0) for row in range(50)}
    assert noise.UNIFORM_STEP != noise.INTEGER_STEP


def test_derive():
    assert noise.derive(5, "bc", 3) == noise.derive(5, "bc", 3)
    want = int.from_bytes(hashlib.blake2b(b"(5, 'bc', 3)", digest_size=8).digest(), "little")
    assert noise.derive(5, "bc", 3) == want  # a run's randomness is these very bytes: it must not change by accident
    children = {noise.derive(s, tag, step) for s in range(10) for tag in ("target", "bc_t", "") for step in range(100)}
    assert len(children) == 10 * 3 * 100
    assert all(0 <= child < 1 << 64 for child in children)
    bits = np.array([[child >> i & 1 for i in range(64)] for child in children])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(children))


def test_derive_keeps_different_tags_apart():
    assert noise.derive(1, "a/b") != noise.derive(1, "a", "b")


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5, "7", None, True, float("nan")])
def test_bad_seeds(seed):
    calls = (
        lambda: noise.normal(seed, 1, 1, 1),
        lambda: noise.uniform(seed, 1),
        lambda: noise.integers(seed, 2, 1),
        lambda: noise.derive(seed, "x"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\^64 - 1, got "):
            call()


def test_numpy_integers_are_seeds():
    assert torch.equal(noise.normal(np.int64(7), 1, 2, 2), noise.normal(7, 1, 2, 2))
    assert torch.equal(noise.normal(np.uint64(2**64 - 1), 1, 2, 2), noise.normal(2**64 - 1, 1, 2, 2))


def test_seed_from_torch_follows_manual_seed():
    state = torch.get_rng_state()
    try:
        torch.manual_seed(4)
        first, second = noise.seed_from_torch(), noise.seed_from_torch()
        torch.manual_seed(4)
        assert noise.seed_from_torch() == first != second
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_many_seeds_at_once(seed):
    """The same bits as one after the other, of several groups in one pass."""
    derived = {tag: noise.derived(seed, tag, 5, 9) for tag in ("bc_t", "coin")}
    assert [int(s) for s in derived["coin"]] == [noise.derive(seed, "coin", i) for i in range(5, 14)]
    found = noise.integers_of((derived["bc_t"], 5, 37), (derived["coin"], 2, 1), (derived["coin"][:2], 2**32, 8))
    wanted = [(derived["bc_t"], 5, 37), (derived["coin"], 2, 1), (derived["coin"][:2], 2**32, 8)]
    for got, (seeds, high, count) in zip(found, wanted, strict=True):
        assert torch.equal(torch.from_numpy(got), torch.stack([noise.integers(int(s), high, count) for s in seeds]))
