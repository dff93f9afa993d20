"""What changes between two calls of any backend is seen by the next."""

import pytest
import torch
from support.calls import SMALL, every_gradient, sample
from support.cases import TOLERANCES, assert_close
from support.networks import make_policy, same_bits, states_of

import dql

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


def adam_step(policy: dql.DiffusionPolicy, **options: object) -> None:
    optimizer = torch.optim.Adam(policy.denoiser.parameters(), lr=0.1, **options)
    dql.sample(states_of(5), policy, backend="eager", seed=3).sum().backward()
    optimizer.step()


CHANGES = {
    "parameter": lambda p: p.denoiser.mid_layer[2].weight.mul_(1.5),
    "parameter.data": lambda p: p.denoiser.final_layer.bias.data.add_(0.1),  # no version counter tells of it
    "one element's data": lambda p: p.denoiser.mid_layer[0].weight.data[3].zero_(),
    "time MLP's data": lambda p: p.denoiser.time_mlp[1].weight.data.mul_(2),
    "flat buffer": lambda p: p.denoiser.flat.mul_(1.1),
    "NumPy": lambda p: p.denoiser.flat.detach().numpy().__imul__(1.2),
    "load_state_dict": lambda p: p.load_state_dict(make_policy(seed=6, **SMALL).state_dict()),
    "fused Adam": lambda p: adam_step(p, fused=True),
    "foreach Adam": lambda p: adam_step(p, foreach=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls_are_seen(backend, change):
    """By calls with gradients, without, and prepared: weights are packed anew by each."""
    policy, states = make_policy(**SMALL), states_of(9)

    def calls(policy: dql.DiffusionPolicy) -> list[Tensor]:
        inputs = states.clone().requires_grad_(True)
        actions = sample(backend, inputs, policy)
        with torch.no_grad():
            plain = [sample(backend, states, policy) for _ in range(2)]
        return [actions.detach(), *plain, *every_gradient(actions, inputs, policy)]

    before = calls(policy)
    with torch.set_grad_enabled("Adam" in change):
        CHANGES[change](policy)
    after = calls(policy)
    assert not torch.equal(after[0], before[0])
    fresh = make_policy(**SMALL)
    fresh.load_state_dict(policy.state_dict())
    assert same_bits(after, calls(fresh))


def test_other_attributes_between_calls(backend):
    policy, states = make_policy(**SMALL), states_of(9)
    with torch.no_grad():
        for _ in range(3):
            sample(backend, states, policy)
        policy.max_action = 0.2
        for _ in range(3):
            got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend=backend)
        policy.denoiser = make_policy(seed=6, **SMALL).denoiser
        for _ in range(3):
            got, want = sample(backend, states, policy), dql.sample(states, policy, seed=3, backend="eager")
            assert_close(got, want, TOLERANCES["float32"], what="actions", backend=backend)
