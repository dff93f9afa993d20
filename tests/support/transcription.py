"""Diffusion-QL written out once more, slowly and obviously, in float64.

This module is what the rest of the project is measured against, so it shares nothing with it: it imports only
torch and the standard library (numpy for one rounding rule), works on plain dictionaries of tensors and
follows the equations of the papers one by one. It is never made fast.

Sources, cited below by these names:
    Diffusion-QL: Wang, Hunt, Zhou 2022, arXiv 2208.06193, and the authors' published code, which fixes what
        the paper leaves open (clamped x0, the posterior's variance, the coin between the two critics).
    DDPM: Ho, Jain, Abbeel 2020, arXiv 2006.11239.
    DDIM: Song, Meng, Ermon 2021, arXiv 2010.02502.
    DPM-Solver++: Lu et al. 2022, arXiv 2211.01095.
    Random123: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

Letters: B rows, S state size, A action size, H hidden width, T trained steps, K steps run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Params = Mapping[str, Tensor]
State = dict[str, Any]


def betas(name: str, T: int) -> Tensor:
    """The noise schedule beta_1 .. beta_T of the published code, index 0 holding beta_1.

    vp:      beta_t = 1 - exp(-b_min/T - (b_max - b_min)(2t - 1) / (2 T^2)), b_min = 0.1, b_max = 10.
    linear:  T values from 1e-4 to 2e-2, whatever T is.
    cosine:  beta_t = 1 - f(x_t)/f(x_{t-1}), clipped to [0, 0.999], with s = 0.008,
             f(x) = cos^2((x/(T+1) + s)/(1 + s) pi/2), at the T+1 points x_0 .. x_T
             evenly spaced from 0 to T+1 (the published spacing, not the usual one of 1).

    Args:
        name: "vp", "linear" or "cosine".
        T: number of diffusion steps, at least 1.

    Returns:
        float64 tensor [T].

    Raises:
        ValueError: for another name or T < 1.
    """
    if T < 1:
        raise ValueError(f"T is {T}; a schedule has at least one step.")
    values: list[float] = []
    if name == "vp":
        b_min, b_max = 0.1, 10.0
        for t in range(1, T + 1):
            alpha = math.exp(-b_min / T - 0.5 * (b_max - b_min) * (2 * t - 1) / T**2)
            values.append(1.0 - alpha)
    elif name == "linear":
        first, last = 1e-4, 2e-2
        for i in range(T):
            values.append(first if T == 1 else first + (last - first) * i / (T - 1))
    elif name == "cosine":
        s = 0.008

        def f(x: float) -> float:
            return math.cos((x / (T + 1) + s) / (1 + s) * math.pi / 2) ** 2

        points = [(T + 1) * i / T for i in range(T + 1)]  # T+1 points, so T gaps, over a length of T+1
        for i in range(1, T + 1):
            beta = 1.0 - f(points[i]) / f(points[i - 1])
            values.append(min(max(beta, 0.0), 0.999))
    else:
        raise ValueError(f"There is no schedule {name!r}; choose vp, linear or cosine.")
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Schedule:
    """A schedule with all derived from it, each a float64 tensor [T] named as in the published state_dict."""

    T: int
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor


def make_schedule(name: str, T: int) -> Schedule:
    """All derived quantities, one timestep at a time (DDPM, section 2 and equation 7).

    Args:
        name: "vp", "linear" or "cosine".
        T: number of diffusion steps.

    Returns:
        The schedule; index t (0-based) belongs to the paper's step t + 1.
    """
    beta_values = betas(name, T)
    rows: dict[str, list[float]] = {field: [] for field in Schedule.__dataclass_fields__ if field != "T"}
    abar_prev = 1.0
    for t in range(T):
        beta = float(beta_values[t])
        alpha = 1.0 - beta
        abar = abar_prev * alpha
        variance = beta * (1.0 - abar_prev) / (1.0 - abar)
        rows["betas"].append(beta)
        rows["alphas"].append(alpha)
        rows["alphas_cumprod"].append(abar)
        rows["alphas_cumprod_prev"].append(abar_prev)
        rows["sqrt_alphas_cumprod"].append(math.sqrt(abar))
        rows["sqrt_one_minus_alphas_cumprod"].append(math.sqrt(1.0 - abar))
        rows["log_one_minus_alphas_cumprod"].append(math.log(1.0 - abar))
        rows["sqrt_recip_alphas_cumprod"].append(math.sqrt(1.0 / abar))
        rows["sqrt_recipm1_alphas_cumprod"].append(math.sqrt(1.0 / abar - 1.0))
        rows["posterior_variance"].append(variance)
        # the variance is 0 at t = 0, where its logarithm would be -inf
        rows["posterior_log_variance_clipped"].append(math.log(max(variance, 1e-20)))
        rows["posterior_mean_coef1"].append(beta * math.sqrt(abar_prev) / (1.0 - abar))
        rows["posterior_mean_coef2"].append((1.0 - abar_prev) * math.sqrt(alpha) / (1.0 - abar))
        abar_prev = abar
    return Schedule(T=T, **{key: torch.tensor(row, dtype=torch.float64) for key, row in rows.items()})


def spaced_timesteps(T: int, K: int) -> list[int]:
    """K of the T timesteps, descending: round(linspace(T-1, 0, K)), halves to even; [T-1] for K = 1.

    Raises:
        ValueError: unless 1 <= K <= T.
    """
    if not 1 <= K <= T:
        raise ValueError(f"K is {K}, T is {T}; K lies between 1 and T.")
    return [int(t) for t in np.round(np.linspace(T - 1, 0, K))]


def mish(x: Tensor) -> Tensor:
    """x * tanh(log(1 + exp(x))), elementwise; log(exp(x) + exp(0)) is taken without overflow."""
    return x * torch.tanh(torch.logaddexp(x, torch.zeros_like(x)))


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x W^T + b with W = params[name.weight] [out, in], b = params[name.bias] [out]; [B, in] -> [B, out]."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def sinusoidal_embedding(t: Tensor, size: int) -> Tensor:
    """[sin(t f_0) .., cos(t f_0) ..] with n = size/2 frequencies f_i = exp(-i log(10000)/(n-1)).

    Args:
        t: timesteps [B], any number type.
        size: even, at least 4; the published networks have 16.

    Returns:
        float64 tensor [B, size].
    """
    n = size // 2
    rows = []
    for step in t.tolist():
        angles = [step * math.exp(-math.log(10000.0) / (n - 1) * i) for i in range(n)]
        rows.append([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, size)


def layer_names(params: Params, prefix: str) -> list[str]:
    """The linear layers under `prefix` in running order, read from the names: mid_layer.0, .2, ..."""
    numbers = {int(key.split(".")[1]) for key in params if key.startswith(f"{prefix}.")}
    return [f"{prefix}.{number}" for number in sorted(numbers)]


def denoiser(params: Params, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """eps_theta(x, t, s): MLP over [x, time_mlp(t), s] with Mish after every layer but the last.

    Args:
        params: time_mlp.{1,3}, mid_layer.{0,2,...}, final_layer, each with weight and bias, float64.
        x: noisy actions [B, A].
        t: 0-based timesteps [B].
        s: states [B, S].

    Returns:
        Predicted noise [B, A].
    """
    h = sinusoidal_embedding(t, params["time_mlp.1.weight"].shape[1])  # [B, 16]
    h = linear(params, "time_mlp.3", mish(linear(params, "time_mlp.1", h)))  # [B, 16]
    h = torch.cat([x, h, s], dim=1)  # [B, A + 16 + S]
    for name in layer_names(params, "mid_layer"):
        h = mish(linear(params, name, h))  # [B, H]
    return linear(params, "final_layer", h)  # [B, A]


def critic(params: Params, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Q1(s, a) and Q2(s, a): two separate MLPs over [s, a], Mish after every layer but the last.

    Args:
        params: q1_model.{0,2,4,6} and q2_model.{0,2,4,6}, each with weight and bias.
        s: states [B, S].
        a: actions [B, A].

    Returns:
        Two tensors [B].
    """
    values = []
    for prefix in ("q1_model", "q2_model"):
        h = torch.cat([s, a], dim=1)  # [B, S + A]
        names = layer_names(params, prefix)
        for name in names[:-1]:
            h = mish(linear(params, name, h))  # [B, H]
        values.append(linear(params, names[-1], h)[:, 0])  # [B]
    return values[0], values[1]


def denoiser_params(state_dict: Params) -> dict[str, Tensor]:
    """The denoiser's part of a published actor state_dict, float64, without `model.` and buffers."""
    return {key[6:]: value.detach().double() for key, value in state_dict.items() if key.startswith("model.")}


def predict_x0(params: Params, schedule: Schedule, x: Tensor, t: int, states: Tensor, max_action: float) -> Tensor:
    """clamp((x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t), +-max_action) (DDPM, equation 15), [B, A]."""
    abar = schedule.alphas_cumprod[t]
    eps = denoiser(params, x, torch.full((x.shape[0],), t), states)  # [B, A]
    x0 = (x - torch.sqrt(1.0 - abar) * eps) / torch.sqrt(abar)  # [B, A]
    return torch.clamp(x0, -max_action, max_action)


def abar_after(schedule: Schedule, timesteps: Sequence[int], k: int) -> float:
    """alpha_bar where step k of the chain arrives: that of the next chosen timestep, 1 after the last."""
    return float(schedule.alphas_cumprod[timesteps[k + 1]]) if k + 1 < len(timesteps) else 1.0


def ddpm_chain(
    params: Params,
    schedule: Schedule,
    states: Tensor,
    noise: Tensor,
    max_action: float,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """The published reverse chain: x0 from eps, clamped; posterior mean; noise; the result clamped once more.

    q(x_{t-1} | x_t, x0) is DDPM's equation 7. Between chosen timesteps that are not neighbours, the same
    formula holds with the steps in between composed into one: alpha = abar_t / abar_u, beta = 1 - alpha.

    Args:
        params: the denoiser's.
        schedule: of the T trained steps.
        states: [B, S].
        noise: [K, B, A]; noise[0] is x_T, noise[k] feeds the update of step k-1.
        max_action: bound of x0 and of the result.
        timesteps: K descending 0-based timesteps; by default all T of them, the published sampler.

    Returns:
        Actions [B, A].
    """
    if timesteps is None:
        timesteps = list(range(schedule.T - 1, -1, -1))
    assert noise.shape[0] == len(timesteps), f"noise has {noise.shape[0]} steps, the chain {len(timesteps)}"
    x = noise[0]  # [B, A]
    for k, t in enumerate(timesteps):
        x0 = predict_x0(params, schedule, x, t, states, max_action)  # [B, A]
        abar, abar_u = float(schedule.alphas_cumprod[t]), abar_after(schedule, timesteps, k)
        alpha = abar / abar_u
        beta = 1.0 - alpha
        mean = beta * math.sqrt(abar_u) / (1.0 - abar) * x0  # [B, A]
        mean = mean + (1.0 - abar_u) * math.sqrt(alpha) / (1.0 - abar) * x
        if k + 1 == len(timesteps):
            x = mean  # no noise at the end: the posterior variance is 0 there
        else:
            variance = beta * (1.0 - abar_u) / (1.0 - abar)
            x = mean + math.exp(0.5 * math.log(max(variance, 1e-20))) * noise[k + 1]
    return torch.clamp(x, -max_action, max_action)


def ddim_chain(
    params: Params,
    schedule: Schedule,
    states: Tensor,
    noise: Tensor,
    max_action: float,
    timesteps: Sequence[int],
    stochasticity: float = 0.0,
) -> Tensor:
    """DDIM's own form (its equations 12 and 16), with eps recomputed from the clamped x0.

    x_u = sqrt(abar_u) x0 + sqrt(1 - abar_u - sigma^2) eps + sigma z,
    sigma = stochasticity * sqrt((1 - abar_u)/(1 - abar_t)) sqrt(1 - abar_t/abar_u).

    Args:
        params, schedule, states, noise, max_action, timesteps: as in ddpm_chain; noise[1:] is read only where
            sigma > 0.
        stochasticity: DDIM's eta, in [0, 1]: 0 is deterministic, 1 is the respaced DDPM.

    Returns:
        Actions [B, A].

    Raises:
        ValueError: for a stochasticity outside [0, 1].
    """
    if not 0.0 <= stochasticity <= 1.0:
        raise ValueError(f"stochasticity is {stochasticity}; it lies between 0 and 1.")
    x = noise[0]  # [B, A]
    for k, t in enumerate(timesteps):
        x0 = predict_x0(params, schedule, x, t, states, max_action)  # [B, A]
        abar, abar_u = float(schedule.alphas_cumprod[t]), abar_after(schedule, timesteps, k)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1.0 - abar)  # [B, A], consistent with the clamped x0
        sigma = stochasticity * math.sqrt((1.0 - abar_u) / (1.0 - abar)) * math.sqrt(1.0 - abar / abar_u)
        x = math.sqrt(abar_u) * x0 + math.sqrt(max(1.0 - abar_u - sigma**2, 0.0)) * eps
        if sigma > 0.0:
            x = x + sigma * noise[k + 1]
    return torch.clamp(x, -max_action, max_action)


def dpmpp_2m_chain(
    params: Params,
    schedule: Schedule,
    states: Tensor,
    noise: Tensor,
    max_action: float,
    timesteps: Sequence[int],
) -> Tensor:
    """DPM-Solver++(2M), data prediction (DPM-Solver++, algorithm 2), in its lambda/h/r form.

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha/sigma), a step from t_k to t_{k+1} is
        h_k = lambda_{k+1} - lambda_k,   r_k = h_{k-1} / h_k,
        D_k = (1 + 1/(2 r_k)) x0_k - 1/(2 r_k) x0_{k-1},
        x_{k+1} = sigma_{k+1}/sigma_k x_k - alpha_{k+1} (exp(-h_k) - 1) D_k.
    The first step has no x0_{k-1} and takes D_0 = x0_0. The last step goes to abar = 1, where lambda is
    infinite: its first-order limit is x0 itself.

    Args:
        params, schedule, states, max_action, timesteps: as in ddpm_chain.
        noise: [K, B, A] or [1, B, A]; only noise[0] is read, the solver is deterministic.

    Returns:
        Actions [B, A].
    """
    alpha = [math.sqrt(float(schedule.alphas_cumprod[t])) for t in timesteps]
    sigma = [math.sqrt(1.0 - float(schedule.alphas_cumprod[t])) for t in timesteps]
    lam = [math.log(a / b) for a, b in zip(alpha, sigma, strict=True)]
    x = noise[0]  # [B, A]
    x0_prev: Tensor | None = None
    h_prev = math.nan
    for k, t in enumerate(timesteps):
        x0 = predict_x0(params, schedule, x, t, states, max_action)  # [B, A]
        if k + 1 == len(timesteps):
            x = x0
            break
        h = lam[k + 1] - lam[k]
        if x0_prev is None:
            D = x0  # [B, A]
        else:
            r = h_prev / h
            D = (1.0 + 1.0 / (2.0 * r)) * x0 - 1.0 / (2.0 * r) * x0_prev  # [B, A]
        x = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * (math.exp(-h) - 1.0) * D
        x0_prev, h_prev = x0, h
    return torch.clamp(x, -max_action, max_action)


CHAINS = {"ddpm": ddpm_chain, "ddim": ddim_chain, "dpm-solver++": dpmpp_2m_chain}  # as `dql.schedule.SAMPLERS`


def q_sample(schedule: Schedule, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """sqrt(abar_t) a + sqrt(1 - abar_t) eps (DDPM, equation 4); actions, noise [B, A], t [B] -> [B, A]."""
    rows = []
    for b in range(actions.shape[0]):
        abar = float(schedule.alphas_cumprod[int(t[b])])
        rows.append(math.sqrt(abar) * actions[b] + math.sqrt(1.0 - abar) * noise[b])  # [A]
    return torch.stack(rows)


def bc_loss(params: Params, schedule: Schedule, states: Tensor, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean over rows and dimensions of (eps_theta(q_sample(a, t, eps), t, s) - eps)^2 (Diffusion-QL, L_d).

    Args:
        params: the denoiser's.
        schedule: of T steps.
        states: [B, S].
        actions: [B, A].
        t: 0-based timesteps [B].
        noise: eps [B, A].

    Returns:
        A scalar.
    """
    predicted = denoiser(params, q_sample(schedule, actions, t, noise), t, states)  # [B, A]
    return ((predicted - noise) ** 2).sum() / noise.numel()


def q_loss(critic_params: Params, states: Tensor, new_actions: Tensor, coin: bool) -> Tensor:
    """-mean Q_i(s, a) / mean |Q_j(s, a)|, the divisor a constant (Diffusion-QL, L_q, its weight normalised).

    Args:
        critic_params: the critic's, just updated.
        states: [B, S].
        new_actions: the actor's chain [B, A], with its gradient.
        coin: True: Q1 is maximised and |Q2| divides; False: the other way round.

    Returns:
        A scalar, not yet multiplied by eta.
    """
    q1, q2 = critic(critic_params, states, new_actions)  # [B], [B]
    maximised, divisor = (q1, q2) if coin else (q2, q1)
    return -maximised.mean() / divisor.detach().abs().mean()


def target_q(
    ema_params: Params,
    critic_target_params: Params,
    schedule: Schedule,
    batch: Mapping[str, Tensor],
    noise: Tensor,
    discount: float,
    max_action: float,
    max_q_backup: bool,
) -> Tensor:
    """y = r + mask * discount * min(Q1', Q2')(s', a'), a' from the EMA actor's whole chain; no gradient.

    With max_q_backup each critic takes its own maximum over the candidates of a state first, then comes the
    minimum.

    Args:
        ema_params: the EMA denoiser's.
        critic_target_params: the target critic's.
        schedule: of T steps.
        batch: rewards [B], next_states [B, S], masks [B] (0 where the episode terminated).
        noise: [K, B, A], or [K, B, N, A] with max_q_backup (the published N is 10).
        discount: gamma.
        max_action: bound of the actions.
        max_q_backup: see above.

    Returns:
        [B].
    """
    next_states = batch["next_states"]
    with torch.no_grad():
        if max_q_backup:
            q1s, q2s = [], []
            for n in range(noise.shape[2]):
                actions = ddpm_chain(ema_params, schedule, next_states, noise[:, :, n], max_action)  # [B, A]
                q1_n, q2_n = critic(critic_target_params, next_states, actions)  # [B], [B]
                q1s.append(q1_n)
                q2s.append(q2_n)
            q1, q2 = torch.stack(q1s).max(dim=0).values, torch.stack(q2s).max(dim=0).values  # [B], [B]
        else:
            actions = ddpm_chain(ema_params, schedule, next_states, noise, max_action)  # [B, A]
            q1, q2 = critic(critic_target_params, next_states, actions)  # [B], [B]
        return batch["rewards"].reshape(-1) + batch["masks"].reshape(-1) * discount * torch.minimum(q1, q2)


def critic_loss(critic_params: Params, states: Tensor, actions: Tensor, y: Tensor) -> Tensor:
    """mean (Q1(s, a) - y)^2 + mean (Q2(s, a) - y)^2; states [B, S], actions [B, A], y [B] -> a scalar."""
    q1, q2 = critic(critic_params, states, actions)  # [B], [B]
    return ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()


def acting_probabilities(critic_target_params: Params, states: Tensor, candidates: Tensor) -> Tensor:
    """softmax over a state's N candidates of min(Q1', Q2'); the published rule draws one by these.

    Args:
        critic_target_params: the target critic's.
        states: [B, S].
        candidates: [B, N, A].

    Returns:
        [B, N].
    """
    rows = []
    for b in range(states.shape[0]):
        values = []
        for n in range(candidates.shape[1]):
            q1, q2 = critic(critic_target_params, states[b : b + 1], candidates[b, n : n + 1])  # [1], [1]
            values.append(torch.minimum(q1, q2)[0])
        rows.append(torch.softmax(torch.stack(values), dim=0))
    return torch.stack(rows)


@dataclass(frozen=True)
class Hyper:
    """What one update needs besides its state; by default what the published code has for Gym tasks."""

    T: int = 5
    beta_schedule: str = "vp"
    max_action: float = 1.0
    discount: float = 0.99
    tau: float = 0.005
    eta: float = 1.0
    lr: float = 3e-4
    critic_lr: float = 3e-4
    grad_norm: float = 1.0
    max_q_backup: bool = False
    ema_decay: float = 0.995
    ema_start: int = 1000
    ema_every: int = 5


def initial_state(actor: Params, critic_params: Params | None) -> State:
    """Step 0: EMA actor and target critic are copies, Adam's moments are zero.

    Args:
        actor: the denoiser's parameters.
        critic_params: the critic's, or None for DiffusionBC.

    Returns:
        actor, ema_actor, actor_m, actor_v, step; with a critic also critic, critic_target, critic_m,
        critic_v.
    """
    state: State = {
        "actor": {key: value.detach().double().clone() for key, value in actor.items()},
        "ema_actor": {key: value.detach().double().clone() for key, value in actor.items()},
        "actor_m": {key: torch.zeros_like(value, dtype=torch.float64) for key, value in actor.items()},
        "actor_v": {key: torch.zeros_like(value, dtype=torch.float64) for key, value in actor.items()},
        "step": 0,
    }
    if critic_params is not None:
        state["critic"] = {key: value.detach().double().clone() for key, value in critic_params.items()}
        state["critic_target"] = {key: value.detach().double().clone() for key, value in critic_params.items()}
        state["critic_m"] = {key: torch.zeros_like(value) for key, value in state["critic"].items()}
        state["critic_v"] = {key: torch.zeros_like(value) for key, value in state["critic"].items()}
    return state


def with_gradient(params: Params) -> dict[str, Tensor]:
    """Fresh leaves with the same values, for one backward."""
    return {key: value.detach().clone().requires_grad_(True) for key, value in params.items()}


def gradients(loss: Tensor, params: Params) -> dict[str, Tensor]:
    """d loss / d params, by name."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def total_norm(grads: Params) -> float:
    """The Euclidean norm of all gradients taken as one vector."""
    return math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))


def clipped(grads: Params, max_norm: float) -> dict[str, Tensor]:
    """Gradients times min(1, max_norm / (norm + 1e-6)); untouched when max_norm <= 0."""
    coefficient = 1.0
    if max_norm > 0:
        coefficient = min(1.0, max_norm / (total_norm(grads) + 1e-6))
    return {key: coefficient * grad for key, grad in grads.items()}


def adam(
    params: Params, m: Params, v: Params, grads: Params, n: int, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Step n (from 1) of Adam (arXiv 1412.6980, algorithm 1), betas 0.9 and 0.999, epsilon 1e-8.

    Returns:
        New parameters, first moments, second moments.
    """
    new_params, new_m, new_v = {}, {}, {}
    for key, grad in grads.items():
        new_m[key] = 0.9 * m[key] + (1 - 0.9) * grad
        new_v[key] = 0.999 * v[key] + (1 - 0.999) * grad**2
        m_hat = new_m[key] / (1 - 0.9**n)
        v_hat = new_v[key] / (1 - 0.999**n)
        new_params[key] = params[key].detach() - lr * m_hat / (torch.sqrt(v_hat) + 1e-8)
    return new_params, new_m, new_v


def moved(old: Params, new: Params, weight: float) -> dict[str, Tensor]:
    """(1 - weight) old + weight new: the EMA's and the target critic's rule."""
    return {key: (1 - weight) * old[key] + weight * new[key] for key in old}


def cosine_lr(lr: float, step: int, total_steps: int) -> float:
    """lr (1 + cos(pi step/total_steps)) / 2, at 0-based `step`; lr at step 0, zero at total_steps."""
    return lr * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def ema_is_due(step: int, hyper: Hyper) -> bool:
    """True in every ema_every-th update from ema_start on; `step` counts the updates already done."""
    return step % hyper.ema_every == 0 and step >= hyper.ema_start


def update(state: State, batch: Mapping[str, Tensor], randomness: Mapping[str, Any], hyper: Hyper) -> State:
    """One whole update of Diffusion-QL; the given state is not changed.

    In this order: the critic's step towards y; the actor's step on bc_loss + eta q_loss with the critic just
    updated; the EMA actor if due; the target critic. For cosine decay hand in `hyper` with the rates of the
    moment.

    Args:
        state: as initial_state makes it.
        batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B].
        randomness: target_noise [T, B, A] ([T, B, 10, A] with max_q_backup), bc_t [B], bc_noise [B, A],
            actor_noise [T, B, A], coin (bool: True, Q1 is maximised and |Q2| divides).
        hyper: everything else.

    Returns:
        The new state; beside the parts of initial_state it has `metrics` (critic_loss, bc_loss, q_loss,
        actor_loss, critic_grad_norm, actor_grad_norm before clipping, as floats; target_q [B]) and, before
        clipping, `critic_grads` and `actor_grads`.
    """
    schedule = make_schedule(hyper.beta_schedule, hyper.T)
    n = state["step"] + 1  # Adam counts from 1
    new: State = {}

    y = target_q(
        state["ema_actor"],
        state["critic_target"],
        schedule,
        batch,
        randomness["target_noise"],
        hyper.discount,
        hyper.max_action,
        hyper.max_q_backup,
    )  # [B]
    critic_leaves = with_gradient(state["critic"])
    loss_critic = critic_loss(critic_leaves, batch["states"], batch["actions"], y)
    critic_grads = gradients(loss_critic, critic_leaves)
    new["critic"], new["critic_m"], new["critic_v"] = adam(
        state["critic"],
        state["critic_m"],
        state["critic_v"],
        clipped(critic_grads, hyper.grad_norm),
        n,
        hyper.critic_lr,
    )

    actor_leaves = with_gradient(state["actor"])
    loss_bc = bc_loss(
        actor_leaves, schedule, batch["states"], batch["actions"], randomness["bc_t"], randomness["bc_noise"]
    )
    new_actions = ddpm_chain(
        actor_leaves, schedule, batch["states"], randomness["actor_noise"], hyper.max_action
    )  # [B, A]
    loss_q = q_loss(new["critic"], batch["states"], new_actions, randomness["coin"])
    loss_actor = loss_bc + hyper.eta * loss_q
    actor_grads = gradients(loss_actor, actor_leaves)
    new["actor"], new["actor_m"], new["actor_v"] = adam(
        state["actor"], state["actor_m"], state["actor_v"], clipped(actor_grads, hyper.grad_norm), n, hyper.lr
    )

    new["ema_actor"] = state["ema_actor"]
    if ema_is_due(state["step"], hyper):
        new["ema_actor"] = moved(state["ema_actor"], new["actor"], 1 - hyper.ema_decay)
    new["critic_target"] = moved(state["critic_target"], new["critic"], hyper.tau)
    new["step"] = n
    new["critic_grads"], new["actor_grads"] = critic_grads, actor_grads
    new["metrics"] = {
        "critic_loss": float(loss_critic.detach()),
        "bc_loss": float(loss_bc.detach()),
        "q_loss": float(loss_q.detach()),
        "actor_loss": float(loss_actor.detach()),
        "critic_grad_norm": total_norm(critic_grads),
        "actor_grad_norm": total_norm(actor_grads),
        "target_q": y,
    }
    return new


def update_bc(state: State, batch: Mapping[str, Tensor], randomness: Mapping[str, Any], hyper: Hyper) -> State:
    """One update of DiffusionBC: `update` with eta = 0 and no critic; clipping, Adam and EMA as there.

    Args:
        state: initial_state(actor, None) or a later one.
        batch: states [B, S], actions [B, A].
        randomness: bc_t [B], bc_noise [B, A].
        hyper: T, beta_schedule, lr, grad_norm and the EMA's fields are read.

    Returns:
        The new state, with `metrics` (bc_loss, actor_grad_norm) and `actor_grads`.
    """
    schedule = make_schedule(hyper.beta_schedule, hyper.T)
    n = state["step"] + 1
    leaves = with_gradient(state["actor"])
    loss = bc_loss(leaves, schedule, batch["states"], batch["actions"], randomness["bc_t"], randomness["bc_noise"])
    grads = gradients(loss, leaves)
    new: State = {}
    new["actor"], new["actor_m"], new["actor_v"] = adam(
        state["actor"], state["actor_m"], state["actor_v"], clipped(grads, hyper.grad_norm), n, hyper.lr
    )
    new["ema_actor"] = state["ema_actor"]
    if ema_is_due(state["step"], hyper):
        new["ema_actor"] = moved(state["ema_actor"], new["actor"], 1 - hyper.ema_decay)
    new["step"] = n
    new["actor_grads"] = grads
    new["metrics"] = {"bc_loss": float(loss.detach()), "actor_grad_norm": total_norm(grads)}
    return new


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> tuple[int, int, int, int]:
    """Philox4x32 (Random123, section 3.3) on Python integers.

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.
        rounds: 10 for the generator everyone means.

    Returns:
        Four 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0 = 0xD2511F53 * c0  # 64 bits: the high and the low half are used apart
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & 0xFFFFFFFF,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(word: int) -> float:
    """((word >> 9) + 1/2) / 2^23: inside (0, 1), and exact in float32."""
    return ((word >> 9) + 0.5) * 2.0**-23


def philox_normal(seed: int, K: int, B: int, A: int) -> Tensor:
    """Box-Muller normals of Philox4x32-10: element (k, row, dim) depends on seed and place alone.

    Counter (row, k, dim // 4, 0), key (low, high word of the seed). The four output words give the normals of
    dimensions 4j .. 4j+3: the first two words those of 4j (cosine) and 4j+1 (sine), the others 4j+2 and 4j+3.

    Args:
        seed: 0 <= seed < 2^64.
        K, B, A: sizes.

    Returns:
        float64 tensor [K, B, A].
    """
    out = torch.empty(K, B, A, dtype=torch.float64)
    for k in range(K):
        for row in range(B):
            for dim in range(A):
                words = philox4x32((row, k, dim // 4, 0), (seed & 0xFFFFFFFF, seed >> 32))
                first, second = words[:2] if dim % 4 < 2 else words[2:]
                radius = math.sqrt(-2.0 * math.log(uniform(first)))
                angle = 2.0 * math.pi * uniform(second)
                out[k, row, dim] = radius * (math.cos(angle) if dim % 2 == 0 else math.sin(angle))
    return out
