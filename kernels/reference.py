"""The reverse-diffusion chain in plain torch, forward and backward, for any float dtype: the backend "eager".

    x = noise[0]                                                            # [R, A]
    for k in 0 .. K-1:
        eps = denoiser(x, t_k, s)
        x0  = clamp(a_k x - b_k eps, -max, +max)
        x   = c0_k x0 + cx_k x + cp_k x0_prev + s_k noise[k+1]              # s_{K-1} = 0
    action = clamp(x, -max, +max)

(Diffusion-QL, arXiv 2208.06193, eq. 1 and section 3; the table's columns are `layout.STEP_COLUMNS`.)

Three things make it fast without changing the mathematics, and every kernel does the same:
- the denoiser's first layer is split: W_s s once a state, W_t time_mlp(t) + b once a step (a table [K, H]), and only
  W_x x inside the loop; N candidates share their state's part;
- the backward pass walks the chain for the input gradients, keeps each layer's d_z, and takes all weight gradients of
  a layer as one product over K * R rows;
- on a CPU, Mish is computed from one sigmoid (`activation_fwd`): torch's own takes two thirds of a product's time.

Letters: B states, N candidates, R = B * N rows, S state size, A action size, H hidden width, K steps, D time size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .layout import DenoiserSpec, hidden_names

Tensor = torch.Tensor
Views = dict[str, Tensor]
StepRow = Sequence[float]

_SMALL = 4096  # elements below which a launch costs more than its arithmetic


def _split_mish(z: Tensor) -> bool:
    """Whether Mish is better computed by `_mish_parts` than by torch's own operator.

    On a CPU torch evaluates tanh(log1p(exp(z))) with library functions: 225 us for 256 x 256 elements, against 57 us
    this way (one EPYC core with AVX-512, torch 2.13). On a GPU, and for a few rows, one launch beats six.
    """
    return z.numel() >= _SMALL and z.device.type == "cpu"


def _mish_parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """(sigmoid(z), tanh(softplus(z))) = (s, s (2 - s) / (1 + (1 - s)^2)): free of cancellation for either sign."""
    s = torch.sigmoid(z)
    q = 1 - s
    w = torch.addcmul(s, s, q)
    w.div_(q.mul_(q).add_(1))
    return s, w


def activation_fwd(z: Tensor, kind: str, save: bool = False) -> tuple[Tensor, Tensor | None]:
    """Applies the activation.

    Args:
        z: pre-activations, any shape.
        kind: "mish", "relu" or "silu".
        save: also return what `activation_bwd` needs.

    Returns:
        (h, saved): `saved` is the derivative where that is cheap to have now, else z; None without `save`.
    """
    if kind == "mish":
        if not _split_mish(z):
            return F.mish(z), z if save else None
        s, w = _mish_parts(z)
        h = z * w
        if not save:
            return h, None
        slope = s.mul_(z).mul_(1 - w * w).add_(w)  # w + z s (1 - w^2); where w is near 1, the rest is near 0
        return h, slope
    if kind == "silu":
        return F.silu(z), z if save else None
    if kind == "relu":
        return F.relu(z), z if save else None
    raise ValueError(f"unknown activation {kind!r}; known: mish, relu, silu")


def activation_bwd(d_h: Tensor, saved: Tensor | None, kind: str) -> Tensor:
    """d_z from d_h and what `activation_fwd` saved."""
    assert saved is not None, "activation_fwd ran without save=True"
    if kind == "mish":
        return d_h * saved if _split_mish(saved) else torch.ops.aten.mish_backward(d_h, saved)
    if kind == "silu":
        return torch.ops.aten.silu_backward(d_h, saved)
    return d_h * (saved > 0)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [..., dim] of timesteps t [...]: [sin, cos] of t exp(-log(10000) i / (dim/2 - 1))."""
    half = dim // 2
    i = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[..., None] * torch.exp(i * -(math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass
class _TimeTable:
    """What the backward pass of `_time_table` needs."""

    table: Tensor  # [K, H]: W_t time_mlp(t_k) + b of the first layer
    embedding: Tensor  # [K, D]
    hidden: Tensor  # [K, 2D], after the activation
    saved: Tensor | None
    features: Tensor  # [K, D]: time_mlp's output


def _time_table(w: Views, embedding: Tensor, spec: DenoiserSpec, save: bool) -> _TimeTable:
    z = F.linear(embedding, w["time_mlp.1.weight"], w["time_mlp.1.bias"])
    hidden, saved = activation_fwd(z, spec.activation, save)
    features = F.linear(hidden, w["time_mlp.3.weight"], w["time_mlp.3.bias"])
    W_t = w["mid_layer.0.weight"][:, spec.action_dim : spec.action_dim + spec.time_dim]
    table = F.linear(features, W_t, w["mid_layer.0.bias"])
    return _TimeTable(table, embedding, hidden, saved, features)


def _time_table_bwd(w: Views, d_w: Views, time: _TimeTable, d_table: Tensor, spec: DenoiserSpec) -> None:
    """Writes the time path's gradients into the views `d_w`; d_table is [K, H]."""
    columns = slice(spec.action_dim, spec.action_dim + spec.time_dim)
    d_w["mid_layer.0.bias"].copy_(d_table.sum(0))
    d_w["mid_layer.0.weight"][:, columns] = d_table.t() @ time.features
    d_features = d_table @ w["mid_layer.0.weight"][:, columns]  # [K, D]
    _linear_bwd(d_w, "time_mlp.3", d_features, time.hidden)
    d_z = activation_bwd(d_features @ w["time_mlp.3.weight"], time.saved, spec.activation)  # [K, 2D]
    _linear_bwd(d_w, "time_mlp.1", d_z, time.embedding)


def _linear_bwd(d_w: Views, name: str, d_out: Tensor, inputs: Tensor) -> None:
    """Writes the gradients of one linear layer: d_out [n, out], inputs [n, in]."""
    torch.mm(d_out.t(), inputs, out=d_w[f"{name}.weight"])
    torch.sum(d_out, 0, out=d_w[f"{name}.bias"])


@dataclass
class ChainSaved:
    """What `chain_bwd` needs of a forward pass; one tensor a quantity, the step in front."""

    views: Views
    states: Tensor  # [B, S]
    x: Tensor  # [K, R, A]: the chain before each step
    activations: list[Tensor]  # num_hidden x [K, R, H]
    slopes: list[list[Tensor | None]]  # num_hidden x K x [R, H]: what activation_bwd takes
    inside: Tensor  # [K + 1, R, A]: where x0 (and, last, the action) was not clamped
    time: _TimeTable
    rows: Sequence[StepRow]
    candidates: int


def chain_fwd(
    w: Views,
    spec: DenoiserSpec,
    states: Tensor,
    noise: Tensor,
    rows: Sequence[StepRow],
    embedding: Tensor,
    max_action: float,
    save: bool = False,
) -> tuple[Tensor, ChainSaved | None]:
    """Runs the reverse chain.

    Args:
        w: the denoiser's parameters by name, e.g. `spec.layout.views(flat)`.
        spec: sizes of the denoiser.
        states: [B, S].
        noise: [K, R, A] with R = B * N; row b * N + n is candidate n of state b.
        rows: K rows (a, b, c0, cx, cp, s) of the step table.
        embedding: [K, D], `time_embedding` of the K timesteps.
        max_action: actions and predicted x0 are clamped to +-max_action.
        save: keep what `chain_bwd` needs.

    Returns:
        (actions [R, A], saved or None).
    """
    K, R, A = noise.shape
    B = states.shape[0]
    N = R // B
    W_0 = w["mid_layer.0.weight"]
    W_x = W_0[:, :A].t()
    state_part = F.linear(states, W_0[:, A + spec.time_dim :])  # [B, H]
    time = _time_table(w, embedding, spec, save)
    hidden = hidden_names(spec.num_hidden)
    layers = [(w[f"{name}.weight"], w[f"{name}.bias"]) for name in hidden[1:]]
    W_out, b_out = w["final_layer.weight"], w["final_layer.bias"]
    if save:
        xs = noise.new_empty(K, R, A)
        inside = torch.empty(K + 1, R, A, dtype=torch.bool, device=noise.device)
        activations = [noise.new_empty(K, R, spec.hidden_dim) for _ in hidden]
        slopes: list[list[Tensor | None]] = [[] for _ in hidden]

    # Scaled in one go: for a few rows, each operation fewer in the loop is a per cent of the whole.
    scaled_noise = torch._foreach_mul(noise[1:].unbind(), [row[5] for row in rows[:-1]]) if K > 1 else ()
    x = x0_previous = noise[0]  # the first row's cp is 0: x0_previous is not read there
    for k, (a, b, c0, cx, cp, s) in enumerate(rows):
        base = state_part + time.table[k]  # [B, H]
        if N == 1:
            z = torch.addmm(base, x, W_x)
        else:
            z = (x @ W_x).view(B, N, -1).add_(base[:, None]).view(R, -1)
        h, slope = activation_fwd(z, spec.activation, save)
        if save:
            xs[k], activations[0][k] = x, h
            slopes[0].append(slope)
        for i, (weight, bias) in enumerate(layers, start=1):
            h, slope = activation_fwd(F.linear(h, weight, bias), spec.activation, save)
            if save:
                activations[i][k] = h
                slopes[i].append(slope)
        eps = F.linear(h, W_out, b_out)  # [R, A]
        x0 = torch.sub(x * a if a != 1 else x, eps, alpha=b)
        if save:
            inside[k] = x0.abs() <= max_action
        x0 = x0.clamp_(-max_action, max_action)
        if s != 0:
            x = torch.add(scaled_noise[k], x, alpha=cx)
        else:  # no noise in the last step: the posterior variance is 0 there
            x = x * cx
        x.add_(x0, alpha=c0)
        if cp != 0:
            x.add_(x0_previous, alpha=cp)
        x0_previous = x0
    if not save:
        return x.clamp_(-max_action, max_action), None
    inside[K] = x.abs() <= max_action
    saved = ChainSaved(w, states, xs, activations, slopes, inside, time, rows, N)
    return x.clamp_(-max_action, max_action), saved


def chain_bwd(
    saved: ChainSaved, spec: DenoiserSpec, d_actions: Tensor, need_parameters: bool = True, need_states: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of `chain_fwd`.

    Args:
        saved: what `chain_fwd` returned.
        spec: sizes of the denoiser.
        d_actions: [R, A].
        need_parameters: compute d_flat.
        need_states: compute d_states.

    Returns:
        (d_flat [P], d_states [B, S]); None where not needed.
    """
    w = saved.views
    K, R, A = saved.x.shape
    B, N = saved.states.shape[0], saved.candidates
    H = spec.hidden_dim
    W_0 = w["mid_layer.0.weight"]
    hidden = hidden_names(spec.num_hidden)
    d_z = [saved.x.new_empty(K, R, H) for _ in hidden]
    d_eps = torch.empty_like(saved.x)

    d_x = d_actions * saved.inside[K]
    d_x0_carried: Tensor | None = None  # from the next step's cp * x0_prev
    for k in reversed(range(K)):
        a, b, c0, cx, cp, _ = saved.rows[k]
        d_x0 = d_x * c0
        if d_x0_carried is not None:
            d_x0 += d_x0_carried
        d_x0_carried = d_x * cp if cp != 0 else None
        d_raw = d_x0.mul_(saved.inside[k])
        torch.mul(d_raw, -b, out=d_eps[k])
        d_h = d_eps[k] @ w["final_layer.weight"]
        for i in reversed(range(len(hidden))):
            d_z[i][k] = activation_bwd(d_h, saved.slopes[i][k], spec.activation)
            if i:
                d_h = d_z[i][k] @ w[f"{hidden[i]}.weight"]
        if k:  # the gradient of x_T itself, the noise, is nobody's
            d_x = torch.add(d_x * cx, d_raw, alpha=a).addmm_(d_z[0][k], W_0[:, :A])

    # The state's part is shared by all steps and candidates: its gradient is the sum over both.
    d_state_part = d_z[0].sum(0).view(B, N, H).sum(1)  # [B, H]
    W_s = W_0[:, A + spec.time_dim :]
    d_states = d_state_part @ W_s if need_states else None
    if not need_parameters:
        return None, d_states

    d_flat = saved.x.new_zeros(spec.layout.size)
    d_w = spec.layout.views(d_flat)
    d_w["mid_layer.0.weight"][:, :A] = d_z[0].view(K * R, H).t() @ saved.x.view(K * R, A)
    d_w["mid_layer.0.weight"][:, A + spec.time_dim :] = d_state_part.t() @ saved.states
    _time_table_bwd(w, d_w, saved.time, d_z[0].sum(1), spec)
    for i in range(1, len(hidden)):
        _linear_bwd(d_w, hidden[i], d_z[i].view(K * R, H), saved.activations[i - 1].view(K * R, H))
    _linear_bwd(d_w, "final_layer", d_eps.view(K * R, A), saved.activations[-1].view(K * R, H))
    return d_flat, d_states
