"""What the tests of the backend "cuda" without a GPU share: its kernels in the emulator (csrc/cuda/emulator/)."""

import importlib
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from dql.backend.registry import registry
from dql.kernels.cuda import binding
from dql.kernels.cuda.plan import Tiling
from support import ROOT
from support.cases import not_interpreted

HEIGHTS = {"fp32": (1, 2), "tf32": (1, 2, 4), "bf16": (1, 2, 4)}  # m_tiles that there are kernels for


@cache
def not_emulated() -> str | None:
    """Why the emulator does not run the kernels here, or None if it does. Compiles it first where that is not done."""
    if not binding.emulating():
        if torch.cuda.is_available():
            return "a CUDA device is there, for the tests of a GPU; set DQL_CUDA_EMULATE=1 to emulate these"
        return "DQL_CUDA_EMULATE=1 was not set before the tests began"
    if not (ROOT / "setup.py").exists():
        return "this is no checkout, so there is nothing to compile the emulated kernels from"
    clean = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "LDFLAGS")}
    command = [sys.executable, "setup.py", "-q", "build_cuda_emulator"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"the emulated kernels cannot be compiled: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    importlib.invalidate_caches()  # somebody may have looked for it in this process before it was there
    return binding.unavailable()


def cannot_run(backend: str) -> str | None:
    """Why its kernels run neither on a GPU nor, emulated or interpreted, in its place; or None."""
    stand_ins = {"cuda": not_emulated, "triton": not_interpreted}
    if backend in stand_ins and not torch.cuda.is_available():
        return stand_ins[backend]()
    return registry()[backend].check()


def skip_without_emulator() -> None:
    """At the head of a module whose tests all need it."""
    if (reason := not_emulated()) is not None:
        pytest.skip(reason, allow_module_level=True)


def tilings(precision: str) -> list[Tiling]:
    """All that there are kernels for, but for 128 rows."""
    resident = [Tiling(cluster, m, True) for cluster in (1, 2, 4, 8) for m in HEIGHTS[precision]]
    return resident + [Tiling(1, m, False) for m in HEIGHTS[precision]]
