"""The noise-prediction loss of a batch beside a chain over its states, by the kernels of every backend that has them,
against torch in float64; on a GPU where there is one, otherwise interpreted or emulated."""

from dataclasses import replace

import pytest
import torch
from support.cases import CASES, TOLERANCES, Case, assert_close, clear_of_kinks, make_problem, plain_chain
from support.critic import DEVICE, poisoned
from support.emulator import HEIGHTS, tilings

from dql import noise
from dql.backend.base import timestep_embedding
from dql.backend.registry import of_gpus, registry
from dql.kernels.cuda import plan as cuda_plan

Tensor = torch.Tensor
BC_SEED, SEED = 2**63 + 5, 11
DDPM = [case for case in CASES if case.sampler == "ddpm" and case.N is None and case.T in (None, case.K)]
SMALL = Case(B=37, S=5, A=3, K=3, H=48, num_hidden=2, max_action=2.5)


@pytest.fixture(params=of_gpus())
def kernels(request, runs_here):
    with poisoned():
        yield registry()[runs_here(request.param)].kernels


class Losses:
    """A case's policy, batch and draws, and its losses both ways: bc_loss + (sampled * weights).sum()."""

    def __init__(self, case: Case) -> None:
        self.case, draw = case, torch.Generator().manual_seed(case.B + case.A)
        problem = make_problem(case, torch.float64)
        problem.noise = noise.normal(SEED, case.K, case.B, case.A, dtype=torch.float64)
        distances: list[Tensor] = []
        with torch.no_grad():
            plain_chain(problem, distances)
        self.problem, self.weights = problem, clear_of_kinks(problem, distances)
        self.actions = torch.randn(case.B, case.A, generator=draw).double()
        self.t = torch.randint(0, case.K, (case.B,), generator=draw)
        self.policy, self.states = problem.policy, problem.states

    def expected(self, chain: bool = True, loss: bool = True) -> dict[str, Tensor]:
        eps = noise.normal(BC_SEED, 1, self.case.B, self.case.A, dtype=torch.float64)[0]
        bc_loss = self.policy.bc_loss(self.states, self.actions, self.t, eps)
        sampled, denoiser = plain_chain(self.problem), self.policy.denoiser
        denoiser.zero_grad()
        (bc_loss * loss + (sampled * self.weights).sum() * chain).backward()
        found = {f"d_{name}": p.grad.clone() for name, p in denoiser.named_parameters()}
        return {"loss": bc_loss.detach().view(1), "sampled": sampled.detach()} | found

    def runner(self, kernels, precision: str = "fp32"):
        policy, table = self.policy, self.policy.step_table()
        rows = torch.tensor([(*row, 0.0, 0.0) for row in table.rows], device=DEVICE)
        embedding = timestep_embedding(table, self.case.time_dim, torch.float32, torch.device(DEVICE))
        q_sample = policy.q_sample_table(torch.empty(0)).to(DEVICE)
        spec = policy.denoiser.spec
        return kernels.actor_runner(
            spec, rows, embedding, q_sample, policy.max_action, policy.predict_epsilon, precision
        )

    def tensors(self) -> list[Tensor]:
        """Parameters, states, actions, t, as the runner takes them."""
        given = (self.policy.denoiser.buffer, self.states, self.actions)
        return [*(x.to(DEVICE, torch.float32, copy=True) for x in given), self.t.to(DEVICE)]

    def run(self, kernels, chain: bool = True, precision: str = "fp32") -> dict[str, Tensor]:
        runner, (flat, *batch) = self.runner(kernels, precision), self.tensors()
        sampled, loss, saved = runner.forward(flat, *batch, BC_SEED, SEED if chain else None)
        weights = self.weights.to(DEVICE, torch.float32) if chain else None
        d_flat = runner.backward(flat, saved, batch[0], weights)
        layout = self.policy.denoiser.layout
        gradients = {f"d_{name}": view.clone() for name, view in layout.views(d_flat).items()}
        for view in layout.views(d_flat).values():
            view.zero_()
        assert not d_flat.any(), "where no parameter lies"
        return {"loss": loss, **({"sampled": sampled} if chain else {})} | gradients


def check(kernels, losses: Losses, chain: bool = True) -> None:
    got, want = losses.run(kernels, chain), losses.expected(chain)
    for name, tensor in got.items():
        assert_close(tensor, want[name], TOLERANCES["float32"], what=name, case=losses.case, backend=kernels.__name__)


@pytest.mark.parametrize("case", [case for case in DDPM if case.rows * case.H < 100_000], ids=str)
def test_losses_and_gradients(kernels, case):
    check(kernels, Losses(case))


@pytest.mark.parametrize("predict_epsilon", [True, False])
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("D", [16, 6])
def test_what_is_predicted_and_whether_there_is_a_chain(kernels, predict_epsilon, chain, D):
    check(kernels, Losses(replace(SMALL, predict_epsilon=predict_epsilon, time_dim=D)), chain)


@pytest.mark.parametrize("t", [0, 1, 2])
def test_each_timestep_has_its_own_row_of_the_table(kernels, t):
    losses = Losses(SMALL)
    losses.t.fill_(t)
    check(kernels, losses, chain=False)


@pytest.mark.parametrize("tiling", tilings("fp32"), ids=str)
def test_every_tiling(tiling, runs_here):
    """Several tiles of each kind, few clusters for them. The chain is what it is alone, to the bit."""
    kernels = registry()[runs_here("cuda")].kernels
    losses = Losses(replace(SMALL, B=75))
    with poisoned(), cuda_plan.forced(tiling):
        check(kernels, losses)
        runner, (flat, states, *batch) = losses.runner(kernels), losses.tensors()
        sampled, _, _ = runner.forward(flat, states, *batch, BC_SEED, SEED)
        alone = kernels.chain_runner(runner.spec, runner.table, runner.embedding, runner.max_action, "fp32")
        assert torch.equal(sampled, alone.forward(flat, states, 1, None, SEED, True)[0])


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision(kernels, precision):
    """The loss's own error is rounding's, as root mean square over the gradient of each parameter."""
    losses = Losses(replace(SMALL, predict_epsilon=False))
    got, want = losses.run(kernels, chain=False, precision=precision), losses.expected(chain=False)
    for name, tensor in got.items():
        error, size = ((x.double().cpu()).square().mean().sqrt() for x in (tensor.cpu() - want[name], want[name]))
        assert error <= TOLERANCES["bf16 in all"].rel * size, f"{name}: error {error:.2e} of {size:.2e}"


def test_no_solo_blocks_beside(monkeypatch, runs_here):
    """Which would be chosen for few rows in bf16 on a large GPU."""
    runs_here("cuda")
    spec = Losses(replace(SMALL, H=256)).policy.denoiser.spec
    for alone in (True, False):
        problem = cuda_plan.Problem(spec, "bf16", 8, 3, 1, True, alone=alone)
        assert any(t.solo for t in cuda_plan.possible(problem, 90, True)) == alone
    assert {t.m_tiles for t in cuda_plan.possible(problem, 90, True)} == {*HEIGHTS["bf16"]}


def test_seeds_in_memory_and_the_same_bits(kernels):
    """In a second backward pass, and into memory that is given."""
    losses = Losses(SMALL)
    runner, (flat, *batch) = losses.runner(kernels), losses.tensors()
    weights = losses.weights.to(DEVICE, torch.float32)
    sampled, loss, saved = runner.forward(flat, *batch, BC_SEED, SEED)
    d_flat = runner.backward(flat, saved, batch[0], weights)
    seeds = torch.tensor([BC_SEED - 2**64, 0, SEED, 0], device=DEVICE)
    again = runner.forward(flat, *batch, seeds[:1], seeds[2:3])
    assert torch.equal(again[0], sampled) and torch.equal(again[1], loss)
    for passed in (saved, again[2]):
        into = torch.full_like(flat, torch.nan)
        assert runner.backward(flat, passed, batch[0], weights, into=into) is into
        assert torch.equal(into, d_flat)


def test_no_gradient_of_the_chain(kernels):
    losses = Losses(SMALL)
    runner, (flat, *batch) = losses.runner(kernels), losses.tensors()
    saved = runner.forward(flat, *batch, BC_SEED, SEED)[2]
    got = losses.policy.denoiser.layout.views(runner.backward(flat, saved, batch[0], None))
    want = losses.expected(chain=False)
    for name, view in got.items():
        assert_close(view, want[f"d_{name}"], TOLERANCES["float32"], what=name)


def test_memory_that_kernels_would_leave(kernels):
    losses = Losses(replace(SMALL, B=3))
    runner, given = losses.runner(kernels), losses.tensors()
    for i, tensor in enumerate(given):
        for other in (tensor.reshape(-1)[:-1], tensor.double(), torch.stack([tensor, tensor], -1)[..., 0]):
            with pytest.raises(ValueError, match="in one piece on"):
                runner.forward(*(other if i == j else given[j] for j in range(4)), 1, 2)
    saved = runner.forward(*given, 1, 2)[2]
    short = torch.zeros(3, 2, device=DEVICE)
    for d_sampled, into in ((short, None), (torch.zeros(3, 3, device=DEVICE), short), (short.double(), None)):
        with pytest.raises(ValueError, match="in one piece on"):
            runner.backward(given[0], saved, given[1], d_sampled, into=into)
