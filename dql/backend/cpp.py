"""The backend "cpp": the whole chain in one native call on the CPU (csrc/), forward, backward and `select`."""

from typing import Any

import torch

from dql.backend.base import Backend, Chain, Run, timestep_embedding
from dql.kernels import limits
from dql.kernels.cpp import binding
from dql.networks import FlatModule, TwinCritic
from dql.schedule import StepTable

Tensor = torch.Tensor


class CppBackend(Backend):
    """float32 (and, on CPUs with AVX512_BF16, bf16 operands) on the CPU. Its gradient is always float32.

    A row's action does not depend, to the last bit, on the other rows, nor on the number of threads.
    """

    name = "cpp"

    def check(self, chain: Chain | None = None) -> str | None:
        if (reason := binding.unavailable()) is not None or chain is None:
            return reason
        flat = chain.flat
        if not flat.is_cpu:
            return f"it runs on the CPU and this policy is on {flat.device}; move it with policy.to('cpu')"
        if flat.dtype is not torch.float32:
            return f"it computes in float32 and this policy is {flat.dtype}; convert it with policy.to(torch.float32)"
        if chain.precision != "fp32":
            if chain.precision != "bf16":
                return f"it has no precision={chain.precision!r}; use precision='fp32'"
            if not binding.has_bf16():
                return "precision='bf16' needs a CPU with AVX512_BF16, which this one has not; use precision='fp32'"
        if (limit := unfit(chain)) is not None:
            return f"{limit}; use backend='eager'"
        return limits.too_many(chain.states.size(0) * chain.candidates, chain.table.num_steps)

    def forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        assert isinstance(chain.seed, int)  # a tensor's are chains of a GPU
        actions, saved = binding.chain(
            network(chain),
            chain.flat,
            step_table(chain.table, chain.spec.time_dim),
            chain.states,
            chain.candidates,
            chain.noise,
            chain.seed,
            chain.max_action,
            chain.precision == "bf16",
            save,
        )
        return actions, (saved, _noise_version(chain)) if save else None

    def backward(
        self, chain: Chain, saved: Any, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        d_flat = torch.zeros_like(chain.flat) if need_parameters else None
        d_states = torch.empty_like(chain.states, memory_format=torch.contiguous_format) if need_states else None
        table, net = step_table(chain.table, chain.spec.time_dim), network(chain)
        kept, noise_version = saved
        if not binding.chain_backward(net, kept, table, chain.states, d_actions, d_flat, d_states):
            # A second backward pass through one graph (retain_graph=True): the first used up what was saved.
            if noise_version != _noise_version(chain):
                raise RuntimeError(
                    "the noise was changed in place since the forward pass, which a second backward pass through its "
                    "graph runs again; give dql.sample a copy, noise.clone()"
                )
            (again, _) = self.forward(chain, save=True)[1]
            binding.chain_backward(net, again, table, chain.states, d_actions, d_flat, d_states)
        return d_flat, d_states

    def prepare(self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]) -> Run | None:
        if not binding.HAS_EXCHANGE:
            return None
        table = step_table(chain.table, chain.spec.time_dim)
        bf16 = chain.precision == "bf16"
        return binding.Prepared(network(chain), table, chain.flat, places, held, chain.max_action, bf16).run

    def select(self, chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> Tensor | None:
        if unfit(critic) is not None:
            return None  # the chain runs here, this critic in torch
        return binding.select(*_drawing(chain, critic, draw_seed))

    def draw(self, chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> tuple[Tensor, Tensor] | None:
        return None if unfit(critic) is not None else binding.draw(*_drawing(chain, critic, draw_seed))


def _drawing(chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> tuple[Any, ...]:
    """The arguments of `binding.select` and of `binding.draw`."""
    assert isinstance(chain.seed, int) and isinstance(draw_seed, int)
    return (
        network(chain),
        chain.flat,
        step_table(chain.table, chain.spec.time_dim),
        network(critic),
        critic.buffer,
        chain.states,
        chain.candidates,
        chain.noise,
        chain.seed,
        draw_seed,
        chain.max_action,
        chain.precision == "bf16",
    )


def _noise_version(chain: Chain) -> int | None:
    return None if chain.noise is None else binding.version(chain.noise)


def unfit(owner: Chain | FlatModule) -> str | None:
    """`limits.unfit` of a chain's denoiser or of a module, looked at once."""
    limit = owner.kept.get("cpp limit", "")
    if limit == "":
        limit = owner.kept["cpp limit"] = limits.unfit(owner.spec)
    return limit


def network(owner: Chain | FlatModule) -> binding.Network:
    """A chain's denoiser or a module as the kernels see it, with the weights they packed."""
    made = owner.kept.get("cpp")
    if made is None:
        made = owner.kept["cpp"] = binding.Network(owner.spec)
    return made


def step_table(table: StepTable, time_dim: int) -> binding.Table:
    """The table as the kernels see it."""
    made = table.kept.get(time_dim)
    if made is None:
        embedding = timestep_embedding(table, time_dim, torch.float32, torch.device("cpu"))
        made = table.kept[time_dim] = binding.Table(table.rows, embedding)
    return made
