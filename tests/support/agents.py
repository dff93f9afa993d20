"""What tests of whole updates share: a small agent, batches, and both as the transcription takes them."""

import torch

import dql
from dql import noise
from dql.draws import UpdateSeeds
from support import transcription

S, A, B, H = 5, 3, 16, 24
CONFIG = dql.Config(hidden_dim=H, batch_size=B, eta=0.7, grad_norm=0.5, ema_start=3, ema_every=2, lr=1e-3, seed=5)
Tensor = torch.Tensor


def make_batch(seed: int, dtype: torch.dtype = torch.float64) -> dql.Batch:
    """A batch whose values float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    masks = (torch.rand(B, generator=generator) > 0.3).to(dtype)
    return dql.Batch(draw(B, S), draw(B, A).clamp(-1, 1), draw(B), draw(B, S), masks)


def as_dict(batch: dql.Batch) -> dict[str, Tensor]:
    return {name: getattr(batch, name).double() for name in ("states", "actions", "rewards", "next_states", "masks")}


def hyper(config: dql.Config, **changes) -> transcription.Hyper:
    shared = {name: getattr(config, name) for name in transcription.Hyper.__dataclass_fields__}
    return transcription.Hyper(**shared | changes)


def randomness(config: dql.Config, step: int) -> dict:
    """An update's random numbers, from the documented seeds."""
    seeds = UpdateSeeds.of(config.seed, step)
    N = config.backup_candidates if config.max_q_backup else 1
    target = noise.normal(seeds.target, config.T, B * N, A, dtype=torch.float64)
    return {
        "target_noise": target.reshape(config.T, B, N, A) if config.max_q_backup else target,
        "bc_t": noise.integers(seeds.bc_t, config.T, B),
        "bc_noise": noise.normal(seeds.bc_noise, 1, B, A, dtype=torch.float64)[0],
        "actor_noise": noise.normal(seeds.actor, config.T, B, A, dtype=torch.float64),
        "coin": bool(noise.integers(seeds.coin, 2, 1)),
    }


def networks(agent) -> dict[str, dict[str, Tensor]]:
    found = {"actor": agent.policy.denoiser}
    if isinstance(agent, dql.DiffusionQL):
        found |= {
            "ema_actor": agent.ema_policy.denoiser,
            "critic": agent.critic,
            "critic_target": agent.critic_target,
        }
    return {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in found.items()}


def initial_state(agent) -> transcription.State:
    parts = networks(agent)
    return transcription.initial_state(parts["actor"], parts.get("critic"))
