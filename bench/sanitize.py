"""Small calls of the GPU's backends under NVIDIA's compute-sanitizer: python bench/sanitize.py [TOOL or BACKEND ...]

Tools are memcheck, racecheck, initcheck and synccheck, backends triton and cuda; without any of a kind, all of it. Each
backend's calls run first by themselves, which compiles Triton's kernels, then under each tool, --jobs at a time, for
--seconds altogether. Every tensor gets an allocation of its own, so that a write beyond one is seen. "cuda" also runs
in tilings that it would not choose for so few rows. Exits 1 if a tool finds something, a result is wrong or the time is
over, 77 where there is nothing to run. --json PATH gets a line for each backend and tool.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from json_files import write_json
from parts import OutOfTimeError, Task

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
NOTHING_TO_RUN = 77
STARTED = time.monotonic()  # before torch is imported, which takes part of the limit
TO_WRITE = 3.0  # seconds of the limit, to end what still runs and say so
FOUND = 9  # compute-sanitizer's exit code, by our wish, where it found something
FINDING = re.compile(r"^=+ (?:Invalid|(?:Error|Warning): Race|Uninit|Barrier)", re.MULTILINE)  # its first line
TOLERANCES = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 3e-1}  # that it is right is the tests' business
# B, N or None, S, A, H, hidden layers, T: one row, ends of tiles, paddings, the paper's network
Size = tuple[int, int | None, int, int, int, int, int]
SIZES: tuple[Size, ...] = (
    (1, None, 3, 1, 16, 2, 1),
    (37, None, 11, 3, 48, 4, 2),
    (5, 7, 3, 24, 80, 2, 3),
    (17, None, 17, 6, 256, 3, 5),
)
# Of "cuda": precision, blocks a cluster, 16 rows each, whether weights stay on the chip. 600 rows: some clusters go
# through several tiles, and the last tile has an end. A small network: racecheck of a cluster is slow.
TILINGS = (
    ("bf16", 8, 1, True),
    ("bf16", 4, 2, True),
    ("tf32", 2, 1, True),
    ("fp32", 1, 2, False),
    ("bf16", 1, 4, False),
    ("bf16", 1, 8, False),  # 128 rows: forward alone
)
TILED: Size = (600, None, 17, 6, 64, 3, 2)


@dataclass(frozen=True)
class Check:
    """A backend's calls under a tool.

    Attributes:
        backend, tool: which; "no tool" is the calls alone.
        outcome: "passed", "found" (what `why` shows), "failed" (a result is wrong, or it could not run), "not done" in
            time, "not run".
        why: where it did not pass.
        findings: errors or hazards that the tool counted.
        cases: calls that it got through.
        seconds: that it took.
    """

    backend: str
    tool: str
    outcome: str
    why: str | None
    findings: int = 0
    cases: int = 0
    seconds: float = 0.0


def run_cases(backend: str) -> None:
    """Each size in each precision: forward with drawn and given noise, backward, select; against eager on the CPU."""
    for size in SIZES:
        for precision in TOLERANCES:
            _run(backend, size, precision)
    if backend == "cuda":
        _run_tilings()


def _run_tilings() -> None:
    import torch

    from dql.kernels import cuda_native
    from dql.kernels.cuda_plan import WIDE, Tiling, forced

    capability, _, _, wide = cuda_native.facts(torch.cuda.current_device(), cuda_native.emulating())
    for precision, cluster, m_tiles, resident in TILINGS:
        if (resident and capability < 90) or (m_tiles == WIDE and not wide):
            continue
        with forced(Tiling(cluster, m_tiles, resident)):
            _run("cuda", TILED, precision, f"cluster {cluster}, {16 * m_tiles} rows, ", forward_only=m_tiles == WIDE)


def _run(backend: str, size: Size, precision: str, tiling: str = "", forward_only: bool = False) -> None:
    import torch

    import dql

    B, N, S, A, H, layers, T = size
    torch.manual_seed(0)
    on_cpu = dql.DiffusionPolicy(S, A, 1.0, H, layers, T)
    policy = dql.DiffusionPolicy(S, A, 1.0, H, layers, T).to("cuda")
    policy.denoiser.load_state_dict(on_cpu.denoiser.state_dict())
    states = torch.randn(B, S)
    noise = torch.randn(T, B, A) if N is None else torch.randn(T, B, N, A)
    options: dict[str, Any] = {"backend": backend, "precision": precision}
    inputs = states.to("cuda").requires_grad_()
    with torch.no_grad():
        want = dql.sample(states, on_cpu, num_candidates=N, noise=noise, backend="eager")
        dql.sample(inputs, policy, num_candidates=N, seed=1, **options)
    with torch.no_grad() if forward_only else contextlib.nullcontext():
        got = dql.sample(inputs, policy, num_candidates=N, noise=noise.to("cuda"), **options)
    if not forward_only:
        torch.autograd.grad(got, [inputs, *policy.denoiser.parameters()], torch.ones_like(got))
        critic = dql.TwinCritic(S, A, H, layers).to("cuda")
        with torch.no_grad():
            dql.select(inputs, policy, critic, num_candidates=N or 5, seed=2, **options)
        if not tiling:
            _critic_gradients(backend, critic, inputs, got.detach())
    torch.cuda.synchronize()
    error = float((got.detach().cpu() - want).abs().max())
    name = f"{backend} B={B} N={N} S={S} A={A} H={H}x{layers} T={T} {tiling}{precision}"
    print(f"{name}: largest error {error:.2g}", flush=True)
    if not error <= TOLERANCES[precision]:
        sys.exit(f"{name}: error {error:.2g}, allowed {TOLERANCES[precision]:g}")


def _critic_gradients(backend: str, critic: Any, states: Any, actions: Any) -> None:
    """Of states, actions and every parameter, in float32, which is all that critics are trained in."""
    import torch

    from dql.backends import registry
    from dql.values import q_values

    inputs = [states.detach().requires_grad_(), actions.requires_grad_()]
    q1, q2 = q_values(critic, inputs[0], inputs[1], registry()[backend])
    torch.autograd.grad((q1 + q2).sum(), [*inputs, *critic.parameters()])


def main(options: argparse.Namespace) -> int:
    import torch

    import dql

    end = STARTED + options.seconds - TO_WRITE
    tools = [name for name in TOOLS if name in options.names] or TOOLS
    chosen = [name for name in BACKENDS if name in options.names] or BACKENDS
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    reasons = dql.backends()
    missing = "there is no compute-sanitizer here" if sanitizer is None else None
    if not torch.cuda.is_available():
        missing = "torch sees no CUDA device"
    checks = []
    for backend in chosen:
        reason = missing or reasons[backend]
        if reason is not None:
            print(f"{backend} is not checked: {reason}")
            checks += [Check(backend, tool, "not run", reason) for tool in tools]
    runnable = [] if missing else [name for name in chosen if reasons[name] is None]
    # The compiler and the assembler, which Triton starts, are none of the sanitizer's business.
    # torch and its libraries ask the driver for functions that it may not have, which would count as errors.
    common = [sanitizer or "", "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    common += ["--target-processes", "application-only", "--tool"]

    def cases(backend: str) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "--cases", backend]

    def write() -> None:
        if options.json is not None:
            write_json(options.json, [vars(check) for check in checks])

    write()
    with tempfile.TemporaryDirectory() as logs, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(logs)
        alone = [pool.submit(_check, name, "no tool", cases(name), end, folder) for name in runnable]
        for future in alone:
            check = future.result()
            checks.append(check)
            if check.outcome != "passed":
                checks += [Check(check.backend, tool, "not run", "its calls fail without a tool") for tool in tools]
            write()
        right = {check.backend: check.cases for check in checks if check.outcome == "passed"}
        futures = [
            pool.submit(_check, backend, tool, [*common, tool, *cases(backend)], end, folder, wanted)
            for tool in tools
            for backend, wanted in right.items()
        ]
        for future in as_completed(futures):
            checks.append(future.result())
            write()
    if not runnable:
        print(f"nothing was checked: {missing or 'no backend runs on a CUDA device here'}")
        return NOTHING_TO_RUN
    wrong = [f"{check.backend} {check.tool} {check.outcome}" for check in checks if check.outcome != "passed"]
    print(", ".join(wrong) or "all passed")
    return int(any(check.outcome not in ("passed", "not run") for check in checks))


def _check(backend: str, tool: str, command: list[str], end: float, folder: Path, wanted: int = 1) -> Check:
    started, output = time.monotonic(), folder / f"{backend}-{tool.replace(' ', '-')}.log"
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code: int | None = Task(tool, output, end, alone, patience=1.0).run(command)
    except OutOfTimeError:
        code = None
    text = output.read_text(errors="replace") if output.exists() else ""
    check = judge(backend, tool, code, text, time.monotonic() - started, wanted)
    said = (
        f"== {backend}, {tool}: {check.outcome}, {check.findings} findings, {check.cases} cases, {check.seconds:.0f} s"
    )
    print(f"{text}{said}", flush=True)
    return check


def judge(backend: str, tool: str, code: int | None, output: str, seconds: float, wanted: int = 1) -> Check:
    """What a tool's exit code (None: out of time) and output amount to, of so many cases at least."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    findings = int(summaries[-1]) if summaries else len(FINDING.findall(output))
    cases = output.count(": largest error")
    lines = [line for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("=========")]
    said = [line for line in lines if not line.startswith("=========")]

    def check(outcome: str, why: str | None, findings: int = findings) -> Check:
        return Check(backend, tool, outcome, why, findings, cases, seconds)

    if code is None:
        return check("not done", "its time was over")
    if code == FOUND or findings:  # a race that is only a warning may leave the exit code 0
        return check("found", "\n".join(told[:40]), max(findings, 1))
    if code != 0:
        last = " / ".join([*said[-1:], *told[-2:]])
        return check("failed", f"exit code {code}: {last}")
    if cases < wanted:
        return check("failed", f"it saw {cases} of {wanted} cases: {' / '.join(told[-2:])}")
    if tool != "no tool" and not summaries:
        return check("failed", f"it ended without a summary: {' / '.join(told[-2:])}")
    return check("passed", None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cases"]:
        run_cases(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TOOL or BACKEND")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1600.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in (*TOOLS, *BACKENDS)]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join((*TOOLS, *BACKENDS))}")
    sys.exit(main(chosen))
