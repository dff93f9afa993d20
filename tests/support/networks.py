"""What the tests of the backend "cpp" share: its variants, and small seeded networks."""

import pytest
import torch

import dql
from dql.kernels.cpp import binding

Tensor = torch.Tensor
S, A, H = 11, 3, 48

needs_cpp = pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable()))
needs_bf16 = pytest.mark.skipif(
    binding.unavailable() is not None or not binding.has_bf16(), reason="this CPU has no AVX512_BF16"
)
VARIANTS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in binding.variants().items()
]


def make_policy(seed: int = 5, **options) -> dql.DiffusionPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dql.DiffusionPolicy(S, A, **({"hidden_dim": H} | options))


def make_critic() -> dql.TwinCritic:
    """Its Q differ: torch's default ones hardly do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        critic = dql.TwinCritic(S, A, H)
    with torch.no_grad():
        critic.flat.mul_(4)
    return critic


def states_of(B: int, width: int = S) -> Tensor:
    return torch.randn(B, width, generator=torch.Generator().manual_seed(B))


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
