"""The backend "cuda": the kernels of csrc/cuda. Weights stay in the shared memory of a cluster of multiprocessors for
the whole chain where the GPU can do that (compute capability 9.0 and up), else they are streamed. The extension is
loaded when it is first asked for."""

from typing import Any

import torch

from dql.backend.base import Chain
from dql.backend.gpu import GpuBackend
from dql.kernels.cuda import binding
from dql.networks import TwinCritic

Tensor = torch.Tensor


class CudaBackend(GpuBackend):
    """float32 on the FMA units, tf32 and bf16 on tensor cores, on NVIDIA GPUs of compute capability 8.0 and up."""

    name = "cuda"
    in_place = "emulated"
    stand_in = "DQL_CUDA_EMULATE"

    def stands_in(self) -> bool:
        return binding.emulating()

    def unavailable(self, ordinal: int | None = None) -> str | None:
        return binding.unavailable(ordinal)

    def check(self, chain: Chain | None = None) -> str | None:
        if (reason := super().check(chain)) is not None or chain is None:
            return reason
        from dql.kernels.cuda import plan as cuda_plan

        rows = chain.states.size(0) * chain.candidates
        problem = cuda_plan.Problem(chain.spec, chain.precision, rows, chain.table.num_steps, 1, False)
        return cuda_plan.misfit(problem, chain.flat.device.index or 0)

    def takes(self, critic: TwinCritic, precision: str) -> bool:
        if not super().takes(critic, precision):
            return False
        from dql.kernels.cuda import plan as cuda_plan

        problem = cuda_plan.Problem(critic.spec, precision, 1, 1, 2, True)  # whether it fits is not the rows' business
        return cuda_plan.misfit(problem, critic.buffer.device.index or 0) is None

    def make_chain_runner(self, chain: Chain, table: Tensor, embedding: Tensor) -> Any:
        from dql.kernels.cuda.chain import ChainRunner

        return ChainRunner(chain.spec, table, embedding, chain.max_action, chain.precision)

    def make_critic_runner(self, critic: TwinCritic, precision: str) -> Any:
        from dql.kernels.cuda.critic import CriticRunner

        return CriticRunner(critic.spec, precision, critic.buffer.device)

    def run_select(self, *arguments: Any) -> Tensor:
        from dql.kernels.cuda import critic as cuda_critic

        return cuda_critic.select(*arguments)

    def run_normal(self, seed: int | Tensor, K: int, B: int, A: int, device: torch.device) -> Tensor:
        from dql.kernels.cuda import chain as cuda_chain

        return cuda_chain.normal(seed, K, B, A, device)
