"""The authors' own code beside its stand-in and beside ours.

    python bench/authors.py CHECKOUT [--updates 25] [--rounds 40]

CHECKOUT is a clone of github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL (commit d871f5c), which needs
python-dateutil. Nothing of it is in this repository. Two things are printed, for one thread on the CPU:

- how far whole updates, with the same draws, lead apart: of the authors' `Diffusion_QL.train`, of `published.py` that
  stands for it in the benches, and of `dql.DiffusionQL` (backend eager), as the largest |difference| / |authors'| over
  the parameters of actor, critics, target critics and averaged actor after all updates;
- how long an update, the chain and an action take, the authors' and the stand-in in turns: the median over rounds of
  authors' / stand-in, above 1 where the authors' code is slower than what the benches compare with.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rivals
import torch
from published import PublishedAgent
from rivals import A, S, T

import dql
from dql.draws import UpdateSeeds

B = 256
Tensor = torch.Tensor


class Replay:
    """The one batch, in the authors' order: state, action, next state, reward, not done."""

    def __init__(self, batch: dql.Batch) -> None:
        columns = batch.rewards[:, None], batch.masks[:, None]
        self.batch = (batch.states, batch.actions, batch.next_states, *columns)

    def sample(self, _: int) -> tuple[Tensor, ...]:
        return self.batch


def theirs(checkout: Path, like: PublishedAgent) -> Any:
    """The authors' agent with the stand-in's weights."""
    sys.path.insert(0, str(checkout))
    from agents.ql_diffusion import Diffusion_QL  # type: ignore[import-not-found]

    agent = Diffusion_QL(S, A, 1.0, "cpu", 0.99, 0.005, beta_schedule="vp", n_timesteps=T, step_start_ema=10)
    agent.actor.load_state_dict(like.actor.state_dict())
    agent.ema_model.load_state_dict(like.ema_actor.state_dict())
    agent.critic.load_state_dict(like.critic.state_dict())
    agent.critic_target.load_state_dict(like.critic_target.state_dict())
    return agent


def draws(step: int) -> Iterator[Tensor]:
    """What an update draws, as dql draws it."""
    seeds = UpdateSeeds.of(0, step)
    yield from rivals.chain_draws(dql.noise.normal(seeds.target, T, B, A))
    yield dql.noise.integers(seeds.bc_t, T, B)
    yield dql.noise.normal(seeds.bc_noise, 1, B, A)[0]
    yield from rivals.chain_draws(dql.noise.normal(seeds.actor, T, B, A))


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(float((got[k] - w).norm() / w.norm().clamp_min(1e-30)) for k, w in want.items())


def networks(agent: Any, actor: str, average: str) -> dict[str, Tensor]:
    """Parameters of all four, by the published names."""
    modules = {"actor": getattr(agent, actor), "average": getattr(agent, average)}
    modules |= {"critic": agent.critic, "target": agent.critic_target}
    return {f"{n}.{k}": p.detach().clone() for n, module in modules.items() for k, p in module.named_parameters()}


def ours(agent: dql.DiffusionQL) -> dict[str, Tensor]:
    modules = {"actor.model": agent.policy.denoiser, "average.model": agent.ema_policy.denoiser}
    modules |= {"critic": agent.critic, "target": agent.critic_target}
    return {f"{n}.{k}": p.detach().clone() for n, module in modules.items() for k, p in module.named_parameters()}


def race(name: str, first: Callable[[], object], second: Callable[[], object], rounds: int) -> None:
    """Times both in turns, who begins changing."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(rounds + 3):
        for k in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[k]()
            if i >= 3:
                times[k].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times[0], times[1], strict=True)]
    low, middle, high = statistics.quantiles(ratios)
    print(f"{name}: authors' / stand-in {middle:.3f} (quartiles {low:.3f} .. {high:.3f}, {rounds} rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--updates", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    states, next_states = torch.randn(2, B, S, generator=generator)
    actions, rewards = torch.rand(B, A, generator=generator) * 2 - 1, torch.randn(B, generator=generator)
    batch = dql.Batch(states, actions, rewards, next_states, (torch.rand(B, generator=generator) > 0.1).float())
    replay = Replay(batch)
    stand_in = rivals.published_agent(torch.device("cpu"))
    stand_in.ema_start = 10  # so that the average moves within these updates
    authors = theirs(chosen.checkout.absolute(), stand_in)
    agent = rivals.matching_agent(stand_in, dql.Config(backend="eager", ema_start=10), torch.device("cpu"))
    for step in range(chosen.updates):
        maximised = 1 if int(dql.noise.integers(UpdateSeeds.of(0, step).coin, 2, 1)) else 2
        for update in (lambda: authors.train(replay, 1, B), lambda: stand_in.update(*columns_of(batch))):
            rivals.give_coin(maximised)
            with rivals.GivenDraws(draws(step)):
                update()
        agent.update(batch)
    want = networks(authors, "actor", "ema_model")
    print(f"{chosen.updates} updates: stand-in {apart(networks(stand_in, 'actor', 'ema_actor'), want):.1e}, "
          f"dql {apart(ours(agent), want):.1e} from the authors'")  # fmt: skip
    race("update", lambda: authors.train(replay, 1, B), lambda: stand_in.update(*columns_of(batch)), chosen.rounds)
    with torch.no_grad():
        race("chain, B = 256", lambda: authors.actor(states), lambda: stand_in.actor(states), chosen.rounds)
    state = states[0].numpy()
    race("action of 50", lambda: authors.sample_action(state), lambda: stand_in.act(state), 5 * chosen.rounds)


def columns_of(batch: dql.Batch) -> tuple[Tensor, ...]:
    return batch.states, batch.actions, batch.rewards, batch.next_states, batch.masks


if __name__ == "__main__":
    main()
