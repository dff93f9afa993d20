"""The one list of chains that every backend must run right, and the one table of how right.

A case is a chain with seeded random weights, states and noise, and a loss: the sum of its actions times fixed weights.
What it must give (actions, gradient of the states, gradient of every parameter) comes from `transcription`, in float64.

Letters: B states, N candidates, R = B * N rows, S state size, A action size, H hidden width, T trained steps, K steps.
"""

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

import dql
from dql.kernels.layout import hidden_names
from dql.kernels.reference import time_embedding
from support import transcription

Tensor = torch.Tensor
RELU_MARGIN = 1e-5  # of a pre-activation, some 50 times float32's error
CLAMP_MARGIN = 1e-3  # of x0 relative to max_action: its error is the network's times b, up to 155
ACTIVATIONS = {"mish": F.mish, "relu": torch.relu, "silu": F.silu}


@dataclass(frozen=True)
class Tolerance:
    """Errors up to `rel` times the tensor's largest magnitude, plus `abs`, pass."""

    rel: float
    abs: float
    why: str


TOLERANCES = {
    # name: largest error relative to the tensor's largest element, absolute error, why
    "schedule": Tolerance(1e-12, 1e-12, "float64 in another order; abar near 1 costs three digits of 1 - abar"),
    "noise": Tolerance(1e-15, 1e-14, "float64; two libraries' log, sin and cos may differ in the last bit"),
    "float64": Tolerance(1e-10, 0.0, "float64 in another order; measured 8e-14, and a wrong term is far above"),
    "float32": Tolerance(
        1e-4, 0.0, "the first step multiplies 6e-8 by a_0, 12.5 or (linear, T = 1000) 155; measured 2e-5"
    ),
    "float32 yardstick": Tolerance(
        5e-7, 0.0, "8 units in the last place, beside 4 times the error of plain float32 torch"
    ),
    "bf16": Tolerance(2e-2, 0.0, "a last bit of float32 may round an operand to the next bf16 number; measured 1.1e-2"),
    "bf16 on average": Tolerance(1e-3, 0.0, "... which few operands do: of the root mean square, measured 2e-4"),
    "bf16 flips": Tolerance(
        5e-3, 0.0, "root mean square; measured 1.2e-3, with the last layer's operands rounded too: more may flip"
    ),
    "bf16 gradient": Tolerance(
        4e-2, 0.0, "root mean square: 8 bits of every operand of the backward pass too; measured 1.6e-2"
    ),
    "bf16 in all": Tolerance(
        0.05, 0.0, "root mean square: 8 bits in every product of a hidden layer, times a_0; measured 1.3e-2"
    ),
    "tf32 operands": Tolerance(
        6e-4, 0.0, "root mean square; a last bit of float32 may round an operand otherwise; measured 1.9e-4"
    ),
    "tf32 operands, gradient": Tolerance(2.5e-3, 0.0, "... and in the backward pass; measured 8.6e-4"),
    "bf16 operands": Tolerance(
        5e-3, 0.0, "root mean square; a last bit of float32 may round an operand otherwise; measured 1.5e-3"
    ),
    "bf16 operands, gradient": Tolerance(1.2e-2, 0.0, "... and in the backward pass; measured 4.2e-3"),
    "critic float32": Tolerance(1e-5, 1e-6, "float32, one pass through a network and back; measured 7e-7"),
    "rows": Tolerance(1e-5, 0.0, "float32; a matrix product sums in another order for another number of rows"),
    "sums": Tolerance(1e-5, 0.0, "float32; as many parts, as many orders of a sum over rows, which may cancel"),
    "agent float64": Tolerance(1e-10, 1e-13, "the issue's bound, over ten updates"),
    "agent float32": Tolerance(
        1e-4, 1e-6, "float32; ten Adam steps, of which each may turn a gradient of rounding size"
    ),
}


@dataclass(frozen=True)
class Case:
    """One chain. `T` None trains as many steps as are run; `N` None asks for [B, A] and not for [B, N, A]."""

    B: int
    S: int
    A: int
    K: int
    N: int | None = None
    H: int = 48
    num_hidden: int = 3
    activation: str = "mish"
    sampler: str = "ddpm"
    stochasticity: float = 0.0
    T: int | None = None
    beta_schedule: str = "vp"
    max_action: float = 1.0
    predict_epsilon: bool = True
    time_dim: int = 16

    def __str__(self) -> str:
        steps = f"K{self.K}" if self.T is None else f"K{self.K}of{self.T}"
        parts = [
            f"B{self.B}",
            f"S{self.S}",
            f"A{self.A}",
            steps,
            f"H{self.H}x{self.num_hidden}",
            self.activation,
        ]
        parts.append(self.sampler + (f"{self.stochasticity:g}" if self.stochasticity else ""))
        parts += [self.beta_schedule, f"max{self.max_action:g}"]
        parts += [f"N{self.N}"] if self.N is not None else []
        parts += [] if self.predict_epsilon else ["x0"]
        parts += [f"D{self.time_dim}"] if self.time_dim != 16 else []
        return "-".join(parts)

    @property
    def rows(self) -> int:
        return self.B * (self.N or 1)

    @property
    def splits_mish(self) -> bool:
        """Whether a hidden layer is large enough that the CPU computes Mish from one sigmoid."""
        return self.activation == "mish" and self.rows * self.H >= 4096


SIZES = [  # the ugly ones, each at least twice, and every K
    Case(B=1, S=3, A=1, K=1, H=16, num_hidden=2, max_action=20.0),
    Case(B=1, S=3, A=3, K=2, H=16, max_action=3.0),
    Case(B=1, S=11, A=24, K=5, H=256),
    Case(B=37, S=3, A=3, K=5, H=48, num_hidden=4),
    Case(B=37, S=11, A=1, K=15, H=48, num_hidden=2, max_action=0.3),
    Case(B=37, S=3, A=24, K=1, H=16, num_hidden=3),
    Case(B=37, S=11, A=3, K=2, H=256, max_action=2.5),  # 9,472 elements a layer: the split Mish
    Case(B=1000, S=3, A=3, K=5, H=16),
    Case(B=1000, S=11, A=24, K=2, H=48, num_hidden=4, max_action=10.0),
    Case(B=1000, S=11, A=3, K=2, H=256, max_action=2.5),
]
KINDS = [
    # schedules
    Case(B=37, S=3, A=3, K=5, beta_schedule="linear", max_action=3.0),
    Case(B=37, S=3, A=3, K=5, beta_schedule="cosine", max_action=3.0),
    # activations
    Case(B=37, S=11, A=3, K=5, activation="relu"),
    Case(B=37, S=11, A=3, K=5, activation="silu", max_action=2.5),
    Case(B=37, S=3, A=3, K=2, H=256, num_hidden=4, activation="silu"),
    Case(B=1, S=3, A=24, K=15, H=16, num_hidden=2, activation="relu", max_action=3.0),
    # samplers, all and some of the steps
    Case(B=37, S=3, A=3, K=5, T=15),
    Case(B=37, S=3, A=3, K=15, T=50, beta_schedule="linear"),
    Case(B=37, S=3, A=3, K=5, sampler="ddim", max_action=3.0),
    Case(B=37, S=11, A=3, K=5, T=50, sampler="ddim", stochasticity=0.5),
    Case(B=37, S=3, A=1, K=15, sampler="ddim", stochasticity=1.0, activation="silu"),
    Case(B=1, S=3, A=3, K=1, T=5, sampler="ddim", H=16, max_action=20.0),
    Case(B=37, S=3, A=3, K=5, sampler="dpm-solver++", max_action=3.0),
    Case(B=37, S=11, A=3, K=15, T=50, sampler="dpm-solver++", H=16),
    Case(B=1, S=3, A=24, K=2, sampler="dpm-solver++", H=16),
    Case(B=37, S=3, A=3, K=5, T=1000, sampler="dpm-solver++", beta_schedule="linear", activation="relu"),
    # candidates
    Case(B=1, S=11, A=3, K=5, N=50, H=256),
    Case(B=37, S=11, A=3, K=5, N=3, H=48, max_action=2.5),
    Case(B=37, S=3, A=24, K=2, N=50, H=16, num_hidden=2, sampler="dpm-solver++"),
    Case(B=1, S=3, A=1, K=15, N=3, H=16, sampler="ddim", stochasticity=0.5, max_action=3.0),
    Case(B=37, S=3, A=3, K=5, N=1, H=16, num_hidden=4, activation="relu"),
    # a denoiser that predicts x0
    Case(B=37, S=3, A=3, K=5, predict_epsilon=False, max_action=0.7),
    Case(B=37, S=11, A=3, K=5, N=3, sampler="dpm-solver++", predict_epsilon=False),
]
CASES = SIZES + KINDS
EAGER_ALONE = [  # what no other backend takes, yet or ever
    Case(B=5, S=3, A=3, K=3, H=16, num_hidden=1),
    Case(B=3, S=520, A=66, K=2, N=2, H=520, num_hidden=5, time_dim=66, max_action=2.5),
]


@dataclass
class Problem:
    """What a case stands for, in one dtype. Every value is exact in float32, so all dtypes have the same problem."""

    case: Case
    policy: dql.DiffusionPolicy
    states: Tensor  # [B, S]
    noise: Tensor  # [K, B, A], or [K, B, N, A]
    table: dql.StepTable
    weights: Tensor  # [B, A] or [B, N, A]: the loss is (actions * weights).sum()


def make_table(case: Case, schedule: dql.NoiseSchedule) -> dql.StepTable:
    if case.sampler == "ddim":
        return dql.StepTable.ddim(
            schedule, case.K, stochasticity=case.stochasticity, predict_epsilon=case.predict_epsilon
        )
    return dql.StepTable.make(case.sampler, schedule, case.K, predict_epsilon=case.predict_epsilon)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """The case's policy and inputs, the same numbers in every dtype, fresh each time."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    policy = dql.DiffusionPolicy(
        case.S,
        case.A,
        case.max_action,
        case.H,
        case.num_hidden,
        case.T or case.K,
        case.beta_schedule,
        case.time_dim,
        activation=case.activation,
        predict_epsilon=case.predict_epsilon,
    ).to(dtype)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            # wider than torch's default, under which the denoiser says nearly nothing and every x0 is clamped
            scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.25
            parameter.copy_((draw(*parameter.shape).float() * scale).to(dtype))
    states = draw(case.B, case.S)
    rows = (case.B,) if case.N is None else (case.B, case.N)
    noise = draw(case.K, *rows, case.A)
    weights = draw(*rows, case.A)
    return Problem(case, policy, states, noise, make_table(case, policy.schedule), weights)


@contextlib.contextmanager
def variant(case: Case) -> Iterator[None]:
    """The transcription knows the paper's denoiser alone; for other cases its two defining functions are exchanged."""
    mish, predict_x0 = transcription.mish, transcription.predict_x0

    def clamped_output(params, schedule, x, t, states, max_action):  # type: ignore[no-untyped-def]
        output = transcription.denoiser(params, x, torch.full((x.shape[0],), t), states)
        return torch.clamp(output, -max_action, max_action)

    try:
        transcription.mish = ACTIVATIONS[case.activation] if case.activation != "mish" else mish
        transcription.predict_x0 = predict_x0 if case.predict_epsilon else clamped_output
        yield
    finally:
        transcription.mish, transcription.predict_x0 = mish, predict_x0


@cache
def expected(case: Case) -> dict[str, Tensor]:
    """`actions`, `d_states` and `d_<parameter>` by the transcription and autograd, float64."""
    problem = make_problem(case, torch.float64)
    N = case.N or 1
    params = {k: v.detach().clone().requires_grad_(True) for k, v in problem.policy.denoiser.state_dict().items()}
    states = problem.states.clone().requires_grad_(True)
    schedule = transcription.make_schedule(case.beta_schedule, case.T or case.K)
    timesteps = transcription.spaced_timesteps(schedule.T, case.K)
    noise = problem.noise.reshape(case.K, case.rows, case.A)
    chain = transcription.CHAINS[case.sampler]
    extra = (case.stochasticity,) if case.sampler == "ddim" else ()
    with variant(case):
        repeated = states.repeat_interleave(N, dim=0)  # [R, S]
        actions = chain(params, schedule, repeated, noise, case.max_action, timesteps, *extra)  # [R, A]
        loss = (actions * loss_weights(case).reshape(case.rows, case.A)).sum()
        d_states, *d_params = torch.autograd.grad(loss, [states, *params.values()], materialize_grads=True)
    result = {"actions": actions.detach().reshape(problem.noise.shape[1:]), "d_states": d_states}
    return result | {f"d_{name}": d for name, d in zip(params, d_params, strict=True)}


@cache
def loss_weights(case: Case) -> Tensor:
    """The loss's weights, float64, zero for rows that come within rounding of a kink.

    At a clamp's bound and at a ReLU's zero the gradient jumps, and rounding alone decides on which side a row is.
    """
    problem = make_problem(case, torch.float64)
    distances: list[Tensor] = []
    with torch.no_grad():
        plain_chain(problem, distances)
    clear = torch.stack(distances).amin(dim=0) > 1  # [R]
    assert clear.double().mean() > 0.5, f"{case}: too few rows are clear of kinks"
    return problem.weights * clear.reshape(problem.weights.shape[:-1])[..., None]


def bf16_operands(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer whose operands are rounded to bf16; its gradient is that of the layer without rounding."""
    z = F.linear(h, weight, bias)
    return z + (F.linear(h.bfloat16().to(h), weight.bfloat16().to(h), bias) - z).detach()


def plain_chain(problem: Problem, distances: list[Tensor] | None = None, precision: str = "fp32") -> Tensor:
    """The chain as anyone would write it for autograd, in the problem's dtype: the yardstick of float32's rounding.

    Args:
        problem: what to run.
        distances: if given, is filled with each row's distance to the kinks, in units of their margins, [R] each.
        precision: "bf16" for bf16 operands in the hidden layers but the first, as "cpp" and "cuda" have them.

    Returns:
        actions, in the shape of `problem.weights`.
    """
    case, w = problem.case, dict(problem.policy.denoiser.named_parameters())
    activation = ACTIVATIONS[case.activation]
    noise = problem.noise.reshape(case.K, case.rows, case.A)
    states = problem.states.repeat_interleave(case.N or 1, dim=0)  # [R, S]

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    x, x0_previous = noise[0], torch.zeros_like(noise[0])
    for k, (a, b, c0, cx, cp, s) in enumerate(problem.table.rows):
        t = torch.full((case.rows,), problem.table.timesteps[k], dtype=noise.dtype)  # [R]
        features = linear("time_mlp.3", activation(linear("time_mlp.1", time_embedding(t, case.time_dim))))  # [R, D]
        h = torch.cat([x, features, states], dim=1)
        for i, name in enumerate(hidden_names(case.num_hidden)):
            if i and precision == "bf16":
                z = bf16_operands(h, w[f"{name}.weight"], w[f"{name}.bias"])
            else:
                z = linear(name, h)  # [R, H]
            if distances is not None and case.activation == "relu":
                distances.append(z.abs().amin(dim=1) / RELU_MARGIN)
            h = activation(z)
        x0 = a * x - b * linear("final_layer", h)  # [R, A]
        if distances is not None:
            distances.append((x0.abs() / case.max_action - 1).abs().amin(dim=1) / CLAMP_MARGIN)
        x0 = x0.clamp(-case.max_action, case.max_action)
        x = c0 * x0 + cx * x + cp * x0_previous
        if s:
            x = x + s * noise[k + 1]
        x0_previous = x0
    return x.clamp(-case.max_action, case.max_action).reshape(problem.weights.shape)


def clear_of_kinks(problem: Problem, distances: list[Tensor], margins: float = 1) -> Tensor:
    """The problem's weights, zero for rows nearer to a kink than that many margins; see `loss_weights`."""
    clear = torch.stack(distances).amin(dim=0) > margins  # [R]
    return problem.weights * clear.reshape(problem.weights.shape[:-1])[..., None]


def named_gradients(
    problem: Problem, actions: Tensor, states: Tensor, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """`actions` with `d_states` and `d_<parameter>` of the case's loss, or of (actions * weights).sum()."""
    weights = (loss_weights(problem.case) if weights is None else weights).to(actions)
    names, parameters = zip(*problem.policy.denoiser.named_parameters(), strict=True)
    d_states, *d_parameters = torch.autograd.grad(
        (actions * weights).sum(), [states, *parameters], materialize_grads=True
    )
    gradients = {f"d_{name}": d for name, d in zip(names, d_parameters, strict=True)}
    return {"actions": actions.detach(), "d_states": d_states} | gradients


@cache
def plain(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors as `expected`, by `plain_chain`."""
    problem = make_problem(case, dtype)
    problem.states.requires_grad_(True)
    return named_gradients(problem, plain_chain(problem), problem.states)


def run(case: Case, backend: str, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> dict[str, Tensor]:
    """The same tensors as `expected`, by `dql.sample(backend=...)`."""
    return run_problem(make_problem(case, dtype), backend, precision=precision)


def run_problem(
    problem: Problem, backend: str, weights: Tensor | None = None, precision: str = "fp32"
) -> dict[str, Tensor]:
    """`run` for a problem that was made, with the case's loss or these weights."""
    case = problem.case
    problem.states.requires_grad_(True)
    actions = dql.sample(
        problem.states,
        problem.policy,
        backend=backend,
        num_candidates=case.N,
        noise=problem.noise,
        sampler=problem.table,
        precision=precision,
    )
    return named_gradients(problem, actions, problem.states, weights)


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of `want`; infinite for NaN."""
    difference = (got.double() - want.double()).abs().nan_to_num(torch.inf)
    if difference.numel() == 0 or not difference.any():
        return 0.0
    return float(difference.amax() / want.double().abs().amax())


def assert_close(
    got: Tensor, want: Tensor, tolerance: Tolerance, *, what: str, case: object = "", backend: str = ""
) -> None:
    """Fails with the tensor, the backend, the case, how many elements, the worst one and its error ratio."""
    where = f"{what}{f' of backend {backend}' if backend else ''}{f' in case {case}' if str(case) else ''}"
    assert got.shape == want.shape, f"{where}: shape {list(got.shape)}, expected {list(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert want.isfinite().all(), f"{where}: the expected values are not finite"
    allowed = tolerance.rel * float(want.abs().amax()) + tolerance.abs
    difference = (got - want).abs().nan_to_num(torch.inf)
    bad = difference > allowed
    if bad.any():
        worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        ratio = float(difference[worst]) / allowed if allowed else torch.inf
        raise AssertionError(
            f"{where}: {int(bad.sum())} of {bad.numel()} elements differ; worst at {list(worst)}: got "
            f"{float(got[worst])!r}, expected {float(want[worst])!r}, error ratio {ratio:.3g} (allowed {allowed:.3g}: "
            f"{tolerance.why})"
        )


def assert_all_close(
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    tolerance: Tolerance,
    *,
    case: object = "",
    backend: str = "",
) -> None:
    """`assert_close` for every tensor of `want`, all of which `got` must have."""
    assert got.keys() == want.keys(), f"tensors {sorted(got.keys() ^ want.keys())} are in one of both alone"
    for name in want:
        assert_close(got[name], want[name], tolerance, what=name, case=case, backend=backend)
