"""What a careful user would write for torch.compile beyond the chain: the acting rule, and the training update.

Both do what the published code does, without its waste: no graph for the target, no gradients of the critic in the
actor's step, states not repeated, fused Adam, averages in one call each, no wait for the metrics.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from published import PublishedAgent
from rivals import A, LeanActor, T
from torch import Tensor, nn

import dql


def lean_select(published: PublishedAgent, num_candidates: int) -> Callable[..., np.ndarray]:
    """`select(state [S], noise=None, draw=None)` -> action [A], compiled but for the copies.

    `noise` [T, N, A] and `draw` [1] in (0, 1) stand in for its own, for closeness checks.
    """
    actor, critic = LeanActor(published.actor), published.critic_target

    def choose(row: Tensor, noise: Tensor, draw: Tensor) -> Tensor:
        candidates, _ = actor.chain(row, noise)  # [N, A]; the state's part [1, H] is computed once
        q = critic.q_min(row.expand(num_candidates, -1), candidates).flatten()  # [N]
        chosen = (q.softmax(0).cumsum(0) <= draw).sum().clamp(max=num_candidates - 1)
        return candidates.index_select(0, chosen[None])[0]

    compiled = torch.compile(choose, dynamic=False, fullgraph=True)

    def select(state: np.ndarray, noise: Tensor | None = None, draw: Tensor | None = None) -> np.ndarray:
        with torch.no_grad():
            noise = torch.randn(T, num_candidates, A) if noise is None else noise
            draw = torch.rand(1) if draw is None else draw
            return compiled(torch.from_numpy(state)[None], noise, draw).numpy()

    return select


@dataclass(frozen=True)
class Draws:
    """All that an update draws: noise of the target's chain [T, R, A], of the loss (t [B], eps [B, A]), of the actor's
    chain [T, B, A], and whether Q_1 is maximised, a bool []."""

    target: Tensor
    t: Tensor
    eps: Tensor
    actor: Tensor
    first: Tensor


class LeanAgent:
    """Diffusion-QL from the published agent's present state, each of its three computations a compiled graph."""

    def __init__(self, published: PublishedAgent, batch_size: int) -> None:
        self.actor, self.ema_actor = copy.deepcopy(published.actor), copy.deepcopy(published.ema_actor)
        self.critic, self.critic_target = copy.deepcopy(published.critic), copy.deepcopy(published.critic_target)
        for module in (self.ema_actor, self.critic_target):
            module.requires_grad_(False)
        self.constants = published
        self.batch_size, self.step = batch_size, 0
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4, fused=True)
        self._chain, self._ema_chain = LeanActor(self.actor).chain, LeanActor(self.ema_actor).chain
        self._target = torch.compile(self.target_q, dynamic=False, fullgraph=True)
        self._critic_loss = torch.compile(self.critic_loss, dynamic=False, fullgraph=True)
        self._actor_losses = torch.compile(self.actor_losses, dynamic=False, fullgraph=True)

    @property
    def candidates(self) -> int:
        """Actions for a next state."""
        return self.constants.num_backup if self.constants.max_q_backup else 1

    def target_q(self, rewards: Tensor, next_states: Tensor, masks: Tensor, noise: Tensor) -> Tensor:
        """r + mask * discount * min(max Q1', max Q2') over the candidates [B, 1]."""
        B, N = self.batch_size, self.candidates
        states = next_states[:, None]  # [B, 1, S]
        actions, _ = self._ema_chain(states, noise.view(T, B, N, A))  # [B, N, A]
        q1, q2 = self.critic_target(states.expand(B, N, -1), actions)  # [B, N, 1] each
        best = torch.min(q1.amax(1), q2.amax(1))  # [B, 1]
        return rewards[:, None] + masks[:, None] * self.constants.discount * best

    def critic_loss(self, states: Tensor, actions: Tensor, target: Tensor) -> Tensor:
        q1, q2 = self.critic(states, actions)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target)

    def actor_losses(self, states: Tensor, actions: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """(bc_loss, q_loss)."""
        actor = self.actor
        t, eps = draws.t, draws.eps
        noisy = actor.sqrt_alphas_cumprod[t, None] * actions + actor.sqrt_one_minus_alphas_cumprod[t, None] * eps
        bc_loss = F.mse_loss(actor.model(noisy, t, states), eps)
        q1, q2 = self.critic(states, self._chain(states, draws.actor)[0])
        by_first, by_second = q1.mean() / q2.detach().abs().mean(), q2.mean() / q1.detach().abs().mean()
        return bc_loss, -torch.where(draws.first, by_first, by_second)

    def update(self, batch: dql.Batch, draws: Draws | None = None) -> dict[str, Tensor]:
        """One update; the losses, without a wait for them. `draws` for closeness checks."""
        draws = self._draw() if draws is None else draws
        with torch.no_grad():
            target = self._target(batch.rewards, batch.next_states, batch.masks, draws.target)
        critic_loss = self._critic_loss(batch.states, batch.actions, target)
        self._step(critic_loss, self.critic, self.critic_optimizer)

        self.critic.requires_grad_(False)
        bc_loss, q_loss = self._actor_losses(batch.states, batch.actions, draws)
        actor_loss = bc_loss + self.constants.eta * q_loss
        self._step(actor_loss, self.actor, self.actor_optimizer)
        self.critic.requires_grad_(True)

        c = self.constants
        with torch.no_grad():
            if self.step % c.ema_every == 0 and self.step >= c.ema_start:
                torch._foreach_lerp_([*self.ema_actor.parameters()], [*self.actor.parameters()], 1 - c.ema_decay)
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], c.tau)
        self.step += 1
        losses = {
            "actor/loss": actor_loss,
            "actor/bc_loss": bc_loss,
            "actor/q_loss": q_loss,
            "critic/loss": critic_loss,
        }
        return {name: loss.detach() for name, loss in losses.items()}

    def _step(self, loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), self.constants.grad_norm)
        optimizer.step()

    def _draw(self) -> Draws:
        B = self.batch_size
        return Draws(
            torch.randn(T, B * self.candidates, A),
            torch.randint(0, T, (B,)),
            torch.randn(B, A),
            torch.randn(T, B, A),
            torch.rand(()) > 0.5,
        )
