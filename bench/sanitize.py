"""Runs small calls of the backend "triton" under NVIDIA's compute-sanitizer: python bench/sanitize.py [memcheck ...]

First without it, which compiles the kernels, then under each tool (default memcheck and racecheck). Every tensor gets
an allocation of its own, so that a write beyond one is seen. Exits 1 if a tool finds something or a result is wrong,
77 where there is no compute-sanitizer or no GPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
NOTHING_TO_RUN = 77
FOUND = 9  # compute-sanitizer's exit code, by our wish, where it found something
TIMEOUT = 160  # seconds a tool
TOLERANCES = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 3e-1}  # that it is right is the tests' business
# B, N or None, S, A, H, hidden layers, T: one row, ends of tiles, paddings, the paper's network
SIZES = (
    (1, None, 3, 1, 16, 2, 1),
    (37, None, 11, 3, 48, 4, 2),
    (5, 7, 3, 24, 80, 2, 3),
    (17, None, 17, 6, 256, 3, 5),
)


def run_cases() -> None:
    """Each size in each precision: forward with drawn and given noise, backward, select; against eager on the CPU."""
    import torch

    import dql

    for B, N, S, A, H, layers, T in SIZES:
        torch.manual_seed(0)
        on_cpu = dql.DiffusionPolicy(S, A, 1.0, H, layers, T)
        policy = dql.DiffusionPolicy(S, A, 1.0, H, layers, T).to("cuda")
        policy.denoiser.load_state_dict(on_cpu.denoiser.state_dict())
        critic = dql.TwinCritic(S, A, H, layers).to("cuda")
        states = torch.randn(B, S)
        noise = torch.randn(T, B, A) if N is None else torch.randn(T, B, N, A)
        with torch.no_grad():
            want = dql.sample(states, on_cpu, num_candidates=N, noise=noise, backend="eager")
        for precision, tolerance in TOLERANCES.items():
            options: dict[str, Any] = {"backend": "triton", "precision": precision}
            inputs = states.to("cuda").requires_grad_()
            got = dql.sample(inputs, policy, num_candidates=N, noise=noise.to("cuda"), **options)
            torch.autograd.grad(got, [inputs, *policy.denoiser.parameters()], torch.ones_like(got))
            with torch.no_grad():
                dql.sample(inputs, policy, num_candidates=N, seed=1, **options)
                dql.select(inputs, policy, critic, num_candidates=N or 5, seed=2, **options)
            torch.cuda.synchronize()
            error = float((got.detach().cpu() - want).abs().max())
            size = f"B={B} N={N} S={S} A={A} H={H}x{layers} T={T} {precision}"
            print(f"{size}: largest error {error:.2g}", flush=True)
            if not error <= tolerance:
                sys.exit(f"{size}: error {error:.2g}, allowed {tolerance:g}")


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def main(tools: Sequence[str]) -> int:
    import torch

    sanitizer = _sanitizer()
    if sanitizer is None or not torch.cuda.is_available():
        missing = "there is no compute-sanitizer here" if sanitizer is None else "torch sees no CUDA device"
        print(f"nothing was checked: {missing}")
        return NOTHING_TO_RUN
    cases = [sys.executable, str(Path(__file__).resolve()), "--cases"]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # The compiler and the assembler, which Triton starts, are none of the sanitizer's business.
    common = ["--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    if _failed("plain", cases, alone):
        return 1
    failed = [tool for tool in tools if _failed(tool, [sanitizer, "--tool", tool, *common, *cases], alone)]
    return int(bool(failed))


def _failed(name: str, command: list[str], environment: dict[str, str]) -> bool:
    print(f"== {name}", flush=True)
    try:
        code = subprocess.run(command, env=environment, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        print(f"== {name}: not done after {TIMEOUT} s", flush=True)
        return True
    print(f"== {name}: {'passed' if code == 0 else 'it found something' if code == FOUND else f'exit code {code}'}")
    return code != 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments == ["--cases"]:
        run_cases()
    elif unknown := [name for name in arguments if name not in (*TOOLS, "initcheck", "synccheck")]:
        sys.exit(f"unknown tool {', '.join(unknown)}; there are memcheck, racecheck, initcheck, synccheck")
    else:
        sys.exit(main(arguments or TOOLS))
