"""`sample` and `select`: arguments checked once, a backend picked, and the one autograd glue of all backends."""

import math
import numbers
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal, overload

import torch

from dql import finite
from dql import noise as noise_stream
from dql.backend.base import PRECISIONS, Backend, BackendUnavailable, Chain, Run
from dql.backend.registry import pick, registry
from dql.kernels import limits
from dql.kernels.cpp import binding
from dql.networks import Denoiser, TwinCritic, leaf_gradients
from dql.policy import DiffusionPolicy, check_bound_fits
from dql.schedule import StepTable, check_rows
from dql.selection import Selection, drawn_index
from dql.shown import shown
from dql.tensors import (
    HIDING,
    first_order,
    has_memory,
    incoming,
    plain,
    refuse_unseen,
    transformed,
    transforming,
    unseen,
    untraceable,
)

Tensor = torch.Tensor

_all_finite = binding.all_finite if binding.unavailable() is None else None
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


class _ChainFunction(torch.autograd.Function):
    """The autograd glue: a chain run by any backend, differentiable in the states and every parameter."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, chain: Chain, states: Tensor, *parameters: Tensor) -> Tensor:
        actions, ctx.saved = backend.forward(chain, save=True)
        ctx.backend, ctx.chain = backend, chain
        # Saved so that autograd notices parameters or states that were changed in place before backward.
        ctx.save_for_backward(states, *parameters)
        return actions

    @staticmethod
    @first_order(
        "dql.sample has no second derivative, which a gradient penalty (create_graph=True) asks for; take the penalty "
        "of what torch differentiates: critic(states, actions), or policy.denoiser(x, t, states)"
    )
    def backward(ctx: Any, d_actions: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if one was changed in place
        need_states, *need = ctx.needs_input_grad[2:]
        d_actions = incoming(d_actions)
        d_flat, d_states = ctx.backend.backward(ctx.chain, ctx.saved, d_actions, any(need), need_states)
        return None, None, d_states, *leaf_gradients(ctx.chain.spec.layout, d_flat, need)


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
            every backend, to rounding. A row's numbers do not depend on the other rows; its action does by rounding at
            most, and on "cpp" not at all. Without noise or seed, torch's default generator supplies the seed; in a
            CUDA graph the device's does, anew for every replay.
        sampler: "ddpm" (the paper's), "ddim", "dpm-solver++", or a StepTable of your own.
        num_steps: K; None means the T steps of the training. Fewer cost reward: in arXiv 2508.13904, table 2, a
            policy trained with T = 5 fell from 87.9 to 11.6.
        precision: "fp32" (strict), or the operands of the products rounded to the nearest "tf32" number ("cuda",
            "triton") or "bf16" number (those two, and "cpp" where the CPU multiplies it).

    Returns:
        [B, A], or [B, N, A] with candidates; every element within +-max_action. On a GPU those of noise, parameters or
        states that are not finite are NaN: nothing waits for the GPU to learn that.

    Raises:
        ValueError: an argument that does not fit the policy, with its name and both values; a tensor whose memory was
            freed; on the CPU NaN or infinity in the noise, and actions that are NaN (parameters that are not finite, or
            numbers so large that the chain overflows); NaN or infinity in the states. With "cuda" and "triton" the
            second call of a kind and those after it (without gradients, noise, candidates and num_steps), and calls in
            a CUDA graph, do not wait for the GPU to learn that: the actions of such states are NaN, those of others as
            ever, and a later call of `sample`, `select` or `GraphedSampler` on that GPU raises, if its kernel has run
            by then. `dql.check_states()` waits, and then is certain.
        TypeError: states or noise that are no tensor, or one without values of its own (sparse, nested, fake, on the
            meta device, inside a transformation of `torch.func`), or a policy that is none.
        BackendUnavailable: the named backend cannot run this here.
        RuntimeError: it is traced (torch.jit, torch.onnx, torch.export, make_fx): use `policy.export_onnx`; or
            forward-mode differentiated. Of the gradients: they are differentiated in turn.

    Inside `torch.compile` it is a graph break: it runs as it is, and gradients flow through it.
    """
    drawn: int | Tensor | None = seed
    run: Callable[..., Tensor] | None = None
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            raise RuntimeError(untraceable("dql.sample", "torch.export"))
        run = torch._dynamo.disable(_sample_outside)
    else:
        if unseen():
            refuse_unseen("dql.sample", states)
        policy = _policy(policy)
        if noise is None:
            drawn = _fresh_seed(policy) if seed is None else noise_stream.check_seed(seed)
            plain = num_candidates is None and num_steps is None and not torch.is_grad_enabled()
            if plain and type(drawn) is int and type(sampler) is type(backend) is type(precision) is str:
                actions = _sample_prepared(states, policy, backend, drawn, sampler, precision)
                if actions is not None:
                    return actions
        try:
            states = _check_states(states, policy)
        except ValueError:
            policy.kept.clear()  # the next call looks at its states at once
            raise
    run = run or partial(run_chain, report=True)
    return run(
        states,
        policy,
        backend=backend,
        num_candidates=num_candidates,
        noise=noise,
        seed=drawn,
        sampler=sampler,
        num_steps=num_steps,
        precision=precision,
    )


def _sample_outside(states: Tensor, policy: DiffusionPolicy | None, **options: Any) -> Tensor:
    refuse_unseen("dql.sample", states)  # torch.export, which runs it with fake tensors, is "compiling" here too
    return sample(states, policy, **options)


def _select_outside(*arguments: Any, **options: Any) -> Tensor | Selection:
    refuse_unseen("dql.select", *arguments)
    return select(*arguments, **options)


_MANY_ROWS = 64  # from which on it costs nothing to look whether a storage was made smaller than its tensor
_FIXED = ("max_action", "schedule", "predict_epsilon")  # what a policy's chain depends on beside its denoiser


def _sample_prepared(
    states: Tensor, policy: DiffusionPolicy, backend: str, seed: int, sampler: str, precision: str
) -> Tensor | None:
    """`sample` where the same was asked of the policy before: 3 microseconds around the kernel instead of 20.

    None means that it has to go the long way, which also says what is wrong, if anything is.
    """
    key = (backend, sampler, precision)
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]  # past nn.Module's slow attributes
    prepared = policy.kept.get(key)
    if prepared is None or prepared[0] is not denoiser.buffer or prepared[1] is not registry():
        if type(states) is Tensor and states.dim() == 2:
            states = plain("states", states)
            if prepared is not None:
                policy.kept.clear()  # of a buffer or backends that are gone
            policy.kept[key] = (denoiser.buffer, registry(), _prepare(states, policy, backend, sampler, precision))
        return None
    if prepared[2] is None or type(states) is not Tensor or states.is_neg():
        return None
    B = states.size(0)
    if (B >= _MANY_ROWS or states.storage_offset() >= HIDING) and not (
        has_memory(states) and has_memory(denoiser.buffer)
    ):
        return None
    if denoiser.buffer.is_cpu:
        # torch's defaults: naming dtype and device costs 0.7 us; `run` looks whether they are float32 and the CPU
        actions = torch.empty(B, denoiser.spec.action_dim)
    else:
        actions = denoiser.buffer.new_empty(B, denoiser.spec.action_dim)
    if prepared[2](states, actions, seed):
        return actions
    if states.layout is torch.strided and states.is_contiguous():
        # Then the policy may have changed: it is prepared anew the next time, unless another thread did so.
        policy.kept.pop(key, None)
    return None


def _prepare(states: Tensor, policy: DiffusionPolicy, backend: str, sampler: str, precision: str) -> Run | None:
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
    try:
        chain = _chain(states, policy, denoiser, None, None, 0, sampler, None, precision)
        runner = pick(backend, chain)
    except (ValueError, BackendUnavailable):  # the long way says so
        return None
    own = policy.__dict__
    if not all(name in own for name in _FIXED) or "step_table" in own:  # a subclass's, or a patched policy
        return None
    held = [(policy._modules, "denoiser", denoiser), *((own, name, own[name]) for name in _FIXED)]
    return runner.prepare(chain, *denoiser.places(held))


@overload
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
    details: Literal[False] = False,
) -> Tensor: ...


@overload
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
    details: Literal[True],
) -> Selection: ...


@overload
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
    details: bool,
) -> Tensor | Selection: ...


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
    details: bool = False,
) -> Tensor | Selection:
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
        details: give a `dql.Selection`: beside the actions what both critics say of them, which candidates they are and
            how far the candidates spread. The actions are to the bit those of a call without, on every backend.

    Returns:
        [B, A]; with details a `dql.Selection`.

    Raises:
        ValueError, BackendUnavailable: as `sample`; ValueError also for a critic that does not fit the policy.
        TypeError: `critic` is none, or `details` neither True nor False.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            raise RuntimeError(untraceable("dql.select", "torch.export"))
        return torch._dynamo.disable(_select_outside)(
            states,
            policy,
            critic,
            num_candidates=num_candidates,
            backend=backend,
            noise=noise,
            seed=seed,
            sampler=sampler,
            num_steps=num_steps,
            precision=precision,
            details=details,
        )
    if unseen():
        refuse_unseen("dql.select", states)
    if details is not False and details is not True:
        raise TypeError(f"details must be True or False, got {shown(details)}")
    policy = _policy(policy)
    states = check_states_fit(states, policy)
    critic = _check_critic(critic, policy)
    if num_candidates is None:
        raise ValueError("select needs num_candidates, the number of actions to choose from; the published one is 50")
    draw_seed = _fresh_seed(policy) if seed is None else noise_stream.check_seed(seed)
    with torch.no_grad():
        denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
        chain = _chain(
            states,
            policy,
            denoiser,
            num_candidates,
            noise,
            draw_seed if noise is None else None,
            sampler,
            num_steps,
            precision,
        )
        runner = pick(backend, chain)
        seen = ("select", runner.name)
        first = policy.kept.pop(seen, None) is None  # it waits for its states, as in `sample`
        finite.raise_if_set(states.device)
        if first:
            _check_finite("states", states)
        B = states.shape[0]
        if B == 0:
            return Selection.of_none(states, policy.action_dim) if details else states.new_zeros(0, policy.action_dim)
        denoiser.check_intact()
        critic.check_intact()
        if runner.finds_bad_states:
            policy.kept[seen] = True
        if not details and (chosen := runner.select(chain, critic, draw_seed)) is not None:
            return _checked_actions(chosen, policy, runner)
        drawn = runner.draw(chain, critic, draw_seed) if details else None
        if drawn is not None:
            candidates, index = drawn
            candidates = candidates.view(B, chain.candidates, -1)  # [B, N, A]
        else:
            candidates = runner.forward(chain, save=False)[0].view(B, chain.candidates, -1)  # [B, N, A]
            index = drawn_index(critic, states, candidates, draw_seed)  # [B]
        actions = candidates[torch.arange(B, device=index.device), index]
        actions = _checked_actions(actions, policy, runner)
        return Selection.of(critic, states, candidates, index, actions, runner) if details else actions


def run_chain(
    states: Tensor,
    policy: DiffusionPolicy,
    *,
    backend: str = "auto",
    num_candidates: int | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sampler: str | StepTable = "ddpm",
    num_steps: int | None = None,
    precision: str = "fp32",
    at_once: bool = False,
    report: bool = False,
    picked: Backend | None = None,
) -> Tensor:
    """`sample` for states that are known to be good: training uses it, whose data were checked when loaded.

    With `at_once` the parameters' gradient is added to `flat.grad` as a whole, see `FlatModule.gradient_leaves`. With
    `report` a later call of `sample` raises if kernels find a state that is not finite, and this one if actions on the
    CPU are NaN; what others train with is no business of whoever samples next. `picked` is what `backend_for` gave for
    the same name: it runs this chain, too, unless it cannot.
    """
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]  # past nn.Module's slow attributes
    chain = _chain(states, policy, denoiser, num_candidates, noise, seed, sampler, num_steps, precision, report)
    runner = pick(backend, chain) if picked is None or picked.check(chain) is not None else picked
    parameters = denoiser.gradient_leaves(at_once) if torch.is_grad_enabled() else ()
    if chain.states.shape[0] == 0:
        shape = (0, policy.action_dim) if num_candidates is None else (0, num_candidates, policy.action_dim)
        return states.new_zeros(shape, requires_grad=states.requires_grad or any(p.requires_grad for p in parameters))
    if parameters and (states.requires_grad or any(p.requires_grad for p in parameters)):
        denoiser.attach_gradients()
        actions = _ChainFunction.apply(runner, chain, states, *parameters)
    else:
        denoiser.check_intact()
        actions, _ = runner.forward(chain, save=False)
    if report:
        _checked_actions(actions, policy, runner)
    return actions if num_candidates is None else actions.view(-1, num_candidates, actions.shape[1])


def backend_for(states: Tensor, policy: DiffusionPolicy, name: str) -> Backend:
    """The backend that runs the policy's chains, in training, for such states.

    Raises:
        BackendUnavailable: the named one cannot run here.
    """
    return pick(name, _chain(states, policy, policy.denoiser, None, None, 0, "ddpm", None, "fp32"))


def _chain(
    states: Tensor,
    policy: DiffusionPolicy,
    denoiser: Denoiser,
    num_candidates: int | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    sampler: str | StepTable,
    num_steps: int | None,
    precision: str,
    report: bool = True,
) -> Chain:
    """The chain to run, with the arguments of `sample` checked."""
    table = checked_table(policy, sampler, num_steps)
    N = 1
    if num_candidates is not None:
        if isinstance(num_candidates, bool) or not isinstance(num_candidates, numbers.Integral) or num_candidates < 1:
            raise ValueError(f"num_candidates must be a positive integer or None, got {shown(num_candidates)}")
        N = int(num_candidates)
        if states.shape[0] * N > limits.MAX_ROWS:
            raise ValueError(
                f"{states.shape[0]:,} states with {N:,} candidates are more than the {limits.MAX_ROWS:,} rows that a "
                "call takes; split the states, or ask for fewer"
            )
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"unknown precision {shown(precision)}; known: {', '.join(PRECISIONS)}")
    if noise is not None:
        if seed is not None:
            raise ValueError("give noise or a seed, not both")
        B, A = states.shape[0], denoiser.spec.action_dim
        shape = (B, A) if num_candidates is None else (B, N, A)
        noise = _check_noise(noise, policy, (table.num_steps, *shape))
        noise = noise.reshape(table.num_steps, B * N, A)
        seed = 0
    elif seed is None:
        seed = _fresh_seed(policy)
    elif not isinstance(seed, Tensor):
        seed = noise_stream.check_seed(seed)
    if states.dtype is not torch.float32:
        check_bound_fits(policy.max_action, states.dtype)
    return Chain(
        denoiser.buffer,
        denoiser.weights,
        denoiser.spec,
        states.detach() if states.requires_grad else states,
        N,
        noise,
        seed,
        table,
        policy.max_action,
        precision,
        denoiser.kept,
        report,
    )


def _fresh_seed(policy: DiffusionPolicy) -> int | Tensor:
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
    buffer = denoiser.buffer
    try:
        return noise_stream.fresh_seed(buffer.device) if buffer.is_cuda else noise_stream.seed_from_torch()
    except RuntimeError as error:
        if transforming():  # torch.func has its own rules for generators
            raise TypeError(transformed("without a seed, states")) from error
        raise


def _policy(policy: DiffusionPolicy | None) -> DiffusionPolicy:
    policy = _default_policy if policy is None else policy
    if policy is None:
        raise ValueError("no policy: pass one, dql.sample(states, policy), or set one first, dql.set_policy(policy)")
    if not isinstance(policy, DiffusionPolicy):
        hint = "; use agent.policy" if hasattr(policy, "policy") else ""
        raise TypeError(f"policy must be a DiffusionPolicy, got {type(policy).__name__}{hint}")
    return policy


def checked_table(policy: DiffusionPolicy, sampler: str | StepTable, num_steps: int | None) -> StepTable:
    """The table that `sample` runs. Raises ValueError for one that does not fit the policy."""
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


def _check_states(states: Tensor, policy: DiffusionPolicy) -> Tensor:
    states = check_states_fit(states, policy)
    finite.raise_if_set(states.device)
    _check_finite("states", states)
    return states


def check_states_fit(states: Tensor, policy: DiffusionPolicy) -> Tensor:
    """The states as plain memory. Refuses those of another type, shape, dtype or device than the policy takes, and
    those without memory (TypeError, ValueError)."""
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a torch.Tensor, got {type(states).__name__}; use torch.as_tensor(states)")
    if states.is_nested:
        plain("states", states)  # says so: it has no shape to look at
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
    S, buffer = denoiser.spec.state_dim, denoiser.buffer
    shape = states.shape
    if len(shape) != 2 or shape[1] != S:
        hint = "; for one state use states[None]" if list(states.shape) == [S] else ""
        raise ValueError(f"states must be [B, {S}] for this policy, got {list(states.shape)}{hint}")
    if states.dtype is not buffer.dtype:
        raise ValueError(f"states are {states.dtype}, the policy is {policy.dtype}; use states.to({policy.dtype})")
    if states.device != buffer.device:
        raise ValueError(f"states are on {states.device}, the policy is on {policy.device}; move one of them")
    if shape[0] > limits.MAX_ROWS:
        raise ValueError(f"a call takes up to {limits.MAX_ROWS:,} states, got {shape[0]:,}; split them")
    return plain("states", states)


def _is_simple(values: Tensor) -> bool:
    return values.is_cpu and values.dtype is torch.float32 and values.is_contiguous()


def _check_finite(name: str, values: Tensor) -> None:
    if _all_finite is not None and _is_simple(values) and _all_finite(values):
        return
    values = values.detach()
    if finite.capturing(values.device):
        return
    if math.isfinite(values.sum().item()):  # one pass; the rare finite values that overflow are looked at closely
        return
    bad = ~values.isfinite()
    if bad.any():
        first = bad.nonzero()[0].tolist()
        where, remedy = f"index {first}", "give standard normal numbers"
        if name == "states":
            where, remedy = f"row {first[0]}, column {first[1]}", "mend the source of the observations"
        raise ValueError(f"{name} hold {int(bad.sum())} NaN or infinite values, the first at {where}; {remedy}")


def _checked_actions(actions: Tensor, policy: DiffusionPolicy, runner: Backend) -> Tensor:
    """Refuses actions that are NaN (those that are not are within the bound), where looking at them waits for nothing.

    The kernels of a GPU are not waited for; what is run in its place behaves alike.
    """
    if not actions.is_cpu or runner.finds_bad_states:
        return actions
    if _all_finite is not None and (runner.name == "cpp" or _is_simple(actions)) and _all_finite(actions):
        return actions
    if bool(actions.detach().isfinite().all()):
        return actions
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
    for name, weight in denoiser.weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"the actions are NaN, because the policy's parameter {name!r} holds NaN or infinite values; take a "
                "checkpoint from before that"
            )
    raise ValueError(
        f"the actions are NaN, because the chain left the range of {policy.dtype}: states, noise, parameters or the "
        "numbers of the StepTable are too large; scale them"
    )


def _check_noise(noise: Tensor, policy: DiffusionPolicy, shape: tuple[int, ...]) -> Tensor:
    if isinstance(noise, Tensor) and noise.is_nested:
        plain("noise", noise)  # says so: it has no shape to look at
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
    noise = plain("noise", noise)
    if noise.is_cpu:  # of a GPU's it would have to be waited for: the actions of such noise are NaN
        _check_finite("noise", noise)
    return noise


def _check_critic(critic: TwinCritic | None, policy: DiffusionPolicy) -> TwinCritic:
    if not isinstance(critic, TwinCritic):
        raise TypeError(f"select needs a TwinCritic, got {type(critic).__name__}; without one, use dql.sample")
    denoiser: Denoiser = policy._modules["denoiser"]  # type: ignore[assignment]
    spec, buffer = critic.spec, denoiser.buffer
    if spec.state_dim != denoiser.spec.state_dim or spec.action_dim != denoiser.spec.action_dim:
        raise ValueError(
            f"the critic takes (state, action) sizes {(spec.state_dim, spec.action_dim)}, "
            f"the policy has {(policy.state_dim, policy.action_dim)}"
        )
    if critic.buffer.dtype is not buffer.dtype or critic.buffer.device != buffer.device:
        raise ValueError(
            f"the critic is {critic.flat.dtype} on {critic.flat.device}, "
            f"the policy is {policy.dtype} on {policy.device}; convert one of them"
        )
    return critic
