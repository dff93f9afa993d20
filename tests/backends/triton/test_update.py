"""What an update has beside chains and critics, in Triton's interpreter: losses and a step of Adam, against torch."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from support.cases import Tolerance, assert_close

from dql.kernels import triton as kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from support.triton_tiles import launches

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
FLOAT32 = Tolerance(1e-5, 1e-7, "float32; sums over a batch whose terms cancel, measured 2e-6")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("B", "N"), [(1, 1), (37, 3), (1100, 1), (256, 10)])
def test_critic_loss(B, N, monkeypatch):
    q_target, rewards, q, masks = (
        drawn(2, B * N),
        drawn(B, seed=1),
        drawn(2, B, seed=2),
        (drawn(B, seed=3) > -1).float(),
    )
    seen = launches(monkeypatch)
    d_q, metrics = kernels.critic_loss(q_target, rewards, masks, q, 0.97, N)
    assert [(kernel.name, grid) for kernel, grid in seen] == [("critic_loss", (1, 1, 1))]
    of = q.double().requires_grad_(True)
    best = q_target.double().view(2, B, N).amax(dim=2).amin(dim=0)
    y = rewards.double() + masks.double() * 0.97 * best
    loss = F.mse_loss(of[0], y) + F.mse_loss(of[1], y)
    assert_close(d_q, torch.autograd.grad(loss, of)[0], FLOAT32, what="d_q")
    assert_close(metrics, torch.stack([loss, of.mean(), y.mean()]), FLOAT32, what="metrics")
    again = kernels.critic_loss(q_target, rewards, masks, q, 0.97, N)
    assert torch.equal(again[0], d_q) and torch.equal(again[1], metrics)


def test_a_q_that_is_nan_is_not_lost():
    """In a maximum or minimum, which elsewhere take the number."""
    for i, n in ((0, 0), (0, 2), (1, 1)):
        q_target = drawn(2, 12)
        q_target[i, 3 + n] = torch.nan
        d_q, metrics = kernels.critic_loss(q_target, drawn(4), torch.ones(4), drawn(2, 4), 0.9, 3)
        assert torch.equal(d_q.isnan(), torch.tensor([[False, True, False, False]] * 2))
        assert metrics.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("maximised", [1, 2])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("B", [1, 37, 1100])
def test_q_loss(B, in_memory, maximised, monkeypatch):
    q = drawn(2, B, seed=B) + 0.5
    given = torch.tensor([2.0 - maximised, maximised - 1.0]) if in_memory else maximised
    seen = launches(monkeypatch)
    d_q, loss = kernels.q_loss(q, given, 0.7)
    assert [(kernel.name, grid) for kernel, grid in seen] == [("q_loss", (1, 1, 1))]
    of = q.double().requires_grad_(True)
    value, other = (of[0], of[1]) if maximised == 1 else (of[1], of[0])
    wanted = -value.mean() / other.detach().abs().mean()
    assert_close(d_q, torch.autograd.grad(0.7 * wanted, of)[0], FLOAT32, what="d_q")
    assert_close(loss, wanted[None], FLOAT32, what="loss")


class Step:
    """Parameters and moments, and torch's Adam on the same in float64."""

    def __init__(self, P: int, lr: float) -> None:
        self.flat, self.average = drawn(P), drawn(P, seed=1)
        self.exp_avg, self.exp_avg_sq, self.step = torch.zeros(P), torch.zeros(P), torch.zeros(())
        self.lr, self.wanted, self.wanted_average = lr, self.flat.double().requires_grad_(True), self.average.double()
        self.adam = torch.optim.Adam([self.wanted], lr=lr)

    def take(self, gradient: Tensor, max_norm: float, lr_scale: float, weight: float | None, in_memory: bool) -> Tensor:
        """A step of both; gives the norm."""

        def told(number: float) -> float | Tensor:
            return torch.tensor(number) if in_memory else number

        before = gradient.clone()
        average = None if weight is None else (self.average, told(weight))
        norm = kernels.adam(
            self.flat, gradient, self.exp_avg, self.exp_avg_sq, self.step, self.lr, told(lr_scale), max_norm, average
        )
        assert torch.equal(gradient, before), "the gradient was changed"
        self.wanted.grad = gradient.double()
        wanted_norm = self.wanted.grad.norm()
        if max_norm > 0:
            self.wanted.grad *= (max_norm / (wanted_norm + 1e-6)).clamp(max=1)
        self.adam.param_groups[0]["lr"] = self.lr * lr_scale
        self.adam.step()
        if weight:
            self.wanted_average.lerp_(self.wanted.detach(), weight)
        assert_close(norm, wanted_norm[None], FLOAT32, what="norm")
        return norm

    def check(self) -> None:
        state = self.adam.state[self.wanted]
        assert float(self.step) == float(state["step"])
        assert_close(
            self.flat, self.wanted, Tolerance(5e-7, 0.0, "float32; a few last bits of numbers up to 4"), what="x"
        )
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(getattr(self, name), state[name], FLOAT32, what=name)
        assert_close(self.average, self.wanted_average, FLOAT32, what="average")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("P", [16, 5008])
def test_adam(P, in_memory, monkeypatch):
    """Steps with gradients of small and large norms, clipped and not, with averages that move and do not."""
    both = Step(P, lr=3e-3)
    seen = launches(monkeypatch)
    for k, (size, max_norm, weight) in enumerate(
        [(9.0, 0.5, 0.005), (1e-3, 0.5, 0.0), (9.0, 0.0, 0.9), (1.0, 2.0, 1.0), (3.0, 0.5, None)]
    ):
        both.take(size * drawn(P, seed=k) / P**0.5, max_norm, 1.0 - 0.1 * k, weight, in_memory)
        both.check()
    assert [kernel.name for kernel, _ in seen] == ["squares", "adam"] * 5


def test_adam_after_many_steps():
    """Its corrections, which are nearly 1, and of the second moment's first steps tiny."""
    for steps in (1.0, 999.0, 1e6):
        both = Step(16, lr=1e-2)
        both.take(drawn(16), 0.0, 1.0, None, False)
        both.step.fill_(steps)
        both.adam.state[both.wanted]["step"].fill_(steps)
        both.take(drawn(16, seed=2), 0.0, 1.0, None, False)
        both.check()


def test_many_parts_and_the_same_bits():
    """More elements than 256 blocks of 1,024; twice from the same, the same bits."""
    P = 300_000
    gradient = drawn(P) / P**0.5
    found = []
    for _ in range(2):
        both = Step(P, lr=1e-3)
        norm = kernels.adam(
            both.flat, gradient, both.exp_avg, both.exp_avg_sq, both.step, 1e-3, 1.0, 0.5, (both.average, 0.005)
        )
        found.append((norm, both.flat, both.exp_avg, both.exp_avg_sq, both.average))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert_close(found[0][0], gradient.double().norm()[None], FLOAT32, what="norm")
    clipped = 0.5 * gradient.double() / gradient.double().norm()
    assert_close(found[0][2], 0.1 * clipped, FLOAT32, what="exp_avg")


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_average_that_does_not_move_stays_finite(in_memory):
    """0 times infinity is NaN: parameters that diverged reach it when it moves."""
    both = Step(16, lr=1e-3)
    both.flat.fill_(torch.inf)
    before = both.average.clone()
    for weight in (0.0, 0.5):
        told = torch.tensor(weight) if in_memory else weight
        kernels.adam(
            both.flat, drawn(16), both.exp_avg, both.exp_avg_sq, both.step, 1e-3, 1.0, 0.0, (both.average, told)
        )
        assert torch.equal(both.average, before) == (weight == 0.0)


def test_a_gradient_that_is_nan_is_seen():
    """By the norm, and where it is clipped by every parameter: as with torch."""
    for max_norm in (0.0, 0.5):
        both, gradient = Step(16, lr=1e-3), drawn(16)
        gradient[3] = torch.nan
        norm = kernels.adam(both.flat, gradient, both.exp_avg, both.exp_avg_sq, both.step, 1e-3, 1.0, max_norm)
        assert norm.isnan().all() and both.flat.isnan().sum() == (16 if max_norm else 1)


def test_numbers_in_memory_are_float32():
    both = Step(16, lr=1e-3)
    rest = (drawn(16), both.exp_avg, both.exp_avg_sq, both.step, 1e-3)
    with pytest.raises(ValueError, match="lr_scale must be 1 float32 numbers"):
        kernels.adam(both.flat, *rest, torch.tensor(1.0, dtype=torch.float64), 0.5)
    with pytest.raises(ValueError, match="weight must be 1 float32 numbers"):
        kernels.adam(both.flat, *rest, 1.0, 0.5, (both.average, torch.tensor(0.1, dtype=torch.float64)))
    with pytest.raises(ValueError, match="maximised must be 2 float32 numbers"):
        kernels.q_loss(drawn(2, 3), torch.tensor([1, 0]), 1.0)
