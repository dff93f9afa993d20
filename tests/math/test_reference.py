"""kernels/reference.py against the transcription: values and every gradient, and its building blocks alone."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import transcription
from support.cases import (
    CASES,
    EAGER_ALONE,
    TOLERANCES,
    Case,
    assert_all_close,
    assert_close,
    error,
    expected,
    loss_weights,
    make_problem,
    plain,
    plain_chain,
    run,
)

from dql import noise as noise_stream
from dql import sample
from dql.kernels import reference

Tensor = torch.Tensor
DOUBLE = torch.float64


def chain_fwd(problem, save, weights=None, states=None, table=None):
    """`reference.chain_fwd` on a problem."""
    policy, case = problem.policy, problem.case
    table = table or problem.table
    timesteps = torch.tensor(table.timesteps, dtype=problem.noise.dtype)
    return reference.chain_fwd(
        policy.denoiser.weights if weights is None else weights,
        policy.denoiser.spec,
        problem.states if states is None else states,
        problem.noise.reshape(case.K, case.rows, case.A),
        table.rows,
        reference.time_embedding(timesteps, policy.denoiser.spec.time_dim),
        case.max_action,
        save,
    )


@pytest.mark.parametrize("case", CASES + EAGER_ALONE, ids=str)
def test_float64_equals_the_transcription(case):
    assert_all_close(run(case, "eager", DOUBLE), expected(case), TOLERANCES["float64"], case=case, backend="eager")


@pytest.mark.parametrize("case", CASES + EAGER_ALONE, ids=str)
def test_float32_is_as_near_as_its_rounding_allows(case):
    got, want, yardstick = run(case, "eager"), expected(case), plain(case, torch.float32)
    assert_all_close(got, want, TOLERANCES["float32"], case=case, backend="eager")
    for name in want:
        allowed = 4 * error(yardstick[name], want[name]) + TOLERANCES["float32 yardstick"].rel
        assert error(got[name], want[name]) <= allowed, (
            f"{name} of backend eager in case {case}: error {error(got[name], want[name]):.3g}, "
            f"plain float32 torch has {error(yardstick[name], want[name]):.3g}"
        )


@pytest.mark.parametrize("case", CASES + EAGER_ALONE, ids=str)
def test_the_yardstick_is_right(case):
    assert_all_close(plain(case, DOUBLE), expected(case), TOLERANCES["float64"], case=case, backend="plain torch")


def test_the_cases_reach_what_they_are_for():
    """Both ways to compute Mish, and gradients that are not all cut off by the clamps."""
    assert sum(case.splits_mish for case in CASES) >= 4
    for case in CASES:
        for name, gradient in expected(case).items():
            assert gradient.any(), f"{name} is zero in case {case}"
    inside = []
    for case in CASES:
        _, saved = chain_fwd(make_problem(case, DOUBLE), save=True)
        inside.append(saved.inside[:-1].double().mean())
    assert 0.2 < float(torch.stack(inside).mean()) < 0.8
    for letter, sizes in {"B": {1, 37, 1000}, "S": {3, 11}, "A": {1, 3, 24}, "K": {1, 2, 5, 15}}.items():
        assert {getattr(case, letter) for case in CASES} == sizes
    assert {case.N for case in CASES} >= {None, 1, 3, 50}
    assert {case.num_hidden for case in CASES} == {2, 3, 4}
    assert {case.H for case in CASES} == {16, 48, 256}


def test_saving_changes_no_value():
    for case in (CASES[3], CASES[6]):  # plain and split Mish
        problem = make_problem(case, torch.float32)
        assert torch.equal(chain_fwd(problem, save=True)[0], chain_fwd(problem, save=False)[0])
        assert chain_fwd(problem, save=False)[1] is None


def test_only_the_needed_gradients():
    case = CASES[3]
    problem = make_problem(case, DOUBLE)
    spec = problem.policy.denoiser.spec
    _, saved = chain_fwd(problem, save=True)
    d_actions = problem.weights.clone()
    d_flat, d_states = reference.chain_bwd(saved, spec, d_actions)
    assert torch.equal(d_actions, problem.weights)
    none, only_states = reference.chain_bwd(saved, spec, d_actions, need_parameters=False)
    only_flat, nothing = reference.chain_bwd(saved, spec, d_actions, need_states=False)
    assert none is None
    assert nothing is None
    assert torch.equal(only_states, d_states)
    assert torch.equal(only_flat, d_flat)


def test_the_gaps_of_the_flat_buffer_stay_zero():
    problem = make_problem(CASES[3], torch.float32)  # 3 * 22 elements and the like: most slots have a gap
    spec = problem.policy.denoiser.spec
    _, saved = chain_fwd(problem, save=True)
    d_flat, _ = reference.chain_bwd(saved, spec, problem.weights)
    gap = torch.ones(spec.layout.size, dtype=torch.bool)
    for slot in spec.layout.slots:
        gap[slot.offset : slot.offset + slot.size] = False
    assert gap.any()
    assert not d_flat[gap].any()
    assert not problem.policy.denoiser.flat.detach()[gap].any()


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
@pytest.mark.parametrize("activation", ["mish", "silu"])
def test_gradcheck(sampler, activation):
    """Every element of the parameters and the states against finite differences."""
    case = Case(2, 2, 1, 3, N=2, H=4, num_hidden=2, activation=activation, sampler=sampler, max_action=40.0)
    problem = make_problem(case, DOUBLE)
    spec = problem.policy.denoiser.spec

    class Chain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, flat: Tensor, states: Tensor) -> Tensor:
            actions, ctx.chain = chain_fwd(problem, True, spec.layout.views(flat.detach()), states.detach())
            return actions

        @staticmethod
        def backward(ctx, d_actions: Tensor) -> tuple[Tensor, Tensor]:
            return reference.chain_bwd(ctx.chain, spec, d_actions)

    flat = problem.policy.denoiser.flat.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(Chain.apply, (flat, problem.states.requires_grad_(True)), atol=1e-7, rtol=1e-5)


def test_a_table_of_ones_own_that_clamps_the_action():
    """No named sampler reaches the last clamp: its last row is c0 = 1 and cx = 0."""
    case = Case(37, 3, 3, 2, H=16, max_action=1.0)
    problem = make_problem(case, DOUBLE)
    rows = ((1.1, 0.4, 0.9, 0.6, 0.0, 0.3), (1.0, 0.2, 0.7, 0.8, -0.4, 0.0))
    problem.table = type(problem.table)("mine", rows, (1, 0))
    problem.states.requires_grad_(True)
    names, parameters = zip(*problem.policy.denoiser.named_parameters(), strict=True)
    results = []
    for actions in (
        plain_chain(problem),
        sample(problem.states, problem.policy, backend="eager", noise=problem.noise, sampler=problem.table),
    ):
        gradients = torch.autograd.grad((actions * problem.weights).sum(), [problem.states, *parameters])
        results.append(dict(zip(("actions", "d_states", *names), (actions.detach(), *gradients), strict=True)))
    assert 0.05 < float((results[0]["actions"].abs() == 1).double().mean()) < 0.95
    assert_all_close(results[1], results[0], TOLERANCES["float64"], case="own table", backend="eager")


@contextlib.contextmanager
def poisoned_memory():
    """Fresh uninitialised tensors hold NaN (booleans True)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 3, 6, 12, 23, 27)], ids=str)
def test_fresh_buffers_do_not_matter(case):
    want = run(case, "eager")
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(1).new_empty(3).isnan().all()
        got = run(case, "eager")
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} in case {case} depends on uninitialised memory"


def exact_activation(z: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative in extended precision, in forms without cancellation or overflow."""
    z = z.astype(np.longdouble)
    small = np.exp(-np.abs(z))
    s = np.where(z > 0, 1 / (1 + small), small / (1 + small))  # sigmoid(z)
    q = np.where(z > 0, small / (1 + small), 1 / (1 + small))  # 1 - s
    if kind == "relu":
        return np.maximum(z, 0), (z > 0).astype(np.longdouble)
    if kind == "silu":
        return z * s, s + z * s * q
    w = s * (1 + q) / (1 + q * q)  # tanh(softplus(z)), as tanh(log(u)) = (u^2 - 1)/(u^2 + 1), u = 1/q
    one_minus_w = 2 * q * q / (1 + q * q)
    return z * w, w + z * s * one_minus_w * (1 + w)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["mish", "relu", "silu"])
def test_activations_over_the_whole_range(kind, dtype):
    largest = 38.4 if dtype == torch.float32 else 308.2
    wide = torch.logspace(-37, largest, 3000, dtype=DOUBLE).clamp(max=torch.finfo(dtype).max)
    z = torch.cat([torch.linspace(-120, 120, 60_001, dtype=DOUBLE), wide, -wide, torch.zeros(1, dtype=DOUBLE)]).to(
        dtype
    )
    h_want, d_want = (torch.from_numpy(v.astype(np.float64)) for v in exact_activation(z.numpy(), kind))
    eps = torch.finfo(dtype).eps
    pieces = {"large": [z], "small": list(z.split(1000))}  # the two ways to compute Mish
    assert len(z) > reference._SMALL > 1000
    for size, parts in pieces.items():
        forward = [reference.activation_fwd(part, kind, save=True) for part in parts]
        h = torch.cat([value for value, _ in forward]).double()
        slopes = [reference.activation_bwd(torch.ones_like(v), saved, kind) for v, saved in forward]
        # relative, where exp(z) is a normal number; 1e-35 is where float32's is not any more
        bad = (h - h_want).abs() > 8 * eps * h_want.abs() + 1e-35
        assert not bad.any(), f"{kind} {size}: {int(bad.sum())} values off, first at z = {float(z[bad][0])!r}"
        # 1 - s is lost below eps, where z is -ln(eps): an error of z eps at most
        bad = (torch.cat(slopes).double() - d_want).abs() > -math.log(eps) * eps
        assert not bad.any(), f"{kind} {size}: {int(bad.sum())} slopes off, first at z = {float(z[bad][0])!r}"
        plain_h = torch.cat([reference.activation_fwd(part, kind)[0] for part in parts]).double()
        assert torch.equal(plain_h, h), f"{kind} {size}: save=True changes a value"


@pytest.mark.parametrize("count", [3, 6000])
@pytest.mark.parametrize("kind", ["mish", "relu", "silu"])
def test_activations_of_what_is_not_finite(kind, count):
    """NaN stays NaN, and infinities give what torch's own operator gives (in Mish 0 * inf at -inf)."""
    z = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(count // 3)
    h, saved = reference.activation_fwd(z, kind, save=True)
    own = {"mish": F.mish, "relu": F.relu, "silu": F.silu}[kind](z)
    torch.testing.assert_close(h, own, equal_nan=True, rtol=0, atol=0)
    assert h[2].isnan()
    slope = reference.activation_bwd(torch.ones_like(z), saved, kind)
    assert kind == "relu" or slope[2].isnan()
    finite = torch.zeros(count).where(z.isfinite(), torch.tensor(0.5))  # a NaN in one place does not spread
    finite[0] = torch.nan
    h, saved = reference.activation_fwd(finite, kind, save=True)
    assert h[1:].isfinite().all()
    assert reference.activation_bwd(torch.ones_like(z), saved, kind)[1:].isfinite().all()


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'gelu'; known: mish, relu, silu"):
        reference.activation_fwd(torch.zeros(1), "gelu")


@pytest.mark.parametrize("dim", [4, 16, 32])
def test_time_embedding(dim):
    t = torch.tensor([0, 1, 4, 49, 999])
    want = transcription.sinusoidal_embedding(t, dim)
    assert_close(reference.time_embedding(t.double(), dim), want, TOLERANCES["float64"], what="embedding")
    # float32: t times a rounded frequency, t = 999 loses three digits
    assert_close(reference.time_embedding(t.float(), dim), want, TOLERANCES["float32"], what="embedding, float32")


def test_a_seed_is_the_noise_of_that_seed():
    for case in (CASES[3], CASES[27]):
        problem = make_problem(case, DOUBLE)
        drawn = noise_stream.normal(77, case.K, case.rows, case.A, dtype=DOUBLE).reshape(problem.noise.shape)
        common = {"backend": "eager", "num_candidates": case.N, "sampler": problem.table}
        by_seed = sample(problem.states, problem.policy, seed=77, **common)
        by_noise = sample(problem.states, problem.policy, noise=drawn, **common)
        assert torch.equal(by_seed, by_noise)


def test_rows_near_a_kink_have_no_weight():
    weights = [loss_weights(case) for case in CASES]
    assert all(w.isfinite().all() for w in weights)
    assert any((w == 0).any() for w in weights)


def test_a_failed_comparison_says_all():
    got, want = torch.zeros(2, 3), torch.zeros(2, 3)
    want[1, 2], got[0, 0] = 1.0, torch.nan
    with pytest.raises(AssertionError) as caught:
        assert_close(got, want, TOLERANCES["float64"], what="d_states", case=CASES[0], backend="eager")
    for part in (
        "d_states",
        "backend eager",
        str(CASES[0]),
        "2 of 6 elements",
        "[0, 0]",
        "nan",
        "error ratio inf",
    ):
        assert part in str(caught.value)
    with pytest.raises(AssertionError, match=r"worst at \[1, 2\].*error ratio 1e\+10"):
        assert_close(torch.zeros(2, 3), want, TOLERANCES["float64"], what="actions")
    with pytest.raises(AssertionError, match=r"shape \[2, 1\], expected \[2, 3\]"):
        assert_close(torch.zeros(2, 1), want, TOLERANCES["float64"], what="actions")
