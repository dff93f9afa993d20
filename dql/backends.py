"""The registry of backends: who can run the reverse chain, and if not, why not and what mends it.

A backend is `check` (None, or one sentence with the reason and the remedy), `forward` and `backward`; `select`,
`prepare`, `critic` and `normal` are for those that can do better there than with the three.
The same sentence serves `BackendUnavailable`, `dql.backends()`, `dql doctor` and the tests' skip reasons.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dql import noise as noise_stream
from dql.kept import Kept
from dql.kernels import reference
from dql.kernels.layout import DenoiserSpec
from dql.schedule import StepTable

if TYPE_CHECKING:
    from dql.networks import TwinCritic

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
        precision: "fp32", "tf32" ("triton", "cuda") or "bf16" (those, and "cpp" where the CPU has it).
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


class Backend(ABC):
    """A way to run chains. `name` is what callers say; see `register` for the order of "auto"."""

    name: str
    finds_bad_states: bool = False  # by itself, on the device, without waiting for it: see dql/finite.py

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

    def prepare(
        self, chain: Chain, places: tuple[Any, ...], held: tuple[Any, ...]
    ) -> Callable[[Tensor, Tensor, int], bool] | None:
        """`run(states, actions, seed)` for chains like this one with less ado, or None if this backend has none.

        It fills the actions, or returns False with nothing written if anything is not as it was: other sizes, dtypes
        or strides, states that are not finite, and parameters (`places`) or objects (`held`) that were replaced; see
        `dql.kernels.native.intact`. With `finds_bad_states` it does not look at the states, and returns False if those
        of an earlier call were not finite.
        """
        return None

    def normal(self, seed: int | Tensor, K: int, B: int, A: int, like: Tensor) -> Tensor:
        """`dql.noise.normal` [K, B, A] in the dtype and on the device of `like`."""
        return noise_stream.normal(seed, K, B, A, dtype=like.dtype, device=like.device)

    def critic(self, critic: "TwinCritic") -> Any | None:
        """What computes the Q values of such critics and their gradients, see `dql.values`. None: torch does."""
        return None

    def select(self, chain: Chain, critic: "TwinCritic", draw_seed: int | Tensor) -> Tensor | None:
        """Of each state's N actions one, drawn from softmax(min(Q_1, Q_2)): [B, A]. None: it has no call for that."""
        return None


_CACHED_ROWS = 512  # run at a time on a CPU: a hidden layer's activations and Mish's temporaries stay in the L2 cache


class EagerBackend(Backend):
    """Plain torch (`dql.kernels.reference`): any device, any float dtype, any size. The reference of all others.

    A row's action may depend by rounding on the other rows and on the number of threads, as torch's products do. On a
    GPU its float32 products are as exact as torch's setting makes them
    (`torch.set_float32_matmul_precision`, strict by default).
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


_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend. "auto" takes the first that can run the problem, in the order of registration."""
    global _REGISTRY
    _REGISTRY = {**_REGISTRY, backend.name: backend}  # another object: who remembers the old one notices


def registry() -> dict[str, Backend]:
    """The backends by name, in the order of "auto"."""
    return _REGISTRY


def _register_all() -> None:
    """In the order of "auto". `cpp` takes policies on the CPU alone; on a GPU `cuda` comes before `triton`: as counted
    in kernels/cuda_plan.py a step costs less where weights stay on the chip, and as much where both stream them."""
    from dql.cpp import CppBackend
    from dql.cuda_backend import CudaBackend
    from dql.triton_backend import TritonBackend

    register(CppBackend())
    register(CudaBackend())
    register(TritonBackend())
    register(EagerBackend())


def backends() -> dict[str, str | None]:
    """Every backend with None if it can run here, else one sentence: the reason and what mends it."""
    return {name: backend.check() for name, backend in _REGISTRY.items()}


def check_name(name: str) -> None:
    """Refuses a backend that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if name != "auto" and name not in _REGISTRY:
        raise ValueError(f"unknown backend {name!r}; this version of dql has: auto, {', '.join(_REGISTRY)}")


def pick(name: str, chain: Chain) -> Backend:
    """The backend that runs `chain`: the named one, never another; for "auto" the first that can.

    Raises:
        ValueError: no backend of that name exists.
        BackendUnavailable: it cannot run this problem here.
    """
    if name == "auto":
        for backend in _REGISTRY.values():
            if backend.check(chain) is None and backend.only_by_name() is None:
                return backend
        reasons = "; ".join(f"{b.name}: {b.check(chain) or b.only_by_name()}" for b in _REGISTRY.values())
        raise BackendUnavailable(f"no backend can run this problem: {reasons}")
    check_name(name)
    backend = _REGISTRY[name]
    reason = backend.check(chain)
    if reason is not None:
        able = [b.name for b in _REGISTRY.values() if b.check(chain) is None]
        raise BackendUnavailable(
            f"backend {name!r} cannot run this: {reason} (able to: {', '.join(able) or 'no backend'})"
        )
    return backend


_register_all()
