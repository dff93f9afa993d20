"""The kernels in Triton: the whole chain in one launch (chain.py), its gradient in three, critics likewise; what an
update has beside (actor.py, update.py, begin.py).

Triton itself is imported when the first of them is made.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..layout import CriticSpec, DenoiserSpec
from . import internals

if TYPE_CHECKING:
    from .actor import ActorRunner
    from .begin import Beginning
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


def beginning(batch: Sequence[Tensor], t: Tensor, seeds: Tensor, scalars: Tensor, T: int) -> "Beginning":
    """What gathers a batch and draws what an update has of its own, into this memory."""
    from .begin import Beginning

    return Beginning(batch, t, seeds, scalars, T)


def critic_loss(
    q_target: Tensor, rewards: Tensor, masks: Tensor, q: Tensor, discount: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """(d_q [2, B], metrics [3]): see `update.critic_loss`."""
    from . import update

    return update.critic_loss(q_target, rewards, masks, q, discount, candidates)


def q_loss(q: Tensor, maximised: int | Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(d_q [2, B], the loss [1]): see `update.q_loss`."""
    from . import update

    return update.q_loss(q, maximised, eta)


def adam(
    flat: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    lr_scale: float | Tensor,
    max_norm: float,
    average: tuple[Tensor, float | Tensor] | None = None,
) -> Tensor:
    """The gradient's norm [1]: see `update.adam`."""
    from . import update

    return update.adam(flat, gradient, exp_avg, exp_avg_sq, step, lr, lr_scale, max_norm, average)


def choose(q: Tensor, actions: Tensor, candidates: int, draw_seed: int | Tensor) -> Tensor:
    """Of each state's candidates one, drawn: see `critic.choose`."""
    from . import critic

    return critic.choose(q, actions, candidates, draw_seed)


def normal(seed: int | Tensor, K: int, B: int, A: int, device: torch.device) -> Tensor:
    """Standard normals [K, B, A] of the seed's stream."""
    from . import noise

    return noise.normal(seed, K, B, A, device)
