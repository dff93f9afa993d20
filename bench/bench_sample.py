"""The reverse chain, `dql.sample`, and the acting rule, `dql.select`: every backend beside the published code.

S = 17, A = 6, H = 256, T = 5. Each contender draws its own noise in its own way, as its users would have it; for the
closeness check before, all get the same.
"""

from collections.abc import Callable

import numpy as np
import pytest
import rivals
import torch
from published import PublishedAgent
from rivals import COMPILED, A, LeanActor, S, T
from torch import Tensor

import dql

BATCH_SIZES, SHORT_BATCH_SIZES = (1, 50, 256, 2560), (1, 256)
DQL = [f"dql-{name}" for name in dql.backends()]
CANDIDATES = 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    short = metafunc.config.getoption("short")
    if "B" in metafunc.fixturenames:
        metafunc.parametrize("B", SHORT_BATCH_SIZES if short else BATCH_SIZES, ids=lambda B: f"B{B}")
        # one compiled rival with a backward, the faster one: compiling takes longer than all the timing
        compiled = [] if short else COMPILED if metafunc.function is test_forward else ["compile-lean"]
        metafunc.parametrize("contender", ["published", *compiled, *DQL])


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
    policy = dql.DiffusionPolicy.from_published(actor.state_dict()).to(device)
    backend = contender.removeprefix("dql-")
    return (
        lambda noise=None: dql.sample(states, policy, backend=backend, noise=noise),
        dict(policy.denoiser.named_parameters()),
    )


def _problem(B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """States [B, S], noise [T, B, A], and the weights [B, A] of the loss: 0 where rounding decides on a clamp."""
    generator = torch.Generator().manual_seed(B)
    states = torch.randn(B, S, generator=generator).to(device)
    noise = torch.randn(T, B, A, generator=generator).to(device)
    weights = torch.randn(B, A, generator=generator).to(device)
    with torch.no_grad():
        _, predictions = LeanActor(rivals.published_actor(device)).chain(states, noise)
    margin = (torch.stack(predictions).abs() - 1).abs().amin(dim=(0, 2))  # [B]
    return states, noise, weights * (margin > rivals.CLAMP_MARGIN)[:, None]


def _gradients(actions: Tensor, weights: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((actions * weights).sum(), list(parameters.values()))


def test_forward(B: int, contender: str, race, device) -> None:
    states, noise, _ = _problem(B, device)
    published, _ = _chain("published", states)
    chain, _ = _chain(contender, states)
    with torch.no_grad():
        error = rivals.check_elements(contender, "actions", chain(noise), published(noise), rivals.ACTION_TOLERANCE)
        race(f"sample B={B}, forward", contender, chain, published, worst_error=error)


def test_forward_backward(B: int, contender: str, race, device) -> None:
    states, noise, weights = _problem(B, device)
    published, published_parameters = _chain("published", states)
    chain, parameters = _chain(contender, states)
    error = rivals.check_norms(
        contender,
        dict(zip(parameters, _gradients(chain(noise), weights, parameters), strict=True)),
        dict(zip(published_parameters, _gradients(published(noise), weights, published_parameters), strict=True)),
        rivals.GRADIENT_TOLERANCE,
    )
    race(
        f"sample B={B}, forward and backward",
        contender,
        lambda: _gradients(chain(), weights, parameters),
        lambda: _gradients(published(), weights, published_parameters),
        worst_error=error,
    )


@pytest.mark.parametrize("contender", ["published", *DQL])
def test_select(contender: str, race, device) -> None:
    """One action for one state, NumPy in and out: of 50 candidates, one by softmax of the critics' minimum."""
    published = rivals.published_agent(device)
    state = np.random.default_rng(0).standard_normal(S).astype(np.float32)
    run, error = (lambda: published.act(state)), 0.0
    if contender != "published":
        config = dql.Config(backend=contender.removeprefix("dql-"), num_candidates=CANDIDATES)
        agent = rivals.matching_agent(published, config, device)
        error = _check_select(contender, agent, published, state)
        run = lambda: agent.act(state)  # noqa: E731
    race(f"select N={CANDIDATES}, one state", contender, run, lambda: published.act(state), worst_error=error)


def _check_select(contender: str, agent: dql.DiffusionQL, published: PublishedAgent, state: np.ndarray) -> float:
    """The published code's candidates, critics and softmax, with dql's noise and its written way to draw from them."""
    device, seed = agent.device, 0
    noise = dql.noise.normal(seed, T, CANDIDATES, A, device=device)
    repeated = torch.from_numpy(state).to(device).repeat(CANDIDATES, 1)  # [N, S]
    with torch.no_grad():
        candidates = published.actor.sample(repeated, noise)  # [N, A]
        cumulative = published.critic_target.q_min(repeated, candidates).flatten().softmax(0).cumsum(0)  # [N]
    index = int((cumulative.cpu() <= float(dql.noise.uniform(seed, 1))).sum())
    got = torch.from_numpy(agent.act(state, seed=seed))
    return rivals.check_elements(contender, "action", got, candidates[index].cpu(), rivals.ACTION_TOLERANCE)
