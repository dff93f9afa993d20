"""The actor's loss by autograd: bc_loss + eta * q_loss, with the Q term's action from the chain or in one step."""

import torch
import torch.nn.functional as F

from dql.backend.base import Backend
from dql.data import Batch
from dql.draws import Draws
from dql.learner import Learner
from dql.networks import frozen
from dql.policy import DiffusionPolicy
from dql.sampler import run_chain
from dql.values import q_values, value_and_other

Tensor = torch.Tensor


def update_actor(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """The actor a step down bc_loss + eta * q_loss; returns the metrics."""
    name = agent.config.backend
    if agent.config.actor_gradient == "one-step":
        bc_loss, actions = one_step(agent.policy, batch, draws, backend)
    else:
        bc_loss = bc_loss_of(agent.policy, batch, draws, backend)
        shape = (len(batch), agent.policy.action_dim)
        given = draws.of_chain(draws.actor, agent.policy.T, shape, batch.states, backend)
        actions = run_chain(batch.states, agent.policy, backend=name, picked=backend, at_once=True, **given)
    with frozen(agent.critic):
        q_loss = _q_loss(agent, batch.states, actions, draws, backend)
    loss = bc_loss + agent.config.eta * q_loss
    norm = agent.actor_adam.step(loss, draws.lr_scale, draws.shard)
    return {
        "actor/loss": loss.detach(),
        "actor/bc_loss": bc_loss.detach(),
        "actor/q_loss": q_loss.detach(),
        "actor/grad_norm": norm,
    }


def bc_loss_of(policy: DiffusionPolicy, batch: Batch, draws: Draws, backend: Backend) -> Tensor:
    """The noise-prediction error of a batch, with an update's draws."""
    return policy.bc_loss(batch.states, batch.actions, draws.t, _noise(policy, batch, draws, backend))


def one_step(policy: DiffusionPolicy, batch: Batch, draws: Draws, backend: Backend) -> tuple[Tensor, Tensor]:
    """(bc_loss, actions [B, A]): EDP's action approximation (arXiv 2305.20081, section 4.2).

    The prediction that the behaviour-cloning loss is of, made at x_t = sqrt(abar_t) a + sqrt(1 - abar_t) noise for the
    data's action a, gives an estimate of the clean action as well, (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), clamped
    to the bound as the chain's are. Its gradient is that of one call of the denoiser.
    """
    eps = _noise(policy, batch, draws, backend)
    x = policy.q_sample(batch.actions, draws.t, eps)
    prediction = policy.denoiser(x, draws.t, batch.states)
    if policy.predict_epsilon:
        keep, add = policy.q_sample_table(x)[draws.t].split(1, dim=1)  # [B, 1] each
        target, start = eps, (x - add * prediction) / keep
    else:
        target, start = batch.actions, prediction
    return F.mse_loss(prediction, target), start.clamp(-policy.max_action, policy.max_action)


def _noise(policy: DiffusionPolicy, batch: Batch, draws: Draws, backend: Backend) -> Tensor:
    B, A = batch.actions.shape
    return draws.normal(draws.bc_noise, 1, B, A, policy.denoiser.buffer, backend)[0]


def _q_loss(agent: Learner, states: Tensor, actions: Tensor, draws: Draws, backend: Backend) -> Tensor:
    """-mean(Q_i) / mean|Q_j|, without a gradient through the divisor."""
    maximised = draws.maximised
    if isinstance(maximised, Tensor):
        q = torch.stack(q_values(agent.critic, states, actions, backend))  # [2, B]
        return -(q.mean(dim=1) * maximised).sum() / (q.detach().abs().mean(dim=1) * (1 - maximised)).sum()
    q, other = value_and_other(agent.critic, maximised, states, actions, backend)
    scale = other.abs().mean()
    if draws.shard is not None:
        scale = draws.shard.mean_(scale)
    return -q.mean() / scale
