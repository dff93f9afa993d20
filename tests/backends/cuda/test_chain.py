"""The backend "cuda" in the emulator, on the CPU: its actions and gradients against the transcription, on every path
through the kernels. What needs a GPU is in `gpu/test_numbers`, callers' concerns are in `cuda/test_calls`.

The emulator runs the kernels' own source; tensor cores multiply there as the PTX manual says that they do.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import (
    CASES,
    TOLERANCES,
    Case,
    assert_all_close,
    assert_close,
    error,
    expected,
    make_problem,
    run,
    run_problem,
)
from support.checks import check_against_eager, check_bf16, random_cases, rms_error
from support.emulator import skip_without_emulator, tilings

import dql
from dql.kernels.cuda import chain as cuda_chain
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import Tiling

skip_without_emulator()

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _poisoned():
    """torch fills what it allocates, as its deterministic mode does, and every bit pattern of it is a NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty(8, dtype=torch.uint8).view(torch.float32).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_transcription(case):
    assert_all_close(run(case, "cuda"), expected(case), TOLERANCES["float32"], case=case, backend="cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16(case):
    check_bf16(case, "cuda")  # the first and the last layer are float32


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_tf32(case):
    """Operands have 10 bits of fraction, three more than bf16's: errors are an eighth."""
    got, bf16, want = run(case, "cuda", precision="tf32"), run(case, "cuda", precision="bf16"), expected(case)
    assert rms_error(got["actions"], want["actions"]) <= TOLERANCES["bf16 in all"].rel / 8
    if case.H >= 48 and case.K > 1:
        assert rms_error(bf16["actions"], want["actions"]) > 2 * rms_error(got["actions"], want["actions"])


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_differ(precision):
    fp32, other = (run(CASES[3], "cuda", precision=name) for name in ("fp32", precision))
    for name in fp32:
        assert error(other[name], fp32[name]) > 1e-5, name


# Tilings

TILED = [
    Case(B=37, S=11, A=3, K=3, H=48),  # padded to 128 by clusters of 8
    Case(B=9, S=3, A=40, K=3, N=5, H=24, num_hidden=2, activation="silu"),
    Case(B=70, S=5, A=20, K=2, H=130, num_hidden=4, activation="relu", max_action=3.0),
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


@pytest.mark.parametrize(
    "case", [*(replace(c, H=H) for c in TILED[:2] for H in (100, 256)), replace(TILED[0], H=256, A=24)], ids=str
)
def test_128_rows(case):
    """The kernel for many rows: forward alone. With 24 actions its small layers' weights stay in device memory."""
    problem = make_problem(replace(case, B=4 * case.B), torch.float32)  # a whole tile and a part
    options = {"noise": problem.noise, "num_candidates": case.N, "precision": "bf16", "sampler": problem.table}
    with torch.no_grad():
        want = dql.sample(problem.states, problem.policy, backend="cuda", **options)
        with cuda_plan.forced(Tiling(1, cuda_plan.WIDE, False)):
            got = dql.sample(problem.states, problem.policy, backend="cuda", **options)
    assert rms_error(got, want) <= TOLERANCES["bf16 flips"].rel
    assert float((got == want).double().mean()) > 0.2, "the operands are the same"


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


# Random problems


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_cases(), st.sampled_from(tilings("fp32")))
def test_random_problems(case, tiling):
    spec = make_problem(case, torch.float32).policy.denoiser.spec
    problem = cuda_plan.Problem(spec, "fp32", case.rows, case.K, 1, True)
    if cuda_plan.shared_bytes(problem, tiling) > 227 * 1024:
        tiling = Tiling(1, 1, False)
    with cuda_plan.forced(tiling):
        check_against_eager(case, "cuda")


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, S=512, A=64, K=2, H=512, num_hidden=4, time_dim=64),
        Case(B=15, S=1, A=1, K=2, H=1, num_hidden=2, activation="silu", time_dim=4),
        Case(B=9, S=3, A=2, K=33, H=16, num_hidden=2, predict_epsilon=False, max_action=20.0),
    ],
    ids=["largest", "smallest", "many steps"],
)
def test_the_corners_of_what_it_takes(case):
    assert check_against_eager(case, "cuda") >= 0.3


def test_a_thousand_steps():
    problem = make_problem(Case(B=1, S=3, A=2, K=1000, H=16, num_hidden=2, beta_schedule="linear"), torch.float32)
    with torch.no_grad():
        got = dql.sample(problem.states, problem.policy, noise=problem.noise, backend="cuda")
        want = dql.sample(problem.states, problem.policy, noise=problem.noise, backend="eager")
    assert_close(got, want, TOLERANCES["float32"], what="actions", backend="cuda")


def test_a_table_of_ones_own():
    """Whose last step leaves the bounds, which no sampler's does: its clamp cuts gradients off too."""
    case = Case(B=37, S=3, A=3, K=3, H=16, num_hidden=2)
    rows = ((1.5, 0.8, 0.6, 0.3, 0.0, 0.5), (1.2, 0.6, 0.4, 0.3, 0.2, 0.4), (1.1, 0.3, 0.7, 0.9, -0.3, 0.0))
    make: Callable[[torch.dtype], object] = lambda dtype: replace(  # noqa: E731
        make_problem(case, dtype), table=dql.StepTable("own", rows, (2, 1, 0))
    )
    want, got = run_problem(make(torch.float64), "eager"), run_problem(make(torch.float32), "cuda")
    assert_close(got["actions"], want["actions"], TOLERANCES["float32"], what="actions", case=case)
    assert rms_error(got["d_states"], want["d_states"]) < 0.1  # rounding cuts a few gradients off
