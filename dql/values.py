"""Q values of twin critics by whichever backend has kernels for them, with the autograd glue."""

from typing import Any

import torch

from dql.backend.base import Backend
from dql.backend.gpu import on_device_of
from dql.kernels import limits
from dql.networks import TwinCritic, leaf_gradients
from dql.tensors import first_order, incoming, plain

Tensor = torch.Tensor


class _QFunction(torch.autograd.Function):
    """Both Q values in the backend's kernels: differentiable in states, actions and every parameter."""

    @staticmethod
    def forward(
        ctx: Any, runner: Any, critic: TwinCritic, N: int, states: Tensor, actions: Tensor, *parameters: Tensor
    ) -> Tensor:
        with on_device_of(actions):
            q, ctx.saved = runner.forward(critic.buffer, states, actions, N, (0, 1), save=True)
        ctx.runner, ctx.critic, ctx.buffer = runner, critic, critic.buffer
        ctx.save_for_backward(states, actions, *parameters)
        return q

    @staticmethod
    @first_order(
        "these Q values come from kernels and have no second derivative, which a gradient penalty (create_graph=True) "
        "asks for; take the penalty of critic(states, actions), which torch differentiates"
    )
    def backward(ctx: Any, d_q: Tensor) -> tuple[Tensor | None, ...]:
        states, actions, *_ = ctx.saved_tensors
        need_states, need_actions, *need = ctx.needs_input_grad[3:]
        with on_device_of(actions):
            d_flat, d_states, d_actions = ctx.runner.backward(
                ctx.buffer, ctx.saved, states, actions, incoming(d_q).contiguous(), any(need), need_states, need_actions
            )
        return None, None, None, d_states, d_actions, *leaf_gradients(ctx.critic.spec.layout, d_flat, need)


def q_values(
    critic: TwinCritic, states: Tensor, actions: Tensor, backend: Backend, at_once: bool = False
) -> tuple[Tensor, Tensor]:
    """(Q_1, Q_2), each [B] for actions [B, A] and [B, N] for actions [B, N, A]: `critic(states, actions)`.

    Args:
        critic: the critics.
        states: [B, S].
        actions: [B, A] or [B, N, A].
        backend: asked for kernels; without any, torch computes.
        at_once: the kernels' gradient of the parameters is added to `flat.grad` as a whole, see
            `FlatModule.gradient_leaves`.
    """
    states, actions = plain("states", states), plain("actions", actions)
    critic.check_inputs(states, actions)
    # Of no rows torch knows the shapes, and that gradients are zero; kernels count rows in 32 bits.
    runner = backend.critic(critic) if 0 < actions.shape[:-1].numel() <= limits.MAX_ROWS else None
    if runner is None:
        return critic(states, actions)
    flat_actions = actions.reshape(-1, actions.shape[-1]).contiguous()  # [R, A]
    N = 1 if actions.dim() == 2 else actions.shape[1]
    inputs = (states.contiguous(), flat_actions)
    parameters = critic.gradient_leaves(at_once) if torch.is_grad_enabled() else []
    if any(t.requires_grad for t in (*inputs, *parameters)) and torch.is_grad_enabled():
        critic.attach_gradients()
        q = _QFunction.apply(runner, critic, N, *inputs, *parameters)
    else:
        critic.check_intact()
        with on_device_of(states):
            q, _ = runner.forward(critic.buffer, *inputs, N, (0, 1), save=False)
    q1, q2 = q.view(2, *actions.shape[:-1]).unbind()
    return q1, q2


def value_and_other(
    critic: TwinCritic, i: int, states: Tensor, actions: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """(Q_i [B], Q_j [B] without a gradient), j being the other one of 1 and 2."""
    if backend.critic(critic) is None:
        q = critic.q(i, states, actions)
        with torch.no_grad():
            return q, critic.q(3 - i, states, actions)
    both = q_values(critic, states, actions, backend)  # side by side on a GPU: no slower than one
    return both[i - 1], both[2 - i].detach()
