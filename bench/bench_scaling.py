"""Large batches on one core: the time of a row from B = 256 to 65,536, and the memory that a call takes.

Each round times one call of B rows and then as many calls of 256 rows as make B, so both halves are equally long. The
memory is the high-water mark of a fresh process that does one call, less what it held before and less the actions: the
packed weights, the scratch, and every page of code that a first call loads. More than is promised fails.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rivals
import torch
from rivals import S

import dql

SMALL = 256
BATCH_SIZES, SHORT_BATCH_SIZES = (256, 1024, 4096, 16384, 65536), (256, 4096)
SECONDS, SHORT_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 5.0, 1.0, 5, 100
MEMORY_LIMIT = 16.0  # MB
TITLE = "large batches, one thread"
PRECISIONS = [rivals.backend_of(name)[1] for name in rivals.contenders() if name.startswith("dql-cpp")]
# The inputs are written before and the actions allocated during the call; "5" resets the high-water mark.
MEMORY = """
import sys, torch, dql
from rivals import A, S
B, precision = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
policy, states = dql.DiffusionPolicy(S, A), torch.randn(B, S)
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
with torch.no_grad():
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    actions = dql.sample(states, policy, backend="cpp", precision=precision)
    print((kilobytes("VmHWM") - before) * 1024 - actions.numel() * 4)
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "B" in metafunc.fixturenames:
        sizes = SHORT_BATCH_SIZES if metafunc.config.getoption("short") else BATCH_SIZES
        metafunc.parametrize("B", sizes, ids=lambda B: f"B{B}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scaling(
    precision: str,
    B: int,
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: torch.device,
    record: Callable[..., None],
) -> None:
    if device.type != "cpu":
        pytest.skip(f"the backend cpp runs on a CPU, this is {device}")
    policy = dql.DiffusionPolicy.from_published(rivals.published_actor(device).state_dict())
    states = torch.randn(B, S, generator=torch.Generator().manual_seed(0))
    few = states[:SMALL]
    timer = benchmark._timer
    small_times: list[float] = []

    def call(states: torch.Tensor) -> None:
        dql.sample(states, policy, backend="cpp", precision=precision)

    def small_calls() -> None:
        start = timer()
        for _ in range(B // SMALL):
            call(few)
        small_times.append(timer() - start)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            start = time.perf_counter()
            call(states)
            small_calls()
            seconds = SHORT_SECONDS if request.config.getoption("short") else SECONDS
            rounds = max(MIN_ROUNDS, min(int(seconds / (time.perf_counter() - start)), MAX_ROUNDS))
            small_times.clear()
            benchmark.group = f"{TITLE}, {precision}"
            benchmark.pedantic(lambda: call(states), setup=small_calls, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    if benchmark.stats is None:
        return
    times = benchmark.stats.stats.data
    ratios = [time / small for time, small in zip(times, small_times, strict=False)]
    low, median, high = statistics.quantiles(ratios)
    memory = _memory(B, precision)
    record(
        TITLE,
        precision=precision,
        B=B,
        us_per_row=statistics.median(times) / B * 1e6,
        relative_to_256=median,
        quartiles=[low, high],
        rounds=len(times),
        memory_mb=memory,
    )
    assert memory is None or memory <= MEMORY_LIMIT, (
        f"a call of {B} rows takes {memory:.1f} MB beyond its inputs and outputs, promised are {MEMORY_LIMIT:g} MB"
    )


def _memory(B: int, precision: str) -> float | None:
    """MB at most in use during one call, beyond inputs and outputs; None where Linux does not tell."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    command = [sys.executable, "-c", MEMORY, str(B), precision]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1e6
