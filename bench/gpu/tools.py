"""What `bench/gpu.sh` asks of the GPU's tools and of what was built, and how it reads their answers."""

import csv
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from json_files import read_json

from dql.kernels import build_record
from gpu.parts import NothingToDoError

ROOT = Path(__file__).parents[2]
# Clocks are not ours to set, and a policy's weights stay in L2; rules are advice, in many lines.
NCU_OPTIONS = (
    *("--csv", "--page", "details", "--print-kernel-base", "demangled", "--profile-from-start", "off"),
    *("--apply-rules", "no", "--clock-control", "none", "--cache-control", "none"),
)
NCU_SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy"),
    *("MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "WarpStateStats"),
)
NCU_MARK = re.compile("bitwise_?not", re.IGNORECASE)  # a kernel of torch's own that separates the calls
FOUND = 9  # compute-sanitizer's exit code, by our wish, where it found something
# torch's libraries ask the driver for functions that it may not have; the compilers that Triton starts are not ours.
SANITIZER_OPTIONS = (
    *("--error-exitcode", str(FOUND), "--report-api-errors", "no", "--target-processes", "application-only", "--tool"),
)
FINDING = re.compile(r"^=+ (?:Invalid|(?:Error|Warning): Race|Uninit|Barrier)", re.MULTILINE)  # its first line


def tool(name: str) -> str:
    """Where NVIDIA's tool is.

    Raises:
        NothingToDoError: it is not here, or no GPU is.
    """
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None or not torch.cuda.is_available():
        raise NothingToDoError(f"there is no {name} here" if found is None else "torch sees no CUDA device")
    return found


def capability(device: str) -> str:
    """Of the GPU, as nvcc names it: "90"; the emulator's, without one."""
    return "{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else "90"


def is_built(wanted: str) -> str | None:
    """What was built before for this GPU of these sources, in words; None if it must be built.

    Both extensions: the GPU backends prepare their calls by the CPU's, and take a slower way without it.
    """
    for extension in (build_record.NATIVE, build_record.CUDA):
        record = build_record.record(extension)
        there = (ROOT / "kernels" / extension.file).exists()
        if not there or not record or not record["built"]:
            return None
        if record.get("sources") != build_record.fingerprint(ROOT / "csrc", extension):
            return None
    if record is None or wanted not in record["architectures"]:
        return None
    return f"the kernels are there, for sm_{', sm_'.join(record['architectures'])}, of these sources"


def told(output: str) -> tuple[list[dict[str, Any]], str]:
    """(the lines of a check, the rest of what it printed, its first 200 characters): compilers print to stdout, too."""
    found, rest = [], []
    for line in output.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and record.keys() >= {"what", "error", "limit", "us", "why"}:
            found.append(record)
        elif line.strip():
            rest.append(line.strip())
    return found, " / ".join(rest)[:200]


def judge(code: int | None, output: str) -> dict[str, Any]:
    """What compute-sanitizer's exit code (None: out of time) and output amount to.

    "passed", "found" (what `why` shows), "failed" (a result is wrong, or it could not run) or "not done" in time; the
    errors or hazards that it counted, the cases that ran.
    """
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    findings = int(summaries[-1]) if summaries else len(FINDING.findall(output))
    cases = output.count('{"what": ')
    told = [line for line in output.splitlines() if line.startswith("=========")]
    said = [line for line in output.splitlines() if line.strip() and not line.startswith("=========")]
    outcome, why = "passed", None
    if code is None:
        outcome, why = "not done", "its time was over"
    elif code == FOUND or findings:  # a race that is only a warning may leave the exit code 0
        outcome, why, findings = "found", "\n".join(told[:40]), max(findings, 1)
    elif code != 0 or not cases or not summaries:
        outcome, why = "failed", f"exit code {code}, {cases} cases: {' / '.join([*said[-1:], *told[-2:]])}"
    return {"outcome": outcome, "why": why, "findings": findings, "cases": cases}


def kernels_seen(text: str) -> list[dict[str, Any]]:
    """A line for each kernel, of what ncu printed as CSV: the number of its call, its name, its metrics with units."""
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row.get("Metric Name"):
            unit = f", {row['Metric Unit']}" if row["Metric Unit"] else ""
            value = row["Metric Value"].replace(",", "")
            number = re.fullmatch(r"-?\d+(\.\d+)?", value)
            kernel[row["Metric Name"] + unit] = float(value) if number else row["Metric Value"]
    rows, call = [], -1
    for kernel in found.values():
        if NCU_MARK.search(kernel["kernel"]):
            call += 1
        else:
            rows.append({"call": call} | kernel)
    return rows


def fastest_backend(folder: Path) -> tuple[str, str]:
    """(backend, with +graph if that was faster; why), by the updates timed before; "auto" where none was."""
    times: dict[str, float] = {}
    for report in map(read_json, sorted(folder.glob("bench_update-*.json"))):
        for row in report["rows"] if report else ():
            if row["contender"].startswith("dql-") and row["problem"].count(",") == 0:
                times[row["contender"].removeprefix("dql-")] = row["median_us"]
    if not times:
        return "auto", "no update was timed"
    told = ", ".join(f"{us:.0f} us with {name}" for name, us in times.items())
    return min(times, key=lambda name: times[name]), f"an update takes {told}"


def unpack_run(packed: Path, folder: Path) -> None:
    """A training run that was packed, into folder/run."""
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
