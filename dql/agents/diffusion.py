"""DiffusionBC (behaviour cloning by diffusion) and DiffusionQL, which adds the twin critic and its Q term.

A run is the same on every backend, to rounding.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from dql import update_native
from dql.agents.base import Agent
from dql.backend.base import Backend
from dql.backend.registry import check_name
from dql.config import DIFFUSION, Config
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.learner import checked_batch, draws_of
from dql.networks import FlatModule, TwinCritic, check_file_sizes
from dql.optimizer import FlatAdam
from dql.policy import DiffusionPolicy
from dql.sampler import sample, select
from dql.tensors import refuse_unseen
from dql.update import clone, learn, target_q
from dql.update import update as do_update

Tensor = torch.Tensor


class DiffusionBC(Agent):
    """Behaviour cloning with a diffusion policy: the paper's ablation. No critic, no averaging, no clipping.

    Args:
        state_dim: S.
        action_dim: A.
        config: hyper-parameters; one of the other diffusion algorithm becomes this class's (`Config.of`).
        device: where the networks live.
        dtype: of the parameters; float64 is for tests.

    Attributes:
        policy: the DiffusionPolicy that is trained.
        step: updates done.

    Raises:
        ValueError: a size that makes no network, no such backend, or no such device.
        TypeError: config is no Config, or dtype no dtype of floats.
    """

    algorithm = "diffusion-bc"

    @classmethod
    def _checked_config(cls, config: Config | None) -> Config:
        if config is None or config.algorithm in DIFFUSION:  # one config serves both: the networks are the same
            config = (config or Config()).of(cls.algorithm)
        config = super()._checked_config(config)
        check_name(config.backend)
        return config

    def _build(
        self,
        state_dim: int,
        action_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        c = self.config
        policy = DiffusionPolicy(
            state_dim,
            action_dim,
            c.max_action,
            c.hidden_dim,
            c.num_hidden,
            c.T,
            c.beta_schedule,
            activation=c.activation,
            generator=generator,
        )
        self.policy = policy.to(device=device, dtype=dtype)
        self.actor_adam = FlatAdam(self.policy.denoiser, c.lr, self._actor_grad_norm())

    def _actor_grad_norm(self) -> float:
        return 0.0

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update from a batch.

        Args:
            batch: states [B, S], actions [B, A], and so on, on the agent's device and in its dtype.

        Returns:
            scalar tensors by name, still on the device: `actor/bc_loss`, `actor/grad_norm`.
        """
        return do_update(self, batch)

    def draws(self, B: int) -> Draws:
        """Those of the next update, with batches of B rows."""
        return draws_of(self, UpdateSeeds.of(self.config.seed, self.step), B)

    compute = clone
    update_natively = update_native.clone

    def ema_weight(self, step: int) -> float:
        return 0.0

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        return sample(states, self.policy, backend=self.config.backend, seed=seed)

    def modules(self) -> dict[str, FlatModule]:
        return {"actor": self.policy.denoiser}

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"actor_adam": self.actor_adam}

    @classmethod
    def check_file(cls, tensors: Mapping[str, Tensor], state_dim: Any, action_dim: Any, config: Config) -> None:
        check_file_sizes(tensors, "actor.", state_dim, action_dim, config.hidden_dim, config.num_hidden)

    def save_policy(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy alone, as `DiffusionPolicy.save`."""
        self.policy.save(path)


class DiffusionQL(DiffusionBC):
    """Diffusion Q-learning (arXiv 2208.06193, algorithm 1).

    An update is: (1) critics towards r + mask * discount * min(Q_1', Q_2')(s', a'), a' from the averaged actor's
    chain; (2) actor down bc_loss - eta * mean(Q_i(s, a)) / mean|Q_j(s, a)|, a from its chain with the gradient through
    all steps; (3) target critics by tau, and every `ema_every` updates from `ema_start` on the averaged actor.

    Args: as DiffusionBC.

    Attributes:
        policy, step: as DiffusionBC.
        ema_policy: the averaged actor.
        critic, critic_target: TwinCritic.
    """

    algorithm = "diffusion-ql"

    def _actor_grad_norm(self) -> float:
        return self.config.grad_norm

    def _build(
        self,
        state_dim: int,
        action_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super()._build(state_dim, action_dim, device, dtype, generator)
        c = self.config
        self.ema_policy = deepcopy(self.policy).requires_grad_(False)
        critic = TwinCritic(state_dim, action_dim, c.hidden_dim, c.num_hidden, c.activation, generator=generator)
        self.critic = critic.to(device=device, dtype=dtype)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.critic_adam = FlatAdam(self.critic, c.critic_lr, c.grad_norm)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of critics, actor and averages from a batch.

        Args:
            batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B], in the agent's dtype
                and on its device. Its values are not looked at (that would make the host wait): NaN in them ends up
                in the parameters. `load_dataset` has looked at its own.

        Returns:
            scalar tensors by name, still on the device (no host sync): `critic/loss`, `critic/q` (mean of both),
            `critic/target_q`, `critic/grad_norm`, `actor/loss`, `actor/bc_loss`, `actor/q_loss`, `actor/grad_norm`.
        """
        return do_update(self, batch)

    compute = learn
    update_natively = update_native.learn

    @torch.no_grad()
    def target_q(self, batch: Batch, seed: int | Tensor, backend: Backend | None = None) -> Tensor:
        """r + mask * discount * min(Q_1', Q_2')(s', a') [B]; with max_q_backup each Q' is its best of 10 actions.

        Raises:
            TypeError, ValueError: the batch does not fit the agent.
            RuntimeError: a tracer is at work.
        """
        refuse_unseen("target_q", *vars(batch).values() if isinstance(batch, Batch) else ())
        return target_q(self, checked_batch(batch, self.policy, least=0), seed, backend)

    def ema_weight(self, step: int) -> float:
        c = self.config
        return 1 - c.ema_decay if step >= c.ema_start and step % c.ema_every == 0 else 0.0

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        c = self.config
        return select(
            states, self.policy, self.critic_target, num_candidates=c.num_candidates, backend=c.backend, seed=seed
        )

    def modules(self) -> dict[str, FlatModule]:
        return super().modules() | {
            "ema_actor": self.ema_policy.denoiser,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def _optimizers(self) -> dict[str, FlatAdam]:
        return super()._optimizers() | {"critic_adam": self.critic_adam}
