"""Blocks that run a tile of few rows alone, in the emulator: the numbers of other tilings, whatever the height."""

from dataclasses import replace

import pytest
import torch
from support.cases import TOLERANCES, Case, make_problem, run
from support.checks import rms_error
from support.emulator import SOLO

import dql
from dql.kernels.cuda import chain as cuda_chain
from dql.kernels.cuda import plan as cuda_plan
from dql.kernels.cuda.plan import Tiling

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("emulated", "poisoned")

SMOOTH = 1e5  # an action bound that nothing reaches: rounding cuts no gradient off
STREAMED = Tiling(1, 1, False)
CASES = [
    Case(B=37, S=11, A=3, K=3, H=48),  # padded to 128
    Case(B=9, S=3, A=40, K=3, N=5, H=24, num_hidden=2, activation="silu"),  # candidates; all weights in registers
    Case(B=70, S=70, A=20, K=2, H=128, num_hidden=4, activation="relu"),  # two chunks of a state; several tiles a block
    Case(B=13, S=17, A=6, K=14, H=256),  # the time table in three parts
    Case(B=41, S=5, A=1, K=1, H=212),
]


def sampled(case: Case, **options: object) -> Tensor:
    """Actions by noise that is handed in, in bf16."""
    problem = make_problem(case, torch.float32)
    told = {"noise": problem.noise, "num_candidates": case.N, "sampler": problem.table} | options
    with torch.no_grad():
        return dql.sample(problem.states, problem.policy, backend="cuda", precision="bf16", **told)


@pytest.mark.parametrize("tiling", SOLO, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_actions_as_others(case, tiling):
    """The same operands are rounded; only sums are added up in another order, which flips a few roundings."""
    case = replace(case, max_action=SMOOTH)
    for options in ({}, {"noise": None, "seed": 7}):
        with cuda_plan.forced(STREAMED):
            want = sampled(case, **options)
        with cuda_plan.forced(tiling):
            got = sampled(case, **options)
        assert rms_error(got, want) <= TOLERANCES["bf16 flips"].rel
        # of most rows none flips, and what is left is float32's own rounding, through K steps
        assert ((got - want).abs() / (1 + want.abs())).median() < 1e-5


@pytest.mark.parametrize("tiling", SOLO[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_gradients_as_others(case, tiling):
    case = replace(case, max_action=SMOOTH)
    with cuda_plan.forced(STREAMED):
        want = run(case, "cuda", precision="bf16")
    with cuda_plan.forced(tiling):
        got = run(case, "cuda", precision="bf16")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert rms_error(got[name], value) <= TOLERANCES["bf16 flips"].rel, name


@pytest.mark.parametrize("tiling", SOLO, ids=str)
def test_the_same_bits_in_any_order(tiling):
    """Of threads, which the emulator shuffles anew at each run: no warp writes what another still reads."""
    case = CASES[0] if tiling.rows > 4 else replace(CASES[0], K=8)
    with cuda_plan.forced(tiling):
        first, *others = (sampled(case) if tiling.rows == 4 else run(case, "cuda", precision="bf16") for _ in range(3))
    for other in others:
        if isinstance(first, Tensor):
            assert torch.equal(other, first)
        else:
            assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("tiling", SOLO, ids=str)
def test_a_row_does_not_depend_on_its_batch(tiling):
    """Of the seed's stream, whatever rows share its tile: to the bit within one height."""
    policy, states = dql.DiffusionPolicy(11, 3, hidden_dim=64), torch.randn(26, 11)
    with torch.no_grad(), cuda_plan.forced(tiling):
        every = dql.sample(states, policy, backend="cuda", precision="bf16", seed=3)
        few = dql.sample(states[:5], policy, backend="cuda", precision="bf16", seed=3)
    assert torch.equal(every[:5], few)


def test_parameters_that_start_anywhere_are_refused():
    """They are read 16 bytes at a time, which a GPU answers with a fault where they do not start at a multiple."""
    policy = dql.DiffusionPolicy(5, 3, hidden_dim=64)
    spec, flat = policy.denoiser.spec, policy.denoiser.buffer
    runner = cuda_chain.ChainRunner(spec, torch.zeros(2, 8), torch.zeros(2, spec.time_dim), 1.0, "bf16")
    shifted = torch.cat([flat.new_zeros(1), flat])[1:]
    with cuda_plan.forced(Tiling.alone(8)):
        runner.forward(flat, torch.zeros(1, 5), 1, None, 0, save=False)
        with pytest.raises(ValueError, match="must start at a multiple of 16 bytes in memory; clone them"):
            runner.forward(shifted, torch.zeros(1, 5), 1, None, 0, save=False)


def test_what_solo_blocks_are_not_for():
    policy = dql.DiffusionPolicy(5, 3, hidden_dim=64)
    odd = dql.DiffusionPolicy(5, 3, hidden_dim=66)
    with torch.no_grad(), cuda_plan.forced(Tiling.alone(8)):
        for other, precision in ((policy, "fp32"), (odd, "bf16")):
            with pytest.raises(ValueError, match="a denoiser in bf16 with H up to 256, a multiple of 4, by one block"):
                dql.sample(torch.zeros(1, 5), other, backend="cuda", precision=precision)
    with cuda_plan.forced(Tiling.alone(4)), pytest.raises(ValueError, match=r"has 4 \(but to save\), 8, 16 or 24 rows"):
        dql.sample(torch.zeros(1, 5), policy, backend="cuda", precision="bf16")
    with torch.no_grad(), cuda_plan.forced(Tiling.alone(12)), pytest.raises(ValueError, match="8, 16 or 24 rows"):
        dql.sample(torch.zeros(1, 5), policy, backend="cuda", precision="bf16")
