"""Batches on a device of data that are not there: gathered by a thread and copied ahead of need.

A block is the batches of a few steps, one after the other in a host buffer:

    the thread          gathers the rows of block b + 2 into one of two pinned buffers
    a stream of its own copies block b + 1 from the other to the device
    the caller          is handed the batches of block b, views of its device memory

`TransitionDataset.indices` is a function of the step, so nothing is guessed, and the batches are those of `sample` to
the bit. The thread makes no call of CUDA, which may not be disturbed while a graph is recorded; all of those are the
caller's, between two updates, and none of them waits unless the device is ahead of the host.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from dql.data import Batch, TransitionDataset
from dql.datasets.info import FIELDS

Tensor = torch.Tensor
Key = tuple[int, int, int]  # batch size, seed, number of the block

STEPS = 32  # of a block
_ALIGNED = 128  # numbers between the starts of tensors, as torch's own memory has them


class Source(Protocol):
    """What batches are had from: a dataset, or its staging."""

    def sample(self, batch_size: int, seed: int, step: int) -> Batch: ...


@contextmanager
def batches_on(data: TransitionDataset, device: torch.device) -> Iterator[Source]:
    """The dataset itself, where its tensors are on the device; else its staging, which ends with the block."""
    if data.device == device:
        yield data
        return
    with Staging(data, device) as staging:
        yield staging


class Lane(Protocol):
    """How a host buffer's numbers come to the device."""

    def buffer(self, count: int) -> Tensor:
        """A host buffer, float32 [count]."""

    def send(self, buffer: Tensor) -> tuple[Tensor, Any]:
        """(the device memory that the numbers will be in, a ticket), without waiting."""

    def sent(self, ticket: Any) -> None:
        """Waits until the buffer may be written again."""

    def receive(self, memory: Tensor, ticket: Any) -> None:
        """Makes what the caller does next wait for the numbers, without waiting itself."""


class HostLane:
    """To a device whose copies wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def buffer(self, count: int) -> Tensor:
        return torch.empty(count)

    def send(self, buffer: Tensor) -> tuple[Tensor, Any]:
        return buffer.to(self.device, copy=True), None

    def sent(self, ticket: Any) -> None:
        pass

    def receive(self, memory: Tensor, ticket: Any) -> None:
        pass


class CudaLane:
    """To a GPU, from pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._last: tuple[Any, torch.cuda.Stream] | None = None

    def buffer(self, count: int) -> Tensor:
        return torch.empty(count, pin_memory=True)

    def send(self, buffer: Tensor) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self.stream):  # whose memory it is then: torch gives it to no other stream meanwhile
            memory = buffer.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return memory, event

    def sent(self, ticket: Any) -> None:
        ticket.synchronize()

    def receive(self, memory: Tensor, ticket: Any) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last is None or self._last[0] is not ticket or self._last[1] != stream:
            stream.wait_event(ticket)
            memory.record_stream(stream)  # freed, it is not written to before this stream is through with it
            self._last = ticket, stream


class Staging:
    """The batches of a dataset on another device, as `TransitionDataset.sample` gives them.

    A batch may be kept: its block's memory is freed with the last of its batches. At most four blocks of STEPS batches
    exist beside those, two on the host and two on the device. To be closed, or used as a context: then no thread is
    left, however the block ends.
    """

    def __init__(
        self, data: TransitionDataset, device: torch.device, *, steps: int = STEPS, lane: Lane | None = None
    ) -> None:
        """Starts with nothing gathered.

        Args:
            data: in the memory of the CPU.
            device: where the batches go.
            steps: batches of a block.
            lane: how they come there; None for the device's own.

        Raises:
            ValueError: the data are on a device.
        """
        if data.device.type != "cpu":
            raise ValueError(f"batches are staged from the CPU's memory, and these data are on {data.device}")
        self.data, self.steps = data, steps
        self._lane: Lane = lane or (CudaLane(device) if device.type == "cuda" else HostLane(device))
        self._pool = ThreadPoolExecutor(1, "dql-staging")
        self._gathering: tuple[Key, Future[Tensor]] | None = None
        self._blocks: dict[Key, tuple[Tensor, Any]] = {}  # sent to the device
        self._buffers: list[tuple[Tensor, Any]] = []  # two, each with the ticket of its last copy; the older one first

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; waits for the rows that it is gathering, if it is."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._gathering = None
        self._blocks.clear()
        self._buffers.clear()

    def sample(self, batch_size: int, seed: int, step: int) -> Batch:
        """The batch of `step`, on the device.

        Raises:
            ValueError: as `TransitionDataset.indices`.
            DatasetError: the data are on disk, and their file was changed by somebody else.
            RuntimeError: it is closed.
        """
        if batch_size < 1 or step < 0:
            self.data.indices(batch_size, seed, step)  # which says why not
        number, row = divmod(step, self.steps)
        key, following = (batch_size, seed, number), (batch_size, seed, number + 1)
        for old in [k for k in self._blocks if k not in (key, following)]:
            del self._blocks[old]
        if key not in self._blocks:
            self._fetch(key)
        memory, ticket = self._blocks[key]
        self._lane.receive(memory, ticket)
        self._look_ahead(following)
        return self._batch(memory.view(self.steps, -1)[row], batch_size)

    def _fetch(self, key: Key) -> None:
        """Has the block sent, waiting for the thread."""
        if self._gathering is not None and self._gathering[0] != key:  # of steps that nobody asked for
            self._take()
        if self._gathering is None:
            self._gather(key)
        self._take()

    def _look_ahead(self, following: Key) -> None:
        """Sends this block if its rows are gathered, and has those of the one after it gathered; waits for neither."""
        after = (*following[:2], following[2] + 1)
        if self._gathering is not None and self._gathering[1].done() and self._gathering[0] != after:
            self._take()
        if self._gathering is None:
            self._gather(after if following in self._blocks else following)

    def _gather(self, key: Key) -> None:
        batch_size, seed, number = key
        count = self.steps * sum(_aligned(batch_size * width) for width in self._widths)
        buffer = None
        if len(self._buffers) == 2:
            buffer, ticket = self._buffers.pop(0)
            self._lane.sent(ticket)
        if buffer is None or len(buffer) != count:
            buffer = self._lane.buffer(count)
        steps = range(number * self.steps, (number + 1) * self.steps)
        rows = torch.stack([self.data.indices(batch_size, seed, step) for step in steps])
        self._gathering = key, self._pool.submit(self._fill, buffer, rows)

    def _fill(self, buffer: Tensor, rows: Tensor) -> Tensor:
        """Runs in the thread."""
        for place, chosen in zip(buffer.view(self.steps, -1), rows, strict=True):
            self.data.fetch(chosen)
            batch = self._batch(place, len(chosen))
            for name in FIELDS:
                torch.index_select(getattr(self.data, name), 0, chosen, out=getattr(batch, name))
        return buffer

    def _take(self) -> None:
        """Sends what the thread gathers, once it has."""
        assert self._gathering is not None
        key, future = self._gathering
        self._gathering = None
        buffer = future.result()
        memory, ticket = self._lane.send(buffer)
        self._buffers.append((buffer, ticket))
        self._blocks[key] = memory, ticket

    @property
    def _widths(self) -> list[int]:
        data = self.data
        return [data.state_dim, data.action_dim, 1, data.state_dim, 1]

    def _batch(self, memory: Tensor, batch_size: int) -> Batch:
        """The tensors of a batch in the memory of one, float32 [numbers]."""
        tensors, start = [], 0
        for name, width in zip(FIELDS, self._widths, strict=True):
            count = batch_size * width
            tensor = memory[start : start + count]
            tensors.append(tensor if name in ("rewards", "masks") else tensor.view(batch_size, width))
            start += _aligned(count)
        return Batch(*tensors)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
