"""What the backend "cuda" keeps between calls, and how a call is cut. Whether its numbers are right is in
`cuda/test_tilings` and the tests of all backends."""

import pytest
import torch
from support.calls import SMALL, sample
from support.networks import A, S, make_critic, make_policy, states_of

import dql
from dql.backend.registry import registry
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.chain import ChainRunner
from dql.kernels.cuda.plan import Tiling

pytestmark = pytest.mark.usefixtures("emulated", "poisoned")


def test_what_no_gradient_needs_has_no_memory():
    policy = make_policy()
    sample("cuda", states_of(40), policy)
    kept = policy.step_table().kept.values()  # of all policies with this table
    runner = next(r for r in kept if isinstance(r, ChainRunner) and r.spec == policy.denoiser.spec)
    with_save, without = (runner.plan(40, save=save) for save in (True, False))
    assert without.saved_bytes == 0
    assert without.packed_bytes < 0.3 * (with_save.packed_bytes + with_save.saved_bytes)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_prepared_calls_run_one_plan(precision, monkeypatch):
    """From the second call of a size on nothing is worked out anew; other sizes have plans of their own."""
    policy, made = make_policy(**SMALL), []
    plan = ChainRunner.plan
    monkeypatch.setattr(ChainRunner, "plan", lambda self, *sizes: made.append(sizes) or plan(self, *sizes))
    with torch.no_grad():
        want = {B: sample("cuda", states_of(B), policy, precision=precision) for B in (5, 9, 40)}
        made.clear()
        for _ in range(3):
            for B in (5, 9, 40):
                assert torch.equal(sample("cuda", states_of(B), policy, precision=precision), want[B])
    assert len(made) <= 3


def test_a_backward_pass_has_the_tiling_of_its_forward_pass():
    """Whatever is chosen by then."""
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_()
    with cuda_plan.forced(Tiling(4, 2, True)):
        actions = sample("cuda", states, policy)
        (want,) = torch.autograd.grad(actions.sum(), states, retain_graph=True)
    with cuda_plan.forced(Tiling(1, 1, False)):
        (got,) = torch.autograd.grad(actions.sum(), states)
    assert torch.equal(got, want)


def test_a_critic_that_does_not_fit_the_gpu_is_computed_by_torch(monkeypatch):
    """Of 512 columns in float32, on a GPU with 99 KB of shared memory a block; the policy's chain fits."""
    monkeypatch.setattr(cuda_plan.binding, "facts", lambda ordinal, emulated: (89, 128, 99 * 1024, False))
    cuda_plan._chosen.cache_clear()
    try:
        policy, critic, states = make_policy(**SMALL), dql.TwinCritic(S, A, 512, 4), states_of(9)
        assert registry()["cuda"].critic(critic) is None
        assert registry()["cuda"].critic(make_critic()) is not None
        want, got = (dql.select(states, policy, critic, num_candidates=3, seed=3, backend=b) for b in ("eager", "cuda"))
        assert int(((got - want).abs().amax(dim=1) < 1e-3).sum()) >= 8
    finally:
        cuda_plan._chosen.cache_clear()
