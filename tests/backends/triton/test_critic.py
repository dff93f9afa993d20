"""The Triton twin critics, their gradients and `select`, interpreted where no CUDA device is: `support/critic.py`."""

from types import ModuleType

import pytest
import torch
from support.checks import rms_error
from support.critic import *  # noqa: F403
from support.critic import DEVICE, Case, Run, make_problem
from support.emulator import cannot_run
from support.rounded_chain import Round, activation, bf16, for_rows, left_alone, product, tf32, truncated

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux only)")

from dql.kernels import triton as kernels_of_triton

pytestmark = pytest.mark.skipif(cannot_run("triton") is not None, reason=str(cannot_run("triton")))

Tensor = torch.Tensor


@pytest.fixture
def kernels() -> ModuleType:
    return kernels_of_triton


# Reduced precisions: float64 with the same operands rounded. The first layer's are of tf32 in bf16, too; of the last
# layer, which is no matrix product, only h is rounded that its weight's gradient is made of.
EDGES = (
    "states", "W_state", "x", "W_x",
    "d_z of the first layer", "d_z over candidates", "W_state backward", "W_x backward",
)  # fmt: skip
HIDDEN = ("h", "hidden weights", "d_z", "hidden weights backward")


def roundings(precision: str, changed: dict[str, Round]) -> dict[str, Round]:
    rounds = dict.fromkeys(EDGES, tf32) | dict.fromkeys(HIDDEN, bf16 if precision == "bf16" else tf32)
    return rounds | {"slope": bf16 if precision == "bf16" else left_alone} | changed


def rounded_critic(case: Case, rounds: dict[str, Round]) -> dict[str, Tensor]:
    """The tensors of `critic.expected`."""
    problem, N = make_problem(case), case.N or 1
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


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU sums in another order, so that more operands round otherwise")
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_each_operand_is_rounded_in_its_own_way(kernels, precision):
    """As `triton/test_chain` has it for the chain."""
    cases = [Case(B=B, S=5, A=3, N=2, H=32, num_hidden=3) for B in (7, 9, 10)]
    got = [Run(kernels, case, precision).named() for case in cases]

    def errors(changed: dict[str, Round]) -> list[dict[str, float]]:
        found = []
        for case, mine in zip(cases, got, strict=True):
            want = rounded_critic(case, roundings(precision, changed))
            found.append({name: rms_error(mine[name], want[name]) for name in want})
        return found

    right = errors({})
    assert min(max(of_case.values()) for of_case in right) <= 1e-5
    for name, how in roundings(precision, {}).items():
        for other in {left_alone, truncated, tf32, bf16} - {how}:
            ratios = [
                wrong[tensor] / (of_case[tensor] + 1e-7)
                for wrong, of_case in zip(errors({name: other}), right, strict=True)
                for tensor in of_case
            ]
            assert max(ratios) > 10, f"{name}: {how.__name__} or {other.__name__}"
