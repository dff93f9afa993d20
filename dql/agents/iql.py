"""Implicit Q-learning (Kostrikov, Nair & Levine 2021, arXiv 2110.06169), as its authors' code has it (commit 09d7002).

What differs from that code:
1. The target critics begin as a copy of the critics; there they begin with the same numbers, drawn twice.
2. The initial weights are orthogonal as there, but torch's draws.
3. `--reward-tune iql_locomotion` and `iql_antmaze` are its scaling of rewards; there the task's name chooses.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F

from dql.agents.base import Agent, checked_actions
from dql.agents.mlp import (
    LOG_STD,
    MLP,
    check_shapes,
    checked_file_sizes,
    checked_states,
    critic_layout,
    log_prob,
    mlp_layout,
    orthogonal_,
)
from dql.config import Config
from dql.data import Batch
from dql.learner import checked_batch
from dql.networks import FlatModule, TwinCritic
from dql.optimizer import FlatAdam

Tensor = torch.Tensor


class IQL(Agent):
    """A value learnt by expectile regression, which never asks for actions that the data do not have.

    With q = min(Q_1', Q_2')(s, a), an update is: (1) V down mean |expectile - 1{q < V(s)}| (q - V(s))^2; (2) the actor
    down -mean min(exp(temperature (q - V(s))), advantage_clip) log pi(a | s), with the new V; (3) critics towards
    r + mask * discount * V(s'), with the new V; (4) target critics by tau. pi(a | s) = N(max_action tanh(MLP(s)),
    exp(log_std)^2), log_std [A] a parameter. It acts by the mean. The actor's learning rate falls by `lr_schedule`, the
    others are constant.

    Args, Raises: as `Agent`.

    Attributes:
        actor: MLP with log_std.
        value: MLP.
        critic, critic_target: TwinCritic.
        step: updates done.
    """

    algorithm = "iql"

    def _build(
        self, state_dim: int, action_dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        c = self.config
        actor = MLP(state_dim, action_dim, c, generator, log_std=True)
        critic = TwinCritic(state_dim, action_dim, c.hidden_dim, c.num_hidden, c.activation, generator=generator)
        value = MLP(state_dim, 1, c, generator)
        for network in (actor, critic, value):
            orthogonal_(network, 2**0.5, generator)
        self.actor = actor.to(device=device, dtype=dtype)
        self.critic = critic.to(device=device, dtype=dtype)
        self.value = value.to(device=device, dtype=dtype)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.actor_adam = FlatAdam(self.actor, c.lr, 0.0)
        self.critic_adam = FlatAdam(self.critic, c.critic_lr, 0.0)
        self.value_adam = FlatAdam(self.value, c.critic_lr, 0.0)

    @torch.enable_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of value, actor, critics and target critics.

        Args:
            batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B], in the agent's dtype
                and on its device.

        Returns:
            scalar tensors by name, still on the device: `value/loss`, `value/v` (mean), `value/grad_norm`,
            `critic/loss`, `critic/q` (mean of both), `critic/target_q`, `critic/grad_norm`, `actor/loss`,
            `actor/bc_loss` (-log pi(a | s), unweighted), `actor/grad_norm`.
        """
        c, batch = self.config, checked_batch(batch, self)
        self.check_optimizers()
        with torch.no_grad():
            q = self.critic_target.q_min(batch.states, batch.actions)  # [B]

        v = self.value(batch.states)[:, 0]  # [B]
        # torch.where of two Python numbers would round them to float32
        weight = (1 - c.expectile) + (2 * c.expectile - 1) * (q > v).to(v.dtype)
        value_loss = (weight * (q - v) ** 2).mean()
        value_norm = self.value_adam.step(value_loss, 1.0)

        with torch.no_grad():
            new_v, next_v = self.value(batch.states)[:, 0], self.value(batch.next_states)[:, 0]
            weight = (c.temperature * (q - new_v)).exp().clamp(max=c.advantage_clip)
            y = batch.rewards + batch.masks * c.discount * next_v
        log_pi = log_prob(self._mean(batch.states), self.actor.log_std.clamp(*LOG_STD), batch.actions)
        actor_loss = -(weight * log_pi).mean()
        actor_norm = self.actor_adam.step(actor_loss, self.lr_scale())

        q1, q2 = self.critic(batch.states, batch.actions)
        critic_loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        critic_norm = self.critic_adam.step(critic_loss, 1.0)
        with torch.no_grad():
            self.critic_target.flat.lerp_(self.critic.flat, c.tau)
        self.step += 1
        return {
            "value/loss": value_loss.detach(),
            "value/v": v.detach().mean(),
            "value/grad_norm": value_norm,
            "critic/loss": critic_loss.detach(),
            "critic/q": (q1.detach().mean() + q2.detach().mean()) / 2,
            "critic/target_q": y.mean(),
            "critic/grad_norm": critic_norm,
            "actor/loss": actor_loss.detach(),
            "actor/bc_loss": -log_pi.detach().mean(),
            "actor/grad_norm": actor_norm,
        }

    def _mean(self, states: Tensor) -> Tensor:
        return self.config.max_action * torch.tanh(self.actor(states))

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        return checked_actions(self._mean(checked_states(states, self.state_dim, self.actor.flat)), self.actor)

    def modules(self) -> dict[str, FlatModule]:
        return {
            "actor": self.actor,
            "value": self.value,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"actor_adam": self.actor_adam, "value_adam": self.value_adam, "critic_adam": self.critic_adam}

    @classmethod
    def check_file(cls, tensors: Mapping[str, Tensor], state_dim: Any, action_dim: Any, config: Config) -> None:
        S, A = checked_file_sizes(state_dim, action_dim, config)
        critic = critic_layout(S, A, config)
        actor, value = mlp_layout(S, A, config, log_std=True), mlp_layout(S, 1, config)
        check_shapes(tensors, {"actor": actor, "value": value, "critic": critic, "critic_target": critic})
