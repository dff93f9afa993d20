"""The backend "triton": the whole chain in one kernel on an NVIDIA GPU (kernels/reverse_diffusion.py), its gradient in
three, twin critics and `select` likewise. Triton itself is imported when the first chain is run."""

import contextlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from dql.backends import Backend, Chain, timestep_embedding
from dql.kernels import limits, native
from dql.networks import TwinCritic

if TYPE_CHECKING:
    from dql.kernels.chain_runner import ChainPlan, ChainRunner
    from dql.kernels.twin_critic import CriticRunner

Tensor = torch.Tensor
_MAX_TIME_DIM = 64


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, on NumPy: slow, and for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(Backend):
    """float32 (3xTF32, as exact as float32), tf32 or bf16 operands on NVIDIA GPUs of compute capability 8.0 and up.

    Sums, the chain and its update are float32 in all of them. The gradient has the forward pass's precision.
    """

    name = "triton"

    def only_by_name(self) -> str | None:
        return "it is interpreted (TRITON_INTERPRET=1), for tests: name it" if interpreted() else None

    def check(self, chain: Chain | None = None) -> str | None:
        if not _installed():
            return 'Triton is not installed; pip install -e ".[triton]" (Linux only; torch builds for CUDA bring it)'
        if not interpreted() and not torch.cuda.is_available():
            return "no CUDA device: torch.cuda.is_available() is False; see `dql doctor`"
        if not interpreted() and not _compiler():
            return "Triton needs a C compiler for its launchers and found none; install gcc or clang, or name one in CC"
        if chain is None:
            return None
        flat = chain.flat
        if interpreted():
            if not flat.is_cpu:
                return f"TRITON_INTERPRET=1 runs it on the CPU and this policy is on {flat.device}; unset it"
        elif not flat.is_cuda:
            return f"it runs on a GPU and this policy is on {flat.device}; move it with policy.to('cuda')"
        elif (capability := torch.cuda.get_device_capability(flat.device)) < (8, 0):
            return f"it needs compute capability 8.0 or more, and this GPU has {capability}; use backend='eager'"
        if flat.dtype is not torch.float32:
            return (
                f"it takes float32 parameters and this policy is {flat.dtype}; convert it with policy.to(torch.float32)"
            )
        if (limit := limits.too_large(chain.spec, _MAX_TIME_DIM)) is not None:
            return f"{limit}; use backend='eager'"
        return limits.too_many(len(chain.states) * chain.candidates, chain.table.num_steps)

    def forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        noise = None if chain.noise is None else chain.noise.contiguous()
        with on_device_of(chain.flat):
            return chain_runner(chain).forward(
                chain.flat, chain.states.contiguous(), chain.candidates, noise, chain.seed, save
            )

    def backward(
        self, chain: Chain, saved: Any, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        with on_device_of(chain.flat):
            return chain_runner(chain).backward(
                chain.flat, saved, chain.states.contiguous(), d_actions.contiguous(), need_parameters, need_states
            )

    def prepare(
        self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]
    ) -> Callable[[Tensor, Tensor, int], bool] | None:
        if native.unavailable() is not None:
            return None  # `intact` is too slow in Python to be worth it
        return _Prepared(chain, places, held).run

    def normal(self, seed: int, K: int, B: int, A: int, like: Tensor) -> Tensor:
        if like.dtype is not torch.float32 or A > limits.MAX_ACTION_DIM:
            return super().normal(seed, K, B, A, like)
        from dql.kernels import triton_noise  # one launch; in torch it is two hundred

        with on_device_of(like):
            return triton_noise.normal(seed, K, B, A, like.device)

    def critic(self, critic: TwinCritic) -> "CriticRunner | None":
        if limits.too_large(critic.spec) is not None or critic.buffer.dtype is not torch.float32:
            return None
        if not (critic.buffer.is_cpu if interpreted() else critic.buffer.is_cuda):
            return None
        return critic_runner(critic, "fp32")

    def select(self, chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> Tensor | None:
        from dql.kernels import twin_critic

        if limits.too_large(critic.spec) is not None:
            return None  # the chain runs here, this critic in torch
        noise = None if chain.noise is None else chain.noise.contiguous()
        with on_device_of(chain.flat):
            return twin_critic.select(
                chain_runner(chain),
                critic_runner(critic, chain.precision),
                chain.flat,
                critic.buffer,
                chain.states.contiguous(),
                chain.candidates,
                noise,
                chain.seed,
                draw_seed,
            )


class _Prepared:
    """A chain whose arguments were checked once, without gradients; see `Backend.prepare`."""

    def __init__(self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]) -> None:
        self.flat, self.places, self.held, self.S = chain.flat, places, held, chain.spec.state_dim
        self.base = chain.flat.data_ptr()
        self.runner = chain_runner(chain)
        self.plans: dict[int, ChainPlan] = {}

    def run(self, states: Tensor, actions: Tensor, seed: int) -> bool:
        fits = states.dtype is actions.dtype is torch.float32 and states.device == self.flat.device
        if not fits or not states.is_contiguous() or states.dim() != 2 or states.shape[1] != self.S or not len(states):
            return False
        if self.flat.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # looking at the states would wait for them
        if not native.intact(self.places, self.held, self.base) or not math.isfinite(states.sum().item()):
            return False
        B = len(states)
        plan = self.plans.get(B)
        if plan is None:
            if len(self.plans) > 64:
                self.plans.clear()
            plan = self.plans[B] = self.runner.plan(B)
        with on_device_of(self.flat):
            plan.run(self.flat, states, None, seed, actions)
        return True


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels go to the current device: the tensor's, from here on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def chain_runner(chain: Chain) -> "ChainRunner":
    """What runs such chains, kept with the step table."""
    key = ("triton", chain.spec, chain.precision, chain.flat.device, chain.max_action)
    made = chain.table.kept.get(key)
    if made is None:
        from dql.kernels.chain_runner import ChainRunner
        from dql.kernels.launch import refuse_while_capturing

        refuse_while_capturing()
        device = chain.flat.device
        rows = torch.tensor([(*row, 0.0, 0.0) for row in chain.table.rows], dtype=torch.float32, device="cpu")
        embedding = timestep_embedding(chain.table.timesteps, chain.spec.time_dim, torch.float32, device)
        made = ChainRunner(chain.spec, rows.to(device), embedding, chain.max_action, chain.precision)
        chain.table.kept[key] = made
    return made


def critic_runner(critic: TwinCritic, precision: str) -> "CriticRunner":
    """What runs a critic, kept with it."""
    key = ("triton", precision)
    made = critic.kept.get(key)
    if made is None:
        from dql.kernels.launch import refuse_while_capturing
        from dql.kernels.twin_critic import CriticRunner

        refuse_while_capturing()
        made = critic.kept[key] = CriticRunner(critic.spec, precision, critic.buffer.device)
    return made
