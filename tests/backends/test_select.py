"""`dql.select` by every backend: the candidate that eager takes, but for draws that rounding decides."""

import math

import pytest
import torch
from support.backends import REDUCED, assert_same, every_precision, every_variant
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
    check_details(backend, 20, num_candidates=6, noise=noise, seed=2)
    with torch.no_grad():
        candidates = dql.sample(states, policy, num_candidates=6, noise=noise, backend=backend)
        critic.q2_model[0].weight[0, 0] = math.nan
    broken = dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend=backend)
    assert torch.equal(broken, candidates[:, 0])
    details = dql.select(states, policy, critic, num_candidates=6, noise=noise, seed=2, backend=backend, details=True)
    assert torch.equal(details.actions, broken) and not details.index.any()
    assert details.q1.isfinite().all() and details.q2.isnan().all() and details.spread.isfinite().all()


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
        check(dql.select(states, policy, critic, seed=1, backend=each, details=True), states, policy, critic, want)


# details=True


def check_details(backend: str, B: int, precision: str = "fp32", **options) -> dql.Selection:
    """To the bit what is chosen without them, of the candidates that `sample` gives; returns them."""
    policy, critic, states = make_policy(), make_critic(), states_of(B)
    seed = options.pop("seed")
    call = {"backend": backend, "precision": precision} | options
    got = dql.select(states, policy, critic, seed=seed, **call, details=True)
    want = dql.select(states, policy, critic, seed=seed, **call)
    with torch.no_grad():
        candidates = dql.sample(states, policy, **({"seed": seed} if "noise" not in call else {}), **call)
    assert torch.equal(got.actions, want), f"seed {seed}: other actions than without details"
    taken = candidates[torch.arange(B), got.index]
    assert_same(backend, [got.actions], [taken], f"seed {seed}")
    spread = (candidates.double() - candidates.double().mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
    assert_close(got.spread, spread.float(), TOLERANCES["float32"], what="spread", backend=backend)
    check(got, states, policy, critic, want)
    return got


def check(got, states, policy, critic, actions) -> None:
    B, A = len(states), policy.action_dim
    assert [got.actions.shape, got.q1.shape, got.q2.shape, got.spread.shape] == [(B, A), (B,), (B,), (B, A)]
    assert got.index.shape == (B,) and got.index.dtype is torch.int64
    assert torch.allclose(got.actions, actions, atol=1e-4)
    with torch.no_grad():
        for i, q in ((1, got.q1), (2, got.q2)):
            assert_close(q, critic.q(i, states, got.actions), TOLERANCES["float32"], what=f"q{i}")
    assert not any(tensor.requires_grad for tensor in (got.actions, got.q1, got.q2, got.spread))


@every_variant
@pytest.mark.parametrize(("N", "seed"), [(1, 3), (7, 2**63), (40, 2**64 - 1)])
def test_details(backend, N, seed):
    got = check_details(backend, 20, num_candidates=N, seed=seed)
    if N == 1:
        assert not got.index.any() and not got.spread.any()
    else:
        assert len(set(got.index.tolist())) > 1


@every_precision
def test_details_in_reduced_precision(backend, reduced):
    check_details(backend, 20, reduced, num_candidates=7, seed=4)


@every_variant
def test_details_are_eagers(backend):
    """But for draws that rounding decides."""
    policy, critic, states = make_policy(), make_critic(), states_of(50)
    got, want = (
        dql.select(states, policy, critic, num_candidates=20, seed=5, backend=each, details=True)
        for each in (backend, "eager")
    )
    same = got.index == want.index
    assert int(same.sum()) >= 49
    for name in ("actions", "q1", "q2"):
        tensor, wanted = getattr(got, name)[same], getattr(want, name)[same]
        assert_close(tensor, wanted, TOLERANCES["float32"], what=name, backend=backend)
    assert_close(got.spread, want.spread, TOLERANCES["float32"], what="spread", backend=backend)


def test_details_of_no_states_and_inside_torch_compile(backend):
    policy, critic, states = make_policy(), make_critic(), states_of(3)

    def call(states):
        return dql.select(states * 2, policy, critic, num_candidates=3, seed=1, backend=backend, details=True)

    none = call(states[:0])
    assert repr(none) == f"Selection(actions [0, {A}], q1 [0], q2 [0], index [0], spread [0, {A}], device=cpu)"
    assert none.index.dtype is torch.int64
    got, want = torch.compile(lambda states: call(states), backend="eager")(states), call(states)
    assert torch.equal(got.actions, want.actions) and torch.equal(got.index, want.index)
    assert torch.equal(got.q1, want.q1) and torch.equal(got.spread, want.spread)
