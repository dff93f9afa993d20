"""An update replayed as a CUDA graph is `agent.update`. Without a GPU what would be recorded is run at each replay."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.cases import TOLERANCES, assert_close
from support.gpu_agents import CONFIG, DEVICE, A, S, make_batch

import dql
from dql import noise, update_graphed
from dql.backend.registry import of_gpus
from dql.data import BLOCK_STEPS, DatasetInfo
from dql.draws import UpdateSeeds
from dql.update_graphed import AHEAD, GraphedUpdate

Tensor = torch.Tensor
B = 24
NO_GPU = DEVICE == "cpu"
# "eager" records only where there is nothing to compile or interpret, so it is the quickest to look at
VARIANTS = {
    "plain": {},
    "max_q_backup, cosine": {"max_q_backup": True, "lr_schedule": "cosine", "num_updates": 9},
    "no clipping": {"grad_norm": 0.0, "eta": 0.3},
    "one-step": {"actor_gradient": "one-step", "eta": 3.0},
}


@pytest.fixture(params=["eager", *of_gpus()])
def backend(request, runs_here) -> str:
    return runs_here(request.param)


@pytest.fixture
def record_update(monkeypatch):
    """`record_update(agent)` -> GraphedUpdate."""

    def run_again(body, agent):
        with agent.unchanged():
            body()
            metrics = {name: torch.full_like(value, math.nan) for name, value in body().items()}

        def replay() -> None:
            for name, value in body().items():
                metrics[name].copy_(value)

        return replay, metrics

    if NO_GPU:
        monkeypatch.setattr(update_graphed, "record", run_again)
        monkeypatch.setattr(GraphedUpdate, "__init__", GraphedUpdate._prepare)
    return lambda agent: GraphedUpdate(agent, B)


def make_agent(backend: str, algorithm: str = "diffusion-ql", **changes):
    cls = dql.DiffusionQL if algorithm == "diffusion-ql" else dql.DiffusionBC
    return cls(S, A, dql.Config(**CONFIG | changes, backend=backend), device=DEVICE)


def make_data(size: int, states: int = S, actions: int = A) -> dql.TransitionDataset:
    draw = torch.Generator().manual_seed(size)
    of_states, of_actions, rewards, next_states = (
        torch.randn(size, width, generator=draw).clamp(-1, 1).to(DEVICE) for width in (states, actions, 1, states)
    )
    info = DatasetInfo("a/b-v0", None, None, None, 0, np.zeros(0), "box", 1.0)
    masks = (rewards[:, 0] > 0).float()
    return dql.TransitionDataset(of_states, of_actions, rewards[:, 0].contiguous(), next_states, masks, info)


def assert_same(got, want, case: str) -> None:
    for name, tensor in want.tensors().items():
        assert_close(got.tensors()[name], tensor, TOLERANCES["agent float32"], what=name, case=case)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_are_the_agents(variant, backend, record_update):
    """Both coins, steps with and without an average, a learning rate that changes."""
    steps = 4 if NO_GPU and backend == "triton" and variant != "plain" else 8  # interpreted, one takes seconds
    agents = [make_agent(backend, **VARIANTS[variant]) for _ in range(2)]
    update = record_update(agents[0])
    for step in range(steps):
        got, want = update.update(make_batch(step)), agents[1].update(make_batch(step))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert_close(got[name], value, TOLERANCES["agent float32"], what=name, case=f"{variant}, step {step}")
    assert agents[0].step == steps
    assert_same(*agents, variant)


def test_behaviour_cloning(backend, record_update):
    agents = [make_agent(backend, "diffusion-bc") for _ in range(2)]
    update = record_update(agents[0])
    for step in range(3):
        got, want = (each.update(make_batch(step))["actor/bc_loss"] for each in (update, agents[1]))
        assert_close(got, want, TOLERANCES["agent float32"], what="bc_loss", case=f"step {step}")
    assert_same(*agents, "diffusion-bc")


@pytest.mark.parametrize("steps", [0, 3])
def test_recording_changes_nothing(steps, record_update):
    """Neither weights nor optimizers, whether they have taken a step or not; the next update is as it would be."""
    agent, other = (make_agent("eager") for _ in range(2))
    for step in range(steps):
        agent.update(make_batch(step))
        other.update(make_batch(step))
    before = {name: tensor.clone() for name, tensor in agent.tensors().items()}
    record_update(agent)
    for name, tensor in agent.tensors().items():
        want = before.get(name, torch.zeros_like(tensor))  # an optimizer's that has taken no step yet
        assert torch.equal(tensor, want), name
    assert agent.step == steps
    agent.update(make_batch(steps))
    other.update(make_batch(steps))
    assert_same(agent, other, "after recording")


def test_plain_and_graphed_updates_take_turns(record_update):
    """And what acts in between sees the parameters as they are."""
    agents = [make_agent("eager") for _ in range(2)]
    update = record_update(agents[0])
    states = make_batch(9).states
    for step in range(6):
        (update.update if step % 2 else agents[0].update)(make_batch(step))
        agents[1].update(make_batch(step))
        version = agents[0].policy.denoiser.flat._version
        got, want = (agent.act(states, seed=step) for agent in agents)
        assert_close(got, want, TOLERANCES["agent float32"], what="actions", case=f"step {step}")
        assert version > step
    assert_same(*agents, "in turns")


def test_a_recorded_agent_is_saved_as_any(tmp_path, record_update):
    agents = [make_agent("eager") for _ in range(2)]
    update = record_update(agents[0])
    for step in range(3):
        update.update(make_batch(step))
        agents[1].update(make_batch(step))
    agents[0].save(tmp_path)
    loaded = dql.load(tmp_path, device=DEVICE)
    assert loaded.step == 3
    loaded.update(make_batch(3))
    agents[1].update(make_batch(3))
    assert_same(loaded, agents[1], "loaded")


@pytest.mark.parametrize("backend", ["eager", *of_gpus()])
def test_what_is_drawn_ahead_is_what_an_update_draws(backend, runs_here, record_update):
    """To the bit: over blocks, after a step that jumps, with another seed and schedule, on any default device."""
    agent = make_agent(runs_here(backend), lr_schedule="cosine", num_updates=100)
    agent.config = replace(agent.config, ema_start=3)
    with torch.device("meta"):
        update = record_update(agent)
    source = list(vars(make_batch(0)).values())
    steps = [*range(2 * AHEAD + 3), 1000, 1001, 7, 2**40, AHEAD - 1, AHEAD]
    for i, step in enumerate(steps):
        if i == len(steps) - 2:
            agent.config = replace(agent.config, seed=2**64 - 1, lr_schedule="constant")
        agent.step = step
        with torch.device("meta"):
            update._stage(source)
        seeds, config = UpdateSeeds.of(agent.config.seed, step), agent.config
        for name, tensor in zip(("target", "bc_noise", "actor"), update._seeds, strict=True):
            assert int(tensor) % 2**64 == getattr(seeds, name)
        assert torch.equal(update._t.cpu(), noise.integers(seeds.bc_t, agent.policy.T, B))
        first = int(noise.integers(seeds.coin, 2, 1))
        average = 1 - config.ema_decay if step >= 3 and step % config.ema_every == 0 else 0.0
        scalars = torch.tensor([first, 1 - first, agent.lr_scale(), average], dtype=update._scalars.dtype)
        assert torch.equal(update._scalars.cpu(), scalars)
        assert all(torch.equal(*pair) for pair in zip(vars(update._batch).values(), source, strict=True))


@pytest.mark.parametrize("algorithm", ["diffusion-ql", "diffusion-bc"])
def test_updates_from_a_dataset(backend, algorithm, record_update):
    """Those of its batches, to the bit, in the order of training without a graph; over the blocks of drawn rows."""
    data = make_data(1000)
    agents = [make_agent(backend, algorithm) for _ in range(2)]
    updates = [record_update(agent) for agent in agents]
    for agent in agents:
        agent.step = BLOCK_STEPS - 2
    for step in range(BLOCK_STEPS - 2, BLOCK_STEPS + 1):
        got, want = updates[0].update_from(data), updates[1].update(data.sample(B, agents[1].config.seed, step))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), f"{name}, step {step}"
    for name, tensor in agents[1].tensors().items():
        assert torch.equal(agents[0].tensors()[name], tensor), name


def test_a_dataset_that_does_not_fit_is_refused(backend, record_update):
    update = record_update(make_agent(backend))
    with pytest.raises(ValueError, match=r"batch\.states must be"):
        update.update_from(make_data(50, S + 1))
    with pytest.raises(ValueError, match=r"batch\.actions must be"):
        update.update_from(make_data(50, S, A + 1))
    assert update.agent.step == 0


def test_what_does_not_fit_is_refused(record_update):
    agent = make_agent("eager")
    update = record_update(agent)
    small = dql.Batch(*(value[:3] for value in vars(make_batch(0)).values()))
    with pytest.raises(ValueError, match=f"has 3 rows, this update was recorded for {B}"):
        update.update(small)
    with pytest.raises(ValueError, match=r"batch\.states is torch\.float64"):
        update.update(dql.Batch(*(value.double() for value in vars(make_batch(0)).values())))
    assert agent.step == 0
    agent.policy.double()
    agent.policy.float()  # as it was, elsewhere
    with pytest.raises(RuntimeError, match="moved or cast after its update was recorded"):
        update.update(make_batch(0))
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="batch_size must be a positive integer"):
            GraphedUpdate(agent, size)


def test_an_optimizer_that_was_loaded_is_noticed(tmp_path, record_update):
    """The graph would go on with the averages of before, and a checkpoint hold those that nobody changes."""
    agent = make_agent("eager")
    update = record_update(agent)
    update.update(make_batch(0))
    agent.save(tmp_path)
    agent.load_tensors(dql.load(tmp_path, device=DEVICE).tensors())
    with pytest.raises(RuntimeError, match="an optimizer of the agent was loaded or replaced"):
        update.update(make_batch(1))
    assert agent.step == 1


def test_gradients_that_an_outside_optimizer_drops_stay_the_graphs(record_update):
    agents = [make_agent("eager") for _ in range(2)]
    update = record_update(agents[0])
    for step in range(3):
        for agent in agents:
            torch.optim.SGD(agent.policy.denoiser.parameters()).zero_grad(set_to_none=True)
            torch.optim.SGD([agent.critic.flat]).zero_grad(set_to_none=True)
        update.update(make_batch(step))
        agents[1].update(make_batch(step))
    assert_same(*agents, "without gradients")


def test_an_infinite_actor_leaves_the_average_alone(record_update):
    """In updates that do not average: 0 times infinity is NaN."""
    agent = make_agent("eager", ema_start=10**6)
    update = record_update(agent)
    before = agent.ema_policy.denoiser.flat.clone()
    with torch.no_grad():
        agent.policy.denoiser.flat[0] = math.inf
    update.update(make_batch(0))
    assert torch.equal(agent.ema_policy.denoiser.flat, before)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_it_needs_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph needs the agent on a GPU, it is on cpu"):
        GraphedUpdate(make_agent("eager"), B)


@pytest.mark.skipif(NO_GPU, reason="no CUDA device: torch.cuda.is_available() is False")
def test_a_replay_never_waits(backend):
    agent = make_agent(backend)
    update, batch = GraphedUpdate(agent, B), make_batch(0)
    update.update(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = copy.copy(update.update(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in metrics.values())
