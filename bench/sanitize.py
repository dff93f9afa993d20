"""Small calls of the GPU's backends under NVIDIA's compute-sanitizer: python bench/sanitize.py [TOOL or BACKEND ...]

Tools are memcheck, racecheck, initcheck and synccheck, backends triton and cuda; without any of a kind, all of it. Each
backend's calls run first by themselves, which compiles Triton's kernels, then under each tool. Every tensor gets an
allocation of its own, so that a write beyond one is seen. "cuda" also runs in tilings that it would not choose for so
few rows. Exits 1 if a tool finds something or a result is wrong, 77 where there is nothing to run.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
NOTHING_TO_RUN = 77
FOUND = 9  # compute-sanitizer's exit code, by our wish, where it found something
TIMEOUT = 200  # seconds of a backend under a tool; bench/gpu.sh gives both backends under two tools less than 480
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


def main(arguments: Sequence[str]) -> int:
    import torch

    import dql

    tools = [name for name in TOOLS if name in arguments] or TOOLS
    chosen = [name for name in BACKENDS if name in arguments] or BACKENDS
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    reasons = dql.backends()
    runnable = [name for name in chosen if reasons[name] is None]
    for name in chosen:
        if reasons[name] is not None:
            print(f"{name} was not checked: {reasons[name]}")
    if sanitizer is None or not torch.cuda.is_available() or not runnable:
        missing = "there is no compute-sanitizer here" if sanitizer is None else "no backend runs on a CUDA device here"
        print(f"nothing was checked: {missing}")
        return NOTHING_TO_RUN
    # The compiler and the assembler, which Triton starts, are none of the sanitizer's business.
    common = ["--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    found = False
    for backend in runnable:
        cases = [sys.executable, str(Path(__file__).resolve()), "--cases", backend]
        if _failed(f"{backend}, no tool", cases):
            found = True
            continue
        for tool in tools:
            found |= _failed(f"{backend}, {tool}", [sanitizer, "--tool", tool, *common, *cases])
    return int(found)


def _failed(name: str, command: list[str]) -> bool:
    print(f"== {name}", flush=True)
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code = subprocess.run(command, env=alone, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        print(f"== {name}: not done after {TIMEOUT} s", flush=True)
        return True
    print(f"== {name}: {'passed' if code == 0 else 'it found something' if code == FOUND else f'exit code {code}'}")
    return code != 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--cases"]:
        run_cases(*arguments[1:])
    elif unknown := [name for name in arguments if name not in (*TOOLS, *BACKENDS)]:
        sys.exit(f"unknown {', '.join(unknown)}; there are {', '.join((*TOOLS, *BACKENDS))}")
    else:
        sys.exit(main(arguments))
