"""What the tests of the backend "triton" on a GPU share."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Problem, make_problem, run_problem
from cpp_cases import make_policy, states_of

import dql

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch warns of each product under `poisoned`

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

Tensor = torch.Tensor
PRECISIONS = ["fp32", "tf32", "bf16"]
SEED = 3
SMOOTH = 1e5  # an action bound that nothing reaches: without clamps, rounding cannot cut a gradient off


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory is full of NaN: what was freed before, and inside what torch allocates."""
    for size, count in ((1 << 26, 1), (1 << 16, 50), (1 << 12, 50), (1 << 8, 50)):
        blocks = [torch.full((size,), math.nan, device="cuda") for _ in range(count)]
        del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)  # then torch fills
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(problem: Problem) -> Problem:
    return replace(
        problem,
        policy=problem.policy.to("cuda"),
        states=problem.states.to("cuda"),
        noise=problem.noise.to("cuda"),
        weights=problem.weights.to("cuda"),
    )


def run_on_gpu(case: Case, backend: str, precision: str = "fp32") -> dict[str, Tensor]:
    """`cases.run` on the GPU; its tensors on the CPU."""
    problem = on_device(make_problem(case, torch.float32))
    return {name: tensor.cpu() for name, tensor in run_problem(problem, backend, precision=precision).items()}


def norm_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite for NaN."""
    difference, size = float((got.double() - want.double()).norm()), float(want.double().norm())
    if difference == 0:
        return 0.0
    return difference / size if difference < math.inf and size > 0 else math.inf


def gpu_policy(**options: Any) -> dql.DiffusionPolicy:
    return make_policy(**options).to("cuda")


def gpu_states(B: int) -> Tensor:
    return states_of(B).to("cuda")


def sample(states: Tensor, policy: dql.DiffusionPolicy, **options: Any) -> Tensor:
    given: dict[str, Any] = {"backend": "triton", "seed": SEED} | options
    return dql.sample(states, policy, **given)


def gradients(states: Tensor, policy: dql.DiffusionPolicy, **options: Any) -> list[Tensor]:
    """The actions, and the gradient of the states and every parameter for a fixed loss."""
    inputs = states.detach().requires_grad_()
    actions = sample(inputs, policy, **options)
    weights = torch.linspace(-1, 1, actions.numel(), device="cuda").view_as(actions)
    return [actions.detach(), *torch.autograd.grad(actions, [inputs, *policy.denoiser.parameters()], weights)]


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
