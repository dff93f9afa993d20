"""One update of an agent: which path it takes, and its losses by autograd; a function of (agent, batch, draws).

The other path, of the backend "cpp", is `update_native`; `update_graphed` records this one.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dql import noise, update_native
from dql.backend.base import Backend
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.learner import Cloner, Learner, move_averages
from dql.networks import FlatModule
from dql.policy import DiffusionPolicy
from dql.sampler import backend_for, run_chain
from dql.tensors import plain
from dql.values import q_values, value_and_other

Tensor = torch.Tensor


@torch.enable_grad()
def update(agent: Cloner, batch: Batch) -> dict[str, Tensor]:
    """One update from a batch: the backend is picked, once, and the path that it has.

    Returns:
        scalar tensors by name, still on the device.
    """
    batch = checked_batch(batch, agent.policy)
    seeds = UpdateSeeds.of(agent.config.seed, agent.step)
    backend = backend_for(batch.states, agent.policy, agent.config.backend)
    if update_native.runs_natively(agent, backend):
        metrics = agent.update_natively(batch, seeds)
    else:
        metrics = agent.compute(batch, draws_of(agent, seeds, len(batch.states)), backend)
    agent.step += 1
    return metrics


def draws_of(agent: Cloner, seeds: UpdateSeeds, B: int) -> Draws:
    """What the agent's next update draws for a batch of B rows, and its schedules."""
    policy = agent.policy
    t = noise.integers(seeds.bc_t, policy.T, B)
    if policy.device.type == "cuda":
        t = t.pin_memory().to(policy.device, non_blocking=True)  # from other memory the copy may wait for the GPU
    maximised = 1 if int(noise.integers(seeds.coin, 2, 1)) else 2
    lr_scale, ema_weight = agent.lr_scale(), agent.ema_weight(agent.step)
    return Draws(seeds.target, seeds.bc_noise, seeds.actor, t, maximised, lr_scale, ema_weight)


# An update but for its step's number: everything that a device does, and nothing that waits for it.


def clone(agent: Cloner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Of DiffusionBC: the actor down the bc_loss."""
    loss = _bc_loss(agent.policy, batch, draws, backend)
    return {"actor/bc_loss": loss.detach(), "actor/grad_norm": agent.actor_adam.step(loss, draws.lr_scale)}


def learn(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Of DiffusionQL: critics, actor, averages."""
    metrics = update_critic(agent, batch, draws, backend) | update_actor(agent, batch, draws, backend)
    move_averages(agent, torch.Tensor.lerp_, draws.ema_weight)
    return metrics


def update_critic(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Both critics a step towards `target_q`; returns the metrics."""
    y = target_q(agent, batch, draws.target, backend)
    q1, q2 = q_values(agent.critic, batch.states, batch.actions, backend, at_once=True)
    loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
    norm = agent.critic_adam.step(loss, draws.lr_scale)
    return {
        "critic/loss": loss.detach(),
        "critic/q": (q1.detach().mean() + q2.detach().mean()) / 2,
        "critic/target_q": y.mean(),
        "critic/grad_norm": norm,
    }


@torch.no_grad()
def target_q(agent: Learner, batch: Batch, seed: int | Tensor, backend: Backend | None = None) -> Tensor:
    """r + mask * discount * min(Q_1', Q_2')(s', a') [B]; with max_q_backup each Q' is its best of 10 actions."""
    c = agent.config
    backend = backend or backend_for(batch.states, agent.policy, c.backend)
    next_actions = run_chain(
        batch.next_states,
        agent.ema_policy,
        backend=c.backend,
        picked=backend,
        num_candidates=c.backup_candidates if c.max_q_backup else None,
        seed=seed,
    )
    q1, q2 = q_values(agent.critic_target, batch.next_states, next_actions, backend)
    if c.max_q_backup:
        q1, q2 = q1.amax(dim=1), q2.amax(dim=1)
    return batch.rewards + batch.masks * c.discount * torch.minimum(q1, q2)


def update_actor(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """The actor a step down bc_loss + eta * q_loss; returns the metrics."""
    bc_loss = _bc_loss(agent.policy, batch, draws, backend)
    name = agent.config.backend
    actions = run_chain(batch.states, agent.policy, backend=name, picked=backend, seed=draws.actor, at_once=True)
    with _frozen(agent.critic):
        q_loss = _q_loss(agent, batch.states, actions, draws.maximised, backend)
    loss = bc_loss + agent.config.eta * q_loss
    norm = agent.actor_adam.step(loss, draws.lr_scale)
    return {
        "actor/loss": loss.detach(),
        "actor/bc_loss": bc_loss.detach(),
        "actor/q_loss": q_loss.detach(),
        "actor/grad_norm": norm,
    }


def _bc_loss(policy: DiffusionPolicy, batch: Batch, draws: Draws, backend: Backend) -> Tensor:
    B, A = batch.actions.shape
    eps = backend.normal(draws.bc_noise, 1, B, A, policy.denoiser.buffer)[0]
    return policy.bc_loss(batch.states, batch.actions, draws.t, eps)


def _q_loss(agent: Learner, states: Tensor, actions: Tensor, maximised: int | Tensor, backend: Backend) -> Tensor:
    """-mean(Q_i) / mean|Q_j|, without a gradient through the divisor."""
    if isinstance(maximised, Tensor):
        q = torch.stack(q_values(agent.critic, states, actions, backend))  # [2, B]
        return -(q.mean(dim=1) * maximised).sum() / (q.detach().abs().mean(dim=1) * (1 - maximised)).sum()
    q, other = value_and_other(agent.critic, maximised, states, actions, backend)
    return -q.mean() / other.abs().mean()


@contextlib.contextmanager
def _frozen(module: FlatModule) -> Iterator[None]:
    """Gradients pass through the module to its inputs, but none is computed for its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def checked_batch(batch: Batch, policy: DiffusionPolicy, least: int = 1) -> Batch:
    """The batch as plain data, of `least` rows; refuses what does not fit, and what would broadcast (published rewards
    are [B, 1])."""
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be a dql.Batch, got {type(batch).__name__}; use dql.Batch(states, actions, ...)")
    for name, value in vars(batch).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"batch.{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
        if value.is_nested or value.layout is not torch.strided:
            plain(f"batch.{name}", value)  # says so
    B, S, A = len(batch.states), policy.state_dim, policy.action_dim
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
        if tensor.dtype != policy.dtype or tensor.device != policy.device:
            raise ValueError(
                f"batch.{name} is {tensor.dtype} on {tensor.device}, the agent is {policy.dtype} on {policy.device}; "
                "convert one of them"
            )
    return Batch(
        *(plain(f"batch.{name}", value, whole=True).detach().contiguous() for name, value in vars(batch).items())
    )
