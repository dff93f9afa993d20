"""An update of the agents as a fixed sequence of a backend's kernels, without autograd: what `dql.update` computes, to
rounding.

`Backend.actor`, `Backend.critic` and `Backend.ops` are what it is made of. As there, `flat.grad` is left with the
gradient as it was clipped.
"""

import torch

from dql.backend.base import Backend
from dql.backend.gpu import on_device_of
from dql.data import Batch
from dql.draws import Draws
from dql.learner import Cloner, Learner
from dql.networks import FlatModule, TwinCritic
from dql.sampler import run_chain

Tensor = torch.Tensor


def runs_fused(agent: Cloner, backend: Backend) -> bool:
    """Whether the backend has kernels for all networks of the agent, and nothing of it is frozen: autograd would leave
    that alone."""
    if backend.ops is None or backend.actor(agent.policy) is None:
        return False
    modules = agent.modules()
    if any(isinstance(module, TwinCritic) and backend.critic(module) is None for module in modules.values()):
        return False
    for module in modules.values():
        module.check_intact()
    return all(p.requires_grad for name in agent.trained() for p in modules[name].parameters())


@torch.no_grad()
def clone(agent: Cloner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """`update.clone`."""
    actor, denoiser = backend.actor(agent.policy), agent.policy.denoiser
    assert actor is not None and backend.ops is not None
    with on_device_of(batch.states):
        _, loss, saved = actor.forward(denoiser.buffer, batch.states, batch.actions, draws.t, draws.bc_noise, None)
        actor.backward(denoiser.buffer, saved, batch.states, None, into=_gradient(denoiser))
        norm = agent.actor_adam.step_fused(backend.ops, draws.lr_scale)
    return {"actor/bc_loss": loss[0], "actor/grad_norm": norm[0]}


@torch.no_grad()
def learn(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """`update.learn`."""
    with on_device_of(batch.states):
        return update_critic(agent, batch, draws, backend) | update_actor(agent, batch, draws, backend)


def update_critic(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """Both critics a step towards r + mask * discount * min(Q_1', Q_2')(s', a'), the target critics by tau."""
    c, critic, target, ops = agent.config, agent.critic, agent.critic_target, backend.ops
    N = c.backup_candidates if c.max_q_backup else 1
    next_actions = run_chain(
        batch.next_states,
        agent.ema_policy,
        backend=c.backend,
        picked=backend,
        num_candidates=N if c.max_q_backup else None,
        seed=draws.target,
    )
    runner, of_target = backend.critic(critic), backend.critic(target)
    assert ops is not None and runner is not None and of_target is not None
    q_target, _ = of_target.forward(
        target.buffer, batch.next_states, next_actions.view(-1, next_actions.shape[-1]), N, (0, 1), save=False
    )
    q, saved = runner.forward(critic.buffer, batch.states, batch.actions, 1, (0, 1), save=True)  # [2, B]
    d_q, metrics = ops.critic_loss(q_target, batch.rewards, batch.masks, q, c.discount, N)
    runner.backward(critic.buffer, saved, batch.states, batch.actions, d_q, True, False, False, into=_gradient(critic))
    norm = agent.critic_adam.step_fused(ops, draws.lr_scale, (target.buffer, c.tau))
    loss, mean, mean_target = metrics.unbind()
    return {"critic/loss": loss, "critic/q": mean, "critic/target_q": mean_target, "critic/grad_norm": norm[0]}


def update_actor(agent: Learner, batch: Batch, draws: Draws, backend: Backend) -> dict[str, Tensor]:
    """The actor a step down bc_loss + eta * q_loss, the averaged actor by its weight."""
    denoiser, critic, eta, ops = agent.policy.denoiser, agent.critic, agent.config.eta, backend.ops
    actor, runner = backend.actor(agent.policy), backend.critic(critic)
    assert ops is not None and actor is not None and runner is not None
    actions, bc_loss, saved = actor.forward(
        denoiser.buffer, batch.states, batch.actions, draws.t, draws.bc_noise, draws.actor
    )
    q, of_critic = runner.forward(critic.buffer, batch.states, actions, 1, (0, 1), save=True)  # [2, B]
    d_q, q_loss = ops.q_loss(q, draws.maximised, eta)
    _, _, d_actions = runner.backward(
        critic.buffer, of_critic, batch.states, actions, d_q, False, False, True, only=draws.maximised
    )
    actor.backward(denoiser.buffer, saved, batch.states, d_actions, into=_gradient(denoiser))
    moves = isinstance(draws.ema_weight, Tensor) or draws.ema_weight != 0
    average = (agent.ema_policy.denoiser.buffer, draws.ema_weight) if moves else None
    norm = agent.actor_adam.step_fused(ops, draws.lr_scale, average)
    return {
        "actor/loss": torch.add(bc_loss, q_loss, alpha=eta)[0],
        "actor/bc_loss": bc_loss[0],
        "actor/q_loss": q_loss[0],
        "actor/grad_norm": norm[0],
    }


def _gradient(module: FlatModule) -> Tensor:
    module.attach_gradients()
    assert module.flat.grad is not None
    return module.flat.grad
