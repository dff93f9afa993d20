"""`sample` and `select`: arguments checked once, a backend picked, and the one autograd glue of all backends."""

import contextlib
import math
import numbers
from types import TracebackType
from typing import Any

import torch

from dql import noise as noise_stream
from dql.backends import PRECISIONS, Backend, Chain, pick
from dql.networks import TwinCritic
from dql.policy import DiffusionPolicy
from dql.schedule import StepTable, check_rows

Tensor = torch.Tensor

_default_policy: DiffusionPolicy | None = None


class set_policy:  # noqa: N801 (used like a function)
    """Makes `policy` the one that `dql.sample(states)` uses when it is given none.

    As a call it stays set; as a context manager (`with dql.set_policy(policy): ...`) the previous one comes back.

    Args:
        policy: a DiffusionPolicy, or None to set none.

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, policy: DiffusionPolicy | None) -> None:
        global _default_policy
        if policy is not None and not isinstance(policy, DiffusionPolicy):
            raise TypeError(f"set_policy takes a DiffusionPolicy or None, got {type(policy).__name__}")
        self._previous = _default_policy
        _default_policy = policy

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _default_policy
        _default_policy = self._previous


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The chain's precision is `precision`'s business alone."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class _ChainFunction(torch.autograd.Function):
    """The autograd glue: a chain run by any backend, differentiable in the states and every parameter."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, chain: Chain, states: Tensor, *parameters: Tensor) -> Tensor:
        with _no_autocast(states):
            actions, ctx.saved = backend.forward(chain, save=True)
        ctx.backend, ctx.chain = backend, chain
        # Saved so that autograd notices parameters or states that were changed in place before backward.
        ctx.save_for_backward(states, *parameters)
        return actions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_actions: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if one was changed in place
        need_states, *need = ctx.needs_input_grad[2:]
        layout = ctx.chain.spec.layout
        with _no_autocast(d_actions):
            d_flat, d_states = ctx.backend.backward(ctx.chain, ctx.saved, d_actions, any(need), need_states)
        views = layout.views(d_flat) if d_flat is not None else {}
        d_parameters = (views[slot.name] if needed else None for slot, needed in zip(layout.slots, need, strict=True))
        return None, None, d_states, *d_parameters


def sample(
    states: Tensor,
    policy: DiffusionPolicy | None = None,
    *,
    backend: str = "auto",
    num_candidates: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Actions from the reverse diffusion chain (arXiv 2208.06193, eq. 1), differentiable in parameters and states.

    Args:
        states: [B, S], in the policy's dtype and on its device; never changed, moved or cast.
        policy: the policy; None takes the one of `dql.set_policy`.
        backend: one of `dql.backends()`, which then runs it or raises; "auto" takes the first that can.
        num_candidates: N actions for each state, sharing the state's part of the first layer.
        noise: standard normals [K, B, A] (with candidates [K, B, N, A]): noise[0] is x_T, noise[k] feeds step k - 1.
        seed: 0 .. 2^64 - 1, of the counter-based stream `dql.noise.normal`: the same seed gives the same actions on
            every backend, to rounding, and a row's action does not depend on the other rows. Without noise or seed,
            torch's default generator supplies the seed.
        sampler: "ddpm" (the paper's), "ddim", "dpm-solver++", or a StepTable of your own.
        num_steps: K; None means the T steps of the training. Fewer cost reward: a policy trained with T = 5 fell
            from 87.9 to 11.6 in a published table.
        precision: "fp32" (strict), "tf32" or "bf16".

    Returns:
        [B, A], or [B, N, A] with candidates; every element within +-max_action.

    Raises:
        ValueError: an argument that does not fit the policy, with its name and both values; NaN or infinity in the
            states (looked for on a GPU too, at the price of a sync, but not while a CUDA graph is captured).
        TypeError: states that are no tensor, or a policy that is none.
        BackendUnavailable: the named backend cannot run this here.

    Inside `torch.compile` it is a graph break: it runs as it is, and gradients flow through it. `torch.func`'s
    transformations (vmap, grad, jacrev) and `torch.export` do not support it.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "num_candidates": num_candidates,
        "noise": noise,
        "seed": seed,
        "sampler": sampler,
        "num_steps": num_steps,
        "precision": precision,
    }
    if torch.compiler.is_compiling():
        return torch._dynamo.disable(sample)(states, policy, **options)
    policy = _policy(policy)
    _check_states(states, policy)
    return run_chain(states, policy, **options)


def select(
    states: Tensor,
    policy: DiffusionPolicy | None = None,
    critic: TwinCritic | None = None,
    *,
    num_candidates: int = 50,
    backend: str = "auto",
    noise: Tensor | None = None,
    seed: int | None = None,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """The published acting rule: N candidates a state, one drawn from softmax(min(Q_1, Q_2)).

    It is not in the paper but in its code. The draw is the first candidate whose cumulative probability exceeds
    `dql.noise.uniform(seed)`; of a critic that has become NaN, the first. No gradient flows.

    Args:
        states: [B, S].
        policy: the policy; None takes the one of `dql.set_policy`.
        critic: the target critic, as published.
        num_candidates: N.
        noise: [K, B, N, A]; `seed` then only draws the candidate.
        seed, backend, sampler, num_steps, precision: as in `sample`.

    Returns:
        [B, A].

    Raises:
        ValueError, BackendUnavailable: as `sample`; ValueError also for a critic that does not fit the policy.
        TypeError: `critic` is none.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "num_candidates": num_candidates,
        "noise": noise,
        "sampler": sampler,
        "num_steps": num_steps,
        "precision": precision,
    }
    if torch.compiler.is_compiling():
        return torch._dynamo.disable(select)(states, policy, critic, seed=seed, **options)
    policy = _policy(policy)
    _check_states(states, policy)
    critic = _check_critic(critic, policy)
    if num_candidates is None:
        raise ValueError("select needs num_candidates, the number of actions to choose from; the published one is 50")
    seed = noise_stream.seed_from_torch() if seed is None else noise_stream.check_seed(seed)
    with torch.no_grad():
        candidates = run_chain(states, policy, seed=seed if noise is None else None, **options)  # [B, N, A]
        if states.shape[0] == 0:
            return candidates.new_zeros(0, policy.action_dim)
        cumulative = critic.q_min(states, candidates).softmax(dim=1).cumsum(dim=1)  # [B, N]
        draw = noise_stream.uniform(seed, states.shape[0]).to(cumulative, non_blocking=True)[:, None]
        index = (cumulative <= draw * cumulative[:, -1:]).sum(dim=1).clamp_(max=candidates.shape[1] - 1)  # [B]
        return candidates[torch.arange(states.shape[0], device=index.device), index]


def run_chain(
    states: Tensor,
    policy: DiffusionPolicy,
    *,
    backend: str = "auto",
    num_candidates: int | None = None,
    noise: Tensor | None = None,
    seed: int | None = None,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """`sample` for states that are known to be good: training uses it, whose data were checked when loaded."""
    table = _table(policy, sampler, num_steps)
    B, A = states.shape[0], policy.action_dim
    N = 1 if num_candidates is None else num_candidates
    if isinstance(N, bool) or not isinstance(N, numbers.Integral) or N < 1:
        raise ValueError(f"num_candidates must be a positive integer or None, got {num_candidates!r}")
    N = int(N)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    shape = (B, A) if num_candidates is None else (B, N, A)
    if noise is not None:
        if seed is not None:
            raise ValueError("give noise or a seed, not both")
        _check_noise(noise, policy, (table.num_steps, *shape))
        noise = noise.reshape(table.num_steps, B * N, A)
    elif seed is None:
        seed = noise_stream.seed_from_torch()
    else:
        seed = noise_stream.check_seed(seed)
    denoiser = policy.denoiser
    parameters = denoiser.flat_parameters()
    chain = Chain(
        denoiser.flat.detach(),
        denoiser.weights,
        denoiser.spec,
        states.detach(),
        N,
        noise,
        seed or 0,
        table,
        policy.max_action,
        precision,
    )
    runner = pick(backend, chain)
    differentiable = torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in parameters))
    if B == 0:
        return states.new_zeros(shape, requires_grad=differentiable)
    if differentiable:
        denoiser.attach_gradients()
        actions = _ChainFunction.apply(runner, chain, states, *parameters)
    else:
        with _no_autocast(states):
            actions, _ = runner.forward(chain, save=False)
    return actions.view(shape)


def _policy(policy: DiffusionPolicy | None) -> DiffusionPolicy:
    policy = _default_policy if policy is None else policy
    if policy is None:
        raise ValueError("no policy: pass one, dql.sample(states, policy), or set one first, dql.set_policy(policy)")
    if not isinstance(policy, DiffusionPolicy):
        hint = "; use agent.policy" if hasattr(policy, "policy") else ""
        raise TypeError(f"policy must be a DiffusionPolicy, got {type(policy).__name__}{hint}")
    return policy


def _table(policy: DiffusionPolicy, sampler: str | StepTable, num_steps: int | None) -> StepTable:
    if isinstance(sampler, StepTable):
        if num_steps is not None and num_steps != sampler.num_steps:
            raise ValueError(f"num_steps={num_steps} but the StepTable has {sampler.num_steps} rows; leave one out")
        check_rows(sampler.rows, sampler.timesteps, policy.T)
        if sampler.predict_epsilon != policy.predict_epsilon:
            raise ValueError(
                f"the StepTable was made with predict_epsilon={sampler.predict_epsilon}, the policy has "
                f"{policy.predict_epsilon}; make it with predict_epsilon=policy.predict_epsilon"
            )
        return sampler
    return policy.step_table(sampler, num_steps)


def _check_states(states: Tensor, policy: DiffusionPolicy) -> None:
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a torch.Tensor, got {type(states).__name__}; use torch.as_tensor(states)")
    S = policy.state_dim
    if states.dim() != 2 or states.shape[1] != S:
        hint = "; for one state use states[None]" if list(states.shape) == [S] else ""
        raise ValueError(f"states must be [B, {S}] for this policy, got {list(states.shape)}{hint}")
    if states.dtype != policy.dtype:
        raise ValueError(f"states are {states.dtype}, the policy is {policy.dtype}; use states.to({policy.dtype})")
    if states.device != policy.device:
        raise ValueError(f"states are on {states.device}, the policy is on {policy.device}; move one of them")
    _check_finite("states", states)


def _check_finite(name: str, values: Tensor) -> None:
    values = values.detach()
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if math.isfinite(values.sum().item()):  # one pass; the rare finite values that overflow are looked at closely
        return
    bad = ~values.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} hold {int(bad.sum())} NaN or infinite values, the first at row {row}, column {column}; "
            "mend the source of the observations"
        )


def _check_noise(noise: Tensor, policy: DiffusionPolicy, shape: tuple[int, ...]) -> None:
    if not isinstance(noise, Tensor) or tuple(noise.shape) != shape:
        got = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        names = "[K, B, A]" if len(shape) == 3 else "[K, B, N, A]"
        raise ValueError(f"noise must be {names} = {list(shape)}, got {got}")
    if noise.dtype != policy.dtype or noise.device != policy.device:
        raise ValueError(
            f"noise is {noise.dtype} on {noise.device}, the policy is {policy.dtype} on {policy.device}; convert it"
        )
    if noise.requires_grad:
        raise ValueError("noise requires grad, but no gradient flows to it; pass noise.detach()")


def _check_critic(critic: TwinCritic | None, policy: DiffusionPolicy) -> TwinCritic:
    if not isinstance(critic, TwinCritic):
        raise TypeError(f"select needs a TwinCritic, got {type(critic).__name__}; without one, use dql.sample")
    sizes, own = (critic.spec.state_dim, critic.spec.action_dim), (policy.state_dim, policy.action_dim)
    if sizes != own:
        raise ValueError(f"the critic takes (state, action) sizes {sizes}, the policy has {own}")
    if critic.flat.dtype != policy.dtype or critic.flat.device != policy.device:
        raise ValueError(
            f"the critic is {critic.flat.dtype} on {critic.flat.device}, "
            f"the policy is {policy.dtype} on {policy.device}; convert one of them"
        )
    return critic
