"""A pytest plugin for runs that may end badly: what became of each test is on the disk as soon as it is known.

    python -m pytest -p gpu.outcomes --outcomes PATH ...       with bench/ on PYTHONPATH; also under pytest-xdist

A line of JSON each: {"collected": [ids]}, {"started": id}, and {"test": id, "outcome": ..., "why": ..., "seconds": ...}
with an outcome of passed, failed, error or skipped, `why` being a failure's last lines or a skip's reason; and, by
whoever killed it, {"cut": true}.

A test after which CUDA answers with nothing but errors (a kernel wrote where it must not), or a capture of a CUDA graph
is still under way, ends its process: everything after it would fail for no fault of its own. pytest-xdist replaces such
a worker, as it does one that pytest-timeout ended; a process without workers is started again by `run.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BROKEN_DEVICE = 17
WHY_CHARACTERS = 2000
DIED = "its process died or was killed"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, metavar="PATH", help="append each test's outcome to PATH, as JSON lines")
    group.addoption("--only-backend", help="keeps the tests with that backend")
    group.addoption("--no-backend", help="leaves out the tests with these backends, joined by commas")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # the only process, or pytest-xdist's controller
        config.pluginmanager.register(_Writer(path.absolute()), "outcomes-writer")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, others = config.getoption("only_backend"), config.getoption("no_backend")
    if wanted is not None:
        items[:] = [item for item in items if _backend(item) == wanted]
    if others is not None:
        items[:] = [item for item in items if _backend(item) not in others.split(",")]


def _backend(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec else None


def read(path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """(ids collected, the outcome of each that was started and not cut off by the end of the time, by id)."""
    collected: dict[str, None] = {}
    found: dict[str, dict[str, Any]] = {}
    started: dict[str, None] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if "collected" in record:
            collected |= dict.fromkeys(record["collected"])
        elif "started" in record:
            started[record["started"]] = None
        elif "cut" in record:  # what runs then has no outcome
            started.clear()
        elif record["test"] not in found or found[record["test"]]["outcome"] in ("passed", "skipped"):
            found[record["test"]] = record  # its teardown's error counts, too
    died = {"outcome": "failed", "why": DIED, "seconds": None}
    return list(collected), {test: {"test": test} | died for test in started if test not in found} | found


def cut(path: Path) -> None:
    """Whoever ran pytest killed it, for its time was over: that is no fault of the tests that were running."""
    with path.open("a") as file:
        file.write("\n" + json.dumps({"cut": True}) + "\n")  # the last line may be half a one


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.write(collected=list(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:
            self.outcome(report, "error" if report.failed else "skipped", None)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # ??? is pytest-xdist's dead worker
            self.outcome(report, "failed" if report.when in ("call", "???") else "error", report.duration)
        elif report.skipped or report.when == "call":
            self.outcome(report, "skipped" if report.skipped else "passed", report.duration)

    def outcome(self, report: Any, outcome: str, seconds: float | None) -> None:
        why = None
        if outcome == "skipped" and isinstance(report.longrepr, tuple):  # file, line, reason
            why = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif outcome != "passed":
            why = report.longreprtext[-WHY_CHARACTERS:]
        self.write(test=report.nodeid, outcome=outcome, why=why, seconds=seconds)


_failed = False  # a test of this process, since it was last seen that the device still answers


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = _failed or report.failed


@pytest.hookimpl(trylast=True)  # after the report has gone out
def pytest_runtest_logfinish() -> None:
    global _failed
    if _failed and _device_is_broken():
        sys.stdout.flush()
        os._exit(BROKEN_DEVICE)
    _failed = False


def _device_is_broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").item()  # refused where a failed capture left the generator in it
    except RuntimeError:
        return True
    return bool(torch.cuda.current_stream() != torch.cuda.default_stream())  # or torch on its stream
