"""What an update sees of an agent and of a batch, what it draws, and the averages that every path of it moves."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from dql import noise
from dql.backend.base import Backend
from dql.config import Config
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.networks import FlatModule, TwinCritic
from dql.optimizer import FlatAdam
from dql.policy import DiffusionPolicy
from dql.tensors import plain

Tensor = torch.Tensor


class Sized(Protocol):
    """An agent, or a policy."""

    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


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

    def check_optimizers(self) -> None:
        """Raises RuntimeError for a network that was put in another's place."""

    def lr_scale(self, step: int | None = None) -> float:
        """Factor of the learning rates at this or another step."""

    def ema_weight(self, step: int) -> float:
        """How far the averaged actor goes towards the actor in an update; 0 in most."""

    def compute(self, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
        """An update but for its step's number, by autograd; returns the metrics."""

    def update_natively(self, batch: Batch, seeds: UpdateSeeds, backend: Backend) -> dict[str, Tensor]:
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


def draws_of(agent: Cloner, seeds: UpdateSeeds, B: int) -> Draws:
    """What the agent's next update draws for a batch of B rows, and its schedules."""
    policy = agent.policy
    t = noise.integers(seeds.bc_t, policy.T, B)
    if policy.device.type == "cuda":
        t = t.pin_memory().to(policy.device, non_blocking=True)  # from other memory the copy may wait for the GPU
    maximised = 1 if int(noise.integers(seeds.coin, 2, 1)) else 2
    lr_scale, ema_weight = agent.lr_scale(), agent.ema_weight(agent.step)
    return Draws(seeds.target, seeds.bc_noise, seeds.actor, t, maximised, lr_scale, ema_weight)


def checked_batch(batch: Batch, agent: Sized, least: int = 1) -> Batch:
    """The batch as plain data, of `least` rows.

    Raises:
        TypeError, ValueError: it does not fit the agent (or policy), or would broadcast: published rewards are [B, 1].
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be a dql.Batch, got {type(batch).__name__}; use dql.Batch(states, actions, ...)")
    for name, value in vars(batch).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"batch.{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
        if value.is_nested or value.layout is not torch.strided:
            plain(f"batch.{name}", value)  # says so
    B, S, A = len(batch.states), agent.state_dim, agent.action_dim
    if least > B:
        raise ValueError("the batch is empty: an update needs at least one transition")
    for name, shape in (
        ("states", [B, S]),
        ("actions", [B, A]),
        ("rewards", [B]),
        ("next_states", [B, S]),
        ("masks", [B]),
    ):
        tensor = getattr(batch, name)
        if list(tensor.shape) != shape:
            raise ValueError(f"batch.{name} must be {shape}, got {list(tensor.shape)}; reshape it")
        if tensor.dtype != agent.dtype or tensor.device != agent.device:
            raise ValueError(
                f"batch.{name} is {tensor.dtype} on {tensor.device}, the agent is {agent.dtype} on {agent.device}; "
                "convert one of them"
            )
    return Batch(
        *(plain(f"batch.{name}", value, whole=True).detach().contiguous() for name, value in vars(batch).items())
    )
