"""Twin critics on a backend's kernels: the cases, what they must give by float64 torch, and the acting rule. On a GPU
where there is one, otherwise interpreted or emulated."""

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

import dql
from dql import noise as noise_stream
from support.cases import ACTIVATIONS, RELU_MARGIN, bf16_operands

Tensor = torch.Tensor
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = (0, 1)


@dataclass(frozen=True)
class Case:
    """Critics, and what they are asked; N None is one action a state."""

    B: int
    S: int
    A: int
    N: int | None = None
    H: int = 48
    num_hidden: int = 3
    activation: str = "mish"
    which: tuple[int, ...] = BOTH

    def __str__(self) -> str:
        size = f"B{self.B}-S{self.S}-A{self.A}-N{self.N}-H{self.H}x{self.num_hidden}"
        return f"{size}-{self.activation}-which{''.join(map(str, self.which))}"


CASES = [
    Case(B=1, S=3, A=1, H=16, num_hidden=2),
    Case(B=1, S=11, A=24, N=1),
    Case(B=1, S=70, A=3, N=50, H=256, num_hidden=2, activation="silu"),
    Case(B=37, S=3, A=3, H=16, num_hidden=4, activation="relu"),
    Case(B=37, S=11, A=1, N=3, which=(0,)),
    Case(B=37, S=11, A=3, N=50, num_hidden=2, which=(1,)),  # 1,850 rows: several images
    Case(B=37, S=70, A=24, H=256),
    Case(B=37, S=3, A=3, N=1, num_hidden=4, activation="silu", which=(1,)),
    Case(B=200, S=11, A=3, N=3, H=16, activation="relu", which=(0,)),
    Case(B=200, S=3, A=24, num_hidden=2, activation="silu"),
    Case(B=200, S=11, A=3, H=256, num_hidden=4, which=(0,)),
    Case(B=200, S=70, A=1, N=3, H=16),
    Case(B=3, S=3, A=3, H=272, num_hidden=2),  # padded to 512
]


@dataclass
class Problem:
    """Float64 numbers, each exact in float32."""

    critic: dql.TwinCritic
    states: Tensor  # [B, S]
    actions: Tensor  # [R, A]
    d_q: Tensor  # [len(which), R]: the loss is (q * d_q).sum()


def make_critic(case: Case, draw) -> dql.TwinCritic:
    critic = dql.TwinCritic(case.S, case.A, case.H, case.num_hidden, case.activation).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.25
            parameter.copy_((draw(*parameter.shape) * scale).float())
    return critic


def drawing(name: object):
    generator = torch.Generator().manual_seed(zlib.crc32(str(name).encode()))
    return lambda *shape: torch.randn(*shape, generator=generator).double()


def q_values(case: Case, problem: Problem, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """(q [len(which), R], each row's least distance to a zero before an activation [R]) as anyone would write it."""
    states = problem.states.repeat_interleave(case.N or 1, dim=0)  # [R, S]
    values, distances = [], []
    for i in case.which:
        first, *hidden, last = [m for m in getattr(problem.critic, f"q{i + 1}_model") if isinstance(m, torch.nn.Linear)]
        z = first(torch.cat([states, problem.actions], dim=1))  # [R, H]
        for layer in hidden:
            distances.append(z.abs().amin(dim=1))
            h = ACTIVATIONS[case.activation](z)
            z = bf16_operands(h, layer.weight, layer.bias) if precision == "bf16" else layer(h)
        distances.append(z.abs().amin(dim=1))
        values.append(last(ACTIVATIONS[case.activation](z)).squeeze(1))
    return torch.stack(values), torch.stack(distances).amin(dim=0)


@cache
def make_problem(case: Case) -> Problem:
    draw = drawing(case)
    R = case.B * (case.N or 1)
    problem = Problem(make_critic(case, draw), draw(case.B, case.S), draw(R, case.A), draw(len(case.which), R))
    if case.activation == "relu":  # at its zero the gradient jumps, and rounding decides on which side a row is
        clear = q_values(case, problem)[1].detach() > RELU_MARGIN
        assert clear.double().mean() > 0.5
        problem.d_q *= clear
    return problem


@cache
def expected(case: Case, precision: str = "fp32") -> dict[str, Tensor]:
    """`q`, `d_states`, `d_actions` and every `d_<parameter>`, by autograd."""
    problem = make_problem(case)
    problem.states.requires_grad_(True)
    problem.actions.requires_grad_(True)
    q, _ = q_values(case, problem, precision)
    names, parameters = zip(*problem.critic.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        (q * problem.d_q).sum(), [problem.states, problem.actions, *parameters], materialize_grads=True
    )
    named = dict(zip(("states", "actions", *names), gradients, strict=True))
    return {"q": q.detach()} | {f"d_{name}": d for name, d in named.items()}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch.empty makes is full of NaN: torch's own option, part of its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(x: Tensor) -> Tensor:
    return x.detach().float().to(DEVICE).contiguous()


class Run:
    """A case on the kernels: forward, and backward as often as one likes."""

    def __init__(self, kernels: ModuleType, case: Case, precision: str = "fp32") -> None:
        problem = make_problem(case)
        self.case, self.layout, self.candidates = case, problem.critic.layout, case.N or 1
        self.flat, self.states = on_device(problem.critic.buffer), on_device(problem.states)
        self.actions, self.d_q = on_device(problem.actions), on_device(problem.d_q)
        self.runner = kernels.critic_runner(problem.critic.spec, precision, DEVICE)
        self.q, self.saved = self.forward(save=True)

    def forward(self, save: bool):
        with poisoned():
            return self.runner.forward(self.flat, self.states, self.actions, self.candidates, self.case.which, save)

    def backward(self, *needs: bool) -> tuple[Tensor | None, ...]:
        with poisoned():
            return self.runner.backward(self.flat, self.saved, self.states, self.actions, self.d_q, *needs)

    def named(self) -> dict[str, Tensor]:
        """The tensors of `expected`; d_flat is zero where no parameter lies, or one of a critic that was not run."""
        d_flat, d_states, d_actions = self.backward(True, True, True)
        assert d_flat is not None and d_states is not None and d_actions is not None
        parameters = self.layout.views(d_flat)
        gaps = d_flat.clone()
        for view in self.layout.views(gaps).values():
            view.zero_()
        assert not gaps.any(), "d_flat is not zero in the gaps between parameters"
        for i in {0, 1} - set(self.case.which):
            assert not any(d.any() for name, d in parameters.items() if name.startswith(f"q{i + 1}_model"))
        return {"q": self.q, "d_states": d_states, "d_actions": d_actions} | {
            f"d_{name}": d for name, d in parameters.items()
        }


# The acting rule


def by_the_rule(q: Tensor, candidates: int, seed: int) -> tuple[Tensor, Tensor]:
    """(index [B], whether it is clear [B]) of q [2, R], in float64: the draw is not within rounding of a boundary."""
    cumulative = q.double().cpu().amin(dim=0).view(-1, candidates).softmax(dim=1).cumsum(dim=1)  # [B, N]
    draw = noise_stream.uniform(seed, len(cumulative))[:, None]
    index = (cumulative <= draw * cumulative[:, -1:]).sum(dim=1).clamp(max=candidates - 1)
    inner = (cumulative / cumulative[:, -1:] - draw)[:, :-1].abs()
    clear = (inner > 1e-5).all(dim=1) if candidates > 1 else torch.ones(len(cumulative), dtype=torch.bool)
    return index, clear


def chosen(kernels: ModuleType, q: Tensor, candidates: int, seed: int | Tensor, A: int = 3) -> Tensor:
    """The index of each state's chosen candidate, [B]; `choose` copies that candidate's action, exactly."""
    number = torch.arange(q.shape[1], dtype=torch.float32) % candidates
    actions = torch.stack([number, *[number + i + 0.5 for i in range(1, A)]], dim=1).to(DEVICE)  # [R, A]
    with poisoned():
        got = kernels.choose(q.float().to(DEVICE).contiguous(), actions, candidates, seed)
    rows = torch.arange(len(got), device=DEVICE) * candidates + got[:, 0].long()
    assert torch.equal(got, actions[rows]), "the chosen row is none of the state's candidates"
    return got[:, 0].long().cpu()
