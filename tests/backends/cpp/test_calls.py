"""Gradients and odd values as a caller of the backend "cpp" meets them."""

import math
from contextlib import nullcontext

import pytest
import torch
from support.networks import VARIANTS, A, S, make_critic, make_policy, needs_bf16, needs_cpp, same_bits, states_of

import dql
from dql.kernels.cpp import binding
from dql.sampler import run_chain

Tensor = torch.Tensor
pytestmark = needs_cpp


@pytest.fixture(params=VARIANTS)
def variant(request):
    with binding.forced(request.param):
        yield request.param


def every_gradient(actions: Tensor, states: Tensor, policy: dql.DiffusionPolicy) -> list[Tensor]:
    """Of the states (if they require one) and of all parameters, for a fixed loss."""
    weights = torch.randn(actions.shape, generator=torch.Generator().manual_seed(7))
    inputs = ([states] if states.requires_grad else []) + list(policy.denoiser.parameters())
    return list(torch.autograd.grad((actions * weights).sum(), inputs, retain_graph=True))


# Gradients as a caller meets them


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("activation", ["mish", "relu", "silu"])
def test_actions_are_the_same_with_and_without_gradients(activation, precision):
    policy, states = make_policy(activation=activation), states_of(40)

    def run_it() -> Tensor:
        return dql.sample(states, policy, seed=8, backend="cpp", precision=precision)

    for name, reason in binding.variants().items():
        if reason is not None or (precision == "bf16" and name != "avx512bf16"):
            continue
        with binding.forced(name):
            want = run_it()
            with torch.no_grad():
                assert torch.equal(run_it(), want), name


def test_backward_twice_through_one_graph(variant):
    policy, states = make_policy(), states_of(20).requires_grad_(True)
    actions = dql.sample(states, policy, seed=1, backend="cpp")
    first, second, third = (every_gradient(actions, states, policy) for _ in range(3))
    assert same_bits(second, first)
    assert same_bits(third, first)


@pytest.mark.parametrize("what", ["parameter", "flat buffer", "load_state_dict", "states"])
def test_changes_before_backward_are_noticed(what):
    policy, states = make_policy(), states_of(5)
    actions = dql.sample(states, policy, seed=1, backend="cpp")
    with torch.no_grad():
        if what == "parameter":
            policy.denoiser.final_layer.bias.add_(0.1)
        elif what == "flat buffer":
            policy.denoiser.flat.mul_(1.1)
        elif what == "load_state_dict":
            policy.load_state_dict(make_policy().state_dict())
        else:
            states.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        actions.sum().backward()


def test_gradients_of_states_alone_and_of_some_parameters_alone():
    policy, states = make_policy(), states_of(20).requires_grad_(True)
    d_states, *d_parameters = every_gradient(dql.sample(states, policy, seed=1, backend="cpp"), states, policy)
    names = [name for name, _ in policy.denoiser.named_parameters()]
    policy.requires_grad_(False)
    actions = dql.sample(states, policy, seed=1, backend="cpp")
    weights = torch.randn(actions.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.autograd.grad((actions * weights).sum(), states)[0], d_states)
    policy.denoiser.final_layer.requires_grad_(True)
    policy.denoiser.zero_grad()
    plain = states.detach()
    (dql.sample(plain, policy, seed=1, backend="cpp") * weights).sum().backward()
    for name, parameter, want in zip(names, policy.denoiser.parameters(), d_parameters, strict=True):
        if name.startswith("final_layer"):
            assert torch.equal(parameter.grad, want)
        else:
            assert not parameter.grad.any()


def test_inputs_of_any_stride(variant):
    policy = make_policy()
    wide = states_of(6, 2 * S)
    noise = torch.randn(5, 6, A, generator=torch.Generator().manual_seed(1))
    plain = wide[:, ::2].contiguous().requires_grad_(True)
    actions = dql.sample(plain, policy, noise=noise, backend="cpp")
    want = every_gradient(actions, plain, policy)
    turned = noise.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for states in (wide[:, ::2], wide[:, ::2].t().contiguous().t()):
        states = states.detach().requires_grad_(True)
        assert not states.is_contiguous()
        got = dql.sample(states, policy, noise=turned, backend="cpp")
        assert torch.equal(got, actions)
        assert same_bits(every_gradient(got, states, policy), want)
    expanded = dql.sample(plain.detach()[:1].expand(6, S), policy, noise=noise, backend="cpp")
    assert torch.equal(expanded[0], actions[0])
    (gradient,) = torch.autograd.grad(dql.sample(plain, policy, noise=noise, backend="cpp").sum(), plain)
    assert gradient.isfinite().all()  # the gradient of a sum is an expanded scalar


def test_no_states():
    policy, empty = make_policy(), torch.zeros(0, S, requires_grad=True)
    actions = dql.sample(empty, policy, seed=0, backend="cpp")
    assert actions.shape == (0, A)
    actions.sum().backward()
    assert dql.sample(empty, policy, num_candidates=5, backend="cpp").shape == (0, 5, A)
    assert dql.select(empty.detach(), policy, make_critic(), backend="cpp").shape == (0, A)


def test_torchs_default_dtype_is_of_no_concern():
    policy, critic, states = make_policy(), make_critic(), states_of(9)
    want = dql.sample(states, policy, seed=1, backend="cpp")
    chosen = dql.select(states, policy, critic, seed=1, backend="cpp")
    torch.set_default_dtype(torch.float64)
    try:
        got = dql.sample(states, policy, seed=1, backend="cpp")
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        assert torch.equal(dql.select(states, policy, critic, seed=1, backend="cpp"), chosen)
    finally:
        torch.set_default_dtype(torch.float32)


# Values that are no numbers, and very large ones


@pytest.mark.parametrize("hidden_dim", [16, 48, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1e38])
@pytest.mark.parametrize("where", ["time_mlp.1.weight", "mid_layer.0.weight", "mid_layer.2.weight", "final_layer.bias"])
def test_broken_weights_give_what_eager_gives(hidden_dim, value, where, variant):
    """NaN comes out of the kernels as NaN, and infinity as torch has it; nothing hangs or crashes. `sample` and
    `select` give no NaN away."""
    policy, states = make_policy(hidden_dim=hidden_dim), states_of(17)
    with torch.no_grad():
        policy.denoiser.get_parameter(where).view(-1)[1] = value
        got, want = (run_chain(states, policy, seed=0, backend=backend) for backend in ("cpp", "eager"))
    if math.isinf(value):  # an activation of -infinity is 0 here, its limit; torch's is NaN
        assert (want.isnan() | ~got.isnan()).all()
        got = torch.where(want.isnan(), want, got)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    run_chain(states, policy, seed=0, backend="cpp").sum().backward()
    for backend in ("cpp", "eager"):
        nan = run_chain(states, policy, seed=0, backend=backend).isnan().any()
        with pytest.raises(ValueError, match="the actions are NaN, because the") if nan else nullcontext():
            dql.sample(states, policy, seed=0, backend=backend)
        if math.isnan(value):
            with pytest.raises(ValueError, match=f"because the policy's parameter {where!r} holds NaN"):
                dql.select(states, policy, make_critic(), num_candidates=4, seed=0, backend=backend)


@pytest.mark.parametrize("size", [1e4, 1e18, 3e38])
def test_huge_states(size, variant):
    policy = make_policy()
    states = states_of(17).clamp(-1, 1) * size
    with torch.no_grad():
        got, want = (run_chain(states, policy, seed=0, backend=backend) for backend in ("cpp", "eager"))
    assert torch.equal(got.isnan(), want.isnan())
    if size < 1e38:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    actions = run_chain(states.requires_grad_(True), policy, seed=0, backend="cpp")
    actions.sum().backward()


def test_bad_states_are_found():
    policy, states = make_policy(), states_of(37)
    for row, column, value in ((0, 0, math.nan), (36, S - 1, math.inf), (20, 5, -math.inf)):
        bad = states.clone()
        bad[row, column] = value
        with pytest.raises(ValueError, match=f"hold 1 NaN or infinite values, the first at row {row}, column {column}"):
            dql.sample(bad, policy, backend="cpp")
    assert dql.sample(torch.full((3, S), 3e38), policy, backend="cpp").shape == (3, A)  # though their sum overflows
