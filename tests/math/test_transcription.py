"""The transcription against hand-computed values, limits, finite differences and torch's own pieces."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from support import ROOT
from support import transcription as tr
from torch import Tensor

S, A, H, B = 3, 2, 8, 5
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make_denoiser(seed: int, num_hidden: int = 3, A: int = A) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"time_mlp.1": (16, 32), "time_mlp.3": (32, 16), "final_layer": (H, A)}
    for i in range(num_hidden):
        sizes[f"mid_layer.{2 * i}"] = (A + 16 + S if i == 0 else H, H)
    params = {}
    for name, (fan_in, fan_out) in sizes.items():
        scale = fan_in**-0.5
        params[f"{name}.weight"] = scale * torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
        params[f"{name}.bias"] = scale * torch.randn(fan_out, generator=generator, dtype=torch.float64)
    return params


def make_critic(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for prefix in ("q1_model", "q2_model"):
        for i, (fan_in, fan_out) in enumerate([(S + A, H), (H, H), (H, H), (H, 1)]):
            weight = torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
            params[f"{prefix}.{2 * i}.weight"] = fan_in**-0.5 * weight
            params[f"{prefix}.{2 * i}.bias"] = torch.randn(fan_out, generator=generator, dtype=torch.float64)
    return params


def constant_denoiser(eps: float) -> dict[str, Tensor]:
    """A denoiser that answers `eps` to everything."""
    params = {key: torch.zeros_like(value) for key, value in make_denoiser(0).items()}
    params["final_layer.bias"] += eps
    return params


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(seed: int) -> dict[str, Tensor]:
    return {
        "states": normal(seed, B, S),
        "actions": normal(seed + 1, B, A).tanh(),
        "rewards": normal(seed + 2, B),
        "next_states": normal(seed + 3, B, S),
        "masks": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64),
    }


def make_randomness(seed: int, T: int, coin: bool = True, candidates: int | None = None) -> dict:
    target_shape = (T, B, A) if candidates is None else (T, B, candidates, A)
    return {
        "target_noise": normal(seed, *target_shape),
        "bc_t": torch.randint(0, T, (B,), generator=torch.Generator().manual_seed(seed)),
        "bc_noise": normal(seed + 1, B, A),
        "actor_noise": normal(seed + 2, T, B, A),
        "coin": coin,
    }


def assert_gradients(loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], count: int = 3) -> None:
    """Autograd against central differences: the largest, a middle and the last element of every parameter."""
    leaves = tr.with_gradient(params)
    grads = tr.gradients(loss(leaves), leaves)
    step = 1e-5
    for key, grad in grads.items():
        indices = {int(grad.abs().argmax()), grad.numel() // 2, grad.numel() - 1}
        for index in sorted(indices)[:count]:
            values = []
            for sign in (1.0, -1.0):
                shifted = {name: value.clone() for name, value in params.items()}
                shifted[key].view(-1)[index] += sign * step
                values.append(float(loss(shifted)))
            numeric = (values[0] - values[1]) / (2 * step)
            analytic = float(grad.reshape(-1)[index])
            assert analytic == pytest.approx(numeric, rel=1e-6, abs=1e-8), f"{key}[{index}]"


def test_vp_by_hand() -> None:
    expected = [1 - math.exp(-0.02 - 0.198 * odd) for odd in (1, 3, 5, 7, 9)]  # 0.5 * 9.9 / 25 = 0.198
    assert tr.betas("vp", 5).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("T", [1, 2, 5, 50, 1000])
def test_vp_ends_at_the_same_noise_for_every_length(T: int) -> None:
    # the exponents sum to -0.1 - 0.5 * 9.9 * T^2 / T^2
    assert float(tr.make_schedule("vp", T).alphas_cumprod[-1]) == pytest.approx(math.exp(-5.05), rel=1e-11)


def test_linear_by_hand() -> None:
    assert tr.betas("linear", 3).tolist() == pytest.approx([1e-4, 0.01005, 2e-2], rel=1e-14)
    assert tr.betas("linear", 1).tolist() == [1e-4]


def test_cosine_by_hand() -> None:
    # T = 2: points 0, 1.5, 3; the last is a quarter turn, f = 0, so the last beta is 1 and clipped
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    f1 = math.cos(0.508 / 1.008 * math.pi / 2) ** 2
    assert tr.betas("cosine", 2).tolist() == pytest.approx([1 - f1 / f0, 0.999], rel=1e-14)
    assert tr.betas("cosine", 1).tolist() == [0.999]


@pytest.mark.parametrize("name", ["vp", "linear", "cosine"])
@pytest.mark.parametrize("T", [1, 2, 5, 50])
def test_schedule_ends(name: str, T: int) -> None:
    schedule = tr.make_schedule(name, T)
    beta = schedule.betas
    # the posterior of the last reverse step is x0 itself, without noise
    assert float(schedule.posterior_mean_coef1[0]) == pytest.approx(1.0, rel=1e-12)
    assert float(schedule.posterior_mean_coef2[0]) == 0.0
    assert float(schedule.posterior_variance[0]) == 0.0
    assert float(schedule.posterior_log_variance_clipped[0]) == pytest.approx(math.log(1e-20))
    assert float(schedule.alphas_cumprod_prev[0]) == 1.0
    torch.testing.assert_close(schedule.alphas_cumprod, torch.cumprod(1 - beta, 0), rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.sqrt_alphas_cumprod**2, schedule.alphas_cumprod, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        schedule.sqrt_recipm1_alphas_cumprod,
        schedule.sqrt_one_minus_alphas_cumprod * schedule.sqrt_recip_alphas_cumprod,
        rtol=1e-10,  # 1 - abar of the linear schedule has lost four digits
        atol=0,
    )
    assert torch.all((beta > 0) & (beta < 1))


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="vp, linear or cosine"):
        tr.betas("quadratic", 5)
    with pytest.raises(ValueError, match="at least one"):
        tr.betas("vp", 0)


def test_spaced_timesteps() -> None:
    assert tr.spaced_timesteps(5, 5) == [4, 3, 2, 1, 0]
    assert tr.spaced_timesteps(5, 3) == [4, 2, 0]
    assert tr.spaced_timesteps(6, 3) == [5, 2, 0]  # 2.5 goes to the even neighbour
    assert tr.spaced_timesteps(8, 3) == [7, 4, 0]  # 3.5 too
    assert tr.spaced_timesteps(5, 1) == [4]
    with pytest.raises(ValueError, match="between 1 and T"):
        tr.spaced_timesteps(5, 6)
    for T in (2, 7, 28, 100):
        for K in range(2, T + 1):
            steps = tr.spaced_timesteps(T, K)
            assert steps[0] == T - 1 and steps[-1] == 0 and sorted(set(steps), reverse=True) == steps


def test_mish() -> None:
    x = torch.tensor([-800.0, -20.0, -1.0, 0.0, 1.0, 20.0, 800.0], dtype=torch.float64, requires_grad=True)
    y = tr.mish(x)
    torch.testing.assert_close(y, torch.nn.functional.mish(x.detach()), **EXACT)
    assert float(y[4].detach()) == pytest.approx(math.tanh(math.log(1 + math.e)), rel=1e-14)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(slope).all()
    assert float(slope[3]) == pytest.approx(math.tanh(math.log(2.0)))  # the other term has the factor x = 0
    assert float(slope[-1]) == 1.0 and abs(float(slope[0])) < 1e-300


def test_sinusoidal_embedding_by_hand() -> None:
    rows = tr.sinusoidal_embedding(torch.tensor([0, 3]), 16)
    assert rows.shape == (2, 16)
    assert rows[0].tolist() == [0.0] * 8 + [1.0] * 8
    assert float(rows[1, 0]) == math.sin(3.0) and float(rows[1, 8]) == math.cos(3.0)
    # the slowest frequency is 1/10000, because the exponent divides by n - 1
    assert float(rows[1, 7]) == pytest.approx(math.sin(3e-4), rel=1e-12)


@pytest.mark.parametrize("num_hidden", [2, 3, 4])
def test_denoiser_equals_torch_modules(num_hidden: int) -> None:
    params = make_denoiser(1, num_hidden)
    x, s, t = normal(2, B, A), normal(3, B, S), torch.tensor([0, 1, 4, 2, 0])
    nn = torch.nn
    time_mlp = nn.Sequential(nn.Identity(), nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16)).double()
    layers: list[nn.Module] = []
    for i in range(num_hidden):
        layers += [nn.Linear(A + 16 + S if i == 0 else H, H), nn.Mish()]
    mid_layer = nn.Sequential(*layers).double()
    final_layer = nn.Linear(H, A).double()
    module = nn.ModuleDict({"time_mlp": time_mlp, "mid_layer": mid_layer, "final_layer": final_layer})
    module.load_state_dict(params)  # strict: the names are the published ones
    h = torch.cat([x, time_mlp(tr.sinusoidal_embedding(t, 16)), s], dim=1)
    torch.testing.assert_close(tr.denoiser(params, x, t, s), final_layer(mid_layer(h)), **EXACT)


def test_denoiser_rows_are_independent() -> None:
    params, x, s, t = make_denoiser(1), normal(2, B, A), normal(3, B, S), torch.tensor([0, 1, 4, 2, 0])
    whole = tr.denoiser(params, x, t, s)
    for b in range(B):
        one = tr.denoiser(params, x[b : b + 1], t[b : b + 1], s[b : b + 1])
        torch.testing.assert_close(whole[b : b + 1], one, **EXACT)


def test_critic_heads_are_separate() -> None:
    params = make_critic(1)
    s, a = normal(2, B, S), normal(3, B, A)
    q1, q2 = tr.critic(params, s, a)
    assert q1.shape == q2.shape == (B,)
    params["q2_model.6.bias"] = params["q2_model.6.bias"] + 1.5
    q1_again, q2_again = tr.critic(params, s, a)
    torch.testing.assert_close(q1_again, q1, **EXACT)
    torch.testing.assert_close(q2_again, q2 + 1.5, **EXACT)


def test_one_step_chains_return_the_clamped_x0() -> None:
    schedule = tr.make_schedule("vp", 1)
    abar = math.exp(-5.05)
    x = torch.tensor([[0.05, -0.02], [3.0, -3.0]], dtype=torch.float64)
    eps = 0.01
    by_hand = [[(v - math.sqrt(1 - abar) * eps) / math.sqrt(abar) for v in row] for row in x.tolist()]
    expected = torch.tensor(by_hand, dtype=torch.float64).clamp(-1, 1)
    assert expected[1].tolist() == [1.0, -1.0] and expected[0].abs().max() < 1  # both cases are met
    params, s, noise = constant_denoiser(eps), normal(0, 2, S), x[None]
    for actions in (
        tr.ddpm_chain(params, schedule, s, noise, 1.0),
        tr.ddim_chain(params, schedule, s, noise, 1.0, [0]),
        tr.dpmpp_2m_chain(params, schedule, s, noise, 1.0, [0]),
    ):
        torch.testing.assert_close(actions, expected, rtol=0, atol=1e-12)


def test_ddpm_two_steps_by_hand() -> None:
    alpha1, alpha2 = math.exp(-0.05 - 0.5 * 9.9 / 4), math.exp(-0.05 - 1.5 * 9.9 / 4)
    abar1, abar2 = alpha1, alpha1 * alpha2
    eps, x, z = 0.2, 0.3, -0.7
    x0 = (x - math.sqrt(1 - abar2) * eps) / math.sqrt(abar2)
    assert abs(x0) < 2.0
    mean = math.sqrt(abar1) * (1 - alpha2) / (1 - abar2) * x0 + math.sqrt(alpha2) * (1 - abar1) / (1 - abar2) * x
    x = mean + math.sqrt((1 - abar1) / (1 - abar2) * (1 - alpha2)) * z
    x0 = (x - math.sqrt(1 - abar1) * eps) / math.sqrt(abar1)
    expected = min(max(x0, -2.0), 2.0)
    noise = torch.tensor([0.3, -0.7], dtype=torch.float64)[:, None, None].expand(2, 1, A)
    actions = tr.ddpm_chain(constant_denoiser(eps), tr.make_schedule("vp", 2), torch.zeros(1, S).double(), noise, 2.0)
    assert actions[0].tolist() == pytest.approx([expected] * A, rel=1e-12)


@pytest.mark.parametrize("name", ["vp", "linear", "cosine"])
@pytest.mark.parametrize("T", [1, 2, 5, 15])
@pytest.mark.parametrize("max_action", [1.0, 50.0])  # with and without clamping
def test_ddpm_equals_the_tabled_posterior(name: str, T: int, max_action: float) -> None:
    # the chain composes its coefficients from abar alone; the schedule's buffers must tell the same story
    schedule, params, s, noise = (
        tr.make_schedule(name, T),
        make_denoiser(1),
        normal(2, B, S),
        normal(3, T, B, A),
    )
    x = noise[0]
    for t in range(T - 1, -1, -1):
        eps = tr.denoiser(params, x, torch.full((B,), t), s)
        x0 = schedule.sqrt_recip_alphas_cumprod[t] * x - schedule.sqrt_recipm1_alphas_cumprod[t] * eps
        x = schedule.posterior_mean_coef1[t] * x0.clamp(-max_action, max_action) + schedule.posterior_mean_coef2[t] * x
        if t > 0:
            x = x + torch.exp(0.5 * schedule.posterior_log_variance_clipped[t]) * noise[T - t]
    # 1 - abar of the linear schedule costs four digits
    torch.testing.assert_close(
        tr.ddpm_chain(params, schedule, s, noise, max_action),
        x.clamp(-max_action, max_action),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", ["vp", "linear", "cosine"])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (5, 1), (5, 2), (5, 3), (5, 5), (50, 7)])
@pytest.mark.parametrize("max_action", [1.0, 50.0])  # with and without clamping
def test_ddim_with_full_stochasticity_is_respaced_ddpm(name: str, T: int, K: int, max_action: float) -> None:
    schedule, params, s, noise = (
        tr.make_schedule(name, T),
        make_denoiser(1),
        normal(2, B, S),
        normal(3, K, B, A),
    )
    steps = tr.spaced_timesteps(T, K)
    ddpm = tr.ddpm_chain(params, schedule, s, noise, max_action, steps)
    torch.testing.assert_close(
        tr.ddim_chain(params, schedule, s, noise, max_action, steps, 1.0), ddpm, rtol=0, atol=1e-10
    )


def test_deterministic_samplers_read_only_the_first_noise() -> None:
    schedule, params, s = tr.make_schedule("vp", 5), make_denoiser(1), normal(2, B, S)
    steps = tr.spaced_timesteps(5, 4)
    first, second = normal(3, 4, B, A), normal(4, 4, B, A)
    second[0] = first[0]
    for chain in (tr.ddim_chain, tr.dpmpp_2m_chain):
        a, b = (chain(params, schedule, s, noise, 1.0, steps) for noise in (first, second))
        assert torch.equal(a, b)
    a, b = (tr.ddim_chain(params, schedule, s, noise, 1.0, steps, 0.5) for noise in (first, second))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("max_action", [1.0, 50.0])  # with and without clamping
def test_first_order_dpmpp_is_ddim(K: int, max_action: float) -> None:
    # with at most one step before the last, no multistep correction is made
    schedule, params, s, noise = (
        tr.make_schedule("vp", 5),
        make_denoiser(1),
        normal(2, B, S),
        normal(3, K, B, A),
    )
    steps = tr.spaced_timesteps(5, K)
    ddim = tr.ddim_chain(params, schedule, s, noise, max_action, steps)
    torch.testing.assert_close(tr.dpmpp_2m_chain(params, schedule, s, noise, max_action, steps), ddim, **EXACT)


@pytest.mark.parametrize("max_action", [1.0, 50.0])  # with and without clamping
def test_dpmpp_three_steps_by_hand(max_action: float) -> None:
    schedule, params, s, noise = (
        tr.make_schedule("vp", 5),
        make_denoiser(1),
        normal(2, B, S),
        normal(3, 3, B, A),
    )
    a4, a2, a0 = (math.exp(-0.02 * n - 0.198 * n**2) for n in (5, 3, 1))  # abar: the odd numbers sum to n^2
    lam4, lam2, lam0 = (0.5 * math.log(abar / (1 - abar)) for abar in (a4, a2, a0))
    x0_first = tr.predict_x0(params, schedule, noise[0], 4, s, max_action)
    # the first step is DDIM's: keep x0 and the eps that goes with it
    eps = (noise[0] - math.sqrt(a4) * x0_first) / math.sqrt(1 - a4)
    x = math.sqrt(a2) * x0_first + math.sqrt(1 - a2) * eps
    x0_second = tr.predict_x0(params, schedule, x, 2, s, max_action)
    # the second extrapolates x0 half a step ahead along lambda, then does the same
    D = x0_second + 0.5 * (lam0 - lam2) / (lam2 - lam4) * (x0_second - x0_first)
    eps = (x - math.sqrt(a2) * D) / math.sqrt(1 - a2)
    x = math.sqrt(a0) * D + math.sqrt(1 - a0) * eps
    expected = tr.predict_x0(params, schedule, x, 0, s, max_action)
    torch.testing.assert_close(tr.dpmpp_2m_chain(params, schedule, s, noise, max_action, [4, 2, 0]), expected, **EXACT)


def test_samplers_refuse_bad_stochasticity() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        tr.ddim_chain(constant_denoiser(0), tr.make_schedule("vp", 1), normal(0, 1, S), normal(0, 1, 1, A), 1, [0], 1.1)


def test_clamp_stops_the_gradient() -> None:
    # a constant, huge eps puts every x0 at a bound: nothing of the chain is differentiable any more
    leaves = tr.with_gradient(constant_denoiser(1e3))
    actions = tr.ddpm_chain(leaves, tr.make_schedule("vp", 5), normal(2, B, S), normal(3, 5, B, A), 1.0)
    assert torch.all(actions == -1.0)
    assert all(torch.all(grad == 0) for grad in tr.gradients(actions.sum(), leaves).values())


@pytest.mark.parametrize("max_action", [50.0, 0.5])
def test_chain_gradients_by_finite_differences(max_action: float) -> None:
    schedule, s, noise = tr.make_schedule("vp", 3), normal(2, B, S), normal(3, 3, B, A)
    steps = tr.spaced_timesteps(3, 3)
    weight = normal(4, B, A)
    for chain in (
        lambda p: tr.ddpm_chain(p, schedule, s, noise, max_action),
        lambda p: tr.ddim_chain(p, schedule, s, noise, max_action, steps, 0.5),
        lambda p: tr.dpmpp_2m_chain(p, schedule, s, noise, max_action, steps),
    ):
        assert_gradients(lambda p, chain=chain: (chain(p) * weight).sum(), make_denoiser(1))


def test_bc_loss_by_hand() -> None:
    schedule = tr.make_schedule("vp", 5)
    s, a, t = normal(2, B, S), normal(3, B, A), torch.tensor([0, 1, 2, 3, 4])
    noise = normal(4, B, A)
    expected = float(((0.25 - noise) ** 2).mean())  # this denoiser always answers 0.25
    assert float(tr.bc_loss(constant_denoiser(0.25), schedule, s, a, t, noise)) == pytest.approx(expected, rel=1e-13)
    noisy = tr.q_sample(schedule, a, t, noise)
    abar = math.exp(-0.02 * 3 - 0.198 * 9)
    assert float(noisy[2, 1]) == pytest.approx(
        math.sqrt(abar) * float(a[2, 1]) + math.sqrt(1 - abar) * float(noise[2, 1])
    )


def test_loss_gradients_by_finite_differences() -> None:
    schedule, batch, randomness = tr.make_schedule("vp", 3), make_batch(5), make_randomness(9, 3)
    critic_params = make_critic(2)

    def bc(params: dict[str, Tensor]) -> Tensor:
        return tr.bc_loss(
            params, schedule, batch["states"], batch["actions"], randomness["bc_t"], randomness["bc_noise"]
        )

    assert_gradients(bc, make_denoiser(1))
    y = normal(6, B)
    assert_gradients(lambda p: tr.critic_loss(p, batch["states"], batch["actions"], y), critic_params)

    # the divisor is a constant for the gradient, so differences are taken with a fixed one
    def chain(params: dict[str, Tensor]) -> Tensor:
        return tr.ddpm_chain(params, schedule, batch["states"], randomness["actor_noise"], 50.0)

    params = make_denoiser(1)
    _, q2 = tr.critic(critic_params, batch["states"], chain(params))
    divisor = float(q2.abs().mean())

    def fixed_divisor(params: dict[str, Tensor]) -> Tensor:
        return -tr.critic(critic_params, batch["states"], chain(params))[0].mean() / divisor

    assert_gradients(fixed_divisor, params)
    leaves = tr.with_gradient(params)
    ours = tr.gradients(tr.q_loss(critic_params, batch["states"], chain(leaves), True), leaves)
    theirs = tr.gradients(fixed_divisor(leaves), leaves)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], **EXACT)


def linear_critic() -> dict[str, Tensor]:
    """Q1 = a[0], Q2 = -2 a[0]: one layer each, computable in the head."""
    params = {}
    for prefix, slope in (("q1_model", 1.0), ("q2_model", -2.0)):
        params[f"{prefix}.0.weight"] = torch.zeros(1, S + A, dtype=torch.float64)
        params[f"{prefix}.0.weight"][0, S] = slope
        params[f"{prefix}.0.bias"] = torch.zeros(1, dtype=torch.float64)
    return params


def test_q_loss_by_hand() -> None:
    s = torch.zeros(2, S, dtype=torch.float64)
    a = torch.tensor([[0.5, 9.0], [-0.1, 9.0]], dtype=torch.float64)
    # Q1 = 0.5, -0.1 (mean 0.2, mean size 0.3); Q2 = -1.0, 0.2 (mean -0.4, mean size 0.6)
    assert float(tr.q_loss(linear_critic(), s, a, True)) == pytest.approx(-0.2 / 0.6)
    assert float(tr.q_loss(linear_critic(), s, a, False)) == pytest.approx(0.4 / 0.3)


def test_target_q_by_hand() -> None:
    # T = 1 and eps = 0: the action is clamp(x_T / sqrt(abar)); choose x_T to land on wanted actions
    schedule = tr.make_schedule("vp", 1)
    root = math.sqrt(float(schedule.alphas_cumprod[0]))
    batch = {
        "rewards": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "masks": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "next_states": torch.zeros(2, S, dtype=torch.float64),
    }
    wanted = torch.tensor([[-0.3, 0.1, 0.4], [0.2, 0.2, 0.2]], dtype=torch.float64)  # [B, N]: first action coordinate
    noise = (root * wanted)[None, :, :, None].expand(1, 2, 3, A)
    args = (constant_denoiser(0.0), linear_critic(), schedule, batch)
    y = tr.target_q(*args, noise[:, :, 2], 0.5, 1.0, False)
    # a = 0.4: Q1 = 0.4, Q2 = -0.8; the terminated row keeps its reward alone
    assert y.tolist() == pytest.approx([1.0 + 0.5 * -0.8, 2.0])
    y = tr.target_q(*args, noise, 0.5, 1.0, True)
    # maxima first: Q1 0.4 (at a = 0.4), Q2 0.6 (at a = -0.3); the best minimum of one action would be -0.2
    assert y.tolist() == pytest.approx([1.0 + 0.5 * 0.4, 2.0])


def test_equal_backup_candidates_change_nothing() -> None:
    batch, noise = make_batch(3), normal(4, 5, B, A)
    args = (make_denoiser(1), make_critic(2), tr.make_schedule("vp", 5), batch)
    plain = tr.target_q(*args, noise, 0.99, 1.0, False)
    repeated = tr.target_q(*args, noise[:, :, None].expand(5, B, 10, A), 0.99, 1.0, True)
    torch.testing.assert_close(repeated, plain, **EXACT)


def test_acting_probabilities_by_hand() -> None:
    candidates = torch.tensor([[[0.5, 0.0], [-0.5, 0.0]]], dtype=torch.float64)  # min Q: -1.0 and -0.5
    p = tr.acting_probabilities(linear_critic(), torch.zeros(1, S, dtype=torch.float64), candidates)
    assert p[0].tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))])


def test_adam_first_step_is_the_rate_times_the_sign() -> None:
    grad = torch.tensor([3.0, -0.2, 1e-3, 0.0], dtype=torch.float64)
    zero = {"w": torch.zeros(4, dtype=torch.float64)}
    new, m, v = tr.adam(zero, zero, zero, {"w": grad}, 1, 0.01)
    assert new["w"].tolist() == pytest.approx([-0.01, 0.01, -0.01, 0.0], rel=2e-5)
    # bias correction makes m_hat = g and v_hat = g^2, so only epsilon keeps it from the sign
    assert float(new["w"][2]) == pytest.approx(-0.01 * 1e-3 / (1e-3 + 1e-8), rel=1e-12)
    assert float(m["w"][0]) == pytest.approx(0.3) and float(v["w"][0]) == pytest.approx(0.009)


def test_adam_equals_torch() -> None:
    params = {"w": normal(1, 4)}
    m = v = {"w": torch.zeros(4, dtype=torch.float64)}
    weight = params["w"].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for n in range(1, 8):
        grad = normal(n + 10, 4)
        params, m, v = tr.adam(params, m, v, {"w": grad}, n, 0.02)
        weight.grad = grad
        optimizer.step()
        torch.testing.assert_close(params["w"], weight.detach(), **EXACT)


def test_clipping() -> None:
    grads = {"a": torch.tensor([3.0], dtype=torch.float64), "b": torch.tensor([[4.0]], dtype=torch.float64)}
    assert tr.total_norm(grads) == 5.0
    assert float(tr.clipped(grads, 1.0)["a"]) == pytest.approx(3 / (5 + 1e-6), rel=1e-14)
    assert float(tr.clipped(grads, 5.1)["a"]) == 3.0
    assert float(tr.clipped(grads, 0.0)["b"]) == 4.0 and float(tr.clipped(grads, -1.0)["b"]) == 4.0
    leaves = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    leaves[0].grad, leaves[1].grad = grads["a"].clone(), grads["b"].reshape(1).clone()
    torch.nn.utils.clip_grad_norm_(leaves, 0.7)
    torch.testing.assert_close(leaves[0].grad, tr.clipped(grads, 0.7)["a"], **EXACT)


@pytest.mark.parametrize("step", [0, 5, 995, 999, 1000, 1001, 1004, 1005])
def test_ema_cadence_by_hand(step: int) -> None:
    # lr = 0 holds the actor still, so the EMA's move alone shows: 0.995 * 2 + 0.005 * 3 = 2.005
    state = tr.initial_state(make_denoiser(1), None)
    for key in state["actor"]:
        state["actor"][key].fill_(3.0 if key == "final_layer.bias" else 0.0)
        state["ema_actor"][key].fill_(2.0 if key == "final_layer.bias" else 0.0)
    state["step"] = step
    new = tr.update_bc(state, make_batch(1), make_randomness(2, 5), tr.Hyper(lr=0.0))
    expected = 2.005 if step in (1000, 1005) else 2.0
    assert new["ema_actor"]["final_layer.bias"].tolist() == pytest.approx([expected] * A, rel=1e-14)
    assert new["step"] == step + 1


def test_cosine_lr() -> None:
    assert tr.cosine_lr(3e-4, 0, 1000) == 3e-4
    assert tr.cosine_lr(3e-4, 500, 1000) == pytest.approx(1.5e-4)
    assert tr.cosine_lr(3e-4, 1000, 1000) == pytest.approx(0.0, abs=1e-18)
    # as the published code runs it: 40 scheduler steps of 2000
    assert 1 - tr.cosine_lr(1.0, 40, 2000) == pytest.approx(0.001, rel=0.02)


def test_update_order() -> None:
    hyper = tr.Hyper(T=3, tau=0.1, eta=0.5, grad_norm=0.05, critic_lr=0.03, lr=0.01)
    state = tr.initial_state(make_denoiser(1), make_critic(2))
    for key in state["ema_actor"]:
        state["ema_actor"][key] = state["ema_actor"][key] + 0.1  # so that the target's actor is told apart
    before = {name: {key: value.clone() for key, value in state[name].items()} for name in ("actor", "critic")}
    batch, randomness = make_batch(5), make_randomness(9, 3)
    new = tr.update(state, batch, randomness, hyper)

    schedule = tr.make_schedule("vp", 3)
    next_actions = tr.ddpm_chain(state["ema_actor"], schedule, batch["next_states"], randomness["target_noise"], 1.0)
    q1, q2 = tr.critic(state["critic_target"], batch["next_states"], next_actions)
    y = batch["rewards"] + 0.99 * batch["masks"] * torch.minimum(q1, q2)
    torch.testing.assert_close(new["metrics"]["target_q"], y, **EXACT)

    # the actor's loss is taken on the old actor's actions, judged by the new critic
    actions = tr.ddpm_chain(state["actor"], schedule, batch["states"], randomness["actor_noise"], 1.0)
    assert new["metrics"]["q_loss"] == pytest.approx(float(tr.q_loss(new["critic"], batch["states"], actions, True)))
    assert new["metrics"]["q_loss"] != pytest.approx(float(tr.q_loss(state["critic"], batch["states"], actions, True)))
    assert new["metrics"]["actor_loss"] == pytest.approx(new["metrics"]["bc_loss"] + 0.5 * new["metrics"]["q_loss"])

    # both gradients were over the limit; the first moments show what Adam was handed
    assert new["metrics"]["critic_grad_norm"] > 0.05 and new["metrics"]["actor_grad_norm"] > 0.05
    for name in ("actor", "critic"):
        assert tr.total_norm(new[f"{name}_m"]) == pytest.approx(0.1 * 0.05, rel=1e-4)
        assert all(torch.equal(value, before[name][key]) for key, value in state[name].items())
        assert not any(value.requires_grad for value in new[name].values())
    for key, value in new["critic_target"].items():
        torch.testing.assert_close(value, 0.9 * before["critic"][key] + 0.1 * new["critic"][key], **EXACT)
    assert all(torch.equal(value, state["ema_actor"][key]) for key, value in new["ema_actor"].items())
    assert state["step"] == 0 and new["step"] == 1


def test_eta_zero_is_diffusion_bc() -> None:
    hyper = tr.Hyper(T=3, eta=0.0, ema_start=0)
    ql, bc = tr.initial_state(make_denoiser(1), make_critic(2)), tr.initial_state(make_denoiser(1), None)
    for i in range(3):
        ql = tr.update(ql, make_batch(i), make_randomness(i, 3), hyper)
        bc = tr.update_bc(bc, make_batch(i), make_randomness(i, 3), hyper)
    for part in ("actor", "ema_actor"):
        for key in bc[part]:
            torch.testing.assert_close(ql[part][key], bc[part][key], **EXACT)


def load_stand_in() -> ModuleType:
    path = ROOT / "bench" / "published.py"
    spec = importlib.util.spec_from_file_location("published_stand_in", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("T", [1, 5])
def test_stand_in_samples_the_same(T: int) -> None:
    torch.manual_seed(0)
    actor = load_stand_in().PublishedAgent(S, A, hidden_dim=16, T=T).actor
    s, noise = normal(1, B, S), normal(2, T, B, A)
    ours = tr.ddpm_chain(tr.denoiser_params(actor.state_dict()), tr.make_schedule("vp", T), s, noise, 1.0)
    with torch.no_grad():
        theirs = actor.sample(s.float(), noise.float())
    torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=2e-5)  # float32, amplified by 1/sqrt(abar) = 12.5


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_stand_in_updates_the_same(max_q_backup: bool) -> None:
    T = 5
    torch.manual_seed(0)
    agent = load_stand_in().PublishedAgent(S, A, hidden_dim=16, T=T, grad_norm=0.5, max_q_backup=max_q_backup)
    state = tr.initial_state(tr.denoiser_params(agent.actor.state_dict()), agent.critic.state_dict())
    state["step"] = agent.step = 1000  # so that the EMA moves too; Adam's count must then follow
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(1000.0), **zeros}
    hyper = tr.Hyper(T=T, grad_norm=0.5, max_q_backup=max_q_backup)
    for i in range(3):
        batch = make_batch(10 * i)
        torch.manual_seed(i)
        np.random.seed(i)
        # the stand-in's draws in its order: target chain, timesteps, noise, actor chain; a chain draws T+1
        rows = B * 10 if max_q_backup else B
        target_noise = torch.stack([torch.randn(rows, A) for _ in range(T + 1)])[:T].double()
        randomness = {
            "target_noise": target_noise.reshape(T, B, 10, A) if max_q_backup else target_noise,
            "bc_t": torch.randint(0, T, (B,)),
            "bc_noise": torch.randn(B, A).double(),
            "actor_noise": torch.stack([torch.randn(B, A) for _ in range(T + 1)])[:T].double(),
            "coin": bool(np.random.uniform() > 0.5),
        }
        torch.manual_seed(i)
        np.random.seed(i)
        losses = agent.update(*(value.float() for value in batch.values()))
        state = tr.update(state, batch, randomness, hyper)
        assert losses["critic/loss"] == pytest.approx(state["metrics"]["critic_loss"], rel=1e-4)
        assert losses["actor/bc_loss"] == pytest.approx(state["metrics"]["bc_loss"], rel=1e-4)
        assert losses["actor/q_loss"] == pytest.approx(state["metrics"]["q_loss"], rel=1e-3, abs=1e-5)
    modules = {"actor": agent.actor.model, "ema_actor": agent.ema_actor.model}
    modules |= {"critic": agent.critic, "critic_target": agent.critic_target}
    for part, module in modules.items():
        for key, value in module.state_dict().items():
            label = f"{part} {key}"
            # float32 rounding (measured 1e-7); actor and critic moved by 3e-3, target by 3e-5, EMA by 4e-6
            torch.testing.assert_close(
                value.double(),
                state[part][key],
                rtol=0,
                atol=1e-6,
                msg=lambda text, label=label: f"{label}: {text}",
            )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tr.philox4x32(counter, key) == expected


def test_uniform_stays_inside_and_fits_float32() -> None:
    assert tr.uniform(0) == 2.0**-24 and tr.uniform(0xFFFFFFFF) == 1 - 2.0**-24
    for word in (0, 511, 512, 0x6627E8D5, 0xFFFFFFFF):
        assert float(np.float32(tr.uniform(word))) == tr.uniform(word)


def test_philox_normal_layout_by_hand() -> None:
    seed = (7 << 32) | 3
    noise = tr.philox_normal(seed, 2, 3, 6)
    w = tr.philox4x32((2, 1, 1, 0), (3, 7))  # k = 1, row = 2, dimensions 4 and 5
    u0, u1 = ((w[0] >> 9) + 0.5) / 2**23, ((w[1] >> 9) + 0.5) / 2**23
    radius = math.sqrt(-2 * math.log(u0))
    assert float(noise[1, 2, 4]) == pytest.approx(radius * math.cos(2 * math.pi * u1), rel=1e-14)
    assert float(noise[1, 2, 5]) == pytest.approx(radius * math.sin(2 * math.pi * u1), rel=1e-14)
    w = tr.philox4x32((2, 1, 0, 0), (3, 7))  # dimensions 2 and 3 take the second pair of words
    u2, u3 = ((w[2] >> 9) + 0.5) / 2**23, ((w[3] >> 9) + 0.5) / 2**23
    assert float(noise[1, 2, 2]) == pytest.approx(math.sqrt(-2 * math.log(u2)) * math.cos(2 * math.pi * u3), rel=1e-14)


def test_philox_normal_depends_on_place_alone() -> None:
    noise = tr.philox_normal(11, 3, 4, 7)
    assert torch.equal(tr.philox_normal(11, 2, 2, 5), noise[:2, :2, :5])
    assert not torch.equal(tr.philox_normal(11 + (1 << 32), 3, 4, 7), noise)
    assert len(set(noise.flatten().tolist())) == noise.numel()


def test_philox_normal_moments() -> None:
    noise = tr.philox_normal(5, 5, 200, 4).flatten()
    # 4,000 draws: mean within 5 / sqrt(4000), variance within 5 sqrt(2 / 4000),
    # fourth moment within 5 sqrt(96 / 4000)
    assert abs(float(noise.mean())) < 0.08
    assert float(noise.var()) == pytest.approx(1.0, abs=0.12)
    assert float((noise**4).mean()) == pytest.approx(3.0, abs=0.8)
