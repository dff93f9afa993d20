"""The report of `bench/gpu.sh`: what it reads of tools that are not here, and how it says it in short."""

import json
import re
import runpy
import sys
import tarfile

import pytest
import table
from gpu import report as gpu_report
from gpu.parts import Outcome
from gpu.tools import FOUND, fastest_backend, judge, kernels_seen, told


def test_a_run_is_packed_with_its_last_checkpoint(tmp_path):
    for step in (5, 10, 15):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:09}"
        folder.mkdir(parents=True)
        (folder / "agent.safetensors").write_text("weights")
    (tmp_path / "run" / "metrics.csv").write_text("step,critic/loss\n5,2.5\n15,1.5\n")
    report = gpu_report.Report(tmp_path, tmp_path, "cpu")
    report.write({"train": Outcome("passed")})
    report.pack({})
    with tarfile.open(report.path.with_name(f"{report.path.stem}-run.tar.gz")) as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"run/metrics.csv", "run/checkpoints/step-000000015/agent.safetensors"}
    assert json.loads(report.path.read_text())["train"] == {"metrics": {"step": "15", "critic/loss": "1.5"}}
    assert "train: metrics: step 15, critic/loss 1.5" in report.summary()


def test_failures_are_grouped():
    def failure(test: str, why: str) -> dict:
        return {"test": f"tests/gpu/test_numbers.py::{test}", "outcome": "failed", "why": why}

    cuda = [failure(f"test_fp32[{i}]", f"x\nE   AssertionError: error 0.{i}3, allowed 1e-4") for i in range(30)]
    cuda.append(failure("test_select[a]", "E   RuntimeError: CUDA error: misaligned address"))
    triton = [failure("test_fp32[1]", "E   AssertionError: error 7, allowed 1e-4")]
    groups = gpu_report.grouped({"tests-cuda": {"failures": cuda}, "tests-triton": {"failures": triton}})
    assert groups == [
        (30, "gpu/test_numbers.py::test_fp32", "cuda", "AssertionError: error 0.03, allowed 1e-4"),
        (1, "gpu/test_numbers.py::test_select", "cuda", "RuntimeError: CUDA error: misaligned address"),
        (1, "gpu/test_numbers.py::test_fp32", "triton", "AssertionError: error 7, allowed 1e-4"),
    ]


CHECK = {"backend": "cuda", "precision": "fp32", "kind": "forward", "why": None, "beside": 11}
FOUND_IT = {"what": "B=1", "error": 1e-6, "limit": 1e-4, "us": 12.5, "why": None}


def test_times_beside_others_are_marked():
    line = gpu_report.check_line(CHECK | {"found": [FOUND_IT]})
    assert line == "cuda fp32 forward: B=1 1.0e-06 of 1e-04 12.5 us; times beside 11 others"
    assert "beside" not in gpu_report.check_line(CHECK | {"found": [FOUND_IT | {"us": None}]})


def test_what_hung_is_not_timed(tmp_path):
    hung = "ended after 20 s: it hangs, or compiles too long"
    checks = [CHECK | {"why": hung}, CHECK | {"kind": "gradient"}, CHECK | {"kind": "update", "why": "wrong"}]
    (tmp_path / "checks-cuda.json").write_text(json.dumps(checks))
    triton = {"backend": "triton", "precision": "fp32"}
    checks = [CHECK | triton | {"kind": kind, "why": hung} for kind in ("gradient", "update", "noise")]
    (tmp_path / "checks-triton.json").write_text(json.dumps(checks))
    assert gpu_report.hanging(tmp_path) == [
        "dql-cuda-fp32",
        "(backward and dql-triton-fp32)",
        "(test_update and dql-triton)",
    ]


def test_what_a_check_prints_beside_its_lines():
    line = json.dumps(FOUND_IT)
    assert told(f"{line}\n.version 8.0\n7\n[1]\n{line}\n") == ([FOUND_IT] * 2, ".version 8.0 / 7 / [1]")
    assert told("") == ([], "")


CASES = '{"what": "bf16 B=1", "error": 1e-06}\n{"what": "bf16 B=37", "error": 1e-06}\n'
CLEAN = f"========= COMPUTE-SANITIZER\n{CASES}========= ERROR SUMMARY: 0 errors\n"
BAD = f"""========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at chain+0x70
{CASES}========= ERROR SUMMARY: 3 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at chain+0x10 and Read access at chain+0x20
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("code", "output", "outcome", "findings", "why"),
    [
        (0, CLEAN, "passed", 0, None),
        (FOUND, BAD, "found", 3, "chain+0x70"),
        (FOUND, RACE, "found", 1, "Race reported"),
        (0, RACE.replace("1 error, 0 warnings", "0 errors, 1 warning") + CASES, "found", 1, "Race reported"),
        (0, CASES, "failed", 0, "exit code 0, 2 cases"),
        (0, CLEAN.replace(CASES, ""), "failed", 0, "exit code 0, 0 cases"),
        (1, "RuntimeError: no memory\n", "failed", 0, "exit code 1, 0 cases: RuntimeError: no memory"),
        (None, BAD[:120], "not done", 1, "its time was over"),
        (-9, "", "failed", 0, "exit code -9"),
    ],
)
def test_what_a_sanitizer_found(code, output, outcome, findings, why):
    check = judge(code, output)
    assert (check["outcome"], check["findings"]) == (outcome, findings)
    assert check["why"] is None if why is None else why in check["why"]
    assert check["cases"] == output.count('"what"')


def ncu_csv(kernels: list[tuple[str, dict[str, tuple[str, str]]]]) -> str:
    """As `ncu --csv --page details` prints it, beside its other lines."""
    lines = ['"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"']
    for i, (kernel, metrics) in enumerate(kernels):
        lines += [f'"{i}","{kernel}","S","{name}","{unit}","{value}"' for name, (unit, value) in metrics.items()]
    return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected"])


def test_what_ncu_saw():
    mark = ("void at::native::vectorized_elementwise_kernel<4, at::native::bitwise_not_kernel_cuda>(int)", {})
    mark = (mark[0], {"Duration": ("us", "1.0")})
    chain = ("chain<8, 1>(Arguments)", {"Duration": ("us", "1,012.5"), "Grid": ("%", "3")})
    text = ncu_csv([("early()", {"Duration": ("us", "2")}), mark, chain, ("tail()", {}), mark, chain])
    rows = kernels_seen(text)
    assert [(row["call"], row["kernel"]) for row in rows] == [
        (-1, "early()"),
        (0, "chain<8, 1>(Arguments)"),
        (1, "chain<8, 1>(Arguments)"),
    ]  # "tail()" printed no metric
    assert rows[1]["Duration, us"] == 1012.5
    assert rows[1]["Grid, %"] == 3
    assert kernels_seen("==ERROR== no permission\n") == []


def gpu_row(contender: str, B: int, device: float, call: float, share: float | None) -> dict:
    times = {"device_us": [device] * 3, "call_us": [call] * 3}
    precision = contender.removesuffix("+graph").rpartition("-")[2]
    return {
        "problem": "sample, forward",
        "B": B,
        "contender": contender,
        "share": share,
        "precision": precision,
    } | times


def test_the_table_says_what_is_missing():
    measured = [
        gpu_row("published", 256, 2000.0, 3000.0, None),
        gpu_row("compile-lean+graph", 256, 90.0, 100.0, None),
        gpu_row("dql-cuda-fp32", 256, 20.0, 40.0, 0.5),
        gpu_row("dql-cuda-fp32+graph", 256, 20.0, 25.0, 0.5),
    ]
    text = table.gpu_summary({"device": "cuda", "tables": {table.GPU_TITLE: measured}})
    line = next(line for line in text.splitlines() if line.startswith("| `cuda`, fp32"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["not measured", "not measured", "20.0 us (25.0 us), 120x, 4x, 50%", "not measured", "not measured"]
    assert "| update B=256 | `cuda` | not measured |  |  |  | not measured |" in text
    rows = 3 * 2 * 3 + 3 * 2 + 1  # contenders of three problems: ours, published and compiled, one more in bf16
    assert len(re.findall(r"^\| (?!---|sample|select|update| \|)", text, re.M)) == rows


def test_the_table_of_the_host_and_of_the_model():
    told = {"host_us": [8.0, 9.0, 10.0], "predicted_us": 25.4, "predicted_part": "steps", "tiling": "solo 4"}
    measured = [
        gpu_row("published", 1, 300.0, 9000.0, None) | {"host_us": [1.0] * 3},
        gpu_row("dql-cuda-bf16", 1, 37.3, 73.0, 0.2) | told,
        gpu_row("dql-triton-bf16", 1, 51.7, 80.0, 0.2) | {"host_us": [11.0] * 3, "predicted_us": None},
        gpu_row("dql-cuda-tf32", 1, 39.0, 80.0, 0.2),  # of an older report
    ]
    lines = table.gpu_summary({"device": "cuda", "tables": {table.GPU_TITLE: measured}}).splitlines()
    found = [line for line in lines if line.startswith("| sample, forward | `")]
    assert found == [
        "| sample, forward | `cuda`, bf16 | 1 | 9.0 us | 37.3 us | 25.4 us | steps | solo 4 |",
        "| sample, forward | `triton`, bf16 | 1 | 11.0 us | 51.7 us |  |  |  |",
    ]


def test_the_table_of_an_update():
    timed = {
        "problem": "update B=256",
        "contender": "dql-cuda",
        "median_us": 150.0,
        "speedup_over": {"published": 40.0},
    }
    seen = {"problem": "update B=256", "contender": "dql-cuda", "kernels": 70, "copies": 2, "kernels_alone_us": 120.0}
    text = table.gpu_summary({"device": "cuda", "tables": {table.UPDATE_TITLE: [seen]}, "rows": [timed]})
    assert "| update B=256 | `cuda` | 150 us | 40x | 70 | 2 | 120 us |" in text
    assert "| update B=256 | `cuda` + graph | not measured |  |  |  | not measured |" in text


def test_the_fastest_backend(tmp_path):
    assert fastest_backend(tmp_path) == ("auto", "no update was timed")
    rows = [
        ("published", "update B=256", 9.0),
        ("dql-triton", "update B=256", 5.0),
        ("dql-cuda+graph", "update B=256", 4.0),
    ]
    rows += [("dql-eager", "update B=256, max_q_backup", 1.0)]
    report = {"rows": [{"contender": c, "problem": p, "median_us": us} for c, p, us in rows]}
    (tmp_path / "bench_update-update-0.json").write_text(json.dumps(report))
    (tmp_path / "bench_update-update-1.json").write_text('{"rows": [')  # cut off
    backend, why = fastest_backend(tmp_path)
    assert backend == "cuda+graph"
    assert why == "an update takes 5 us with triton, 4 us with cuda+graph"


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"rows": 3}', '{"parts": 3}'])
def test_what_is_no_report(text, tmp_path, monkeypatch):
    """One sentence that names the file, from both that print reports."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"other.json is no report of a bench; give one, such as bench/results/"):
        table.main([str(path)])
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(SystemExit, match=r"other.json is no report that bench/gpu.sh wrote; give one, such as"):
        runpy.run_path(gpu_report.__file__, run_name="__main__")
