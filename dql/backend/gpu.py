"""The backends "cuda" and "triton": one class around kernels of one form. Checks, prepared calls, critics, `select`.

`Kernels` is what either package, kernels/cuda and kernels/triton, offers. Runners are made once and kept with what they
belong to.
"""

import contextlib
from typing import Any, Protocol

import torch

from dql.backend.base import ActorRunner, Backend, Chain, CriticRunner, Run, UpdateOps, timestep_embedding
from dql.finite import alarm
from dql.kernels import cuda, limits, triton
from dql.kernels.capture import refuse_while_capturing
from dql.kernels.cpp import binding
from dql.kernels.layout import CriticSpec, DenoiserSpec
from dql.networks import FlatModule, TwinCritic
from dql.policy import DiffusionPolicy
from dql.schedule import StepTable
from dql.tensors import LOWEST_ADDRESS

Tensor = torch.Tensor
_MAX_TIME_DIM = 64


class Plan(Protocol):
    """A forward pass of fixed size, ready to be run on any tensors of that size."""

    def run(
        self,
        flat: Tensor,
        states: Tensor,
        noise: Tensor | None,
        seed: int | Tensor,
        actions: Tensor,
        told: Tensor | None = None,
    ) -> object:
        """Fills actions [R, A]; see `ChainRunner.forward`."""


class ChainRunner(Protocol):
    """Runs chains of one denoiser, one table and one precision on one device."""

    def plan(self, B: int) -> Plan:
        """For B states, without candidates, noise or gradients."""

    def forward(
        self,
        flat: Tensor,
        states: Tensor,
        candidates: int,
        noise: Tensor | None,
        seed: int | Tensor,
        save: bool,
        told: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """(actions [R, A], what `backward` wants of it or None), see kernels/cuda/chain.py."""

    def backward(
        self, flat: Tensor, saved: Any, states: Tensor, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(d_flat [P], d_states [B, S]), None where not needed."""


class Kernels(Protocol):
    """What a package of kernels for GPUs has, as functions of its own module."""

    @property
    def STAND_IN(self) -> tuple[str, str]:
        """(the variable that, being 1, lets something run the kernels in a GPU's place; what they then are)."""

    def stands_in(self) -> bool:
        """Whether something does."""

    def unavailable(self, ordinal: int | None = None) -> str | None:
        """Why no chain at all can run on this GPU (None: the current one), or None."""

    def misfit(
        self, spec: DenoiserSpec | CriticSpec, precision: str, rows: int, steps: int, ordinal: int
    ) -> str | None:
        """Why networks of these sizes, within the limits, do not fit this GPU, or None."""

    def chain_runner(
        self, spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str
    ) -> ChainRunner:
        """What runs such chains; the table is [K, 8], the embedding [K, D], on the device."""

    def critic_runner(self, spec: CriticSpec, precision: str, device: torch.device) -> CriticRunner:
        """What runs such critics."""

    def actor_runner(
        self,
        spec: DenoiserSpec,
        table: Tensor,
        embedding: Tensor,
        q_sample: Tensor,
        max_action: float,
        predict_epsilon: bool,
        precision: str,
    ) -> ActorRunner:
        """What runs the actor's losses; q_sample is [T, 2], the factors of data and noise at each timestep."""

    def update_ops(self) -> UpdateOps:
        """What an update does beside chains and critics."""

    def choose(self, q: Tensor, actions: Tensor, candidates: int, draw_seed: int | Tensor) -> Tensor:
        """Of each state's candidates one [B, A], drawn from softmax(min(Q_1, Q_2)); q is [2, R], actions [R, A]."""

    def normal(self, seed: int | Tensor, K: int, B: int, A: int, device: torch.device) -> Tensor:
        """Standard normals [K, B, A]."""


class GpuBackend(Backend):
    """float32, tf32 or bf16 operands, on NVIDIA GPUs of compute capability 8.0 and up; sums, the chain and its update
    are float32. The gradient has the precision of its forward pass. Where the kernels are not run by a GPU but in its
    place, for tests, tensors are on the CPU."""

    finds_bad_states = True

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name, self.kernels = name, kernels
        self.stands_in, self.unavailable = kernels.stands_in, kernels.unavailable

    @property
    def ops(self) -> UpdateOps:
        return self.kernels.update_ops()

    def only_by_name(self) -> str | None:
        variable, being = self.kernels.STAND_IN
        return f"it is {being} ({variable}=1), for tests: name it" if self.stands_in() else None

    def check(self, chain: Chain | None = None) -> str | None:
        ordinal = chain.flat.device.index if chain is not None and chain.flat.is_cuda else None
        if (reason := self.unavailable(ordinal)) is not None or chain is None:
            return reason
        flat = chain.flat
        if self.stands_in():
            if not flat.is_cpu:
                return f"{self.kernels.STAND_IN[0]}=1 runs it on the CPU and this policy is on {flat.device}; unset it"
        elif not flat.is_cuda:
            return f"it runs on a GPU and this policy is on {flat.device}; move it with policy.to('cuda')"
        elif (capability := torch.cuda.get_device_capability(flat.device)) < (8, 0):
            return f"it needs compute capability 8.0 or more, and this GPU has {capability}; use backend='eager'"
        if flat.dtype is not torch.float32:
            return (
                f"it takes float32 parameters and this policy is {flat.dtype}; convert it with policy.to(torch.float32)"
            )
        if (limit := limits.unfit(chain.spec, _MAX_TIME_DIM)) is not None:
            return f"{limit}; use backend='eager'"
        rows, steps = chain.states.size(0) * chain.candidates, chain.table.num_steps
        if (limit := limits.too_many(rows, steps)) is not None:
            return limit
        return self.kernels.misfit(chain.spec, chain.precision, rows, steps, flat.device.index or 0)

    def forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        noise = None if chain.noise is None else chain.noise.contiguous()
        with on_device_of(chain.flat):
            return self.chain_runner(chain).forward(
                chain.flat, chain.states.contiguous(), chain.candidates, noise, chain.seed, save, _told(chain)
            )

    def backward(
        self, chain: Chain, saved: Any, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        with on_device_of(chain.flat):
            return self.chain_runner(chain).backward(
                chain.flat, saved, chain.states.contiguous(), d_actions.contiguous(), need_parameters, need_states
            )

    def prepare(self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]) -> Run | None:
        if binding.unavailable() is not None:
            return None  # `intact` is too slow in Python to be worth it
        return _Prepared(chain, places, held, self.chain_runner(chain)).run

    def normal(self, seed: int | Tensor, K: int, B: int, A: int, like: Tensor) -> Tensor:
        if like.dtype is not torch.float32 or A > limits.MAX_ACTION_DIM:
            return super().normal(seed, K, B, A, like)
        with on_device_of(like):
            return self.kernels.normal(seed, K, B, A, like.device)  # one launch; in torch it is two hundred

    def critic(self, critic: TwinCritic) -> CriticRunner | None:
        if not self._is_mine(critic) or not self._takes(critic, "fp32"):
            return None
        return self.critic_runner(critic, "fp32")

    def actor(self, policy: DiffusionPolicy) -> ActorRunner | None:
        denoiser = policy.denoiser
        if not self._is_mine(denoiser) or not self._takes(denoiser, "fp32"):
            return None
        table, device = policy.step_table(), denoiser.buffer.device
        key = (self.name, "actor", denoiser.spec, device, policy.max_action)
        made = table.kept.get(key)
        if made is None:
            refuse_while_capturing()
            rows, embedding = _on_device(table, denoiser.spec, device)
            q_sample = policy.q_sample_table(denoiser.buffer)
            made = self.kernels.actor_runner(
                denoiser.spec, rows, embedding, q_sample, policy.max_action, policy.predict_epsilon, "fp32"
            )
            table.kept[key] = made
        return made

    def _is_mine(self, module: FlatModule) -> bool:
        """Whether its parameters are of the dtype and where the kernels take them."""
        buffer = module.buffer
        there = buffer.is_cpu if self.stands_in() else buffer.is_cuda
        return there and buffer.dtype is torch.float32

    def select(self, chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> Tensor | None:
        if not self._takes(critic, chain.precision):
            return None  # the chain runs here, this critic in torch
        with on_device_of(chain.flat):
            actions, q = self._candidates(chain, critic)
            return self.kernels.choose(q, actions, chain.candidates, draw_seed)

    def draw(self, chain: Chain, critic: TwinCritic, draw_seed: int | Tensor) -> tuple[Tensor, Tensor] | None:
        if not self._takes(critic, chain.precision):
            return None
        N = chain.candidates
        with on_device_of(chain.flat):
            actions, q = self._candidates(chain, critic)
            # The kernel of `select`, which copies the numbers of candidates where there it copies their actions: so it
            # takes the same. Below 2^24 they are exact.
            numbers = torch.arange(N, dtype=torch.float32, device=q.device).repeat(q.shape[1] // N)  # [R]
            numbers = numbers[:, None].expand(actions.shape).contiguous()  # [R, A]
            return actions, self.kernels.choose(q, numbers, N, draw_seed)[:, 0].to(torch.int64)

    def _candidates(self, chain: Chain, critic: TwinCritic) -> tuple[Tensor, Tensor]:
        """(Actions [R, A], their values [2, R]), row b * N + n being candidate n of state b."""
        states, N = chain.states.contiguous(), chain.candidates
        noise = None if chain.noise is None else chain.noise.contiguous()
        chains, critics = self.chain_runner(chain), self.critic_runner(critic, chain.precision)
        actions, _ = chains.forward(chain.flat, states, N, noise, chain.seed, False, _told(chain))
        q, _ = critics.forward(critic.buffer, states, actions, N, (0, 1), save=False)
        return actions, q

    def _takes(self, module: FlatModule, precision: str) -> bool:
        """Whether the kernels run networks of these sizes; whether they fit is not the rows' business."""
        if limits.unfit(module.spec, _MAX_TIME_DIM) is not None:
            return False
        return self.kernels.misfit(module.spec, precision, 1, 1, module.buffer.device.index or 0) is None

    def chain_runner(self, chain: Chain) -> ChainRunner:
        """What runs such chains, kept with the step table.

        Whatever GPU memory is kept is a copy of host memory: torch's blocking copy waits until it is in, so that a call
        on another stream may read it at once. No call after the first copies, or waits.
        """
        key = (self.name, chain.spec, chain.precision, chain.flat.device, chain.max_action)
        made = chain.table.kept.get(key)
        if made is None:
            refuse_while_capturing()
            rows, embedding = _on_device(chain.table, chain.spec, chain.flat.device)
            made = self.kernels.chain_runner(chain.spec, rows, embedding, chain.max_action, chain.precision)
            chain.table.kept[key] = made
        return made

    def critic_runner(self, critic: TwinCritic, precision: str) -> CriticRunner:
        """What runs a critic, kept with it."""
        key = (self.name, precision)
        made = critic.kept.get(key)
        if made is None:
            refuse_while_capturing()
            made = critic.kept[key] = self.kernels.critic_runner(critic.spec, precision, critic.buffer.device)
        return made


def _on_device(table: StepTable, spec: DenoiserSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the table's rows [K, 8], the embedding [K, D])."""
    rows = torch.tensor([(*row, 0.0, 0.0) for row in table.rows], dtype=torch.float32, device="cpu")
    return rows.to(device), timestep_embedding(table, spec.time_dim, torch.float32, device)


class _Prepared:
    """A chain whose arguments were checked once, without gradients; see `Backend.prepare`."""

    def __init__(self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...], runner: ChainRunner) -> None:
        self.flat, self.places, self.held, self.S = chain.flat, places, held, chain.spec.state_dim
        self.base, self.device = chain.flat.data_ptr(), chain.flat.device
        self.runner = runner
        found = alarm(chain.flat.device)
        self.told, self.found = found.word, found.cell
        self.plans: dict[int, Plan] = {}

    def run(self, states: Tensor, actions: Tensor, seed: int) -> bool:
        fits = states.dtype is actions.dtype is torch.float32 and states.device == self.device
        try:
            fits = fits and states.is_contiguous() and states.dim() == 2 and states.shape[1] == self.S
            if not fits or not states.size(0) or states.data_ptr() < LOWEST_ADDRESS:
                return False
        except RuntimeError:  # torch's, of tensors that have no shape or no address
            return False
        # Looking at the states would wait for them: the kernels do that. Whether an earlier call's were bad is known.
        if self.found.value or not binding.intact(self.places, self.held, self.base):
            return False
        B = states.size(0)
        plan = self.plans.get(B)
        if plan is None:
            if len(self.plans) > 64:
                self.plans.clear()
            plan = self.plans[B] = self.runner.plan(B)
        with on_device_of(self.flat):
            plan.run(self.flat, states, None, seed, actions, self.told)
        return True


def _told(chain: Chain) -> Tensor | None:
    """Where the kernels tell of states that are not finite; None where nobody wants to know."""
    return alarm(chain.flat.device).word if chain.report else None


_HERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Kernels go to the current device: the tensor's, from here on. Where it is that already, nothing is to be done."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


CUDA, TRITON = GpuBackend("cuda", cuda), GpuBackend("triton", triton)
