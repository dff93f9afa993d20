"""The chain and its gradient in float64 with every operand of a product rounded as the backend "triton" rounds it.

    tf32: all operands to 10 bits of fraction, ties away from zero
    bf16: to bfloat16 in the hidden layers but the first, forward in the last one, backward into the first one's
          actions, and the slopes; to tf32 in every other product

Operands have names, of which any may be rounded in another way: a test tells by that what a kernel does.
"""

from collections.abc import Callable
from typing import Any

import torch

from dql.kernels.layout import hidden_names
from dql.kernels.reference import time_embedding
from support.cases import ACTIVATIONS, CLAMP_MARGIN, RELU_MARGIN, Problem

Tensor = torch.Tensor
Round = Callable[[Tensor], Tensor]
BITS = 11  # of a tf32 number: one before the point, ten behind it


def tf32(x: Tensor) -> Tensor:
    """To the nearest, ties away from zero."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(fraction * 2**BITS + 0.5 * fraction.sign()), exponent - BITS)


def truncated(x: Tensor) -> Tensor:
    """What tensor cores take of a float32 that nobody rounded."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(fraction * 2**BITS), exponent - BITS)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x)


def left_alone(x: Tensor) -> Tensor:
    return x


OPERANDS = (
    # forward
    "embedding", "time MLP's weights", "time MLP's h", "time features", "W_time", "states", "W_state", "x", "W_x",
    "hidden weights", "h", "W_out",
    # backward
    "d_eps", "W_out backward", "hidden weights backward", "d_z", "W_x backward", "d_z over steps",
    "d_z over steps and candidates", "W_state backward", "d_table", "d_features", "time MLP's d_z",
)  # fmt: skip
IN_BF16 = ("hidden weights", "h", "W_out", "hidden weights backward", "d_z", "W_x backward", "slope")


def roundings(precision: str, changed: dict[str, Round] | None = None) -> dict[str, Round]:
    """How each of OPERANDS, and "slope", is rounded; those of `changed` in another way."""
    rounds: dict[str, Round] = dict.fromkeys(OPERANDS, tf32) | {"slope": left_alone}
    return rounds | (dict.fromkeys(IN_BF16, bf16) if precision == "bf16" else {}) | (changed or {})


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, rounds: tuple[Round, ...], shared: int) -> Tensor:
        operand = rounds[0](h).repeat_interleave(shared, dim=0)
        ctx.save_for_backward(operand, weight)
        ctx.rounds, ctx.shared = rounds, shared
        return operand @ rounds[1](weight).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (d,), (operand, weight), (_, _, of_d, of_weight, of_sum) = gradients, ctx.saved_tensors, ctx.rounds
        d_h = of_sum(d.reshape(-1, ctx.shared, d.shape[1]).sum(dim=1)) @ of_weight(weight)
        return d_h, of_d(d).T @ operand, None, None


def product(
    h: Tensor,
    weight: Tensor,
    of_h: Round,
    of_weight: Round,
    of_d: Round,
    of_weight_back: Round,
    *,
    shared: int = 1,
    of_sum: Round | None = None,
) -> Tensor:
    """h @ weight^T [R, out], whose operands, forward and backward, are rounded like that.

    Each row of h serves `shared` rows, whose gradients are added up and rounded by `of_sum` before the product for d_h.
    """
    return _Product.apply(h, weight, (of_h, of_weight, of_d, of_weight_back, of_sum or of_d), shared)


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of_d: Round) -> Tensor:
        ctx.of_d = of_d
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.of_d(gradients[0]), None


def for_rows(x: Tensor, rows: int, of_d: Round) -> Tensor:
    """x [H] for every row; its gradient is the sum of rounded ones."""
    return _RoundedGradient.apply(x.expand(rows, -1), of_d)


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def activation(z: Tensor, kind: str, of_slope: Round) -> Tensor:
    """h = activation(z), whose slope is rounded."""
    with torch.enable_grad():
        alone = z.detach().requires_grad_(True)
        h = ACTIVATIONS[kind](alone)
        (slope,) = torch.autograd.grad(h.sum(), alone)
    return _Sloped.apply(z, h.detach(), of_slope(slope))


def rounded_chain(problem: Problem, rounds: dict[str, Round], distances: list[Tensor] | None = None) -> Tensor:
    """Actions, differentiable, in the shape of `problem.weights`; `distances` as `cases.plain_chain` takes it."""
    return rounded_losses(problem, rounds, distances, None)[0]


def rounded_losses(
    problem: Problem,
    rounds: dict[str, Round],
    distances: list[Tensor] | None,
    data: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """(the same actions, the noise-prediction loss of data: actions [B, A], timesteps [B] and noise [B, A], or 0).

    The chain is that of all T steps, whose table of times serves the loss too.
    """
    case, w = problem.case, dict(problem.policy.denoiser.named_parameters())
    R, D, of_d_z = case.rows, case.time_dim, rounds["d_z"]
    noise = problem.noise.reshape(case.K, R, case.A)

    def layer(h: Tensor, weight: Tensor, *names: str, **shared: Any) -> Tensor:
        return product(h, weight, *(rounds[name] for name in names), **shared)

    first, *hidden = hidden_names(case.num_hidden)
    W_x, W_time, W_state = w[f"{first}.weight"].split([case.A, D, case.S], dim=1)
    of_time = "time MLP's weights"
    embedding = time_embedding(torch.tensor(problem.table.timesteps, dtype=noise.dtype), D)  # [K, D]
    z = layer(embedding, w["time_mlp.1.weight"], "embedding", of_time, "time MLP's d_z", of_time)
    h = activation(z + w["time_mlp.1.bias"], case.activation, left_alone)  # [K, 2 D]
    features = layer(h, w["time_mlp.3.weight"], "time MLP's h", of_time, "d_features", of_time)
    features = features + w["time_mlp.3.bias"]  # [K, D]
    table = layer(features, W_time, "time features", "W_time", "d_table", "W_time") + w[f"{first}.bias"]  # [K, H]
    of_states = ("states", "W_state", "d_z over steps", "W_state backward")
    of_sum = rounds["d_z over steps and candidates"]
    state_part = layer(problem.states, W_state, *of_states, shared=case.N or 1, of_sum=of_sum)  # [R, H]

    def predicted(x: Tensor, of_time: Tensor) -> Tensor:
        """The denoiser's output for x [R, A] with the time's part [R, H] of its first layer."""
        z = layer(x, W_x, "x", "W_x", "d_z", "W_x backward") + of_time + state_part  # [R, H]
        for name in (*hidden, None):
            if distances is not None and case.activation == "relu":
                distances.append(z.detach().abs().amin(dim=1) / RELU_MARGIN)
            h = activation(z, case.activation, rounds["slope"])
            if name is not None:
                z = layer(h, w[f"{name}.weight"], "h", "hidden weights", "d_z", "hidden weights backward")
                z = z + for_rows(w[f"{name}.bias"], R, of_d_z)
        return layer(h, w["final_layer.weight"], "h", "W_out", "d_eps", "W_out backward") + w["final_layer.bias"]

    x, x0_previous = noise[0], torch.zeros_like(noise[0])
    for k, (a, b, c0, cx, cp, s) in enumerate(problem.table.rows):
        eps = predicted(x, for_rows(table[k], R, of_d_z))
        x0 = a * x - b * eps  # [R, A]
        if distances is not None:
            distances.append((x0.detach().abs() / case.max_action - 1).abs().amin(dim=1) / CLAMP_MARGIN)
        x0 = x0.clamp(-case.max_action, case.max_action)
        x = c0 * x0 + cx * x + cp * x0_previous
        if s:
            x = x + s * noise[k + 1]
        x0_previous = x0
    actions = x.clamp(-case.max_action, case.max_action).reshape(problem.weights.shape)
    if data is None:
        return actions, torch.zeros(())
    clean, t, eps = data
    own = predicted(problem.policy.q_sample(clean, t, eps), _RoundedGradient.apply(table[case.K - 1 - t], of_d_z))
    return actions, (own - (eps if case.predict_epsilon else clean)).square().mean()
