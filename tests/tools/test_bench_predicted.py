"""bench/predicted.py: the model of the CUDA kernels' time beside what a report measured."""

import json
import subprocess
import sys

import pytest
import table
from support import ROOT
from support.emulator import compile_emulator

BENCH = ROOT / "bench"
ROW = {"problem": "sample, forward", "contender": "dql-cuda-bf16", "precision": "bf16"}


@pytest.fixture(autouse=True, scope="module")
def _emulator():
    """Whose sizes are asked for."""
    if (reason := compile_emulator()) is not None:
        pytest.skip(reason)


def printed(report: dict, folder) -> subprocess.CompletedProcess:
    path = folder / "report.json"
    path.write_text(json.dumps(report))
    command = [sys.executable, str(BENCH / "predicted.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_line_for_each_measurement(tmp_path):
    rows = [ROW | {"B": B, "device_us": [us] * 3} for B, us in ((256, 41.9), (1, 37.3))]
    rows += [ROW | {"contender": "dql-triton-bf16", "B": 1, "device_us": [5.0] * 3}]
    checks = [{"kind": "clusters", "found": [{"what": f"{n} of {c}"} for c, n in ((2, 66), (4, 30), (8, 15))]}]
    done = printed({"tables": {table.GPU_TITLE: rows}, "gpu": {"multiprocessors": 132}, "checks": checks}, tmp_path)
    assert done.returncode == 0, done.stderr
    _, _, *lines = done.stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:4] for row in cells] == [["1", "bf16", "37.3", "solo 4"], ["256", "bf16", "41.9", "solo 4"]]
    assert all(10 < float(row[4]) < 40 for row in cells)


@pytest.mark.parametrize("text", [None, "no JSON", "[1]", '{"rows": 3}', '{"tables": 3}'])
def test_what_is_no_report(text, tmp_path):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, str(BENCH / "predicted.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{path} is no report of a bench; give one, such as bench/results/REPORT.json\n"


def test_a_report_without_any(tmp_path):
    done = printed({"tables": {}}, tmp_path)
    assert done.returncode == 1
    assert "has no forward pass of cuda" in done.stderr
