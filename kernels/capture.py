"""While a CUDA graph is captured, some things must not be done."""

import contextlib
from collections.abc import Iterator

import torch


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


@contextlib.contextmanager
def capturing(graph: "torch.cuda.CUDAGraph") -> Iterator[None]:
    """`torch.cuda.graph`, after whose failure torch can go on."""
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of a device that is lost; the first error says more
            mend_after_capture(stream)
        raise
