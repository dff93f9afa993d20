"""The updates of the baselines written out once more, slowly and obviously, in float64, as in `transcription`.

It imports only torch, the standard library and `transcription`, from which it takes layers, gradients, Adam and
Diffusion-QL's own parts; it works on plain dictionaries of tensors, follows the papers one equation at a time and is
never made fast.

Sources, cited below by these names:
    TD3: Fujimoto, van Hoof, Meger 2018, arXiv 1802.09477.
    TD3+BC: Fujimoto, Gu 2021, arXiv 2106.06860, and the authors' published code.
    IQL: Kostrikov, Nair, Levine 2021, arXiv 2110.06169, and the authors' published code.
    EDP: Kang, Ma, Du, Pang, Yan 2023, arXiv 2305.20081, and the authors' published code.

Parameters have the names of nn.Sequential MLPs: actors and values net.{0,2,4}, critics q1_model.{0,2,4} and
q2_model.{0,2,4}, each with weight and bias; IQL's actor also has log_std. Any number of hidden layers will do.

Letters: B rows, S state size, A action size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from support import transcription as tr
from support.transcription import Params, Schedule, State

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


def relu(x: Tensor) -> Tensor:
    """x where it is positive, else 0; at 0 its derivative is 0."""
    return torch.where(x > 0, x, torch.zeros_like(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "mish": tr.mish}


@dataclass(frozen=True)
class BCHyper:
    """What an update of `update_bc` or `update_bc_gaussian` needs besides its state."""

    max_action: float = 1.0
    lr: float = 3e-4
    activation: str = "relu"


@dataclass(frozen=True)
class TD3BCHyper:
    """What one update of TD3+BC needs besides its state; by default what the published code has."""

    max_action: float = 1.0
    discount: float = 0.99
    tau: float = 0.005
    policy_noise: float = 0.2  # times max_action, as is noise_clip
    noise_clip: float = 0.5
    policy_delay: int = 2
    alpha: float = 2.5
    lr: float = 3e-4
    critic_lr: float = 3e-4
    activation: str = "relu"


@dataclass(frozen=True)
class IQLHyper:
    """What one update of IQL needs besides its state; by default what the published code has for MuJoCo tasks."""

    max_action: float = 1.0
    discount: float = 0.99
    tau: float = 0.005
    expectile: float = 0.7
    temperature: float = 3.0  # multiplies the advantage: the paper's beta
    max_weight: float = 100.0
    lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    num_updates: int | None = 1_000_000  # over which the actor's rate falls to zero; None: it stays
    activation: str = "relu"


def initial_state(
    actor: Params, critic: Params | None = None, value: Params | None = None, actor_target: bool = False
) -> State:
    """Step 0: targets are copies, Adam's moments are zero.

    Args:
        actor: the actor's parameters.
        critic: the twin critics', or None for behaviour cloning.
        value: the value network's, for IQL.
        actor_target: TD3+BC has a target of the actor too.

    Returns:
        actor, actor_m, actor_v, step (the updates done); with a critic also critic, critic_m, critic_v,
        critic_target; with a value also value, value_m, value_v; with actor_target also that.
    """
    state: State = {"step": 0}
    for name, params in (("actor", actor), ("critic", critic), ("value", value)):
        if params is not None:
            state[name] = {key: tensor.detach().double().clone() for key, tensor in params.items()}
            state[f"{name}_m"] = {key: torch.zeros_like(tensor) for key, tensor in state[name].items()}
            state[f"{name}_v"] = {key: torch.zeros_like(tensor) for key, tensor in state[name].items()}
    if critic is not None:
        state["critic_target"] = {key: tensor.clone() for key, tensor in state["critic"].items()}
    if actor_target:
        state["actor_target"] = {key: tensor.clone() for key, tensor in state["actor"].items()}
    return state


def mlp(params: Params, prefix: str, x: Tensor, activation: str) -> Tensor:
    """The linear layers under `prefix`, the activation after each but the last; [B, in] -> [B, out]."""
    names = tr.layer_names(params, prefix)
    for name in names[:-1]:
        x = ACTIVATIONS[activation](tr.linear(params, name, x))
    return tr.linear(params, names[-1], x)


def twin(params: Params, s: Tensor, a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Q1(s, a) and Q2(s, a), each an MLP over [s, a]; states [B, S], actions [B, A] -> two tensors [B]."""
    x = torch.cat([s, a], dim=1)  # [B, S + A]
    return mlp(params, "q1_model", x, activation)[:, 0], mlp(params, "q2_model", x, activation)[:, 0]


def state_value(params: Params, s: Tensor, activation: str) -> Tensor:
    """V(s); [B, S] -> [B]."""
    return mlp(params, "net", s, activation)[:, 0]


def tanh_actor(params: Params, s: Tensor, max_action: float, activation: str) -> Tensor:
    """max_action tanh(MLP(s)); [B, S] -> [B, A]."""
    return max_action * torch.tanh(mlp(params, "net", s, activation))


def gaussian_actor(params: Params, s: Tensor, max_action: float, activation: str) -> tuple[Tensor, Tensor]:
    """Mean and log_std of the policy whose network gives both: 2A outputs, the means' A come first.

    Returns:
        max_action tanh(first A) [B, A] and the last A, clamped to [-5, 2], [B, A].
    """
    outputs = mlp(params, "net", s, activation)  # [B, 2A]
    A = outputs.shape[1] // 2
    return max_action * torch.tanh(outputs[:, :A]), torch.clamp(outputs[:, A:], LOG_STD_MIN, LOG_STD_MAX)


def log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The sum over dimensions of log N(x; mean, exp(log_std)); each [B, A] (log_std also [A]) -> [B]."""
    z = (x - mean) / torch.exp(log_std)  # [B, A]
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=1)


def stepped(state: State, new: State, name: str, loss: Tensor, leaves: Params, n: int, lr: float) -> dict[str, Tensor]:
    """Adam's step n of the network `name` down the gradient of `loss`, written to `new`; the gradients, unclipped."""
    grads = tr.gradients(loss, leaves)
    new[name], new[f"{name}_m"], new[f"{name}_v"] = tr.adam(
        state[name], state[f"{name}_m"], state[f"{name}_v"], grads, n, lr
    )
    return grads


def bc_mse(actor: Params, states: Tensor, actions: Tensor, hyper: BCHyper) -> Tensor:
    """The mean over rows and dimensions of (pi(s) - a)^2; states [B, S], actions [B, A] -> a scalar."""
    difference = tanh_actor(actor, states, hyper.max_action, hyper.activation) - actions  # [B, A]
    return (difference**2).sum() / actions.numel()


def update_bc(state: State, batch: Mapping[str, Tensor], hyper: BCHyper) -> State:
    """One update of behaviour cloning with a deterministic actor, max_action tanh(MLP(s)).

    Args:
        state: as initial_state(actor) makes it; it is not changed.
        batch: states [B, S], actions [B, A].
        hyper: everything else.

    Returns:
        The new state, with `metrics` (bc_loss, actor_grad_norm) and `actor_grads`.
    """
    new: State = {"step": state["step"] + 1}
    leaves = tr.with_gradient(state["actor"])
    loss = bc_mse(leaves, batch["states"], batch["actions"], hyper)
    grads = stepped(state, new, "actor", loss, leaves, new["step"], hyper.lr)
    new["actor_grads"] = grads
    new["metrics"] = {"bc_loss": float(loss.detach()), "actor_grad_norm": tr.total_norm(grads)}
    return new


def bc_nll(actor: Params, states: Tensor, actions: Tensor, hyper: BCHyper) -> Tensor:
    """-mean over rows of log pi(a | s), summed over dimensions; states [B, S], actions [B, A] -> a scalar."""
    mean, log_std = gaussian_actor(actor, states, hyper.max_action, hyper.activation)  # [B, A], [B, A]
    return -log_normal(actions, mean, log_std).mean()


def update_bc_gaussian(state: State, batch: Mapping[str, Tensor], hyper: BCHyper) -> State:
    """One update of behaviour cloning with a Gaussian whose mean and spread both come from the state.

    Args:
        state: as initial_state(actor) makes it, the actor having 2A outputs; it is not changed.
        batch: states [B, S], actions [B, A].
        hyper: everything else.

    Returns:
        The new state, with `metrics` (bc_loss, actor_grad_norm) and `actor_grads`.
    """
    new: State = {"step": state["step"] + 1}
    leaves = tr.with_gradient(state["actor"])
    loss = bc_nll(leaves, batch["states"], batch["actions"], hyper)
    grads = stepped(state, new, "actor", loss, leaves, new["step"], hyper.lr)
    new["actor_grads"] = grads
    new["metrics"] = {"bc_loss": float(loss.detach()), "actor_grad_norm": tr.total_norm(grads)}
    return new


def standardised(states: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(s - mean) / (std + 1e-3) (TD3+BC, section 5); [B, S], mean and std [S] -> [B, S]."""
    return (states - mean) / (std + 1e-3)


def td3_target(
    state: State, s_next: Tensor, rewards: Tensor, masks: Tensor, target_noise: Tensor, hyper: TD3BCHyper
) -> Tensor:
    """y = r + mask * discount * min(Q1', Q2')(s', clamp(pi'(s') + clipped noise)) (TD3, algorithm 1), no gradient.

    Args:
        state: its actor_target and critic_target are read.
        s_next: [B, S], standardised.
        rewards, masks: [B].
        target_noise: standard normals [B, A].
        hyper: everything else.

    Returns:
        [B].
    """
    bound = hyper.noise_clip * hyper.max_action
    with torch.no_grad():
        noise = torch.clamp(target_noise * hyper.policy_noise * hyper.max_action, -bound, bound)  # [B, A]
        actions = tanh_actor(state["actor_target"], s_next, hyper.max_action, hyper.activation) + noise  # [B, A]
        actions = torch.clamp(actions, -hyper.max_action, hyper.max_action)
        q1, q2 = twin(state["critic_target"], s_next, actions, hyper.activation)  # [B], [B]
        return rewards.reshape(-1) + masks.reshape(-1) * hyper.discount * torch.minimum(q1, q2)


def twin_loss(critic: Params, states: Tensor, actions: Tensor, y: Tensor, activation: str) -> Tensor:
    """mean (Q1(s, a) - y)^2 + mean (Q2(s, a) - y)^2; states [B, S], actions [B, A], y [B] -> a scalar."""
    q1, q2 = twin(critic, states, actions, activation)  # [B], [B]
    return ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()


def td3_bc_losses(
    actor: Params, critic: Params, s: Tensor, actions: Tensor, hyper: TD3BCHyper
) -> tuple[Tensor, Tensor, float]:
    """The two terms of the actor's loss (TD3+BC, equations 3 and 5), to be added.

    Args:
        actor: its parameters.
        critic: the critics', just updated; only the first is read.
        s: [B, S], standardised.
        actions: [B, A].
        hyper: alpha, max_action and activation are read.

    Returns:
        -lambda mean Q1(s, pi(s)); mean (pi(s) - a)^2; lambda = alpha / mean |Q1(s, pi(s))|, a constant.
    """
    pi = tanh_actor(actor, s, hyper.max_action, hyper.activation)  # [B, A]
    q, _ = twin(critic, s, pi, hyper.activation)  # [B]
    weight = hyper.alpha / float(q.detach().abs().mean())
    return -weight * q.mean(), ((pi - actions) ** 2).sum() / actions.numel(), weight


def update_td3_bc(
    state: State,
    batch: Mapping[str, Tensor],
    randomness: Mapping[str, Tensor],
    hyper: TD3BCHyper,
    mean: Tensor,
    std: Tensor,
) -> State:
    """One whole update of TD3+BC; the given state is not changed.

    The critics' step comes first. In every policy_delay-th update, counted from 1, the actor's step on the critics
    just updated follows, then both targets move. Adam counts an actor's steps, not the updates.

    Args:
        state: as initial_state(actor, critic, actor_target=True) makes it.
        batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B]; states as they are in the
            dataset.
        randomness: target_noise [B, A], standard normals.
        hyper: everything else.
        mean, std: of the dataset's states, [S].

    Returns:
        The new state, with `metrics` (critic_loss, critic_grad_norm, target_q [B]; where the actor moved also
        q_loss, bc_loss, actor_loss, lambda, actor_grad_norm), `critic_grads` and perhaps `actor_grads`.
    """
    n = state["step"] + 1
    new: State = {"step": n}
    s = standardised(batch["states"], mean, std)  # [B, S]
    s_next = standardised(batch["next_states"], mean, std)  # [B, S]

    y = td3_target(state, s_next, batch["rewards"], batch["masks"], randomness["target_noise"], hyper)  # [B]
    critic_leaves = tr.with_gradient(state["critic"])
    loss_critic = twin_loss(critic_leaves, s, batch["actions"], y, hyper.activation)
    new["critic_grads"] = stepped(state, new, "critic", loss_critic, critic_leaves, n, hyper.critic_lr)
    new["metrics"] = {
        "critic_loss": float(loss_critic.detach()),
        "critic_grad_norm": tr.total_norm(new["critic_grads"]),
        "target_q": y,
    }

    if n % hyper.policy_delay != 0:
        for name in ("actor", "actor_m", "actor_v", "actor_target", "critic_target"):
            new[name] = state[name]
        return new

    actor_leaves = tr.with_gradient(state["actor"])
    loss_q, loss_bc, weight = td3_bc_losses(actor_leaves, new["critic"], s, batch["actions"], hyper)
    loss_actor = loss_q + loss_bc
    new["actor_grads"] = stepped(state, new, "actor", loss_actor, actor_leaves, n // hyper.policy_delay, hyper.lr)
    new["critic_target"] = tr.moved(state["critic_target"], new["critic"], hyper.tau)
    new["actor_target"] = tr.moved(state["actor_target"], new["actor"], hyper.tau)
    new["metrics"] |= {
        "q_loss": float(loss_q.detach()),
        "bc_loss": float(loss_bc.detach()),
        "actor_loss": float(loss_actor.detach()),
        "lambda": weight,
        "actor_grad_norm": tr.total_norm(new["actor_grads"]),
    }
    return new


def expectile_loss(value: Params, q: Tensor, states: Tensor, hyper: IQLHyper) -> Tensor:
    """The mean of |expectile - 1(u <= 0)| u^2, u = q - V(s) (IQL, equation 5); q [B], states [B, S] -> a scalar."""
    u = q - state_value(value, states, hyper.activation)  # [B]
    above = (u > 0).double()  # [B]
    weight = above * hyper.expectile + (1.0 - above) * (1.0 - hyper.expectile)  # [B]
    return (weight * u**2).mean()


def advantage_weights(advantage: Tensor, hyper: IQLHyper) -> Tensor:
    """min(exp(temperature * advantage), max_weight), a constant; [B] -> [B]."""
    return torch.clamp(torch.exp(hyper.temperature * advantage.detach()), max=hyper.max_weight)


def iql_actor_loss(actor: Params, states: Tensor, actions: Tensor, weights: Tensor, hyper: IQLHyper) -> Tensor:
    """-mean of weights * log pi(a | s) (IQL, equation 7); states [B, S], actions [B, A], weights [B] -> a scalar.

    The policy is a Gaussian with mean max_action tanh(MLP(s)) and log_std a parameter [A], clamped to [-5, 2].
    """
    mean = tanh_actor(actor, states, hyper.max_action, hyper.activation)  # [B, A]
    log_std = torch.clamp(actor["log_std"], LOG_STD_MIN, LOG_STD_MAX)  # [A]
    return -(weights * log_normal(actions, mean, log_std)).mean()


def iql_actor_lr(step: int, hyper: IQLHyper) -> float:
    """lr (1 + cos(pi step / num_updates)) / 2 with `step` updates done before; lr without num_updates."""
    return hyper.lr if hyper.num_updates is None else tr.cosine_lr(hyper.lr, step, hyper.num_updates)


def update_iql(state: State, batch: Mapping[str, Tensor], hyper: IQLHyper) -> State:
    """One whole update of IQL in the order of the published code; the given state is not changed.

    The value's step towards the target critics; the actor's step, its advantages from the target critics and the
    value just updated; the critics' step towards r + mask * discount * V(s'), V just updated; the target critics.

    Args:
        state: as initial_state(actor, critic, value) makes it.
        batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B].
        hyper: everything else.

    Returns:
        The new state, with `metrics` (value_loss, actor_loss, critic_loss, value_grad_norm, actor_grad_norm,
        critic_grad_norm, actor_lr as floats; advantage, weights, target_q [B]), `value_grads`, `actor_grads` and
        `critic_grads`.
    """
    states, actions = batch["states"], batch["actions"]
    n = state["step"] + 1
    new: State = {"step": n}

    q1, q2 = twin(state["critic_target"], states, actions, hyper.activation)  # [B], [B]
    q = torch.minimum(q1, q2)
    value_leaves = tr.with_gradient(state["value"])
    loss_value = expectile_loss(value_leaves, q, states, hyper)
    new["value_grads"] = stepped(state, new, "value", loss_value, value_leaves, n, hyper.value_lr)

    advantage = q - state_value(new["value"], states, hyper.activation)  # [B]
    weights = advantage_weights(advantage, hyper)  # [B]
    actor_leaves = tr.with_gradient(state["actor"])
    loss_actor = iql_actor_loss(actor_leaves, states, actions, weights, hyper)
    actor_lr = iql_actor_lr(state["step"], hyper)
    new["actor_grads"] = stepped(state, new, "actor", loss_actor, actor_leaves, n, actor_lr)

    v_next = state_value(new["value"], batch["next_states"], hyper.activation)  # [B]
    y = batch["rewards"].reshape(-1) + batch["masks"].reshape(-1) * hyper.discount * v_next  # [B]
    critic_leaves = tr.with_gradient(state["critic"])
    loss_critic = twin_loss(critic_leaves, states, actions, y, hyper.activation)
    new["critic_grads"] = stepped(state, new, "critic", loss_critic, critic_leaves, n, hyper.critic_lr)

    new["critic_target"] = tr.moved(state["critic_target"], new["critic"], hyper.tau)
    new["metrics"] = {
        "value_loss": float(loss_value.detach()),
        "actor_loss": float(loss_actor.detach()),
        "critic_loss": float(loss_critic.detach()),
        "value_grad_norm": tr.total_norm(new["value_grads"]),
        "actor_grad_norm": tr.total_norm(new["actor_grads"]),
        "critic_grad_norm": tr.total_norm(new["critic_grads"]),
        "actor_lr": actor_lr,
        "advantage": advantage,
        "weights": weights,
        "target_q": y,
    }
    return new


def approximate_actions(schedule: Schedule, x_t: Tensor, t: Tensor, eps: Tensor, max_action: float) -> Tensor:
    """clamp((x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), +-max_action), row by row (EDP's action approximation).

    Args:
        schedule: of T steps.
        x_t: noisy actions [B, A].
        t: 0-based timesteps [B].
        eps: the noise predicted in them [B, A], with its gradient.
        max_action: bound of the result.

    Returns:
        [B, A].
    """
    rows = []
    for b in range(x_t.shape[0]):
        abar = float(schedule.alphas_cumprod[int(t[b])])
        rows.append((x_t[b] - math.sqrt(1.0 - abar) * eps[b]) / math.sqrt(abar))  # [A]
    return torch.clamp(torch.stack(rows), -max_action, max_action)


def edp_losses(
    actor: Params,
    critic: Params,
    schedule: Schedule,
    batch: Mapping[str, Tensor],
    randomness: Mapping[str, object],
    max_action: float,
) -> tuple[Tensor, Tensor]:
    """The two terms of EDP's actor, from one prediction of the noise.

    Args:
        actor: the denoiser's parameters.
        critic: the critics', just updated.
        schedule: of T steps.
        batch: states [B, S], actions [B, A].
        randomness: bc_t [B], bc_noise [B, A], coin.
        max_action: bound of the actions.

    Returns:
        The mean of (eps_theta - eps)^2, and `transcription.q_loss` at the approximate actions, not yet times eta.
    """
    t, noise = randomness["bc_t"], randomness["bc_noise"]
    assert isinstance(t, Tensor) and isinstance(noise, Tensor)
    x_t = tr.q_sample(schedule, batch["actions"], t, noise)  # [B, A]
    eps = tr.denoiser(actor, x_t, t, batch["states"])  # [B, A]
    loss_bc = ((eps - noise) ** 2).sum() / noise.numel()
    actions = approximate_actions(schedule, x_t, t, eps, max_action)  # [B, A]
    return loss_bc, tr.q_loss(critic, batch["states"], actions, bool(randomness["coin"]))


def update_edp(state: State, batch: Mapping[str, Tensor], randomness: Mapping[str, object], hyper: tr.Hyper) -> State:
    """One update of Diffusion-QL with EDP's action approximation in the actor's Q term; else as `tr.update`.

    EDP's published code has another update around the approximation: its actor sees the critics as they were before
    their step, the maximised critic's own mean |Q| divides, and the averaged actor moves as the target critics do.

    Args:
        state: as transcription.initial_state makes it; it is not changed.
        batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B].
        randomness: target_noise [T, B, A] ([T, B, 10, A] with max_q_backup), bc_t [B], bc_noise [B, A],
            coin (bool: True, Q1 is maximised and |Q2| divides).
        hyper: everything else.

    Returns:
        The new state, with `metrics`, `critic_grads` and `actor_grads` as `tr.update` has them.
    """
    schedule = tr.make_schedule(hyper.beta_schedule, hyper.T)
    n = state["step"] + 1
    new: State = {}

    target_noise = randomness["target_noise"]
    assert isinstance(target_noise, Tensor)
    y = tr.target_q(
        state["ema_actor"],
        state["critic_target"],
        schedule,
        batch,
        target_noise,
        hyper.discount,
        hyper.max_action,
        hyper.max_q_backup,
    )  # [B]
    critic_leaves = tr.with_gradient(state["critic"])
    loss_critic = tr.critic_loss(critic_leaves, batch["states"], batch["actions"], y)
    critic_grads = tr.gradients(loss_critic, critic_leaves)
    new["critic"], new["critic_m"], new["critic_v"] = tr.adam(
        state["critic"],
        state["critic_m"],
        state["critic_v"],
        tr.clipped(critic_grads, hyper.grad_norm),
        n,
        hyper.critic_lr,
    )

    actor_leaves = tr.with_gradient(state["actor"])
    loss_bc, loss_q = edp_losses(actor_leaves, new["critic"], schedule, batch, randomness, hyper.max_action)
    loss_actor = loss_bc + hyper.eta * loss_q
    actor_grads = tr.gradients(loss_actor, actor_leaves)
    new["actor"], new["actor_m"], new["actor_v"] = tr.adam(
        state["actor"], state["actor_m"], state["actor_v"], tr.clipped(actor_grads, hyper.grad_norm), n, hyper.lr
    )

    new["ema_actor"] = state["ema_actor"]
    if tr.ema_is_due(state["step"], hyper):
        new["ema_actor"] = tr.moved(state["ema_actor"], new["actor"], 1 - hyper.ema_decay)
    new["critic_target"] = tr.moved(state["critic_target"], new["critic"], hyper.tau)
    new["step"] = n
    new["critic_grads"], new["actor_grads"] = critic_grads, actor_grads
    new["metrics"] = {
        "critic_loss": float(loss_critic.detach()),
        "bc_loss": float(loss_bc.detach()),
        "q_loss": float(loss_q.detach()),
        "actor_loss": float(loss_actor.detach()),
        "critic_grad_norm": tr.total_norm(critic_grads),
        "actor_grad_norm": tr.total_norm(actor_grads),
        "target_q": y,
    }
    return new
