"""The written model that chooses how a problem is cut for the CUDA kernels, and what overrules it. Which tilings fit
which GPU is in `cuda/test_resources`."""

import itertools
import time
from dataclasses import replace

import pytest
from support.emulator import tilings

from dql.kernels.cuda import binding
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import WIDE, Problem, Tiling, choose, cycles, forced
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
        chosen = choose(problem, 0)
        assert chosen in fitting
        rounded = replace(problem, rows=-(-rows // 16) * 16)
        assert cycles(rounded, chosen, H200[1]) == min(cycles(rounded, t, H200[1]) for t in fitting)


def test_clusters_are_as_many_as_the_device_places(on):
    """An H200 was seen to run 15 clusters of 8 blocks at a time, not 16: 256 rows in them take two turns, 68 us beside
    39 us in clusters of 4 (bench/results/2026-11-27-nvidia-h200-first.json and the run after it)."""
    on(H200, {1: 132, 2: 66, 4: 30, 8: 15})
    for precision in binding.PRECISIONS:
        of = replace(PUBLISHED, precision=precision)
        assert choose(replace(of, rows=1), 0) == Tiling(8, 1, True)
        assert choose(replace(of, rows=15 * 16), 0) == Tiling(8, 1, True)
        assert choose(replace(of, rows=15 * 16 + 1), 0) == choose(of, 0) == Tiling(4, 1, True)
    on(H200)
    assert choose(PUBLISHED, 0) == Tiling(8, 1, True)


def test_before_hopper_weights_are_streamed(on):
    on(A100)
    for precision, rows in itertools.product(binding.PRECISIONS, (1, 256, 65536)):
        chosen = choose(replace(PUBLISHED, precision=precision, rows=rows), 0)
        assert (chosen.cluster, chosen.resident) == (1, False) and chosen.m_tiles != WIDE


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
    for rows in (0, 1, 7, 16):
        choose(replace(PUBLISHED, rows=rows), 0)
    assert cuda_plan._chosen.cache_info().misses == 1
    choose(replace(PUBLISHED, rows=17), 0)
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


def test_a_tiling_in_the_extensions_words():
    assert Tiling(4, 2, True).numbers("tf32") == (1, 4, 2, 1)
    assert Tiling(1, WIDE, False).numbers("bf16") == (2, 1, 8, 0)
    assert Tiling(1, 4, False).rows == 64
