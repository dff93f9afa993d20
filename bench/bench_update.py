"""One training update at batch 256, `DiffusionQL.update`: every backend beside the published code, in float32.

On a GPU what it launches is counted, too: an update's time is the host's where there are many small kernels.

The gradients are compared first: after the first update Adam's average is 0.1 times the clipped gradient, and unlike
`.grad` the published code does not write to it afterwards.
"""

from collections.abc import Callable, Iterator
from typing import Any

import device_time
import pytest
import rivals
import torch
from device_time import Call
from lean import Draws, LeanAgent
from published import PublishedAgent
from rivals import JAX, A, S, T
from table import UPDATE_TITLE
from torch import Tensor

import dql
from dql.draws import UpdateSeeds

Update = Callable[[dql.Batch], dict[str, Tensor]]
B = 256
DQL = [f"dql-{name}" for name in dql.backends()]
COMPILED = "compile-lean"  # `lean.LeanAgent`
MOVE_TOLERANCE = 2e-2  # of how far a first step moves a tensor: Adam divides a gradient of rounding size by itself
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


@pytest.mark.parametrize("contender", ["published", COMPILED, JAX, *DQL, *GRAPHED])
@pytest.mark.parametrize("max_q_backup", [False, True], ids=["plain", "max_q_backup"])
def test_update(max_q_backup: bool, contender: str, race, device, request) -> None:
    if contender == COMPILED and (reason := rivals.not_compiled(device, request.config.getoption("short"))):
        pytest.skip(reason)
    if contender == JAX and (reason := rivals.no_jax(device, request.config.getoption("short"))):
        pytest.skip(reason)
    batch, published = _batch(device), rivals.published_agent(device, max_q_backup=max_q_backup)
    run, error = _updates(contender, published, max_q_backup, batch)
    problem = f"update B={B}" + (", max_q_backup" if max_q_backup else "")
    race(problem, contender, run, lambda: _update_published(published, batch), worst_error=error)


def _updates(contender: str, published: PublishedAgent, max_q_backup: bool, batch: dql.Batch) -> tuple[Call, float]:
    """(an update of the contender, the error of its first one)."""
    if contender == "published":
        other = rivals.published_agent(batch.states.device, max_q_backup=max_q_backup)
        return lambda: _update_published(other, batch), 0.0
    if contender == COMPILED:
        torch.compiler.reset()  # past eight graphs of one function torch runs it uncompiled, without a word
        lean = LeanAgent(published, B)
        return lambda: lean.update(batch), _check_lean(contender, lean, published, batch)
    if contender == JAX:
        from lean_jax import JaxAgent, array_of

        agent, arrays = JaxAgent(published), {name: array_of(value) for name, value in vars(batch).items()}
        return lambda: agent.update(arrays), _check_jax(contender, agent, published, batch)
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
    draws = _draws(UpdateSeeds.of(config.seed, agent.step), published, agent.device)
    losses = _given_update(published, batch, draws)
    metrics = update(batch)
    averages = {}
    for name, module in (("actor", agent.policy.denoiser), ("critic", agent.critic)):
        average = agent.tensors()[f"{name}_adam.exp_avg"]
        averages |= {f"{name}.{key}": view for key, view in module.layout.views(average).items()}
    return _compare(contender, metrics, averages, losses, published)


def _check_lean(contender: str, lean: LeanAgent, published: PublishedAgent, batch: dql.Batch) -> float:
    """The same for the compiled rival."""
    draws = _draws(UpdateSeeds.of(0, 0), published, batch.states.device)
    losses = _given_update(published, batch, draws)
    metrics = lean.update(batch, draws)
    return _compare(contender, metrics, _averages(lean), losses, published)


def _check_jax(contender: str, agent: Any, published: PublishedAgent, batch: dql.Batch) -> float:
    """The same for JAX's, and, as its optimizer and averages are its own, how far all parameters moved."""
    from lean_jax import array_of

    draws = _draws(UpdateSeeds.of(0, 0), published, batch.states.device)
    before = _parameters(published)
    losses = _given_update(published, batch, draws)
    metrics = agent.update({name: array_of(value) for name, value in vars(batch).items()}, draws)
    error = _compare(contender, metrics, agent.averages(), losses, published)
    got, want = ({k: p - before[k] for k, p in ps.items()} for ps in (agent.parameters(), _parameters(published)))
    moved = {name: tensor for name, tensor in want.items() if not name.startswith("ema_actor")}
    rivals.check_norms(f"{contender}, moves", {name: got[name] for name in moved}, moved, MOVE_TOLERANCE)
    return error


def _parameters(published: PublishedAgent) -> dict[str, Tensor]:
    """A copy of all, by name."""
    modules = {"actor": published.actor.model, "ema_actor": published.ema_actor.model}
    modules |= {"critic": published.critic, "critic_target": published.critic_target}
    return {f"{n}.{k}": p.detach().clone() for n, module in modules.items() for k, p in module.named_parameters()}


def _draws(seeds: UpdateSeeds, published: PublishedAgent, device: torch.device) -> Draws:
    """What dql draws for an update."""

    def normal(seed: int, steps: int, rows: int) -> Tensor:
        return dql.noise.normal(seed, steps, rows, A, device=device)

    return Draws(
        normal(seeds.target, T, B * (published.num_backup if published.max_q_backup else 1)),
        dql.noise.integers(seeds.bc_t, T, B).to(device),
        normal(seeds.bc_noise, 1, B)[0],
        normal(seeds.actor, T, B),
        torch.tensor(bool(dql.noise.integers(seeds.coin, 2, 1)), device=device),
    )


def _given_update(published: PublishedAgent, batch: dql.Batch, draws: Draws) -> dict[str, float]:
    """The published update with these draws."""

    def in_turn() -> Iterator[Tensor]:
        yield from rivals.chain_draws(draws.target)
        yield draws.t
        yield draws.eps
        yield from rivals.chain_draws(draws.actor)

    rivals.give_coin(1 if draws.first else 2)
    with rivals.GivenDraws(in_turn()):
        return _update_published(published, batch)


def _averages(agent: PublishedAgent | LeanAgent) -> dict[str, Tensor]:
    """Adam's averages of the gradients by name."""
    return {
        f"{name}.{key}": optimizer.state[p]["exp_avg"]
        for name, module, optimizer in (
            ("actor", agent.actor.model, agent.actor_optimizer),
            ("critic", agent.critic, agent.critic_optimizer),
        )
        for key, p in module.named_parameters()
    }


def _compare(
    contender: str,
    metrics: dict[str, Tensor],
    averages: dict[str, Tensor],
    losses: dict[str, float],
    published: PublishedAgent,
) -> float:
    """Losses and gradients of a first update beside the published ones; the worst error of the gradients."""
    for name, want in losses.items():
        got = float(metrics[name])
        assert abs(got - want) <= 1e-4 * max(1, abs(want)), f"{contender}: {name} is {got}, expected {want}"
    return rivals.check_norms(contender, averages, _averages(published), rivals.GRADIENT_TOLERANCE)
