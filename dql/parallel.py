"""One run in several processes, each with its part of every batch: `torchrun --nproc-per-node N -m dql train ...`.

Every process holds the whole agent and the whole dataset, and draws what one process would draw for the whole batch, of
which it computes its rows. The flat gradient of each network is averaged over the processes before it is clipped, so
all take the same step: a run is that of one process with the same batch, to rounding.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dql.agents.base import Agent
from dql.agents.diffusion import DiffusionBC
from dql.config import DIFFUSION, RunConfig
from dql.data import Batch, TransitionDataset
from dql.draws import Draws, UpdateSeeds
from dql.learner import checked_batch, draws_of
from dql.rundir import RunError
from dql.sampler import backend_for
from dql.shown import said

Tensor = torch.Tensor
_PATIENCE = timedelta(hours=12)  # processes wait for the first one while it evaluates


@dataclass(frozen=True)
class Shard:
    """The part of this process in a run of several.

    Attributes:
        rank: of this process; 0 writes and evaluates.
        size: how many there are.
        device: where its part is computed.
    """

    rank: int
    size: int
    device: torch.device

    def part(self, rows: Tensor) -> Tensor:
        """Of what there is for each row of a batch, this process's: [..., B] -> [..., B / size]."""
        each = rows.shape[-1] // self.size
        return rows[..., self.rank * each : (self.rank + 1) * each]

    def first_row(self, rows: int) -> int:
        """The number, in the whole batch, of the first of this process's rows."""
        return self.rank * rows

    def mean_(self, tensor: Tensor) -> Tensor:
        """Averages over the processes, in place."""
        with _together():
            dist.all_reduce(tensor)
        return tensor.div_(self.size)

    def wait(self) -> None:
        """For all processes to come as far as this."""
        self.agree(0, stop=False)

    def agree(self, count: int, stop: bool) -> tuple[int, bool]:
        """(The least count of all processes, whether one wants to stop)."""
        told = torch.tensor([count, -int(stop)], device=self.device)
        with _together():
            dist.all_reduce(told, dist.ReduceOp.MIN)
        least, wanted = told.tolist()
        return least, wanted < 0

    def check_same(self, run: RunConfig, agent: Agent, fingerprint: str) -> None:
        """Also waits for all processes to come as far as this.

        Raises:
            RunError: in all of them, for two that would drift apart or wait for each other in vain.
        """
        settings = {name: value for name, value in run.to_dict().items() if name not in _OF_A_PROCESS}
        digests = {
            "settings": _digest(json.dumps(settings, sort_keys=True, default=str).encode()),
            "datasets": _digest(fingerprint.encode()),
            "updates done": agent.step,
            "networks and optimizers": _digest(
                *(tensor.detach().cpu().contiguous().numpy().data for tensor in agent.tensors().values())
            ),
        }
        own = torch.tensor(list(digests.values()), device=self.device)
        least_and_most = torch.stack([own, -own])
        with _together():
            dist.all_reduce(least_and_most, dist.ReduceOp.MIN)
        for name, least, most in zip(digests, *least_and_most.tolist(), strict=True):
            if least != -most:
                raise RunError(f"the processes of this run differ in their {name}; start all of them alike")


_OF_A_PROCESS = ("run_dir", "device", "data_on")  # what changes nothing that is computed


def _digest(*parts: bytes | memoryview) -> int:
    """A number that int64 holds, and its negative too."""
    digest = hashlib.blake2b(digest_size=7)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at the same time fails in the others when one has ended."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # its own
        raise
    except RuntimeError as error:
        raise RunError(
            f"another process of this run ended, and with it this one ({said(error)}); its own last words say why"
        ) from error


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return _number_of("WORLD_SIZE", 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _number_of(variable: str, default: int) -> int:
    """One of torchrun's in the environment."""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise RunError(f"{variable} is {value!r:.80} in the environment, which torchrun sets to a number; unset it")
    return int(value)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or _number_of("RANK", 0) == 0


@contextmanager
def sharded(runs: Sequence[RunConfig]) -> Iterator[Shard | None]:
    """This process's part of the run; None where it is the only one.

    Raises:
        RunError: the run cannot be cut into so many parts.
    """
    size = processes()
    if size == 1:
        yield None
        return
    if len(runs) > 1:
        raise RunError("several processes share one run, and these are several seeds; start one process for them")
    run, c = runs[0], runs[0].agent
    if c.algorithm not in DIFFUSION:
        raise RunError(f"several processes train {' or '.join(DIFFUSION)}, and this is {c.algorithm}; start one")
    if c.batch_size % size:
        raise RunError(f"--batch-size {c.batch_size} cannot be cut into {size} equal parts, one for each process")
    if run.graphed:
        raise RunError("--graphed records an update of one process; leave it out, or start one process")
    local = _number_of("LOCAL_RANK", 0)
    on_gpu = run.device.startswith("cuda") or (run.device == "auto" and torch.cuda.is_available())
    if on_gpu and local >= torch.cuda.device_count():
        here = _number_of("LOCAL_WORLD_SIZE", size)
        raise RunError(
            f"there are {torch.cuda.device_count()} GPUs for {here} processes; start one process a GPU, or give "
            "--device cpu"
        )
    if dist.is_initialized():
        raise RunError(
            "this process is in a process group of torch.distributed already, and a run of several makes its own; end "
            "that one first, or unset TORCHELASTIC_RUN_ID to train in this process alone"
        )
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    together = False
    try:
        shard = Shard(dist.get_rank(), size, device)
        yield shard
        shard.wait()  # they leave together: who went first would take a connection from the others
        together = True
    finally:
        if together or not on_gpu:  # NCCL's is ended by all at once: one that fails would wait for the others for hours
            dist.destroy_process_group()


@contextmanager
def first_alone(shard: Shard | None) -> Iterator[None]:
    """The first process does the block before the others: what it writes, they read."""
    if shard is not None and shard.rank > 0:
        shard.wait()
    yield
    if shard is not None and shard.rank == 0:
        shard.wait()


class ShardedUpdate:
    """`agent.update` of whole batches, of which this process computes its rows.

    Args:
        agent: the same in all processes.
        shard: this process's part.
    """

    def __init__(self, agent: Agent, shard: Shard) -> None:
        assert isinstance(agent, DiffusionBC)
        self.agent, self.shard = agent, shard

    def batch(self, data: TransitionDataset) -> Batch:
        """This process's rows of the batch of the agent's next update."""
        c = self.agent.config
        rows = self.shard.part(data.indices(c.batch_size, c.seed, self.agent.step))
        return data.batch(rows).to(self.agent.device)

    @torch.enable_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update.

        Args:
            batch: this process's rows, [B / size, ...].

        Returns:
            the metrics of the whole batch.
        """
        agent, shard = self.agent, self.shard
        batch = checked_batch(batch, agent.policy)
        agent.check_optimizers()
        seeds = UpdateSeeds.of(agent.config.seed, agent.step)
        whole = draws_of(agent, seeds, len(batch.states) * shard.size)
        draws = Draws(**vars(whole) | {"t": shard.part(whole.t), "shard": shard})
        backend = backend_for(batch.states, agent.policy, agent.config.backend)
        metrics = agent.compute(batch, draws, backend)
        agent.step += 1
        return dict(zip(metrics, shard.mean_(torch.stack(list(metrics.values()))).unbind(), strict=True))
