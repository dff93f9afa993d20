"""On a GPU: `dql.sample`, its gradient and `dql.select` beside the published code and what torch.compile makes of it.

S = 17, A = 6, H = 256, T = 5, random inputs. Two times of everything: of the device (`device_time`: a graph of a few
calls, replayed), and of a whole call, from a host that waits for the device after each. `NAME+graph` is the same work
captured as one CUDA graph, which a call feeds with its states and replays: forward that is `dql.GraphedSampler` for
ours, by hand for the others. Closeness to the published chain is checked before anything is timed.

A gradient is that of every parameter for given d_actions: no loss is timed.

Beside each of our device times stands what the problem costs at least (`bounds`), and the share of the time that is.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import bounds
import device_time
import numpy as np
import predicted
import pytest
import rivals
import torch
from device_time import Call, spread
from gpu.parts import SAID
from rivals import FLOPS, A, H, LeanActor, PublishedAgent, S, T
from table import COPY_TITLE, GPU_TITLE, MATMUL_TITLE
from torch import Tensor

import dql
from dql.backend.registry import of_gpus
from dql.kernels.capture import repeated

BATCH_SIZES, SHORT_BATCH_SIZES = (256, 65536, 1, 2500, 50), (256, 1)  # the headline first: time may run out
GRAPHED_BATCH_SIZES = (1, 50, 256, 2500)  # beyond, the host's part no longer shows
OURS = [f"dql-{backend}-{precision}" for precision in ("bf16", "fp32", "tf32") for backend in of_gpus()]
CANDIDATES = 50
CRITIC_FLOPS = 2 * 2 * ((S + A) * H + 2 * H * H + H)  # of a row, both networks
CALL_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.15, 10, 300
# fp32 is held to the largest element (rivals.TOLERANCES), the others to norms: over 65,536 rows somebody is far out.
ACTION_TOLERANCES = {"tf32": 5e-3, "bf16": 3e-2}
GRADIENT_TOLERANCES = {"fp32": rivals.GRADIENT_TOLERANCE, "tf32": 2e-2, "bf16": 1e-1}
CLAMP_MARGINS = {"fp32": rivals.CLAMP_MARGIN, "tf32": 2e-2, "bf16": 1e-1}  # x0's error is the network's times 12


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "B" not in metafunc.fixturenames:
        return
    config = metafunc.config
    sizes = SHORT_BATCH_SIZES if config.getoption("short") else BATCH_SIZES
    sizes = _sizes(config.getoption("sizes"), "--sizes") or sizes
    compiled = {"all": sizes, "none": ()}.get(told := config.getoption("compile_sizes")) or _sizes(
        told, "--compile-sizes"
    )
    forward = metafunc.function is test_forward
    pairs = []
    for B in sizes:
        names = [*(_with_graphs(OURS) if B in GRAPHED_BATCH_SIZES else OURS), "dql-eager", "published"]
        # Two graphs a size forward, in fp32 and bf16, one forward and backward; test_select adds one.
        names += _with_graphs(["compile-lean", *(["compile-lean-bf16"] if forward else [])]) if B in compiled else []
        pairs += [(B, name) for name in names]
    metafunc.parametrize(("B", "contender"), pairs, ids=[f"B{B}-{name}" for B, name in pairs])


def _with_graphs(names: list[str]) -> list[str]:
    """Each beside its graph, so that what was compiled serves both."""
    return [name + suffix for name in names for suffix in ("", "+graph")]


def _sizes(option: str | None, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in option.split(",")) if option not in (None, "none") else ()
    except ValueError:
        raise pytest.UsageError(f"{name} must be sizes like 256,1, got {option!r}") from None


@pytest.fixture(autouse=True)
def _on_a_gpu(device: torch.device, request: pytest.FixtureRequest) -> None:
    if device.type == "cuda":
        return
    if request.config.getoption("sizes") is None:
        pytest.skip(
            f"it compares device times; run with --device cuda, this is {device} (--sizes 8,1 tries it all the same)"
        )
    if "contender" not in request.fixturenames or request.getfixturevalue("contender").endswith("+graph"):
        pytest.skip("it needs a GPU")


Measure = Callable[..., None]


@pytest.fixture
def measure(device: torch.device, benchmark: Any, record: Callable[..., None]) -> Measure:
    """`measure(problem, B, contender, body, error, flops)` puts both times of `body` into the report.

    Args of the returned function:
        problem, B, contender: the row's name.
        body: the work, on the current stream.
        error: of the closeness check that came before.
        flops: floating point operations of it.
        call: makes what is timed from the host; None takes `body`.
        no_graph: why `body` cannot be captured, where that is known.
    """

    def run(
        problem: str,
        B: int,
        contender: str,
        body: Call,
        error: float,
        flops: float,
        call: Callable[[], Call] | None = None,
        no_graph: str | None = None,
    ) -> None:
        precision = _precision(contender)
        on_device = device_time.device_time(body) if no_graph is None else None
        if contender.endswith("+graph") and on_device is not None and on_device.method != "graph":
            pytest.skip(f"{contender} cannot be captured: {on_device.reason}")
        whole = body if call is None else call()

        def synchronized() -> None:
            whole()
            if device.type == "cuda":
                torch.cuda.synchronize()

        synchronized()
        timer = benchmark._timer
        start = timer()
        synchronized()
        rounds = max(MIN_ROUNDS, min(int(CALL_SECONDS / (timer() - start)), MAX_ROUNDS))
        benchmark.group = f"{problem}, B={B}"
        benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=5)
        if benchmark.stats is None:
            return
        calls = list(benchmark.stats.stats.data)
        name = {bounds.FORWARD: "forward", bounds.BACKWARD: "gradient"}.get(problem, "select")
        # pytest's dots have no line's end
        print(f"\n{SAID}{name} {B} {contender}: {1e6 * spread(calls)[1]:.1f} us a call", flush=True)
        on_gpu = device.type == "cuda"
        ours = contender.startswith(tuple(f"dql-{backend}" for backend in of_gpus()))
        host = device_time.issue_time(body) if ours and on_gpu and on_device is not None else None
        on_device = on_device or device_time.device_time(body, no_graph)  # the profiler would have slowed the calls
        rate = flops / on_device.median
        of_model = on_gpu and contender == f"dql-cuda-{precision}" and problem == bounds.FORWARD
        said = _predicted(B, precision, device) if of_model else None
        least = _bound(problem, B, precision, device) if contender.startswith("dql-") and on_gpu else None
        record(
            GPU_TITLE,
            problem=problem,
            B=B,
            contender=contender,
            device_us=[t * 1e6 for t in spread(on_device.seconds)],
            call_us=[t * 1e6 for t in spread(calls)],
            host_us=None if host is None else [t * 1e6 for t in spread(host)],
            predicted_us=None if said is None else said.us,
            predicted_part=None if said is None else said.bound,
            tiling=None if said is None else said.tiling,
            tflops=rate / 1e12,
            of_matmul=rate / _matmul(precision, device)[0] if on_gpu else None,
            rows_per_s=B / on_device.median,
            bound_us=None if least is None else least.us,
            share=None if least is None else least.us * 1e-6 / on_device.median,
            bound_parts_us=None if least is None else least.parts,
            precision=precision,
            worst_error=error,
            device_method=on_device.method,
            device_samples=len(on_device.seconds),
            calls_a_sample=on_device.calls,
            call_samples=len(calls),
            no_graph=on_device.reason,
        )

    return run


def _predicted(B: int, precision: str, device: torch.device) -> predicted.Prediction | None:
    """What the model of the CUDA kernels' time says of a forward pass; None where it cannot be asked."""
    from dql.kernels.cuda import binding
    from dql.kernels.cuda.plan import Tiling

    facts = _facts(device)
    if facts is None or binding.unavailable(device.index) is not None:
        return None
    if binding.facts(device.index or 0, binding.emulating())[0] != 90:
        return None  # it was made for Hopper
    spec = _policy(device).denoiser.spec
    ask = binding.load(binding.emulating()).max_clusters
    mlp = binding.mlp(spec, binding.emulating())
    placed = {c: ask(device.index or 0, mlp, *Tiling(c, 1, True).numbers("bf16"), 0) for c in (2, 4, 8)}
    return predicted.predicted(B, precision, facts.multiprocessors, placed, facts.clock)


_matmul = lru_cache(device_time.matmul_flops)  # (FLOP/s, times) of (precision, device)
_copy = lru_cache(device_time.copy_bytes_per_second)  # (bytes/s, times) of (device)


@lru_cache(maxsize=1)
def _facts(device: torch.device) -> bounds.DeviceFacts | None:
    properties, clock = torch.cuda.get_device_properties(device), device_time.highest_clock(device)
    if clock is None:
        return None
    return bounds.DeviceFacts(
        properties.multi_processor_count,
        clock,
        {precision: _matmul(precision, device)[0] for precision in device_time.PRODUCTS},
        _copy(device)[0],
        properties.L2_cache_size,
    )


def _bound(problem: str, B: int, precision: str, device: torch.device) -> bounds.Bound | None:
    """None where the GPU's clock is not known."""
    facts = _facts(device)
    if facts is None:
        return None
    if problem.startswith(bounds.SELECT):
        return bounds.bound(bounds.SELECT, CANDIDATES, precision, facts)
    return bounds.bound(problem, B, precision, facts)


def _precision(contender: str) -> str:
    name = _base(contender)
    return "bf16" if name.endswith("-bf16") else rivals.precision_of(name)


def _base(contender: str) -> str:
    return contender.removesuffix("+graph")


def _chain(contender: str, states: Tensor, differentiable: bool) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """(`chain(noise=None)` -> actions [B, A] of the contender without its graph, its parameters by name)."""
    device, B, name = states.device, states.shape[0], _base(contender)
    actor = rivals.published_actor(device)
    parameters = dict(actor.model.named_parameters())
    if name == "published":
        return lambda noise=None: actor.sample(states, noise), parameters
    if name.startswith("compile-"):
        if (reason := rivals.no_compiler(device)) is not None:
            pytest.skip(reason)
        compiled = rivals.compiled_alone(B, _precision(name), differentiable, device)

        def chain(noise: Tensor | None = None) -> Tensor:
            return compiled(states, torch.randn(T, B, A, device=device) if noise is None else noise)

        return chain, parameters
    policy = _policy(device)
    backend, precision = rivals.backend_of(name)
    return (
        lambda noise=None: dql.sample(states, policy, backend=backend, noise=noise, precision=precision),
        dict(policy.denoiser.named_parameters()),
    )


@lru_cache(maxsize=1)
def _policy(device: torch.device) -> dql.DiffusionPolicy:
    return dql.DiffusionPolicy.from_published(rivals.published_actor(device).state_dict()).to(device)


def _replayed(body: Call, fed: Tensor, states: Tensor) -> Call:
    """The body as one graph that reads `fed`; each call writes its states there."""
    graph = repeated(body)

    def call() -> None:
        fed.copy_(states)
        graph.replay()

    return call


@pytest.mark.parametrize("precision", device_time.PRODUCTS)
def test_matrix_product(precision: str, device: torch.device, benchmark: Any, record: Callable[..., None]) -> None:
    """What the rates are a share of: torch's product of two large square matrices."""
    rate, measured = benchmark.pedantic(_matmul, args=(precision, device), rounds=1)
    record(
        MATMUL_TITLE,
        precision=precision,
        tflops=rate / 1e12,
        us=[t * 1e6 for t in spread(measured.seconds)],
        samples=len(measured.seconds),
        method=measured.method,
    )


def test_copy(device: torch.device, benchmark: Any, record: Callable[..., None]) -> None:
    """What the bounds take device memory to deliver."""
    rate, measured = benchmark.pedantic(_copy, args=(device,), rounds=1)
    record(
        COPY_TITLE,
        gb_per_s=rate / 1e9,
        us=[t * 1e6 for t in spread(measured.seconds)],
        samples=len(measured.seconds),
        method=measured.method,
    )


def test_forward(B: int, contender: str, measure: Measure, device: torch.device) -> None:
    states, noise, _ = rivals.problem(B, device)
    fed = states.clone()  # what a graph reads
    precision = _precision(contender)
    with torch.no_grad():
        chain, _ = _chain(contender, fed, differentiable=False)
        got, want = chain(noise), rivals.published_actor(device).sample(states, noise)
        if precision == "fp32":
            error = rivals.check_elements(contender, "actions", got, want, rivals.ACTION_TOLERANCE)
        else:
            error = rivals.check_norms(contender, {"actions": got}, {"actions": want}, ACTION_TOLERANCES[precision])

        def call() -> Call:
            if not contender.endswith("+graph"):
                return chain
            if not contender.startswith("dql-"):
                return _replayed(chain, fed, states)
            backend = rivals.backend_of(_base(contender))[0]
            sampler = dql.GraphedSampler(_policy(device), B, backend=backend, precision=precision)
            return lambda: sampler.run(states)

        measure(bounds.FORWARD, B, contender, chain, error, FLOPS * B, call)


def test_forward_backward(B: int, contender: str, measure: Measure, device: torch.device) -> None:
    precision = _precision(contender)
    states, noise, weights = rivals.problem(B, device, CLAMP_MARGINS[precision])
    fed = states.clone()
    chain, parameters = _chain(contender, fed, differentiable=True)
    actor = rivals.published_actor(device)

    def gradients(actions: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(of, torch.autograd.grad(actions, list(of.values()), weights), strict=True))

    want = gradients(actor.sample(states, noise), dict(actor.model.named_parameters()))
    got = gradients(chain(noise), parameters)
    error = rivals.check_norms(contender, got, want, GRADIENT_TOLERANCES[precision])

    def body() -> dict[str, Tensor]:
        return gradients(chain(), parameters)

    call = (lambda: _replayed(body, fed, states)) if contender.endswith("+graph") else None
    measure(bounds.BACKWARD, B, contender, body, error, 3 * FLOPS * B, call)


# The published code comes last: it needs the profiler, after which no call is as fast as before.
@pytest.mark.parametrize("contender", [*_with_graphs(["compile-lean"]), "dql-eager", *_with_graphs(OURS), "published"])
def test_select(contender: str, measure: Measure, device: torch.device, request: pytest.FixtureRequest) -> None:
    """One action for one state out of 50 candidates; the published code takes and gives NumPy."""
    name, precision = _base(contender), _precision(contender)
    body: Callable[[], Any]
    no_graph: str | None = None
    published = _published_agent(device)
    state = torch.randn(1, S, generator=torch.Generator().manual_seed(0)).to(device)
    fed, error = state.clone(), 0.0
    with torch.no_grad():
        if name == "published":
            row: np.ndarray = state[0].cpu().numpy()
            no_graph = "it copies between host and device"
            body = partial(published.act, row)
        elif name == "compile-lean":
            if request.config.getoption("compile_sizes") == "none":
                pytest.skip("--compile-sizes none")
            body, error = _compiled_select(published, fed)
        else:
            backend = rivals.backend_of(name)[0]
            agent = rivals.matching_agent(published, dql.Config(backend=backend), device)

            def select(seed: int | None = None) -> Tensor:
                return dql.select(
                    fed,
                    agent.policy,
                    agent.critic_target,
                    num_candidates=CANDIDATES,
                    backend=backend,
                    seed=seed,
                    precision=precision,
                )

            body = select
            error = rivals.check_selected(name, select(seed=0)[0], published, state, CANDIDATES, seed=0)
        call = (lambda: _replayed(body, fed, state)) if contender.endswith("+graph") else None
        flops = CANDIDATES * (FLOPS + CRITIC_FLOPS)
        measure(f"{bounds.SELECT} of {CANDIDATES}", 1, contender, body, error, flops, call, no_graph)


@lru_cache(maxsize=1)
def _published_agent(device: torch.device) -> PublishedAgent:
    return rivals.published_agent(device)


def _compiled_select(published: PublishedAgent, fed: Tensor) -> tuple[Call, float]:
    """(the acting rule for the state [1, S] in `fed`, compiled, with draws of its own; its error for given draws)."""
    device = fed.device
    if (reason := rivals.no_compiler(device)) is not None:
        pytest.skip(reason)
    select = _compile_select(published)

    def draws() -> tuple[Tensor, Tensor]:
        return torch.randn(T, CANDIDATES, A, device=device), torch.rand(CANDIDATES, device=device)

    noise, uniform = draws()
    repeated = fed.repeat(CANDIDATES, 1)  # [N, S]
    candidates = published.actor.sample(repeated, noise)  # [N, A]
    q = published.critic_target.q_min(repeated, candidates).flatten()  # [N]
    want = candidates[int((q - (-uniform.log()).log()).argmax())]  # [A]
    error = rivals.check_elements("compile-lean", "action", select(fed, noise, uniform), want, rivals.ACTION_TOLERANCE)
    return lambda: select(fed, *draws()), error


@lru_cache(maxsize=1)
def _compile_select(published: PublishedAgent) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(state [1, S], noise [T, N, A], uniform [N]) -> action [A]: the acting rule as one would write it to compile it.

    The draw from softmax(q) is the largest of q plus Gumbel noise, for which the host need not wait.
    """
    chain, critic = LeanActor(published.actor), published.critic_target

    def run(state: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        repeated = state.expand(len(uniform), -1)  # [N, S]
        candidates = chain(repeated, noise)  # [N, A]
        q = critic.q_min(repeated, candidates).flatten()  # [N]
        index = (q - (-uniform.log()).log()).argmax(dim=0, keepdim=True)  # [1]
        return candidates.index_select(0, index)[0]

    return torch.compile(run, dynamic=False, fullgraph=True)
