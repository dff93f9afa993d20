"""The backend "cuda" in the emulator by every tiling: the same numbers whatever the cut, and whatever the order. A
GPU's side is in `gpu/test_tilings`.

The emulator runs the kernels' own source; tensor cores multiply there as the PTX manual says that they do.
"""

from dataclasses import replace

import pytest
import torch
from support import cancelling
from support.cases import TOLERANCES, Case, assert_all_close, expected, make_problem, run
from support.checks import rms_error
from support.emulator import tilings

import dql
from dql.kernels.cuda import chain as cuda_chain
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import Tiling

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("emulated", "poisoned")

TILED = [
    Case(B=37, S=11, A=3, K=3, H=48),  # padded to 128 by clusters of 8
    Case(B=9, S=3, A=40, K=3, N=5, H=24, num_hidden=2, activation="silu"),
    Case(B=70, S=5, A=20, K=2, H=130, num_hidden=4, activation="relu", max_action=3.0),
    Case(B=1, S=33, A=1, K=2, H=256, num_hidden=2),
    Case(B=3, S=7, A=6, K=3, H=72),  # so few that other rows of the tile are neither multiplied nor exchanged
]
SMOOTH = 1e5  # an action bound that nothing reaches: rounding cuts no gradient off


@pytest.mark.parametrize("tiling", tilings("fp32"), ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_any_tiling_gives_the_same(case, tiling):
    with cuda_plan.forced(tiling):
        got = run(case, "cuda")
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend=f"cuda, {tiling}")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_any_tiling_rounds_alike(case, precision):
    """The same operands are rounded; only sums are added up in another order, which flips a few roundings."""
    case = replace(case, max_action=SMOOTH)
    found = []
    for tiling in tilings(precision):
        with cuda_plan.forced(tiling):
            found.append((tiling, run(case, "cuda", precision=precision)))
    _, first = found[0]
    for tiling, got in found[1:]:
        for name, want in first.items():
            assert rms_error(got[name], want) <= TOLERANCES["bf16 flips"].rel, f"{name} by {tiling}"


MANY = [
    *(replace(c, H=H) for c in TILED[:2] for H in (100, 256)),
    replace(TILED[0], H=256, A=24),  # the small layers' weights stay in device memory
    *(Case(B=37, S=S, A=A, K=5, H=H) for S, A in ((17, 6), (29, 8), (60, 9)) for H in (128, 256)),
    Case(B=37, S=17, A=6, K=1, H=256, num_hidden=2),
    Case(B=37, S=17, A=6, K=2, H=128, num_hidden=2, activation="relu"),
    Case(B=37, S=1, A=1, K=2, H=256, num_hidden=4),
    Case(B=280, S=17, A=6, K=3, H=128, num_hidden=2),  # nine tiles, of which a block has two or three
]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_128_rows(case, scale):
    """The kernel for many rows: forward alone. Its first layer is a product of one to three slabs of [x, state], or, by
    60 + 9 columns of width 256, a sum onto the states' part: as good as float32 beside the hidden layers' rounding."""
    case = replace(case, B=4 * case.B, max_action=SMOOTH)  # a whole tile and a part
    problem = make_problem(case, torch.float32)
    found = []
    for tiling in (Tiling(1, 4, False), Tiling(1, cuda_plan.WIDE, False)):
        with torch.no_grad(), cuda_plan.forced(tiling):
            found.append(
                dql.sample(
                    scale * problem.states, problem.policy, backend="cuda", noise=problem.noise,
                    num_candidates=case.N, precision="bf16", sampler=problem.table,
                )
            )  # fmt: skip
    assert rms_error(found[1], found[0]) <= TOLERANCES["bf16 flips"].rel


def both(sampled: cancelling.Sampled) -> list[Tensor]:
    """Actions by streamed weights and by tiles of 128 rows."""
    policy, states, noise = sampled
    found = []
    for tiling in (Tiling(1, 4, False), Tiling(1, cuda_plan.WIDE, False)):
        with torch.no_grad(), cuda_plan.forced(tiling):
            found.append(dql.sample(states, policy, backend="cuda", noise=noise, precision="bf16"))
    return found


@pytest.mark.parametrize("S", [17, 29, 60])
def test_a_first_layer_of_128_rows_that_cancels(S):
    want, got = both(cancelling.first_layer(S))
    assert want.abs().min() > 0
    assert torch.equal(got, want)


@pytest.mark.parametrize("column", [0, 7, 130, 255])
def test_a_last_layer_of_128_rows_that_cancels(column):
    """Of 3 2^-10, 2^-19 may be missing."""
    want, got = both(cancelling.last_layer(column))
    assert want.abs().min() > 0
    assert ((got - want) / want).abs().max() < 1e-3


def test_128_rows_are_for_sampling_alone():
    policy = dql.DiffusionPolicy(5, 3, hidden_dim=64)
    with cuda_plan.forced(Tiling(1, cuda_plan.WIDE, False)):
        with torch.no_grad(), pytest.raises(ValueError, match="forward pass in bf16 with H up to 256"):
            dql.sample(torch.zeros(1, 5), policy, backend="cuda", precision="fp32")
        with pytest.raises(ValueError, match="save nothing for a backward pass"):
            dql.sample(torch.zeros(1, 5), policy, backend="cuda", precision="bf16")


@pytest.mark.parametrize("tiling", [Tiling(8, 1, True), Tiling(1, 1, False)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_in_any_order(tiling, precision):
    """Of threads and of bytes' arrivals, which the emulator shuffles anew at each run: nothing is a race."""
    with cuda_plan.forced(tiling):
        first, *others = (run(TILED[0], "cuda", precision=precision) for _ in range(3))
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_sums_in_parts(monkeypatch):
    case = Case(B=130, S=70, A=3, K=4, H=80, num_hidden=2)
    want, asked = run(case, "cuda"), []
    parts = cuda_chain.Launcher.parts

    def recorded(self, rows):
        asked.append((parts(self, rows), rows))
        return 7

    monkeypatch.setattr(cuda_chain.Launcher, "parts", recorded)
    got = run(case, "cuda")
    assert asked == [(2, 520)]
    assert_all_close(got, want, TOLERANCES["sums"], case=case, backend="cuda, seven parts")
