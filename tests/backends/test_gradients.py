"""Gradients as a caller of any backend meets them: of what, how often, and after changes."""

import pytest
import torch
from support.backends import every_variant, in_bf16
from support.calls import SMALL, every_gradient, sample
from support.networks import A, make_policy, same_bits, states_of

import dql
from dql.backend.registry import registry

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def saved(backend, monkeypatch):
    """Of each chain from now on whether it saves for a backward pass; in a list that grows. None: it was prepared."""
    seen: list[bool] = []
    kind = type(registry()[backend])
    forward = kind.forward

    def recorded(self, chain, save):
        seen.append(save)
        return forward(self, chain, save)

    monkeypatch.setattr(kind, "forward", recorded)
    return seen


@every_variant
@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
def test_actions_are_the_same_with_and_without_gradients(backend, activation, saved):
    check_actions(backend, make_policy(activation=activation), "fp32", saved)


@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
@in_bf16
def test_actions_are_the_same_in_bf16(backend, reduced, activation, saved):
    check_actions(backend, make_policy(activation=activation), reduced, saved)


def check_actions(backend: str, policy: dql.DiffusionPolicy, precision: str, saved: list[bool]) -> None:
    states = states_of(40)
    want = sample(backend, states, policy, precision=precision)
    assert want.requires_grad and saved == [True]
    saved.clear()
    with torch.no_grad():
        for _ in range(3):  # the second is prepared, the third runs it
            got = sample(backend, states, policy, precision=precision)
            assert torch.equal(got, want) and not got.requires_grad
        assert torch.equal(sample(backend, states, policy, precision=precision, num_candidates=1)[:, 0], want)
    with torch.inference_mode():
        assert torch.equal(sample(backend, states, policy, precision=precision), want)
    policy.requires_grad_(False)
    assert not sample(backend, states, policy, precision=precision).requires_grad
    assert saved and not any(saved)


def test_gradients_of_states_alone_and_of_some_parameters_alone(backend, saved):
    policy, states = make_policy(**SMALL), states_of(20).requires_grad_(True)
    d_states, *d_parameters = every_gradient(sample(backend, states, policy), states, policy)
    names = [name for name, _ in policy.denoiser.named_parameters()]
    weights = torch.linspace(-1, 1, 20 * A).view(20, A)
    policy.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(sample(backend, states, policy), states, weights)[0], d_states)
    policy.denoiser.final_layer.requires_grad_(True)
    policy.denoiser.zero_grad()
    sample(backend, states.detach(), policy).backward(weights)
    for name, parameter, want in zip(names, policy.denoiser.parameters(), d_parameters, strict=True):
        if name.startswith("final_layer"):
            assert torch.equal(parameter.grad, want)
        else:
            assert not parameter.grad.any()
    assert all(saved)


@every_variant
@pytest.mark.parametrize("N", [None, 2])
def test_backward_twice_through_one_graph(backend, N):
    policy, states = make_policy(**({} if N is None else SMALL)), states_of(20).requires_grad_(True)
    actions = sample(backend, states, policy, num_candidates=N)
    first, second, third = (every_gradient(actions, states, policy) for _ in range(3))
    assert same_bits(second, first) and same_bits(third, first)
    again = sample(backend, states, policy, num_candidates=N)
    assert same_bits(every_gradient(again, states, policy), first)


def test_gradients_add_up(backend):
    policy, states = make_policy(**SMALL), states_of(20)
    actions = sample(backend, states, policy)
    actions.sum().backward(retain_graph=True)
    once = policy.denoiser.flat.grad.clone()
    actions.sum().backward()
    assert torch.equal(policy.denoiser.flat.grad, 2 * once)


@pytest.mark.parametrize("what", ["parameter", "flat buffer", "load_state_dict", "states"])
def test_changes_before_backward_are_noticed(backend, what):
    policy, states = make_policy(**SMALL), states_of(5)
    actions = sample(backend, states, policy)
    with torch.no_grad():
        if what == "parameter":
            policy.denoiser.final_layer.bias.add_(0.1)
        elif what == "flat buffer":
            policy.denoiser.flat.mul_(1.1)
        elif what == "load_state_dict":
            policy.load_state_dict(make_policy(**SMALL).state_dict())
        else:
            states.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        actions.sum().backward()
