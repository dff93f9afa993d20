"""The backend "eager": plain torch, and what all others are measured against."""

import contextlib
from typing import Any

import torch

from dql import noise as noise_stream
from dql.backend.base import Backend, Chain, timestep_embedding
from dql.kernels import reference

Tensor = torch.Tensor
_CACHED_ROWS = 512  # run at a time on a CPU: a hidden layer's activations and Mish's temporaries stay in the L2 cache


class EagerBackend(Backend):
    """Plain torch (`dql.kernels.reference`): any device, any float dtype, any size. The reference of all others.

    On a GPU its float32 products are as exact as torch's setting makes them (`torch.set_float32_matmul_precision`,
    strict by default).
    """

    name = "eager"

    def check(self, chain: Chain | None = None) -> str | None:
        if chain is not None and chain.precision != "fp32":
            return (
                f"it computes in the parameters' own dtype and has no precision={chain.precision!r}; "
                "use precision='fp32'"
            )
        return None

    def forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        with _no_autocast(chain.flat):
            return self._forward(chain, save)

    def _forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        flat, table = chain.flat, chain.table
        noise = chain.noise
        if noise is None:
            rows = chain.states.shape[0] * chain.candidates
            noise = noise_stream.normal(
                chain.seed, table.num_steps, rows, chain.spec.action_dim, dtype=flat.dtype, device=flat.device
            )
        embedding = timestep_embedding(table, chain.spec.time_dim, flat.dtype, flat.device)
        w, states, N = chain.weights, chain.states, chain.candidates
        step = max(1, _CACHED_ROWS // N) if flat.device.type == "cpu" and not save else max(1, len(states))
        if step >= len(states):
            return reference.chain_fwd(w, chain.spec, states, noise, table.rows, embedding, chain.max_action, save)
        actions = noise.new_empty(noise.shape[1:])
        for i in range(0, len(states), step):
            block = slice(i * N, (i + step) * N)
            actions[block], _ = reference.chain_fwd(
                w, chain.spec, states[i : i + step], noise[:, block], table.rows, embedding, chain.max_action
            )
        return actions, None

    def backward(
        self, chain: Chain, saved: Any, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        with _no_autocast(chain.flat):
            return reference.chain_bwd(saved, chain.spec, d_actions, need_parameters, need_states)


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The chain's precision is `precision`'s business alone."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
