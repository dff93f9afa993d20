"""One update of an agent: which path it takes, and its losses by autograd; a function of (agent, batch, draws).

Other paths are `update_fused`, for the backends that have kernels for all of an update, and `update_native`, of the
backend "cpp". `update_graphed` records this one or `update_fused`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from dql import update_fused, update_native
from dql.actor_loss import bc_loss_of, update_actor
from dql.backend.base import Backend
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.learner import Cloner, Learner, checked_batch, draws_of, move_averages
from dql.sampler import backend_for, run_chain
from dql.values import q_values

Tensor = torch.Tensor


@torch.enable_grad()
def update(agent: Cloner, batch: Batch) -> dict[str, Tensor]:
    """One update from a batch: the backend is picked, once, and the path that it has.

    Returns:
        scalar tensors by name, still on the device.
    """
    batch = checked_batch(batch, agent.policy)
    agent.check_optimizers()
    seeds = UpdateSeeds.of(agent.config.seed, agent.step)
    backend = backend_for(batch.states, agent.policy, agent.config.backend)
    if update_native.runs_natively(agent, backend):
        metrics = agent.update_natively(batch, seeds, backend)
    else:
        metrics = agent.compute(batch, draws_of(agent, seeds, len(batch.states)), backend)
    agent.step += 1
    return metrics


# An update but for its step's number: everything that a device does, and nothing that waits for it.


def clone(agent: Cloner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Of DiffusionBC: the actor down the bc_loss."""
    if draws.shard is None and update_fused.runs_fused(agent, backend):
        return update_fused.clone(agent, batch, draws, backend)
    loss = bc_loss_of(agent.policy, batch, draws, backend)
    return {"actor/bc_loss": loss.detach(), "actor/grad_norm": agent.actor_adam.step(loss, draws.lr_scale, draws.shard)}


def learn(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Of DiffusionQL: critics, actor, averages."""
    fusable = agent.config.actor_gradient == "chain" and draws.shard is None
    if fusable and update_fused.runs_fused(agent, backend):
        return update_fused.learn(agent, batch, draws, backend)
    metrics = update_critic(agent, batch, draws, backend) | update_actor(agent, batch, draws, backend)
    move_averages(agent, torch.Tensor.lerp_, draws.ema_weight)
    return metrics


def update_critic(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Both critics a step towards `target_q`; returns the metrics."""
    y = target_q(agent, batch, draws.target, backend, draws)
    q1, q2 = q_values(agent.critic, batch.states, batch.actions, backend, at_once=True)
    loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
    norm = agent.critic_adam.step(loss, draws.lr_scale, draws.shard)
    return {
        "critic/loss": loss.detach(),
        "critic/q": (q1.detach().mean() + q2.detach().mean()) / 2,
        "critic/target_q": y.mean(),
        "critic/grad_norm": norm,
    }


@torch.no_grad()
def target_q(
    agent: Learner, batch: Batch, seed: int | Tensor, backend: Backend | None = None, draws: Draws | None = None
) -> Tensor:
    """r + mask * discount * min(Q_1', Q_2')(s', a') [B]; with max_q_backup each Q' is its best of 10 actions."""
    c = agent.config
    backend = backend or backend_for(batch.states, agent.policy, c.backend)
    N, policy = c.backup_candidates if c.max_q_backup else None, agent.ema_policy
    given: dict[str, Any] = {"seed": seed}
    if draws is not None:
        shape = (len(batch), policy.action_dim) if N is None else (len(batch), N, policy.action_dim)
        given = draws.of_chain(seed, policy.T, shape, batch.next_states, backend)
    next_actions = run_chain(batch.next_states, policy, backend=c.backend, picked=backend, num_candidates=N, **given)
    q1, q2 = q_values(agent.critic_target, batch.next_states, next_actions, backend)
    if c.max_q_backup:
        q1, q2 = q1.amax(dim=1), q2.amax(dim=1)
    return batch.rewards + batch.masks * c.discount * torch.minimum(q1, q2)
