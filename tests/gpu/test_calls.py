"""The backends "triton" and "cuda" as callers on a GPU meet them: torch.compile, CUDA graphs, GraphedSampler, streams,
threads, a second GPU.

It skips without a GPU; see `gpu/test_numbers`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.cases import TOLERANCES, Tolerance, assert_close
from support.gpu import (
    PRECISIONS,
    SEED,
    captured,
    each_backend,
    gpu_policy,
    gpu_states,
    gradients,
    needs_gpu,
    poisoned,
    same_bits,
    sample,
)
from support.networks import A, make_critic

import dql

pytestmark = [needs_gpu, each_backend]

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned():
        yield


def test_inside_torch_compile(backend):
    policy, states = gpu_policy(), gpu_states(37)

    def doubled(states: Tensor) -> Tensor:
        return dql.sample(states * 2, policy, backend=backend, seed=SEED) + 1

    compiled = torch.compile(doubled)
    results = []
    for run in (doubled, compiled):
        inputs = states.clone().requires_grad_()
        actions = run(inputs)
        results.append([actions.detach(), *torch.autograd.grad(actions.sum(), [inputs, *policy.denoiser.parameters()])])
    assert same_bits(results[1], results[0])
    with torch.no_grad():
        assert torch.equal(compiled(states), doubled(states))


def test_replays_without_a_seed_draw_anew(backend):
    policy, states = gpu_policy(), gpu_states(50)
    with torch.no_grad():
        graph, actions = captured(lambda: sample(states, policy, backend, seed=None))

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
def test_replays_with_a_seed_repeat_and_see_changes(precision, backend):
    policy, states = gpu_policy(), gpu_states(50)
    with torch.no_grad():
        graph, actions = captured(lambda: sample(states, policy, backend, precision=precision))
        for change in (lambda: None, lambda: policy.denoiser.flat.mul_(1.1), states.neg_):
            change()
            replays = []
            for _ in range(2):  # before the plain call, which must not be what notices the change
                actions.fill_(float("nan"))
                graph.replay()
                replays.append(actions.clone())
            want = sample(states, policy, backend, precision=precision)
            assert same_bits(replays, [want, want])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_in_a_graph(precision, backend):
    policy, states = gpu_policy(), gpu_states(50)
    graph, got = captured(lambda: gradients(states, policy, backend, precision=precision))
    with torch.no_grad():
        policy.denoiser.flat.mul_(1.1)
    graph.replay()
    assert same_bits(got, gradients(states, policy, backend, precision=precision))


def test_select_in_a_graph(backend):
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(50)
    graph, chosen = captured(lambda: dql.select(states, policy, critic, backend=backend))
    torch.cuda.manual_seed(1)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(chosen.clone())
    assert not torch.equal(*results)
    torch.cuda.manual_seed(1)
    graph.replay()
    assert torch.equal(chosen, results[0])
    graph, details = captured(lambda: dql.select(states, policy, critic, backend=backend, details=True))
    torch.cuda.manual_seed(1)
    graph.replay()
    assert torch.equal(details.actions, results[0])
    for i, q in ((1, details.q1), (2, details.q2)):
        with torch.no_grad():
            assert_close(q, critic.q(i, states, details.actions), TOLERANCES["float32"], what=f"q{i}", backend=backend)
    assert (details.index.unique().numel() > 1) and details.spread.isfinite().all()


def test_a_side_stream_waits_for_no_other(backend):
    """The work goes to the current stream, after what is queued there, while another stream is busy."""
    policy, states = gpu_policy(), gpu_states(256)

    def all_of(states: Tensor) -> Tensor:  # for one copy to the host: on a GPU that others share each takes its time
        return torch.cat([tensor.flatten() for tensor in gradients(states, policy, backend)])

    want = all_of(states).cpu()
    late, side = torch.zeros_like(states), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        all_of(late).cpu()  # compiled, loaded, allocated
    torch.cuda._sleep(5_000_000_000)  # clocks: over two seconds
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(states)
        got = all_of(late).cpu()
    assert not torch.cuda.default_stream().query(), "it waited for the default stream"
    assert torch.equal(got, want)
    torch.cuda.synchronize()


def test_two_threads(backend):
    """From the first call on: both compile, one of them a policy that the other uses too."""
    shared, own = gpu_policy(hidden_dim=80), [gpu_policy(seed=s, hidden_dim=80) for s in (1, 2)]
    states = gpu_states(37)
    torch.cuda.synchronize()

    def work(thread: int) -> list[Tensor]:
        results = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                for policy in (shared, own[thread]):
                    results += gradients(states, policy, backend, seed=100 * thread + i)
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, range(2)))
    for thread in range(2):
        assert same_bits(together[thread], work(thread))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_graphs_of_a_second_gpu(backend):
    """Recorded after one of the first, on whose stream torch would record by itself."""
    samplers = [dql.GraphedSampler(gpu_policy().to(f"cuda:{i}"), 5, backend=backend) for i in (0, 1)]
    for sampler in samplers:
        states = gpu_states(5).to(sampler.states.device)
        first = sampler.run(states).clone()
        assert first.isfinite().all()
        assert not torch.equal(sampler.run(-states), first)
    agents = [dql.DiffusionQL(11, 3, dql.Config(backend=backend, hidden_dim=48), device=f"cuda:{i}") for i in (0, 1)]
    for agent in agents:
        before = agent.policy.denoiser.flat.detach().clone()
        batch = dql.Batch(*(torch.rand(shape) for shape in ((9, 11), (9, 3), (9,), (9, 11), (9,))))
        dql.GraphedUpdate(agent, 9).update(batch.to(agent.device))
        assert not torch.equal(agent.policy.denoiser.flat, before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_gpu(backend):
    """Not the current one: work and memory go where the policy is."""
    policy, states = gpu_policy(), gpu_states(37)
    want = [tensor.cpu() for tensor in gradients(states, policy, backend)]
    policy, states = policy.to("cuda:1"), states.to("cuda:1")
    got = gradients(states, policy, backend)
    assert {tensor.device for tensor in got} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, TOLERANCES["float32"], what="a tensor", backend=backend)  # it may be another model
    with torch.no_grad(), torch.cuda.device(1):
        graph, actions = captured(lambda: sample(states, policy, backend))
        graph.replay()
    assert_close(actions, want[0], TOLERANCES["float32"], what="a replay's actions", backend=backend)


def test_steady_calls_allocate_nothing_from_the_device(backend):
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(256)
    sampler = dql.GraphedSampler(policy, 256, backend=backend)

    def calls(n: int) -> int:
        for _ in range(n):
            with torch.no_grad():
                sample(states, policy, backend)
            gradients(states, policy, backend)
            dql.select(states, policy, critic, backend=backend)
            sampler.run(states)
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["segment.all.allocated"]

    before = calls(10)
    assert calls(100) == before


# The graph-replayed fast path


@pytest.mark.parametrize("N", [None, 7])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphed_sampler(precision, N, backend):
    policy, states = gpu_policy(), gpu_states(16)
    sampler = dql.GraphedSampler(policy, 16, num_candidates=N, backend=backend, precision=precision)

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
def test_graphed_sampler_is_right(precision, backend):
    """If the denoiser predicts x0 from the state alone, the last step's x0 is the action, whatever was drawn."""
    policy, states = gpu_policy(predict_epsilon=False), gpu_states(16)
    with torch.no_grad():
        dict(policy.denoiser.named_parameters())["mid_layer.0.weight"][:, :A] = 0
        want = sample(states, policy, "eager")
    sampler = dql.GraphedSampler(policy, 16, backend=backend, precision=precision)
    tolerance = TOLERANCES["float32"] if precision == "fp32" else Tolerance(3e-2, 0.0, "8 bits of an operand")
    for _ in range(2):
        assert_close(sampler.run(states), want, tolerance, what="actions", backend=f"{backend}, {precision}")


def test_graphed_sampler_with_a_critic(backend):
    """It replays `dql.select`, until the policy is moved."""
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(50)
    graph, chosen = captured(lambda: dql.select(states, policy, critic, backend=backend))
    sampler = dql.GraphedSampler(policy, 50, critic=critic, backend=backend)
    torch.cuda.manual_seed(1)
    graph.replay()
    torch.cuda.manual_seed(1)
    assert torch.equal(sampler.run(states), chosen)
    policy.cpu()
    with pytest.raises(RuntimeError, match="Denoiser was moved"):
        sampler.replay()


# States that are not finite; see `test_bad_states`


@pytest.mark.parametrize("with_critic", [False, True])
def test_graphed_samplers_tell_of_bad_states(with_critic, backend):
    policy, states = gpu_policy(), gpu_states(16)
    critic = make_critic().to("cuda") if with_critic else None
    sampler = dql.GraphedSampler(policy, 16, critic=critic, backend=backend)
    assert sampler.run(states).isfinite().all()
    dql.check_states()
    bad = states.clone()
    bad[3, 1] = float("inf")
    assert sampler.run(bad).isnan().all(dim=1).tolist() == [row == 3 for row in range(16)]  # waits
    with pytest.raises(ValueError, match="the states of a call before this one"):
        sampler.run(states)
    assert sampler.run(states).isfinite().all()
    dql.check_states()


def test_a_graph_of_ones_own_tells_of_bad_states(backend):
    policy, states = gpu_policy(), gpu_states(16)
    with torch.no_grad():
        graph, actions = captured(lambda: sample(states, policy, backend))
    states[3, 1] = float("nan")
    graph.replay()
    with pytest.raises(ValueError, match="the states of a call before this one"):
        dql.check_states("cuda")
    assert actions.isnan().all(dim=1).tolist() == [row == 3 for row in range(16)]
    dql.check_states()


def test_repeated_calls_wait_for_nothing(backend):
    """Nor do they with a report on its way: the GPU is busy when they return."""
    policy, critic, states = gpu_policy(), make_critic().to("cuda"), gpu_states(16)
    sampler = dql.GraphedSampler(policy, 16, backend=backend)
    calls = [
        lambda: sample(states, policy, backend),
        lambda: dql.select(states, policy, critic, backend=backend),
        lambda: dql.select(states, policy, critic, backend=backend, details=True),
        lambda: sampler.run(states),
    ]
    with torch.no_grad():
        for call in calls * 3:
            call()
        torch.cuda.synchronize()
        states[3, 1] = float("nan")
        torch.cuda._sleep(1_000_000_000)  # clocks: about half a second
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls * 10:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.cuda.current_stream().query(), "they waited"
    with pytest.raises(ValueError, match="the states of a call before this one"):
        dql.check_states()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_each_gpu_tells_for_itself(backend):
    policy, states = gpu_policy().to("cuda:1"), gpu_states(16).to("cuda:1")
    with torch.no_grad():
        for _ in range(3):
            sample(states, policy, backend)
        states[3, 1] = float("nan")
        sample(states, policy, backend)
    dql.check_states("cuda:0")
    with pytest.raises(ValueError, match="on cuda:1"):
        dql.check_states()
