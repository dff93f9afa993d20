"""The backend "triton" as callers on a GPU meet it: torch.compile, CUDA graphs, streams, threads, GraphedSampler.

It skips without a GPU; see `test_triton_gpu`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import TOLERANCES, Tolerance, assert_close
from cpp_cases import A, make_critic
from gpu_cases import (
    PRECISIONS,
    SEED,
    gpu_policy,
    gpu_states,
    gradients,
    needs_gpu,
    poisoned,
    same_bits,
    sample,
)

import dql

pytestmark = needs_gpu

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned():
        yield


def test_inside_torch_compile():
    policy, states = gpu_policy(), gpu_states(37)

    def doubled(states: Tensor) -> Tensor:
        return dql.sample(states * 2, policy, backend="triton", seed=SEED) + 1

    compiled = torch.compile(doubled)
    results = []
    for run in (doubled, compiled):
        inputs = states.clone().requires_grad_()
        actions = run(inputs)
        results.append([actions.detach(), *torch.autograd.grad(actions.sum(), [inputs, *policy.denoiser.parameters()])])
    assert same_bits(results[1], results[0])
    with torch.no_grad():
        assert torch.equal(compiled(states), doubled(states))


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """(a graph of the call, what it returned: the memory that each replay writes), as a user would capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_replays_without_a_seed_draw_anew():
    policy, states = gpu_policy(), gpu_states(50)
    with torch.no_grad():
        graph, actions = captured(lambda: sample(states, policy, seed=None))

    def replays(n: int) -> list[Tensor]:
        results = []
        for _ in range(n):
            graph.replay()
            results.append(actions.clone())
        return results

    torch.cuda.manual_seed(1)
    first = replays(4)
    assert all(a.isfinite().all() and a.abs().amax() <= 1 for a in first)
    for i, a in enumerate(first):
        assert all((a - b).abs().mean() > 1e-3 for b in first[:i])
    torch.cuda.manual_seed(1)
    assert same_bits(replays(4), first)
    torch.cuda.manual_seed(2)
    assert not torch.equal(replays(1)[0], first[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replays_with_a_seed_repeat_and_see_changes(precision):
    policy, states = gpu_policy(), gpu_states(50)
    with torch.no_grad():
        graph, actions = captured(lambda: sample(states, policy, precision=precision))
        for change in (lambda: None, lambda: policy.denoiser.flat.mul_(1.1), states.neg_):
            change()
            replays = []
            for _ in range(2):  # before the plain call, which must not be what notices the change
                actions.fill_(float("nan"))
                graph.replay()
                replays.append(actions.clone())
            want = sample(states, policy, precision=precision)
            assert same_bits(replays, [want, want])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_in_a_graph(precision):
    policy, states = gpu_policy(), gpu_states(50)
    graph, got = captured(lambda: gradients(states, policy, precision=precision))
    with torch.no_grad():
        policy.denoiser.flat.mul_(1.1)
    graph.replay()
    assert same_bits(got, gradients(states, policy, precision=precision))


def test_select_in_a_graph():
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(50)
    graph, chosen = captured(lambda: dql.select(states, policy, critic, backend="triton"))
    torch.cuda.manual_seed(1)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(chosen.clone())
    assert not torch.equal(*results)
    torch.cuda.manual_seed(1)
    graph.replay()
    assert torch.equal(chosen, results[0])


def test_a_side_stream_waits_for_no_other():
    """The work goes to the current stream, after what is queued there, while another stream is busy."""
    policy, states = gpu_policy(), gpu_states(256)
    want = gradients(states, policy)
    late, side = torch.zeros_like(states), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        gradients(late, policy)  # compiled, loaded, allocated
    side.synchronize()
    torch.cuda._sleep(3_000_000_000)  # clocks: over a second
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(states)
        got = [tensor.cpu() for tensor in gradients(late, policy)]
    assert not torch.cuda.default_stream().query(), "it waited for the default stream"
    assert same_bits(got, [tensor.cpu() for tensor in want])
    torch.cuda.synchronize()


def test_two_threads():
    """From the first call on: both compile, one of them a policy that the other uses too."""
    shared, own = gpu_policy(hidden_dim=80), [gpu_policy(seed=s, hidden_dim=80) for s in (1, 2)]
    states = gpu_states(37)
    torch.cuda.synchronize()

    def work(thread: int) -> list[Tensor]:
        results = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                for policy in (shared, own[thread]):
                    results += gradients(states, policy, seed=100 * thread + i)
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, range(2)))
    for thread in range(2):
        assert same_bits(together[thread], work(thread))


def test_steady_calls_allocate_nothing_from_the_device():
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(256)
    sampler = dql.GraphedSampler(policy, 256, backend="triton")

    def calls(n: int) -> int:
        for _ in range(n):
            with torch.no_grad():
                sample(states, policy)
            gradients(states, policy)
            dql.select(states, policy, critic, backend="triton")
            sampler.run(states)
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["segment.all.allocated"]

    before = calls(10)
    assert calls(100) == before


# The graph-replayed fast path


@pytest.mark.parametrize("N", [None, 7])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphed_sampler(precision, N):
    policy, states = gpu_policy(), gpu_states(16)
    sampler = dql.GraphedSampler(policy, 16, num_candidates=N, backend="triton", precision=precision)

    def runs(n: int, states: Tensor = states) -> list[Tensor]:
        return [sampler.run(states).clone() for _ in range(n)]

    torch.cuda.manual_seed(1)
    first = runs(3)
    assert all(a.shape == ((16, A) if N is None else (16, N, A)) for a in first)
    assert all(a.isfinite().all() and a.abs().amax() <= 1 for a in first)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    torch.cuda.manual_seed(1)
    assert same_bits(runs(3), first)
    for change in (states.neg_, lambda: policy.denoiser.flat.mul_(1.5)):
        before = first[0]
        with torch.no_grad():
            change()
        torch.cuda.manual_seed(1)
        first = runs(1)
        assert (first[0] - before).abs().amax() > 1e-3
    for wrong in (gpu_states(15), gpu_states(16)[:, 1:], states.cpu()):
        with pytest.raises(ValueError, match="states"):
            sampler.run(wrong)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphed_sampler_is_right(precision):
    """If the denoiser predicts x0 from the state alone, the last step's x0 is the action, whatever was drawn."""
    policy, states = gpu_policy(predict_epsilon=False), gpu_states(16)
    with torch.no_grad():
        dict(policy.denoiser.named_parameters())["mid_layer.0.weight"][:, :A] = 0
        want = sample(states, policy, backend="eager")
    sampler = dql.GraphedSampler(policy, 16, backend="triton", precision=precision)
    tolerance = TOLERANCES["float32"] if precision == "fp32" else Tolerance(3e-2, 0.0, "8 bits of an operand")
    for _ in range(2):
        assert_close(sampler.run(states), want, tolerance, what="actions", backend=f"triton, {precision}")
