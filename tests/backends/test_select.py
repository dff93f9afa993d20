"""`dql.select` by every backend: the candidate that eager takes, but for draws that rounding decides."""

import math

import pytest
import torch
from support.backends import REDUCED, every_variant
from support.cases import TOLERANCES, assert_close
from support.networks import A, S, make_critic, make_policy, states_of

import dql

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # NumPy's, of what is meant here
]


@every_variant
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_the_same_seed_takes_what_eager_takes(backend, seed):
    policy, critic, states = make_policy(), make_critic(), states_of(50)
    got, want = (dql.select(states, policy, critic, seed=seed, backend=each) for each in (backend, "eager"))
    same = (got - want).abs().amax(dim=1) < 1e-3
    assert int(same.sum()) >= 49
    assert_close(got[same], want[same], TOLERANCES["float32"], what="chosen", case=f"seed {seed}", backend=backend)


@pytest.mark.parametrize("N", [1, 7])
def test_few_candidates(backend, N):
    check_few(backend, "fp32", N, near=1e-3, least=49)


@pytest.mark.parametrize("N", [1, 7])
@pytest.mark.parametrize(("backend", "reduced"), REDUCED, indirect=True)
def test_few_candidates_in_reduced_precision(backend, reduced, N):
    check_few(backend, reduced, N, near={"tf32": 1e-2, "bf16": 1e-1}[reduced], least=45)


def check_few(backend: str, precision: str, N: int, near: float, least: int) -> None:
    policy, critic, states = make_policy(), make_critic(), states_of(50)
    want = dql.select(states, policy, critic, num_candidates=N, seed=3, backend="eager")
    got = dql.select(states, policy, critic, num_candidates=N, seed=3, backend=backend, precision=precision)
    assert got.shape == (50, A)
    assert int(((got - want).abs().amax(dim=1) < near).sum()) >= least


def test_noise_that_is_given_and_a_critic_that_is_nan(backend):
    policy, critic, states = make_policy(), make_critic(), states_of(20)
    noise = torch.randn(5, 20, 6, A, generator=torch.Generator().manual_seed(1))
    got, want = (
        dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend=each)
        for each in (backend, "eager")
    )
    assert_close(got, want, TOLERANCES["float32"], what="chosen", backend=backend)
    with torch.no_grad():
        candidates = dql.sample(states, policy, num_candidates=6, noise=noise, backend=backend)
        critic.q2_model[0].weight[0, 0] = math.nan
    broken = dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend=backend)
    assert torch.equal(broken, candidates[:, 0])


def test_candidates_that_are_hugely_better_are_taken(backend):
    policy, critic, states = make_policy(), make_critic(), states_of(20)
    with torch.no_grad():
        critic.flat.mul_(10)
        candidates = dql.sample(states, policy, num_candidates=50, seed=4, backend=backend)
        best = critic.q_min(states, candidates).argmax(dim=1)
    got = dql.select(states, policy, critic, num_candidates=50, seed=4, backend=backend)
    taken = (got[:, None] == candidates).all(dim=2)
    assert taken.any(dim=1).all()  # each is one of its own state's candidates
    assert int(taken[torch.arange(20), best].sum()) >= 18


@pytest.mark.parametrize("sizes", [{"hidden_dim": 600}, {"num_hidden": 1}, {"num_hidden": 5}], ids=str)
def test_a_critic_of_other_sizes(backend, sizes):
    """The policy fits and its critic does not: then torch computes the critic, as for any backend without `select`."""
    policy = dql.DiffusionPolicy(S, A, hidden_dim=16)
    critic = dql.TwinCritic(**({"state_dim": S, "action_dim": A, "hidden_dim": 16} | sizes))
    states = torch.randn(5, S)
    want = dql.select(states, policy, critic, seed=1, backend="eager")
    for each in (backend, "auto"):
        assert torch.allclose(dql.select(states, policy, critic, seed=1, backend=each), want, atol=1e-4)
