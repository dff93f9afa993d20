"""Every backend's reduced precisions against float64 whose operands are rounded as that backend rounds them, see
`support.checks.Rounded`: every kind of chain. Sizes are in `test_rounding_sizes`.

Without a GPU tf32 and bf16 operands are rounded by hand, as a GPU rounds them, and a product of two is exact: they are
what they will be on one, but for its sums.
"""

import pytest
import torch
from support.backends import both_reduced, entry, every_precision, rounded
from support.cases import CASES, KINDS, error, expected, make_problem, run
from support.checks import check_rounded, rms_error

import dql

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


@rounded(KINDS)
def test_rounds_as_it_should(backend, reduced, case):
    check_rounded(case, backend, reduced, entry(backend).rounded[reduced])


@every_precision
def test_precisions_differ(backend, reduced):
    fp32, other = (run(CASES[3], backend, precision=name) for name in ("fp32", reduced))
    for name in fp32:
        assert error(other[name], fp32[name]) > 1e-5, name
    assert reduced != "bf16" or error(other["actions"], fp32["actions"]) > 1e-4


@pytest.mark.parametrize("case", [case for case in CASES[::4] if case.H >= 48 and case.K > 1], ids=str)
@both_reduced
def test_tf32_is_nearer_than_bf16(backend, case):
    problem, want = make_problem(case, torch.float32), expected(case)["actions"]

    def off(precision: str) -> float:
        options = {"num_candidates": case.N, "noise": problem.noise, "sampler": problem.table, "precision": precision}
        with torch.no_grad():
            return rms_error(dql.sample(problem.states, problem.policy, backend=backend, **options), want)

    assert off("bf16") > 2 * off("tf32")
