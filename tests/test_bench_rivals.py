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


def test_a_ratio_compares_like_with_like():
    """What computes in bf16 is compared with rivals in bf16 alone, and with none where none was timed."""
    published, eager = row("published", 1.0), row("dql-eager", 0.8)
    rivals_ = [row("openvino-static", 0.4), row("openvino-static-bf16", 0.2), row("compile-lean", 0.5)]
    ours = [row("dql-cpp", 0.1), row("dql-cpp-bf16", 0.05)]
    found = {r["contender"]: r["speedup_over"] for r in rows.row_reports([published, eager, *rivals_, *ours])}
    assert found["dql-cpp"]["best_rival"] == pytest.approx(4.0)
    assert found["dql-cpp-bf16"]["best_rival"] == pytest.approx(4.0)
    assert found["dql-cpp-bf16"]["published"] == pytest.approx(20.0)
    assert found["dql-cpp"]["best_other"] == pytest.approx(4.0)
    alone = {r["contender"]: r["speedup_over"] for r in rows.row_reports([published, rivals_[0], *ours])}
    assert alone["dql-cpp-bf16"]["best_rival"] is None
    table = race_table(rows.row_reports([published, eager, *rivals_, *ours]))
    assert "| OpenVINO, bf16 |" in table
    assert "| 200 ms (openvino-static-bf16) |" in table


def test_a_rival_in_bf16_needs_a_cpu_that_has_it(monkeypatch):
    monkeypatch.setattr(rivals, "_cpu_flags", lambda: {"avx2"})
    assert rivals.no_runtime("openvino-static-bf16", CPU) == (
        "openvino-static-bf16 needs a CPU with AVX512_BF16 or AMX, which this one has not"
    )
    assert "AVX512" not in (rivals.no_runtime("openvino-static", CPU) or "")


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
