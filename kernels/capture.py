"""While a CUDA graph is captured, some things must not be done."""

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
