"""A policy's whole reverse chain as one ONNX graph, the noise as an input: for whoever must deploy without torch.

    states [B, S], noise [K, B, A] -> actions [B, A]            (with N candidates [K, B, N, A] -> [B, N, A])

The graph is the loop of `dql.kernels.reference`, unrolled: the state part of the first layer once, the time table
[K, H] folded in float64 into constants, then K steps that share the weights. B is free; a runtime that specialises
graphs (OpenVINO) is faster once B is fixed, `model.reshape({"states": [B, S], "noise": [K, B, A]})`.
"""

import copy
import numbers
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from dql.checkpoint import write_atomically
from dql.kernels.limits import MAX_ROWS, lacking
from dql.networks import check_finite
from dql.sampler import checked_table
from dql.schedule import StepTable
from dql.shown import shown

if TYPE_CHECKING:
    import onnx

    from dql.policy import DiffusionPolicy

Tensor = torch.Tensor
OPSET, IR_VERSION = 18, 8  # of early 2023: what deployed runtimes read; nothing newer is needed
# fields of a denoiser that the graph has
_EXPORTED = frozenset({"state_dim", "action_dim", "hidden_dim", "num_hidden", "time_dim", "activation"})


def export_onnx(
    policy: "DiffusionPolicy",
    path: str | os.PathLike[str],
    *,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    num_candidates: int | None = None,
) -> None:
    """Writes the policy's reverse chain as one ONNX file, atomically; see `DiffusionPolicy.export_onnx`."""
    model = chain_model(policy, checked_table(policy, sampler, num_steps), num_candidates)
    write_atomically(path, model.SerializeToString())


def chain_model(policy: "DiffusionPolicy", table: StepTable, num_candidates: int | None = None) -> "onnx.ModelProto":
    """The ONNX model of the chain that `table` describes, checked by onnx's own checker.

    Args:
        policy: any dtype and device; the graph is float32.
        table: the K steps.
        num_candidates: N; None for noise and actions without that dimension.

    Raises:
        ModuleNotFoundError: the package onnx is missing; the sentence says what to install.
        ValueError: num_candidates is no positive integer, a parameter is not finite, or the graph lacks what the
            network has.
    """
    check_finite(policy.denoiser, "the policy")
    N = _candidates(num_candidates)
    if (lacks := lacking(policy.denoiser.spec, _EXPORTED)) is not None:
        raise ValueError(f"the exported graph lacks what this policy has: {lacks}; run it with dql.sample")
    try:
        import onnx
    except ImportError as error:
        raise ModuleNotFoundError(
            f'writing ONNX files needs the package onnx ({error}); install it with: pip install "diffusion-ql[export]"'
        ) from error
    rows: list[int | str] = ["B"] if N is None else ["B", N]
    S, A, K = policy.state_dim, policy.action_dim, table.num_steps
    graph = _Graph()
    with torch.no_grad():
        _add_chain(graph, policy, table, N)

    def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "reverse_diffusion",
            [value("states", ["B", S]), value("noise", [K, *rows, A])],
            [value("actions", [*rows, A])],
            list(graph.constants.values()),
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="dql",
    )
    model.doc_string = (
        "Diffusion-QL (arXiv 2208.06193): actions of states by reverse diffusion. noise holds independent standard "
        "normal numbers, drawn anew for every call."
    )
    onnx.helper.set_model_props(model, _metadata(policy, table, N))
    onnx.checker.check_model(model, full_check=True)
    return model


def _candidates(num_candidates: Any) -> int | None:
    if num_candidates is None:
        return None
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, numbers.Integral) or num_candidates < 1:
        raise ValueError(f"num_candidates must be a positive integer or None, got {shown(num_candidates)}")
    if int(num_candidates) > MAX_ROWS:
        raise ValueError(f"num_candidates must be up to {MAX_ROWS:,}, the rows of a call, got {shown(num_candidates)}")
    return int(num_candidates)


def _metadata(policy: "DiffusionPolicy", table: StepTable, N: int | None) -> dict[str, str]:
    from dql import __version__

    facts = {
        "state_dim": policy.state_dim,
        "action_dim": policy.action_dim,
        "max_action": policy.max_action,
        "sampler": table.sampler,
        "beta_schedule": policy.schedule.name,
        "T": policy.T,
        "K": table.num_steps,
        "dql_version": __version__,
    }
    return {name: str(fact) for name, fact in (facts | ({} if N is None else {"num_candidates": N})).items()}


class _Graph:
    """Nodes in order and constants by name; equal scalars are one constant."""

    def __init__(self) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Appends a node and gives the name of its output."""
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray | list[int] | int) -> str:
        """Floats become float32, integers int64."""
        if name not in self.constants:
            array = np.asarray(value)
            dtype = np.int64 if array.dtype.kind == "i" else np.float32
            self.constants[name] = self.onnx.numpy_helper.from_array(array.astype(dtype, order="C"), name)
        return name

    def scalar(self, value: float) -> str:
        return self.constant(f"scalar_{value!r}", np.array(value))

    def activation(self, z: str, kind: str) -> str:
        if kind == "relu":
            return self.op("Relu", z)
        if kind == "silu":
            return self.op("Mul", z, self.op("Sigmoid", z))
        # mish(z) = z / (1 + 2 / (u (u + 2))), u = exp(z): no cancellation, and where u is 0 or infinite it is z / inf
        # or z / 1. The operator Mish is to ONNX Runtime a function of Softplus and Tanh, of which Softplus is slow:
        # the whole chain takes 13.2 ms so and 2.6 ms this way (B = 256, H = 256, T = 5, one Zen 5 thread, version
        # 1.32), 112 and 85 us at B = 1; forms with Sigmoid or a clipped exponent take up to 5% more. OpenVINO 2026.4
        # takes 2.1 ms for either at a fixed B, but its own Mish crashes there for fewer than 16 rows.
        u = self.op("Exp", z)
        product = self.op("Mul", u, self.op("Add", u, self.scalar(2.0)))
        return self.op("Div", z, self.op("Add", self.op("Div", self.scalar(2.0), product), self.scalar(1.0)))

    def weighted_sum(self, terms: list[tuple[float, str]]) -> str:
        """Terms with weight 0 cost nothing, those with weight 1 no product."""
        parts = [self.op("Mul", term, self.scalar(weight)) if weight != 1 else term for weight, term in terms if weight]
        total = parts[0] if parts else self.op("Mul", terms[0][1], self.scalar(0.0))
        for part in parts[1:]:
            total = self.op("Add", total, part)
        return total


def _add_chain(graph: _Graph, policy: "DiffusionPolicy", table: StepTable, N: int | None) -> None:
    """Adds the nodes from `states` and `noise` to `actions`."""
    denoiser = copy.deepcopy(policy.denoiser).cpu().double()
    spec, w = denoiser.spec, denoiser.weights
    A, K = spec.action_dim, table.num_steps
    W_x, W_t, W_s = w["mid_layer.0.weight"].split([A, spec.time_dim, spec.state_dim], dim=1)
    timesteps = torch.tensor(table.timesteps, dtype=torch.float64)
    time_table = F.linear(denoiser.time_mlp(timesteps), W_t, w["mid_layer.0.bias"])  # [K, H]

    x_weight = graph.constant("x_weight", W_x.t())
    layers = [
        (graph.constant(f"layer_{i}_weight", w[f"mid_layer.{2 * i}.weight"].t()),
         graph.constant(f"layer_{i}_bias", w[f"mid_layer.{2 * i}.bias"]))
        for i in range(1, spec.num_hidden)
    ]  # fmt: skip
    final_weight = graph.constant("final_weight", w["final_layer.weight"].t())
    low, high = graph.scalar(-policy.max_action), graph.scalar(policy.max_action)
    state_part = graph.op("MatMul", "states", graph.constant("state_weight", W_s.t()))  # [B, H]

    # The noise is scaled in one go: for a few rows each node costs half a microsecond, whatever it computes.
    noise = "noise"
    if N is not None:
        noise = graph.op("Reshape", noise, graph.constant("noise_shape", [K, -1, A]))  # [K, R, A], R = B N
    scales = [1.0] + [row[5] for row in table.rows[:-1]]  # row k's s goes with noise[k + 1]
    scaled = noise
    if any(scale not in (0.0, 1.0) for scale in scales):
        scaled = graph.op("Mul", noise, graph.constant("noise_scales", np.array(scales)[:, None, None]))

    def noise_of(k: int) -> str:
        return graph.op("Gather", scaled, graph.constant(f"index_{k}", k), axis=0)  # [R, A]

    x, x0_previous = noise_of(0), ""
    for k, (a, b, c0, cx, cp, s) in enumerate(table.rows):
        base = graph.op("Add", state_part, graph.constant(f"time_{k}", time_table[k]))  # [B, H]
        if N is None:
            z = graph.op("Gemm", x, x_weight, base)  # [R, H]
        else:
            by_state = graph.constant("by_state", [-1, N, spec.hidden_dim])
            z = graph.op("Reshape", graph.op("MatMul", x, x_weight), by_state)  # [B, N, H]
            z = graph.op("Add", z, graph.op("Unsqueeze", base, graph.constant("axis", [1])))
            z = graph.op("Reshape", z, graph.constant("by_row", [-1, spec.hidden_dim]))
        h = graph.activation(z, spec.activation)
        for weight, bias in layers:
            h = graph.activation(graph.op("Gemm", h, weight, bias), spec.activation)
        # x0 = a x - b eps, with eps = h W + bias: the bias goes with the first term, b into the product's alpha.
        rest = graph.constant(f"final_bias_{k}", -b * w["final_layer.bias"])  # [A]
        if a != 0:
            rest = graph.op("Add", graph.weighted_sum([(a, x)]), rest)  # [R, A]
        x0 = graph.op("Clip", graph.op("Gemm", h, final_weight, rest, alpha=-b), low, high)
        x = graph.weighted_sum([(c0, x0), (cx, x), *([(cp, x0_previous)] if cp else [])])
        if s != 0:  # no noise in the last step: the posterior variance is 0 there
            x = graph.op("Add", x, noise_of(k + 1))
        x0_previous = x0
    if N is None:
        graph.op("Clip", x, low, high, output="actions")
    else:
        shape = graph.constant("actions_shape", [-1, N, A])
        graph.op("Reshape", graph.op("Clip", x, low, high), shape, output="actions")
