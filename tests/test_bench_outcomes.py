"""`bench/outcomes.py`: what became of each test is on the disk, however the process ended."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_report
import gpu_run
import outcomes
import pytest
from parts import Task

TESTS = """
import os, pytest, torch

def test_right(): pass
def test_wrong(): assert 1 == 2, "not equal"
@pytest.fixture
def bad(): raise RuntimeError("no fixture")
def test_error(bad): pass
@pytest.mark.skip(reason="no wish")
def test_skipped(): pass
def test_dies(): os._exit(9)
def test_after(): pass
"""
# A device that answers with errors from the second test on: what torch says of it is all that a host can see.
BROKEN = """
import torch

def dead(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_before(): pass
def test_breaks(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead
    assert False, "wrong result"
def test_after(): pass
"""
BENCH = str(Path(outcomes.__file__).parent)


def pytest_run(folder: Path, *arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "outcomes", "--outcomes", "out.jsonl", "-q", *arguments]
    environment = os.environ | {"PYTHONPATH": BENCH, "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_each_outcome_survives_a_dead_process(folder):
    (folder / "test_it.py").write_text(TESTS)
    assert pytest_run(folder, "--deselect-known") == 9
    collected, found, died = outcomes.read(folder / "out.jsonl")
    assert collected == 6
    assert {name.partition("::")[2]: record["outcome"] for name, record in found.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_error": "error",
        "test_skipped": "skipped",
    }
    assert "not equal" in found["test_it.py::test_wrong"]["why"]
    assert "no fixture" in found["test_it.py::test_error"]["why"]
    assert found["test_it.py::test_skipped"]["why"] == "no wish"
    assert died == ["test_it.py::test_dies"]

    assert pytest_run(folder, "--deselect-known") == 0  # what is left
    collected, found, died = outcomes.read(folder / "out.jsonl")
    assert (collected, len(found), died) == (6, 6, [])
    assert found["test_it.py::test_dies"]["why"] == "its process died or was killed"
    assert found["test_it.py::test_after"]["outcome"] == "passed"
    assert pytest_run(folder, "--deselect-known") == 5  # nothing is


def test_a_broken_device_ends_its_process(folder):
    (folder / "test_it.py").write_text(BROKEN)
    assert pytest_run(folder) == outcomes.BROKEN_DEVICE
    _, found, died = outcomes.read(folder / "out.jsonl")
    assert {name.partition("::")[2]: r["outcome"] for name, r in found.items()} == {
        "test_before": "passed",
        "test_breaks": "failed",
    }
    assert died == []
    assert pytest_run(folder, "--deselect-known") == 0
    assert outcomes.read(folder / "out.jsonl")[1]["test_it.py::test_after"]["outcome"] == "passed"


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_several_processes(folder):
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_other.py").write_text(BROKEN)
    pytest_run(folder, "-n", "2")
    collected, found, _ = outcomes.read(folder / "out.jsonl")
    assert (collected, len(found)) == (9, 9)
    failed = {name.partition("::")[2] for name, record in found.items() if record["outcome"] in ("failed", "error")}
    assert failed == {"test_wrong", "test_error", "test_dies", "test_breaks"}


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_several_processes_leave_out_what_is_known(folder):
    (folder / "test_it.py").write_text(TESTS)
    assert pytest_run(folder, "-k", "right or wrong") == 1
    assert pytest_run(folder, "-n", "2", "--deselect-known") == 1
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert sum('"test": "test_it.py::test_right"' in line for line in lines) == 1
    collected, found, died = outcomes.read(folder / "out.jsonl")
    assert (collected, len(found), died) == (6, 6, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_that_hangs_costs_no_other(folder, tmp_path, workers):
    """What hangs ends its process with exit code 1, as failed tests do."""
    for module in ("xdist", "pytest_timeout"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = "import time\ndef test_hangs(): time.sleep(60)\ndef test_after(): pass\n"
    (folder / "test_it.py").write_text(code)
    options = gpu_run._parse(["--device", "cpu"])
    (tmp_path / "scratch").mkdir()
    run = gpu_run.Run(tmp_path / "scratch", options)
    task = Task("hang", run.logs / "hang.log", time.monotonic() + 60, run.environment)
    assert run._pytest(task, [folder / "test_it.py"], "hang", workers=workers, a_test=2) == "1 of 2 failed"
    assert gpu_report.tests_of(run.scratch / "hang.jsonl")["passed"] == 1


def test_a_skipped_file_is_no_test(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"collected": 1}\n{"test": "test_a.py", "outcome": "skipped", "why": "no", "seconds": null}\n')
    assert gpu_report.tests_of(path)["not_reached"] == 1


def test_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"collected": 2}\n{"started": "a"}\n{"test": "a", "outc')
    assert outcomes.read(path) == (2, {}, ["a"])


def test_a_file_that_cannot_be_collected(folder):
    (folder / "test_it.py").write_text("import nothing_of_the_kind\n")
    assert pytest_run(folder) == 2
    found = outcomes.read(folder / "out.jsonl")[1]
    assert found["test_it.py"]["outcome"] == "error"
    assert "nothing_of_the_kind" in found["test_it.py"]["why"]
