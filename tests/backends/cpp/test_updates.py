"""The native functions beside the chain: activations, losses and their gradients, Adam and averages, against torch."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.cases import TOLERANCES, Tolerance, assert_close
from support.networks import VARIANTS, needs_cpp

import dql
from dql import noise as noise_stream
from dql.backend.cpp import network
from dql.kernels.cpp import binding

Tensor = torch.Tensor

pytestmark = needs_cpp
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"mish": F.mish, "silu": F.silu, "relu": F.relu}
SIZES = [(17, 6, 64, 3, "mish"), (3, 1, 16, 2, "relu"), (33, 35, 50, 4, "silu"), (1, 64, 31, 2, "mish")]  # S, A, H, L


@pytest.fixture(params=VARIANTS)
def variant(request):
    with binding.forced(request.param):
        yield request.param


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(module: dql.TwinCritic | dql.networks.Denoiser) -> None:
    """Seeded, and wider than torch's default."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.25
            parameter.copy_(normal(*parameter.shape, seed=i) * scale)


def make_critic(size: tuple[int, int, int, int, str]) -> dql.TwinCritic:
    critic = dql.TwinCritic(*size)
    weights_of(critic)
    return critic


def exact(module: dql.networks.FlatModule) -> dql.networks.FlatModule:
    return copy.deepcopy(module).double()


def check_gradient(got: Tensor, module: dql.networks.FlatModule, loss: Tensor) -> None:
    """The flat gradient `got`, which was NaN, against autograd's of the float64 `module`, tensor by tensor."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    want = torch.autograd.grad(loss, parameters)
    views = module.layout.views(got)
    for name, gradient in zip(names, want, strict=True):
        assert_close(views[name], gradient, TOLERANCES["critic float32"], what=f"gradient of {name}", backend="cpp")
        views[name].fill_(math.nan)
    assert got.isnan().all()  # the gaps were not written to


# Activations


def sweep() -> Tensor:
    """Both signs over the whole range, densely where the functions bend, and what is no number."""
    magnitudes = torch.logspace(-44, 38, 4000, dtype=torch.float64).float()
    values = torch.cat([magnitudes, -magnitudes, torch.linspace(-110, 110, 20001), torch.tensor([0.0, -0.0])])
    return torch.cat([values, values.new_zeros(-len(values) % 16)])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind, variant):
    z = sweep()
    h, slope = binding.activate(kind, z)
    x = z.double().requires_grad_(True)
    want = ACTIVATIONS[kind](x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    error, slope_error = (h - want).abs().detach(), (slope - want_slope).abs()
    # 1e-37: what float32 holds of the tail, where the result underflows
    assert (error <= 5e-7 * want.abs().detach() + 1e-37).all(), f"worst at {float(z[error.argmax()])}"
    assert (slope_error <= 1e-6 * want_slope.abs().clamp(min=0.25) + 1e-37).all(), f"{float(z[slope_error.argmax()])}"
    tail = z < -20  # there the slope, too, is right relative to itself
    assert (slope_error[tail] <= 2e-6 * want_slope[tail].abs() + 1e-37).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_what_is_no_number(kind, variant):
    z = torch.tensor([math.nan, math.inf, -math.inf, -math.nan] * 4)
    h, slope = binding.activate(kind, z)
    assert h.isnan().tolist() == [True, False, False, True] * 4
    assert h[1] == math.inf
    assert h[2] == 0  # the limit; torch's Mish and SiLU give NaN
    assert (slope[1], slope[2]) == (1, 0)
    if kind != "relu":
        assert slope[0].isnan()


@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 17, 31, 33, 1000, 4097])
def test_all_finite(size, variant):
    values = normal(size + 3)[3:]  # not aligned
    assert binding.all_finite(values)
    assert binding.all_finite(torch.full((size,), 3e38))
    for at in {0, size // 2, size - 1} if size else set():
        for bad in (math.nan, math.inf, -math.inf):
            other = values.clone()
            other[at] = bad
            assert not binding.all_finite(other)


# The critics


@pytest.mark.parametrize("N", [1, 3, 10])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_q_values_and_targets(size, N, variant, threads):
    S, A = size[:2]
    critic, B, discount = make_critic(size), 37, 0.97
    states, actions, rewards = normal(B, S, seed=1), normal(B, N, A, seed=2), normal(B, seed=3)
    masks = (normal(B, seed=4) > 0).float()
    with torch.no_grad():
        want = exact(critic)(states.double(), actions.double())
    got = binding.q_values(network(critic), critic.buffer, states, actions.view(-1, A))
    for i in range(2):
        assert_close(got[i].view(B, N), want[i], TOLERANCES["critic float32"], what=f"Q_{i + 1}", backend="cpp")
    target, mean = binding.target_q(
        network(critic), critic.buffer, states, actions.view(-1, A), rewards, masks, discount
    )
    best = torch.minimum(want[0].amax(1), want[1].amax(1))
    want_target = rewards.double() + masks.double() * discount * best
    assert_close(target, want_target, TOLERANCES["critic float32"], what="target_q", backend="cpp")
    assert mean == pytest.approx(float(want_target.mean()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_of_the_critics_loss(size, variant, threads):
    S, A = size[:2]
    critic, B = make_critic(size), 37
    states, actions, target = normal(B, S, seed=1), normal(B, A, seed=2), normal(B, seed=3)
    d_flat = torch.full_like(critic.buffer, math.nan)
    loss, q = binding.critic_gradient(network(critic), critic.buffer, states, actions, target, d_flat)
    module = exact(critic)
    q1, q2 = module(states.double(), actions.double())
    want = F.mse_loss(q1, target.double()) + F.mse_loss(q2, target.double())
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert q == pytest.approx((q1.mean() + q2.mean()).item() / 2, rel=1e-5, abs=1e-6)
    check_gradient(d_flat, module, want)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_to_the_actions(size, which, variant, threads):
    S, A = size[:2]
    critic, B = make_critic(size), 37
    states, actions = normal(B, S, seed=1), normal(B, A, seed=2)
    got, q, other = binding.q_gradient(network(critic), critic.buffer, which, states, actions)
    module, a = exact(critic), actions.double().requires_grad_(True)
    values = module.q(which, states.double(), a)
    (want,) = torch.autograd.grad(values.sum(), a)
    assert_close(got, want, TOLERANCES["critic float32"], what="dQ/da", backend="cpp")
    assert q == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6)
    with torch.no_grad():
        others = module.q(3 - which, states.double(), a).abs().mean().item()
    assert other == pytest.approx(others, rel=1e-5, abs=1e-6)


# The noise-prediction loss


@pytest.mark.parametrize("predict_epsilon", [True, False])
@pytest.mark.parametrize("T", [1, 5, 50])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_of_the_bc_loss(size, T, predict_epsilon, variant, threads):
    S, A, H, L, activation = size
    B, t_seed, noise_seed = 37, 2**64 - 1, 12
    policy = dql.DiffusionPolicy(S, A, 1.0, H, L, T, activation=activation, predict_epsilon=predict_epsilon)
    weights_of(policy.denoiser)
    states, actions = normal(B, S, seed=1), normal(B, A, seed=2).clamp(-1, 1)
    embedding = policy.denoiser.time_mlp[0](torch.arange(T, dtype=torch.float32))  # [T, D]
    bar = torch.as_tensor(policy.schedule.alphas_cumprod)
    table = binding.Table(None, embedding, torch.stack([bar.sqrt(), (1 - bar).sqrt()], dim=1).float())
    denoiser = policy.denoiser
    d_flat = torch.full_like(denoiser.buffer, math.nan)
    loss = binding.bc_gradient(
        network(denoiser), denoiser.buffer, table, states, actions, t_seed, noise_seed, predict_epsilon, d_flat
    )
    module = exact(policy)
    t = noise_stream.integers(t_seed, T, B)
    eps = noise_stream.normal(noise_seed, 1, B, A, dtype=torch.float64)[0]
    want = module.bc_loss(states.double(), actions.double(), t, eps)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    check_gradient(d_flat, module.denoiser, want)


# The optimiser and the averages


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 16, 17, 4095, 10_000])
def test_adam(size, max_norm, variant):
    """Ten steps of torch.optim.Adam in float64, gradients clipped as the agents clip them."""
    flat = normal(size, seed=9)
    exp_avg, exp_avg_sq = torch.zeros(size), torch.zeros(size)
    parameter = flat.double().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    tolerance = Tolerance(2e-6, 0.0, "float32, ten steps; measured 3e-7")
    for step in range(1, 11):
        gradient = normal(size, seed=step) * 10.0 ** (step % 4 - 2)
        lr = 0.01 / step
        optimizer.param_groups[0]["lr"] = lr
        norm = torch.linalg.vector_norm(gradient.double())
        clipped = gradient.double() * (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm else gradient.double()
        parameter.grad = clipped
        optimizer.step()
        kept, versions = gradient.clone(), [flat._version, exp_avg._version, exp_avg_sq._version]
        got = binding.adam(flat, gradient, exp_avg, exp_avg_sq, lr, step, max_norm)
        assert got == pytest.approx(float(norm), rel=1e-6)
        assert torch.equal(gradient, kept)
        assert [flat._version, exp_avg._version, exp_avg_sq._version] == [v + 1 for v in versions]
    assert_close(flat, parameter, tolerance, what="parameters", backend="cpp")
    state = optimizer.state[parameter]
    assert_close(exp_avg, state["exp_avg"], tolerance, what="exp_avg", backend="cpp")
    assert_close(exp_avg_sq, state["exp_avg_sq"], tolerance, what="exp_avg_sq", backend="cpp")


def test_adam_of_gradients_that_are_no_numbers(variant):
    for bad in (math.nan, math.inf):
        flat, gradient = torch.zeros(40), torch.ones(40)
        gradient[7] = bad
        norm = binding.adam(flat, gradient, torch.zeros(40), torch.zeros(40), 0.1, 1, 1.0)
        assert norm == bad or math.isnan(norm)
        assert flat[7].isnan()  # it shows, as it would with torch


@pytest.mark.parametrize("size", [1, 15, 16, 1000])
@pytest.mark.parametrize("weight", [0.0, 0.005, 0.5, 1.0])
def test_lerp(size, weight, variant):
    target, source = normal(size, seed=1), normal(size, seed=2)
    want, version = torch.lerp(target, source, weight), target._version
    binding.lerp(target, source, weight)
    assert_close(target, want, Tolerance(2e-7, 1e-7, "one rounding more or less"), what="lerp", backend="cpp")
    assert target._version == version + 1


# Variants


def test_variants():
    found = binding.variants()
    assert list(found)[-1] == "generic"
    assert found["generic"] is None
    best = next(name for name, reason in found.items() if reason is None)
    assert binding.in_use() == best
    with binding.forced("generic"):
        assert binding.in_use() == "generic"
        assert not binding.has_bf16()
    with pytest.raises(KeyError), binding.forced("generic"):
        raise KeyError
    assert binding.in_use() == best
    with pytest.raises(ValueError, match=r"unknown variant 'avx9'; this build has: .*generic"), binding.forced("avx9"):
        pass
    for name, reason in found.items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"variant {name} cannot run: this CPU"), binding.forced(name):
                pass
    assert binding.in_use() == best


def test_the_ceiling_is_a_rate():
    with binding.forced("generic"):
        assert 1e8 < binding.fma_ceiling(0.01) < 1e13
        assert binding.fma_ceiling(0.01, bf16=True) == 0


# An agent's update, which is made of these


def batch_of(B: int, S: int, A: int) -> dql.Batch:
    return dql.Batch(
        normal(B, S, seed=1), normal(B, A, seed=2).clamp(-1, 1), normal(B, seed=3), normal(B, S, seed=4), torch.ones(B)
    )


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_a_batch_of_any_stride(max_q_backup):
    """Columns of one large table, as people keep transitions."""
    S, A, B = 11, 3, 32
    plain = batch_of(B, S, A)
    table = torch.cat([v.view(B, -1) for v in (plain.states, plain.actions, plain.rewards, plain.next_states)], dim=1)
    rewards, masks = table[:, S + A], torch.ones(B, 5)[:, 2]
    strided = dql.Batch(table[:, :S], table[:, S : S + A], rewards, table[:, S + A + 1 :], masks)
    config = dql.Config(hidden_dim=32, backend="cpp", max_q_backup=max_q_backup, backup_candidates=4)
    found = []
    for batch in (plain, strided):
        agent = dql.DiffusionQL(S, A, config)
        metrics = [agent.update(batch) for _ in range(3)][-1]
        found.append((metrics, agent.policy.denoiser.flat.detach(), agent.critic.flat.detach()))
    assert {k: float(v) for k, v in found[0][0].items()} == {k: float(v) for k, v in found[1][0].items()}
    for i in (1, 2):
        assert torch.equal(found[0][i], found[1][i])
