"""The one way in which CUDA graphs are recorded and timed, and what must not be done meanwhile."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

Tensor = torch.Tensor
T = TypeVar("T")


def refuse_while_capturing() -> None:
    """Loading a kernel or a table is nothing that a CUDA graph can hold.

    Raises:
        RuntimeError: one is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this call needs kernels or tables that are not loaded yet, which a CUDA graph cannot capture; make the "
            "same call once before the capture (torch.cuda.graph's usual warm-up)"
        )


def mend_after_capture(stream: "torch.cuda.Stream | None" = None) -> None:
    """After a capture that failed torch stays on its stream, and its generator believes that one is under way.

    Args:
        stream: becomes the current one; None takes the default stream.
    """
    torch.cuda.set_stream(stream or torch.cuda.default_stream())
    device = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{device}")
    fresh.manual_seed(0)
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())
    torch.cuda.synchronize()


def recorded(
    call: Callable[[], T], *, warm_up: Callable[[], object] | None = None, warm_ups: int = 2, pool: Any = None
) -> "tuple[torch.cuda.CUDAGraph, T]":
    """(a CUDA graph of the call on the current GPU, what the call returned: the memory that each replay writes).

    torch.cuda.graph by itself records on a stream that it makes once, on whichever GPU is the current one then: on
    another GPU the launches go elsewhere, and the graph stays empty. So it is given a stream of this GPU.

    Args:
        call: queues work on the current stream, and waits for nothing.
        warm_up: what is called before (None: the call itself), on a stream of its own: it compiles and loads kernels
            and tables, which a graph cannot hold.
        warm_ups: how often.
        pool: memory that the graph may share, see torch.cuda.graph.

    Raises:
        RuntimeError: the call does what a capture forbids; torch can go on.
    """
    device, before = torch.cuda.current_device(), torch.cuda.current_stream()
    beside = torch.cuda.Stream(device)
    beside.wait_stream(before)
    with torch.cuda.stream(beside):
        for _ in range(warm_ups):
            (warm_up or call)()
    before.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device)):
            result = call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of a device that is lost; the first error says more
            mend_after_capture(before)
        raise
    return graph, result


def repeated(
    call: Callable[[], object], times: int = 1, *, warm_ups: int = 3, pool: Any = None
) -> "torch.cuda.CUDAGraph":
    """A CUDA graph of that many calls, to be timed; see `recorded`."""
    return recorded(lambda: [call() for _ in range(times)], warm_up=call, warm_ups=warm_ups, pool=pool)[0]


def replay_seconds(graph: "torch.cuda.CUDAGraph") -> float:
    """What the device takes for one replay, which is waited for."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


# A NaN that no arithmetic gives: its bits, by the bytes of a number.
_POISON = {8: (torch.int64, 0x7FF800005EED5EED), 4: (torch.int32, 0x7FC05EED), 2: (torch.int16, 0x7FDD)}


def prove(replay: Callable[[], object], written: Iterable[Tensor]) -> None:
    """Replays a graph once and sees that it writes what it must: every element of the tensors, which hold no more than
    its results.

    Raises:
        RuntimeError: it does not.
    """
    bits = [tensor.detach().view(_POISON[tensor.element_size()][0]) for tensor in written if tensor.numel()]
    for view in bits:
        view.fill_(_POISON[view.element_size()][1])
    replay()
    left = [(view == _POISON[view.element_size()][1]).any() for view in bits]
    if left and bool(torch.stack(left).any()):  # the one wait
        raise RuntimeError(
            "the CUDA graph that was recorded does not write its results when it is replayed: its launches went to "
            "another stream or GPU; make the call on the GPU's own current stream, or do without a graph"
        )
