"""An agent and batches for the backends whose kernels are a GPU's, interpreted or emulated where there is none."""

import torch

import dql

Tensor = torch.Tensor
S, A, B, H = 5, 3, 24, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = {
    "hidden_dim": H,
    "num_hidden": 2,
    "T": 3,
    "ema_start": 2,
    "ema_every": 2,
    "num_candidates": 6,
    "backup_candidates": 3,
    "eta": 1.0,
}


def make_batch(seed: int) -> dql.Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return dql.Batch(normal(B, S), normal(B, A).clamp(-1, 1), normal(B), normal(B, S), torch.ones(B, device=DEVICE))
