"""Agents side by side on every backend: each is, to the bit, what it would be alone."""

from dataclasses import replace

import torch

import dql
from dql.agents.registry import make_agent
from dql.config import Config


def test_each_is_as_alone(backend):
    config = Config(hidden_dim=16, num_hidden=2, T=2, ema_start=0, ema_every=2, backend=backend, batch_size=8)
    several = dql.Ensemble.of(3, 1, config, seeds=(0, 1), threads=2)
    alone = [make_agent(3, 1, replace(config, seed=seed)) for seed in (0, 1)]
    for step in range(2):
        batches = [some_batch(8, 3, 1, 10 * step + i) for i in (0, 1)]
        together = several.update(batches)
        for i, agent in enumerate(alone):
            for name, value in agent.update(batches[i]).items():
                assert torch.equal(together[name][i], value), name
    for ours, agent in zip(several, alone, strict=True):
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, agent.tensors()[name]), name


def some_batch(B, S, A, seed):
    generator = torch.Generator().manual_seed(seed)
    states, next_states = torch.randn(2, B, S, generator=generator)
    return dql.Batch(states, torch.rand(B, A, generator=generator) * 2 - 1, states[:, 0], next_states, torch.ones(B))
