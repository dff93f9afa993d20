"""Losses of Q values and a step of Adam by the kernels of every backend for GPUs that has them, against torch in
float64; on a GPU where there is one, otherwise interpreted or emulated."""

import pytest
import torch
import torch.nn.functional as F
from support.cases import TOLERANCES, assert_close
from support.critic import DEVICE, poisoned

from dql.backend.registry import of_gpus, registry

Tensor = torch.Tensor
SUMS = TOLERANCES["sums"]


@pytest.fixture(params=of_gpus())
def ops(request, runs_here):
    """Those of each backend, on memory that torch fills with NaN."""
    found = registry()[runs_here(request.param)].ops
    with poisoned():
        yield found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Float64, of numbers that float32 holds."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to(DEVICE, torch.float32, copy=True) for tensor in tensors]


@pytest.mark.parametrize(("B", "N"), [(1, 1), (37, 1), (256, 1), (37, 10), (1000, 3), (1, 50)])
def test_critic_loss(ops, B, N):
    q_target, rewards, q = drawn(2, B * N), drawn(B, seed=1), drawn(2, B, seed=2).requires_grad_()
    masks = (drawn(B, seed=3) > 0).double()
    y = rewards + masks * 0.97 * q_target.view(2, B, N).amax(dim=2).amin(dim=0)
    loss = F.mse_loss(q[0], y) + F.mse_loss(q[1], y)
    loss.backward()
    d_q, metrics = ops.critic_loss(*on_device(q_target, rewards, masks, q), 0.97, N)
    assert_close(d_q, q.grad, SUMS, what="d_q", case=(B, N))
    for got, want, name in zip(metrics, (loss, q.mean(), y.mean()), ("loss", "q", "target"), strict=True):
        assert_close(got, want, SUMS, what=name, case=(B, N))


@pytest.mark.parametrize("where", [0, 1])
def test_a_target_that_is_no_number_is_seen(ops, where):
    """As torch.minimum and amax let it through, wherever it is among the candidates."""
    q_target = drawn(2, 5 * 3)
    q_target[where, 4] = torch.nan  # of state 1
    d_q, metrics = ops.critic_loss(*on_device(q_target, drawn(5), torch.ones(5), drawn(2, 5)), 0.9, 3)
    assert d_q.isnan().tolist() == [[False, True, False, False, False]] * 2
    assert metrics.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("maximised", [1, 2])
@pytest.mark.parametrize("B", [1, 37, 256, 1000])
def test_q_loss(ops, B, maximised):
    q = (drawn(2, B) + 0.5).requires_grad_()
    loss = -q[maximised - 1].mean() / q[2 - maximised].detach().abs().mean()
    (0.7 * loss).backward()
    in_memory = torch.zeros(4, device=DEVICE)
    in_memory[1 + maximised] = 1
    for which in (maximised, in_memory[2:]):
        d_q, got = ops.q_loss(*on_device(q), which, 0.7)
        assert_close(d_q, q.grad, SUMS, what="d_q", case=B)
        assert_close(got[0], loss, SUMS, what="loss", case=B)


ADAM = {
    "plain": {},
    "clipped": {"max_norm": 0.5},
    "not clipped": {"max_norm": 1e6},
    "average": {"average": 0.005},
    "average, clipped": {"average": 0.9, "max_norm": 0.3},
    "all of it": {"average": 1.0},
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", ADAM)
@pytest.mark.parametrize("P", [1, 1000, 70_001])
def test_adam(ops, P, kind, in_memory):
    """Steps of torch.optim.Adam in float64, of gradients of every size, the learning rate another in each."""
    if P > 1000 and (in_memory or kind not in ("plain", "average, clipped")):
        pytest.skip("more of the same")
    max_norm, weight = ADAM[kind].get("max_norm", 0.0), ADAM[kind].get("average")
    want = drawn(P).requires_grad_()
    average = drawn(P, seed=1)
    got, gots = on_device(want, average)
    moments = [torch.zeros(P, device=DEVICE) for _ in range(2)]
    count = torch.zeros((), device=DEVICE)
    adam = torch.optim.Adam([want], lr=1e-2)
    for step in range(4):
        scale = 1 / (1 + step)
        gradient = drawn(P, seed=2 + step) * 10 ** drawn(P, seed=9)
        norm = gradient.norm()
        clipped = gradient * min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else gradient
        want.grad, adam.param_groups[0]["lr"] = clipped, 1e-2 * scale
        adam.step()
        if weight is not None:
            average = average.lerp(want.detach(), weight)
        (handed,) = on_device(gradient)
        numbers = [torch.tensor(x, device=DEVICE) if in_memory and x is not None else x for x in (scale, weight)]
        moved = None if weight is None else (gots, numbers[1])
        found = ops.adam(got, handed, *moments, count, 1e-2, numbers[0], max_norm, moved)
        for name, tensor, other in (
            ("norm", found, norm.view(1)),
            ("gradient", handed, clipped),
            ("parameters", got, want),
            ("exp_avg", moments[0], adam.state[want]["exp_avg"]),
            ("exp_avg_sq", moments[1], adam.state[want]["exp_avg_sq"]),
            ("average", gots, average),
        ):
            assert_close(tensor, other, SUMS, what=name, case=f"{kind}, step {step}")
    assert count.item() == 4


def test_adam_repeats_to_the_bit(ops):
    P, found = 5000, []
    for _ in range(2):
        tensors = on_device(drawn(P), drawn(P, seed=1), torch.zeros(P), torch.zeros(P), torch.zeros(1))
        norm = ops.adam(*tensors, 1e-3, 1.0, 0.1)
        found.append(torch.cat([*tensors, norm]))
    assert torch.equal(*found)


@pytest.mark.parametrize("steps", [1, 10, 1000, 10**6])
def test_adam_after_many_steps(ops, steps):
    """The corrections for a beginning from zero, of any number of steps."""
    want = drawn(50).requires_grad_()
    adam = torch.optim.Adam([want], lr=1e-2)
    want.grad = drawn(50, seed=1)
    adam.step()
    state = adam.state[want]
    got = on_device(want, drawn(50, seed=1), state["exp_avg"], state["exp_avg_sq"], torch.tensor(float(steps)))
    state["step"].fill_(steps)
    adam.step()
    ops.adam(*got, 1e-2, 1.0, 0.0)
    assert_close(got[0], want, SUMS, what="parameters", case=steps)
    assert got[4] == steps + 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_weight_of_zero_leaves_the_average_alone(ops, in_memory):
    """0 times infinity is NaN."""
    tensors = on_device(drawn(9), drawn(9), torch.zeros(9), torch.zeros(9), torch.zeros(1))
    average = torch.arange(9.0, device=DEVICE)
    tensors[0][4] = torch.inf
    ops.adam(*tensors, 1e-2, 1.0, 0.0, (average, torch.zeros((), device=DEVICE) if in_memory else 0.0))
    assert torch.equal(average, torch.arange(9.0, device=DEVICE))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number(ops, bad):
    """Its norm says so; clipping leaves NaN of NaN, and of infinity what torch makes of it."""
    gradient = drawn(100).float()
    gradient[7] = bad
    tensors = on_device(torch.zeros(100), gradient, torch.zeros(100), torch.zeros(100), torch.zeros(1))
    norm = ops.adam(*tensors, 1e-2, 1.0, 1.0)
    want = gradient * (1.0 / (gradient.norm() + 1e-6)).clamp(max=1)
    assert torch.equal(norm.isnan().cpu(), gradient.norm().isnan().view(1)) and not norm.isfinite().any()
    assert torch.equal(tensors[1].cpu().isnan(), want.isnan())


def test_memory_that_kernels_would_leave(ops):
    """They get an address and a count: a tensor that holds less, or otherwise, is refused before."""
    wrong = pytest.raises(ValueError, match=r"must be .* float32 numbers in one piece")
    given = on_device(drawn(2, 6), drawn(3), drawn(3), drawn(2, 3))
    for i, tensor in enumerate(given):
        for other in (tensor[..., :-1].contiguous(), tensor.double(), torch.stack([tensor, tensor], -1)[..., 0]):
            with wrong:
                ops.critic_loss(*(other if i == j else given[j] for j in range(4)), 0.9, 2)
    with wrong:
        ops.q_loss(given[3].double(), 1, 1.0)
    with wrong:
        ops.q_loss(given[3], torch.zeros(3, device=DEVICE), 1.0)
    given = on_device(*(drawn(9) for _ in range(4)), torch.zeros(1))
    for i in range(5):
        with wrong:
            ops.adam(*(given[j].double() if i == j else given[j] for j in range(5)), 1e-3, 1.0, 0.0)
    for scale, average in (
        (torch.zeros(2, device=DEVICE), None),
        (1.0, (given[0][1:], 0.5)),
        (1.0, (given[0], given[1])),
    ):
        with wrong:
            ops.adam(*given, 1e-3, scale, 0.0, average)
