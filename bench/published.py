"""A stand-in for the published Diffusion-QL code, for the benches to run against.

It is written for one purpose: to cost what the published code costs. So it keeps that code's structure,
wasteful parts included: the time embedding of a whole [B] vector in every step, a concatenation of action,
time and state in every step, the schedule gathered per row, the posterior's variance computed and not used,
states repeated for every candidate, an autograd graph through the target's chain that is thrown away, critic
gradients gathered in the actor's step, a Python loop per parameter for EMA and target, four host syncs an
update. Nothing in the package uses it.

Its parameters and buffers carry the names of the published checkpoints, so its state_dict also stands for
one. Source: arXiv 2208.06193 and its authors' code, whose behaviour it follows; no line is taken from there.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_DIM = 16


def make_betas(name: str, T: int) -> Tensor:
    """The published schedules vp, linear and cosine, float32 [T]."""
    if name == "vp":
        t = np.arange(1, T + 1)
        values = 1.0 - np.exp(-0.1 / T - 0.5 * 9.9 * (2 * t - 1) / T**2)
    elif name == "linear":
        values = np.linspace(1e-4, 2e-2, T)
    elif name == "cosine":
        x = np.linspace(0, T + 1, T + 1)
        f = np.cos((x / (T + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        values = np.clip(1.0 - f[1:] / f[:-1], 0.0, 0.999)
    else:
        raise ValueError(f"There is no schedule {name!r}; choose vp, linear or cosine.")
    return torch.tensor(values, dtype=torch.float32)


def extract(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] per row, shaped to broadcast: [T], [B] -> [B, 1]."""
    return values.gather(-1, t).reshape(t.shape[0], *([1] * (like.dim() - 1)))


class TimeEmbedding(nn.Module):
    """[sin, cos] of t at TIME_DIM / 2 frequencies, which are recomputed in every call, as published."""

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_DIM // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))  # [8]
        angles = t[:, None] * frequencies[None, :]  # [B, 8]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # [B, 16]


class PublishedDenoiser(nn.Module):
    """[x, time, state] -> H -> H -> H -> A with Mish."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            TimeEmbedding(), nn.Linear(TIME_DIM, 2 * TIME_DIM), nn.Mish(), nn.Linear(2 * TIME_DIM, TIME_DIM)
        )
        layers: list[nn.Module] = []
        for size in (state_dim + action_dim + TIME_DIM, hidden_dim, hidden_dim):
            layers += [nn.Linear(size, hidden_dim), nn.Mish()]
        self.mid_layer = nn.Sequential(*layers)
        self.final_layer = nn.Linear(hidden_dim, action_dim)

    def forward(self, x: Tensor, t: Tensor, state: Tensor) -> Tensor:
        h = torch.cat([x, self.time_mlp(t), state], dim=1)  # [B, A + 16 + S]
        return self.final_layer(self.mid_layer(h))  # [B, A]


class PublishedActor(nn.Module):
    """The diffusion policy: the denoiser under `model` and the schedule as buffers, float32 throughout."""

    def __init__(
        self, state_dim: int, action_dim: int, max_action: float, hidden_dim: int, T: int, beta_schedule: str
    ) -> None:
        super().__init__()
        self.action_dim, self.max_action, self.T = action_dim, max_action, T
        self.model = PublishedDenoiser(state_dim, action_dim, hidden_dim)
        betas = make_betas(beta_schedule, T)
        alphas = 1.0 - betas
        abar = torch.cumprod(alphas, dim=0)
        abar_prev = torch.cat([torch.ones(1), abar[:-1]])
        variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        for name, values in {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - abar).sqrt(),
            "log_one_minus_alphas_cumprod": (1.0 - abar).log(),
            "sqrt_recip_alphas_cumprod": (1.0 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1.0 / abar - 1.0).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * abar_prev.sqrt() / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - abar_prev) * alphas.sqrt() / (1.0 - abar),
        }.items():
            self.register_buffer(name, values)

    def posterior(self, x: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, A], variance and log variance [B, 1] of q(x_{t-1} | x_t, x0), x0 predicted and clamped."""
        eps = self.model(x, t, state)  # [B, A]
        x0 = extract(self.sqrt_recip_alphas_cumprod, t, x) * x
        x0 = x0 - extract(self.sqrt_recipm1_alphas_cumprod, t, x) * eps
        x0.clamp_(-self.max_action, self.max_action)
        mean = extract(self.posterior_mean_coef1, t, x) * x0 + extract(self.posterior_mean_coef2, t, x) * x
        variance = extract(self.posterior_variance, t, x)  # computed and not used, as published
        return mean, variance, extract(self.posterior_log_variance_clipped, t, x)

    def sample(self, state: Tensor, noise: Tensor | None = None) -> Tensor:
        """The whole reverse chain.

        Args:
            state: [B, S].
            noise: [T, B, A], in place of the draws: noise[0] is x_T, noise[k] feeds the update of step k-1.
                For closeness checks; leave it out when timing.

        Returns:
            Actions [B, A], with the gradient of every step.
        """
        B = state.shape[0]
        x = torch.randn((B, self.action_dim), device=state.device) if noise is None else noise[0]  # [B, A]
        for i in reversed(range(self.T)):
            t = torch.full((B,), i, device=state.device, dtype=torch.long)  # [B]
            mean, _, log_variance = self.posterior(x, t, state)
            # the last step draws too and multiplies by zero, as published
            z = torch.randn_like(x) if noise is None or i == 0 else noise[self.T - i]  # [B, A]
            keep = (1 - (t == 0).float()).reshape(B, 1)
            x = mean + keep * (0.5 * log_variance).exp() * z
        return x.clamp_(-self.max_action, self.max_action)

    def loss(self, action: Tensor, state: Tensor) -> Tensor:
        """Noise-prediction error at one random timestep per row; action [B, A], state [B, S] -> a scalar."""
        t = torch.randint(0, self.T, (action.shape[0],), device=action.device).long()  # [B]
        noise = torch.randn_like(action)  # [B, A]
        noisy = extract(self.sqrt_alphas_cumprod, t, action) * action
        noisy = noisy + extract(self.sqrt_one_minus_alphas_cumprod, t, action) * noise
        return F.mse_loss(self.model(noisy, t, state), noise, reduction="none").mean()

    def forward(self, state: Tensor) -> Tensor:
        return self.sample(state)


class PublishedCritic(nn.Module):
    """Two MLPs [state, action] -> H -> H -> H -> 1 with Mish."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int) -> None:
        super().__init__()
        for name in ("q1_model", "q2_model"):
            layers: list[nn.Module] = []
            for size in (state_dim + action_dim, hidden_dim, hidden_dim):
                layers += [nn.Linear(size, hidden_dim), nn.Mish()]
            self.add_module(name, nn.Sequential(*layers, nn.Linear(hidden_dim, 1)))

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=-1)  # [B, S + A]
        return self.q1_model(x), self.q2_model(x)  # [B, 1], [B, 1]

    def q_min(self, state: Tensor, action: Tensor) -> Tensor:
        """The smaller of both, [B, 1]."""
        return torch.min(*self(state, action))


class PublishedAgent:
    """Diffusion-QL with the published cost structure.

    Args:
        state_dim: S.
        action_dim: A.
        max_action: bound of the actions.
        hidden_dim: H; 256 as published.
        T: diffusion steps.
        beta_schedule: "vp", "linear" or "cosine".
        eta: weight of the Q term.
        discount: gamma.
        tau: rate of the target critic.
        grad_norm: clip of each gradient norm; none when <= 0.
        lr: of the actor; the critic's is 3e-4 as published.
        max_q_backup: ten actions per next state, the best of them for each critic.
    """

    ema_decay = 0.995
    ema_start = 1000
    ema_every = 5
    num_candidates = 50
    num_backup = 10

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float = 1.0,
        hidden_dim: int = 256,
        T: int = 5,
        beta_schedule: str = "vp",
        eta: float = 1.0,
        discount: float = 0.99,
        tau: float = 0.005,
        grad_norm: float = 1.0,
        lr: float = 3e-4,
        max_q_backup: bool = False,
    ) -> None:
        self.eta, self.discount, self.tau = eta, discount, tau
        self.grad_norm, self.max_q_backup = grad_norm, max_q_backup
        self.actor = PublishedActor(state_dim, action_dim, max_action, hidden_dim, T, beta_schedule)
        self.ema_actor = copy.deepcopy(self.actor)
        self.critic = PublishedCritic(state_dim, action_dim, hidden_dim)
        self.critic_target = copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.step = 0

    def target_q(self, rewards: Tensor, next_states: Tensor, masks: Tensor) -> Tensor:
        """r + mask * discount * min(Q1', Q2'), [B, 1]; detached only at the end, as published."""
        if self.max_q_backup:
            repeated = torch.repeat_interleave(next_states, repeats=self.num_backup, dim=0)  # [B * 10, S]
            q1, q2 = self.critic_target(repeated, self.ema_actor(repeated))  # [B * 10, 1] each
            q1 = q1.view(-1, self.num_backup).max(dim=1, keepdim=True)[0]  # [B, 1]
            q2 = q2.view(-1, self.num_backup).max(dim=1, keepdim=True)[0]
        else:
            q1, q2 = self.critic_target(next_states, self.ema_actor(next_states))  # [B, 1] each
        return (rewards + masks * self.discount * torch.min(q1, q2)).detach()

    def update(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, masks: Tensor
    ) -> dict[str, float]:
        """One update of critic, actor, EMA actor and target critic.

        Args:
            states: [B, S].
            actions: [B, A].
            rewards: [B] or [B, 1].
            next_states: [B, S].
            masks: [B] or [B, 1], 0 where the episode terminated.

        Returns:
            The four losses as Python numbers: the four host syncs of the published code.
        """
        rewards, masks = (
            rewards.reshape(-1, 1),
            masks.reshape(-1, 1),
        )  # [B, 1] as the published replay buffer gives

        q1, q2 = self.critic(states, actions)  # [B, 1] each
        target = self.target_q(rewards, next_states, masks)  # [B, 1]
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        if self.grad_norm > 0:
            nn.utils.clip_grad_norm_(self.critic.parameters(), max_norm=self.grad_norm, norm_type=2)
        self.critic_optimizer.step()

        bc_loss = self.actor.loss(actions, states)
        q1, q2 = self.critic(states, self.actor(states))
        if np.random.uniform() > 0.5:
            q_loss = -q1.mean() / q2.abs().mean().detach()
        else:
            q_loss = -q2.mean() / q1.abs().mean().detach()
        actor_loss = bc_loss + self.eta * q_loss
        self.actor_optimizer.zero_grad()
        actor_loss.backward()  # also fills the critic's gradients, which nothing reads
        if self.grad_norm > 0:
            nn.utils.clip_grad_norm_(self.actor.parameters(), max_norm=self.grad_norm, norm_type=2)
        self.actor_optimizer.step()

        if self.step % self.ema_every == 0 and self.step >= self.ema_start:
            for new, old in zip(self.actor.parameters(), self.ema_actor.parameters(), strict=True):
                old.data = old.data * self.ema_decay + (1 - self.ema_decay) * new.data
        for new, old in zip(self.critic.parameters(), self.critic_target.parameters(), strict=True):
            old.data.copy_(self.tau * new.data + (1 - self.tau) * old.data)
        self.step += 1
        return {
            "actor/loss": actor_loss.item(),
            "actor/bc_loss": bc_loss.item(),
            "actor/q_loss": q_loss.item(),
            "critic/loss": critic_loss.item(),
        }

    def act(self, state: np.ndarray) -> np.ndarray:
        """One action [A] for one state [S]: one of 50 candidates, by softmax of the targets' minimum."""
        device = self.actor.betas.device
        row = torch.as_tensor(state, dtype=torch.float32, device=device).reshape(1, -1)  # [1, S]
        repeated = torch.repeat_interleave(row, repeats=self.num_candidates, dim=0)  # [50, S]
        with torch.no_grad():
            candidates = self.actor.sample(repeated)  # [50, A]
            q = self.critic_target.q_min(repeated, candidates).flatten()  # [50]
            index = torch.multinomial(F.softmax(q, dim=0), 1)
        return candidates[index].cpu().numpy().flatten()
