"""TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860), as its authors' code has it (commit 8791ad7).

What differs from that code:
1. Randomness is a function of seed and update (`dql.noise`), so that a run resumes exactly.
2. The actor's loss is computed in every update, and a step down it taken in every `policy_delay`-th, as published: its
   metrics are then of every batch.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dql import noise
from dql.agents.base import Agent, checked_actions
from dql.agents.mlp import MLP, check_shapes, checked_file_sizes, checked_states, critic_layout, mlp_layout
from dql.config import Config
from dql.data import Batch
from dql.datasets.info import row_blocks
from dql.learner import checked_batch
from dql.networks import FlatModule, TwinCritic, frozen
from dql.optimizer import FlatAdam

if TYPE_CHECKING:
    from dql.data import TransitionDataset

Tensor = torch.Tensor
_LEAST_STD = 1e-3  # added to a state's deviation
_WHOLE = 1 << 26  # numbers of all states, beyond which their deviation is summed up a part at a time


class TD3BC(Agent):
    """TD3 whose actor is also regressed on the data's actions.

    pi(s) = max_action tanh(MLP(s)); every network sees standardised states. An update is: (1) critics towards
    r + mask * discount * min(Q_1', Q_2')(s', pi'(s') + clipped noise); (2) in every `policy_delay`-th update the actor
    down mean (pi(s) - a)^2 - alpha * mean Q_1(s, pi(s)) / mean|Q_1(s, pi(s))|, the divisor without a gradient, and all
    targets by tau. It acts by pi(s).

    Args, Raises: as `Agent`.

    Attributes:
        actor, actor_target: MLP.
        critic, critic_target: TwinCritic.
        state_mean, state_std: [S] by which states are standardised; 0 and 1 until `begin` or `standardize`.
        step: updates done.
    """

    algorithm = "td3-bc"

    def _build(
        self, state_dim: int, action_dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        c = self.config
        self.actor = MLP(state_dim, action_dim, c, generator).to(device=device, dtype=dtype)
        critic = TwinCritic(state_dim, action_dim, c.hidden_dim, c.num_hidden, c.activation, generator=generator)
        self.critic = critic.to(device=device, dtype=dtype)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.actor_adam = FlatAdam(self.actor, c.lr, 0.0)
        self.critic_adam = FlatAdam(self.critic, c.critic_lr, 0.0)
        self.state_mean = self.actor.buffer.new_zeros(state_dim)
        self.state_std = self.actor.buffer.new_ones(state_dim)

    def begin(self, data: "TransitionDataset") -> None:
        """Standardises states by those of the dataset."""
        with data.in_order():
            self.standardize(data.states)

    def standardize(self, states: Tensor) -> None:
        """From now on every network sees (s - mean) / (std + 1e-3) of these states.

        Args:
            states: [n, S], all of the data's.

        Raises:
            ValueError: of another size, none, or not finite.
            TypeError: no tensor.
        """
        if not isinstance(states, Tensor):
            raise TypeError(f"states must be a tensor, got {type(states).__name__}; use torch.as_tensor")
        if states.dim() != 2 or states.shape[1] != self.state_dim or not len(states):
            raise ValueError(f"states must be [n, {self.state_dim}], the data's, got {list(states.shape)}")
        std, mean = _std_mean(states, self.state_mean.device)
        if not bool((std + mean).isfinite().all()):
            raise ValueError("states hold NaN or infinite values; leave those transitions out")
        self.state_mean.copy_(mean)
        self.state_std.copy_(std + _LEAST_STD)

    def _standard(self, states: Tensor) -> Tensor:
        return (states - self.state_mean.to(states)) / self.state_std.to(states)

    def _pi(self, actor: MLP, states: Tensor) -> Tensor:
        return self.config.max_action * torch.tanh(actor(states))

    @torch.enable_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of critics and, in every `policy_delay`-th, of actor and targets.

        Args:
            batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B], in the agent's dtype
                and on its device.

        Returns:
            scalar tensors by name, still on the device: `critic/loss`, `critic/q` (mean of both), `critic/target_q`,
            `critic/grad_norm`, `actor/loss`, `actor/bc_loss`, `actor/q_loss`.
        """
        c, batch = self.config, checked_batch(batch, self)
        self.check_optimizers()
        states, next_states = self._standard(batch.states), self._standard(batch.next_states)
        y = self._target(batch, next_states)
        q1, q2 = self.critic(states, batch.actions)
        critic_loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        norm = self.critic_adam.step(critic_loss, self.lr_scale())

        moves = (self.step + 1) % c.policy_delay == 0
        with frozen(self.critic), torch.set_grad_enabled(moves):
            actions = self._pi(self.actor, states)
            q = self.critic.q(1, states, actions)
            q_loss = -q.mean() / q.detach().abs().mean()
            bc_loss = F.mse_loss(actions, batch.actions)
            loss = bc_loss + c.alpha * q_loss
            if moves:
                self.actor_adam.step(loss, self.lr_scale())
        if moves:
            with torch.no_grad():
                self.critic_target.flat.lerp_(self.critic.flat, c.tau)
                self.actor_target.flat.lerp_(self.actor.flat, c.tau)
        self.step += 1
        return {
            "critic/loss": critic_loss.detach(),
            "critic/q": (q1.detach().mean() + q2.detach().mean()) / 2,
            "critic/target_q": y.mean(),
            "critic/grad_norm": norm,
            "actor/loss": loss.detach(),
            "actor/bc_loss": bc_loss.detach(),
            "actor/q_loss": q_loss.detach(),
        }

    @torch.no_grad()
    def _target(self, batch: Batch, next_states: Tensor) -> Tensor:
        """r + mask * discount * min(Q_1', Q_2') at the smoothed next actions: [B]."""
        c = self.config
        seed = noise.derive(c.seed, "target", self.step)
        z = noise.normal(seed, 1, *batch.actions.shape, dtype=batch.actions.dtype).to(batch.actions)[0]  # [B, A]
        smoothing = (c.policy_noise * z).clamp(-c.noise_clip, c.noise_clip) * c.max_action
        next_actions = (self._pi(self.actor_target, next_states) + smoothing).clamp(-c.max_action, c.max_action)
        return batch.rewards + batch.masks * c.discount * self.critic_target.q_min(next_states, next_actions)

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        states = checked_states(states, self.state_dim, self.actor.flat)
        return checked_actions(self._pi(self.actor, self._standard(states)), self.actor)

    def modules(self) -> dict[str, FlatModule]:
        return {
            "actor": self.actor,
            "actor_target": self.actor_target,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"actor_adam": self.actor_adam, "critic_adam": self.critic_adam}

    def _first_step(self, optimizer: str) -> int:
        return self.config.policy_delay if optimizer == "actor_adam" else 1

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"states.mean": self.state_mean, "states.std": self.state_std}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        mean, std = tensors["states.mean"], tensors["states.std"]
        if not (mean.is_floating_point() and std.is_floating_point()):
            raise ValueError(f"its states' mean and deviation are {mean.dtype} and {std.dtype}, no floats")
        if mean.shape != self.state_mean.shape or std.shape != self.state_std.shape:
            raise ValueError(f"its states' mean and deviation are {list(mean.shape)} and {list(std.shape)}")
        mean, std = mean.to(self.state_mean), std.to(self.state_std)
        if not bool(mean.isfinite().all()) or not bool((std.isfinite() & (std > 0)).all()):
            raise ValueError("its states' mean or deviation is not finite, or a deviation not positive")
        self.state_mean.copy_(mean)
        self.state_std.copy_(std)

    @classmethod
    def check_file(cls, tensors: Mapping[str, Tensor], state_dim: Any, action_dim: Any, config: Config) -> None:
        S, A = checked_file_sizes(state_dim, action_dim, config)
        actor, critic = mlp_layout(S, A, config), critic_layout(S, A, config)
        check_shapes(tensors, {"actor": actor, "actor_target": actor, "critic": critic, "critic_target": critic})


def _std_mean(states: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """In float64, on the device."""
    if states.numel() <= _WHOLE:
        return torch.std_mean(states.to(device).double(), dim=0, correction=0)
    mean, variance = (torch.zeros(states.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    for rows in row_blocks(*states.shape):
        mean += states[rows].to(device).double().sum(0) / len(states)
    for rows in row_blocks(*states.shape):
        variance += states[rows].to(device).double().sub_(mean).square_().sum(0) / len(states)
    return variance.sqrt(), mean
