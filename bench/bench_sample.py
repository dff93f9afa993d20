"""The reverse chain, `dql.sample`, and the acting rule, `dql.select`: every backend beside the published code.

S = 17, A = 6, H = 256, T = 5. Each contender draws its own noise in its own way, as its users would have it; for the
closeness check before, all get the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rivals
import torch
from lean import lean_select
from rivals import COMPILED, EXPORTED, FLOPS, JAX, MISH_OP, OPENVINO_BF16, A, S, T
from torch import Tensor

import dql

BATCH_SIZES, SHORT_BATCH_SIZES = (1, 50, 256, 2560), (1, 256)
MISH_OP_BATCH_SIZES = (1, 50, 256)  # for information, so not where it takes longest
DQL = rivals.contenders()
CANDIDATES = 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "B" not in metafunc.fixturenames:
        return
    short = metafunc.config.getoption("short")
    if metafunc.function is test_forward:
        others = ["onnxruntime"] if short else [*COMPILED, JAX, *EXPORTED, OPENVINO_BF16, MISH_OP]
        names = ["published", *others, *DQL]
    else:  # torch.compile once, the faster one: compiling takes longer than all the timing. Gradients are float32 only.
        differentiable = [name for name in DQL if rivals.backend_of(name)[1] == "fp32"]
        names = ["published", *([] if short else ["compile-lean", JAX]), *differentiable]
    pairs = [
        (B, name)
        for B in (SHORT_BATCH_SIZES if short else BATCH_SIZES)
        for name in names
        if name != MISH_OP or B in MISH_OP_BATCH_SIZES
    ]
    metafunc.parametrize(("B", "contender"), pairs, ids=[f"B{B}-{name}" for B, name in pairs])


def _chain(contender: str, states: Tensor) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """(the contender's `chain(noise=None)` -> actions [B, A], its parameters by name)."""
    device = states.device
    actor = rivals.published_actor(device)
    if contender == "published":
        return lambda noise=None: actor.sample(states, noise), dict(actor.model.named_parameters())
    if contender in COMPILED:
        if (reason := rivals.no_compiler(device)) is not None:
            pytest.skip(reason)
        compiled, B = rivals.compiled(contender, device), states.shape[0]

        def chain(noise: Tensor | None = None) -> Tensor:
            return compiled(states, torch.randn(T, B, A, device=device) if noise is None else noise)

        return chain, dict(actor.model.named_parameters())
    if contender == JAX:
        return _jax(device).sampler(actor, states), {}
    if contender in (*EXPORTED, OPENVINO_BF16, MISH_OP):
        if (reason := rivals.no_runtime(contender, device)) is not None:
            pytest.skip(reason)
        return rivals.exported(contender, states), {}
    policy = dql.DiffusionPolicy.from_published(actor.state_dict()).to(device)
    backend, precision = rivals.backend_of(contender)
    return (
        lambda noise=None: dql.sample(states, policy, backend=backend, noise=noise, precision=precision),
        dict(policy.denoiser.named_parameters()),
    )


def _jax(device: torch.device, short: bool = False) -> Any:
    """The module `lean_jax`, which needs JAX."""
    if (reason := rivals.no_jax(device, short)) is not None:
        pytest.skip(reason)
    import lean_jax

    return lean_jax


def test_forward(B: int, contender: str, race, device) -> None:
    states, noise, _ = rivals.problem(B, device)
    published, _ = _chain("published", states)
    chain, _ = _chain(contender, states)
    precision = rivals.precision_of(contender)
    with torch.no_grad():
        error = rivals.check_elements(
            contender, "actions", chain(noise), published(noise), rivals.TOLERANCES[precision]
        )
        problem, bf16 = f"sample B={B}, forward", precision == "bf16"
        race(problem, contender, chain, published, worst_error=error, flops=FLOPS * B, bf16=bf16)


def test_forward_backward(B: int, contender: str, race, device) -> None:
    states, noise, weights = rivals.problem(B, device)
    published, run = (_backward(name, states, weights) for name in ("published", contender))
    error = rivals.check_norms(contender, run(noise), published(noise), rivals.GRADIENT_TOLERANCE)
    race(f"sample B={B}, forward and backward", contender, run, published, worst_error=error)


def _backward(contender: str, states: Tensor, weights: Tensor) -> Callable[..., dict[str, Any]]:
    """`run(noise=None)` -> the gradients of sum(actions * weights) by name."""
    if contender == JAX:
        return _jax(states.device).gradients(rivals.published_actor(states.device), states, weights)
    chain, parameters = _chain(contender, states)

    def run(noise: Tensor | None = None) -> dict[str, Tensor]:
        gradients = torch.autograd.grad((chain(noise) * weights).sum(), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    return run


@pytest.mark.parametrize("contender", ["published", "compile-lean", JAX, *DQL])
def test_select(contender: str, race, device, request) -> None:
    """One action for one state, NumPy in and out: of 50 candidates, one by softmax of the critics' minimum."""
    if contender == "compile-lean" and (reason := rivals.not_compiled(device, request.config.getoption("short"))):
        pytest.skip(reason)
    published = rivals.published_agent(device)
    state = np.random.default_rng(0).standard_normal(S).astype(np.float32)
    run, error, seed = published.act, 0.0, 0
    if contender in ("compile-lean", JAX):
        lean = lean_select if contender != JAX else _jax(device, request.config.getoption("short")).jax_select
        run = lean(published, CANDIDATES)
        noise, draw = dql.noise.normal(seed, T, CANDIDATES, A), dql.noise.uniform(seed, 1)
        got, row = torch.from_numpy(run(state, noise, draw)), torch.from_numpy(state)[None]
        error = rivals.check_selected(contender, got, published, row, CANDIDATES, seed)
    elif contender != "published":
        run = _select(contender, published, device)
        got, row = torch.from_numpy(run(state, seed=seed)), torch.from_numpy(state)[None]
        error = rivals.check_selected(contender, got.to(device), published, row.to(device), CANDIDATES, seed)
    problem = f"select N={CANDIDATES}, one state"
    race(problem, contender, lambda: run(state), lambda: published.act(state), worst_error=error)


def _select(contender: str, published: rivals.PublishedAgent, device: torch.device) -> Callable[..., np.ndarray]:
    """`select(state [S], seed=None)` -> action [A]."""
    backend, precision = rivals.backend_of(contender)
    agent = rivals.matching_agent(published, dql.Config(backend=backend, num_candidates=CANDIDATES), device)
    if precision == "fp32":
        return agent.act

    def select(state: np.ndarray, seed: int | None = None) -> np.ndarray:
        row = torch.from_numpy(state)[None].to(device)  # [1, S]
        actions = dql.select(
            row,
            agent.policy,
            agent.critic_target,
            num_candidates=CANDIDATES,
            backend=backend,
            seed=seed,
            precision=precision,
        )
        return actions[0].cpu().numpy()

    return select
