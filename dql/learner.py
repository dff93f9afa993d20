"""What an update sees of an agent, and the averages that every path of it moves."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from dql.backend.base import Backend
from dql.config import Config
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.networks import FlatModule, TwinCritic
from dql.optimizer import FlatAdam
from dql.policy import DiffusionPolicy

Tensor = torch.Tensor


class Cloner(Protocol):
    """An agent that clones behaviour."""

    policy: DiffusionPolicy
    config: Config
    step: int
    actor_adam: FlatAdam

    def modules(self) -> dict[str, FlatModule]:
        """The networks by name."""

    def trained(self) -> list[str]:
        """Names of those that have an optimizer."""

    def lr_scale(self, step: int | None = None) -> float:
        """Factor of the learning rates at this or another step."""

    def ema_weight(self, step: int) -> float:
        """How far the averaged actor goes towards the actor in an update; 0 in most."""

    def compute(self, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
        """An update but for its step's number, by autograd; returns the metrics."""

    def update_natively(self, batch: Batch, seeds: UpdateSeeds) -> dict[str, Tensor]:
        """The same on the backend "cpp", without autograd."""


class Learner(Cloner, Protocol):
    """An agent that learns Q values, too."""

    ema_policy: DiffusionPolicy
    critic: TwinCritic
    critic_target: TwinCritic
    critic_adam: FlatAdam


@torch.no_grad()
def move_averages(agent: Learner, lerp: Callable[[Tensor, Tensor, Any], object], ema_weight: float | Tensor) -> None:
    """The averaged actor by its weight, the target critics by tau, towards what was trained."""
    average, actor = agent.ema_policy.denoiser.flat, agent.policy.denoiser.flat
    if isinstance(ema_weight, Tensor):  # recorded: 0 in most updates, and 0 times infinity is NaN
        average.copy_(torch.where(ema_weight != 0, average.lerp(actor, ema_weight.to(average)), average))
    elif ema_weight:
        lerp(average, actor, ema_weight)
    lerp(agent.critic_target.flat, agent.critic.flat, agent.config.tau)
