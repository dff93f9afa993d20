"""Counter-based randomness: the one noise stream that every backend reproduces.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a
64-bit key into four 32-bit words. The key is the seed; the counter names the number that is wanted, so nothing is
ever "drawn next": the same seed gives the same numbers on every device, in any order and in any batch.

    normal:   element (k, row, dim) comes from the counter words (row, k, dim // 4, offset). With the output words
              w0..w3 and u(w) = ((w >> 9) + 1/2) / 2^23, which float32 holds exactly,
                  n0, n1 = sqrt(-2 ln u(w0)) * (cos, sin)(2 pi u(w1))
                  n2, n3 = sqrt(-2 ln u(w2)) * (cos, sin)(2 pi u(w3))
              are dims 4j .. 4j+3, where j = dim // 4.
    uniform:  element row is u(w0) at the counter (row, 2^32 - 1, 0, offset); no chain has that many steps, so it
              never meets a normal of the same seed.
    integers: element i is floor(w * high / 2^32), w being word i % 4 at the counter (i // 4, 2^32 - 2, 0, offset).

`offset` numbers repeated draws with one seed.
"""

import hashlib
import math
import threading
from functools import lru_cache

import numpy as np
import torch

from dql.shown import shown

Tensor = torch.Tensor
MASK32 = 0xFFFFFFFF
UNIFORM_STEP = MASK32  # the counter word that stands for k in `uniform`
INTEGER_STEP = MASK32 - 1  # ... and in `integers`
_ROUNDS = 10
_MASK, _HALF = np.array([[MASK32]], np.uint64), np.array([[32]], np.uint64)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)  # of the even words; [2, 1]
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_PACKED = 192  # counters up to which `_philox_packed` is faster
_CHUNK = 1 << 13  # counters worked on at a time, so that the words stay in the cache


def check_seed(seed: int) -> int:
    """Returns `seed` as an int of [0, 2^64).

    Raises:
        ValueError: it is not an integer of that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, got {shown(seed)}")
    return int(seed)


def derive(seed: int, *tags: int | str) -> int:
    """A child seed: the same (seed, tags) give the same child, different tags give independent streams.

    Args:
        seed: the parent, 0 .. 2^64 - 1.
        tags: what the child is for, e.g. `derive(seed, "bc", step)`.

    Returns:
        BLAKE2b with an 8-byte digest of the tuple's repr, read as a little-endian integer.
    """
    text = repr((check_seed(seed), *(tag if isinstance(tag, str) else int(tag) for tag in tags)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_from_torch() -> int:
    """A seed drawn from torch's default CPU generator, so that `torch.manual_seed` makes runs repeat."""
    return int(_drawn.tensor.random_().item())


def fresh_seed(device: torch.device) -> int | Tensor:
    """`seed_from_torch`; while a CUDA graph is captured on `device`, an int64 tensor [1] that every replay draws anew
    from the device's generator, as torch's own random operators do.

    The draw is a small kernel of its own in the graph. A counter in device memory would do without, but know nothing of
    `torch.cuda.manual_seed`, which is to make replays repeat: at a replay nothing runs but the graph, and torch hands
    the generator's state to its own operators alone.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(1, dtype=torch.int64, device=device).random_()
    return seed_from_torch()


class _Drawn(threading.local):
    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty((), dtype=torch.int64, device="cpu")


_drawn = _Drawn()


def _keys(seed: int) -> np.ndarray:
    """The key of each round, uint64 [rounds, 2, 1]."""
    return (np.array([[seed & MASK32], [seed >> 32]], np.uint64) + _KEY_STEPS) & _MASK


def _philox(even: np.ndarray, odd: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Philox4x32-10 of the counter words (even[0], odd[0], even[1], odd[1]), each in uint64 [2, n]; output alike.

    The keys are those of a seed, [rounds, 2, 1], or of each counter, [rounds, 2, n].
    """
    for key in keys:
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd
        even ^= key
        product &= _MASK
        odd = product[::-1]
    return even, odd


def _philox_packed(words: tuple[int, int, int, int], n: int, seed: int) -> np.ndarray:
    """`_philox` for a few counters: [2, 2, n] = (even, odd), as `np.stack(_philox(...))`.

    Each word of the n counters is packed into one Python integer, a 64-bit lane a counter: a product of 32-bit numbers
    fills its lane exactly, so one multiplication serves all lanes. Three times faster than NumPy for n = 10.
    """
    c0, c1, c2, c3 = words
    ones, lanes = _lanes(n)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & lanes) ^ c1 ^ (ones * k0), p1 & lanes
        c2, c3 = ((p0 >> 32) & lanes) ^ c3 ^ (ones * k1), p0 & lanes
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    data = b"".join(word.to_bytes(8 * n, "little") for word in (c0, c2, c1, c3))
    return np.frombuffer(data, "<u8").reshape(2, 2, n)


@lru_cache(maxsize=256)
def _lanes(n: int) -> tuple[int, int]:
    """(1, 2^32 - 1) in each of n 64-bit lanes."""
    ones = sum(1 << (64 * i) for i in range(n))
    return ones, ones * MASK32


@lru_cache(maxsize=256)
def _packed_counters(K: int, rows: int, blocks: int, row_offset: int) -> tuple[int, int, int, int]:
    (row, block), (k, zero) = _build_counters(K, rows, blocks, row_offset)
    c0, c1, c2, c3 = (int.from_bytes(word.astype("<u8").tobytes(), "little") for word in (row, k, block, zero))
    return c0, c1, c2, c3


def _philox_torch(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 with 32-bit words in int64 tensors that broadcast, on any device; nothing is copied to it."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap modulo 2^64: both halves are right although it is signed
        c0, c1 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32
        c2, c3 = ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _build_counters(K: int, rows: int, blocks: int, row_offset: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The counter words of a chain's normals, (row, block) and (k, offset): each uint64 [2, K * rows * blocks]."""
    k, row, block = np.meshgrid(
        np.arange(K, dtype=np.uint64),
        np.arange(row_offset, row_offset + rows, dtype=np.uint64),
        np.arange(blocks, dtype=np.uint64),
        indexing="ij",
    )
    even = np.stack([row.ravel(), block.ravel()])
    odd = np.stack([k.ravel(), np.full(k.size, offset, np.uint64)])
    return even, odd


_kept_counters = lru_cache(maxsize=32)(_build_counters)


def _unit(words: np.ndarray) -> np.ndarray:
    """The open unit interval from 32-bit words, exact in float32 and wider."""
    return ((words >> 9) + 0.5) * 2.0**-23


def _box_muller(words: np.ndarray, out: np.ndarray) -> None:
    """Normals [n, pair, cos | sin] from words [radius | angle, pair, n]."""
    radius, angle = _unit(words)
    radius = np.sqrt(np.log(radius) * -2.0)
    angle *= 2.0 * math.pi
    np.multiply(radius, np.cos(angle), out=out[:, :, 0].T, casting="same_kind")
    np.multiply(radius, np.sin(angle), out=out[:, :, 1].T, casting="same_kind")


def normal(
    seed: int | Tensor,
    K: int,
    B: int,
    A: int,
    *,
    offset: int = 0,
    row_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals [K, B, A]: noise[0] is x_T, noise[k] feeds the update of step k - 1.

    Computed in float64 and rounded once to `dtype`, so it is the reference for every kernel's own stream.

    Args:
        seed: 0 .. 2^64 - 1, or an int64 tensor [1] on the device with those bits.
        K: steps.
        B: rows; with candidates, row b * N + n is candidate n of state b.
        A: action size.
        offset: number of the draw with this seed, 0 .. 2^32 - 1.
        row_offset: id of the first row: rows r .. r + B of a larger batch are the same numbers.

    Raises:
        ValueError: the seed, the offset or a row's id is out of range.

    The result may be a view with gaps between its rows (where A is no multiple of 4).
    """
    seed = seed if isinstance(seed, Tensor) else check_seed(seed)
    if not 0 <= offset <= MASK32:
        raise ValueError(f"offset must be from 0 to 2^32 - 1, got {offset}")
    if row_offset < 0 or row_offset + B > 1 << 32:
        raise ValueError(f"row ids must be from 0 to 2^32 - 1, got {row_offset} to {row_offset + B - 1}")
    if K >= INTEGER_STEP:
        raise ValueError(f"K must be below 2^32 - 2, got {K}")
    blocks = (A + 3) // 4
    count = K * B * blocks
    if count == 0:
        return torch.zeros(K, B, A, dtype=dtype, device=device)
    if not isinstance(seed, Tensor) and torch.device(device).type == "cpu":
        values = np.empty((count, 2, 2), np.float64 if dtype == torch.float64 else np.float32)  # [.., pair, cos | sin]
        if count <= _PACKED:
            c0, c1, c2, c3 = _packed_counters(K, B, blocks, row_offset)
            words = _philox_packed((c0, c1, c2, c3 | _lanes(count)[0] * offset), count, seed)
            _box_muller(words, values)
        else:
            build = _kept_counters if count <= _CHUNK else _build_counters
            even, odd = build(K, B, blocks, row_offset, offset)
            keys = _keys(seed)
            for start in range(0, count, _CHUNK):
                chunk = slice(start, start + _CHUNK)
                _box_muller(np.stack(_philox(even[:, chunk], odd[:, chunk], keys)), values[chunk])
        return torch.from_numpy(values.reshape(K, B, blocks * 4)[:, :, :A]).to(dtype)
    k = torch.arange(K, device=device)[:, None, None]
    row = torch.arange(row_offset, row_offset + B, device=device)[:, None]
    block = torch.arange(blocks, device=device)
    on_device = _philox_torch(row, k, block, torch.full_like(block, offset), seed)  # each [K, B, blocks]
    u0, u1, u2, u3 = (((w >> 9).double() + 0.5) * 2.0**-23 for w in on_device)
    pairs = []
    for u, v in ((u0, u1), (u2, u3)):
        radius, angle = (u.log() * -2.0).sqrt(), v * (2.0 * math.pi)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=-1).to(dtype).view(K, B, blocks * 4)[:, :, :A]


def _words(seed: int, count: int, step: int, offset: int) -> np.ndarray:
    """Output words [4, count] at the counters (0 .. count - 1, step, 0, offset)."""
    even = np.stack([np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)])
    odd = np.repeat(np.array([[step], [offset]], np.uint64), count, axis=1)
    even, odd = _philox(even, odd, _keys(check_seed(seed)))
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seed: int | Tensor, count: int, *, offset: int = 0) -> Tensor:
    """Uniform numbers of (0, 1), float64 [count] on the CPU; `select` draws its candidate with one a state.

    For a seed that is an int64 tensor [1], they are on its device.
    """
    if isinstance(seed, Tensor):
        row, zero = torch.arange(count, device=seed.device), torch.zeros_like(seed)
        return ((_philox_torch(row, zero + UNIFORM_STEP, zero, zero + offset, seed)[0] >> 9).double() + 0.5) * 2.0**-23
    return torch.from_numpy(_unit(_words(seed, count, UNIFORM_STEP, offset)[0]))


def integers(seed: int, high: int, count: int, *, offset: int = 0) -> Tensor:
    """Integers of [0, high), int64 [count] on the CPU. Their probabilities differ by at most high / 2^32.

    Raises:
        ValueError: `high` is not in 1 .. 2^32.
    """
    if not 1 <= high <= 1 << 32:
        raise ValueError(f"high must be from 1 to 2^32, got {high}")
    words = _words(seed, (count + 3) // 4, INTEGER_STEP, offset).T.reshape(-1)[:count]
    return torch.from_numpy((words * np.uint64(high) >> np.uint64(32)).astype(np.int64))


def derived(seed: int, tag: str, first: int, n: int) -> np.ndarray:
    """`derive(seed, tag, i)` for i of first .. first + n - 1, uint64 [n]."""
    head = f"({check_seed(seed)}, {tag!r}, "
    digests = [hashlib.blake2b(f"{head}{i})".encode(), digest_size=8).digest() for i in range(first, first + n)]
    return np.frombuffer(b"".join(digests), "<u8")


def integers_of(*groups: tuple[np.ndarray, int, int]) -> list[np.ndarray]:
    """Of each (seeds, high, count) `integers(seed, high, count)` of each seed: int64 [n, count] for uint64 [n].

    All in one pass: NumPy's calls on few numbers cost more than the numbers.
    """
    blocks = [(count + 3) // 4 for _, _, count in groups]
    # The counters of the first group's first seed, of its second one, ...
    index = np.concatenate(
        [np.tile(np.arange(b, dtype=np.uint64), len(g[0])) for g, b in zip(groups, blocks, strict=True)]
    )
    of_each = np.concatenate([np.repeat(g[0], b) for g, b in zip(groups, blocks, strict=True)])
    keys = (
        np.stack([of_each & np.uint64(MASK32), of_each >> np.uint64(32)]) + _KEY_STEPS
    ) & _MASK  # [rounds, 2, total]
    zero = np.zeros_like(index)
    even, odd = _philox(np.stack([index, zero]), np.stack([np.full_like(index, INTEGER_STEP), zero]), keys)
    words = np.stack([even[0], odd[0], even[1], odd[1]], axis=1).reshape(-1)  # as they follow each other
    found, start = [], 0
    for (seeds, high, count), b in zip(groups, blocks, strict=True):
        end = start + 4 * b * len(seeds)
        of_group = words[start:end].reshape(len(seeds), 4 * b)[:, :count]
        found.append((of_group * np.uint64(high) >> np.uint64(32)).astype(np.int64))
        start = end
    return found
