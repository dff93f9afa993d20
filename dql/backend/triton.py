"""The backend "triton": the whole chain in one kernel on an NVIDIA GPU (kernels/triton/chain.py), its gradient in
three, twin critics and `select` likewise. Triton itself is imported when the first chain is run."""

import importlib.util
import os
import shutil
from functools import cache
from typing import Any

import torch

from dql.backend.base import Chain
from dql.backend.gpu import GpuBackend
from dql.kernels.triton import internals as triton_internals
from dql.networks import TwinCritic

Tensor = torch.Tensor


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, on NumPy: slow, and for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(GpuBackend):
    """float32 (3xTF32, as exact as float32), tf32 or bf16 operands on NVIDIA GPUs of compute capability 8.0 and up."""

    name = "triton"
    in_place = "interpreted"
    stand_in = "TRITON_INTERPRET"

    def stands_in(self) -> bool:
        return interpreted()

    def unavailable(self, ordinal: int | None = None) -> str | None:
        if not _installed():
            return 'Triton is not installed; pip install -e ".[triton]" (Linux only; torch builds for CUDA bring it)'
        if (reason := triton_internals.unsupported()) is not None:
            return reason
        if not interpreted() and not torch.cuda.is_available():
            return "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
        if not interpreted() and not _compiler():
            return "Triton needs a C compiler for its launchers and found none; install gcc or clang, or name one in CC"
        return None

    def make_chain_runner(self, chain: Chain, table: Tensor, embedding: Tensor) -> Any:
        from dql.kernels.triton.runner import ChainRunner

        return ChainRunner(chain.spec, table, embedding, chain.max_action, chain.precision)

    def make_critic_runner(self, critic: TwinCritic, precision: str) -> Any:
        from dql.kernels.triton.critic import CriticRunner

        return CriticRunner(critic.spec, precision, critic.buffer.device)

    def run_select(self, *arguments: Any) -> Tensor:
        from dql.kernels.triton import critic as twin_critic

        return twin_critic.select(*arguments)

    def run_normal(self, seed: int | Tensor, K: int, B: int, A: int, device: torch.device) -> Tensor:
        from dql.kernels.triton import noise as triton_noise

        return triton_noise.normal(seed, K, B, A, device)
