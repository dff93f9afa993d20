"""An update of an agent, recorded once as a CUDA graph: a replay of its many small kernels costs the host one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from dql import draws
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.backend.gpu import on_device_of
from dql.config import Config
from dql.data import Batch, TransitionDataset
from dql.datasets.info import FIELDS
from dql.draws import SEEDS, Draws
from dql.kernels.capture import prove, recorded
from dql.learner import checked_batch
from dql.sampler import backend_for
from dql.shown import shown

Tensor = torch.Tensor
_WARM_UPS = 2  # load kernels and tables, and let cuBLAS choose, which a graph cannot hold
AHEAD = 64  # updates whose numbers are drawn at once


@dataclass(frozen=True)
class _Drawn:
    """The numbers of AHEAD updates from `first` on, for this config: each row as `_numbers` wants it, on the device; or
    the seeds, where the device draws."""

    config: Config
    first: int
    rows: Sequence[Tensor] | list[tuple[int, ...]]


class GraphedUpdate:
    """`agent.update` for batches of one size, with the same randomness: update by update the same up to rounding.

    The agent stays what it is: it can be saved, act, or be updated without the graph in between, on one stream. Its
    networks must stay where they are and its config as it is.

    Args:
        agent: on a GPU; recording leaves it unchanged.
        batch_size: B of every batch.

    Raises:
        ValueError: the agent is no diffusion agent or not on a GPU, or batch_size is no positive integer.
        BackendUnavailable: the backend that the agent's config names cannot run this here.
    """

    def __init__(self, agent: DiffusionBC | DiffusionQL, batch_size: int) -> None:
        if not isinstance(agent, DiffusionBC):
            raise ValueError(
                f"an update of DiffusionQL or DiffusionBC can be recorded, none of {type(agent).__name__}; call its own"
            )
        if agent.device.type != "cuda":
            raise ValueError(
                f"a CUDA graph needs the agent on a GPU, it is on {agent.device}; make it with device='cuda', "
                "or call agent.update"
            )
        self._prepare(agent, batch_size)

    def _prepare(self, agent: DiffusionBC | DiffusionQL, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {shown(batch_size)}")
        agent.check_optimizers()
        self.agent, self.batch_size = agent, batch_size
        S, A, device, dtype = agent.policy.state_dim, agent.policy.action_dim, agent.device, agent.policy.dtype
        with torch.inference_mode(False):
            shapes = ((batch_size, S), (batch_size, A), (batch_size,), (batch_size, S), (batch_size,))
            self._batch = Batch(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
            # One copy to the device brings all that an update has of its own: seeds, timesteps, four numbers. A seed
            # takes 16 bytes, as kernels want pointers to be aligned; a double has as many as the integers around it.
            self._numbers = torch.zeros(2 * len(SEEDS) + batch_size + 4, dtype=torch.int64, device=device)
        seeds, self._t, scalars = self._numbers.split((2 * len(SEEDS), batch_size, 4))
        self._seeds, self._scalars = [seed[:1] for seed in seeds.split(2)], scalars.view(torch.float64)
        self._backend = backend_for(self._batch.states, agent.policy, agent.config.backend)
        # A backend may do all that in one launch; the four numbers are float32 then.
        self._beginning, ops = None, self._backend.ops
        if ops is not None and dtype is torch.float32:
            self._scalars = scalars.view(torch.float32)[:4]
            self._beginning = ops.Beginning(
                list(vars(self._batch).values()), self._t, seeds, self._scalars, agent.policy.T
            )
        self._flats = [module.flat for module in agent.modules().values()]
        self._drawn: _Drawn | None = None
        self._stage(list(vars(self._batch).values()))
        self._replay, self._metrics = record(self._body, agent)
        # What the graph reads and writes must stay its own as long as it lives: gradients, tables and their embeddings.
        tables = [policy.step_table() for policy in (agent.policy, getattr(agent, "ema_policy", agent.policy))]
        owners = (*tables, *agent.modules().values())
        self._held = (
            tables,
            agent.policy.q_sample_table(self._batch.actions),
            [dict(owner.kept) for owner in owners],
            [flat.grad for flat in self._flats],
        )
        self._moments, self._chains = agent.moments(), _chains(agent)

    def _body(self) -> dict[str, Tensor]:
        """What is recorded: everything that it reads of an update lies in `_numbers` and `_batch`."""
        scalars = self._scalars.to(self.agent.policy.dtype)
        target, bc_noise, actor = self._seeds
        lr_scale = scalars[2].float()  # whatever the parameters are, a rate in device memory is float32 to torch
        given = Draws(target, bc_noise, actor, self._t, scalars[:2], lr_scale, scalars[3])
        return self.agent.compute(self._batch, given, self._backend)

    def _stage(self, source: list[Tensor], rows: tuple[int, int] | None = None) -> None:
        """Brings the next update's batch and numbers to where they are read: of the numbers one row of a block that was
        drawn ahead, and copied at once, or the seeds alone.

        They depend on step and config alone: a step that was loaded, or done without the graph, finds its own.

        Args:
            source: the five tensors of a batch, or of a dataset.
            rows: of a dataset, see `TransitionDataset.draw`.
        """
        agent, drawn = self.agent, self._drawn
        if drawn is None or drawn.config is not agent.config or not 0 <= agent.step - drawn.first < AHEAD:
            drawn = self._drawn = self._draw()
        row, step = drawn.rows[agent.step - drawn.first], agent.step
        if self._beginning is not None:
            with on_device_of(self._numbers):
                self._beginning.run(
                    source, rows, cast(tuple[int, ...], row), agent.lr_scale(step), agent.ema_weight(step)
                )
            return
        self._numbers.copy_(row)  # type: ignore[arg-type]
        torch._foreach_copy_(list(vars(self._batch).values()), source)

    def _draw(self) -> "_Drawn":
        agent, first = self.agent, self.agent.step
        if self._beginning is not None:
            return _Drawn(agent.config, first, draws.derived(agent.config.seed, first, AHEAD))
        steps = range(first, first + AHEAD)
        host = np.zeros((AHEAD, len(self._numbers)), np.int64)
        seeds, host[:, 2 * len(SEEDS) : -4], coins = draws.drawn(
            agent.config.seed, first, AHEAD, agent.policy.T, self.batch_size
        )
        host[:, : 2 * len(SEEDS) : 2] = seeds
        scalars = host[:, -4:].view(np.float64)
        scalars[:, 0], scalars[:, 1] = coins, 1 - coins
        scalars[:, 2:] = [(agent.lr_scale(step), agent.ema_weight(step)) for step in steps]
        block = torch.from_numpy(host)
        if self._numbers.is_cuda:
            block = block.pin_memory()  # the copy need not wait, and torch keeps the memory until it is done
        return _Drawn(agent.config, first, block.to(self._numbers.device, non_blocking=True).unbind())

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update from a batch, as `agent.update`.

        Args:
            batch: [batch_size, ...], on the agent's device and in its dtype; it is copied.

        Returns:
            the same scalars; the next update writes over them.

        Raises:
            ValueError: a batch of another size, dtype or device.
            RuntimeError: a network was moved or cast, a policy's schedule, bound or prediction changed, or an optimizer
                loaded, after the recording.
        """
        agent = self.agent
        batch = checked_batch(batch, agent.policy)
        if len(batch.states) != self.batch_size:
            raise ValueError(
                f"the batch has {len(batch.states)} rows, this update was recorded for {self.batch_size}; make another "
                "GraphedUpdate for another batch size"
            )
        self._check_recorded()
        self._stage(list(vars(batch).values()))
        return self._run()

    def update_from(self, data: TransitionDataset) -> dict[str, Tensor]:
        """`update(data.sample(batch_size, seed, step))` with the agent's seed and step.

        Where the backend's kernels can, rows are drawn and gathered on the device, in the launch that begins an update.

        Args:
            data: on the agent's device.

        Returns:
            as `update`.

        Raises:
            ValueError, RuntimeError: as `update`.
        """
        agent, source = self.agent, [getattr(data, name) for name in FIELDS]
        sizes = (agent.policy.state_dim, agent.policy.action_dim)
        fits = data.device == agent.device and (data.state_dim, data.action_dim) == sizes
        if self._beginning is None or not fits or not all(tensor.is_contiguous() for tensor in source):
            return self.update(data.sample(self.batch_size, agent.config.seed, agent.step))
        self._check_recorded()
        self._stage(source, data.draw(self.batch_size, agent.config.seed, agent.step))
        return self._run()

    def _check_recorded(self) -> None:
        agent = self.agent
        if any(module.flat is not flat for module, flat in zip(agent.modules().values(), self._flats, strict=True)):
            raise RuntimeError("a network of the agent was moved or cast after its update was recorded; record it anew")
        moments = agent.moments()
        if len(moments) != len(self._moments) or any(a is not b for a, b in zip(moments, self._moments, strict=True)):
            raise RuntimeError(
                "an optimizer of the agent was loaded or replaced after its update was recorded, and the graph has the "
                "old one; make a new GraphedUpdate"
            )
        if _chains(agent) != self._chains:
            raise RuntimeError(
                "the schedule, bound or prediction of the agent's policy was changed after its update was recorded; "
                "record it anew"
            )

    def _run(self) -> dict[str, Tensor]:
        self._replay()
        for flat in self._flats:  # who keeps what belongs to a version must notice
            torch.autograd.graph.increment_version(flat)
        self.agent.step += 1
        return self._metrics


def _chains(agent: DiffusionBC | DiffusionQL) -> list[tuple[object, ...]]:
    """What the chains are beside their denoisers: numbers that a graph holds."""
    policies = (agent.policy, getattr(agent, "ema_policy", agent.policy))
    return [(policy.schedule, policy.max_action, policy.predict_epsilon) for policy in policies]


def record(body: Callable[[], dict[str, Tensor]], agent: DiffusionBC) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """(replay, what the body returned): a CUDA graph of the body, on the agent's GPU; the agent is left as it was."""
    with torch.cuda.device(agent.device), torch.enable_grad(), torch.inference_mode(False), agent.unchanged():
        graph, metrics = recorded(body, warm_ups=_WARM_UPS)
        prove(graph.replay, metrics.values())
    return graph.replay, metrics
