"""Rows of a batch, and candidates of a state, on every backend: none depends on the others."""

import pytest
import torch
from support.backends import assert_same, in_bf16
from support.calls import SMALL, every_gradient, sample
from support.cases import TOLERANCES, assert_close
from support.networks import A, S, make_policy, states_of

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_a_row_does_not_depend_on_the_others(backend, activation, tiles_of_16_rows):
    """To the last bit, nor does its gradient, in the same place of a tile; NumPy's product rounds by the place."""
    policy, states = make_policy(activation=activation, T=2), states_of(40)
    given = torch.randn(2, 40, A, generator=torch.Generator().manual_seed(1))

    def run_rows(states: Tensor, rows: slice) -> list[Tensor]:
        inputs = states[rows].requires_grad_(True)
        actions = sample(backend, inputs, policy, noise=given[:, rows])
        return [actions.detach(), torch.autograd.grad(actions.square().sum(), inputs)[0]]

    whole = run_rows(states, slice(None))
    for rows in (slice(0, 1), slice(0, 15), slice(0, 16), slice(0, 17), slice(0, 39), slice(16, 40), slice(32, 33)):
        assert_same(backend, run_rows(states, rows), [tensor[rows] for tensor in whole], rows)
    for rows in (slice(39, 40), slice(7, 30), slice(1, 40)):
        for got, tensor in zip(run_rows(states, rows), whole, strict=True):
            assert_close(got, tensor[rows], TOLERANCES["float32"], what="a row", case=rows)
    others = torch.cat([states_of(20), states[20:]])
    got = run_rows(others, slice(None))
    assert_same(backend, [tensor[20:] for tensor in got], [tensor[20:] for tensor in whole], "others")


def test_the_tile_changes_last_bits_alone(backend):
    policy, states = make_policy(), states_of(70)
    given = torch.randn(5, 70, A, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = sample(backend, states, policy, noise=given)
        for B in (1, 17, 65):  # a tile of 16, 32, 256 rows
            part = sample(backend, states[:B], policy, noise=given[:, :B])
            assert_close(part, whole[:B], TOLERANCES["rows"], what="actions", case=f"the first {B} of 70")


@pytest.mark.parametrize("N", [1, 3, 14])
def test_candidates_share_their_state(backend, N, tiles_of_16_rows):
    """They are as repeated states, and the state's gradient is the sum of theirs."""
    check_candidates(backend, N, "fp32")


@in_bf16
@pytest.mark.parametrize("N", [1, 3, 14])
def test_candidates_share_their_state_in_bf16(backend, reduced, N, tiles_of_16_rows):
    check_candidates(backend, N, reduced)


def check_candidates(backend: str, N: int, precision: str) -> None:
    policy, states = make_policy(**SMALL), states_of(9).requires_grad_(True)
    candidates = sample(backend, states, policy, num_candidates=N, precision=precision)
    repeated = states.detach().repeat_interleave(N, 0).requires_grad_(True)
    alone = sample(backend, repeated, policy, precision=precision)
    assert candidates.shape == (9, N, A)
    d_states, *d_parameters = every_gradient(candidates, states, policy)
    d_repeated, *want = every_gradient(alone, repeated, policy)
    got, want = [candidates, d_states, *d_parameters], [alone, d_repeated.view(9, N, S).sum(1), *want]
    for i, (tensor, wanted) in enumerate(zip(got, want, strict=True)):
        tolerance = TOLERANCES["float32" if precision == "fp32" else "bf16"]
        assert_close(tensor.view(wanted.shape), wanted, tolerance, what=f"tensor {i}")
    one = sample(backend, states[:1].detach(), policy, num_candidates=N, precision=precision)
    assert_same(backend, [one], [candidates[:1]], f"N = {N}")
