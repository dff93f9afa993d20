"""The written model that chooses how a problem is cut for the CUDA kernels, and what overrules it. Which tilings fit
which GPU is in `cuda/test_resources`."""

import itertools
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support import ROOT
from support.emulator import tilings

from dql.kernels.cuda import binding
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import SOLO_ROWS, WIDE, Problem, Tiling, choose, cost, forced
from dql.kernels.layout import CriticSpec, DenoiserSpec

pytestmark = pytest.mark.usefixtures("emulated")

H200 = (90, 132, 227 * 1024, True)
A100 = (80, 108, 163 * 1024, False)
PUBLISHED = Problem(DenoiserSpec(17, 6), "bf16", 256, 5, 1, False)  # of the paper's HalfCheetah
WAYS = {"saving": {"saving": True}, "critics": {"spec": CriticSpec(17, 6), "steps": 1, "networks": 2}}


@pytest.fixture
def on(monkeypatch):
    """The GPU that plans are made for from now on: its facts, and how many clusters of a size it runs at a time."""

    def set_facts(facts: tuple[int, int, int, bool], at_once: dict[int, int] | None = None) -> None:
        def placed(problem: Problem, tiling: Tiling, ordinal: int, emulated: bool) -> int:
            return facts[1] // tiling.cluster if at_once is None else at_once[tiling.cluster]

        monkeypatch.setattr(binding, "facts", lambda ordinal, emulated: facts)
        monkeypatch.setattr(cuda_plan, "_at_once", placed)
        cuda_plan._chosen.cache_clear()

    yield set_facts
    cuda_plan._chosen.cache_clear()


@pytest.mark.parametrize("precision", binding.PRECISIONS)
@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=["forward", *WAYS])
def test_the_least_cycles_of_those_that_fit(on, precision, way):
    on(H200)
    for rows in (1, 16, 17, 256, 1000, 4096, 1 << 20):
        problem = replace(PUBLISHED, precision=precision, rows=rows, **way)
        fitting = [t for t in tilings(precision) if cuda_plan.shared_bytes(problem, t) <= H200[2]]
        if problem == replace(PUBLISHED, rows=rows):
            fitting.append(Tiling(1, WIDE, False))
        if precision == "bf16" and problem.networks == 1:
            fitting += [Tiling.alone(height) for height in SOLO_ROWS if height > 4 or not problem.saving]
        chosen = choose(problem, 0)
        assert chosen in fitting
        rounded = replace(problem, rows=-(-rows // 4) * 4)
        assert cost(rounded, chosen, H200[1]).total == min(cost(rounded, t, H200[1]).total for t in fitting)


def test_clusters_are_as_many_as_the_device_places(on):
    """An H200 was seen to run 15 clusters of 8 blocks at a time, not 16: 256 rows in them take two turns, 68 us beside
    39 us in clusters of 4 (bench/results/2026-11-27-nvidia-h200-first.json and the run after it)."""
    on(H200, {1: 132, 2: 66, 4: 30, 8: 15})
    for precision in ("fp32", "tf32"):
        of = replace(PUBLISHED, precision=precision)
        assert choose(replace(of, rows=1), 0) == Tiling(8, 1, True)
        assert choose(replace(of, rows=15 * 16), 0) == Tiling(8, 1, True)
        assert choose(replace(of, rows=15 * 16 + 1), 0) == choose(of, 0) == Tiling(4, 1, True)
    on(H200)
    assert choose(replace(PUBLISHED, precision="tf32"), 0) == Tiling(8, 1, True)


def test_few_rows_in_bf16_are_a_block_alones(on):
    """As few a tile as there are multiprocessors for; critics and what is wider have other kernels."""
    on(H200, {1: 132, 2: 66, 4: 30, 8: 15})
    for rows, height in ((1, 4), (256, 4), (528, 8), (2112, 16), (2500, 24)):
        assert choose(replace(PUBLISHED, rows=rows), 0) == Tiling.alone(height)
    assert choose(replace(PUBLISHED, rows=256, saving=True), 0) == Tiling.alone(8)
    for other in (
        {"precision": "tf32"},
        {"spec": DenoiserSpec(17, 6, 272)},
        {"spec": DenoiserSpec(17, 6, 254)},
        {"spec": DenoiserSpec(17, 6, 256, 4)},  # 256 KB of weights in shared memory
        WAYS["critics"],
    ):
        assert choose(replace(PUBLISHED, **other), 0).solo == 0


def test_the_model_is_as_near_as_it_says(on, monkeypatch):
    """Device times of an H200, us (bench/results/2026-11-27-nvidia-h200-first.json, -bench.json, -profile.md)."""
    monkeypatch.setattr(cuda_plan, "_FP32_SINCE", {1: 1.0, 2: 1.0})
    monkeypatch.setattr(cuda_plan, "_reads_states", lambda problem, tiling: False)
    measured = {
        ("bf16", Tiling(8, 1, True)): {1: 37.3, 37: 36.6, 256: 68.4},
        ("bf16", Tiling(4, 1, True)): {37: 40.9, 256: 41.9},
        ("bf16", Tiling(2, 1, True)): {37: 45.4, 256: 47.2},
        ("bf16", Tiling(2, 4, True)): {2500: 93.9},
        ("tf32", Tiling(8, 1, True)): {1: 39.3, 37: 38.1, 256: 69.0},
        ("tf32", Tiling(4, 1, True)): {37: 41.5, 256: 44.1},
        ("fp32", Tiling(8, 1, True)): {1: 46.7, 37: 44.9, 256: 86.0},
        ("fp32", Tiling(4, 1, True)): {37: 60.6, 256: 58.9},
        ("bf16", Tiling(1, 2, False)): {37: 91.7, 256: 91.4},
        ("tf32", Tiling(1, 2, False)): {37: 119.7, 256: 119.5},
        ("fp32", Tiling(1, 2, False)): {37: 257.4, 256: 257.1, 65536: 4090},
        ("tf32", Tiling(1, 4, False)): {65536: 1560},
        ("bf16", Tiling(1, WIDE, False)): {37: 127.0, 256: 127.5, 65536: 540},
    }
    near = {"resident": 0.12, "streamed": 0.08, "wide": 0.05}
    for (precision, tiling), times in measured.items():
        kind = "resident" if tiling.resident else "wide" if tiling.m_tiles == WIDE else "streamed"
        for rows, us in times.items():
            whole = -(-rows // tiling.rows) * tiling.rows  # as it ran then
            problem = replace(PUBLISHED, precision=precision, rows=whole)
            placed = {1: 132, 2: 66, 4: 30, 8: 15}[tiling.cluster]
            told = cost(problem, tiling, 132, placed)
            assert abs(math.log(told.total / 1900 / us)) < near[kind], (precision, tiling, rows, told.total / 1900, us)


def test_few_rows_cost_less_of_an_exchange_and_of_float32():
    tiling = Tiling(8, 1, True)
    for precision in binding.PRECISIONS:
        few, many = (cost(replace(PUBLISHED, precision=precision, rows=rows), tiling, 132) for rows in (4, 16))
        assert few.exchange < many.exchange
        assert (few.products < many.products) == (precision == "fp32")
        saving = cost(replace(PUBLISHED, precision=precision, rows=4, saving=True), tiling, 132)
        assert saving == many, "what is saved is made of whole tiles"


def test_tiles_of_128_rows_cost_less_where_they_read_the_states():
    """As the kernels have room for them: of 60 + 9 columns the states' part is made before."""
    wide = Tiling(1, WIDE, False)
    for spec, reads in ((DenoiserSpec(17, 6), True), (DenoiserSpec(29, 8), True), (DenoiserSpec(60, 9), False)):
        problem = replace(PUBLISHED, spec=spec, rows=65536)
        assert cuda_plan._reads_states(problem, wide) == reads
        assert (cost(problem, wide, 132).prologue < 10000) == reads


def test_numbers_that_the_kernels_have_too():
    shapes, product = ((ROOT / "csrc" / "cuda" / name).read_text() for name in ("shapes.h", "product.h"))
    assert f"SOLO_TABLE_STEPS = {cuda_plan._SOLO_TABLE_STEPS};" in shapes
    assert f"FEW = {cuda_plan.FEW_ROWS};" in product


def test_a_cost_says_what_bounds_it():
    found = {
        rows: cost(replace(PUBLISHED, rows=rows), tiling, 132).bound
        for rows, tiling in ((1, Tiling.alone(4)), (2500, Tiling(2, 4, True)), (1 << 20, Tiling(1, WIDE, False)))
    }
    assert found == {1: "steps", 2500: "products", 1 << 20: "steps"}
    told = cost(PUBLISHED, Tiling(1, 2, False), 132)
    assert told.exchange == told.load == 0 and told.launches == 2 * cost(PUBLISHED, Tiling.alone(8), 132).launches


def test_before_hopper_weights_are_streamed_or_a_block_alones(on):
    on(A100)
    for precision, rows in itertools.product(binding.PRECISIONS, (1, 256, 65536)):
        chosen = choose(replace(PUBLISHED, precision=precision, rows=rows), 0)
        assert chosen.cluster == 1 and chosen.m_tiles != WIDE
        assert bool(chosen.solo) == (precision == "bf16" and rows < 65536) == chosen.resident


def test_128_rows_are_for_sampling_in_bf16(on):
    """A forward pass of a denoiser that saves nothing, on the one GPU whose tensor cores it speaks to."""
    on(H200)
    many = replace(PUBLISHED, rows=1 << 20)
    assert choose(many, 0).m_tiles == WIDE
    others = [replace(many, **way) for way in WAYS.values()]
    others += [replace(many, precision="tf32"), replace(many, spec=DenoiserSpec(17, 6, 272))]
    assert all(choose(problem, 0).m_tiles != WIDE for problem in others)
    on((100, 148, 227 * 1024, False))
    assert choose(many, 0).m_tiles != WIDE


def test_rows_that_all_tilings_cut_alike_share_a_plan(on):
    on(H200)
    for rows in (0, 1, 3, 4):
        choose(replace(PUBLISHED, rows=rows), 0)
    assert cuda_plan._chosen.cache_info().misses == 1
    choose(replace(PUBLISHED, rows=5), 0)
    assert cuda_plan._chosen.cache_info().misses == 2


def test_a_plan_that_was_made_costs_little(on):
    """It is asked for by every call. The bound allows for a machine that is busy."""
    on(H200)
    choose(PUBLISHED, 0)
    start = time.perf_counter()
    for _ in range(100):
        choose(PUBLISHED, 0)
    assert (time.perf_counter() - start) / 100 < 1e-3


def test_forced_tilings_nest():
    first, second = Tiling(1, 1, False), Tiling(2, 1, True)
    usual = choose(PUBLISHED, 0)
    with forced(first):
        with forced(second):
            with forced(Tiling(1, 1, False)):
                assert choose(PUBLISHED, 0) == first
            assert choose(PUBLISHED, 0) == second
        assert choose(PUBLISHED, 0) == first
        with pytest.raises(KeyError), forced(second):
            raise KeyError
        assert choose(PUBLISHED, 0) == first
    assert choose(PUBLISHED, 0) == usual


def test_what_makes_it_faster_can_be_left_out(monkeypatch):
    told: list[int] = []
    monkeypatch.setattr(binding, "module", lambda: SimpleNamespace(compare=told.append))

    def fails(what: str) -> None:
        with cuda_plan.without(what):
            assert (cuda_plan.exchanges_whole_tiles(), told) == {"few rows": (True, []), "carve-out": (False, [0])}[
                what
            ]
            raise KeyError

    for what in ("few rows", "carve-out"):
        with pytest.raises(KeyError):
            fails(what)
        assert not cuda_plan.exchanges_whole_tiles()
    assert told == [0, 1]
    with pytest.raises(ValueError, match="'few rows' or 'carve-out', got 'all'"):
        fails("all")


def test_a_tiling_in_the_extensions_words():
    assert Tiling(4, 2, True).numbers("tf32") == (1, 4, 2, 1, 0)
    assert Tiling(1, WIDE, False).numbers("bf16") == (2, 1, 8, 0, 0)
    assert Tiling.alone(24).numbers("bf16") == (2, 1, 0, 1, 24)
    assert (Tiling(1, 4, False).rows, Tiling.alone(24).rows) == (64, 24)
