"""What the backend "cpp" promises beyond the others: the same bits in any batch and with any number of threads, and a
gradient of the longest chain. Whether its numbers are right is in `backends/test_numbers` and its neighbours."""

import math

import pytest
import torch
from support.cases import CASES, Case, make_problem, run
from support.checks import check_against_eager
from support.networks import VARIANTS, A, H, S, make_critic, make_policy, needs_bf16, needs_cpp, states_of

import dql
from dql.backend.cpp import step_table
from dql.kernels.cpp import binding

Tensor = torch.Tensor
pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(params=VARIANTS)
def variant(request):
    with binding.forced(request.param):
        assert binding.in_use() == request.param
        yield request.param


def test_gaps_between_parameters_are_left_alone(variant):
    """The gradient's buffer is written where parameters lie and nowhere else: NaN stays NaN in the gaps."""
    problem = make_problem(Case(B=5, S=S, A=A, K=5, H=H), torch.float32)
    spec, flat = problem.policy.denoiser.spec, problem.policy.denoiser.buffer
    network, table = binding.Network(spec), step_table(problem.table, spec.time_dim)
    actions, saved = binding.chain(
        network, flat, table, problem.states, 1, problem.noise, 0, problem.policy.max_action, False, save=True
    )
    d_flat, d_states = torch.full_like(flat, math.nan), torch.full_like(problem.states, math.nan)
    assert binding.chain_backward(network, saved, table, problem.states, problem.weights, d_flat, d_states)
    assert actions.isfinite().all() and d_states.isfinite().all()
    inside = torch.zeros_like(d_flat, dtype=torch.bool)
    for view in spec.layout.views(inside).values():
        view.fill_(True)
    assert d_flat[inside].isfinite().all()
    assert d_flat[~inside].isnan().all()
    before = d_flat.clone()
    assert not binding.chain_backward(network, saved, table, problem.states, problem.weights, d_flat, d_states)
    assert torch.equal(d_flat[inside], before[inside])  # used up: nothing was written


def test_the_longest_chain_has_a_gradient(variant):
    check_against_eager(Case(B=2, S=3, A=2, K=1000, H=16, num_hidden=2, beta_schedule="linear", max_action=3.0), "cpp")


# Rows, tiles, threads


@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
def test_a_row_is_the_same_in_any_batch(variant, activation):
    """To the last bit, and so is its gradient: B = 1 to 40 are tiles of every size."""
    policy, states = make_policy(activation=activation), states_of(40)
    noise = torch.randn(5, 40, A, generator=torch.Generator().manual_seed(1))

    def run_rows(rows: slice) -> tuple[Tensor, Tensor]:
        inputs = states[rows].requires_grad_(True)
        actions = dql.sample(inputs, policy, noise=noise[:, rows], backend="cpp")
        return actions, torch.autograd.grad(actions.square().sum(), inputs)[0]

    actions, d_states = run_rows(slice(None))
    for B in range(1, 41):
        for rows in (slice(0, B), slice(40 - B, 40)):
            got, d_got = run_rows(rows)
            assert torch.equal(got, actions[rows]), rows
            assert torch.equal(d_got, d_states[rows]), rows


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("N", [1, 3, 14, 50])
def test_candidates_are_repeated_states(N, precision):
    policy, states = make_policy(), states_of(9)
    with torch.no_grad():
        got = dql.sample(states, policy, num_candidates=N, seed=3, backend="cpp", precision=precision)
        repeated = states.repeat_interleave(N, 0)
        assert torch.equal(got.view(-1, A), dql.sample(repeated, policy, seed=3, backend="cpp", precision=precision))
        one = dql.sample(states[:1], policy, num_candidates=N, seed=3, backend="cpp", precision=precision)
        assert torch.equal(one, got[:1])


@pytest.mark.parametrize("case", [CASES[3], CASES[9], CASES[27], CASES[15]], ids=str)
def test_the_number_of_threads_changes_nothing(case, variant):
    results = []
    for threads in (1, 2, 5):  # the last: more than there are cores
        torch.set_num_threads(threads)
        try:
            results.append(run(case, "cpp"))
        finally:
            torch.set_num_threads(1)
    for threads, other in zip((2, 5), results[1:], strict=True):
        for name, tensor in results[0].items():
            assert torch.equal(other[name], tensor), f"{name} with {threads} threads"


def test_the_number_of_threads_does_not_change_select(variant):
    policy, critic, states = make_policy(), make_critic(), states_of(33)
    want = dql.select(states, policy, critic, seed=1, backend="cpp")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(dql.select(states, policy, critic, seed=1, backend="cpp"), want)
        finally:
            torch.set_num_threads(1)
