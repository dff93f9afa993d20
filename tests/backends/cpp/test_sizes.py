"""A length from one tensor, an address from another: no native entry point reads or writes beyond what it was given."""

import math

import pytest
import torch
from support.networks import A, S, make_critic, make_policy, needs_cpp, states_of

import dql
from dql.backend.cpp import network, step_table
from dql.kernels.cpp import binding
from dql.optimizer import FlatAdam
from dql.update_native import _loss_table

Tensor = torch.Tensor
pytestmark = needs_cpp
B, T = 4, 2


def wrong_ones(tensor: Tensor) -> list[Tensor]:
    """Smaller, larger, of another dtype, with gaps, elsewhere."""
    flat = tensor.reshape(-1)
    return [
        flat[:1],
        tensor[:0],
        torch.cat([flat, flat]),
        tensor.double(),
        torch.stack([flat, flat], dim=1)[:, 0],
        torch.empty(tensor.shape, device="meta"),
    ]


def everything() -> dict[str, tuple]:
    """Of each entry point: the call, its tensors by name, and which of them are its own rows' measure."""
    policy, critic = make_policy(T=T), make_critic()
    denoiser = policy.denoiser
    net, table = network(denoiser), step_table(policy.step_table(), denoiser.spec.time_dim)
    flat, q_flat = denoiser.buffer.clone(), critic.buffer.clone()
    states, actions, noise = states_of(B), torch.zeros(B, A), torch.zeros(T, B, A)
    ones, d_flat, d_q = torch.ones(B), torch.zeros_like(flat), torch.zeros_like(q_flat)
    qs = network(critic)

    def backward(states: Tensor, d_actions: Tensor, d_flat: Tensor, d_states: Tensor) -> object:
        saved = binding.chain(net, flat, table, states_of(B), 1, None, 1, 1.0, False, save=True)[1]
        return binding.chain_backward(net, saved, table, states, d_actions, d_flat, d_states)

    return {
        "chain": (
            lambda flat, states, noise: binding.chain(net, flat, table, states, 1, noise, 0, 1.0, False),
            {"flat": flat, "states": states, "noise": noise},
        ),
        "chain, saving": (
            lambda flat, states, noise: binding.chain(net, flat, table, states, 1, noise, 0, 1.0, False, True),
            {"flat": flat, "states": states, "noise": noise},
        ),
        "chain_backward": (
            backward,
            {"states": states, "d_actions": actions, "d_flat": d_flat, "d_states": torch.zeros_like(states)},
        ),
        "select": (
            lambda flat, critic_flat, states, noise: binding.select(
                net, flat, table, qs, critic_flat, states, 1, noise, 0, 1, 1.0, False
            ),
            {"flat": flat, "critic_flat": q_flat, "states": states, "noise": noise},
        ),
        "q_values": (
            lambda flat, states, actions: binding.q_values(qs, flat, states, actions),
            {"flat": q_flat, "states": states, "actions": actions},
        ),
        "target_q": (
            lambda flat, states, actions, rewards, masks: binding.target_q(
                qs, flat, states, actions, rewards, masks, 0.9
            ),
            {"flat": q_flat, "states": states, "actions": actions, "rewards": ones, "masks": ones},
        ),
        "critic_gradient": (
            lambda flat, states, actions, target, d_flat: binding.critic_gradient(
                qs, flat, states, actions, target, d_flat
            ),
            {"flat": q_flat, "states": states, "actions": actions, "target": ones, "d_flat": d_q},
        ),
        "q_gradient": (
            lambda flat, states, actions: binding.q_gradient(qs, flat, 1, states, actions),
            {"flat": q_flat, "states": states, "actions": actions},
        ),
        "bc_gradient": (
            lambda flat, states, actions, d_flat: binding.bc_gradient(
                net, flat, _loss_table(policy), states, actions, 1, 2, True, d_flat
            ),
            {"flat": flat, "states": states, "actions": actions, "d_flat": d_flat},
        ),
        "adam": (
            lambda flat, gradient, exp_avg, exp_avg_sq: binding.adam(flat, gradient, exp_avg, exp_avg_sq, 0.1, 1, 0.0),
            {name: torch.zeros(64) for name in ("flat", "gradient", "exp_avg", "exp_avg_sq")},
        ),
        "lerp": (
            lambda target, source: binding.lerp(target, source, 0.5),
            {"target": torch.zeros(64), "source": torch.zeros(64)},
        ),
    }


@pytest.mark.parametrize("entry", everything())
def test_every_tensor_of_every_entry_point(entry):
    call, tensors = everything()[entry]
    call(**tensors)
    for name, tensor in tensors.items():
        for number, wrong in enumerate(wrong_ones(tensor)):
            if number == 4 and name in ("states", "noise", "d_actions", "actions") and entry in CONVERTING:
                continue  # it makes a tensor in one piece of it
            with pytest.raises((ValueError, ZeroDivisionError, IndexError)):
                call(**(tensors | {name: wrong}))


CONVERTING = ("chain", "chain, saving", "chain_backward", "select", "q_values")


def test_addresses_that_are_none():
    _native = binding._native
    for address in (0, 4, 68, 1 << 16):
        with pytest.raises(ValueError, match="a tensor has no memory"):
            _native.lerp(address, address, 3, 0.5)
        with pytest.raises(ValueError, match="a tensor has no memory"):
            _native.adam(address, address, address, address, 3, 0.1, 1, 0.0)
        with pytest.raises(ValueError, match="a tensor has no memory"):
            _native.all_finite(address, 3)
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="a size is negative"):
        _native.lerp(values.data_ptr(), values.data_ptr(), -1, 0.5)
    assert _native.all_finite(0, 0)


def test_networks_tables_and_saved_chains_belong_together():
    policy, critic, states = make_policy(T=T), make_critic(), states_of(B)
    net, qs = network(policy.denoiser), network(critic)
    table = step_table(policy.step_table(), policy.denoiser.spec.time_dim)
    other = step_table(make_policy(T=3).step_table(), policy.denoiser.spec.time_dim)
    flat, q_flat = policy.denoiser.buffer, critic.buffer
    with pytest.raises(ValueError, match="a denoiser was expected"):
        binding.chain(qs, q_flat, table, states, 1, None, 0, 1.0, False)
    with pytest.raises(ValueError, match="this table has no steps"):
        binding.chain(net, flat, _loss_table(policy), states, 1, None, 0, 1.0, False)
    with pytest.raises(ValueError, match="and the table of its loss"):
        binding.bc_gradient(net, flat, table, states, torch.zeros(B, A), 1, 2, True, torch.zeros_like(flat))
    for call in (
        lambda: binding.q_values(net, flat, states, torch.zeros(B, A)),
        lambda: binding.q_gradient(net, flat, 1, states, torch.zeros(B, A)),
        lambda: binding.select(net, flat, table, net, flat, states, 1, None, 0, 1, 1.0, False),
    ):
        with pytest.raises(ValueError, match="a critic was expected"):
            call()
    with pytest.raises(ValueError, match="there are two critics"):
        binding.q_gradient(qs, q_flat, 3, states, torch.zeros(B, A))
    saved = binding.chain(net, flat, table, states, 1, None, 0, 1.0, False, save=True)[1]
    small = network(make_policy(T=T, hidden_dim=16).denoiser)
    for network_, table_, rows in ((small, table, B), (net, other, B), (net, table, B + 1), (net, table, B - 1)):
        given = states_of(rows), torch.zeros(rows, A)
        with pytest.raises(ValueError, match="saved by another network, table or number of rows"):
            binding.chain_backward(network_, saved, table_, *given, None, torch.zeros(rows, S))
    assert binding.chain_backward(net, saved, table, states, torch.zeros(B, A), None, torch.zeros(B, S))


# Adam's state


def optimizer() -> tuple[FlatAdam, dict[str, Tensor]]:
    module = make_critic()
    adam = FlatAdam(module, 1e-3, 0.0)
    module.flat.grad.fill_(1.0)
    adam.step_natively(1.0)
    return adam, adam.tensors()


WRONG_STATES = {
    "one element": {"exp_avg": torch.zeros(1)},
    "one element of squares": {"exp_avg_sq": torch.zeros(1)},
    "two dimensions": {"exp_avg": torch.zeros(2, 3)},
    "integers": {"exp_avg": torch.zeros(make_critic().flat.shape, dtype=torch.int64)},
    "NaN": {"exp_avg": torch.full(make_critic().flat.shape, math.nan)},
    "infinity": {"exp_avg": torch.full(make_critic().flat.shape, math.inf)},
    "negative squares": {"exp_avg_sq": torch.full(make_critic().flat.shape, -1.0)},
    "no tensor": {"exp_avg": [0.0]},
    "step of many": {"step": torch.zeros(3)},
    "negative step": {"step": torch.tensor(-1.0)},
    "step that is no number": {"step": torch.tensor(math.nan)},
    "infinite step": {"step": torch.tensor(math.inf)},
    "half a step": {"step": torch.tensor(0.5)},
    "a key too many": {"max_exp_avg_sq": torch.zeros(1)},
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_what_adam_loads(wrong):
    """Moments of one element made the native step write past their end."""
    adam, tensors = optimizer()
    with pytest.raises((TypeError, ValueError), match="Adam's"):
        adam.load(tensors | WRONG_STATES[wrong])
    missing = dict(list(tensors.items())[:2])
    with pytest.raises(ValueError, match="Adam's state is step, exp_avg and exp_avg_sq"):
        adam.load(missing)
    assert all(value is tensors[name] for name, value in adam.tensors().items())
    adam.load({name: value.double() for name, value in tensors.items()})
    adam.step_natively(1.0)


def test_what_adam_loads_is_its_own():
    """In one piece, whatever was given."""
    (a, tensors), (b, _) = optimizer(), optimizer()
    for given in (tensors, tensors | {"exp_avg": torch.zeros(1).expand_as(tensors["exp_avg"])},
                  tensors | {"exp_avg": tensors["exp_avg_sq"]}, tensors | {"exp_avg": a.module.buffer}):  # fmt: skip
        before = {name: value.clone() for name, value in given.items()}
        b.load(given)
        b.step_natively(1.0)
        for name, value in given.items():
            assert torch.equal(value, before[name]), name


def test_a_checkpoint_with_other_moments(tmp_path):
    agent = dql.DiffusionBC(S, A, dql.Config(hidden_dim=16, num_hidden=2, T=T))
    agent.update(dql.Batch(states_of(B), torch.zeros(B, A), torch.ones(B), states_of(B), torch.ones(B)))
    state = agent.actor_adam.adam.state[agent.policy.denoiser.flat]
    state["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="exp_avg must be"):
        agent.update(dql.Batch(states_of(B), torch.zeros(B, A), torch.ones(B), states_of(B), torch.ones(B)))
    agent.save(tmp_path)
    with pytest.raises(dql.checkpoint.CheckpointError, match=r"'exp_avg': .* do not fit"):
        dql.load(tmp_path)
