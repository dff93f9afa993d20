"""Behaviour cloning by an MLP: of the action itself (BC), or of a Gaussian over it (GaussianBC).

The networks and learning rate are those of TD3+BC's actor (arXiv 2106.06860), without its standardised states.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from dql import noise
from dql.agents.base import Agent, checked_actions
from dql.agents.mlp import LOG_STD, MLP, check_shapes, checked_file_sizes, checked_states, log_prob, mlp_layout
from dql.config import Config
from dql.data import Batch
from dql.learner import checked_batch
from dql.networks import FlatModule
from dql.optimizer import FlatAdam

Tensor = torch.Tensor


class BC(Agent):
    """Deterministic behaviour cloning: pi(s) = max_action tanh(MLP(s)), down the mean squared error to the data's
    actions.

    It can hold one action a state: where the data have two, it takes their mean.

    Args, Raises: as `Agent`.

    Attributes:
        actor: the MLP.
        step: updates done.
    """

    algorithm = "bc"
    _heads = 1  # of the network, each [A]

    def _build(
        self, state_dim: int, action_dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        actor = MLP(state_dim, self._heads * action_dim, self.config, generator)
        self.actor = actor.to(device=device, dtype=dtype)
        self.actor_adam = FlatAdam(self.actor, self.config.lr, 0.0)

    @torch.enable_grad()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update from a batch.

        Args:
            batch: states [B, S], actions [B, A], and so on, on the agent's device and in its dtype.

        Returns:
            scalar tensors by name, still on the device: `actor/bc_loss`, `actor/grad_norm`.
        """
        batch = checked_batch(batch, self)
        self.check_optimizers()
        loss = self._loss(batch.states, batch.actions)
        norm = self.actor_adam.step(loss, self.lr_scale())
        self.step += 1
        return {"actor/bc_loss": loss.detach(), "actor/grad_norm": norm}

    def _loss(self, states: Tensor, actions: Tensor) -> Tensor:
        return F.mse_loss(self._mean(states), actions)

    def _mean(self, states: Tensor) -> Tensor:
        return self.config.max_action * torch.tanh(self.actor(states)[:, : self.action_dim])

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        return checked_actions(self._mean(checked_states(states, self.state_dim, self.actor.flat)), self.actor)

    def modules(self) -> dict[str, FlatModule]:
        return {"actor": self.actor}

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"actor_adam": self.actor_adam}

    @classmethod
    def check_file(cls, tensors: Mapping[str, Tensor], state_dim: Any, action_dim: Any, config: Config) -> None:
        S, A = checked_file_sizes(state_dim, action_dim, config)
        check_shapes(tensors, {"actor": mlp_layout(S, cls._heads * A, config)})


class GaussianBC(BC):
    """Behaviour cloning by maximum likelihood: pi(a | s) = N(max_action tanh(m(s)), exp(l(s))^2), m and l from one MLP,
    l from -5 to 2, down -log pi(a | s).

    It acts by a draw, as DiffusionBC does, clamped to the bound; BC is the one that acts by a mean.

    Args, Raises, Attributes: as BC.
    """

    algorithm = "bc-gaussian"
    _heads = 2

    def _loss(self, states: Tensor, actions: Tensor) -> Tensor:
        return -log_prob(*self._moments(states), actions).mean()

    def _moments(self, states: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(states).chunk(2, dim=1)
        return self.config.max_action * torch.tanh(mean), log_std.clamp(*LOG_STD)

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        states = checked_states(states, self.state_dim, self.actor.flat)
        mean, log_std = self._moments(states)
        seed = noise.seed_from_torch() if seed is None else seed
        z = noise.normal(seed, 1, *mean.shape, dtype=mean.dtype).to(mean)[0]  # [B, A]
        actions = (mean + log_std.exp() * z).clamp(-self.config.max_action, self.config.max_action)
        return checked_actions(actions, self.actor)
