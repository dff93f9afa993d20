"""The kernels in Triton: the whole chain in one launch (chain.py), its gradient in three, critics likewise; what an
update has beside (actor.py, update.py, begin.py).

Triton itself is imported when the first of them is made.
"""

import importlib.util
import os
import shutil
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..layout import CriticSpec, DenoiserSpec
from . import internals

if TYPE_CHECKING:
    from .actor import ActorRunner
    from .critic import CriticRunner
    from .runner import ChainRunner

Tensor = torch.Tensor
STAND_IN = ("TRITON_INTERPRET", "interpreted")


def stands_in() -> bool:
    """Whether the interpreter runs the kernels, on NumPy, in a GPU's place: slow, and for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(ordinal: int | None = None) -> str | None:
    """Why no kernel can run on this GPU (None: the current one), or None."""
    if not _installed():
        return 'Triton is not installed; pip install -e ".[triton]" (Linux only; torch builds for CUDA bring it)'
    if (reason := internals.unsupported()) is not None:
        return reason
    if not stands_in() and not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
    if not stands_in() and not _compiler():
        return "Triton needs a C compiler for its launchers and found none; install gcc or clang, or name one in CC"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)


def misfit(spec: DenoiserSpec | CriticSpec, precision: str, rows: int, steps: int, ordinal: int) -> str | None:
    """Why networks within the limits do not fit the GPU: they always do, by smaller tiles."""
    return None


def chain_runner(
    spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str
) -> "ChainRunner":
    """What runs such chains."""
    from .runner import ChainRunner

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
    """What runs an actor's updates: see `actor.ActorRunner`."""
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
    from . import noise

    return noise.normal(seed, K, B, A, device)
