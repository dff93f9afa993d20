"""What is special to Triton of an update, in the interpreter: tiles, operands that are rounded, launches."""

import importlib.util
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.cases import TOLERANCES, Case, assert_all_close, clear_of_kinks, make_problem
from support.checks import check_rms
from support.gpu_agents import CONFIG, A, S, make_batch
from support.rounded_chain import left_alone, rounded_losses, roundings
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dql
from dql import noise
from dql.backend.base import timestep_embedding
from dql.backend.registry import registry
from dql.kernels import triton as kernels
from dql.sampler import run_chain

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from dql.kernels.triton.launch import Kernel
from dql.kernels.triton.tiles import Tile, forced

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
SEED, BC_SEED = (1 << 64) - 5, 11
SMALL = Case(B=37, S=3, A=3, K=3, H=24, num_hidden=2, max_action=3.0)  # with gaps between the parameters
LARGE = Case(B=17, S=3, A=40, K=2, H=200, num_hidden=2, max_action=3.0)  # W_x does not fit into registers


class Given:
    """A case's batch, and the weights of the sampled actions in a loss: 0 for rows near a kink of the chain."""

    def __init__(self, case: Case, precision: str) -> None:
        self.case, self.precision = case, precision
        generator = torch.Generator().manual_seed(3)
        self.actions = torch.rand(case.B, case.A, generator=generator) * 2 - 1
        self.t = torch.randint(case.K, (case.B,), generator=generator)
        distances: list[Tensor] = []
        with torch.no_grad():
            self.losses(distances)
        self.weights = clear_of_kinks(self.problem, distances, margins=10) / case.B

    def losses(self, distances: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(the sampled actions, the noise-prediction loss), in float64 with operands rounded as they are here."""
        case = self.case
        self.problem = make_problem(case, torch.float64)
        self.problem.noise = noise.normal(SEED, case.K, case.B, case.A, dtype=torch.float64)
        eps = noise.normal(BC_SEED, 1, case.B, case.A, dtype=torch.float64)[0]
        rounds = dict.fromkeys(roundings("bf16"), left_alone)
        if self.precision != "fp32":
            rounds = roundings(self.precision)
        return rounded_losses(self.problem, rounds, distances, (self.actions.double(), self.t, eps))

    def want(self) -> dict[str, Tensor]:
        sampled, loss = self.losses()
        names, parameters = zip(*self.problem.policy.denoiser.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss + (sampled * self.weights).sum(), parameters)
        named = {f"d_{name}": d for name, d in zip(names, gradients, strict=True)}
        return {"sampled": sampled.detach(), "loss": loss.detach()[None]} | named

    def runner(self):
        problem = make_problem(self.case, torch.float32)
        policy, table = problem.policy, problem.table
        rows = torch.tensor([(*row, 0.0, 0.0) for row in table.rows], dtype=torch.float32)
        embedding = timestep_embedding(table, self.case.time_dim, torch.float32, torch.device("cpu"))
        made = kernels.actor_runner(
            policy.denoiser.spec, rows, embedding, policy.q_sample_table(problem.states), self.case.max_action,
            self.case.predict_epsilon, self.precision,
        )  # fmt: skip
        return made, policy.denoiser.buffer, problem.states

    def got(self) -> dict[str, Tensor]:
        runner, flat, states = self.runner()
        sampled, loss, saved = runner.forward(flat, states, self.actions, self.t, BC_SEED, SEED)
        d_flat = runner.backward(flat, saved, states, self.weights.float())
        views = runner.spec.layout.views(d_flat)
        return {"sampled": sampled, "loss": loss} | {f"d_{name}": view for name, view in views.items()}


@pytest.mark.parametrize("predict_epsilon", [True, False])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_operands_are_rounded_once_each(precision, predict_epsilon):
    given = Given(replace(SMALL, predict_epsilon=predict_epsilon), precision)
    got = given.got()
    for name, target in given.want().items():
        kind = f"{precision} operands, gradient" if name.startswith("d_") else f"{precision} operands"
        check_rms(got[name], target, TOLERANCES[kind], f"{name} in {precision}")


@pytest.mark.parametrize("case", [SMALL, LARGE], ids=str)
def test_tiles(case):
    """Several of them, the last not full; of 16 and of 32 rows, which have a way of their own through the kernels."""
    given = Given(case, "fp32")
    want = given.want()
    for forward, backward in ((16, 16), (32, 16), (16, 32)):
        with forced(Tile(forward, 16, 2, 4), Tile(backward, 16, 2, 4)):
            assert_all_close(given.got(), want, TOLERANCES["float32"], case=f"{forward}, {backward}", backend="triton")


def test_the_chain_is_that_of_the_chain_runner():
    """To the bit: the same rows with the same noise."""
    given = Given(SMALL, "fp32")
    runner, flat, states = given.runner()
    chain = kernels.chain_runner(runner.spec, runner.table, runner.embedding, SMALL.max_action, "fp32")
    sampled = runner.forward(flat, states, given.actions, given.t, BC_SEED, SEED)[0]
    assert torch.equal(sampled, chain.forward(flat, states, 1, None, SEED, True)[0])


def test_the_loss_is_the_same_without_a_chain():
    """To the bit, and its gradient."""
    given, found = Given(SMALL, "fp32"), []
    runner, flat, states = given.runner()
    for seed in (SEED, None):
        sampled, loss, saved = runner.forward(flat, states, given.actions, given.t, BC_SEED, seed)
        assert sampled.shape == (0 if seed is None else SMALL.B, SMALL.A)
        found.append((loss, runner.backward(flat, saved, states, None)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="a gradient of sampled actions, and none were sampled"):
        runner.backward(flat, saved, states, given.weights.float())


@pytest.mark.parametrize("H", [24, 130])
def test_the_gradient_of_a_chain_is_zero_where_no_parameter_lies(H):
    """An optimizer of the whole buffer reads it there, and so does the gradient's norm."""
    problem = make_problem(replace(SMALL, H=H), torch.float32)
    denoiser = problem.policy.denoiser
    run_chain(problem.states, problem.policy, backend="triton", seed=1, at_once=True).sum().backward()
    gaps = denoiser.flat.grad.clone()
    assert gaps.any()
    for view in denoiser.layout.views(gaps).values():
        view.zero_()
    assert not gaps.any()


BC = dict.fromkeys(("prologue", "actor_fwd", "actor_bwd", "chain_products", "chain_finish", "squares", "adam"), 1)
QL = BC | {
    "prologue": 5, "chain_fwd": 1, "critic_fwd": 3, "critic_bwd": 2, "critic_products": 1, "critic_finish": 1,
    "squares": 2, "adam": 2, "critic_loss": 1, "q_loss": 1,
}  # fmt: skip


FREE = {"empty", "empty_like", "new_empty", "view", "slice", "unbind", "select", "detach"}  # launch nothing


class _Counted(TorchDispatchMode):
    """Counts our launches, and those of torch's operators that reach a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        launch = Kernel.launch

        def recorded(kernel: Kernel, *arguments: object) -> None:
            self.launches[kernel.name] += 1
            with _disable_current_modes():  # the interpreter's
                launch(kernel, *arguments)

        monkeypatch.setattr(Kernel, "launch", recorded)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) not in FREE:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cls", "launches", "operators"), [(dql.DiffusionQL, QL, {"add": 1}), (dql.DiffusionBC, BC, {})]
)
def test_launches_of_an_update(cls, launches, operators, monkeypatch):
    """23 of DiffusionQL, 7 of DiffusionBC, and one operator of torch; once the optimizers have their memory."""
    agent, batch = cls(S, A, dql.Config(**CONFIG, backend="triton")), make_batch(0)
    agent.update(batch)
    draws, backend = agent.draws(len(batch.states)), registry()["triton"]
    with _Counted(monkeypatch) as seen:
        agent.compute(batch, draws, backend)
    assert (seen.launches, seen.operators) == (launches, operators)
    beginning = kernels.update_ops().Beginning(
        [torch.empty_like(tensor) for tensor in vars(batch).values()], draws.t, torch.zeros(6).long(), torch.zeros(4), 3
    )
    seen.launches.clear()
    with seen:
        beginning.run(list(vars(batch).values()), None, (1, 2, 3, 4, 5), 1.0, 0.0)
    assert (seen.launches, seen.operators) == ({"begin": 1}, operators)


def test_every_mask_is_one(monkeypatch):
    """A comparison of scalars, spread over a block, is made of integers in the interpreter; that of Triton 3.9 loads
    and stores nothing by it, those before do."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: Counter[str] = Counter()
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        own = getattr(InterpreterBuilder, name)

        def looked_at(self, *arguments, own=own, place=place, name=name):
            seen[f"{name} {arguments[place].data.dtype}"] += 1
            return own(self, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, looked_at)
    batch = make_batch(0)
    for agent in (
        dql.DiffusionQL(S, A, dql.Config(**CONFIG, backend="triton")),
        dql.DiffusionBC(S, A, dql.Config(**CONFIG, backend="triton")),
    ):
        agent.update(batch)
        agent.act(batch.states, seed=1)
    assert set(seen) == {"create_masked_load bool", "create_masked_store bool"}
