"""Each kernel of a few calls under NVIDIA Nsight Compute: python bench/profile_kernels.py OUT.json [--seconds S]

Backends triton and cuda, bf16, from B = 1 to 65,536, and fp32 at 256. Caches stay as the calls before left them, clocks
as they are. OUT.json gets what `KEPT` names of each kernel, OUT.csv all that `ncu` printed. Exits 77 where there is no
ncu or nothing to profile. `ncu` prints when the calls have ended, so they end in time: what is left out is said.
"""

import argparse
import csv
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from json_files import write_json
from parts import NOTHING_TO_DO, OutOfTimeError, Task

S, A, T, H, CANDIDATES = 17, 6, 5, 256, 50
FORWARD, BACKWARD, SELECT = "sample, forward", "sample, forward and backward", "select"
CASES = (
    *((FORWARD, B, "bf16") for B in (1, 256, 2500)),
    (FORWARD, 256, "fp32"),
    (BACKWARD, 256, "bf16"),
    (BACKWARD, 256, "fp32"),
    (SELECT, CANDIDATES, "bf16"),
    (FORWARD, 65536, "bf16"),
)
OPTIONS = (
    *("--csv", "--page", "details", "--print-kernel-base", "demangled", "--profile-from-start", "off"),
    *("--apply-rules", "no"),  # advice, in many lines
    *(
        "--clock-control",
        "none",
        "--cache-control",
        "none",
    ),  # clocks are not ours to set, and a policy's weights stay in L2
)
SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
)
KEPT = (
    "Duration",
    "Elapsed Cycles",
    "SM Frequency",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "L1/TEX Cache Throughput",
    "L2 Cache Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "Warp Cycles Per Issued Instruction",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Dynamic Shared Memory Per Block",
    "Static Shared Memory Per Block",
    "Block Size",
    "Grid Size",
    "Cluster Size",
    "Waves Per SM",
)
TO_PRINT = 8.0  # seconds of the limit, for ncu to end
STARTED = time.monotonic()  # before torch is imported, which takes part of the limit
MARK = re.compile("bitwise_?not", re.IGNORECASE)  # a kernel of torch's own that separates the calls


def each(backends: list[str]) -> list[tuple[str, str, int, str]]:
    """(backend, problem, B, precision), the backends in turns: if time runs out it does so for all of them."""
    return [(backend, *case) for case in CASES for backend in backends]


def name_of(backend: str, problem: str, B: int, precision: str) -> str:
    return f"{backend}, {precision}, {problem}, B={B}"


def calls(backends: list[str]) -> Iterator[Callable[[], object]]:
    """The call of each case."""
    import torch

    import dql

    torch.manual_seed(0)
    policy, critic = dql.DiffusionPolicy(S, A, 1.0, H, T=T).to("cuda"), dql.TwinCritic(S, A, H).to("cuda")
    parameters = list(policy.denoiser.parameters())
    for backend, problem, B, precision in each(backends):
        options: dict[str, Any] = {"backend": backend, "precision": precision, "seed": 0}
        states = torch.randn(1 if problem == SELECT else B, S, device="cuda")

        def forward(states: Any = states, options: dict[str, Any] = options) -> object:
            with torch.no_grad():
                return dql.sample(states, policy, **options)

        def backward(states: Any = states, options: dict[str, Any] = options) -> object:
            actions = dql.sample(states, policy, **options)
            return torch.autograd.grad(actions, parameters, torch.ones_like(actions))

        def choose(states: Any = states, options: dict[str, Any] = options) -> object:
            with torch.no_grad():
                return dql.select(states, policy, critic, num_candidates=CANDIDATES, **options)

        call = {FORWARD: forward, BACKWARD: backward, SELECT: choose}[problem]
        yield call


def run_cases(end: float, backends: list[str]) -> None:
    """What ncu watches: each call once, between two marks, until `end` of `time.monotonic`."""
    import torch

    cases = list(calls(backends))
    for call in cases:  # compiled and loaded before
        for _ in range(2):
            call()
    mark = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in cases:
        if time.monotonic() > end:
            break
        torch.bitwise_not(mark)
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernels(text: str, cases: list[str]) -> list[dict[str, Any]]:
    """A line for each kernel, of what ncu printed as CSV: its case, its name, and what `KEPT` names, with the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        kernel = found.setdefault(row["ID"], {"case": None, "kernel": row["Kernel Name"]})
        if row.get("Metric Name") in KEPT:
            unit = f", {row['Metric Unit']}" if row["Metric Unit"] else ""
            kernel[row["Metric Name"] + unit] = _number(row["Metric Value"])
    rows, at = [], -1
    for kernel in found.values():
        if MARK.search(kernel["kernel"]):
            at += 1
        else:
            rows.append(kernel | {"case": cases[at] if 0 <= at < len(cases) else None})
    return rows


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def main(out: Path, seconds: float) -> int:
    import torch

    import dql

    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    reasons = dql.backends()
    runnable = [name for name in ("triton", "cuda") if reasons[name] is None]
    if ncu is None or not runnable or not torch.cuda.is_available():
        print("there is no ncu here" if ncu is None else "no backend runs on a CUDA device here")
        return NOTHING_TO_DO
    sections = [word for section in SECTIONS for word in ("--section", section)]
    end = STARTED + seconds
    cases = [sys.executable, Path(__file__).resolve(), "--cases", f"{end - TO_PRINT:.1f}", *runnable]
    task = Task("ncu", out.with_suffix(".log"), end, patience=1.0)
    try:
        code: int | None = task.run([ncu, *OPTIONS, *sections, *cases], output=out.with_suffix(".csv"))
    except OutOfTimeError:
        code = None
    print(task.log.read_text(errors="replace"))
    text = out.with_suffix(".csv").read_text(errors="replace")
    names = [name_of(*case) for case in each(runnable)]
    rows = kernels(text, names)
    write_json(out, rows)
    for row in rows:
        duration = next(
            (f"{value} {key.removeprefix('Duration, ')}" for key, value in row.items() if key.startswith("Duration")),
            "",
        )
        print(f"{row['case']}: {row['kernel'][:60]} {duration}")
    missed = [name for name in names if name not in {row["case"] for row in rows}]
    if code not in (0, None) or not rows:
        print(*[line for line in text.splitlines() if not line.startswith('"')][-5:], sep="\n")
    elif missed:
        print(f"{len(missed)} of {len(names)} calls were not seen in {seconds:.0f} s: {'; '.join(missed)}")
    return 0 if code == 0 and not missed else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cases"]:
        run_cases(float(sys.argv[2]), sys.argv[3:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    chosen = parser.parse_args()
    sys.exit(main(chosen.out, chosen.seconds))
