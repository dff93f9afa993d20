"""The transcription of the baselines against hand-computed steps, finite differences and torch's own pieces."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import baselines as bl
from support import transcription as tr
from torch import Tensor, nn

S, A, H, B, T = 3, 2, 8, 6, 5
Params = dict[str, Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_layers(seed: int, layers: dict[str, tuple[int, int]]) -> Params:
    params = {}
    for i, (name, (fan_in, fan_out)) in enumerate(layers.items()):
        params[f"{name}.weight"] = fan_in**-0.5 * normal(100 * seed + 2 * i, fan_out, fan_in)
        params[f"{name}.bias"] = 0.5 * normal(100 * seed + 2 * i + 1, fan_out)
    return params


def make_mlp(seed: int, prefix: str, fan_in: int, fan_out: int) -> Params:
    sizes = [(fan_in, H), (H, H), (H, fan_out)]
    return make_layers(seed, {f"{prefix}.{2 * i}": size for i, size in enumerate(sizes)})


def make_twin(seed: int) -> Params:
    return make_mlp(seed, "q1_model", S + A, 1) | make_mlp(seed + 1, "q2_model", S + A, 1)


def make_iql_actor(seed: int, *log_std: float) -> Params:
    return make_mlp(seed, "net", S, A) | {"log_std": vector(*log_std)}


def make_denoiser(seed: int) -> Params:
    layers = {"time_mlp.1": (16, 32), "time_mlp.3": (32, 16), "mid_layer.0": (A + 16 + S, H), "mid_layer.2": (H, H)}
    return make_layers(seed, layers | {"final_layer": (H, A)})


def make_batch(seed: int, max_action: float = 1.0) -> Params:
    return {
        "states": normal(seed, B, S),
        "actions": max_action * normal(seed + 1, B, A).tanh(),
        "rewards": normal(seed + 2, B),
        "next_states": normal(seed + 3, B, S),
        "masks": vector(1.0, 0.0, 1.0, 1.0, 0.0, 1.0),
    }


def make_randomness(seed: int, T: int, coin: bool) -> dict[str, Any]:
    return {
        "target_noise": normal(seed, T, B, A),
        "bc_t": torch.arange(B) % T,
        "bc_noise": normal(seed + 1, B, A),
        "coin": coin,
    }


def one(**values: float) -> Params:
    """Parameters of networks with one number in and out; `net_0_weight` stands for net.0.weight."""
    params = {}
    for key, value in values.items():
        prefix, layer, kind = key.rsplit("_", 2)
        shape = (1, 1) if kind == "weight" else (1,)
        params[f"{prefix}.{layer}.{kind}"] = torch.full(shape, value, dtype=torch.float64)
    return params


def row(**values: float) -> Params:
    """A batch of one row and one dimension."""
    shapes = {"states": (1, 1), "actions": (1, 1), "next_states": (1, 1), "rewards": (1,), "masks": (1,)}
    return {key: torch.full(shapes[key], value, dtype=torch.float64) for key, value in values.items()}


def twin_of(w1: tuple[float, float], b1: float, w2: tuple[float, float], b2: float) -> Params:
    """Two linear critics of one state and one action."""
    params = one(q1_model_0_bias=b1, q2_model_0_bias=b2)
    params["q1_model.0.weight"] = vector(*w1)[None]
    params["q2_model.0.weight"] = vector(*w2)[None]
    return params


def adams_first(value: float, gradient: float, lr: float) -> float:
    return value - lr * gradient / (abs(gradient) + 1e-8)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-13, what: str = "values") -> None:
    """No element further off than `tolerance`; torch.testing takes seconds to import."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    difference = float((actual - expected).detach().abs().max())
    assert difference <= tolerance, f"{what}: {difference} apart"


def assert_same(actual: Params, expected: Params, tolerance: float = 1e-13) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_close(actual[key], expected[key], tolerance, key)


def assert_gradients(loss: Callable[[Params], Tensor], params: Params) -> None:
    """Autograd against central differences: the largest and the last element of every parameter."""
    leaves = tr.with_gradient(params)
    for key, grad in tr.gradients(loss(leaves), leaves).items():
        for index in {int(grad.abs().argmax()), grad.numel() - 1}:
            values = []
            for step in (1e-6, -1e-6):
                shifted = {name: value.clone() for name, value in params.items()}
                shifted[key].view(-1)[index] += step
                values.append(float(loss(shifted)))
            numeric = (values[0] - values[1]) / 2e-6
            assert float(grad.reshape(-1)[index]) == pytest.approx(numeric, rel=1e-6, abs=1e-8), f"{key}[{index}]"


# Networks


@pytest.mark.parametrize(("activation", "module"), [("relu", nn.ReLU), ("mish", nn.Mish)])
def test_networks_are_those_of_sequential(activation: str, module: type[nn.Module]) -> None:
    params, x = make_mlp(1, "net", S, A), normal(2, B, S)
    net = nn.Sequential(nn.Linear(S, H), module(), nn.Linear(H, H), module(), nn.Linear(H, A)).double()
    net.load_state_dict({key.removeprefix("net."): value for key, value in params.items()})
    assert_close(bl.mlp(params, "net", x, activation), net(x))


def test_relus_derivative_at_zero_is_zero() -> None:
    x = vector(-1.0, 0.0, 2.0).requires_grad_()
    bl.relu(x).sum().backward()
    assert bl.relu(x).tolist() == [0.0, 0.0, 2.0]
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 1.0]


def test_log_normal_is_torchs() -> None:
    x, mean, log_std = normal(0, B, A), normal(1, B, A), normal(2, B, A)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).sum(dim=1)
    assert_close(bl.log_normal(x, mean, log_std), expected)
    expected = torch.distributions.Normal(mean, log_std[0].exp()).log_prob(x).sum(dim=1)
    assert_close(bl.log_normal(x, mean, log_std[0]), expected)


# Behaviour cloning


def test_bc_by_hand() -> None:
    state = bl.initial_state(one(net_0_weight=0.5, net_0_bias=-0.25))
    new = bl.update_bc(state, row(states=2.0, actions=1.0), bl.BCHyper(max_action=2.0, lr=0.01))
    pi = 2 * math.tanh(0.75)
    gradient = 2 * (pi - 1) * 2 * (1 - math.tanh(0.75) ** 2)  # to the bias; twice that to the weight
    assert new["metrics"]["bc_loss"] == pytest.approx((pi - 1) ** 2, rel=1e-14)
    assert new["metrics"]["actor_grad_norm"] == pytest.approx(abs(gradient) * math.sqrt(5), rel=1e-14)
    assert float(new["actor"]["net.0.weight"]) == pytest.approx(adams_first(0.5, 2 * gradient, 0.01), rel=1e-14)
    assert float(new["actor"]["net.0.bias"]) == pytest.approx(adams_first(-0.25, gradient, 0.01), rel=1e-14)
    assert new["step"] == 1


def test_bc_gaussian_by_hand() -> None:
    actor = one(net_0_weight=0.0, net_0_bias=0.0)
    actor["net.0.weight"] = vector(0.5, 0.1)[:, None]
    actor["net.0.bias"] = vector(-0.25, 0.3)
    new = bl.update_bc_gaussian(
        bl.initial_state(actor), row(states=2.0, actions=1.0), bl.BCHyper(max_action=2.0, lr=0.01)
    )
    mean, log_std = 2 * math.tanh(0.75), 0.5
    z = (1.0 - mean) / math.exp(log_std)
    to_mean = -z / math.exp(log_std) * 2 * (1 - math.tanh(0.75) ** 2)
    to_log_std = 1 - z**2
    assert new["metrics"]["bc_loss"] == pytest.approx(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi), rel=1e-14)
    expected = [adams_first(-0.25, to_mean, 0.01), adams_first(0.3, to_log_std, 0.01)]
    assert new["actor"]["net.0.bias"].tolist() == pytest.approx(expected, rel=1e-14)
    assert new["actor_grads"]["net.0.weight"][:, 0].tolist() == pytest.approx([2 * to_mean, 2 * to_log_std], rel=1e-13)


@pytest.mark.parametrize(("bias", "log_std"), [(-7.0, -5.0), (3.0, 2.0)])
def test_bc_gaussians_log_std_is_clamped_and_then_has_no_gradient(bias: float, log_std: float) -> None:
    actor = make_mlp(1, "net", S, 2 * A)
    actor["net.4.weight"][A:] = 0.0
    actor["net.4.bias"][A:] = bias
    batch = make_batch(3)
    assert bl.gaussian_actor(actor, batch["states"], 1.0, "relu")[1].unique().tolist() == [log_std]
    new = bl.update_bc_gaussian(bl.initial_state(actor), batch, bl.BCHyper())
    assert not new["actor_grads"]["net.4.weight"][A:].any() and new["actor_grads"]["net.4.weight"][:A].any()


@pytest.mark.parametrize("max_action", [1.0, 2.5])
def test_bc_gradients(max_action: float) -> None:
    hyper, batch = bl.BCHyper(max_action=max_action), make_batch(1, max_action)
    assert_gradients(lambda p: bl.bc_mse(p, batch["states"], batch["actions"], hyper), make_mlp(1, "net", S, A))
    assert_gradients(lambda p: bl.bc_nll(p, batch["states"], batch["actions"], hyper), make_mlp(2, "net", S, 2 * A))


def test_ten_updates_of_bc_are_those_of_torchs_adam() -> None:
    """Its fused form: torch.optim would first import torch's compiler, which takes longer than all that is here."""
    params = make_mlp(1, "net", S, A)
    net = nn.Sequential(nn.Linear(S, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, A), nn.Tanh()).double()
    net.load_state_dict({key.removeprefix("net."): value for key, value in params.items()})
    leaves = list(net.parameters())
    m, v = [torch.zeros_like(leaf) for leaf in leaves], [torch.zeros_like(leaf) for leaf in leaves]
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    state = bl.initial_state(params)
    for i in range(10):
        batch = make_batch(10 * i, 2.0)
        state = bl.update_bc(state, batch, bl.BCHyper(max_action=2.0, lr=3e-3))
        loss = nn.functional.mse_loss(2.0 * net(batch["states"]), batch["actions"])
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            steps = [torch.tensor(i + 1.0) for _ in leaves]
            torch._fused_adam_(leaves, grads, m, v, [], steps, lr=3e-3, **settings)
        assert state["metrics"]["bc_loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert_same(state["actor"], {f"net.{key}": value.detach() for key, value in net.state_dict().items()})


# TD3+BC


def test_states_are_standardised_with_a_thousandth_more_than_their_spread() -> None:
    states = torch.stack([vector(2.0, -2.0), vector(1.0, -1.999)])
    s = bl.standardised(states, vector(1.0, -2.0), vector(0.499, 0.0))
    assert s.flatten().tolist() == pytest.approx([2.0, 0.0, 0.0, 1.0], rel=1e-12)


@pytest.mark.parametrize(
    ("noise", "action"),
    [(1.0, 2 * math.tanh(0.6) + 0.4), (-9.0, 2 * math.tanh(0.6) - 1.0), (9.0, 2.0), (0.0, 2 * math.tanh(0.6))],
    ids=["scaled", "clipped", "action clamped", "none"],
)
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_td3s_target_by_hand(noise: float, action: float, mask: float) -> None:
    state = bl.initial_state(
        one(net_0_weight=0.5, net_0_bias=0.1), twin_of((1.0, 2.0), 0.5, (-1.0, 1.0), 4.0), actor_target=True
    )
    hyper = bl.TD3BCHyper(max_action=2.0, discount=0.9)
    s_next = vector(1.0)[:, None]
    y = bl.td3_target(state, s_next, vector(0.3), vector(mask), vector(noise)[:, None], hyper)
    expected = 0.3 + mask * 0.9 * min(1 + 2 * action + 0.5, -1 + action + 4.0)
    assert float(y) == pytest.approx(expected, rel=1e-12)


def test_td3_bc_by_hand() -> None:
    """Two updates of linear networks, the states standardised to 2 and 1."""
    hyper = bl.TD3BCHyper(max_action=2.0, discount=0.9, tau=0.1, alpha=2.5, lr=0.01, critic_lr=0.02)
    actor, critic = one(net_0_weight=0.2, net_0_bias=0.1), twin_of((1.0, 2.0), 0.5, (-1.0, 1.0), 4.0)
    batch = row(states=5.0, actions=1.0, next_states=3.0, rewards=0.3, masks=1.0)
    mean, std = vector(1.0), vector(2.0 - 1e-3)
    noise = {"target_noise": vector(0.0)[:, None]}
    first = bl.update_td3_bc(bl.initial_state(actor, critic, actor_target=True), batch, noise, hyper, mean, std)

    a_next = 2 * math.tanh(0.3)
    y = 0.3 + 0.9 * min(1 + 2 * a_next + 0.5, -1 + a_next + 4.0)
    q1, q2 = 2 + 2 + 0.5, -2 + 1 + 4.0
    assert first["metrics"]["critic_loss"] == pytest.approx((q1 - y) ** 2 + (q2 - y) ** 2, rel=1e-12)
    expected = [adams_first(1.0, 2 * (q1 - y) * 2, 0.02), adams_first(2.0, 2 * (q1 - y), 0.02)]
    assert first["critic"]["q1_model.0.weight"].flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert float(first["critic"]["q2_model.0.bias"]) == pytest.approx(adams_first(4.0, 2 * (q2 - y), 0.02), rel=1e-12)

    second = bl.update_td3_bc(first, batch, noise, hyper, mean, std)
    assert second["metrics"]["target_q"].item() == pytest.approx(y, rel=1e-12)  # the targets have not moved
    w_s, w_a = second["critic"]["q1_model.0.weight"].flatten().tolist()
    pi, slope = 2 * math.tanh(0.5), 2 * (1 - math.tanh(0.5) ** 2)
    q = 2 * w_s + w_a * pi + float(second["critic"]["q1_model.0.bias"])
    gradient = (-2.5 / abs(q) * w_a + 2 * (pi - 1)) * slope  # to the bias; twice that to the weight
    assert second["metrics"]["lambda"] == pytest.approx(2.5 / abs(q), rel=1e-12)
    assert second["metrics"]["q_loss"] == pytest.approx(-2.5 * math.copysign(1, q), rel=1e-12)
    assert second["metrics"]["bc_loss"] == pytest.approx((pi - 1) ** 2, rel=1e-12)
    weight = adams_first(0.2, 2 * gradient, 0.01)  # the actor's first step, though the second update
    assert float(second["actor"]["net.0.weight"]) == pytest.approx(weight, rel=1e-12)
    assert float(second["actor_target"]["net.0.weight"]) == pytest.approx(0.9 * 0.2 + 0.1 * weight, rel=1e-12)
    expected = [0.9 * 1.0 + 0.1 * w_s, 0.9 * 2.0 + 0.1 * w_a]
    assert second["critic_target"]["q1_model.0.weight"].flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_td3_bcs_actor_and_targets_move_together_and_late(delay: int) -> None:
    state = bl.initial_state(make_mlp(1, "net", S, A), make_twin(2), actor_target=True)
    hyper, mean, std = bl.TD3BCHyper(policy_delay=delay), normal(3, S), normal(4, S).abs()
    for n in range(1, 7):
        new = bl.update_td3_bc(state, make_batch(n), {"target_noise": normal(n, B, A)}, hyper, mean, std)
        moved = {
            name: any(not torch.equal(new[name][key], state[name][key]) for key in new[name])
            for name in ("critic", "critic_target", "actor", "actor_m", "actor_target")
        }
        due = n % delay == 0
        assert moved == {"critic": True} | dict.fromkeys(["critic_target", "actor", "actor_m", "actor_target"], due)
        assert ("actor_loss" in new["metrics"]) is due and new["step"] == n
        state = new


def test_td3_bcs_actor_takes_the_first_critic_alone() -> None:
    batch, hyper = make_batch(1), bl.TD3BCHyper()
    actor, critic, other = make_mlp(1, "net", S, A), make_twin(2), make_twin(7)
    second = {key: value for key, value in other.items() if key.startswith("q2_model")}
    first = {key: value for key, value in other.items() if key.startswith("q1_model")}
    losses = [
        [float(x) for x in bl.td3_bc_losses(actor, c, batch["states"], batch["actions"], hyper)]
        for c in (critic, critic | second, critic | first)
    ]
    assert losses[0] == losses[1] and losses[0][2] != losses[2][2]


def test_td3_bcs_lambda_is_of_sizes_not_of_the_sizes_of_means() -> None:
    critic = twin_of((1.0, 0.0), 0.0, (0.0, 0.0), 0.0)  # Q1(s, a) = s
    actor, s = one(net_0_weight=0.0, net_0_bias=0.0), vector(-3.0, 1.0, 5.0, 1.0)[:, None]
    loss_q, loss_bc, weight = bl.td3_bc_losses(actor, critic, s, 0.5 * torch.ones_like(s), bl.TD3BCHyper(alpha=2.0))
    assert (float(loss_q), float(loss_bc), weight) == pytest.approx((-0.8, 0.25, 0.8), rel=1e-14)


def test_td3_bc_gradients() -> None:
    batch, hyper = make_batch(1, 1.5), bl.TD3BCHyper(max_action=1.5)
    s, actions, y = batch["states"], batch["actions"], normal(9, B)
    actor, critic = make_mlp(1, "net", S, A), make_twin(2)
    assert_gradients(lambda p: bl.twin_loss(p, s, actions, y, "relu"), critic)
    _, _, weight = bl.td3_bc_losses(actor, critic, s, actions, hyper)

    def with_lambda_held(p: Params) -> Tensor:
        pi = 1.5 * torch.tanh(bl.mlp(p, "net", s, "relu"))
        return -weight * bl.twin(critic, s, pi, "relu")[0].mean() + ((pi - actions) ** 2).mean()

    assert_gradients(with_lambda_held, actor)
    leaves = tr.with_gradient(actor)
    q, bc, _ = bl.td3_bc_losses(leaves, critic, s, actions, hyper)
    assert_same(tr.gradients(q + bc, leaves), tr.gradients(with_lambda_held(leaves), leaves))


# IQL


def test_expectile_loss_by_hand() -> None:
    value = one(net_0_weight=1.0, net_0_bias=0.0)  # V(s) = s
    states = vector(1.0, 2.0, 3.0)[:, None]
    q = vector(3.0, 1.0, 3.0)  # two above, one below, the same
    loss = bl.expectile_loss(value, q, states, bl.IQLHyper(expectile=0.7))
    assert float(loss) == pytest.approx((0.7 * 4 + 0.3 * 1) / 3, rel=1e-14)
    # at 1/2 it is half the squared error
    loss = bl.expectile_loss(value, q, states, bl.IQLHyper(expectile=0.5))
    assert float(loss) == pytest.approx(0.5 * 5 / 3, rel=1e-14)


def test_weights_of_advantages_are_clipped_at_a_hundred() -> None:
    hyper = bl.IQLHyper(temperature=3.0)
    edge = math.log(100) / 3
    advantage = vector(-1.0, 0.0, 0.5, edge - 1e-6, edge + 1e-6, 2.0, 1e6)
    weights = bl.advantage_weights(advantage.requires_grad_(), hyper)
    assert not weights.requires_grad
    expected = [math.exp(-3), 1.0, math.exp(1.5), 100 * math.exp(-3e-6), 100.0, 100.0, 100.0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_actors_rate_falls_as_a_cosine_to_zero() -> None:
    hyper = bl.IQLHyper(lr=0.4, num_updates=6)
    rates = [bl.iql_actor_lr(step, hyper) for step in range(7)]
    root = math.sqrt(3) / 2
    expected = [0.4, 0.2 * (1 + root), 0.3, 0.2, 0.1, 0.2 * (1 - root), 0.0]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert bl.iql_actor_lr(5, dataclasses.replace(hyper, num_updates=None)) == 0.4


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_iql_by_hand(mask: float) -> None:
    """The first update of linear networks, in the order of the published code."""
    hyper = bl.IQLHyper(
        max_action=2.0, discount=0.9, tau=0.1, temperature=0.5, lr=0.01, critic_lr=0.02, value_lr=0.03, num_updates=2
    )
    actor = one(net_0_weight=0.2, net_0_bias=0.1) | {"log_std": vector(0.3)}
    critic = twin_of((1.0, 2.0), 0.5, (-1.0, 1.0), 4.0)
    state = bl.initial_state(actor, critic, one(net_0_weight=0.4, net_0_bias=-0.2))
    batch = row(states=2.0, actions=1.0, next_states=3.0, rewards=0.3, masks=mask)
    new = bl.update_iql(state, batch, hyper)

    q1, q2 = 2 + 2 + 0.5, -2 + 1 + 4.0
    u = min(q1, q2) - (2 * 0.4 - 0.2)
    assert new["metrics"]["value_loss"] == pytest.approx(0.7 * u**2, rel=1e-12)
    weight, bias = adams_first(0.4, -2 * 0.7 * u * 2, 0.03), adams_first(-0.2, -2 * 0.7 * u, 0.03)
    assert float(new["value"]["net.0.weight"]) == pytest.approx(weight, rel=1e-12)

    advantage = min(q1, q2) - (2 * weight + bias)  # of the new value
    w = math.exp(0.5 * advantage)
    mean, slope = 2 * math.tanh(0.5), 2 * (1 - math.tanh(0.5) ** 2)
    z = (1 - mean) / math.exp(0.3)
    assert new["metrics"]["weights"].item() == pytest.approx(w, rel=1e-12)
    loss = w * (0.5 * z**2 + 0.3 + 0.5 * math.log(2 * math.pi))
    assert new["metrics"]["actor_loss"] == pytest.approx(loss, rel=1e-12)
    assert float(new["actor_grads"]["log_std"]) == pytest.approx(w * (1 - z**2), rel=1e-12)
    gradient = -w * z / math.exp(0.3) * slope
    assert float(new["actor"]["net.0.bias"]) == pytest.approx(adams_first(0.1, gradient, 0.01), rel=1e-12)

    y = 0.3 + mask * 0.9 * (3 * weight + bias)  # of the new value
    assert new["metrics"]["critic_loss"] == pytest.approx((q1 - y) ** 2 + (q2 - y) ** 2, rel=1e-12)
    moved = adams_first(4.0, 2 * (q2 - y), 0.02)
    assert float(new["critic"]["q2_model.0.bias"]) == pytest.approx(moved, rel=1e-12)
    target = 0.9 * 4.0 + 0.1 * moved  # towards the new critic
    assert float(new["critic_target"]["q2_model.0.bias"]) == pytest.approx(target, rel=1e-12)

    again = bl.update_iql(new, batch, hyper)
    assert (new["metrics"]["actor_lr"], again["metrics"]["actor_lr"]) == pytest.approx((0.01, 0.005), rel=1e-12)
    # the advantage is of the target critics, which have hardly moved, and not of the critics
    t1, t2 = bl.twin(new["critic_target"], batch["states"], batch["actions"], "relu")
    v = bl.state_value(again["value"], batch["states"], "relu")
    assert_close(again["metrics"]["advantage"], torch.minimum(t1, t2) - v)


@pytest.mark.parametrize(("log_std", "clamped"), [(-6.0, -5.0), (2.5, 2.0)])
def test_iqls_log_std_is_clamped_and_then_has_no_gradient(log_std: float, clamped: float) -> None:
    batch, hyper = make_batch(1), bl.IQLHyper()
    losses = []
    for value in (log_std, clamped):
        state = bl.initial_state(make_iql_actor(1, value, 0.2), make_twin(2), make_mlp(4, "net", S, 1))
        new = bl.update_iql(state, batch, hyper)
        losses.append(new["metrics"]["actor_loss"])
        if value == log_std:
            assert new["actor_grads"]["log_std"][0] == 0.0 and new["actor_grads"]["log_std"][1] != 0.0
            assert new["actor"]["log_std"][0] == log_std
    assert losses[0] == losses[1]


def test_iql_gradients() -> None:
    batch, hyper = make_batch(1, 1.5), bl.IQLHyper(max_action=1.5)
    states, weights = batch["states"], normal(8, B).exp()
    assert_gradients(
        lambda p: bl.iql_actor_loss(p, states, batch["actions"], weights, hyper), make_iql_actor(1, -0.4, 0.3)
    )
    assert_gradients(lambda p: bl.expectile_loss(p, normal(9, B), states, hyper), make_mlp(4, "net", S, 1))


# EDP


@pytest.mark.parametrize("max_action", [1.0, 2.0])
def test_the_noise_that_was_added_gives_the_action_back(max_action: float) -> None:
    schedule, t = tr.make_schedule("vp", T), torch.arange(B) % T
    actions, noise = max_action * normal(1, B, A).tanh(), normal(2, B, A)
    x_t = tr.q_sample(schedule, actions, t, noise)
    assert_close(bl.approximate_actions(schedule, x_t, t, noise, max_action), actions)


def test_the_approximation_by_hand() -> None:
    schedule = tr.make_schedule("vp", 2)
    abar = [math.exp(-0.05 - 4.95 / 4), math.exp(-0.1 - 4.95)]
    x_t, t = torch.stack([vector(0.2, 0.9), vector(0.03, -0.5)]), torch.tensor([0, 1])
    eps = torch.stack([vector(0.1, -0.4), vector(0.02, 0.3)]).requires_grad_()
    actions = bl.approximate_actions(schedule, x_t, t, eps, 1.0)
    expected = [
        (0.2 - math.sqrt(1 - abar[0]) * 0.1) / math.sqrt(abar[0]),
        1.0,
        (0.03 - math.sqrt(1 - abar[1]) * 0.02) / math.sqrt(abar[1]),
        -1.0,
    ]
    assert actions.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    actions.sum().backward()
    assert eps.grad is not None
    slopes = [-math.sqrt(1 / value - 1) for value in abar]  # none where it is clamped
    assert eps.grad.flatten().tolist() == pytest.approx([slopes[0], 0.0, slopes[1], 0.0], rel=1e-12)


@pytest.mark.parametrize("coin", [True, False])
def test_with_one_step_edp_is_diffusion_ql(coin: bool) -> None:
    """The chain of one step is the approximation itself, where it starts at the noisy action."""
    hyper = tr.Hyper(T=1, max_action=1.5, ema_start=0, ema_every=1, eta=0.7)
    ours = theirs = tr.initial_state(make_denoiser(1), make_twin(2))
    schedule = tr.make_schedule("vp", 1)
    for n in range(3):
        batch, randomness = make_batch(10 * n, 1.5), make_randomness(20 * n, 1, coin)
        x_t = tr.q_sample(schedule, batch["actions"], randomness["bc_t"], randomness["bc_noise"])
        ours = bl.update_edp(ours, batch, randomness, hyper)
        theirs = tr.update(theirs, batch, randomness | {"actor_noise": x_t[None]}, hyper)
        for name in ("actor", "ema_actor", "actor_v", "critic", "critic_target", "actor_grads", "critic_grads"):
            assert_same(ours[name], theirs[name])
        assert_close(ours["metrics"].pop("target_q"), theirs["metrics"].pop("target_q"))
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-10)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_without_the_q_term_edp_is_diffusion_ql(max_q_backup: bool) -> None:
    hyper = tr.Hyper(T=T, eta=0.0, grad_norm=0.3, ema_start=0, ema_every=2, max_q_backup=max_q_backup)
    ours = theirs = tr.initial_state(make_denoiser(1), make_twin(2))
    for n in range(2):
        batch, randomness = make_batch(10 * n), make_randomness(20 * n, T, coin=True)
        if max_q_backup:
            randomness["target_noise"] = normal(n, T, B, 3, A)
        ours = bl.update_edp(ours, batch, randomness, hyper)
        theirs = tr.update(theirs, batch, randomness | {"actor_noise": normal(5, T, B, A)}, hyper)
        for name in ("actor", "ema_actor", "actor_m", "critic", "critic_target", "critic_v"):
            assert_same(ours[name], theirs[name])


@pytest.mark.parametrize("coin", [True, False])
def test_edp_gradients(coin: bool) -> None:
    schedule, batch, randomness = tr.make_schedule("vp", T), make_batch(1, 1.5), make_randomness(2, T, coin)
    actor, critic, t, noise = make_denoiser(3), make_twin(4), randomness["bc_t"], randomness["bc_noise"]
    x_t = tr.q_sample(schedule, batch["actions"], t, noise)

    def q_values(p: Params) -> tuple[Tensor, Tensor]:
        eps = tr.denoiser(p, x_t, t, batch["states"])
        q1, q2 = tr.critic(critic, batch["states"], bl.approximate_actions(schedule, x_t, t, eps, 1.5))
        return (q1, q2) if coin else (q2, q1)

    divisor = float(q_values(actor)[1].abs().mean())

    def with_the_divisor_held(p: Params) -> Tensor:
        return tr.bc_loss(p, schedule, batch["states"], batch["actions"], t, noise) - q_values(p)[0].mean() / divisor

    assert_gradients(with_the_divisor_held, actor)
    leaves = tr.with_gradient(actor)
    loss_bc, loss_q = bl.edp_losses(leaves, critic, schedule, batch, randomness, 1.5)
    assert float(loss_bc.detach() + loss_q.detach()) == pytest.approx(float(with_the_divisor_held(actor)), rel=1e-12)
    assert_same(tr.gradients(loss_bc + loss_q, leaves), tr.gradients(with_the_divisor_held(leaves), leaves))


def test_a_state_is_left_as_it_was() -> None:
    batch, mean, std = make_batch(1), normal(1, S), normal(2, S).abs()
    actor, gaussian, critic, value = (
        make_mlp(1, "net", S, A),
        make_mlp(1, "net", S, 2 * A),
        make_twin(2),
        make_mlp(4, "net", S, 1),
    )
    noise, randomness = {"target_noise": normal(3, B, A)}, make_randomness(4, T, coin=True)
    td3 = bl.TD3BCHyper(policy_delay=1)
    updates: list[tuple[tr.State, Callable[[tr.State], tr.State]]] = [
        (bl.initial_state(actor), lambda s: bl.update_bc(s, batch, bl.BCHyper())),
        (bl.initial_state(gaussian), lambda s: bl.update_bc_gaussian(s, batch, bl.BCHyper())),
        (
            bl.initial_state(actor, critic, actor_target=True),
            lambda s: bl.update_td3_bc(s, batch, noise, td3, mean, std),
        ),
        (
            bl.initial_state(make_iql_actor(1, 0.0, 0.0), critic, value),
            lambda s: bl.update_iql(s, batch, bl.IQLHyper()),
        ),
        (
            tr.initial_state(make_denoiser(1), critic),
            lambda s: bl.update_edp(s, batch, randomness, tr.Hyper(T=T, ema_start=0)),
        ),
    ]
    for state, update in updates:
        before = copy.deepcopy(state)
        new = update(state)
        assert state["step"] == 0 and new["step"] == 1 and state.keys() <= new.keys()
        for name in before.keys() - {"step"}:
            assert_same(state[name], before[name], 0.0)
            assert new[name].keys() == before[name].keys()
            assert not any(value.requires_grad for value in new[name].values())
