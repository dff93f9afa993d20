"""Timing for all benches: one device, a fixed number of threads, each contender in turns with the published stand-in.

A row of the table is one `benchmark.pedantic` call whose `setup` runs the baseline. So every round is a pair,
(baseline, contender), a few milliseconds apart, and a ratio is the median over pairs: what slows the machine down for
a second slows both halves. The published stand-in is a contender too: its row is timed against itself, and how far
that ratio lies from 1 is how far the others can be trusted.
"""

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import machine
import pytest
import rows
import torch
from json_files import write_json
from rows import Row, Tables

import dql

FULL = {"seconds": 2.5, "min_rounds": 7}
SHORT = {"seconds": 0.4, "min_rounds": 5}
MAX_ROUNDS = 500
WARM_SECONDS, WARM_CALLS = 5e-3, 5  # a short call finds the caches full of the other's code and weights; see `race`
SETTLE_SECONDS = 1e-2  # several threads of one library wait for more work in a busy loop, into the time of the next
RESULTS = Path(__file__).parent.resolve() / "results"
PICTURES = (".png", ".svg", ".pdf")

_ROWS = pytest.StashKey[list[Row]]()
_TABLES = pytest.StashKey[Tables]()
_DEVICE = pytest.StashKey[torch.device]()
_MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dql benches")
    group.addoption("--device", default="cpu", help="cpu (default), cuda, cuda:1, ..., or auto: cuda if there is one")
    group.addoption("--short", action="store_true", help="B = 1 and 256, few rounds, fewer rivals")
    group.addoption("--bench-json", metavar="PATH", type=Path, help="write times, ratios and the machine to PATH")
    group.addoption("--sizes", help="B that bench_gpu.py takes, in this order, such as 256,1")
    group.addoption("--compile-sizes", default="all", help="B that bench_gpu.py compiles rivals for, all or none")
    group.addoption("--histogram", metavar="PATH", type=Path, help="draw the control loop's latencies (png, svg, pdf)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS], config.stash[_TABLES], config.stash[_MACHINE] = [], {}, {}
    config.stash[_DEVICE] = _find_device(config.getoption("device"))
    _refuse_changed_sources(config.getoption("bench_json"))
    picture = config.getoption("histogram")
    if picture is not None and picture.suffix not in PICTURES:
        raise pytest.UsageError(f"--histogram must end in {', '.join(PICTURES)}, got {str(picture)!r}")
    threads = os.environ.get("DQL_BENCH_THREADS", "1")
    if not threads.isdecimal() or int(threads) < 1:
        raise pytest.UsageError(f"DQL_BENCH_THREADS must be a positive integer, got {threads!r}")
    torch.set_num_threads(int(threads))


def _refuse_changed_sources(path: Path | None) -> None:
    """Reports in bench/results are evidence: nobody could measure again what no commit holds."""
    if path is None or RESULTS not in path.resolve().parents:
        return
    if changed := machine.changed_sources():
        raise pytest.UsageError(
            f"--bench-json {path}: {len(changed)} source(s) differ from the commit ({', '.join(changed[:3])}); commit "
            f"them first, or write the report elsewhere than {RESULTS}"
        )


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
        device = torch.device("cuda", device.index or 0)  # as tensors name theirs
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
        flops: floating point operations of a call, to be compared with what the CPU can do at most.
        bf16: whether they are bf16 multiply-adds.

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
        flops: float | None = None,
        bf16: bool = False,
    ) -> Row | None:
        calls = [run] if baseline is None else [baseline, run]
        for call in calls:  # memory pools, lazy initialisation
            once(call)
        # Timed right after the other, a chain of 0.3 ms takes twice as long as in a loop of its own, and five calls to
        # recover: so short calls are made a few times untimed before the one that counts.
        untimed = dict.fromkeys(calls, 0)
        settle = SETTLE_SECONDS if device.type == "cpu" and torch.get_num_threads() > 1 else 0.0
        if rounds is None:
            costs = {call: once(call) for call in calls}
            untimed = {call: min(int(WARM_SECONDS / cost), WARM_CALLS) for call, cost in costs.items()}
            budget = SHORT if request.config.getoption("short") else FULL
            round_cost = sum(settle + cost * (1 + untimed[call]) for call, cost in costs.items())
            rounds = max(budget["min_rounds"], min(int(budget["seconds"] / round_cost), MAX_ROUNDS))
        baseline_times = []

        def warm(call: Callable[[], Any]) -> None:
            if settle:
                time.sleep(settle)
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

        def ceiling() -> float:
            return (rows.fma_ceiling(bf16) or 0.0) if flops is not None and device.type == "cpu" else 0.0

        benchmark.group = problem
        before = ceiling()
        benchmark.pedantic(synchronized, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            return None
        times = list(benchmark.stats.stats.data)
        row = Row(
            problem,
            contender,
            times,
            None if baseline is None else baseline_times[: len(times)],
            worst_error,
            flops,
            max(before, ceiling()) or None,
        )
        if row.speedup is not None:
            benchmark.extra_info["speedup_over_published"] = row.speedup
        request.config.stash[_ROWS].append(row)
        return row

    return run_race


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(title, column=value, ...)` adds a row to a further table, of what is no race with the published code."""

    def add(title: str, **values: Any) -> None:
        request.config.stash[_TABLES].setdefault(title, []).append(values)

    return add


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A backend that cannot run here skips its bench, in the registry's own words."""
    try:
        return (yield)
    except dql.BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    device = config.stash[_DEVICE]
    where = f"({machine.device_name(device)}, {torch.get_num_threads()} thread(s))"
    for title, table in config.stash[_TABLES].items():
        terminalreporter.section(f"{title} {where}")
        rows.write_table(table, terminalreporter.write_line)
    if config.stash[_ROWS] or config.stash[_TABLES]:
        told = _machine(config)
        terminalreporter.section("where this comes from")
        terminalreporter.write_line(machine.provenance(told), red=bool(told["uncommitted_changes"]))
    if config.stash[_ROWS]:
        terminalreporter.section(f"times faster than ... {where}")
        rows.write_rows(config.stash[_ROWS], terminalreporter.write_line)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    _write_report(item.config, None)  # of a run that is killed, what it measured so far is there


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _write_report(session.config, int(exitstatus))


def _write_report(config: pytest.Config, exit_status: int | None) -> None:
    path = config.getoption("bench_json")
    if path is None:
        return
    report = _machine(config) | {
        "short": config.getoption("short"),
        "exit_status": exit_status,
        "rows": rows.row_reports(config.stash[_ROWS]),
        "tables": config.stash[_TABLES],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)  # killed while it is written, the one before remains


def _machine(config: pytest.Config) -> dict[str, Any]:
    """As it was when first asked for: an edit made while the benches run changes nothing of them."""
    if not config.stash[_MACHINE]:
        config.stash[_MACHINE] = machine.machine(config.stash[_DEVICE], config.getoption("benchmark_timer"))
    return config.stash[_MACHINE]
