"""The emulator in which the CUDA kernels run without a GPU (csrc/cuda/emulator/): compiling it, and all tilings."""

import importlib
import os
import subprocess
import sys

from dql.kernels.cuda.plan import SOLO_ROWS, Tiling
from support import ROOT

HEIGHTS = {"fp32": (1, 2), "tf32": (1, 2, 4), "bf16": (1, 2, 4)}  # m_tiles that there are kernels for


def compile_emulator() -> str | None:
    """Compiles the emulated kernels where that is not done. None, or why it cannot be.

    Of several processes (pytest-xdist's) one does it, and the others wait.
    """
    import fcntl  # which not every system has

    if not (ROOT / "setup.py").exists():
        return "this is no checkout, so there is nothing to compile the emulated kernels from"
    clean = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "LDFLAGS")}
    command = [sys.executable, "setup.py", "-q", "build_cuda_emulator"]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        return f"the emulated kernels cannot be compiled: {said[-1]}"
    importlib.invalidate_caches()  # somebody may have looked for it in this process before it was there
    return None


SOLO = [Tiling.alone(rows) for rows in SOLO_ROWS]  # bf16; those of 4 rows save nothing


def tilings(precision: str) -> list[Tiling]:
    """All that there are kernels for, but for 128 rows and solo blocks."""
    resident = [Tiling(cluster, m, True) for cluster in (1, 2, 4, 8) for m in HEIGHTS[precision]]
    return resident + [Tiling(1, m, False) for m in HEIGHTS[precision]]
