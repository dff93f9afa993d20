"""What the benches compare by: problems that decide something, and checks that can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import rivals
import rows
import torch
from table import race_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("margin", bench_gpu.CLAMP_MARGINS.values(), ids=bench_gpu.CLAMP_MARGINS)
@pytest.mark.parametrize("B", [1, 50])
def test_every_row_of_a_problem_counts(B, margin):
    """At B = 1, too: rows of which rounding would decide are not drawn."""
    states, noise, weights = rivals.problem(B, CPU, margin)
    assert (states.shape, noise.shape, weights.shape) == ((B, rivals.S), (rivals.T, B, rivals.A), (B, rivals.A))
    assert weights.all() and len(states.unique(dim=0)) == B
    with torch.no_grad():
        _, predictions = rivals.LeanActor(rivals.published_actor(CPU)).chain(states, noise)
    assert (torch.stack(predictions).abs() - 1).abs().amin() > margin * 0.999
    assert all(map(torch.equal, rivals.problem(B, CPU, margin), (states, noise, weights)))


def test_norms():
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    assert rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.2) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="of 2 gradients these are off, allowed 1e-02: a by"):
        rivals.check_norms("x", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(2)}, want, 0.01)
    with pytest.raises(AssertionError, match="off"):
        rivals.check_norms("x", want | {"b": torch.full((2,), torch.nan)}, want, 0.2)
    with pytest.raises(AssertionError, match=r"expected to be zero, which compares nothing: \['b'\]"):
        rivals.check_norms("x", want, want | {"b": torch.zeros(2)}, 0.2)


def row(contender: str, seconds: float) -> rows.Row:
    return rows.Row("sample", contender, [seconds] * 3, [1.0] * 3)


def test_a_ratio_says_what_it_compares():
    """A rival in bf16 counts only for what computes in bf16; where none was timed, the float32 one is marked."""
    published, eager = row("published", 1.0), row("dql-eager", 0.8)
    others = [row("openvino-static", 0.4), row("openvino-static-bf16", 0.2), row("compile-lean", 0.5)]
    ours = [row("dql-cpp", 0.1), row("dql-cpp-bf16", 0.05)]
    found = {r["contender"]: r for r in rows.row_reports([published, eager, *others, *ours])}
    assert found["dql-cpp"]["speedup_over"]["best_rival"] == pytest.approx(4.0)
    assert found["dql-cpp"]["best_rival"] == "openvino-static"
    assert found["dql-cpp-bf16"]["speedup_over"]["best_rival"] == pytest.approx(4.0)
    assert found["dql-cpp-bf16"]["best_rival"] == "openvino-static-bf16"
    table = race_table(list(found.values()))
    assert "| OpenVINO, bf16 |" in table
    assert "| 200 ms (openvino-static-bf16) |" in table
    assert "| 50 ms (20x, 4x) |" in table
    alone = rows.row_reports([published, others[0], *ours])
    assert alone[-1]["best_rival"] == "openvino-static"
    assert "| 50 ms (20x, 8x (fp32)) |" in race_table(alone)


def test_an_empty_cell_says_why():
    def of(problem: str, contender: str) -> rows.Row:
        return rows.Row(problem, contender, [0.1] * 3, [1.0] * 3)

    raced = [of(problem, name) for problem in ("update B=256", "select N=50") for name in ("published", "dql-cpp")]
    raced += [of("sample B=1, forward", name) for name in ("published", "openvino", "compile-lean", "dql-cpp-bf16")]
    lines = race_table(rows.row_reports(raced)).splitlines()
    (update,) = [line for line in lines if line.startswith("| update")]
    (select,) = [line for line in lines if line.startswith("| select")]
    assert "has no gradients" in update and "float32 only" in update
    assert "exports no critic" in select and "not measured" in select


def test_a_rival_in_bf16_needs_a_cpu_that_has_it(monkeypatch):
    pytest.importorskip("openvino", reason='needs pip install -e ".[bench]"')
    pytest.importorskip("onnx", reason='needs pip install -e ".[bench]"')
    monkeypatch.setattr(rivals, "_openvino_capabilities", lambda: ["FP32", "INT8"])
    why = rivals.no_runtime("openvino-static-bf16", CPU) or ""
    assert "AVX512_BF16 or AMX" in why and why.endswith("here: FP32, INT8")
    assert rivals.no_runtime("openvino-static", CPU) is None


def test_a_report_tells_its_command(tmp_path):
    report = tmp_path / "report.json"
    command = ["-q", "-p", "no:cacheprovider", "bench/bench_update.py", "-k", "test_update_bc", "--short"]
    environment = os.environ | {"PYTEST_ADDOPTS": "", "DQL_BENCH_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command, "--bench-json", str(report)],
        cwd=Path(rivals.__file__).parents[1], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    told = json.loads(report.read_text())
    assert told["command"].startswith("pytest -q -p no:cacheprovider bench/bench_update.py -k test_update_bc --short ")
    assert told["bench_threads"] == "1"
    assert told["cpu"] and told["sources_sha256"]
    assert ("Quote none of its numbers" in done.stdout) == bool(told["uncommitted_changes"])
