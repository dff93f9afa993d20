"""`bench/gpu/outcomes.py`: what became of each test is on the disk, however the process ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import outcomes

TESTS = """
import os, pytest

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
# A device that answers with errors from the second test on. What torch says of it is all that a host can see, so what
# stands in for torch says no more than that.
TORCH = """
from types import SimpleNamespace

def dead(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = SimpleNamespace(is_initialized=lambda: False, synchronize=dead)
"""
BROKEN = """
import torch

def test_before(): pass
def test_breaks():
    torch.cuda.is_initialized = lambda: True
    assert False, "wrong result"
def test_after(): pass
"""
BENCH = str(Path(outcomes.__file__).parents[1])


def pytest_run(folder: Path, *arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "gpu.outcomes", "--outcomes", "out.jsonl", "-q", *arguments]
    environment = os.environ | {"PYTHONPATH": BENCH, "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


def by_name(found: dict) -> dict[str, str]:
    return {name.partition("::")[2]: record["outcome"] for name, record in found.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "torch.py").write_text(TORCH)
    return tmp_path


def test_each_outcome_survives_a_dead_process(folder):
    (folder / "test_it.py").write_text(TESTS)
    assert pytest_run(folder) == 9
    collected, found = outcomes.read(folder / "out.jsonl")
    assert [name.partition("::")[2] for name in collected if name not in found] == ["test_after"]
    assert by_name(found) == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_error": "error",
        "test_skipped": "skipped",
        "test_dies": "failed",
    }
    assert "not equal" in found["test_it.py::test_wrong"]["why"]
    assert "no fixture" in found["test_it.py::test_error"]["why"]
    assert found["test_it.py::test_skipped"]["why"] == "no wish"
    assert found["test_it.py::test_dies"]["why"] == outcomes.DIED


def test_a_broken_device_ends_its_process(folder):
    (folder / "test_it.py").write_text(BROKEN)
    assert pytest_run(folder) == outcomes.BROKEN_DEVICE
    collected, found = outcomes.read(folder / "out.jsonl")
    assert by_name(found) == {"test_before": "passed", "test_breaks": "failed"}
    assert len(collected) == 3


def test_several_processes(folder):
    """pytest-xdist replaces those that die, and whose device is broken: every test is reached."""
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_other.py").write_text(BROKEN)
    pytest_run(folder, "-n", "2")
    collected, found = outcomes.read(folder / "out.jsonl")
    assert (len(collected), len(found)) == (9, 9)
    red = {name for name, outcome in by_name(found).items() if outcome in ("failed", "error")}
    assert red == {"test_wrong", "test_error", "test_dies", "test_breaks"}


def test_one_backend_alone(folder):
    (folder / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('backend', ['triton', 'cuda', 'eager'])\ndef test_a(backend): pass\n"
        "def test_b(): pass\n"
    )
    of_cuda = {"test_a[cuda]", "test_a[eager]", "test_b"}  # each test runs in one of the two
    for option, wanted in {"--only-backend": {"test_a[triton]"}, "--no-backend": of_cuda}.items():
        (folder / "out.jsonl").unlink(missing_ok=True)
        assert pytest_run(folder, option, "triton") == 0
        assert set(by_name(outcomes.read(folder / "out.jsonl")[1])) == wanted


def test_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"collected": ["a", "b"]}\n{"started": "a"}\n{"test": "a", "outc')
    collected, found = outcomes.read(path)
    assert collected == ["a", "b"]
    assert found == {"a": {"test": "a", "outcome": "failed", "why": outcomes.DIED, "seconds": None}}


def test_what_was_running_when_the_time_was_over(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"collected": ["a", "b"]}\n{"started": "a"}\n{"test": "a", "outc')
    outcomes.cut(path)
    assert outcomes.read(path) == (["a", "b"], {})
    with path.open("a") as file:
        file.write('{"started": "b"}\n')
    assert outcomes.read(path)[1].keys() == {"b"}


def test_a_file_that_cannot_be_collected(folder):
    (folder / "test_it.py").write_text("import nothing_of_the_kind\n")
    assert pytest_run(folder) == 2
    found = outcomes.read(folder / "out.jsonl")[1]
    assert found["test_it.py"]["outcome"] == "error"
    assert "nothing_of_the_kind" in found["test_it.py"]["why"]
