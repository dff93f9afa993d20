"""`dql.select(..., details=True)`: that it is the same choice, and all that is told of it; by every backend in
`backends/test_select.py`."""

import copy
import math

import pytest
import torch
from support.networks import A, S, make_critic, make_policy, needs_cpp, states_of

import dql

ON_THE_CPU = [pytest.param("cpp", marks=needs_cpp), "eager"]


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_the_same_choice_of_many(backend):
    """50 states and 40 seeds, with flat values and steep ones, where a draw often falls near a border."""
    policy, states = make_policy(), states_of(50)
    critic = make_critic()
    for factor, seeds in ((1.0, 20), (1e-3, 10), (3.0, 10)):
        of = copy.deepcopy(critic)
        with torch.no_grad():
            of.flat.mul_(factor)
        for seed in range(seeds):
            call = {"num_candidates": 20, "seed": seed, "backend": backend}
            got = dql.select(states, policy, of, **call, details=True)
            with torch.no_grad():
                candidates = dql.sample(states, policy, **call)
            assert torch.equal(got.actions, dql.select(states, policy, of, **call)), (factor, seed)
            assert torch.equal(got.actions, candidates[torch.arange(50), got.index]), (factor, seed)
            with torch.no_grad():
                assert torch.equal(torch.stack([got.q1, got.q2]), torch.stack(of(states, got.actions)))


@pytest.mark.parametrize(
    ("backend", "B", "N"),
    [
        pytest.param("cpp", 1 << 20, 1, marks=needs_cpp),
        pytest.param("cpp", 1, 1 << 20, marks=needs_cpp),
        ("eager", 1, 1 << 20),
    ],
)
def test_as_many_rows_as_a_call_takes(backend, B, N):
    policy = dql.DiffusionPolicy(1, 1, hidden_dim=16, num_hidden=2, T=1)
    critic = dql.TwinCritic(1, 1, 16, 2)
    states = torch.zeros(1, 1).expand(B, 1)
    got = dql.select(states, policy, critic, num_candidates=N, seed=3, backend=backend, details=True)
    assert torch.equal(got.actions, dql.select(states, policy, critic, num_candidates=N, seed=3, backend=backend))
    assert int(got.index.min()) >= 0 and int(got.index.max()) < N and (N == 1 or int(got.index) > 1)
    assert got.spread.isfinite().all() and bool(got.spread.any()) == (N > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    policy, critic, states = make_policy().to(dtype), make_critic().to(dtype), states_of(9).to(dtype)
    got = dql.select(states, policy, critic, num_candidates=6, seed=1, details=True)
    assert {tensor.dtype for tensor in (got.actions, got.q1, got.q2, got.spread)} == {dtype}
    assert torch.equal(got.actions, dql.select(states, policy, critic, num_candidates=6, seed=1))
    with torch.no_grad():
        assert torch.equal(got.q1, critic.q(1, states, got.actions))


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_autocast_is_of_no_concern(backend):
    policy, critic, states = make_policy(), make_critic(), states_of(9)
    call = {"num_candidates": 6, "seed": 1, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        got, chosen = (dql.select(states, policy, critic, **call, details=each) for each in (True, False))
    assert torch.equal(got.actions, chosen) and got.q1.dtype is torch.float32
    with torch.no_grad():
        assert torch.equal(got.q2, critic.q(2, states, got.actions))


def test_what_may_be_changed_and_what_not():
    """The tensors are the caller's: none shares memory with another, nor with the inputs. The names stay."""
    policy, critic, states = make_policy(), make_critic(), states_of(9)
    for B in (9, 0):
        got = dql.select(states[:B], policy, critic, num_candidates=6, seed=1, details=True)
        before = {name: tensor.clone() for name, tensor in vars(got).items()}
        for name, tensor in vars(got).items():
            tensor.fill_(7)
            others = [other for other in before if other != name]
            assert all(torch.equal(getattr(got, other), before[other]) for other in others), name
            tensor.copy_(before[name])
        with pytest.raises(AttributeError, match="cannot assign"):
            got.actions = states
    assert hash(got) and got != copy.copy(got)  # by identity: tensors have no one truth


def test_candidates_that_are_all_alike_do_not_spread():
    policy, critic, states = make_policy(max_action=0.3), make_critic(), states_of(9)
    noise = torch.randn(5, 9, 1, A, generator=torch.Generator().manual_seed(1)).expand(5, 9, 7, A)
    got = dql.select(states, policy, critic, num_candidates=7, noise=noise, seed=1, backend="eager", details=True)
    assert got.spread.max() < 1e-6


@pytest.mark.parametrize("wrong", [None, 1, 0, "yes", torch.tensor(True), [], math.nan], ids=str)
def test_details_is_true_or_false(wrong):
    with pytest.raises(TypeError, match="details must be True or False, got"):
        dql.select(torch.zeros(2, S), make_policy(), make_critic(), details=wrong)
