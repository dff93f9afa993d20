"""Where an update's time goes, on the host and on the device: `dql train --profile FILE`."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dql import update_native
from dql.agents.base import Agent
from dql.agents.diffusion import DiffusionBC
from dql.checkpoint import write_atomically
from dql.config import RunConfig
from dql.data import TransitionDataset
from dql.ensemble import takes_blocks
from dql.kernels.cpp import binding
from dql.parallel import processes
from dql.rundir import RunError
from dql.staging import batches_on
from dql.train import prepare, torch_threads
from dql.update_graphed import GraphedUpdate

_WARM_UPS = 20
_SHOWN = 20  # lines of the table


@dataclass(frozen=True)
class Part:
    """Of an update: milliseconds on the host and on the device, and how often."""

    name: str
    calls: float
    host_ms: float
    device_ms: float


@dataclass(frozen=True)
class Profile:
    """Updates that were measured.

    Attributes:
        update_ms: an update, undisturbed by what measures its parts.
        parts: the longest first, of an update; the host's do not hold what they call in turn.
        device: where its kernels ran.
        trace: the file.
    """

    update_ms: float
    parts: list[Part]
    device: torch.device
    trace: Path

    def show(self, console: Console) -> None:
        on_gpu = self.device.type == "cuda"
        console.print(f"an update takes {self.update_ms:.3f} ms ({1000 / self.update_ms:.1f}/s) on {self.device}")
        table = Table()
        for header in ("part", "calls", "host ms", *(["device ms"] if on_gpu else []), "share"):
            table.add_column(header, justify="left" if header == "part" else "right", overflow="fold")
        total = sum(part.device_ms if on_gpu else part.host_ms for part in self.parts) or 1.0
        for part in self.parts[:_SHOWN]:
            times = [f"{part.host_ms:.3f}", *([f"{part.device_ms:.3f}"] if on_gpu else [])]
            share = (part.device_ms if on_gpu else part.host_ms) / total
            table.add_row(part.name, f"{part.calls:.4g}", *times, f"{share:.1%}")
        console.print(table)
        console.print(
            f"trace: {self.trace}; open it in https://ui.perfetto.dev or chrome://tracing", soft_wrap=True, markup=False
        )


def profile(run: RunConfig, path: str | os.PathLike[str], updates: int = 100) -> Profile:
    """Measures updates of a run that is not begun: nothing but the trace is written.

    Of the backend "cpp" the parts are the phases of its one native call; of all else torch's operations and, on a GPU,
    its kernels.

    Args:
        run: which agent, on which data and device.
        path: of the trace, JSON that https://ui.perfetto.dev and chrome://tracing open.
        updates: how many are measured, after some that are not.

    Raises:
        ValueError: the file is a folder; no updates.
        RunError: it is one of several processes.
        CheckpointError: the file cannot be written. Else as `dql.train.train`.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    if processes() > 1:
        raise RunError("--profile measures an update of one process, and these are several; start one")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the trace is a file, and {path} is a folder; name a file in it")
    write_atomically(path, b"{}")  # so that a file that cannot be written costs no time
    agent, data = prepare(run)
    with torch_threads(run.threads or torch.get_num_threads()):
        return _profiled(run, agent, data, path, updates)


def _profiled(run: RunConfig, agent: Agent, data: TransitionDataset, path: Path, updates: int) -> Profile:
    if isinstance(agent, DiffusionBC) and takes_blocks(agent, data):
        return _of_native(agent, data, path, updates)
    c = agent.config
    with batches_on(data, agent.device) as batches:
        if run.graphed:
            graphed = GraphedUpdate(agent, c.batch_size)  # type: ignore[arg-type]
            if isinstance(batches, TransitionDataset):
                return _of_torch(agent, lambda: graphed.update_from(data), path, updates)
            update = graphed.update
        else:
            update = agent.update
        return _of_torch(agent, lambda: update(batches.sample(c.batch_size, c.seed, agent.step)), path, updates)


def _of_native(agent: DiffusionBC, data: TransitionDataset, path: Path, updates: int) -> Profile:
    threads = torch.get_num_threads()
    events: list[dict[str, Any]] = []
    sums = dict.fromkeys(("outside of the native call", *binding.PHASES), 0)
    phases = list(binding.PHASES)
    if not hasattr(agent, "critic"):
        phases = [phases[i] for i in (0, 5, 9)]

    def span(name: str, began: int, ended: int, thread: int) -> None:
        place = {"ts": began / 1000, "dur": (ended - began) / 1000, "pid": 1, "tid": thread}  # microseconds
        events.append({"ph": "X", "name": name} | place)

    def block(count: int, times: list[torch.Tensor] | None = None) -> int:
        return len(update_native.advance([agent], [data], [count], threads, times)[0])  # type: ignore[list-item]

    _repeat(block, _WARM_UPS)
    began = time.perf_counter()
    _repeat(block, updates)
    update_ms = (time.perf_counter() - began) * 1000 / updates
    done = 0
    while done < updates:
        times: list[torch.Tensor] = []
        called = time.perf_counter_ns()
        count = block(min(updates - done, 16), times)
        returned = time.perf_counter_ns()
        span(f"{count} updates", called, returned, 0)
        inside = times[0][:, : len(phases) + 1].tolist()
        for marks in inside:
            for name, start, end in zip(phases, marks[:-1], marks[1:], strict=True):
                span(name, start, end, 1)
                sums[name] += end - start
        sums["outside of the native call"] += returned - called - sum(marks[-1] - marks[0] for marks in inside)
        done += count
    write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
    parts = [Part(name, 1, total / 1e6 / updates, 0.0) for name, total in sums.items() if total]
    return Profile(update_ms, sorted(parts, key=lambda part: -part.host_ms), agent.device, path)


def _repeat(block: Callable[[int], int], updates: int) -> None:
    while updates > 0:
        updates -= block(updates)


def _of_torch(agent: Agent, update: Callable[[], object], path: Path, updates: int) -> Profile:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = agent.device.type == "cuda"

    def finish() -> None:
        if on_gpu:
            torch.cuda.synchronize(agent.device)

    for _ in range(_WARM_UPS):
        update()
    finish()
    began = time.perf_counter()
    for _ in range(updates):
        update()
    finish()
    update_ms = (time.perf_counter() - began) * 1000 / updates
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch_profile(activities=activities) as seen:
        for _ in range(updates):
            update()
        finish()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(exported))
        write_atomically(path, exported.read_bytes())
    parts = [
        Part(
            event.key,
            event.count / updates,
            event.self_cpu_time_total / 1000 / updates,
            getattr(event, "self_device_time_total", 0.0) / 1000 / updates,
        )
        for event in seen.key_averages()
    ]
    parts.sort(key=lambda part: -(part.device_ms if on_gpu else part.host_ms))
    return Profile(update_ms, parts, agent.device, path)
