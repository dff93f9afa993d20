"""The CUDA twin critics by every tiling: on a GPU if there is one, otherwise emulated. What all kernels for GPUs must
give is in `backends/test_critic`."""

import pytest
from support.cases import TOLERANCES, assert_all_close
from support.checks import rms_error
from support.critic import CASES, Case, Run, expected
from support.emulator import tilings

from dql.kernels import cuda
from dql.kernels.cuda.plan import Tiling, forced

TILED = [CASES[4], Case(B=70, S=11, A=24, H=130, num_hidden=4, activation="relu")]


@pytest.fixture(autouse=True)
def _runs(runs_here):
    runs_here("cuda")


@pytest.mark.parametrize("tiling", tilings("fp32"), ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_any_tiling_gives_the_same(case, tiling):
    with forced(tiling):
        got = Run(cuda, case).named()
    assert_all_close(got, expected(case), TOLERANCES["critic float32"], case=case, backend=f"cuda, {tiling}")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_any_tiling_rounds_alike(precision):
    """The same operands are rounded everywhere; sums in another order flip a few roundings."""
    found = []
    for tiling in tilings(precision):
        with forced(tiling):
            found.append((tiling, Run(cuda, CASES[4], precision).named()))
    _, first = found[0]
    for tiling, got in found[1:]:
        for name, want in first.items():
            if want.any():  # not of the critic that was not run
                assert rms_error(got[name], want) <= TOLERANCES["bf16 flips"].rel, f"{name} by {tiling}"


def test_a_backward_pass_has_the_tiling_of_its_forward_pass():
    """Whatever is chosen by then."""
    run = Run(cuda, CASES[4])
    usual = run.named()
    with forced(Tiling(2, 2, True)):
        other = Run(cuda, CASES[4])
    with forced(Tiling(1, 1, False)):
        got = other.named()
    assert other.saved.tiling == Tiling(2, 2, True)
    assert_all_close(got, usual, TOLERANCES["critic float32"], case=CASES[4], backend="cuda")
