"""Calls of a backend on the CPU: `dql.sample` by its name with a seed, gradients for a fixed loss, and refusals."""

import pytest
import torch

import dql
from dql.backend.base import Chain

Tensor = torch.Tensor
SMALL = {"hidden_dim": 16, "num_hidden": 2, "T": 3}


def sample(backend: str, states: Tensor, policy: dql.DiffusionPolicy, **options: object) -> Tensor:
    given: dict = {"seed": 3} | options
    if "noise" in options:
        del given["seed"]
    return dql.sample(states, policy, backend=backend, **given)


def every_gradient(actions: Tensor, states: Tensor, policy: dql.DiffusionPolicy) -> list[Tensor]:
    """Of the states (if they require one) and of all parameters, for a fixed loss."""
    weights = torch.linspace(-1, 1, actions.numel()).view_as(actions)
    inputs = ([states] if states.requires_grad else []) + list(policy.denoiser.parameters())
    return list(torch.autograd.grad(actions, inputs, weights, retain_graph=True))


def chain_of(policy: dql.DiffusionPolicy, table: dql.StepTable, candidates: int = 1, precision: str = "fp32") -> Chain:
    """As `dql.sample` hands it to a backend."""
    of, states = policy.denoiser, torch.zeros(1, policy.state_dim, device=policy.device)
    return Chain(of.buffer, of.weights, of.spec, states, candidates, None, 0, table, 1.0, precision, of.kept)


def refused(backend: str, policy: dql.DiffusionPolicy, alone: bool = False, **options: object) -> str:
    """The sentence by which the backend refuses, the same in every call. Eager can run it, and others unless it is
    `alone`, where no precision is asked for."""
    states = torch.zeros(2, policy.state_dim, dtype=policy.dtype)
    sentences = set()
    for gradients in (True, False):
        for N in (None, 2, None):  # again: nothing was prepared
            with torch.set_grad_enabled(gradients), pytest.raises(dql.BackendUnavailable) as caught:
                sample(backend, states, policy, num_candidates=N, **options)
            sentences.add(str(caught.value))
    (said,) = sentences
    head, _, rest = said.partition(f"backend {backend!r} cannot run this: ")
    sentence, _, able = rest.partition(" (able to: ")
    assert head == "" and "\n" not in sentence
    if "precision" not in options:
        assert able == "eager)" if alone else able.endswith("eager)")
        assert dql.sample(states, policy, backend="eager").isfinite().all()
    return sentence
