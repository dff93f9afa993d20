"""The methods beside diffusion of the paper's bandit: behaviour cloning by a Gaussian, a CVAE and an MMD, and what
TD3+BC, BCQ and BEAR-MMD make of each with a critic.

Losses and constants are those of the authors' toy experiments (commit d871f5c). Every method draws from a generator of
its own; torch's is left alone.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F

from dql import noise
from dql.networks import TwinCritic
from dql.optimizer import FlatAdam

Tensor = torch.Tensor

STATE_DIM, ACTION_DIM, LATENT_DIM = 2, 2, 4
HIDDEN_DIM = 128
ETA = 2.5  # weight of the Q term, of TD3+BC and of Diffusion-QL; BEAR-MMD's is 1, BCQ has none
_LATENT_CLIP = 0.5  # a CVAE is sampled near its prior's mean


def zero_states(n: int) -> Tensor:
    """The bandit's only state, n times [n, S]."""
    return torch.zeros(n, STATE_DIM)


def cosine(step: int, updates: int) -> float:
    """Factor of the learning rate, from 1 at step 0 to 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * min(step / updates, 1.0)))


class Method:
    """What the methods share: a generator, initial weights from it, Adam with a cosine to zero.

    Args:
        seed: of initial weights and draws; each method makes another stream of it.
        updates: length of the cosine.
        lr: Adam's, at the start.
    """

    def __init__(self, seed: int, updates: int, lr: float) -> None:
        self.generator = torch.Generator().manual_seed(noise.derive(seed, type(self).__name__) & (2**63 - 1))
        self.updates, self.lr, self.step = updates, lr, 0

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        """One update from a batch.

        Args:
            actions: [B, A].
            rewards: [B]; methods that only clone do not look at them.

        Returns:
            losses by name.
        """
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """Actions of the method [n, A]."""
        raise NotImplementedError

    def mlp(self, inputs: int, outputs: int) -> nn.Sequential:
        """inputs -> 128 -> 128 -> outputs, with ReLU; nn.Linear's initial weights, from this generator."""
        layers: list[nn.Module] = []
        for i, o in ((inputs, HIDDEN_DIM), (HIDDEN_DIM, HIDDEN_DIM), (HIDDEN_DIM, outputs)):
            layer = nn.utils.skip_init(nn.Linear, i, o)
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -1 / math.sqrt(i), 1 / math.sqrt(i), generator=self.generator)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def adam(self, parameters: Iterable[Tensor], lr: float | None = None) -> torch.optim.Adam:
        return torch.optim.Adam(list(parameters), lr=lr or self.lr, fused=True)

    def descend(self, adam: torch.optim.Adam, loss: Tensor) -> float:
        """One step of `adam` down the loss, at the rate of this update; returns the loss."""
        parameters = [p for group in adam.param_groups for p in group["params"]]
        rates = [group["lr"] for group in adam.param_groups]
        # Not backward(): a loss may reach into networks that another optimizer moves.
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        for group in adam.param_groups:
            group["lr"] *= cosine(self.step, self.updates)
        adam.step()
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate
        return float(loss.detach())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def q_term(self, critic: TwinCritic, actions: Tensor) -> Tensor:
        """-mean Q_i(a) / mean|Q_j(a)|, without a gradient through the divisor; (i, j) by a coin."""
        states = zero_states(len(actions))
        i = int(torch.randint(1, 3, (), generator=self.generator))
        with torch.no_grad():
            divisor = critic.q(3 - i, states, actions).abs().mean()
        return -critic.q(i, states, actions).mean() / divisor


class RewardCritic:
    """Both Q functions by regression on rewards: mse(Q_1(a), r) + mse(Q_2(a), r), all that a critic of one step is."""

    def __init__(self, seed: int, updates: int, lr: float) -> None:
        generator = torch.Generator().manual_seed(noise.derive(seed, "RewardCritic") & (2**63 - 1))
        self.critic = TwinCritic(STATE_DIM, ACTION_DIM, HIDDEN_DIM, generator=generator)
        self.flat_adam = FlatAdam(self.critic, lr, grad_norm=0.0)
        self.updates, self.step = updates, 0

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        q1, q2 = self.critic(zero_states(len(actions)), actions)
        loss = F.mse_loss(q1, rewards) + F.mse_loss(q2, rewards)
        self.flat_adam.step(loss, cosine(self.step, self.updates))
        self.step += 1
        return {"critic/loss": float(loss.detach())}


class GaussianMLE(Method):
    """BC-MLE: a Gaussian with a mean and a deviation for each dimension; loss -mean log N(a | mean, std)."""

    def __init__(self, seed: int, updates: int, lr: float) -> None:
        super().__init__(seed, updates, lr)
        self.net = self.mlp(STATE_DIM, 2 * ACTION_DIM)
        self.actor_adam = self.adam(self.net.parameters())

    def distribution(self) -> torch.distributions.Normal:
        mean, log_std = self.net(zero_states(1)).chunk(2, dim=1)  # [1, A] each: all states are the same
        return torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp(), validate_args=False)

    def loss(self, actions: Tensor) -> Tensor:
        return -self.distribution().log_prob(actions).sum(1).mean()

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        loss = self.descend(self.actor_adam, self.loss(actions))
        self.step += 1
        return {"actor/loss": loss}

    def draw(self, n: int) -> Tensor:
        """`sample` with a gradient. The Gaussian is not cut off at the bounds of the actions."""
        d = self.distribution()
        return d.mean + d.stddev * self.normal(n, ACTION_DIM)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.draw(n)


class TD3BC(GaussianMLE):
    """TD3+BC as the authors' figure has it: loss -mean log N(a | mean, std) + eta * q_term(draws of the Gaussian)."""

    def __init__(self, seed: int, updates: int, lr: float, critic: TwinCritic, eta: float = ETA) -> None:
        super().__init__(seed, updates, lr)
        self.critic, self.eta = critic, eta

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        loss = self.loss(actions) + self.eta * self.q_term(self.critic, self.draw(len(actions)))
        loss_value = self.descend(self.actor_adam, loss)
        self.step += 1
        return {"actor/loss": loss_value}


class CVAE(Method):
    """BC-CVAE: encoder N(m, s) of an action, decoder tanh(d(z)); loss mse(decoded, a) + KL/2, KL being the mean of
    -(1 + log s^2 - m^2 - s^2)/2 over rows and latent dimensions. Sampled with z ~ N(0, 1) clipped to +-0.5."""

    def __init__(self, seed: int, updates: int, lr: float) -> None:
        super().__init__(seed, updates, lr)
        self.encoder = self.mlp(STATE_DIM + ACTION_DIM, 2 * LATENT_DIM)
        self.decoder = self.mlp(STATE_DIM + LATENT_DIM, ACTION_DIM)
        self.vae_adam = self.adam([*self.encoder.parameters(), *self.decoder.parameters()])

    def vae_loss(self, actions: Tensor) -> Tensor:
        n = len(actions)
        mean, log_std = self.encoder(torch.cat([zero_states(n), actions], 1)).chunk(2, dim=1)  # [n, latent] each
        log_std = log_std.clamp(-4, 15)
        z = mean + log_std.exp() * self.normal(n, LATENT_DIM)
        kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).mean()
        return F.mse_loss(torch.tanh(self.decode(z)), actions) + 0.5 * kl

    def decode(self, z: Tensor) -> Tensor:
        """The action before its tanh [n, A]."""
        return self.decoder(torch.cat([zero_states(len(z)), z], 1))

    def latents(self, n: int) -> Tensor:
        return self.normal(n, LATENT_DIM).clamp(-_LATENT_CLIP, _LATENT_CLIP)

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        loss = self.descend(self.vae_adam, self.vae_loss(actions))
        self.step += 1
        return {"vae/loss": loss}

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return torch.tanh(self.decode(self.latents(n)))


class BCQ(CVAE):
    """BCQ: the CVAE, and a perturbation of its samples, phi tanh(p(a)) with phi = 0.05; loss -mean Q_1(perturbed).

    A sample is a perturbed one. (The authors' figure shows the CVAE's alone.)
    """

    def __init__(self, seed: int, updates: int, lr: float, critic: TwinCritic, phi: float = 0.05) -> None:
        super().__init__(seed, updates, lr)
        self.critic, self.phi = critic, phi
        self.perturbation = self.mlp(STATE_DIM + ACTION_DIM, ACTION_DIM)
        self.actor_adam = self.adam(self.perturbation.parameters())

    def perturbed(self, actions: Tensor) -> Tensor:
        moved = self.phi * torch.tanh(self.perturbation(torch.cat([zero_states(len(actions)), actions], 1)))
        return (actions + moved).clamp(-1, 1)

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        vae_loss = self.descend(self.vae_adam, self.vae_loss(actions))
        perturbed = self.perturbed(super().sample(len(actions)))
        actor_loss = self.descend(self.actor_adam, -self.critic.q(1, zero_states(len(perturbed)), perturbed).mean())
        self.step += 1
        return {"vae/loss": vae_loss, "actor/loss": actor_loss}

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.perturbed(super().sample(n))


class MMD(CVAE):
    """BC-MMD: a Gaussian under a tanh, matched to the CVAE's samples; loss mean over states of
    sqrt(mean k(x, x') + mean k(y, y') - 2 mean k(x, y) + 1e-6), k(x, y) = exp(-|x - y|_1 / (2 sigma)), sigma = 20,
    x and y being 10 samples each before their tanh, of noise clipped to +-0.5."""

    matched = 10
    sigma = 20.0

    def __init__(self, seed: int, updates: int, lr: float) -> None:
        super().__init__(seed, updates, lr)
        self.actor = self.mlp(STATE_DIM, 2 * ACTION_DIM)
        self.actor_adam = self.adam(self.actor.parameters())

    def mmd_loss(self, n: int) -> Tensor:
        with torch.no_grad():
            x = self.decode(self.latents(n * self.matched)).view(n, self.matched, ACTION_DIM)
        mean, log_std = self.actor(zero_states(1)).chunk(2, dim=1)  # [1, A] each: all states are the same
        y = mean + log_std.exp() * self.normal(n, self.matched, ACTION_DIM).clamp(-_LATENT_CLIP, _LATENT_CLIP)
        return mmd(x, y, self.sigma).mean()

    def draw(self, n: int) -> Tensor:
        """`sample` with a gradient; its noise is not clipped."""
        mean, log_std = self.actor(zero_states(1)).chunk(2, dim=1)
        return torch.tanh(mean + log_std.exp() * self.normal(n, ACTION_DIM))

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        vae_loss = self.descend(self.vae_adam, self.vae_loss(actions))
        actor_loss = self.descend(self.actor_adam, self.mmd_loss(len(actions)))
        self.step += 1
        return {"vae/loss": vae_loss, "actor/loss": actor_loss}

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.draw(n)


class BEARMMD(MMD):
    """BEAR-MMD: loss lambda * mmd + q_term(draws); lambda, from e^-5 to e^10, ascends lambda * (mmd - 0.05)."""

    threshold = 0.05

    def __init__(self, seed: int, updates: int, lr: float, critic: TwinCritic) -> None:
        super().__init__(seed, updates, lr)
        self.critic = critic
        self.log_lambda = self.normal(1)[0].requires_grad_()
        self.lambda_adam = self.adam([self.log_lambda], lr * 10 / 3)  # the published 1e-3 beside 3e-4

    def update(self, actions: Tensor, rewards: Tensor) -> dict[str, float]:
        n = len(actions)
        vae_loss = self.descend(self.vae_adam, self.vae_loss(actions))
        mmd_loss = self.mmd_loss(n)
        weighted = self.log_lambda.detach().exp() * mmd_loss
        actor_loss = self.descend(self.actor_adam, weighted + self.q_term(self.critic, self.draw(n)))
        self.descend(self.lambda_adam, -self.log_lambda.exp() * (mmd_loss.detach() - self.threshold))
        with torch.no_grad():
            self.log_lambda.clamp_(-5, 10)
        self.step += 1
        return {"vae/loss": vae_loss, "actor/loss": actor_loss}


def mmd(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """sqrt of the squared maximum mean discrepancy between x and y [n, k, A] by a Laplacian kernel: [n]."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, :, None] - b[:, None]).abs().sum(-1)  # [n, k, k]
        return (-distance / (2 * sigma)).exp().mean((1, 2))

    # 1e-6: the root's gradient is infinite at 0
    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) + 1e-6).sqrt()
