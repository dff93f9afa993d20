"""Several agents in one process, such as one for each seed of a table: each is to the bit what it would be alone.

On a CPU they are spread over the cores, one core each. "cpp" does whole blocks of updates in one native call, which
leaves Python out; other backends and algorithms take turns in Python and compute at the same time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dql import update_native
from dql.agents.base import Agent
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.agents.registry import make_agent
from dql.config import Config
from dql.data import Batch, TransitionDataset
from dql.shown import shown
from dql.staging import Source

Tensor = torch.Tensor
Block = tuple[list[str], Tensor]
"""Of some updates one after the other: the names of their metrics, and their values, float64 [n, m]."""

# The methods that a block stands for: an agent with others is updated by calls of them, one by one.
_DONE_NATIVELY: dict[str, tuple[Any, ...]] = {
    "update": (DiffusionBC.update, DiffusionQL.update),
    "update_natively": (update_native.clone, update_native.learn),
    "lr_scale": (Agent.lr_scale,),
    "ema_weight": (DiffusionBC.ema_weight, DiffusionQL.ema_weight),
}
_ROW = 16  # floats: a row of parameters begins on a cache line of its own


class Ensemble:
    """M agents of one algorithm and of equal sizes, on one device.

    Args:
        agents: no two share a network. Their parameters move into one tensor [M, P] a network; the agents stay what
            they are.
        threads: CPU threads for all of them; None takes torch's number.

    Raises:
        ValueError: no agents; of different algorithms, sizes, dtypes or devices; or one of them twice.
        TypeError: something else than agents.
    """

    def __init__(self, agents: Sequence[Agent], *, threads: int | None = None) -> None:
        self.agents = tuple(agents)
        self.threads = torch.get_num_threads() if threads is None else threads
        if not self.agents:
            raise ValueError("an ensemble needs one agent at least")
        for agent in self.agents:
            if not isinstance(agent, Agent):
                raise TypeError(f"agents must be agents, got {shown(agent)}; use dql.Ensemble.of(...)")
        first = _kind(self.agents[0])
        for agent in self.agents[1:]:
            for name, value in _kind(agent).items():
                if value != first[name]:
                    raise ValueError(
                        f"the agents of an ensemble must be alike, their {name} are {first[name]} and {value}; make an "
                        "ensemble of each"
                    )
        if len({id(module) for agent in self.agents for module in agent.modules().values()}) != len(self.agents) * len(
            self.agents[0].modules()
        ):
            raise ValueError("two agents of the ensemble share a network; give each its own, as copy.deepcopy does")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {shown(threads)}")
        self._parameters = {name: self._stacked(name) for name in self.agents[0].modules()}

    @classmethod
    def of(
        cls,
        state_dim: int,
        action_dim: int,
        config: Config | None = None,
        *,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ) -> "Ensemble":
        """New agents, one for each seed.

        Args:
            state_dim: S.
            action_dim: A.
            config: of all of them, but for its seed.
            seeds: M different ones.
            device: where the networks live.
            threads: as in `Ensemble`.
        """
        config = config or Config()
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be different ones, got {list(seeds)}: equal seeds make equal agents")
        made = [make_agent(state_dim, action_dim, replace(config, seed=seed), device=device) for seed in seeds]
        return cls(made, threads=threads)

    def __len__(self) -> int:
        return len(self.agents)

    def __iter__(self) -> Iterator[Agent]:
        return iter(self.agents)

    def __getitem__(self, index: int) -> Agent:
        return self.agents[index]

    def __repr__(self) -> str:
        first = self.agents[0]
        seeds = ", ".join(str(agent.config.seed) for agent in self.agents)
        return f"Ensemble({len(self)} x {type(first).__name__}, seeds [{seeds}], device={first.device})"

    def parameters(self, network: str) -> Tensor:
        """The parameters of all agents' networks of that name (`Agent.modules`), [M, P]: the memory they are in.

        Who writes into it writes what the agents read.

        Raises:
            ValueError: there is no such network.
            RuntimeError: an agent was moved, cast or put into another ensemble, and its parameters are elsewhere.
        """
        if network not in self._parameters:
            raise ValueError(f"the agents have no network {shown(network)}; they have {', '.join(self._parameters)}")
        memory = self._parameters[network]
        for i, (agent, row) in enumerate(zip(self.agents, memory, strict=True)):
            if agent.modules()[network].flat.data_ptr() != row.data_ptr():
                raise RuntimeError(
                    f"the {network} of agent {i} is not in this ensemble's memory any more: the agent was moved, cast "
                    "or put into another ensemble; make a new one, dql.Ensemble(agents)"
                )
        return memory

    def update(self, batches: Batch | Sequence[Batch]) -> dict[str, Tensor]:
        """One update of each agent.

        Args:
            batches: one for all, or M.

        Returns:
            the agents' metrics by name, [M] each, on their device.
        """
        given = [batches] * len(self) if isinstance(batches, Batch) else list(batches)
        if len(given) != len(self):
            raise ValueError(
                f"there are {len(self)} agents and {len(given)} batches; give one for each, or one for all"
            )
        tasks = [partial(agent.update, batch) for agent, batch in zip(self.agents, given, strict=True)]
        metrics = self._all_of(tasks)
        return {name: torch.stack([of[name] for of in metrics]) for name in metrics[0]}

    def advance(
        self, data: Sequence[Source], counts: Sequence[int], stop: Callable[[], bool] = lambda: False
    ) -> list[Block | None]:
        """The next updates of each agent, with the batches that its seed draws from its data.

        Args:
            data: M datasets, or what stages their batches. Several may be views of one dataset (`copy.copy`): each
                keeps the rows that are drawn next.
            counts: M: how many updates each agent does at most; 0 for none.
            stop: asked between updates whether to end early; a native block is done to its end.

        Returns:
            for each agent what it did, an update at least; None where its count is 0.
        """
        if not len(data) == len(counts) == len(self):
            raise ValueError(
                f"there are {len(self)} agents, {len(data)} datasets and {len(counts)} counts; give each agent its own"
            )
        blocks: list[Block | None] = [None] * len(self)
        chosen = [i for i, count in enumerate(counts) if count > 0]
        native = [i for i in chosen if takes_blocks(self.agents[i], data[i])]
        if native:
            found = update_native.advance(
                [self.agents[i] for i in native],  # type: ignore[misc]
                [data[i] for i in native],  # type: ignore[misc]
                [counts[i] for i in native],
                self.threads,
            )
            for i, values in zip(native, found, strict=True):
                blocks[i] = list(update_native.names(self.agents[i])), values.double()  # type: ignore[arg-type]
        others = [i for i in chosen if i not in native]
        tasks = [partial(one_by_one, partial(_next, self.agents[i], data[i]), counts[i], stop) for i in others]
        for i, block in zip(others, self._all_of(tasks), strict=True):
            blocks[i] = block
        return blocks

    def act(self, states: Tensor | np.ndarray, *, seeds: Sequence[int] | None = None) -> Tensor | np.ndarray:
        """Each agent's actions for states of its own.

        Args:
            states: [M, B, S].
            seeds: M, of the draws; None takes them from torch's generator.

        Returns:
            [M, B, A], a tensor or array as the states were.
        """
        if not isinstance(states, (Tensor, np.ndarray)):
            raise TypeError(f"states must be a tensor or a NumPy array, got {type(states).__name__}; use np.asarray")
        if seeds is not None and len(seeds) != len(self):
            raise ValueError(f"there are {len(self)} agents and {len(seeds)} seeds; give one for each")
        if states.ndim != 3 or states.shape[0] != len(self):
            raise ValueError(f"states must be [{len(self)}, B, {self.agents[0].state_dim}], got {list(states.shape)}")
        each = [None] * len(self) if seeds is None else list(seeds)
        if seeds is None or self.agents[0].device.type != "cpu":  # in turn, as torch's generator is drawn from
            actions: list[Any] = [
                agent.act(own, seed=seed) for agent, own, seed in zip(self.agents, states, each, strict=True)
            ]
        else:
            tasks = [partial(agent.act, own, seed=s) for agent, own, s in zip(self.agents, states, each, strict=True)]
            actions = self._all_of(tasks)
        return torch.stack(actions) if isinstance(states, Tensor) else np.stack(actions)

    def _all_of(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the tasks return, each an agent's own; on a CPU several at a time."""
        workers = min(self.threads, len(tasks))
        if workers < 2 or self.agents[0].device.type != "cpu":
            return [task() for task in tasks]
        # torch's kernels leave the interpreter to others while they compute, and each thread has its share of the cores
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda task: task(), tasks))

    def _stacked(self, name: str) -> Tensor:
        modules = [agent.modules()[name] for agent in self.agents]
        size, flat = modules[0].layout.size, modules[0].flat
        stride = -(-size // _ROW) * _ROW
        memory = torch.zeros(len(modules), stride, dtype=flat.dtype, device=flat.device)
        for i, module in enumerate(modules):
            memory[i, :size] = module.buffer
            # no view: each network's version is counted apart, and who saves or sends one agent does not all
            module.move_into(torch.from_dlpack(memory[i, :size]))
        return memory[:, :size]


def _kind(agent: Agent) -> dict[str, Any]:
    return {
        "algorithm": agent.algorithm,
        "sizes": (agent.state_dim, agent.action_dim),
        "parameters": {name: module.layout.size for name, module in agent.modules().items()},
        "dtype": agent.dtype,
        "device": agent.device,
    }


def takes_blocks(agent: Agent, data: Source) -> bool:
    """Whether nothing but the native path would be run by as many calls of `agent.update`."""
    return (
        isinstance(agent, DiffusionBC)
        and isinstance(data, TransitionDataset)
        and all(getattr(getattr(agent, name), "__func__", None) in own for name, own in _DONE_NATIVELY.items())
        and update_native.takes_blocks(agent, data)
    )


def _next(agent: Agent, data: Source) -> dict[str, Tensor]:
    return agent.update(data.sample(agent.config.batch_size, agent.config.seed, agent.step))


def one_by_one(update: Callable[[], dict[str, Tensor]], count: int, stop: Callable[[], bool]) -> Block:
    """Updates one after the other, one at least, until there are enough or `stop` says so."""
    values: list[Tensor] = []
    while len(values) < count and not (values and stop()):
        metrics = update()
        values.append(torch.stack(list(metrics.values())).double())
    return list(metrics), torch.stack(values)
