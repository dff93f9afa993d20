"""The report of `bench/gpu.sh`: its parts run here without a GPU, and what it reads of tools that do not."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_report
import gpu_run
import machine
import profile_kernels
import pytest
import table
import torch
import train_run
import wheels
from sanitize import FOUND, judge

BENCH = Path(gpu_run.__file__).parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@NO_GPU
def test_without_a_gpu_it_says_so():
    done = subprocess.run(["bash", str(BENCH / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 3
    assert "no NVIDIA GPU" in done.stderr


@NO_GPU
def test_a_run_from_end_to_end(tmp_path):
    """Every part that needs a GPU says why it did nothing; the report holds it."""
    parts = ["doctor", "profile", "sanitize", "tests"]
    command = [sys.executable, str(BENCH / "gpu_run.py"), "--no-install", "--device", "cpu", "--seconds", "300", *parts]
    done = subprocess.run(command, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert {name: part["outcome"] for name, part in report["parts"].items()} == {
        "doctor": "passed",
        "tests": "passed",
        "profile": "skipped",
        "sanitize": "skipped",
    }
    assert report["parts"]["sanitize"]["why"] == "nothing was checked: torch sees no CUDA device"
    tests = report["tests"]
    assert tests["skipped"] + tests["passed"] == tests["collected"] > 500
    assert tests["skipped_for_want_of_a_device"] > 500
    assert tests["not_reached"] == tests["failed"] == 0
    assert {check["outcome"] for check in report["sanitizer"]} == {"not run"}
    assert len(report["sanitizer"]) == 8  # two backends, four tools
    assert report["sources_sha256"] == machine.sources_sha256()
    assert report["doctor"]["backends"]["eager"] is None
    assert report["train"] is report["profile"] is None
    with tarfile.open(tmp_path / f"{path.stem}-logs.tar.gz") as archive:
        assert "logs/tests.log" in archive.getnames()
    assert f"{tests['skipped']:,} skipped" in done.stdout
    again = subprocess.run([*command[:-4], "doctor"], env=os.environ | {"OUT": str(tmp_path)}, capture_output=True)
    assert again.returncode == 0
    assert len(list(tmp_path.glob("*.json"))) == 2  # no report replaces another


def test_a_run_is_packed_with_its_last_checkpoint(tmp_path):
    for step in (5, 10, 15):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:09}"
        folder.mkdir(parents=True)
        (folder / "agent.safetensors").write_text("weights")
    (tmp_path / "run" / "metrics.csv").write_text("step\n")
    report = gpu_report.Report(tmp_path, tmp_path, tmp_path / "logs", "cpu")
    report.pack()
    with tarfile.open(report.path.with_name(f"{report.path.stem}-run.tar.gz")) as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"run/metrics.csv", "run/checkpoints/step-000000015/agent.safetensors"}


def test_the_least_of_all_parts_fits_into_the_limit():
    stages = [max(gpu_run.LIMITS[name][0] for name in stage) for stage in gpu_run.STAGES]
    assert sum(stages) + gpu_run.TO_FINISH <= gpu_run.SECONDS == 540
    assert all(least <= most for least, most in gpu_run.LIMITS.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frob"], "there is no part frob; there are install doctor"),
        (["--seconds", "3"], "--seconds must be at least 40, got 3"),
        (["--continue-run", "nothing.tar.gz"], "nothing.tar.gz: there is no such file"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_run.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


CASES = "cuda B=1 fp32: largest error 1e-06\ncuda B=37 fp32: largest error 1e-06\n"
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
        (0, CASES, "failed", 0, "without a summary"),
        (0, CLEAN.replace(CASES, ""), "failed", 0, "it saw 0 of 1 cases"),
        (1, "cuda B=1 fp32: error 3, allowed 0.001\n", "failed", 0, "exit code 1: cuda B=1 fp32: error 3"),
        (None, BAD[:120], "not done", 1, "its time was over"),
        (-9, "", "failed", 0, "exit code -9"),
    ],
)
def test_what_a_sanitizer_found(code, output, outcome, findings, why):
    check = judge("cuda", "memcheck", code, output, 2.0)
    assert (check.outcome, check.findings) == (outcome, findings)
    assert check.why is None if why is None else why in check.why
    assert check.cases == output.count("largest error")


def ncu_csv(kernels: list[tuple[str, dict[str, tuple[str, str]]]]) -> str:
    """As `ncu --csv --page details` prints it, beside its other lines."""
    lines = ['"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"']
    for i, (kernel, metrics) in enumerate(kernels):
        lines += [f'"{i}","{kernel}","S","{name}","{unit}","{value}"' for name, (unit, value) in metrics.items()]
    return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected"])


def test_what_ncu_saw():
    mark = ("void at::native::vectorized_elementwise_kernel<4, at::native::bitwise_not_kernel_cuda>(int)", {})
    mark = (mark[0], {"Duration": ("us", "1.0")})
    chain = ("chain<8, 1>(Arguments)", {"Duration": ("us", "1,012.5"), "Nobody asked": ("%", "3")})
    text = ncu_csv([("early()", {"Duration": ("us", "2")}), mark, chain, ("tail()", {}), mark, chain])
    rows = profile_kernels.kernels(text, ["first", "second"])
    assert [(row["case"], row["kernel"]) for row in rows] == [
        (None, "early()"),
        ("first", "chain<8, 1>(Arguments)"),
        ("second", "chain<8, 1>(Arguments)"),
    ]  # "tail()" printed no metric
    assert rows[1]["Duration, us"] == 1012.5
    assert "Nobody asked, %" not in rows[1]
    assert profile_kernels.kernels("==ERROR== no permission\n", []) == []


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


def test_worst_differences():
    def curve(*values: float) -> list[dict[str, float]]:
        return [dict.fromkeys(train_run.PARTS_OF_A_CURVE, value) for value in values]

    worst = train_run.worst_differences({"cpu": curve(4.0, -2.0), "gpu": curve(4.0, -1.0)})
    assert worst == dict.fromkeys(train_run.PARTS_OF_A_CURVE, 0.25)
    assert train_run.worst_differences({"gpu": curve(1.0)}) is None


def test_the_fastest_backend(tmp_path):
    assert train_run.fastest_backend(tmp_path) == ("auto", "no update was timed")
    rows = [
        ("published", "update B=256", 9.0),
        ("dql-triton", "update B=256", 5.0),
        ("dql-cuda+graph", "update B=256", 4.0),
    ]
    rows += [("dql-eager", "update B=256, max_q_backup", 1.0)]
    report = {"rows": [{"contender": c, "problem": p, "median_us": us} for c, p, us in rows]}
    (tmp_path / "update-0.json").write_text(json.dumps(report))
    (tmp_path / "update-1.json").write_text('{"rows": [')  # cut off
    backend, why = train_run.fastest_backend(tmp_path)
    assert backend == "cuda+graph"
    assert why == "an update takes 5 us with triton, 4 us with cuda+graph"


def test_the_wheels_are_those_of_the_tests():
    names = {wheels.name_of(requirement) for requirement in wheels.requirements("test")}
    assert {"torch", "gymnasium", "minari", "triton", "onnx", "pytest"} <= names
    assert "openvino" not in names
    assert not any(name.startswith("diffusion-ql") for name in names)
    assert [wheels.name_of(text) for text in ("Foo_Bar.x==1", "minari[hdf5]>=0.5", "  ", "# no")] == [
        "foo-bar-x",
        "minari",
        "",
        "",
    ]
