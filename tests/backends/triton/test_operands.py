"""Each operand of the Triton kernels' products is rounded in a way of its own, in tf32 and bf16; in the interpreter."""

from collections.abc import Callable

import pytest
import torch
from support import critic
from support.cases import Case, make_problem, named_gradients, run_problem
from support.checks import rms_error
from support.networks import S, make_policy, states_of
from support.rounded_chain import (
    Round,
    activation,
    bf16,
    for_rows,
    left_alone,
    product,
    rounded_chain,
    roundings,
    tf32,
    truncated,
)

from dql.kernels import triton as kernels
from dql.sampler import run_chain

Tensor = torch.Tensor
SMOOTH = 1e5  # an action bound that nothing reaches: rounding cuts no gradient off
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


def check_each(got: list[dict[str, Tensor]], rounds: dict[str, Round], want: Callable) -> None:
    """Had the kernels left one of them as it was, cut it off or rounded it to the other type, it would show.

    One float32 sum beside the border of two operands may round to the other: that hides a little. Of three cases one
    at least is free of it, or nearly, and tells the kernels from those of any other way by a factor of ten.

    Args:
        got: each case's tensors by name.
        rounds: how each operand is to be rounded.
        want: (a case's number, what rounds in another way) -> its tensors, in float64.
    """

    def errors(changed: dict[str, Round]) -> list[dict[str, float]]:
        return [
            {name: rms_error(mine[name], tensor) for name, tensor in want(i, changed).items()}
            for i, mine in enumerate(got)
        ]

    right = errors({})
    assert min(max(of_case.values()) for of_case in right) <= 1e-5
    for name, how in rounds.items():
        for other in {left_alone, truncated, tf32, bf16} - {how}:
            ratios = [
                wrong[tensor] / (of_case[tensor] + 1e-7)
                for wrong, of_case in zip(errors({name: other}), right, strict=True)
                for tensor in of_case
            ]
            assert max(ratios) > 10, f"{name}: {how.__name__} or {other.__name__}"


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_of_the_chain(precision):
    cases = [Case(B=B, S=5, A=3, K=3, N=2, H=32, max_action=SMOOTH) for B in (7, 9, 10)]
    problems = [make_problem(case, torch.float32) for case in cases]
    got = [run_problem(problem, "triton", problem.weights, precision) for problem in problems]

    def want(i: int, changed: dict[str, Round]) -> dict[str, Tensor]:
        exact = make_problem(cases[i], torch.float64)
        exact.states.requires_grad_(True)
        actions = rounded_chain(exact, roundings(precision, changed))
        return named_gradients(exact, actions, exact.states, exact.weights)

    check_each(got, roundings(precision), want)


# Critics: the first layer's operands are of tf32 in bf16, too; of the last layer, which is no matrix product, only h is
# rounded that its weight's gradient is made of.
EDGES = (
    "states", "W_state", "x", "W_x",
    "d_z of the first layer", "d_z over candidates", "W_state backward", "W_x backward",
)  # fmt: skip
HIDDEN = ("h", "hidden weights", "d_z", "hidden weights backward")


def critic_roundings(precision: str, changed: dict[str, Round] | None = None) -> dict[str, Round]:
    rounds = dict.fromkeys(EDGES, tf32) | dict.fromkeys(HIDDEN, bf16 if precision == "bf16" else tf32)
    return rounds | {"slope": bf16 if precision == "bf16" else left_alone} | (changed or {})


def rounded_critic(case: critic.Case, rounds: dict[str, Round]) -> dict[str, Tensor]:
    """The tensors of `critic.expected`."""
    problem, N = critic.make_problem(case), case.N or 1
    states, actions = problem.states.requires_grad_(True), problem.actions.requires_grad_(True)
    values = []
    for i in case.which:
        layers = [m for m in getattr(problem.critic, f"q{i + 1}_model") if isinstance(m, torch.nn.Linear)]
        W_state, W_x = layers[0].weight.split([case.S, case.A], dim=1)
        of_d = rounds["d_z of the first layer"]
        z = product(
            states, W_state, rounds["states"], rounds["W_state"], of_d, rounds["W_state backward"],
            shared=N, of_sum=rounds["d_z over candidates"],
        )  # fmt: skip  # [R, H]
        z = z + product(actions, W_x, rounds["x"], rounds["W_x"], of_d, rounds["W_x backward"]) + layers[0].bias
        for layer in layers[1:-1]:
            h = activation(z, case.activation, rounds["slope"])
            z = product(h, layer.weight, *(rounds[name] for name in HIDDEN))
            z = z + for_rows(layer.bias, len(z), rounds["d_z"])
        h, w = activation(z, case.activation, rounds["slope"]), layers[-1].weight
        of_weight = rounds["h"](h.detach()) @ (w - w.detach()).T  # nothing but d_w
        values.append((h @ w.detach().T + of_weight + layers[-1].bias).squeeze(1))
    q = torch.stack(values)
    names, parameters = zip(*problem.critic.named_parameters(), strict=True)
    gradients = torch.autograd.grad((q * problem.d_q).sum(), [states, actions, *parameters], materialize_grads=True)
    named = dict(zip(("states", "actions", *names), gradients, strict=True))
    return {"q": q.detach()} | {f"d_{name}": d for name, d in named.items()}


@pytest.mark.skipif(critic.DEVICE.type != "cpu", reason="a GPU's sums are cut off otherwise: interpreted alone")
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_of_critics(precision):
    cases = [critic.Case(B=B, S=5, A=3, N=2, H=32, num_hidden=3) for B in (7, 9, 10)]
    got = [critic.Run(kernels, case, precision).named() for case in cases]

    def want(i: int, changed: dict[str, Round]) -> dict[str, Tensor]:
        return rounded_critic(cases[i], critic_roundings(precision, changed))

    check_each(got, critic_roundings(precision), want)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, of what is meant here
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_float32_that_overflows_within_is_nan(activation):
    """Of the row that it befalls alone. An infinite prediction would be clamped, and end as an action like any other,
    as in torch: float32's three products have no infinities, for they would have to be looked for."""
    policy, states = make_policy(activation=activation), states_of(5)
    with torch.no_grad():
        for name, parameter in policy.denoiser.named_parameters():
            if name.endswith("weight"):
                parameter.abs_().add_(1e-3)  # infinity meets no zero, nor another one with the other sign
        policy.denoiser.get_parameter("mid_layer.0.weight")[:, -S:] = 1.0
        states[3] = 2e38
        got, want = (run_chain(states, policy, seed=0, backend=name) for name in ("triton", "eager"))
    assert want.isfinite().all() and got[3].isnan().all()
    spared = [0, 1, 2, 4]
    torch.testing.assert_close(got[spared], want[spared], rtol=1e-4, atol=1e-4)
