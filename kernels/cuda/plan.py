"""How a problem is cut for the CUDA kernels: rows a tile, blocks a cluster, whether weights stay on the chip.

A written model of time, in cycles of a multiprocessor, chooses among the tilings that fit. Its terms are counted or
taken from published measurements of Hopper GPUs. Per step of the chain and tile of M rows:

    a layer's product    M NS HP multiply-adds at 1024 (bf16), 512 (tf32) or 128 (fp32) a cycle, but at least the
                         latency of a warp's chain of k-groups: 40 each; 30 where weights are resident and one m-tile
                         on the tensor cores has two sums for each result (product.h)
    its activation       two results of the special function units each, 16 a cycle
    resident             500 cycles to exchange, and what leaves the block at 14 bytes a cycle (between the blocks of a
                         cluster); alone on a multiprocessor 60
    streamed             the weights at 64 bytes a cycle from the L2 cache, at 24 when every multiprocessor asks
    128 rows             everything overlaps but for a third

and once the resident weights at 30 bytes a cycle. What a step takes is more, since its terms overlap less and need more
instructions than they count: measured on an H200 (bench/results/2026-11-27-nvidia-h200-first.json, 1.9 GHz), steps of
published sizes took 3,500 cycles and, on top, 1.95 times the model where weights are resident, 3.45 times where they
are streamed, 1.7 times with tiles of 128 rows: within a third of each of 26 measurements, most within a tenth. Tiles of
128 rows have had less to do since, which no GPU has timed yet. How many clusters run at a time is asked of the device:
15 of 8 blocks there, and 30 of 4, where the multiprocessors would be enough for 16 and 33.

Few rows want many blocks each: clusters of 8 leave a block 32 of 256
columns. Many rows want few: what a cluster exchanges grows with its size, what a stream costs is shared by the rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..layout import CriticSpec, DenoiserSpec
from . import binding
from .binding import PRECISIONS

WIDE = 8  # m_tiles of the kernel for 128 rows
_MULTIPLY_ADDS = {"fp32": 128, "tf32": 512, "bf16": 1024}
_A_STEP = 3500  # cycles, whatever the tiling


@dataclass(frozen=True)
class Tiling:
    """How a problem is cut; see csrc/cuda/shapes.h.

    Attributes:
        cluster: blocks that share a tile: 1, 2, 4 or 8.
        m_tiles: 16 rows each, of a tile: 1, 2, 4 (not in fp32) or 8 (`WIDE`).
        resident: weights stay in shared memory for the whole chain; else they are streamed through it.
    """

    cluster: int
    m_tiles: int
    resident: bool

    @property
    def rows(self) -> int:
        return 16 * self.m_tiles

    def numbers(self, precision: str) -> tuple[int, int, int, int]:
        """As the extension's questions take it."""
        return PRECISIONS.index(precision), self.cluster, self.m_tiles, int(self.resident)

    def fields(self, precision: str) -> dict[str, float]:
        """As its launches are told it."""
        return dict(zip(("precision", "cluster", "m_tiles", "resident"), self.numbers(precision), strict=True))


@dataclass(frozen=True)
class Problem:
    """What a tiling is chosen for.

    Attributes:
        spec: sizes of the network.
        precision: "fp32", "tf32" or "bf16".
        rows: R.
        steps: K.
        networks: how many run side by side.
        saving: the forward pass saves for a backward pass, which has the same tiling.
    """

    spec: DenoiserSpec | CriticSpec
    precision: str
    rows: int
    steps: int
    networks: int
    saving: bool


_forced: list[Tiling] = []  # innermost last; of all threads, as torch runs backward passes in its own


@contextlib.contextmanager
def forced(tiling: Tiling) -> Iterator[None]:
    """`choose` gives this tiling, whatever fits: for measurements and tests. Plans made earlier keep theirs."""
    _forced.append(tiling)
    try:
        yield
    finally:
        del _forced[len(_forced) - 1 - _forced[::-1].index(tiling)]  # the innermost of those that are equal


def choose(problem: Problem, ordinal: int) -> Tiling:
    """The tiling for a problem on a device: a forced one, or the one that the model takes to be fastest.

    Raises:
        ValueError: none fits the device; see `misfit`.
    """
    if _forced:
        return _forced[-1]
    chosen = _chosen(_rounded(problem), ordinal, binding.emulating())
    if chosen is None:
        raise ValueError(misfit(problem, ordinal))
    return chosen


def misfit(problem: Problem, ordinal: int) -> str | None:
    """None if some tiling fits the device, else one sentence."""
    emulated = binding.emulating()
    if _forced or _chosen(_rounded(problem), ordinal, emulated) is not None:
        return None
    capability, _, shared, _ = binding.facts(ordinal, emulated)
    least = min(shared_bytes(problem, tiling, emulated) for tiling in _possible(problem, capability, False))
    in_bf16 = replace(problem, precision="bf16")
    remedy = "precision='bf16' or " if _chosen(_rounded(in_bf16), ordinal, emulated) is not None else ""
    return (
        f"a network of these sizes needs {least // 1024} KB of shared memory in {problem.precision}, and a block of "
        f"this GPU has {shared // 1024} KB; use {remedy}backend='triton'"
    )


def _rounded(problem: Problem) -> Problem:
    """With rows that all tilings cut alike, so that few problems are looked at."""
    rows = max(1, -(-problem.rows // 16)) * 16
    return replace(problem, rows=rows)


def _possible(problem: Problem, capability: int, wide: bool) -> list[Tiling]:
    heights = (1, 2) if problem.precision == "fp32" else (1, 2, 4)
    found = [Tiling(1, m, False) for m in heights]
    if capability >= 90:
        found += [Tiling(cluster, m, True) for cluster in (1, 2, 4, 8) for m in heights]
    spec = problem.spec
    if wide and isinstance(spec, DenoiserSpec) and spec.hidden_dim <= 256 and problem.precision == "bf16":
        found += [] if problem.saving else [Tiling(1, WIDE, False)]
    return found


@lru_cache(maxsize=4096)
def _chosen(problem: Problem, ordinal: int, emulated: bool) -> Tiling | None:
    capability, multiprocessors, shared, wide = binding.facts(ordinal, emulated)
    fitting = [t for t in _possible(problem, capability, wide) if shared_bytes(problem, t, emulated) <= shared]
    placed = {t: _at_once(problem, t, ordinal, emulated) for t in fitting}
    found = [(cycles(problem, t, multiprocessors, n), t.cluster, t.m_tiles, t) for t, n in placed.items() if n > 0]
    return min(found, key=lambda row: row[:3])[3] if found else None


def _at_once(problem: Problem, tiling: Tiling, ordinal: int, emulated: bool) -> int:
    """Clusters of such blocks that the device, or the share of it that this process has, runs at a time; 0: none."""
    if tiling.cluster == 1:
        return int(binding.facts(ordinal, emulated)[1])
    mlp = binding.mlp(problem.spec, emulated)
    return int(binding.load(emulated).max_clusters(ordinal, mlp, *tiling.numbers(problem.precision), 0))


def shared_bytes(problem: Problem, tiling: Tiling, emulated: bool | None = None) -> int:
    """Bytes of shared memory of a block; the same forward and backward."""
    emulated = binding.emulating() if emulated is None else emulated
    mlp = binding.mlp(problem.spec, emulated)
    return int(binding.load(emulated).shared_bytes(mlp, *tiling.numbers(problem.precision), 0))


def cycles(problem: Problem, tiling: Tiling, multiprocessors: int, at_once: int | None = None) -> float:
    """What the model takes a forward pass to last, but for the launch and the prologue.

    Args:
        at_once: clusters that run at a time; None: as many as there are multiprocessors for.
    """
    spec, M, C = problem.spec, tiling.rows, tiling.cluster
    H, L, A = spec.hidden_dim, spec.num_hidden, spec.action_dim
    element = 2 if problem.precision == "bf16" else 4
    unit = 32 if C == 1 else 16 * C
    HP = (128 if H <= 128 else 256) if tiling.m_tiles == WIDE else -(-H // unit) * unit
    NS = HP // C
    tiles = -(-problem.rows // M) * problem.networks
    at_once = max(1, multiprocessors // C) if at_once is None else at_once
    waves = -(-tiles // at_once)
    activation = M * NS * 2 / 16
    weights = (L - 1) * HP * HP * element
    from_cache = weights / (24 if min(tiles, at_once) * C > multiprocessors / 2 else 64)
    if tiling.m_tiles == WIDE:
        arithmetic = (L - 1) * M * HP * HP / 2048, L * M * HP * 20 / 128
        return waves * problem.steps * (_A_STEP + 1.7 * (1500 + 4 / 3 * max(*arithmetic, from_cache)))
    pairs = NS // 16
    split = max(1, 8 // pairs) if pairs < 8 else 1
    passes = -(-pairs * split // 8)
    groups = HP * element / 64
    # 10 less by the stalls in nvcc's machine code; streaming, a group's time goes into asking for later ones
    group = 30 if tiling.resident and tiling.m_tiles == 1 and problem.precision != "fp32" else 40
    product = max(M * NS * HP / _MULTIPLY_ADDS[problem.precision], 100 + group * passes * groups / split)
    narrow = 2 * M * A * NS / 128 + 300  # first and last layer, and the update
    if tiling.resident:
        exchange = 60.0 if C == 1 else 500 + M * NS * element * (C - 1) / 14
        step = L * (activation + exchange) + (L - 1) * product + narrow
        return weights / C / 30 + 1000 + waves * problem.steps * (_A_STEP + 1.95 * step)
    step = L * (activation + 60) + max((L - 1) * product, from_cache) + narrow
    return waves * problem.steps * (_A_STEP + 3.45 * step)
