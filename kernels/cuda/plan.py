"""How a problem is cut for the CUDA kernels: rows a tile, blocks a cluster, whether weights stay on the chip.

A written model of time, in cycles of a multiprocessor, chooses among the tilings that fit (`cost`). Its terms are
counted or taken from published measurements of Hopper GPUs:

    launches             3,200 each: what the smallest kernel takes in a graph, 1.7 us
    prologue             2,500 for weights, and 10,000 for all blocks of 16 states that run at a time, two a
                         multiprocessor. Solo blocks have none, and make the states' part of every tile: M + 64 times
                         S HP / 128, for multiply-adds and loads; of more than 6 steps 3,500 for 6 rows of a time table
    load                 the weights once: packed ones at 30 bytes a cycle; solo the float32 ones at 64, less when many
                         multiprocessors ask, at 24 when all do, and 2,500 of latency
    per step and tile of M rows
    a layer's product    M NS HP multiply-adds at 1024 (bf16), 512 (tf32) or 128 (fp32) a cycle, but at least the
                         latency of a warp's chain of k-groups: 40 each; 30 where weights are resident and one m-tile
                         on the tensor cores has two sums for each result (product.h). Solo at 512 a cycle, since eight
                         rows are half an instruction, and at least the bytes that it reads from shared memory, at 128
    its activation       two results of the special function units each, 16 a cycle, and 60
    exchange             of a cluster 500, and what leaves a block at 14 bytes a cycle, of the rows that there are
    stream               the weights at 64 bytes a cycle from the L2 cache, less when many multiprocessors ask
    narrow               first and last layer on the FMA units, and 300 for the update

A step takes more than the sum, since its terms overlap less and need more instructions than they count. Measured on an
H200 (bench/results/2026-11-27-nvidia-h200-first.json and -bench.json, 1.9 GHz; S = 17, A = 6, H = 256, five steps), it
takes 6,250 cycles, the exchange (a fifth of a step, as Nsight Compute told, and as counted) and 2.15 times the rest
where weights are resident; 17,000 and 1.95 times where they are streamed; 33,000 and 0.55 times with tiles of 128 rows:
each of 18, 8 and 3 measurements within 12, 8 and 5%. Solo blocks HAVE NOT RUN ON A GPU. 3,500 cycles and 1.35 times are
what is left of a resident step of 13,900 as it was profiled without the waits for other blocks (2,600), with the update
behind one barrier and its noise drawn by others meanwhile (2,100 less), with fewer instructions to fetch, and a product
that the bandwidth of shared memory bounds. How many clusters run at a time is asked of the device: 15 of 8 blocks
there, and 30 of 4, where the multiprocessors would be enough for 16 and 33.

Few rows want many blocks each or one alone that waits for nobody; many rows want few: what a cluster exchanges grows
with its size, what a stream costs is shared by the rows. `python bench/predicted.py REPORT` sets the model beside what
a GPU took.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..layout import CriticSpec, DenoiserSpec
from . import binding
from .binding import PRECISIONS

WIDE = 8  # m_tiles of the kernel for 128 rows
SOLO_ROWS = (4, 8, 16, 24)
FEW_ROWS = 4  # of a tile that float32 multiplies alone (product.h); every tile's height is a multiple
_MULTIPLY_ADDS = {"fp32": 128, "tf32": 512, "bf16": 1024}
_LAUNCH, _PROLOGUE, _SOLO_LOAD, _SOLO_TABLE = 3200, 2500, 2500, 3500
_SOLO_TABLE_STEPS = 6  # as shapes.h has it
_MEASURED = {"resident": (6250, 2.15), "streamed": (17000, 1.95), "wide": (33000, 0.55), "solo": (3500, 1.35)}
"""Kind of tiling -> (cycles of a step whatever its sum, factor of the sum but for the exchange); of solo expected."""
_WIDE_SINCE = 0.55
"""What a step of 128 rows takes of what it took when it was measured, expected: since its first and last layer are
products, too, a warp has 4,356 instructions in place of 7,773 and reads no states' part from device memory."""
_FP32_SINCE = {1: 0.70, 2: 0.61}
"""m_tiles -> what a float32 product takes of what it took when it was measured, by counting: then 18 and 34 loads of 16
bytes from shared memory, 4 cycles each, bounded a k-group's 128 and 256 multiply-adds of a warp; now they are 12 and
16, and issuing all 201 and 332 instructions bounds it, four a cycle (product.h; a test counts them)."""


@dataclass(frozen=True)
class Tiling:
    """How a problem is cut; see csrc/cuda/shapes.h.

    Attributes:
        cluster: blocks that share a tile: 1, 2, 4 or 8.
        m_tiles: 16 rows each, of a tile: 1, 2, 4 (not in fp32) or 8 (`WIDE`); 0 of solo tiles.
        resident: weights stay on the chip for the whole chain; else they are streamed through it.
        solo: rows of a tile that one block runs alone, with all weights in its registers and shared memory: 4, 8, 16
            or 24; 0 of others.
    """

    cluster: int
    m_tiles: int
    resident: bool
    solo: int = 0

    @classmethod
    def alone(cls, rows: int) -> "Tiling":
        """A solo tile of so many rows."""
        return cls(1, 0, True, rows)

    def __str__(self) -> str:
        if self.solo:
            return f"solo {self.solo}"
        if self.m_tiles == WIDE:
            return f"wide {self.rows}"
        return f"cluster {self.cluster} x {self.rows}" if self.resident else f"streamed {self.rows}"

    @property
    def rows(self) -> int:
        return self.solo or 16 * self.m_tiles

    def numbers(self, precision: str) -> tuple[int, int, int, int, int]:
        """As the extension's questions take it."""
        return PRECISIONS.index(precision), self.cluster, self.m_tiles, int(self.resident), self.solo

    def fields(self, precision: str) -> dict[str, float]:
        """As its launches are told it."""
        names = ("precision", "cluster", "m_tiles", "resident", "solo")
        return dict(zip(names, self.numbers(precision), strict=True))


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
        alone: nothing runs beside it in the same launch, which solo blocks do not take.
    """

    spec: DenoiserSpec | CriticSpec
    precision: str
    rows: int
    steps: int
    networks: int
    saving: bool
    alone: bool = True


_forced: list[Tiling] = []  # innermost last; of all threads, as torch runs backward passes in its own


@contextlib.contextmanager
def forced(tiling: Tiling) -> Iterator[None]:
    """`choose` gives this tiling, whatever fits: for measurements and tests. Plans made earlier keep theirs."""
    _forced.append(tiling)
    try:
        yield
    finally:
        del _forced[len(_forced) - 1 - _forced[::-1].index(tiling)]  # the innermost of those that are equal


_whole: list[bool] = []


@contextlib.contextmanager
def without(what: str) -> Iterator[None]:
    """Leaves out what was made to be faster, so that a measurement can tell what it is good for. Plans keep theirs.

    Args:
        what: "few rows": clusters exchange tiles that are not full whole; "carve-out": kernels that overlap ask for
            shared memory each as it needs it.
    """
    if what not in ("few rows", "carve-out"):
        raise ValueError(f"what must be 'few rows' or 'carve-out', got {what!r}")
    if what == "few rows":
        _whole.append(True)
    else:
        binding.module().compare(0)
    try:
        yield
    finally:
        if what == "few rows":
            _whole.pop()
        else:
            binding.module().compare(1)


def exchanges_whole_tiles() -> bool:
    """Whether `without("few rows")` is in force."""
    return bool(_whole)


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
    least = min(shared_bytes(problem, tiling, emulated) for tiling in possible(problem, capability, False))
    in_bf16 = replace(problem, precision="bf16")
    remedy = "precision='bf16' or " if _chosen(_rounded(in_bf16), ordinal, emulated) is not None else ""
    return (
        f"a network of these sizes needs {least // 1024} KB of shared memory in {problem.precision}, and a block of "
        f"this GPU has {shared // 1024} KB; use {remedy}backend='triton'"
    )


def _rounded(problem: Problem) -> Problem:
    """With rows that all tilings cut alike, so that few problems are looked at."""
    rows = max(1, -(-problem.rows // FEW_ROWS)) * FEW_ROWS
    return replace(problem, rows=rows)


def possible(problem: Problem, capability: int, wide: bool) -> list[Tiling]:
    """Those that there are kernels for, whether they fit or not."""
    heights = (1, 2) if problem.precision == "fp32" else (1, 2, 4)
    found = [Tiling(1, m, False) for m in heights]
    if capability >= 90:
        found += [Tiling(cluster, m, True) for cluster in (1, 2, 4, 8) for m in heights]
    spec = problem.spec
    if wide and isinstance(spec, DenoiserSpec) and spec.hidden_dim <= 256 and problem.precision == "bf16":
        found += [] if problem.saving else [Tiling(1, WIDE, False)]
    if _can_be_solo(problem):
        found += [Tiling.alone(rows) for rows in SOLO_ROWS if rows > 4 or not problem.saving]
    return found


def _can_be_solo(problem: Problem) -> bool:
    spec = problem.spec
    fits = isinstance(spec, DenoiserSpec) and spec.hidden_dim <= 256 and spec.hidden_dim % 4 == 0
    return fits and problem.precision == "bf16" and problem.alone


@lru_cache(maxsize=4096)
def _chosen(problem: Problem, ordinal: int, emulated: bool) -> Tiling | None:
    capability, multiprocessors, shared, wide = binding.facts(ordinal, emulated)
    fitting = [t for t in possible(problem, capability, wide) if shared_bytes(problem, t, emulated) <= shared]
    placed = {t: _at_once(problem, t, ordinal, emulated) for t in fitting}
    found = [(cost(problem, t, multiprocessors, n).total, t.cluster, t.rows, t) for t, n in placed.items() if n > 0]
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


def _reads_states(problem: Problem, tiling: Tiling) -> bool:
    """Whether the chain reads the states itself, and nothing is made of them before: then nothing is packed of them."""
    emulated = binding.emulating()
    mlp, numbers = binding.mlp(problem.spec, emulated), tiling.numbers(problem.precision)
    none, one = (binding.load(emulated).sizes(mlp, *numbers, B, B, problem.steps, 0, 1)[0] for B in (0, 1))
    return bool(none == one)


@dataclass(frozen=True)
class Cost:
    """What a forward pass is taken to last, in cycles: of a multiprocessor's clock.

    Attributes:
        launches: of kernels.
        prologue: packed weights, time table and the states' part, read and written.
        load: of resident weights.
        steps: of all steps, whatever their work.
        products, activations, exchange, stream, narrow: of all steps; what is hidden behind another part is 0.
    """

    launches: float
    prologue: float
    load: float
    steps: float
    products: float
    activations: float
    exchange: float
    stream: float
    narrow: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The name of the largest part."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.__getitem__)


def cost(problem: Problem, tiling: Tiling, multiprocessors: int, at_once: int | None = None) -> Cost:
    """What the model takes a forward pass to last; see the module.

    Args:
        at_once: clusters that run at a time; None: as many as there are multiprocessors for.
    """
    spec, M, C = problem.spec, tiling.rows, tiling.cluster
    H, L, A = spec.hidden_dim, spec.num_hidden, spec.action_dim
    element = 2 if problem.precision == "bf16" else 4
    wide = tiling.m_tiles == WIDE
    unit = 32 if C == 1 else 16 * C
    HP = (128 if H <= 128 else 256) if wide or tiling.solo else -(-H // unit) * unit
    NS = HP // C
    tiles = -(-problem.rows // M) * problem.networks
    at_once = max(1, multiprocessors // C) if at_once is None else at_once
    waves = -(-tiles // at_once)
    kind = "wide" if wide else "solo" if tiling.solo else "resident" if tiling.resident else "streamed"
    least, factor = map(float, _MEASURED[kind])
    times, weights = waves * problem.steps, (L - 1) * HP * HP * element
    by_cache = min(64, 24 * multiprocessors / (min(tiles, at_once) * C))  # bytes a cycle
    blocks = problem.networks * problem.rows / 16  # of the prologue's, for states
    prologue: float = _PROLOGUE + 10000 * (-(-blocks // (2 * multiprocessors)) - 1)
    # Per step:
    activations = L * (M * NS * 2 / 16 + 60)
    narrow = 2 * M * A * NS / 128 + 300
    load = exchange = stream = 0.0
    if wide:
        if _reads_states(problem, tiling):
            least, factor, prologue = _WIDE_SINCE * least, _WIDE_SINCE * factor, _PROLOGUE
        activations, narrow = 0.0, 1500.0
        arithmetic = max((L - 1) * M * HP * HP / 2048, L * M * HP * 20 / 128)
        products, stream = (4 / 3 * arithmetic, 0.0) if arithmetic > weights / by_cache else (0.0, weights / by_cache)
        stream *= 4 / 3
    elif tiling.solo:
        rows = max(8, M)
        read = (L - 1) * 8 * rows * HP * element / 128, (L - 2) * HP * HP * element / 128
        tensor = (L - 1) * max(rows * HP * HP / 1024, 40 * HP * element / 64)
        products = max(tensor, sum(read))
        load = (L - 1) * HP * HP * 4 / by_cache + _SOLO_LOAD
        # its blocks make the states' part themselves, of each tile, and the time table for so many steps at a time
        tables = -(-problem.steps // _SOLO_TABLE_STEPS) if problem.steps > _SOLO_TABLE_STEPS else 0
        prologue = waves * (spec.state_dim * HP * (M + 64) / 128 + tables * _SOLO_TABLE)
    else:
        pairs = NS // 16
        split = max(1, 8 // pairs) if pairs < 8 else 1
        passes = -(-pairs * split // 8)
        groups = HP * element / 64
        # 10 less by the stalls in nvcc's machine code; streaming, a group's time goes into asking for later ones
        group = 30 if tiling.resident and tiling.m_tiles == 1 and problem.precision != "fp32" else 40
        live = min(M, problem.rows) if tiles <= at_once and not problem.saving else M  # rows that are exchanged
        multiplied = live if problem.precision == "fp32" and tiling.m_tiles == 1 and live <= FEW_ROWS else M
        product = max(multiplied * NS * HP / _MULTIPLY_ADDS[problem.precision], 100 + group * passes * groups / split)
        if problem.precision == "fp32":
            product *= _FP32_SINCE[tiling.m_tiles]
        products = (L - 1) * product
        if tiling.resident:
            load = weights / C / 30 + 1000
            # what a cluster exchanges in place of the 60 cycles of a block's own barrier
            exchange = L * (440 + live * NS * element * (C - 1) / 14) if C > 1 else 0.0
        elif weights / by_cache > products:
            products, stream = 0.0, weights / by_cache
    launches = _LAUNCH * (1 if tiling.solo else 2)
    products, activations, stream, narrow = (times * factor * part for part in (products, activations, stream, narrow))
    return Cost(launches, prologue, load, times * least, products, activations, times * exchange, stream, narrow)
