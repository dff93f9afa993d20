"""An update of the agents in a handful of native calls: what `dql.update` computes with autograd, on the backend "cpp".

Losses, gradients, Adam and averages are the same formulas over the same flat buffers and the same random numbers, so a
run may continue on the other path: the results differ by rounding.
"""

import torch

from dql import noise
from dql.actor_loss import update_actor
from dql.backend.base import Backend
from dql.backend.cpp import CppBackend, network, step_table, unfit
from dql.data import Batch
from dql.draws import UpdateSeeds
from dql.kernels.cpp import binding
from dql.learner import Cloner, Learner, draws_of, move_averages
from dql.networks import Denoiser, FlatModule
from dql.policy import DiffusionPolicy

Tensor = torch.Tensor


def runs_natively(agent: Cloner, backend: Backend) -> bool:
    """Whether the backend is "cpp" and nothing of the agent is frozen: autograd would leave that alone."""
    if not isinstance(backend, CppBackend):
        return False
    modules = agent.modules()
    for module in modules.values():
        if unfit(module) is not None:
            return False
        module.check_intact()
    return all(p.requires_grad for name in agent.trained() for p in modules[name].parameters())


def clone(agent: Cloner, batch: Batch, seeds: UpdateSeeds, backend: Backend) -> dict[str, Tensor]:
    """`update.clone`."""
    loss = bc_gradient(agent.policy, batch, seeds)
    return _scalars({"actor/bc_loss": loss, "actor/grad_norm": agent.actor_adam.step_natively(agent.lr_scale())})


def learn(agent: Learner, batch: Batch, seeds: UpdateSeeds, backend: Backend) -> dict[str, Tensor]:
    """`update.learn`."""
    metrics = critic_gradient(agent, batch, seeds)
    metrics["critic/grad_norm"] = agent.critic_adam.step_natively(agent.lr_scale())
    if agent.config.actor_gradient == "one-step":  # one call of the denoiser: autograd's
        actor = update_actor(agent, batch, draws_of(agent, seeds, len(batch.states)), backend)
    else:
        metrics |= actor_gradient(agent, batch, seeds)
        metrics["actor/grad_norm"] = agent.actor_adam.step_natively(agent.lr_scale())
        actor = {}
    move_averages(agent, binding.lerp, agent.ema_weight(agent.step))
    return _scalars(metrics) | actor


def _scalars(values: dict[str, float]) -> dict[str, Tensor]:
    tensors = torch.tensor(list(values.values()), dtype=torch.float32, device="cpu").unbind()
    return dict(zip(values, tensors, strict=True))


def bc_gradient(policy: DiffusionPolicy, batch: Batch, seeds: UpdateSeeds) -> float:
    """Writes the gradient of the noise-prediction loss into the denoiser's `flat.grad`; returns the loss."""
    denoiser = policy.denoiser
    return binding.bc_gradient(
        network(denoiser),
        denoiser.buffer,
        _loss_table(policy),
        batch.states,
        batch.actions,
        seeds.bc_t,
        seeds.bc_noise,
        policy.predict_epsilon,
        _gradient(denoiser),
    )


def critic_gradient(agent: Learner, batch: Batch, seeds: UpdateSeeds) -> dict[str, float]:
    """Writes the gradient of the critics' loss into their `flat.grad`; returns the metrics but the norm."""
    c = agent.config
    N = c.backup_candidates if c.max_q_backup else 1
    next_actions = _chain(agent.ema_policy, batch.next_states, N, seeds.target)[0]
    critic, target = agent.critic, agent.critic_target
    target_q, mean = binding.target_q(
        network(target), target.buffer, batch.next_states, next_actions, batch.rewards, batch.masks, c.discount
    )
    loss, q = binding.critic_gradient(
        network(critic), critic.buffer, batch.states, batch.actions, target_q, _gradient(critic)
    )
    return {"critic/loss": loss, "critic/q": q, "critic/target_q": mean}


def actor_gradient(agent: Learner, batch: Batch, seeds: UpdateSeeds) -> dict[str, float]:
    """Writes the gradient of the actor's loss into its `flat.grad`; returns the metrics but the norm."""
    policy, critic, eta = agent.policy, agent.critic, agent.config.eta
    bc_loss = bc_gradient(policy, batch, seeds)
    actions, saved = _chain(policy, batch.states, 1, seeds.actor, save=True)  # [B, A]
    maximised = 1 if int(noise.integers(seeds.coin, 2, 1)) else 2
    d_actions, q, scale = binding.q_gradient(network(critic), critic.buffer, maximised, batch.states, actions)
    binding.chain_backward(
        network(policy.denoiser),
        saved,
        step_table(policy.step_table(), policy.denoiser.spec.time_dim),
        batch.states,
        d_actions,
        _gradient(policy.denoiser),
        None,
        scale=-eta / (len(actions) * scale) if scale else float("nan"),
        accumulate=True,
    )
    q_loss = -q / scale if scale else float("nan")
    return {"actor/loss": bc_loss + eta * q_loss, "actor/bc_loss": bc_loss, "actor/q_loss": q_loss}


def _chain(
    policy: DiffusionPolicy, states: Tensor, candidates: int, seed: int, save: bool = False
) -> tuple[Tensor, object]:
    denoiser = policy.denoiser
    table = step_table(policy.step_table(), denoiser.spec.time_dim)
    return binding.chain(
        network(denoiser), denoiser.buffer, table, states, candidates, None, seed, policy.max_action, False, save
    )


def _gradient(module: FlatModule) -> Tensor:
    module.attach_gradients()
    assert module.flat.grad is not None
    return module.flat.grad


def _loss_table(policy: DiffusionPolicy) -> binding.Table:
    """The timesteps 0 .. T - 1 with the coefficients of `q_sample`."""
    denoiser: Denoiser = policy.denoiser
    made = policy.kept.get("loss table")
    if made is None or made[0] is not policy.schedule or made[1] is not denoiser:
        embedding = denoiser.time_mlp[0](torch.arange(policy.T, dtype=torch.float32, device="cpu"))  # [T, D]
        table = binding.Table(None, embedding, policy.q_sample_table(embedding))
        made = policy.kept["loss table"] = (policy.schedule, denoiser, table)
    return made[2]
