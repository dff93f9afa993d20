"""Every backend's actions and gradients in float32 against the transcription: every kind of chain. Sizes are in
`test_sizes`, random problems in `test_random`, reduced precisions in `test_rounding`; a GPU's side is in
`gpu/test_numbers`.
"""

from dataclasses import replace

import pytest
import torch
from support.backends import every_variant
from support.cases import (
    KINDS,
    TOLERANCES,
    Case,
    assert_all_close,
    assert_close,
    clear_of_kinks,
    expected,
    make_problem,
    plain_chain,
    run,
    run_problem,
)

import dql

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


@every_variant
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_equals_the_transcription(backend, case):
    assert_all_close(run(case, backend), expected(case), TOLERANCES["float32"], case=case, backend=backend)


def test_a_thousand_steps(backend):
    problem = make_problem(Case(B=1, S=3, A=2, K=1000, H=16, num_hidden=2, beta_schedule="linear"), torch.float32)
    with torch.no_grad():
        got, want = (
            dql.sample(problem.states, problem.policy, noise=problem.noise, backend=each) for each in (backend, "eager")
        )
    assert_close(got, want, TOLERANCES["float32"], what="actions", backend=backend)


def test_a_table_of_ones_own(backend):
    """Whose last step leaves the bounds, which no sampler's does: its clamp cuts gradients off too."""
    case = Case(B=37, S=3, A=3, K=3, H=16, num_hidden=2)
    rows = ((1.5, 0.8, 0.6, 0.3, 0.0, 0.5), (1.2, 0.6, 0.4, 0.3, 0.2, 0.4), (1.1, 0.3, 0.7, 0.9, -0.3, 0.0))
    exact, problem = (
        replace(make_problem(case, dtype), table=dql.StepTable("own", rows, (2, 1, 0)))
        for dtype in (torch.float64, torch.float32)
    )
    distances: list[Tensor] = []
    with torch.no_grad():
        plain_chain(exact, distances)
    weights = clear_of_kinks(exact, distances)
    want = run_problem(exact, "eager", weights)
    at_bound = (want["actions"].abs() == 1)[weights != 0].double().mean()
    assert 0.1 < at_bound < 0.9
    assert_all_close(run_problem(problem, backend, weights), want, TOLERANCES["float32"], case=case, backend=backend)
