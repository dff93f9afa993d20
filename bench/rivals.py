"""What the benches run dql against, and the check that both compute the same.

- `published`: `published.PublishedActor` and `PublishedAgent`, in eager torch;
- `compile-published`: its chain under torch.compile, forward;
- `compile-lean`: `LeanActor`, what a careful user would write and compile, without a backward of his own; likewise
  `lean.lean_select` and `lean.LeanAgent`, whose `update` has our only compiled rival, on a CPU;
- `jax`: the same computations as one would write them for `jax.jit`, and their gradients (`lean_jax.py`);
- `onnxruntime`, `openvino`: our policy's chain, exported by `policy.export_onnx`, in float32, one session for every B,
  inputs and outputs in buffers bound once;
- `openvino-static`: the same compiled anew for each B, which OpenVINO rewards;
- `openvino-static-bf16`: that in bf16, where the CPU multiplies it: the rival of ours in bf16;
- `onnxruntime-mish-op`, for information: the same graph with ONNX's operator Mish, as a plain exporter writes it.

On a GPU torch.compile runs with CUDA graphs: eager torch is no rival there. The runtimes and JAX are rivals on a CPU.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from published import TIME_DIM, PublishedActor, PublishedAgent, TimeEmbedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dql
from dql.backend.registry import of_gpus
from dql.kernels.cpp import binding

S, A, H, T = 17, 6, 256, 5  # a MuJoCo walker with the paper's network
COMPILED = ("compile-published", "compile-lean")
JAX = "jax"
EXPORTED = ("onnxruntime", "openvino", "openvino-static")
OPENVINO_BF16 = "openvino-static-bf16"
MISH_OP = "onnxruntime-mish-op"
FLOPS = 2 * T * ((A + TIME_DIM + S) * H + 2 * H * H + H * A)  # an action's, if every step ran the whole network
# Of float32 against float32, relative to a tensor's largest element (actions) or to its norm (gradients): the bound of
# the tests' float32 line. Measured 2e-6 at most; another sine or another order of a sum costs a few times that.
ACTION_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
BF16_ACTION_TOLERANCE = 3e-2  # operands have 8 bits, 4e-3, of which five steps of four layers make a few times as much
TF32_ACTION_TOLERANCE = 5e-3  # operands have 11 bits, an eighth of bf16's error
HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names
TOLERANCES = {"fp32": ACTION_TOLERANCE, "tf32": TF32_ACTION_TOLERANCE, "bf16": BF16_ACTION_TOLERANCE}
CLAMP_MARGIN = 1e-3  # of a predicted x0 relative to max_action: nearer, rounding decides which side has a gradient


class LeanActor(nn.Module):
    """The published actor's chain in lean torch, sharing its parameters: the first layer split, the steps unrolled."""

    def __init__(self, actor: PublishedActor) -> None:
        super().__init__()
        self.model = actor.model
        device = actor.betas.device
        table = dql.StepTable.ddpm(dql.NoiseSchedule("vp", T))
        self.rows = table.rows
        timesteps = torch.tensor(table.timesteps, device=device, dtype=torch.float32)
        self.register_buffer("embedding", TimeEmbedding()(timesteps))  # [T, 16]

    def chain(self, states: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(actions [B, A], each step's x0 [B, A] before its clamp) of states [B, S] and noise [T, B, A]."""
        layers, final = self.model.mid_layer, self.model.final_layer
        W_x, W_t, W_s = layers[0].weight.split([A, TIME_DIM, S], dim=1)
        state_part = F.linear(states, W_s)  # [B, H]
        time_part = F.linear(self.model.time_mlp[1:](self.embedding), W_t, layers[0].bias)  # [T, H]
        x, predictions = noise[0], []
        for k, (a, b, c0, cx, _, s) in enumerate(self.rows):
            eps = final(layers[1:](F.linear(x, W_x) + (state_part + time_part[k])))  # [B, A]
            predictions.append(a * x - b * eps)
            x = c0 * predictions[-1].clamp(-1, 1) + cx * x
            if s != 0:
                x = x + s * noise[k + 1]
        return x.clamp(-1, 1), predictions

    def forward(self, states: Tensor, noise: Tensor) -> Tensor:
        return self.chain(states, noise)[0]


@lru_cache(maxsize=1)
def no_compiler(device: torch.device) -> str | None:
    """None if torch.compile works here, else why not: one small function is compiled to find out."""
    compilers = [os.environ[v] for v in ("CXX",) if v in os.environ] or ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return f"torch.compile needs a C++ compiler on a CPU, and there is none ({', '.join(compilers)}); install g++"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))
    except Exception as error:  # whatever a half-installed toolchain raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile does not work here: {reason[0]}"
    return None


def not_compiled(device: torch.device, short: bool) -> str | None:
    """None if the compiled `select` and `update` (`lean.py`) are to be timed, else why not."""
    if short:
        return "it takes longer to compile than all the others to time; leave out --short"
    if device.type != "cpu":
        return f"it is compared on a CPU, this is {device}; bench_gpu.py has compiled rivals of its own"
    return no_compiler(device)


def no_jax(device: torch.device, short: bool) -> str | None:
    """None if JAX is here and a rival on this device, else why not."""
    if short:
        return "its updates take longer to compile than all the others to time; leave out --short"
    if device.type != "cpu":
        return f"{JAX} is compared on a CPU, this is {device}"
    if importlib.util.find_spec("jax") is None:
        return f'{JAX} is not installed: pip install -e ".[bench]"'
    return None


@lru_cache(maxsize=1)
def published_actor(device: torch.device) -> PublishedActor:
    """The weights that every contender of the sampling benches shares."""
    torch.manual_seed(0)
    return PublishedActor(S, A, 1.0, H, T, "vp").to(device)


@lru_cache(maxsize=2)
def compiled(contender: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(states [B, S], noise [T, B, A]) -> actions [B, A] under torch.compile.

    On a CPU one graph with a symbolic B serves all B > 1 (as fast as one a size, tried), which bounds the time spent
    compiling; CUDA graphs need fixed shapes.
    """
    actor = published_actor(device)
    chain: Any = actor.sample if contender == "compile-published" else LeanActor(actor)
    if device.type == "cuda":
        return torch.compile(chain, dynamic=False, mode="reduce-overhead")
    return torch.compile(chain, dynamic=True)


@lru_cache(maxsize=1)
def compiled_alone(B: int, precision: str, differentiable: bool, device: torch.device) -> Callable[..., Tensor]:
    """(states [B, S], noise [T, B, A]) -> actions [B, A], compiled for one B, to be captured in a CUDA graph by hand.

    Those before are dropped: past eight of one function torch runs it uncompiled, without a word. bf16 is autocast.
    """
    torch.compiler.reset()
    chain = LeanActor(published_actor(device))

    def run(states: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return chain(states, noise)

    return torch.compile(run, dynamic=False, fullgraph=True)


def backend_of(contender: str) -> tuple[str, str]:
    """(backend, precision) of a contender "dql-<backend>" or "dql-<backend>-<precision>"."""
    backend, _, precision = contender.removeprefix("dql-").partition("-")
    return backend, precision or "fp32"


def precision_of(contender: str) -> str:
    """fp32, tf32 or bf16."""
    if contender.startswith("dql-"):
        return backend_of(contender)[1]
    return "bf16" if contender.removesuffix("+graph").endswith("-bf16") else "fp32"


def contenders() -> list[str]:
    """Ours: every backend in float32, tf32 and bf16 on a GPU, and bf16 where this CPU multiplies it."""
    names = [f"dql-{name}" for name in dql.backends()]
    for backend in of_gpus():
        if dql.backends()[backend] is None:
            names += [f"dql-{backend}-tf32", f"dql-{backend}-bf16"]
    return names + (["dql-cpp-bf16"] if binding.unavailable() is None and binding.has_bf16() else [])


def problem(B: int, device: torch.device, margin: float = CLAMP_MARGIN) -> tuple[Tensor, Tensor, Tensor]:
    """States [B, S], noise [T, B, A], and the weights [B, A] of the loss.

    No row has an x0 within `margin` of a clamp, where rounding decides on its gradient. For bf16's margin five rows of
    six are drawn for nothing; were they given weights of 0 instead, a problem of one row would compare nothing.
    """
    generator = torch.Generator().manual_seed(B)
    chain, drawn, clear = LeanActor(published_actor(device)).chain, max(B, 64), 0
    kept: list[tuple[Tensor, Tensor]] = []
    while clear < B:
        states = torch.randn(drawn, S, generator=generator).to(device)
        noise = torch.randn(T, drawn, A, generator=generator).to(device)
        with torch.no_grad():
            _, predictions = chain(states, noise)
        distance = (torch.stack(predictions).abs() - 1).abs().amin(dim=(0, 2))  # [drawn]
        kept.append((states[distance > margin], noise[:, distance > margin]))
        clear += len(kept[-1][0])
    states, noise = (torch.cat(parts, dim=dim) for dim, parts in enumerate(zip(*kept, strict=True)))
    weights = torch.randn(B, A, generator=generator).to(device)
    return states[:B].contiguous(), noise[:, :B].contiguous(), weights


def no_runtime(contender: str, device: torch.device) -> str | None:
    """None if the contender's runtime is here and a rival on this device, else why not."""
    if device.type != "cpu":
        return f"{contender} is compared on a CPU, this is {device}"
    missing = [name for name in ("onnx", contender.partition("-")[0]) if importlib.util.find_spec(name) is None]
    if missing:
        return f'{contender} needs {" and ".join(missing)}: pip install -e ".[bench]"'
    if contender == OPENVINO_BF16 and "BF16" not in (has := _openvino_capabilities()):
        return f"{contender} needs a CPU on which OpenVINO multiplies bf16 (AVX512_BF16 or AMX); here: {', '.join(has)}"
    return None


def _openvino_capabilities() -> list[str]:
    import openvino

    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def exported(contender: str, states: Tensor) -> Callable[[Tensor | None], Tensor]:
    """`chain(noise [T, B, A] or None)` -> actions [B, A], in a buffer that the next call overwrites.

    Nothing is copied: the runtime reads the states and the noise, and writes the actions, where torch has them.
    """
    B = states.shape[0]
    noise, actions = torch.empty(T, B, A), torch.empty(B, A)
    if contender.startswith("onnxruntime"):
        session = _onnxruntime_session(mish_op=contender == MISH_OP)
        binding = session.io_binding()
        for name, tensor in (("states", states), ("noise", noise)):
            binding.bind_input(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("actions", "cpu", 0, np.float32, tuple(actions.shape), actions.data_ptr())

        def infer() -> None:
            session.run_with_iobinding(binding)

    else:
        import openvino

        fixed = B if contender.startswith("openvino-static") else None
        request = _openvino_model(fixed, precision_of(contender)).create_infer_request()
        for name, tensor in (("states", states), ("noise", noise), ("actions", actions)):
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))

        def infer() -> None:
            request.infer(share_outputs=True)

    def chain(given: Tensor | None = None, states: Tensor = states) -> Tensor:  # the states live as long as the chain
        if given is None:
            torch.randn(T, B, A, out=noise)
        else:
            noise.copy_(given)
        infer()
        return actions

    return chain


@lru_cache(maxsize=1)
def _exported_file() -> tuple[Path, tempfile.TemporaryDirectory]:
    """The published actor's chain as ONNX, and the folder that goes when nobody needs it."""
    folder = tempfile.TemporaryDirectory(prefix="dql-bench-")
    path = Path(folder.name) / "policy.onnx"
    dql.DiffusionPolicy.from_published(published_actor(torch.device("cpu")).state_dict()).export_onnx(path)
    return path, folder


def _with_mish_operators(path: Path) -> bytes:
    """The model of that file with each six nodes that compute Mish replaced by the operator of that name."""
    import onnx

    formula = ["Exp", "Add", "Mul", "Div", "Add", "Div"]  # as `dql.export` writes it
    model = onnx.load(path)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if [node.op_type for node in nodes[-len(formula) :]] == formula:
            z = nodes[-len(formula)].input[0]
            nodes[-len(formula) :] = [onnx.helper.make_node("Mish", [z], list(node.output))]
    count = sum(node.op_type == "Mish" for node in nodes)
    assert count == 3 * T, f"{MISH_OP}: {count} activations found in the exported graph, expected {3 * T}"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@lru_cache(maxsize=2)
def _onnxruntime_session(mish_op: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1  # fixing B as well changes nothing (tried)
    # Its threads wait for more work in a busy loop: not beyond the call, into the time of whoever is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = _exported_file()[0]
    model = _with_mish_operators(path) if mish_op else str(path)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=2)
def _openvino_model(B: int | None, precision: str = "fp32") -> Any:
    """Compiled for one B, or (None) for all. In bf16 inputs and outputs stay float32, as ours do.

    Raises:
        AssertionError: it computes in another precision than it was asked for, which it does without a word.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(_exported_file()[0])
    if B is not None:
        model.reshape({"states": [B, S], "noise": [T, B, A]})
    hints = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],  # its own choice is bf16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled_model = core.compile_model(model, "CPU", hints)
    taken = compiled_model.get_property("INFERENCE_PRECISION_HINT").to_string()
    assert taken == HINTS[precision], f"OpenVINO computes in {taken}, asked for {HINTS[precision]}"
    return compiled_model


class GivenDraws(TorchFunctionMode):
    """Inside, torch.randn, randn_like and randint return the given tensors in turn: the published code takes none."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like, torch.randint):
            return next(self.draws)
        return func(*args, **(kwargs or {}))


def chain_draws(noise: Tensor) -> Iterator[Tensor]:
    """What the published chain draws for noise [T, B, A]; its last step draws once more and multiplies by zero."""
    yield from noise
    yield torch.zeros_like(noise[0])


def give_coin(maximised: int) -> None:
    """Seeds NumPy so that the published update's next coin maximises Q_1 or Q_2."""
    seed = next(s for s in range(100) if (np.random.RandomState(s).uniform() > 0.5) == (maximised == 1))
    np.random.seed(seed)


def matching_agent(published: PublishedAgent, config: dql.Config, device: torch.device) -> dql.DiffusionQL:
    """A DiffusionQL with the published agent's networks."""
    agent = dql.DiffusionQL(S, A, config, device=device)
    for policy, actor in ((agent.policy, published.actor), (agent.ema_policy, published.ema_actor)):
        loaded = dql.DiffusionPolicy.from_published(actor.state_dict(), max_action=config.max_action)
        policy.denoiser.load_state_dict(loaded.denoiser.state_dict())
    agent.critic.load_state_dict(published.critic.state_dict())
    agent.critic_target.load_state_dict(published.critic_target.state_dict())
    return agent


def published_agent(device: torch.device, **options: Any) -> PublishedAgent:
    torch.manual_seed(0)
    agent = PublishedAgent(S, A, **options)
    for module in (agent.actor, agent.ema_actor, agent.critic, agent.critic_target):
        module.to(device)  # in place: the optimizers keep their parameters
    return agent


def check_elements(contender: str, name: str, got: Tensor, want: Tensor, tolerance: float) -> float:
    """The largest error relative to the largest element of `want`.

    Raises:
        AssertionError: above `tolerance`, or not finite; it names the tensor, the worst element and how many are off.
    """
    assert got.shape == want.shape, f"{contender}: {name} is {list(got.shape)}, expected {list(want.shape)}"
    error = (got - want).abs() / want.abs().max().clamp_min(1e-30)
    bad = ~(error <= tolerance)
    if bad.any():
        index = np.unravel_index(int(error.nan_to_num(torch.inf).argmax()), error.shape)
        raise AssertionError(
            f"{contender}: {name} has {int(bad.sum())} of {bad.numel()} elements off, the worst at "
            f"{[int(i) for i in index]}: {float(got[index])!r} for {float(want[index])!r}, error "
            f"{float(error[index]):.1e} of the largest element, allowed {tolerance:.0e}"
        )
    return float(error.max())


def check_selected(
    contender: str, action: Tensor, published: PublishedAgent, state: Tensor, num_candidates: int, seed: int
) -> float:
    """Checks the action [A] that `dql.select` drew for state [1, S]; returns its worst error.

    It must be the candidate that the published code's networks and softmax give for dql's noise and its written way
    to draw. In bf16 the draw may be on the other side of a limit that it is very near to.
    """
    tolerance = TOLERANCES[precision_of(contender)]
    noise = dql.noise.normal(seed, T, num_candidates, A, device=state.device)
    repeated = state.repeat(num_candidates, 1)  # [N, S]
    with torch.no_grad():
        candidates = published.actor.sample(repeated, noise)  # [N, A]
        probabilities = published.critic_target.q_min(repeated, candidates).flatten().softmax(0)  # [N]
    cumulative = probabilities.cumsum(0)
    slack = tolerance / num_candidates
    draw = dql.noise.uniform(seed, 1).to(state.device)
    possible = (cumulative > draw - slack) & (cumulative - probabilities <= draw + slack)  # [N]
    distances = (candidates - action).norm(dim=1).masked_fill(~possible, torch.inf)  # [N]
    return check_elements(contender, "action", action, candidates[distances.argmin()], tolerance)


def check_norms(contender: str, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> float:
    """The largest error |got - want| / |want| over the named tensors.

    Raises:
        AssertionError: above `tolerance`, or not finite, or expected to be zero everywhere; it names the tensors.
    """
    assert got.keys() == want.keys(), f"{contender}: tensors {sorted(got)}, expected {sorted(want)}"
    empty = [name for name, tensor in want.items() if not tensor.any()]
    assert not empty, f"{contender}: expected to be zero, which compares nothing: {empty}"
    errors = {name: float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-30)) for name in want}
    bad = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    assert not bad, f"{contender}: of {len(errors)} gradients these are off, allowed {tolerance:.0e}: {', '.join(bad)}"
    return max(errors.values())
