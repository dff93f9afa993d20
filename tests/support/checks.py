"""Checks that every backend with kernels of its own must pass: bf16, random problems, against float64."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from support.cases import (
    TOLERANCES,
    Case,
    Tolerance,
    assert_all_close,
    clear_of_kinks,
    expected,
    make_problem,
    named_gradients,
    plain_chain,
    run_problem,
)

Tensor = torch.Tensor


def rms_error(got: Tensor, want: Tensor) -> float:
    """The root mean square of the difference, relative to that of `want`; infinite for NaN."""
    difference = float((got.double() - want.double()).norm().nan_to_num(torch.inf))
    return difference / float(want.double().norm()) if difference else 0.0


def check_bf16(case: Case, backend: str) -> None:
    """Against float64 with the operands of `plain_chain` rounded; the gradient is the exact one at those activations.

    Elements count together: a last bit of float32 may round an operand to the next bf16 number, and that row is off.
    """
    problem, distances = make_problem(case, torch.float64), []
    problem.states.requires_grad_(True)
    actions = plain_chain(problem, distances, "bf16")
    weights = clear_of_kinks(problem, distances, margins=10)
    want = named_gradients(problem, actions, problem.states, weights)
    got = run_problem(make_problem(case, torch.float32), backend, weights, "bf16")
    targets = [(name, "bf16 flips" if name == "actions" else "bf16 gradient", want[name]) for name in want]
    for name, tolerance, target in (*targets, ("actions", "bf16 in all", expected(case)["actions"])):
        rms = rms_error(got[name], target)
        allowed = TOLERANCES[tolerance]
        assert rms <= allowed.rel, f"{name} in case {case}: {rms:.2g} above {allowed.rel:g}: {allowed.why}"


@st.composite
def random_cases(draw: Callable[..., int]) -> Case:
    """Mostly small, now and then large, often no multiple of anything."""
    large = draw(st.integers(0, 9)) == 0
    K = draw(st.integers(1, 2 if large else 6))
    return Case(
        B=draw(st.integers(1, 3 if large else 20)),
        S=draw(st.integers(1, 512 if large else 40)),
        A=draw(st.one_of(st.integers(1, 8), st.integers(1, 64))),
        K=K,
        N=draw(st.one_of(st.none(), st.integers(1, 5))),
        H=draw(st.integers(1, 512 if large else 80)),
        num_hidden=draw(st.integers(2, 4)),
        activation=draw(st.sampled_from(["mish", "relu", "silu"])),
        sampler=draw(st.sampled_from(["ddpm", "ddim", "dpm-solver++"])),
        stochasticity=draw(st.sampled_from([0.0, 0.5, 1.0])),
        T=draw(st.one_of(st.none(), st.integers(K, 50))),
        beta_schedule=draw(st.sampled_from(["vp", "linear", "cosine"])),
        max_action=draw(st.sampled_from([0.3, 1.0, 3.0, 20.0])),
        predict_epsilon=draw(st.booleans()),
        time_dim=draw(st.one_of(st.just(16), st.integers(2, 32).map(lambda half: 2 * half))),
    )


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
