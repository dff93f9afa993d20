"""The contract of backends: what they are handed, and what they do with it.

A backend is `check` (None, or one sentence with the reason and the remedy), `forward` and `backward`; `select` (with
`draw`), `prepare`, `critic`, `normal`, `actor` and `ops` are for those that can do better there than with the three.
The same sentence serves `BackendUnavailable`, `dql.backends()`, `dql doctor` and the tests' skip reasons.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dql import noise as noise_stream
from dql.backend.kept import Kept
from dql.kernels import reference
from dql.kernels.layout import DenoiserSpec
from dql.schedule import StepTable

if TYPE_CHECKING:
    from dql.networks import TwinCritic
    from dql.policy import DiffusionPolicy

Tensor = torch.Tensor
PRECISIONS = ("fp32", "tf32", "bf16")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this problem here; the message says why and what would mend it."""


@dataclass(slots=True)
class Chain:
    """One reverse chain to run: what every backend is handed.

    Attributes:
        flat: the denoiser's parameters [P], detached, laid out as `spec.layout`.
        weights: the same as named views.
        spec: sizes of the denoiser.
        states: [B, S].
        candidates: N actions a state.
        noise: [K, B * N, A], or None: then the backend draws `dql.noise.normal(seed, K, B * N, A)`.
        seed: of the noise stream, where `noise` is None; an int64 tensor [1] on the device while a CUDA graph is
            captured, so that each replay has its own.
        table: the K steps.
        max_action: the bound of actions and predicted x0.
        precision: "fp32", "tf32" or "bf16".
        kept: what backends derive from the denoiser and keep with it.
        report: whether a later call is to raise if the backend finds, on the device, that states are not finite.
    """

    flat: Tensor
    weights: dict[str, Tensor]
    spec: DenoiserSpec
    states: Tensor
    candidates: int
    noise: Tensor | None
    seed: int | Tensor
    table: StepTable
    max_action: float
    precision: str
    kept: Kept
    report: bool = False


class CriticRunner(Protocol):
    """Kernels for twin critics of one size, in one precision, on one device; see `dql.values`."""

    def forward(
        self, flat: Tensor, states: Tensor, actions: Tensor, candidates: int, which: tuple[int, ...], save: bool
    ) -> tuple[Tensor, Any]:
        """(q [len(which), R] of states [B, S] and actions [R, A], what `backward` wants of it or None)."""

    def backward(
        self,
        flat: Tensor,
        saved: Any,
        states: Tensor,
        actions: Tensor,
        d_q: Tensor,
        need_parameters: bool,
        need_states: bool,
        need_actions: bool,
        only: int | Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_flat [P], d_states [B, S], d_actions [R, A]), None where not needed. `only` names the one critic, 1 or 2
        or by a 1 in [2] on the device, whose d_q is not zero; d_flat is written `into` memory that is given."""


class ActorRunner(Protocol):
    """Kernels for the actor's losses: the noise-prediction loss of a batch beside a chain over its states; see
    `dql.update_fused`."""

    def forward(
        self,
        flat: Tensor,
        states: Tensor,
        actions: Tensor,
        t: Tensor,
        bc_seed: int | Tensor,
        seed: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, Any]:
        """(sampled actions [B, A] of the chain with `seed`, the noise-prediction loss [1], what `backward` wants); t is
        int64 [B] on the device, seeds are numbers or int64 tensors [1] on the device. Without a `seed` there is no
        chain, and [0, A] of its actions."""

    def backward(
        self, flat: Tensor, saved: Any, states: Tensor, d_sampled: Tensor | None, into: Tensor | None = None
    ) -> Tensor:
        """d_flat [P]: of the noise-prediction loss, plus, unless d_sampled [B, A] is None, of the chain. Zero where no
        parameter lies. It is written `into` memory that is given."""


class Beginning(Protocol):
    """Brings what an update begins with to memory that stays where it is, see kernels/beginning.py."""

    def run(
        self, source: Sequence[Tensor], rows: tuple[int, int] | None, seeds: Sequence[int], lr_scale: float, ema: float
    ) -> None:
        """Writes all of it, in one launch."""


class UpdateOps(Protocol):
    """What an update does beside chains and critics, as functions of a package of kernels; see `dql.update_fused`."""

    def Beginning(self, batch: Sequence[Tensor], t: Tensor, seeds: Tensor, scalars: Tensor, T: int) -> Beginning:
        """What gathers a batch and makes an update's draws, into this memory."""

    def critic_loss(
        self, q_target: Tensor, rewards: Tensor, masks: Tensor, q: Tensor, discount: float, candidates: int
    ) -> tuple[Tensor, Tensor]:
        """Of q_target [2, B * N], rewards [B], masks [B] and q [2, B]: (d_q [2, B], metrics float32 [3]: the loss, the
        mean of both q, the mean target); the target is of the best of N candidates by either, then the lesser of both.
        """

    def q_loss(self, q: Tensor, maximised: int | Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """(d_q [2, B] of eta * q_loss, q_loss [1]) of q [2, B]; a tensor is [2] with a 1 for the maximised one."""

    def adam(
        self,
        flat: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        lr: float,
        lr_scale: float | Tensor,
        max_norm: float,
        average: tuple[Tensor, float | Tensor] | None = None,
    ) -> Tensor:
        """A step of torch.optim.Adam, its count of steps included, with the gradient clipped to max_norm (0: not), in
        place; then average += weight (flat - average), which a weight of 0 leaves alone. Gives the norm [1]."""


Run = Callable[[Tensor, Tensor, int], bool]
"""`run(states, actions, seed)` of a prepared chain, see `Backend.prepare`."""


class Backend(ABC):
    """A way to run chains. `name` is what callers say; see `register` for the order of "auto"."""

    name: str
    finds_bad_states: bool = False  # by itself, on the device, without waiting for it: see dql/finite.py

    @property
    def ops(self) -> UpdateOps | None:
        """What an update needs beside `actor` and `critic`, if those have kernels, too: see `dql.update_fused`."""
        return None

    def only_by_name(self) -> str | None:
        """Why "auto" must not take it here although it can run, or None."""
        return None

    @abstractmethod
    def check(self, chain: Chain | None = None) -> str | None:
        """None if this backend can run `chain` (or, without one, anything at all) here; else reason and remedy."""

    @abstractmethod
    def forward(self, chain: Chain, save: bool) -> tuple[Tensor, Any]:
        """(actions [B * N, A], what `backward` needs or None)."""

    @abstractmethod
    def backward(
        self, chain: Chain, saved: Any, d_actions: Tensor, need_parameters: bool, need_states: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(d_flat [P], zero where no parameter lies, d_states [B, S]), None where not needed."""

    def prepare(self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]) -> Run | None:
        """`run(states, actions, seed)` for chains like this one with less ado, or None if this backend has none.

        It fills the actions, or returns False with nothing written if anything is not as it was: other sizes, dtypes
        or strides, states that are not finite, and parameters (`places`) or objects (`held`) that were replaced; see
        `dql.kernels.cpp.binding.intact`. With `finds_bad_states` it does not look at the states, and returns False if
        those of an earlier call were not finite.
        """
        return None

    def normal(self, seed: int | Tensor, K: int, B: int, A: int, like: Tensor) -> Tensor:
        """`dql.noise.normal` [K, B, A] in the dtype and on the device of `like`."""
        return noise_stream.normal(seed, K, B, A, dtype=like.dtype, device=like.device)

    def critic(self, critic: "TwinCritic") -> CriticRunner | None:
        """What computes the Q values of such critics and their gradients, see `dql.values`. None: torch does."""
        return None

    def actor(self, policy: "DiffusionPolicy") -> ActorRunner | None:
        """What computes such a policy's losses and their gradient. None: torch does."""
        return None

    def select(self, chain: Chain, critic: "TwinCritic", draw_seed: int | Tensor) -> Tensor | None:
        """Of each state's N actions one, drawn from softmax(min(Q_1, Q_2)): [B, A]. None: it has no call for that."""
        return None

    def draw(self, chain: Chain, critic: "TwinCritic", draw_seed: int | Tensor) -> tuple[Tensor, Tensor] | None:
        """(Every candidate [B * N, A], which of its N a state takes, int64 [B]): those that `select` takes, to the bit.
        None where `select` gives None, and only there."""
        return None


def timestep_embedding(table: StepTable, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The timesteps' embedding [K, D]: no parameter is in it, so it is made once and kept with the table, as long as
    which a recorded graph reads it."""
    key = ("embedding", dim, dtype, device)
    made = table.kept.get(key)
    if made is None:
        # made on the CPU: there all of it is done when the copy is, whatever stream reads it later
        timesteps = torch.tensor(table.timesteps, dtype=dtype, device="cpu")
        made = table.kept[key] = reference.time_embedding(timesteps, dim).to(device)
    return made
