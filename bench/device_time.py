"""Device time of a call, apart from what the host spends on it, and what matrix products and copies reach there.

A CUDA graph of a few calls is replayed between two events: launches cost next to nothing then, kernels follow each
other as closely as the device can start them, and what remains is the device's own time. Code that makes the host
wait cannot be captured; of that the profiler adds up the kernels, which leaves out the gaps between them. Each result
says which of the two it is. The caches stay warm: a policy's weights are in L2 in a control loop, too.

The profiler stays attached to its process and slows launches down: time calls from the host before it is first used.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dql.kernels.capture import repeated, replay_seconds

WARM_SECONDS = 0.03  # of replays before the first sample: an idle GPU's clocks are low
SECONDS = 0.1  # of samples
SAMPLE_SECONDS = 2e-3  # of one sample at least, by several calls; events tick in half a microsecond
MIN_SAMPLES, MAX_SAMPLES = 10, 200
MAX_CALLS = 20  # in one graph
ISSUED, ISSUE_SECONDS = 10, 0.02
MATMUL_SIZE = 4096
COPY_BYTES = 1 << 30  # far more than any L2 cache
PRODUCTS = ("fp32", "tf32", "bf16")

Call = Callable[[], object]


@dataclass(frozen=True)
class DeviceTime:
    """Samples of one call's device time.

    Attributes:
        seconds: a call's, one of each sample.
        method: "graph" (replays, gaps between kernels included), "profiler" (the kernels' own time added up), or "host"
            (whole calls, to try the benches where there is no GPU).
        calls: in one sample.
        reason: why no graph was taken; None if one was.
    """

    seconds: list[float]
    method: str
    calls: int
    reason: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """(p10, median, p90)."""
    deciles = statistics.quantiles(seconds, n=10)
    return deciles[0], statistics.median(seconds), deciles[-1]


def device_time(call: Call, no_graph: str | None = None) -> DeviceTime:
    """How long the device works on `call`.

    Args:
        call: queues work on the current stream.
        no_graph: why it cannot be captured, where that is known; then the profiler is asked.
    """
    if not torch.cuda.is_available():
        return DeviceTime([host_time(call, samples=1) * 1e-6] * 2, "host", 1, "there is no GPU")
    if no_graph is not None:
        return _profiled(call, no_graph)
    try:
        once = repeated(call)
    except RuntimeError as error:  # what torch raises of CUDA is one
        return _profiled(call, str(error).strip().splitlines()[0])
    cost = replay_seconds(once)
    calls = max(1, min(int(SAMPLE_SECONDS / cost), MAX_CALLS))
    graph = once if calls == 1 else repeated(call, calls)
    stop = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < stop:
        replay_seconds(graph)
    samples = max(MIN_SAMPLES, min(int(SECONDS / replay_seconds(graph)), MAX_SAMPLES))
    return DeviceTime([replay_seconds(graph) / calls for _ in range(samples)], "graph", calls)


def host_time(call: Call, samples: int = 50) -> float:
    """Median microseconds of a whole call, from the host until the device is idle."""
    times: list[float] = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[samples // 10 :])


def issue_time(call: Call) -> list[float]:
    """Seconds of the host for a call that nothing waits for: until it is queued, kernels of earlier ones still running.

    Each sample is the mean of ISSUED calls from an idle device on, whose launches the driver's queue holds if each has
    up to a hundred; it ends after ISSUE_SECONDS.
    """
    times: list[float] = []
    stop = time.perf_counter() + ISSUE_SECONDS
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < MAX_SAMPLES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ISSUED):
            call()
        times.append((time.perf_counter() - start) / ISSUED)
    torch.cuda.synchronize()
    return times


def _on_device(profiler: Any) -> list[Any]:
    """The kernels, copies and fills that it saw; not the spans that torch draws around an optimizer's."""
    from torch.autograd import DeviceType

    events = profiler.events()
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def _profiled(call: Call, reason: str) -> DeviceTime:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = max(1, min(int(SAMPLE_SECONDS / (time.perf_counter() - start)), MAX_CALLS))
    samples = []
    for i in range(MIN_SAMPLES + 1):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        kernels = _on_device(profiler)
        if i > 0:  # the first profile also starts the profiler
            if not kernels:
                raise RuntimeError("the profiler saw nothing on the device; may this user read CUPTI's activities?")
            samples.append(sum(event.self_device_time_total for event in kernels) * 1e-6 / calls)
    return DeviceTime(samples, "profiler", calls, reason)


@dataclass(frozen=True)
class Launches:
    """What one call starts on the device: kernels, copies and fills, and the time of them all without the gaps."""

    kernels: int
    copies: int
    seconds: float


def launches(call: Call) -> Launches:
    """Of a call that was made before, as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):  # the first one also starts the profiler
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = _on_device(profiler)
    if not events:
        raise RuntimeError("the profiler saw nothing on the device; may this user read CUPTI's activities?")
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
    return Launches(len(events) - copies, copies, sum(event.self_device_time_total for event in events) * 1e-6)


def matmul_flops(precision: str, device: torch.device) -> tuple[float, DeviceTime]:
    """(FLOP/s of torch's product of two square matrices of random numbers, the times it comes from)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        measured = device_time(product)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * MATMUL_SIZE**3 / measured.median, measured


def copy_bytes_per_second(device: torch.device) -> tuple[float, DeviceTime]:
    """(bytes read and written a second by torch's copy of a large tensor, the times it comes from)."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    measured = device_time(lambda: target.copy_(source))
    return 2 * COPY_BYTES / measured.median, measured


def highest_clock(device: torch.device) -> float | None:
    """Of the multiprocessors, in Hz; None where neither nvidia-smi nor torch says."""
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    chosen = [] if uuid is None else [f"--id=GPU-{uuid}"]
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", *chosen]
    try:
        told = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        told = []
    if told and told[0].isdecimal():
        return float(told[0]) * 1e6
    kilohertz = getattr(properties, "clock_rate", None)
    return None if kilohertz is None else float(kilohertz) * 1e3
