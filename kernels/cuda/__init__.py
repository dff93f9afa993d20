"""The CUDA kernels of csrc/cuda/. Weights stay in the shared memory of a cluster of multiprocessors for the whole chain
where the GPU can do that (compute capability 9.0 and up), else they are streamed.

The extension `dql.kernels._cuda` is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..layout import CriticSpec, DenoiserSpec
from . import binding

if TYPE_CHECKING:
    from .actor import ActorRunner
    from .chain import ChainRunner
    from .critic import CriticRunner

Tensor = torch.Tensor
STAND_IN = ("DQL_CUDA_EMULATE", "emulated")


def stands_in() -> bool:
    """Whether the emulator runs the kernels in a GPU's place."""
    return binding.emulating()


def unavailable(ordinal: int | None = None) -> str | None:
    """Why no kernel can run on this GPU (None: the current one), or None."""
    return binding.unavailable(ordinal)


def misfit(spec: DenoiserSpec | CriticSpec, precision: str, rows: int, steps: int, ordinal: int) -> str | None:
    """Why networks within the limits do not fit the GPU's shared memory, or None."""
    from . import plan

    critic = isinstance(spec, CriticSpec)
    return plan.misfit(plan.Problem(spec, precision, rows, steps, 2 if critic else 1, critic), ordinal)


def chain_runner(
    spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str
) -> "ChainRunner":
    """What runs such chains."""
    from .chain import ChainRunner

    return ChainRunner(spec, table, embedding, max_action, precision)


def critic_runner(spec: CriticSpec, precision: str, device: torch.device) -> "CriticRunner":
    """What runs such critics."""
    from .critic import CriticRunner

    return CriticRunner(spec, precision, device)


def actor_runner(
    spec: DenoiserSpec,
    table: Tensor,
    embedding: Tensor,
    q_sample: Tensor,
    max_action: float,
    predict_epsilon: bool,
    precision: str,
) -> "ActorRunner":
    """What runs a chain of all steps and, beside it, the noise-prediction loss."""
    from .actor import ActorRunner

    return ActorRunner(spec, table, embedding, q_sample, max_action, predict_epsilon, precision)


def update_ops() -> Any:
    """What an update does beside chains and critics: the module `update`."""
    from . import update

    return update


def choose(q: Tensor, actions: Tensor, candidates: int, draw_seed: int | Tensor) -> Tensor:
    """Of each state's candidates one, drawn: see `critic.choose`."""
    from . import critic

    return critic.choose(q, actions, candidates, draw_seed)


def normal(seed: int | Tensor, K: int, B: int, A: int, device: torch.device) -> Tensor:
    """Standard normals [K, B, A] of the seed's stream."""
    from . import chain

    return chain.normal(seed, K, B, A, device)
