"""Timing for all benches: one device, a fixed number of threads, each contender in turns with the published stand-in.

A row of the table is one `benchmark.pedantic` call whose `setup` runs the baseline. So every round is a pair,
(baseline, contender), a few milliseconds apart, and a ratio is the median over pairs: what slows the machine down for
a second slows both halves. The published stand-in is a contender too: its row is timed against itself, and how far
that ratio lies from 1 is how far the others can be trusted.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dql

FULL = {"seconds": 2.5, "min_rounds": 7}
SHORT = {"seconds": 0.4, "min_rounds": 5}
MAX_ROUNDS = 500
WARM_SECONDS, WARM_CALLS = 5e-3, 5  # a short call finds the caches full of the other's code and weights; see `race`


@dataclass
class Row:
    """One contender at one problem; seconds of each round."""

    problem: str
    contender: str
    times: list[float]
    baseline_times: list[float] | None
    worst_error: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def speedups(self) -> list[float] | None:
        """Baseline / contender of each round."""
        if self.baseline_times is None:
            return None
        return [b / t for b, t in zip(self.baseline_times, self.times, strict=True)]

    @property
    def speedup(self) -> float | None:
        return statistics.median(self.speedups) if self.speedups else None


_ROWS = pytest.StashKey[list[Row]]()
_DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dql benches")
    group.addoption("--device", default="cpu", help="cpu (default), cuda, cuda:1, ..., or auto: cuda if there is one")
    group.addoption("--short", action="store_true", help="B = 1 and 256, few rounds, no torch.compile: for CI")
    group.addoption("--bench-json", metavar="PATH", type=Path, help="write times, ratios and the machine to PATH")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_DEVICE] = _find_device(config.getoption("device"))
    threads = os.environ.get("DQL_BENCH_THREADS", "1")
    if not threads.isdecimal() or int(threads) < 1:
        raise pytest.UsageError(f"DQL_BENCH_THREADS must be a positive integer, got {threads!r}")
    torch.set_num_threads(int(threads))


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device; nvidia-smi must list one, and torch be "
            "built with CUDA"
        )
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what `synchronize` waits for
    return device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.config.stash[_DEVICE]


Race = Callable[..., Row | None]


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any, device: torch.device) -> Race:
    """`race(problem, contender, run, baseline)` times `run` in turns with `baseline` and puts the row on the table.

    Args of the returned function:
        problem: the group of rows it is compared with.
        contender: the row's name.
        run: what is timed. On a GPU a call counts until the device is idle again.
        baseline: what the published code does for the same problem; None where it has none.
        rounds: None fits them into a few seconds, with untimed calls before each for what is short.
        worst_error: of the closeness check that came before, for the report.

    It returns the row, or None under --benchmark-disable.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    timer = benchmark._timer  # perf_counter, or what --benchmark-timer says

    def once(call: Callable[[], Any]) -> float:
        start = timer()
        call()
        synchronize()
        return timer() - start

    def run_race(
        problem: str,
        contender: str,
        run: Callable[[], Any],
        baseline: Callable[[], Any] | None,
        rounds: int | None = None,
        worst_error: float | None = None,
    ) -> Row | None:
        calls = [run] if baseline is None else [baseline, run]
        for call in calls:  # memory pools, lazy initialisation
            once(call)
        # Timed right after the other, a chain of 0.3 ms takes twice as long as in a loop of its own, and five calls to
        # recover: so short calls are made a few times untimed before the one that counts.
        untimed = dict.fromkeys(calls, 0)
        if rounds is None:
            costs = {call: once(call) for call in calls}
            untimed = {call: min(int(WARM_SECONDS / cost), WARM_CALLS) for call, cost in costs.items()}
            budget = SHORT if request.config.getoption("short") else FULL
            round_cost = sum(cost * (1 + untimed[call]) for call, cost in costs.items())
            rounds = max(budget["min_rounds"], min(int(budget["seconds"] / round_cost), MAX_ROUNDS))
        baseline_times = []

        def warm(call: Callable[[], Any]) -> None:
            for _ in range(untimed[call]):
                once(call)

        def setup() -> None:
            if baseline is not None:
                warm(baseline)
                baseline_times.append(once(baseline))
            warm(run)

        def synchronized() -> None:
            run()
            synchronize()

        benchmark.group = problem
        benchmark.pedantic(synchronized, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            return None
        times = list(benchmark.stats.stats.data)
        row = Row(problem, contender, times, None if baseline is None else baseline_times[: len(times)], worst_error)
        if row.speedup is not None:
            benchmark.extra_info["speedup_over_published"] = row.speedup
        request.config.stash[_ROWS].append(row)
        return row

    return run_race


def _problems(rows: list[Row]) -> dict[str, list[Row]]:
    problems: dict[str, list[Row]] = {}
    for row in rows:
        problems.setdefault(row.problem, []).append(row)
    return problems


def _ratio(row: Row, other: Row | None) -> float | None:
    """How many times faster `row` is than `other`, through the baseline that both ran beside."""
    if other is None or row.speedup is None or other.speedup is None:
        return None
    return row.speedup / other.speedup


def _ratios(row: Row, rows: list[Row]) -> dict[str, float | None]:
    others = [r for r in rows if r is not row and r.speedup is not None]
    best = max(others, key=lambda r: r.speedup or 0.0, default=None)
    eager = next((r for r in others if r.contender == "dql-eager"), None)
    return {"published": row.speedup, "eager": _ratio(row, eager), "best_other": _ratio(row, best)}


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A backend that cannot run here skips its bench, in the registry's own words."""
    try:
        return (yield)
    except dql.BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    device = config.stash[_DEVICE]
    write = terminalreporter.write_line
    terminalreporter.section(f"times faster than ... ({_device_name(device)}, {torch.get_num_threads()} thread(s))")
    write(f"{'':28}{'median us':>12}{'published':>12}{'quartiles':>16}{'dql-eager':>12}{'best other':>12}{'rounds':>8}")
    for problem, group in _problems(rows).items():
        write(problem)
        for row in group:
            ratios = [f"{'' if r is None else f'{r:.2f}x':>12}" for r in _ratios(row, group).values()]
            low, _, high = statistics.quantiles(row.speedups) if row.speedups else (0.0, 0.0, 0.0)
            spread = f"{f'{low:.2f} .. {high:.2f}' if row.speedups else '':>16}"
            name, median = f"  {row.contender:26}", f"{row.median * 1e6:>12,.1f}"
            write(name + median + ratios[0] + spread + ratios[1] + ratios[2] + f"{len(row.times):>8}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("bench_json")
    if path is None:
        return
    rows = session.config.stash[_ROWS]
    report = _machine(session.config.stash[_DEVICE], session.config.getoption("benchmark_timer")) | {
        "short": session.config.getoption("short"),
        "exit_status": int(exitstatus),
        "rows": [_row_report(row, group) for group in _problems(rows).values() for row in group],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _row_report(row: Row, group: list[Row]) -> dict[str, Any]:
    return {
        "problem": row.problem,
        "contender": row.contender,
        "median_us": row.median * 1e6,
        "quartiles_us": [q * 1e6 for q in statistics.quantiles(row.times)],
        "min_us": min(row.times) * 1e6,
        "rounds": len(row.times),
        "baseline_median_us": statistics.median(row.baseline_times) * 1e6 if row.baseline_times else None,
        "speedup_over": _ratios(row, group),
        "speedup_over_published_quartiles": statistics.quantiles(row.speedups) if row.speedups else None,
        "worst_error": row.worst_error,
    }


def _machine(device: torch.device, timer: object) -> dict[str, Any]:
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": None if commit is None else bool(_output("git", "status", "--porcelain")),
        "device": device.type,
        "device_name": _device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "timer": str(timer),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
