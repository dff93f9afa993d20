"""One training update at batch 256, `DiffusionQL.update`: every backend beside the published code, in float32.

On a GPU what it launches is counted, too: an update's time is the host's where there are many small kernels.

The gradients are compared first: after the first update Adam's average is 0.1 times the clipped gradient, and unlike
`.grad` the published code does not write to it afterwards.
"""

from collections.abc import Callable, Iterator

import device_time
import numpy as np
import pytest
import rivals
import torch
from device_time import Call
from published import PublishedAgent
from rivals import A, S, T
from table import UPDATE_TITLE
from torch import Tensor

import dql
from dql.agent import UpdateSeeds

Update = Callable[[dql.Batch], dict[str, Tensor]]
B = 256
DQL = [f"dql-{name}" for name in dql.backends()]
GRAPHED = [f"dql-{name}+graph" for name in dql.backends() if name != "cpp"]  # `dql.GraphedUpdate`


def _batch(device: torch.device) -> dql.Batch:
    generator = torch.Generator().manual_seed(1)
    states, next_states = torch.randn(2, B, S, generator=generator)
    actions = torch.rand(B, A, generator=generator) * 2 - 1
    rewards = torch.randn(B, generator=generator)
    masks = (torch.rand(B, generator=generator) > 0.1).float()
    return dql.Batch(states, actions, rewards, next_states, masks).to(device)


def _update_published(agent: PublishedAgent, batch: dql.Batch) -> dict[str, float]:
    return agent.update(batch.states, batch.actions, batch.rewards, batch.next_states, batch.masks)


@pytest.mark.parametrize("contender", ["published", "compile-published", *DQL, *GRAPHED])
@pytest.mark.parametrize("max_q_backup", [False, True], ids=["plain", "max_q_backup"])
def test_update(max_q_backup: bool, contender: str, race, device, request) -> None:
    if contender == "compile-published" and request.config.getoption("short"):
        pytest.skip("--short compiles no rival for it")
    batch, published = _batch(device), rivals.published_agent(device, max_q_backup=max_q_backup)
    run, error = _updates(contender, published, max_q_backup, batch)
    problem = f"update B={B}" + (", max_q_backup" if max_q_backup else "")
    race(problem, contender, run, lambda: _update_published(published, batch), worst_error=error)


def _updates(contender: str, published: PublishedAgent, max_q_backup: bool, batch: dql.Batch) -> tuple[Call, float]:
    """(an update of the contender, the error of its first one)."""
    if contender == "published":
        other = rivals.published_agent(batch.states.device, max_q_backup=max_q_backup)
        return lambda: _update_published(other, batch), 0.0
    if contender == "compile-published":
        return _compiled(max_q_backup, batch)
    name, device = contender.removeprefix("dql-"), batch.states.device
    config = dql.Config(backend=name.removesuffix("+graph"), max_q_backup=max_q_backup)
    agent = rivals.matching_agent(published, config, device)
    update = agent.update
    if name.endswith("+graph"):
        if device.type != "cuda":
            pytest.skip(f"a CUDA graph needs a GPU; run with --device cuda, this is {device}")
        update = dql.GraphedUpdate(agent, B).update
    error = _check_update(contender, agent, update, published, batch)
    return lambda: update(batch), error


def _compiled(max_q_backup: bool, batch: dql.Batch) -> tuple[Call, float]:
    """The published agent with compiled networks: its losses are those of the plain one for the same seeds."""
    device = batch.states.device
    if (reason := rivals.no_compiler(device)) is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    agents = [make(device, max_q_backup=max_q_backup) for make in (rivals.published_agent, rivals.compiled_agent)]
    losses = []
    for agent in agents:
        torch.manual_seed(3)
        np.random.seed(3)
        losses.append(_update_published(agent, batch))
    error = max(abs(losses[1][name] - want) / max(1, abs(want)) for name, want in losses[0].items())
    assert error <= 1e-4, f"compile-published: {losses[1]}, expected {losses[0]}"
    return lambda: _update_published(agents[1], batch), error


def test_update_bc(race, device) -> None:
    """For information: DiffusionBC, whose loss is a part of the actor's above. It runs no chain, so no backend."""
    agent, batch = dql.DiffusionBC(S, A, device=device), _batch(device)
    race(f"update B={B}, DiffusionBC", "dql", lambda: agent.update(batch), None)


# Last of this file: after the profiler no call is as fast as before.
@pytest.mark.parametrize("contender", ["published", *DQL, *GRAPHED])
@pytest.mark.parametrize("max_q_backup", [False, True], ids=["plain", "max_q_backup"])
def test_launches(max_q_backup: bool, contender: str, benchmark, record, device) -> None:
    if device.type != "cuda":
        pytest.skip(f"it counts what an update launches on a GPU; run with --device cuda, this is {device}")
    published = rivals.published_agent(device, max_q_backup=max_q_backup)
    run, _ = _updates(contender, published, max_q_backup, _batch(device))
    run()
    seen = benchmark.pedantic(device_time.launches, args=(run,), rounds=1)
    record(
        UPDATE_TITLE,
        problem=f"update B={B}" + (", max_q_backup" if max_q_backup else ""),
        contender=contender,
        kernels=seen.kernels,
        copies=seen.copies,
        kernels_alone_us=seen.seconds * 1e6,
    )


def _check_update(
    contender: str, agent: dql.DiffusionQL, update: Update, published: PublishedAgent, batch: dql.Batch
) -> float:
    """Both agents do their first update with the same noise; returns the worst error of the gradients."""
    config = agent.config
    seeds = UpdateSeeds.of(config.seed, agent.step)
    next_rows = B * (config.backup_candidates if config.max_q_backup else 1)

    def normal(seed: int, steps: int, rows: int) -> Tensor:
        return dql.noise.normal(seed, steps, rows, A, device=agent.device)

    def draws() -> Iterator[Tensor]:
        yield from rivals.chain_draws(normal(seeds.target, T, next_rows))
        yield dql.noise.integers(seeds.bc_t, T, B).to(agent.device)
        yield normal(seeds.bc_noise, 1, B)[0]
        yield from rivals.chain_draws(normal(seeds.actor, T, B))

    rivals.give_coin(1 if int(dql.noise.integers(seeds.coin, 2, 1)) else 2)
    with rivals.GivenDraws(draws()):
        losses = _update_published(published, batch)
    metrics = update(batch)
    for name, want in losses.items():
        got = float(metrics[name])
        assert abs(got - want) <= 1e-4 * max(1, abs(want)), f"{contender}: {name} is {got}, expected {want}"
    got_gradients, want_gradients = {}, {}
    for name, module, own, optimizer in (
        ("actor", agent.policy.denoiser, published.actor.model, published.actor_optimizer),
        ("critic", agent.critic, published.critic, published.critic_optimizer),
    ):
        average = agent.tensors()[f"{name}_adam.exp_avg"]
        got_gradients |= {f"{name}.{key}": view for key, view in module.layout.views(average).items()}
        want_gradients |= {f"{name}.{key}": optimizer.state[p]["exp_avg"] for key, p in own.named_parameters()}
    return rivals.check_norms(contender, got_gradients, want_gradients, rivals.GRADIENT_TOLERANCE)
