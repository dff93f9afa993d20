"""What the tests of the backends "triton" and "cuda" on a GPU share."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import dql
from dql.backend.registry import of_gpus
from dql.kernels.capture import mend_after_capture, recorded
from support.cases import (
    TOLERANCES,
    Case,
    Problem,
    assert_all_close,
    expected,
    make_problem,
    named_gradients,
    run_problem,
)
from support.networks import make_policy, states_of
from support.rounded_chain import rounded_chain, roundings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch warns of each product under `poisoned`

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
        for name, reason in dql.backends().items()
        if name in of_gpus()
    ],
)
needs_cuda = pytest.mark.skipif(dql.backends()["cuda"] is not None, reason=f"cuda: {dql.backends()['cuda']}")

Tensor = torch.Tensor
PRECISIONS = ["fp32", "tf32", "bf16"]
SEED = 3
SMOOTH = 1e5  # an action bound that nothing reaches: without clamps, rounding cannot cut a gradient off
# Bounds of whole tensors' errors, relative to their norm: (times the yardstick's error, plus).
#
# float32's yardstick is eager torch. Three tf32 products whose sums are cut off, as tensor cores do, were simulated
# over all cases: 4.3 times eager's error at most over a case's tensors together, of a single tensor 7 (of the small
# ones 54, which is 4e-7), and at most 0.4 of this bound. One product instead of three, or two, makes 1,400 times
# eager's error and more: every case is red.
FP32 = (10.0, 2e-6)
# tf32's and bf16's is the chain in float64 with operands rounded, forward and backward, as "triton" rounds them
# (`rounded_chain`). Simulated likewise, the errors are 0.6 to 1.1 times its own, a single tensor's up to 1.4 times:
# half of the bound at most. Operands of tf32 that are cut off and not rounded give 2 to 18 times the error, and 19 of
# 20 cases are red. "cuda" rounds other operands, which is another draw of errors: emulated, a tensor's are up to 2.8
# times the yardstick's, half of the bound at most.
REDUCED = {"triton": (2.0, 1e-3), "cuda": (4.0, 5e-3)}
REDUCED_ACTIONS = {"tf32": 1e-2, "bf16": TOLERANCES["bf16 in all"].rel}  # where no yardstick is at hand


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
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            mend_after_capture()  # or every test after one whose capture failed would fail, too
        torch.cuda.synchronize()  # what this test's kernels did wrong is no fault of the next one


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


def check_fp32(case: Case, got: dict[str, Tensor], backend: str) -> None:
    """Of few rows, one near an extremum decides on the error: see `FP32`."""
    eager, want = run_on_gpu(case, "eager"), expected(case)
    assert_all_close(got, want, TOLERANCES["float32"], case=case, backend=backend)
    factor, more = FP32
    for name in want:
        mine, other = norm_error(got[name], want[name]), norm_error(eager[name], want[name])
        allowed = factor * other + more
        assert mine <= allowed, f"{name} in case {case}, {backend}: error {mine:.3g}, eager float32 has {other:.3g}"


def check_reduced(case: Case, got: dict[str, Tensor], backend: str, precision: str) -> None:
    """For a case without kinks (see `SMOOTH`), or for actions alone."""
    want, rounded = expected(case), rounded_operands(case, precision)
    factor, more = REDUCED[backend]
    for name in got:
        mine, other = norm_error(got[name], want[name]), norm_error(rounded[name], want[name])
        assert mine <= factor * other + more, (
            f"{name} in case {case}, {backend} in {precision}: error {mine:.3g}, with rounded operands {other:.3g}"
        )


@cache
def rounded_operands(case: Case, precision: str) -> dict[str, Tensor]:
    """The tensors of `expected`, with operands rounded as "triton" rounds them; "cuda" rounds fewer of them."""
    problem = make_problem(case, torch.float64)
    problem.states.requires_grad_(True)
    return named_gradients(problem, rounded_chain(problem, roundings(precision)), problem.states)


def gpu_policy(**options: Any) -> dql.DiffusionPolicy:
    return make_policy(**options).to("cuda")


def gpu_states(B: int) -> Tensor:
    return states_of(B).to("cuda")


def sample(states: Tensor, policy: dql.DiffusionPolicy, backend: str, **options: Any) -> Tensor:
    return dql.sample(states, policy, backend=backend, **({"seed": SEED} | options))


def gradients(states: Tensor, policy: dql.DiffusionPolicy, backend: str, **options: Any) -> list[Tensor]:
    """The actions, and the gradient of the states and every parameter for a fixed loss."""
    inputs = states.detach().requires_grad_()
    actions = sample(inputs, policy, backend, **options)
    weights = torch.linspace(-1, 1, actions.numel(), device=actions.device).view_as(actions)
    return [actions.detach(), *torch.autograd.grad(actions, [inputs, *policy.denoiser.parameters()], weights)]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(a graph of the call, what it returned: the memory that each replay writes), as a user would capture it."""
    return recorded(call, warm_ups=3)


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
