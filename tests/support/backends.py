"""The backends that are tested, as the registry has them, and what their tests must know of each beyond its name.

A backend whose kernels are a GPU's runs without one where something stands in for it: Triton's interpreter, or the
emulator of the CUDA kernels. The tests of `backends/` hand it tensors on the CPU, so there it runs in no other way.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from dql.backend.gpu import GpuBackend
from dql.backend.registry import of_gpus, registry
from dql.kernels.cpp import binding
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import Tiling
from support import interpreter
from support.cases import CASES, TOLERANCES, Case, assert_close, make_problem
from support.checks import CPP, CUDA, TRITON, Rounded
from support.emulator import compile_emulator, tilings
from support.networks import same_bits

Draw = Callable[[Any], Any]  # of one of Hypothesis's strategies, which a GPU's machine may be without
Way = AbstractContextManager[Any]


@dataclass(frozen=True)
class Entry:
    """What the tests know of a backend with kernels of its own. One without an entry computes with torch's operators:
    it is tested in float32, and its last bits are torch's, which depend on other rows and on strides.

    Attributes:
        stand_in: makes ready what runs the kernels in a GPU's place; None, or why it cannot.
        variants: of its instructions, each with None or why it does not run here; `forced` lets one run, `in_use` names
            the one that does.
        rounded: its reduced precisions, and what tells that they round as they should.
        cases: how large random problems are, see `random_cases`.
        examples: how many of them.
        any_cut: draws a way to cut a case's rows into tiles.
        tiles_of_16_rows: with it rows are cut into those, always.
    """

    stand_in: Callable[[], str | None] = lambda: None
    variants: dict[str, str | None] = field(default_factory=dict)
    forced: Callable[[str], Way] = lambda variant: nullcontext()
    in_use: Callable[[], str] = lambda: ""
    rounded: dict[str, Rounded] = field(default_factory=dict)
    cases: dict[str, Any] = field(default_factory=dict)
    examples: int = 15
    any_cut: Callable[[Draw, Case], Way] = lambda draw, case: nullcontext()
    tiles_of_16_rows: Callable[[], Way] = nullcontext


def _interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux only)"
    versions = importlib.metadata.version("triton"), np.__version__
    triton, numpy = (tuple(int(part) for part in version.split(".")[:2]) for version in versions)
    if triton < (3, 7) and numpy >= (2, 4):  # it takes int() of arrays [1]
        return f"the interpreter of Triton {versions[0]} cannot use NumPy {versions[1]}; pip install 'numpy<2.4'"
    interpreter.quicken()
    return None


def _any_tiling(draw: Draw, case: Case) -> Way:
    from hypothesis import strategies as st

    tiling = draw(st.sampled_from(tilings("fp32")))
    spec = make_problem(case, torch.float32).policy.denoiser.spec
    problem = cuda_plan.Problem(spec, "fp32", case.rows, case.K, 1, True)
    fits = cuda_plan.shared_bytes(problem, tiling) <= 227 * 1024
    return cuda_plan.forced(tiling if fits else Tiling(1, 1, False))


def _any_tiles(draw: Draw, case: Case) -> Way:
    from hypothesis import strategies as st

    from support.triton_tiles import Tile, forced

    forward, backward = (
        Tile(draw(st.sampled_from([16, 32, 64])), 16, 2, draw(st.sampled_from([1, 4, 8]))) for _ in range(2)
    )
    return forced(forward, backward)


def _tiles_of_16_rows() -> Way:
    from support.triton_tiles import TILES, forced

    return forced(TILES[0])


ENTRIES = {
    "cpp": Entry(
        variants=binding.variants(),
        forced=binding.forced,
        in_use=binding.in_use,
        rounded=CPP,
        cases={"most_rows": 40, "most_steps": 20, "steps_of_large": 20, "often_H": (16, 32, 64, 96)},
        examples=200,
    ),
    "cuda": Entry(
        stand_in=compile_emulator,
        rounded=CUDA,
        examples=25,
        any_cut=_any_tiling,
        tiles_of_16_rows=lambda: cuda_plan.forced(Tiling(2, 1, True)),
    ),
    "triton": Entry(
        stand_in=_interpreter,
        rounded=TRITON,
        any_cut=_any_tiles,
        tiles_of_16_rows=_tiles_of_16_rows,
    ),
}
NAMES = [name for name in registry() if name != "eager"]  # which all others are measured against
OF_GPUS = of_gpus()


def entry(name: str) -> Entry:
    return ENTRIES.get(name, Entry())


def has_kernels(name: str) -> bool:
    """Whether it computes with kernels of its own, which give the same bits whatever the other rows are."""
    return name in ENTRIES


def assert_same(backend: str, got: list[torch.Tensor], want: list[torch.Tensor], case: object) -> None:
    """To the bit with kernels of its own, else to rounding."""
    assert same_bits(got, want) or not has_kernels(backend), case
    for tensor, wanted in zip(got, want, strict=True):
        assert_close(tensor, wanted, TOLERANCES["float32"], what="a tensor", case=case, backend=backend)


def _each(name: str) -> list[Any]:
    """A backend in every variant of its instructions: "cpp-avx2"."""
    return [
        pytest.param(f"{name}-{variant}", marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for variant, reason in entry(name).variants.items()
    ] or [name]


every_variant = pytest.mark.parametrize("backend", [way for name in NAMES for way in _each(name)], indirect=True)
REDUCED = [(name, precision) for name in NAMES for precision in entry(name).rounded]
every_precision = pytest.mark.parametrize(("backend", "reduced"), REDUCED, indirect=True)
in_bf16 = pytest.mark.parametrize(("backend", "reduced"), [way for way in REDUCED if way[1] == "bf16"], indirect=True)
both_reduced = pytest.mark.parametrize(  # of those whose tf32 is compared with nothing that rounds likewise
    "backend",
    [name for name in NAMES if "bf16" in (of := entry(name).rounded) and "tf32" in of and of["tf32"].chain is None],
    indirect=True,
)


def rounded(cases: list[Case]) -> pytest.MarkDecorator:
    """Every reduced precision of every backend, with those of the cases that are run in it."""
    found = []
    for name, precision in REDUCED:
        every = entry(name).rounded[precision].every
        chosen = [case for case in CASES[::every] if case in cases]
        found += [pytest.param(name, precision, case, id=f"{name}-{precision}-{case}") for case in chosen]
    return pytest.mark.parametrize(("backend", "reduced", "case"), found, indirect=["backend", "reduced"])


def not_ready(name: str) -> str | None:
    """Why this machine has not what it takes to run the backend on tensors of the CPU, or None; the backend itself is
    not asked. Makes that ready first."""
    backend = registry()[name]
    if isinstance(backend, GpuBackend) and not backend.stands_in():
        variable, _ = backend.kernels.STAND_IN
        if torch.cuda.is_available():
            return f"a CUDA device is there, for the tests of a GPU; set {variable}=1 to have {name!r} without it"
        return f"{variable}=1 was not set before the tests began"
    return entry(name).stand_in()


def cannot_stand_in(name: str) -> str | None:
    """Why the backend does not run on tensors of the CPU here, or None. Makes ready first what is to run it."""
    return not_ready(name) or registry()[name].check()


def cannot_run(name: str) -> str | None:
    """Why its kernels run neither on a GPU nor in the place of one, or None. Makes ready first what is to run it."""
    if isinstance(registry()[name], GpuBackend) and torch.cuda.is_available():
        return registry()[name].check()
    return cannot_stand_in(name)
