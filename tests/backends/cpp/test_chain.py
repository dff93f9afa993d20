"""The backend "cpp": its actions and gradients against the transcription, the eager backend and itself."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import (
    CASES,
    TOLERANCES,
    Case,
    Tolerance,
    assert_all_close,
    assert_close,
    clear_of_kinks,
    error,
    expected,
    make_problem,
    named_gradients,
    plain_chain,
    run,
    run_problem,
)
from support.networks import VARIANTS, A, H, S, make_critic, make_policy, needs_bf16, needs_cpp, states_of

import dql
from dql.backend.cpp import step_table
from dql.kernels.cpp import binding

Tensor = torch.Tensor
SEEDS = [0, 1, 2**63, 2**64 - 1]
pytestmark = needs_cpp


@pytest.fixture(autouse=True)
def _poisoned():
    """torch fills what it allocates with NaN, as its deterministic mode does: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VARIANTS)
def variant(request):
    with binding.forced(request.param):
        assert binding.in_use() == request.param
        yield request.param


# Every case, in every variant


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_transcription(case, variant):
    got = run(case, "cpp")
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend=f"cpp ({variant})")


@needs_bf16
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16(case):
    """Against the chain in float64 with rounded operands; its gradient is the float32 one at those activations."""
    problem, distances = make_problem(case, torch.float64), []
    with torch.no_grad():
        plain_chain(problem, distances, "bf16")
    weights = clear_of_kinks(problem, distances, margins=10)
    problem.states.requires_grad_(True)
    actions = plain_chain(problem, precision="bf16")
    want = named_gradients(problem, actions, problem.states, weights)
    got = run_problem(make_problem(case, torch.float32), "cpp", weights, "bf16")
    assert_all_close(got, want, TOLERANCES["bf16"], case=case, backend="cpp, bf16")
    for name, tolerance, target in (
        ("bf16 on average", TOLERANCES["bf16 on average"], want["actions"]),
        ("bf16 in all", TOLERANCES["bf16 in all"], expected(case)["actions"]),
    ):
        rms = (got["actions"].double() - target).square().mean().sqrt() / target.square().mean().sqrt()
        assert rms <= tolerance.rel, f"{name} in case {case}: {rms:.2g} above {tolerance.rel:g}: {tolerance.why}"


@needs_bf16
def test_bf16_differs_from_float32():
    problem = make_problem(CASES[3], torch.float32)
    fp32, bf16 = (
        dql.sample(problem.states, problem.policy, noise=problem.noise, backend="cpp", precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert error(bf16.detach(), fp32.detach()) > 1e-4


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


# Random problems


@st.composite
def problems(draw) -> Case:
    """Mostly small, now and then large, often no multiple of anything; T at most 50."""
    large = draw(st.integers(0, 9)) == 0
    K = draw(st.integers(1, 20))
    return Case(
        B=draw(st.integers(1, 4 if large else 40)),
        S=draw(st.integers(1, 512 if large else 40)),
        A=draw(st.one_of(st.integers(1, 8), st.integers(1, 64))),
        K=K,
        N=draw(st.one_of(st.none(), st.integers(1, 5))),
        H=draw(st.one_of(st.sampled_from([16, 32, 64, 96]), st.integers(16, 512 if large else 80))),
        num_hidden=draw(st.integers(2, 4)),
        activation=draw(st.sampled_from(["mish", "relu", "silu"])),
        sampler=draw(st.sampled_from(["ddpm", "ddim", "dpm-solver++"])),
        stochasticity=draw(st.sampled_from([0.0, 0.5, 1.0])),
        T=draw(st.one_of(st.none(), st.integers(K, 50))),
        beta_schedule=draw(st.sampled_from(["vp", "linear", "cosine"])),
        max_action=draw(st.sampled_from([0.3, 1.0, 3.0, 20.0])),
        predict_epsilon=draw(st.booleans()),
    )


def check_against_eager(case: Case) -> None:
    """In float64, whose gradient is the same but for rows at a kink."""
    exact, distances = make_problem(case, torch.float64), []
    with torch.no_grad():
        plain_chain(exact, distances)
    weights = clear_of_kinks(exact, distances, margins=10)
    want = run_problem(exact, "eager", weights)
    got = run_problem(make_problem(case, torch.float32), "cpp", weights)
    # the denoiser's rounding times b, which is 1,000 where abar is nearly 0, relative to the actions
    gain = max(abs(row[1]) for row in exact.table.rows) / case.max_action
    rel = TOLERANCES["float32"].rel + 1e-5 * gain
    largest = max(float(gradient.abs().amax()) for name, gradient in want.items() if name != "actions")
    tolerance = Tolerance(
        rel, rel * 0.01 * largest, f"float32, with b / max_action = {gain:.3g}; sums over rows may cancel"
    )
    assert_all_close(got, want, tolerance, case=case, backend="cpp")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_random_problems(case):
    check_against_eager(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, S=512, A=64, K=2, H=512, num_hidden=4),
        Case(B=15, S=1, A=1, K=2, H=1, num_hidden=2, activation="silu"),
        Case(B=2, S=3, A=2, K=1000, H=16, num_hidden=2, beta_schedule="linear", max_action=3.0),
    ],
    ids=["largest", "smallest", "longest"],
)
def test_the_corners_of_what_it_takes(case, variant):
    check_against_eager(case)


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


# The same seed as eager


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_actions_as_eager(seed, variant):
    policy, critic, states = make_policy(), make_critic(), states_of(50)
    with torch.no_grad():
        for N in (None, 7):
            got, want = (
                dql.sample(states, policy, num_candidates=N, seed=seed, backend=backend) for backend in ("cpp", "eager")
            )
            assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"seed {seed}, N={N}", backend="cpp")
        got, want = (dql.select(states, policy, critic, seed=seed, backend=backend) for backend in ("cpp", "eager"))
    # where a draw falls within rounding of two candidates' border either may be taken
    same = (got - want).abs().amax(dim=1) < 1e-3
    assert int(same.sum()) >= 49
    assert_close(got[same], want[same], TOLERANCES["float32"], what="chosen", case=f"seed {seed}", backend="cpp")


@pytest.mark.parametrize("width", [3, 40])
def test_the_noise_of_long_chains(width, variant):
    """It is drawn some steps at a time, the same numbers as all at once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy = dql.DiffusionPolicy(S, width, hidden_dim=16, T=100)
    states = states_of(20)
    with torch.no_grad():
        got = dql.sample(states, policy, seed=2, backend="cpp")
        want = dql.sample(states, policy, noise=dql.noise.normal(2, 100, 20, width), backend="cpp")
    assert_close(got, want, TOLERANCES["float32"], what="actions", case=f"A={width}", backend="cpp")


def test_select_with_noise_and_of_a_critic_that_is_nan():
    policy, critic, states = make_policy(), make_critic(), states_of(20)
    noise = torch.randn(5, 20, 6, A, generator=torch.Generator().manual_seed(1))
    got, want = (
        dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend=backend)
        for backend in ("cpp", "eager")
    )
    assert_close(got, want, TOLERANCES["float32"], what="chosen", backend="cpp")
    with torch.no_grad():
        candidates = dql.sample(states, policy, num_candidates=6, noise=noise, backend="cpp")
        critic.q2_model[0].weight[0, 0] = math.nan
    broken = dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend="cpp")
    assert torch.equal(broken, candidates[:, 0])


def test_candidates_that_are_hugely_better_are_taken():
    policy, critic, states = make_policy(), make_critic(), states_of(20)
    with torch.no_grad():
        critic.flat.mul_(10)
        candidates = dql.sample(states, policy, num_candidates=50, seed=4, backend="cpp")
        best = critic.q_min(states, candidates).argmax(dim=1)
    got = dql.select(states, policy, critic, num_candidates=50, seed=4, backend="cpp")
    taken = (got[:, None] == candidates).all(dim=2)
    assert taken.any(dim=1).all()  # each is one of its own state's candidates
    assert int(taken[torch.arange(20), best].sum()) >= 18
