"""Checks that every backend must pass: reduced precisions, random problems, against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from support.cases import (
    TOLERANCES,
    Case,
    Problem,
    Tolerance,
    assert_all_close,
    clear_of_kinks,
    expected,
    make_problem,
    named_gradients,
    plain_chain,
    run_problem,
)
from support.rounded_chain import rounded_chain, roundings

Tensor = torch.Tensor


def rms_error(got: Tensor, want: Tensor) -> float:
    """The root mean square of the difference, relative to that of `want`; infinite for NaN."""
    difference = float((got.double() - want.double()).norm().nan_to_num(torch.inf))
    return difference / float(want.double().norm()) if difference else 0.0


@dataclass(frozen=True)
class Rounded:
    """How a backend rounds in one precision, and how near it comes to float64 that does the same.

    Elements count together: a last bit of float32 may round an operand to its other neighbour, and that row is off.

    Attributes:
        chain: the chain in float64 with the operands rounded as they are there, of a problem and the list of its rows'
            distances to kinks; see `cases.plain_chain`. None: the actions alone are looked at, by `in_all`.
        actions: the name of the tolerance of their root mean square error.
        gradients: likewise of every gradient; "" where `largest` alone holds.
        largest: the tolerance of every element of every tensor, where there is one.
        in_all: how much of the tolerance "bf16 in all" the actions may be off from float64 that does not round.
        every: of how many cases one is run.
    """

    chain: Callable[[Problem, list[Tensor]], Tensor] | None
    actions: str = ""
    gradients: str = ""
    largest: str = ""
    in_all: float = 1.0
    every: int = 1


def _plain_bf16(problem: Problem, distances: list[Tensor]) -> Tensor:
    """Its gradient is the exact one at activations of rounded operands."""
    return plain_chain(problem, distances, "bf16")


TF32 = 1 / 8  # of bf16's error: operands have 10 bits of fraction, three more
# "cpp" and "cuda" leave the first and the last layer in float32 where others are bf16.
CPP = {"bf16": Rounded(_plain_bf16, "bf16 on average", largest="bf16")}
CUDA = {"tf32": Rounded(None, in_all=TF32, every=4), "bf16": Rounded(_plain_bf16, "bf16 flips", "bf16 gradient")}
# "triton" rounds the operands of every product.
TRITON = {
    precision: Rounded(
        lambda problem, distances, precision=precision: rounded_chain(problem, roundings(precision), distances),
        f"{precision} operands",
        f"{precision} operands, gradient",
        in_all=in_all,
        every=every,
    )
    for precision, in_all, every in (("tf32", TF32, 3), ("bf16", 1.0, 1))
}


def check_rounded(case: Case, backend: str, precision: str, rounded: Rounded, what: str = "") -> None:
    """Against float64 that rounds likewise, and the actions against float64 that does not."""
    where = f"in case {case}, {backend} in {precision} {what}".rstrip()
    weights, want = None, {}
    if rounded.chain is not None:
        problem, distances = make_problem(case, torch.float64), []
        problem.states.requires_grad_(True)
        actions = rounded.chain(problem, distances)
        weights = clear_of_kinks(problem, distances, margins=10)
        want = named_gradients(problem, actions, problem.states, weights)
    got = run_problem(make_problem(case, torch.float32), backend, weights, precision)
    if rounded.largest:
        assert_all_close(got, want, TOLERANCES[rounded.largest], case=case, backend=f"{backend}, {precision}")
    for name, target in want.items():
        if tolerance := rounded.actions if name == "actions" else rounded.gradients:
            check_rms(got[name], target, TOLERANCES[tolerance], f"{name} {where}")
    in_all = replace(TOLERANCES["bf16 in all"], rel=TOLERANCES["bf16 in all"].rel * rounded.in_all)
    check_rms(got["actions"], expected(case)["actions"], in_all, f"actions {where}")


def check_rms(got: Tensor, want: Tensor, tolerance: Tolerance, what: str) -> None:
    rms = rms_error(got, want)
    assert rms <= tolerance.rel, f"{what}: {rms:.2g} above {tolerance.rel:g}: {tolerance.why}"


def check_against_eager(case: Case, backend: str) -> float:
    """In float64, whose gradient is the same but for rows at a kink. Returns the share of the states that have one."""
    exact, distances = make_problem(case, torch.float64), []
    with torch.no_grad():
        plain_chain(exact, distances)
    weights = clear_of_kinks(exact, distances, margins=10)
    want = run_problem(exact, "eager", weights)
    got = run_problem(make_problem(case, torch.float32), backend, weights)
    # the denoiser's rounding times b, which is 1,000 where abar is nearly 0, relative to the actions
    gain = max(abs(row[1]) for row in exact.table.rows) / case.max_action
    rel = TOLERANCES["float32"].rel + 1e-5 * gain
    largest = max(float(gradient.abs().amax()) for name, gradient in want.items() if name != "actions")
    tolerance = Tolerance(
        rel, rel * 0.01 * largest, f"float32, with b / max_action = {gain:.3g}; sums over rows may cancel"
    )
    assert_all_close(got, want, tolerance, case=case, backend=backend)
    return float((want["d_states"] != 0).any(dim=1).double().mean())
