"""Tensors that are no ordinary memory, given wherever a tensor is taken: refused in one sentence, or as their values.

On every backend that runs here: a kernel reads what lies at an address, whatever the tensor means.
"""

import copy

import pytest
import torch
from support.backends import has_kernels
from support.hostile_tensors import HOSTILE
from support.networks import A, S, make_critic, make_policy, states_of
from torch._subclasses import FakeTensorMode

import dql
from dql.backend.registry import registry
from dql.kernels.limits import MANY
from dql.values import q_values

Tensor = torch.Tensor
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 2}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Nn]ested"),
    pytest.mark.filterwarnings("ignore:.*[Mm]asked"),
    pytest.mark.filterwarnings("ignore:.*[Ss]parse"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a fault here would end the GPU's context"),
]


@pytest.fixture(params=registry())
def backend(request, runs_here) -> str:
    return runs_here(request.param)


class Ordinary(torch.Tensor):
    """A subclass that is a tensor like another."""


hostile = pytest.mark.parametrize("kind", HOSTILE)
refused = pytest.raises((TypeError, ValueError), match=r"^(?s:.){20,}[;:,] (?s:.)+")


def one_sentence(raised: pytest.ExceptionInfo) -> None:
    text = str(raised.value)
    assert "\n" not in text and ";" in text, text


def policy_of(**sizes: object) -> dql.DiffusionPolicy:
    return make_policy(**(SMALL | sizes))


def negated(values: Tensor) -> Tensor:
    """The same values in a view whose memory has the other sign."""
    made = torch._neg_view(-values)
    assert made.is_neg() and torch.equal(made, values)
    return made


# Stand-ins, and memory that is gone


@hostile
@pytest.mark.parametrize("gradients", [True, False])
def test_states(backend, gradients, kind):
    """Also where the call is prepared: there it is of more than a few rows that memory cut off is noticed."""
    policy, states = policy_of(), states_of(5 if kind != "cut off" else 100)
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            dql.sample(states, policy, backend=backend, seed=1)
        with refused as raised:
            dql.sample(HOSTILE[kind](states), policy, backend=backend, seed=1)
        one_sentence(raised)
        with refused as raised:
            dql.sample(HOSTILE[kind](states), policy_of(), backend=backend, seed=1)  # a first call
        one_sentence(raised)
        with refused as raised:
            dql.select(HOSTILE[kind](states), policy, make_critic(), backend=backend, seed=1)
        one_sentence(raised)


def test_rows_of_freed_memory(backend):
    """An offset hides that the address is none: of a replay buffer that was given back."""
    policy, states = policy_of(), states_of(5)
    buffer = torch.zeros(1_000_000, S)
    rows = buffer[500_000:500_005]
    buffer.untyped_storage().resize_(0)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for _ in range(3):
                dql.sample(states, policy, backend=backend, seed=1)
            with refused as raised:
                dql.sample(rows, policy, backend=backend, seed=1)
            one_sentence(raised)


@hostile
def test_noise(backend, kind):
    """Of a fake one the address is 0, which means "none": seed 0's would be used."""
    policy, states = policy_of(), states_of(5 if kind != "cut off" else 1 + MANY // (2 * A))
    if kind in ("nested", "jagged", "sparse rows"):
        pytest.skip("no [K, B, A] of these")
    noise = torch.randn(2, len(states), A)
    with refused as raised:
        dql.sample(states, policy, backend=backend, noise=HOSTILE[kind](noise))
    one_sentence(raised)


@pytest.mark.parametrize("kind", ["fake", "meta", "freed", "cut off"])
@pytest.mark.parametrize("gradients", [True, False])
def test_parameters(backend, gradients, kind):
    if kind == "cut off" and not has_kernels(backend):
        pytest.skip("torch's own operators read what is not there")
    states = states_of(5 if kind != "cut off" else 100)
    critic = make_critic()
    with torch.set_grad_enabled(gradients):
        if kind == "fake":
            with FakeTensorMode():
                policy, none = dql.DiffusionPolicy(S, A, **SMALL), dql.TwinCritic(S, A, 48)
        else:
            policy, none = policy_of(), copy.deepcopy(critic)
            for _ in range(3):
                dql.sample(states, policy, backend=backend, seed=1)
            if kind == "meta":
                policy, none = policy.to("meta"), none.to("meta")
            else:
                for flat in (policy.denoiser.flat, none.flat):
                    flat.untyped_storage().resize_(0 if kind == "freed" else 4 * flat.numel() - 4)
        with pytest.raises((TypeError, ValueError)):
            dql.sample(states, policy, backend=backend, seed=1)
        with pytest.raises((TypeError, ValueError)):
            dql.sample(HOSTILE["meta"](states), policy, backend=backend, seed=1)
        with pytest.raises((TypeError, ValueError)):
            dql.select(states, policy_of(), none, backend=backend, seed=1)
        if kind in ("freed", "cut off"):
            with pytest.raises(ValueError, match="have no memory"):
                none(states, torch.zeros(len(states), A))


@pytest.mark.parametrize("kind", ["freed", "cut off"])
def test_gradients(backend, kind):
    B = 5 if kind == "freed" else 1 + MANY // A
    policy, states = policy_of(), states_of(B).requires_grad_()
    actions = dql.sample(states, policy, backend=backend, seed=1)
    with refused as raised:
        torch.autograd.grad(actions, states, HOSTILE[kind](torch.ones(B, A)))
    one_sentence(raised)


@pytest.mark.parametrize("of", ["exp_avg", "exp_avg_sq", "flat.grad"])
def test_what_adam_writes(of):
    """Where its memory was made smaller, it would write beside it."""
    agent = dql.DiffusionQL(S, A, dql.Config(backend="cpp", **SMALL))
    agent.update(batch_of(4))
    adam, flat = agent.actor_adam, agent.policy.denoiser.flat
    victim = flat.grad if of == "flat.grad" else adam.tensors()[of]
    assert flat.numel() >= MANY
    victim.untyped_storage().resize_(4 * victim.numel() - 4)
    with refused as raised:
        agent.update(batch_of(4))
    one_sentence(raised)


@hostile
def test_critics(backend, kind):
    critic, states, actions = make_critic(), states_of(5), torch.zeros(5, A)
    runner = registry()[backend]
    if kind in ("fake", "masked", "wrapper", "zero", "meta"):
        calls = [q_values]  # torch's own operators have their own answer to these
    else:
        calls = [q_values, lambda critic, states, actions, runner: critic(states, actions)]
    for call in calls:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                with pytest.raises((TypeError, ValueError)):
                    call(critic, HOSTILE[kind](states), actions, runner)
                with pytest.raises((TypeError, ValueError)):
                    call(critic, states, HOSTILE[kind](actions), runner)


def batch_of(B: int) -> dql.Batch:
    return dql.Batch(states_of(B), torch.zeros(B, A), torch.ones(B), states_of(B), torch.ones(B))


@hostile
@pytest.mark.parametrize("field", ["states", "actions", "rewards", "next_states", "masks"])
def test_batches(backend, field, kind):
    if kind in ("nested", "jagged", "sparse rows") and field in ("rewards", "masks"):
        pytest.skip("no [B] of these")
    agent = dql.DiffusionQL(S, A, dql.Config(backend=backend, **SMALL))
    batch = batch_of(4)
    object.__setattr__(batch, field, HOSTILE[kind](getattr(batch, field)))
    before = agent.policy.denoiser.buffer.clone()
    with refused as raised:
        agent.update(batch)
    one_sentence(raised)
    assert torch.equal(agent.policy.denoiser.buffer, before)


def test_ordinary_subclasses(backend):
    policy, states, noise = policy_of(), states_of(5), torch.randn(2, 5, A)
    want = dql.sample(states, policy, backend=backend, noise=noise)
    for kind in (torch.nn.Parameter, lambda t: t.as_subclass(Ordinary)):
        got = dql.sample(kind(states), policy, backend=backend, noise=kind(noise).detach())
        assert torch.equal(got.as_subclass(Tensor), want)
    with torch.no_grad():
        assert torch.equal(dql.sample(states.as_subclass(Ordinary), policy, backend=backend, noise=noise), want)


def test_transformations_of_torch_func(backend):
    policy, states = policy_of(), states_of(5)
    critic, actions = make_critic(), torch.zeros(5, A)
    runner = registry()[backend]
    calls = [
        lambda s: dql.sample(s, policy, backend=backend, seed=1).sum(),
        lambda s: dql.sample(s, policy, backend=backend).sum(),
        lambda s: dql.select(s, policy, critic, backend=backend, seed=1).sum(),
    ]
    if runner.critic(critic) is not None:
        calls.append(lambda s: q_values(critic, s, actions, runner)[0].sum())
    for call in calls:
        for gradients in (True, False):
            for transformed, given in (
                (torch.func.functionalize(call), states),
                (torch.vmap(call), states[None]),
                (torch.func.grad(call), states),
            ):
                refusal = pytest.raises(TypeError, match="inside a transformation of torch")
                with torch.set_grad_enabled(gradients), refusal:
                    transformed(given)
    states = states.requires_grad_(True)
    actions = dql.sample(states, policy, backend=backend, seed=1)
    with pytest.raises(TypeError, match="the incoming gradients cannot be a tensor inside a transformation"):
        torch.autograd.grad(actions.sum(dim=0), states, torch.eye(A), is_grads_batched=True)


# The sign of a view


def test_negative_views(backend):
    policy, states, noise = policy_of(), states_of(5), torch.randn(2, 5, A)
    for options in ({"seed": 1}, {"noise": noise}, {"seed": 1, "num_candidates": 3}):
        want = dql.sample(states, policy, backend=backend, **options)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for _ in range(3):
                    assert torch.equal(dql.sample(negated(states), policy, backend=backend, **options), want)
                    assert torch.equal(dql.sample(states, policy, backend=backend, **options), want)
    want = dql.sample(states, policy, backend=backend, noise=noise)
    assert torch.equal(dql.sample(states, policy, backend=backend, noise=negated(noise)), want)
    imaginary = torch.complex(torch.zeros_like(states), -states).conj().imag
    assert imaginary.is_neg() and torch.equal(dql.sample(imaginary, policy, backend=backend, noise=noise), want)
    critic = make_critic()
    chosen = dql.select(states, policy, critic, num_candidates=3, backend=backend, seed=1)
    assert torch.equal(dql.select(negated(states), policy, critic, num_candidates=3, backend=backend, seed=1), chosen)


def test_negative_gradients(backend):
    """Those that come in, and through states that are such a view."""
    policy, states = policy_of(), states_of(5)
    weights = torch.randn(5, A)

    def gradients(states: Tensor, d_actions: Tensor) -> list[Tensor]:
        leaf = states.detach().clone().requires_grad_(True)
        given = negated_view(leaf) if states.is_neg() else leaf
        actions = dql.sample(given, policy, backend=backend, seed=1)
        return list(torch.autograd.grad(actions, [leaf, *policy.denoiser.parameters()], d_actions))

    def negated_view(leaf: Tensor) -> Tensor:
        return torch._neg_view(-leaf)

    want = gradients(states, weights)
    for got in (gradients(states, negated(weights)), gradients(negated(states), weights)):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    zero = gradients(states, torch._efficientzerotensor((5, A)))
    assert not any(g.any() for g in zero)


def test_negative_batches_and_critics(backend):
    config = dql.Config(backend=backend, **SMALL)
    agents = [dql.DiffusionQL(S, A, config) for _ in range(2)]
    batch = batch_of(4)
    agents[0].update(batch)
    agents[1].update(dql.Batch(*(negated(value) for value in vars(batch).values())))
    for a, b in zip(agents[0].tensors().values(), agents[1].tensors().values(), strict=True):
        assert torch.equal(a, b)
    critic, runner = make_critic(), registry()[backend]
    states, actions = states_of(5), states_of(5, A)
    want = q_values(critic, states, actions, runner)
    for got in (q_values(critic, negated(states), negated(actions), runner), critic(negated(states), negated(actions))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # two backends: a sign lost is thousands of that


# What torch does not document


def test_this_torch_has_all_that_is_looked_at():
    """Where a later one has not, that kind of misuse goes unnoticed: this test says so, and dql runs."""
    from dql import tensors

    assert tensors.lost == []


def test_what_a_later_torch_has_lost_is_done_without():
    from dql import tensors

    assert tensors._of_torch("_C._nothing_of_this_name.at_all", "instead") == "instead"
    assert tensors.lost.pop() == "_C._nothing_of_this_name.at_all"
