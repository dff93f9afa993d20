"""A pytest plugin for runs that may end badly: each test's outcome is written down as soon as it is known.

    python -m pytest -p outcomes --outcomes PATH ...       with bench/ on PYTHONPATH; also under pytest-xdist

A line of JSON each: {"collected": N}, {"started": id}, and {"test": id, "outcome": ..., "why": ..., "seconds": ...}
with an outcome of passed, failed, error or skipped, `why` being a failure's last lines or a skip's reason. What
was started and has no outcome was running when the process died.

A test after which CUDA answers with nothing but errors (a kernel wrote where it must not) ends its process with exit
code 17: everything after it would fail for no fault of its own. So does one after which a capture of a CUDA graph is
still under way. pytest-xdist replaces such a worker; without it whoever started pytest may start it again for the tests
that have no line yet (`--deselect-known`).
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

BROKEN_DEVICE = 17
WHY_CHARACTERS = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, metavar="PATH", help="append each test's outcome to PATH, as JSON lines")
    group.addoption("--deselect-known", action="store_true", help="leave out the tests that --outcomes names already")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path is None:
        return
    if (given := getattr(config, "workerinput", None)) is not None:
        left_out = set(given["left_out"])
    else:
        writer = _Writer(path.absolute(), config.getoption("deselect_known"))
        config.pluginmanager.register(writer, "outcomes-of-this-process")
        left_out = writer.left_out
    config.pluginmanager.register(_Worker(left_out), "outcomes-of-a-process-with-tests")


def read(path: Path) -> tuple[int, dict[str, dict[str, Any]], list[str]]:
    """(tests collected, the last outcome of each by id, those that were running when their process died)."""
    collected, outcomes, started = 0, {}, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if "collected" in record:
            collected = max(collected, record["collected"])
        elif "started" in record:
            started[record["started"]] = True
        else:
            earlier = outcomes.get(record["test"])
            if earlier is None or earlier["outcome"] in ("passed", "skipped"):  # its teardown's error counts, too
                outcomes[record["test"]] = record
    return collected, outcomes, [test for test in started if test not in outcomes]


def is_test(name: str) -> bool:
    """Or else a file that was skipped, or could not be collected."""
    return "::" in name


class _Writer:
    """Of the process that knows all outcomes: the only one, or pytest-xdist's controller."""

    def __init__(self, path: Path, deselect_known: bool) -> None:
        self.path = path
        self.left_out: set[str] = set()
        if path.exists():
            _, outcomes, died = read(path)
            self.left_out = {name for name in (*outcomes, *died) if is_test(name) and deselect_known}
            for test in died:
                self.write(test=test, outcome="failed", why="its process died or was killed", seconds=None)

    def write(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["left_out"] = sorted(self.left_out)  # the same for a later worker in another's place

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Iterable[str]) -> None:
        self.collected(len(list(ids)))

    def collected(self, new: int) -> None:
        self.write(collected=new + len(self.left_out))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="error", why=_tail(report.longreprtext), seconds=None)
        elif report.skipped:
            self.write(test=report.nodeid, outcome="skipped", why=_reason(report), seconds=None)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            outcome = "failed" if report.when in ("call", "???") else "error"  # ??? is pytest-xdist's dead worker
            self.write(test=report.nodeid, outcome=outcome, why=_tail(report.longreprtext), seconds=report.duration)
        elif report.skipped:
            self.write(test=report.nodeid, outcome="skipped", why=_reason(report), seconds=report.duration)
        elif report.when == "call":
            self.write(test=report.nodeid, outcome="passed", why=None, seconds=report.duration)


class _Worker:
    """Of every process that runs tests, all but those that are left out."""

    def __init__(self, left_out: set[str]) -> None:
        self.left_out = left_out
        self.failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.left_out])
        items[:] = [item for item in items if item.nodeid not in self.left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    @pytest.hookimpl(trylast=True)  # after the report has gone out
    def pytest_runtest_logfinish(self) -> None:
        if self.failed and _device_is_broken():
            sys.stdout.flush()
            os._exit(BROKEN_DEVICE)
        self.failed = False


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


def _tail(text: str) -> str:
    return text[-WHY_CHARACTERS:]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)
