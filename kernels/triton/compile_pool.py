"""Fresh processes in which Triton compiles, whatever this process is: interpreted, or with a GPU in use."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


@contextlib.contextmanager
def compile_pool(jobs: int | None) -> Iterator[ProcessPoolExecutor]:
    """`jobs` processes without TRITON_INTERPRET, one a core by default; the block's end drops what is not begun.

    Raises:
        ValueError: jobs < 1.
        ChildProcessError: a process died.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise ChildProcessError(
            f"a compiling process died, of {jobs} at a time; if memory ran out, try fewer with --jobs 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # before anything imports Triton: kernels are made for the interpreter or the compiler when they are decorated
    os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
