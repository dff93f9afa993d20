"""Updates of agents in one native call: what `dql.update` computes with autograd, on the backend "cpp".

Losses, gradients, Adam and averages are the same formulas over the same flat buffers and the same random numbers, so a
run may continue on the other path: the results differ by rounding.
"""

from collections.abc import Sequence
from dataclasses import astuple, fields, replace

import numpy as np
import torch

from dql import noise
from dql.actor_loss import update_actor
from dql.backend.base import Backend
from dql.backend.cpp import CppBackend, network, step_table, unfit
from dql.data import Batch, TransitionDataset
from dql.draws import UpdateSeeds
from dql.kernels.cpp import binding
from dql.learner import Cloner, Learner, draws_of, move_averages
from dql.networks import Denoiser
from dql.policy import DiffusionPolicy
from dql.sampler import backend_for

Tensor = torch.Tensor


def runs_natively(agent: Cloner, backend: Backend) -> bool:
    """Whether the backend is "cpp", nothing of the agent is frozen (autograd would leave that alone), and both actors'
    chains are of one kind, for which the native update has one table and one bound."""
    if not isinstance(backend, CppBackend):
        return False
    actor, average = agent.policy, getattr(agent, "ema_policy", agent.policy)
    if any(getattr(actor, name) != getattr(average, name) for name in _OF_A_CHAIN):
        return False
    modules, trained = agent.modules(), agent.trained()
    for name, module in modules.items():
        if unfit(module) is not None:
            return False
        if name not in trained:
            module.check_intact()
        elif not all(p.requires_grad for p in module.flat_parameters()):
            return False
    return True


def clone(agent: Cloner, batch: Batch, seeds: UpdateSeeds, backend: Backend) -> dict[str, Tensor]:
    """`update.clone`."""
    return _whole(agent, batch, seeds, _CLONED)


def learn(agent: Learner, batch: Batch, seeds: UpdateSeeds, backend: Backend) -> dict[str, Tensor]:
    """`update.learn`."""
    if agent.config.actor_gradient == "one-step":  # one call of the denoiser: autograd's
        metrics = _critic_gradient(agent, batch, seeds)
        metrics["critic/grad_norm"] = agent.critic_adam.step_natively(agent.lr_scale())
        actor = update_actor(agent, batch, draws_of(agent, seeds, len(batch.states)), backend)
        move_averages(agent, binding.lerp, agent.ema_weight(agent.step))
        return _scalars(metrics) | actor
    return _whole(agent, batch, seeds, _LEARNT)


def advance(
    agents: Sequence[Cloner],
    data: Sequence[TransitionDataset],
    counts: Sequence[int],
    threads: int,
    times: list[Tensor] | None = None,
) -> list[Tensor]:
    """The next updates of several agents, each with batches of its own from its data.

    Args:
        agents: M, which `takes_blocks` takes and which share no network.
        data: of each.
        counts: how many updates each does; fewer where its data draw fewer batches at a time, see
            `TransitionDataset.rows`.
        threads: CPU threads for all of them.
        times: None, or a list to which each agent's are added, see `binding.Updates`.

    Returns:
        for each agent the metrics of its updates in the order of `names`, float32 [n, m].
    """
    jobs = []
    for agent, own, n in zip(agents, data, counts, strict=True):
        agent.check_optimizers()
        rows = own.rows(agent.config.batch_size, agent.config.seed, agent.step)[:n]
        own.fetch(rows.reshape(-1))
        seeds = _seeds(agent.config.seed, agent.step, len(rows))
        job = _updates(agent, _columns(own), rows, seeds, names(agent))
        if times is not None:
            times.append(torch.zeros(len(rows), len(binding.PHASES) + 1, dtype=torch.int64, device="cpu"))
            job = replace(job, times=times[-1])
        jobs.append(job)
    found = binding.learn(jobs, threads)
    for agent, values in zip(agents, found, strict=True):
        agent.step += len(values)
    return [values.float() for values in found]


def takes_blocks(agent: Cloner, data: TransitionDataset) -> bool:
    """Whether `advance` does what as many calls of the agent's `update` would do."""
    if agent.config.actor_gradient == "one-step" or not all(
        column.is_contiguous() and column.is_cpu for column in _columns(data)
    ):
        return False
    if agent.policy.dtype is not torch.float32 or (data.state_dim, data.action_dim) != (
        agent.policy.state_dim,
        agent.policy.action_dim,
    ):
        return False
    rows = data.states[:1].expand(agent.config.batch_size, -1)
    return runs_natively(agent, backend_for(rows, agent.policy, agent.config.backend))


def names(agent: Cloner) -> tuple[str, ...]:
    """What the metrics of an update are called, in order."""
    return _LEARNT if type(agent).update_natively is learn else _CLONED


_OF_A_CHAIN = ("schedule", "max_action", "predict_epsilon")  # beside its denoiser
_CLONED = ("actor/bc_loss", "actor/grad_norm")
_LEARNT = (
    "critic/loss",
    "critic/q",
    "critic/target_q",
    "critic/grad_norm",
    "actor/loss",
    "actor/bc_loss",
    "actor/q_loss",
    "actor/grad_norm",
)


def _whole(agent: Cloner, batch: Batch, seeds: UpdateSeeds, names: tuple[str, ...]) -> dict[str, Tensor]:
    """An update in one native call; `names` are those of its metrics, and so of what it does."""
    bits = torch.from_numpy(np.array([astuple(seeds)], np.uint64).view(np.int64))
    (found,) = binding.learn([_updates(agent, _columns(batch), None, bits, names)], torch.get_num_threads())
    return dict(zip(names, found[0].float().unbind(), strict=True))


def _seeds(seed: int, first: int, n: int) -> Tensor:
    """The bits of `UpdateSeeds` of n updates, int64 [n, 5]."""
    columns = [noise.derived(seed, field.name, first, n) for field in fields(UpdateSeeds)]
    return torch.from_numpy(np.stack(columns, axis=1).view(np.int64))


def _columns(data: Batch | TransitionDataset) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return data.states, data.actions, data.rewards, data.next_states, data.masks


def _updates(
    agent: Cloner, data: tuple[Tensor, ...], rows: Tensor | None, seeds: Tensor, names: tuple[str, ...]
) -> binding.Updates:
    policy, steps = agent.policy, range(agent.step, agent.step + len(seeds))
    actor = binding.Weights(network(policy.denoiser), policy.denoiser.buffer)
    return binding.Updates(
        actor,
        agent.actor_adam.native(),
        _loss_table(policy),
        policy.predict_epsilon,
        policy.max_action,
        _critics(agent) if names is _LEARNT else None,  # type: ignore[arg-type]
        data,  # type: ignore[arg-type]
        rows,
        seeds,
        torch.tensor([agent.lr_scale(step) for step in steps], dtype=torch.float64, device="cpu"),
        torch.tensor([agent.ema_weight(step) for step in steps], dtype=torch.float64, device="cpu"),
    )


def _critics(agent: Learner) -> binding.Critics:
    c, denoiser = agent.config, agent.ema_policy.denoiser
    return binding.Critics(
        binding.Weights(network(denoiser), denoiser.buffer),
        binding.Weights(network(agent.critic), agent.critic.buffer),
        agent.critic_adam.native(),
        binding.Weights(network(agent.critic_target), agent.critic_target.buffer),
        step_table(agent.policy.step_table(), denoiser.spec.time_dim),
        c.discount,
        c.eta,
        c.tau,
        c.backup_candidates if c.max_q_backup else 1,
    )


def _scalars(values: dict[str, float]) -> dict[str, Tensor]:
    tensors = torch.tensor(list(values.values()), dtype=torch.float32, device="cpu").unbind()
    return dict(zip(values, tensors, strict=True))


def _critic_gradient(agent: Learner, batch: Batch, seeds: UpdateSeeds) -> dict[str, float]:
    """Writes the gradient of the critics' loss into their `flat.grad`; returns the metrics but the norm."""
    c, policy = agent.config, agent.ema_policy
    N = c.backup_candidates if c.max_q_backup else 1
    denoiser = policy.denoiser
    table = step_table(policy.step_table(), denoiser.spec.time_dim)
    next_actions, _ = binding.chain(
        network(denoiser), denoiser.buffer, table, batch.next_states, N, None, seeds.target, policy.max_action, False
    )
    critic, target = agent.critic, agent.critic_target
    target_q, mean = binding.target_q(
        network(target), target.buffer, batch.next_states, next_actions, batch.rewards, batch.masks, c.discount
    )
    critic.attach_gradients()
    assert critic.flat.grad is not None
    loss, q = binding.critic_gradient(
        network(critic), critic.buffer, batch.states, batch.actions, target_q, critic.flat.grad
    )
    return {"critic/loss": loss, "critic/q": q, "critic/target_q": mean}


def _loss_table(policy: DiffusionPolicy) -> binding.Table:
    """The timesteps 0 .. T - 1 with the coefficients of `q_sample`."""
    denoiser: Denoiser = policy.denoiser
    made = policy.kept.get("loss table")
    if made is None or made[0] is not policy.schedule or made[1] is not denoiser:
        embedding = denoiser.time_mlp[0](torch.arange(policy.T, dtype=torch.float32, device="cpu"))  # [T, D]
        table = binding.Table(None, embedding, policy.q_sample_table(embedding))
        made = policy.kept["loss table"] = (policy.schedule, denoiser, table)
    return made[2]
