"""The actor's launches, in the interpreter: a chain and the noise-prediction loss of a batch, against float64."""

import importlib.util
from dataclasses import dataclass, replace

import pytest
import torch
from support.cases import CASES, TOLERANCES, Case, assert_all_close, clear_of_kinks, make_problem, plain_chain
from support.checks import check_rms

from dql import noise
from dql.backend.base import timestep_embedding
from dql.kernels import triton as kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from support.triton_tiles import launches

from dql.kernels.triton.tiles import Tile, forced

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
SEED, BC_SEED = (1 << 64) - 5, 11
SMALL = Case(B=37, S=3, A=3, K=5, H=24, num_hidden=2, max_action=3.0)  # gaps between the parameters
SHAPES = [
    case
    for case in CASES
    if (case.sampler, case.T, case.N) == ("ddpm", None, None) and case.rows * case.K * case.H <= 37 * 2 * 256
] + [SMALL, replace(SMALL, predict_epsilon=False)]


@dataclass
class Inputs:
    """A case's batch: what is handed over beside policy and states; the same numbers in every dtype."""

    actions: Tensor  # [B, A]
    t: Tensor  # [B]
    d_sampled: Tensor  # [B, A]


def inputs_of(case: Case, dtype: torch.dtype, precision_margins: float = 1.0) -> Inputs:
    """Rows of the chain that come within rounding of a kink have no gradient, see `cases.loss_weights`."""
    generator = torch.Generator().manual_seed(3)
    actions = torch.rand(case.B, case.A, generator=generator) * 2 - 1
    t = torch.randint(case.K, (case.B,), generator=generator)
    problem, distances = make_problem(case, torch.float64), []
    problem.noise = noise.normal(SEED, case.K, case.B, case.A, dtype=torch.float64)
    with torch.no_grad():
        plain_chain(problem, distances)
    d_sampled = clear_of_kinks(problem, distances, margins=precision_margins) / case.B
    return Inputs(actions.to(dtype), t, d_sampled.to(dtype))


def runner_of(case: Case, precision: str = "fp32"):
    policy = make_problem(case, torch.float32).policy
    table, spec, device = policy.step_table(), policy.denoiser.spec, torch.device("cpu")
    rows = torch.tensor([(*row, 0.0, 0.0) for row in table.rows], dtype=torch.float32)
    embedding = timestep_embedding(table, spec.time_dim, torch.float32, device)
    q_sample = policy.q_sample_table(torch.empty(0))
    return kernels.actor_runner(
        spec, rows, embedding, q_sample, case.max_action, case.predict_epsilon, precision
    ), policy.denoiser.buffer


def got(
    case: Case,
    precision: str = "fp32",
    seed: int | Tensor = SEED,
    bc_seed: int | Tensor = BC_SEED,
    margins: float = 1.0,
) -> dict[str, Tensor]:
    """`sampled`, `loss`, the gradient of the loss alone, of that and of the chain's loss together, by the kernels."""
    runner, flat = runner_of(case, precision)
    states, given = make_problem(case, torch.float32).states, inputs_of(case, torch.float32, margins)
    sampled, loss, saved = runner.forward(flat, states, given.actions, given.t, bc_seed, seed)
    of_both = runner.backward(flat, saved, states, given.d_sampled)
    of_loss = runner.backward(flat, saved, states, None)
    return {"sampled": sampled, "loss": loss} | named(case, of_both, "both") | named(case, of_loss, "loss")


def named(case: Case, d_flat: Tensor, what: str) -> dict[str, Tensor]:
    """The gradients by name; where no parameter lies it is zero."""
    layout = make_problem(case, torch.float32).policy.denoiser.spec.layout
    gaps = d_flat.clone()
    for view in layout.views(gaps).values():
        view.zero_()
    assert not gaps.any(), "d_flat is not zero in the gaps between parameters"
    return {f"{what}: d_{name}": view for name, view in layout.views(d_flat).items()}


def want(case: Case, margins: float = 1.0) -> dict[str, Tensor]:
    """The same in float64, by the policy's own loss and a chain that anyone would write."""
    problem, given = make_problem(case, torch.float64), inputs_of(case, torch.float64, margins)
    problem.noise = noise.normal(SEED, case.K, case.B, case.A, dtype=torch.float64)
    eps = noise.normal(BC_SEED, 1, case.B, case.A, dtype=torch.float64)[0]
    loss = problem.policy.bc_loss(problem.states, given.actions, given.t, eps)
    sampled = plain_chain(problem)
    names, parameters = zip(*problem.policy.denoiser.named_parameters(), strict=True)
    of_loss = torch.autograd.grad(loss, parameters, retain_graph=True)
    of_both = torch.autograd.grad(loss + (sampled * given.d_sampled).sum(), parameters)
    found = {"sampled": sampled.detach(), "loss": loss.detach()[None]}
    for what, gradients in (("both", of_both), ("loss", of_loss)):
        found |= {f"{what}: d_{name}": d for name, d in zip(names, gradients, strict=True)}
    return found


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values_and_every_gradient(case):
    assert_all_close(got(case), want(case), TOLERANCES["float32"], case=case, backend="triton")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_reduced_precision(precision):
    """As near to float64 as operands of so many bits are; of which each is rounded `test_operands` tells."""
    found, target = got(SMALL, precision, margins=10), want(SMALL, margins=10)
    for name in target:
        tolerance = TOLERANCES["bf16 in all"]
        check_rms(found[name], target[name], tolerance, f"{name} in {precision}")


def test_tiles():
    """Several of them, of 16 and of 32 rows, of which the last is not full; registers and memory hold what they do."""
    target = want(SMALL)
    for forward, backward in ((16, 16), (32, 16), (16, 32)):
        with forced(Tile(forward, 16, 2, 4), Tile(backward, 16, 2, 4)):
            assert_all_close(got(SMALL), target, TOLERANCES["float32"], case=f"{forward}, {backward}", backend="triton")


def test_seeds_in_memory_and_the_same_call_twice():
    """The same bits."""
    first = got(SMALL)
    bits = torch.tensor([SEED - (1 << 64)]), torch.tensor([BC_SEED])
    for seeds in ((SEED, BC_SEED), bits, (bits[0], BC_SEED)):
        again = got(SMALL, "fp32", *seeds)
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_the_chain_is_that_of_the_chain_runner():
    """To the bit, its rows' noise being drawn by a seed of its own."""
    runner, flat = runner_of(SMALL)
    states, given = make_problem(SMALL, torch.float32).states, inputs_of(SMALL, torch.float32)
    chain = kernels.chain_runner(runner.spec, runner.steps[:-1].clone(), runner.embedding, SMALL.max_action, "fp32")
    sampled, _, _ = runner.forward(flat, states, given.actions, given.t, BC_SEED, SEED)
    actions, _ = chain.forward(flat, states, 1, None, SEED, True)
    assert torch.equal(sampled, actions)


def test_the_loss_alone(monkeypatch):
    """Without a chain: of DiffusionBC. The same bits as beside one."""
    runner, flat = runner_of(SMALL)
    states, given = make_problem(SMALL, torch.float32).states, inputs_of(SMALL, torch.float32)
    results = []
    for seed in (SEED, None):
        sampled, loss, saved = runner.forward(flat, states, given.actions, given.t, BC_SEED, seed)
        assert (sampled is None) == (seed is None)
        results.append((loss.clone(), runner.backward(flat, saved, states, None)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="a gradient of sampled actions, and none were sampled"):
        runner.backward(flat, saved, states, given.d_sampled)
    seen = launches(monkeypatch)
    runner.backward(flat, runner.forward(flat, states, given.actions, given.t, 1, 2)[2], states, given.d_sampled)
    assert [kernel.name for kernel, _ in seen] == [
        "prologue",
        "actor_fwd",
        "actor_bwd",
        "chain_products",
        "chain_finish",
    ]


def test_timesteps_that_are_none():
    runner, flat = runner_of(SMALL)
    states, given = make_problem(SMALL, torch.float32).states, inputs_of(SMALL, torch.float32)
    for t in (given.t.int(), given.t[:-1], given.t.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"t must be 37 int64 numbers in one piece on cpu, got torch.int"):
            runner.forward(flat, states, given.actions, t, 1, 2)
