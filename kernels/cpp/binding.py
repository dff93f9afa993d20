"""The native CPU kernels of csrc/: tensors in, tensors out. Without a compiled extension, `unavailable()` says why.

Everything is float32 on the CPU. Weights are packed once per version of the parameters and kept in the `Network`: a
change is noticed by the flat buffer's address, its version counter and, because optimizers and `.data` may write
without counting, by 32 elements of each tensor.

Letters: B states, N candidates, R = B * N rows, S state size, A action size, H hidden width, K steps.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import build_record
from ..layout import ACTIVATIONS, CriticSpec, DenoiserSpec
from ..limits import CUT_OFF, MANY, cut_off

try:
    from .. import _native  # type: ignore[attr-defined]

    _reason: str | None = None
except ImportError as error:
    _native = None
    _reason = build_record.reason(error)

Tensor = torch.Tensor


def _use_exchange() -> bool:
    """Lets the extension read tensors through DLPack's C exchange API, where torch has it; slower ways remain."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _native is None or api is None:
        return False
    probe = torch.zeros(3, 4)[1:].requires_grad_(True)
    return _native.use_exchange(api, probe, probe.data_ptr())


HAS_EXCHANGE = _use_exchange()


def unavailable() -> str | None:
    """None if the extension is here, else one sentence: why not, and what mends it."""
    return _reason


def variants() -> dict[str, str | None]:
    """The instruction sets that were compiled, the fastest first, each with None or why this CPU cannot run it."""
    return _native.variants() if _native else {}


def in_use() -> str:
    """The variant that runs: the first that this CPU can, unless `forced`."""
    return _native.in_use()[0]


def has_bf16() -> bool:
    """Whether the variant in use multiplies bf16 operands."""
    return _native.in_use()[1]


@contextlib.contextmanager
def forced(variant: str) -> Iterator[None]:
    """Runs this variant instead, in the whole process; for tests and benches.

    Raises:
        ValueError: it is unknown, or this CPU cannot run it.
    """
    _native.force(variant)
    try:
        yield
    finally:
        _native.force("")


class Network:
    """A denoiser or twin critic as the kernels see it, with its packed weights."""

    def __init__(self, spec: DenoiserSpec | CriticSpec) -> None:
        critic = isinstance(spec, CriticSpec)
        self.state_dim, self.action_dim, self.size = spec.state_dim, spec.action_dim, spec.layout.size
        self.handle = _native.network(
            critic,
            spec.state_dim,
            spec.action_dim,
            0 if isinstance(spec, CriticSpec) else spec.time_dim,
            spec.hidden_dim,
            spec.num_hidden,
            ACTIVATIONS.index(spec.activation),
            spec.layout.size,
            tuple(slot.offset for slot in spec.layout.slots),
        )


class Table:
    """The steps of a sampler, or the timesteps of the noise-prediction loss, with their embedding.

    Args:
        rows: K rows (a, b, c0, cx, cp, s); none for the loss.
        embedding: [K, D], float32.
        q_sample: [K, 2], sqrt(abar) and sqrt(1 - abar) of each timestep, float32; for the loss alone.
    """

    def __init__(
        self, rows: Sequence[Sequence[float]] | None, embedding: Tensor, q_sample: Tensor | None = None
    ) -> None:
        K, D = embedding.shape
        if q_sample is not None and q_sample.shape != (K, 2):
            raise ValueError(f"q_sample must be {[K, 2]}, got {list(q_sample.shape)}")
        steps = torch.tensor(rows, dtype=torch.float32, device="cpu") if rows is not None else None
        if steps is not None and steps.shape != (K, 6):
            raise ValueError(f"rows must be {[K, 6]}, as many as timesteps, got {list(steps.shape)}")
        embedding = embedding.contiguous()
        q_sample = None if q_sample is None else q_sample.contiguous()
        self.handle = _native.table(
            K,
            D,
            0 if steps is None else steps.data_ptr(),
            _at("embedding", embedding, K * D),
            0 if q_sample is None else _at("q_sample", q_sample, 2 * K),
        )
        self.num_steps = K


_uncounted = -1


def version(flat: Tensor) -> int:
    """The version counter of `flat`; of an inference tensor, which has none, a number never given before."""
    try:
        return flat._version
    except RuntimeError:
        global _uncounted
        _uncounted -= 1
        return _uncounted


def _empty(*shape: int) -> Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _at(name: str, tensor: Tensor, count: int) -> int:
    """Where a kernel finds these `count` float32 of the CPU's: every address that it gets comes from here, or is of a
    tensor that was made beside the call. That there is memory at all, the kernels' module looks at; that it has the
    tensor's sign, `dql.tensors.plain`.

    Raises:
        ValueError: it is another tensor than that, or its storage was made smaller.
    """
    if tensor.numel() != count or tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {count} float32 numbers in one piece on the CPU, got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}; convert it"
        )
    if count >= MANY and cut_off(tensor, count):
        raise ValueError(CUT_OFF.format(name=name, count=count))
    return tensor.data_ptr()


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; `values` is contiguous, float32 and on the CPU."""
    return _native.all_finite(values.data_ptr(), values.numel())


def intact(places: tuple[Any, ...], held: tuple[Any, ...], base: int) -> bool:
    """Whether parameters are where they were: each (dict, name, offset) of `places` still holds a tensor at
    `base` + offset, and each (dict, name, object) of `held` that object."""
    return _native.intact(places, held, base)


class Prepared:
    """A chain whose arguments were checked once, to be run often; see `intact` for `places` and `held`.

    Raises:
        RuntimeError: torch lacks the interface that this needs (`HAS_EXCHANGE`).
    """

    __slots__ = ("_references", "handle")

    def __init__(
        self,
        network: Network,
        table: Table,
        flat: Tensor,
        places: tuple[Any, ...],
        held: tuple[Any, ...],
        max_action: float,
        bf16: bool,
    ) -> None:
        if not HAS_EXCHANGE:
            raise RuntimeError("this version of torch has no __dlpack_c_exchange_api__")
        self._references = (network, table, flat, places, held)
        self.handle = _native.prepare(network.handle, table.handle, flat, places, held, max_action, bf16)

    def run(self, states: Tensor, actions: Tensor, seed: int) -> bool:
        """Fills actions [B, A] for states [B, S]. False, with nothing written, if anything is not as it was prepared:
        other sizes, dtypes or strides, replaced parameters, states that are not finite."""
        return _native.run_prepared(self.handle, states, actions, seed, torch.get_num_threads())


def chain(
    network: Network,
    flat: Tensor,
    table: Table,
    states: Tensor,
    candidates: int,
    noise: Tensor | None,
    seed: int,
    max_action: float,
    bf16: bool,
    save: bool = False,
) -> tuple[Tensor, Any]:
    """Runs the reverse chain, see `reference.chain_fwd`.

    Args:
        network: of `flat`.
        flat: parameters [P].
        table: the steps.
        states: [B, S].
        candidates: N.
        noise: [K, R, A], or None: then it is drawn from the seed, as `dql.noise.normal(seed, K, R, A)`.
        seed: 0 .. 2^64 - 1.
        max_action: the bound of actions and predicted x0.
        bf16: hidden layers' operands in bf16.
        save: keep what `chain_backward` needs.

    Returns:
        (actions [R, A], saved or None).
    """
    actions = _empty(states.size(0) * candidates, network.action_dim)  # [R, A]
    states, noise = states.contiguous(), None if noise is None else noise.contiguous()
    run = _native.chain_saved if save else _native.chain
    saved = run(*_arguments(network, flat, table, states, candidates, noise, seed, max_action, bf16, actions))
    return actions, saved


def _arguments(
    network: Network,
    flat: Tensor,
    table: Table,
    states: Tensor,
    candidates: int,
    noise: Tensor | None,
    seed: int,
    max_action: float,
    bf16: bool,
    actions: Tensor,
) -> tuple[Any, ...]:
    """What every native call that runs a chain begins with; the tensors must outlive the call."""
    B = states.size(0)
    return (
        network.handle,
        _at("flat", flat, network.size),
        version(flat),
        table.handle,
        _at("states", states, B * network.state_dim),
        B,
        candidates,
        0 if noise is None else _at("noise", noise, table.num_steps * B * candidates * network.action_dim),
        seed,
        max_action,
        bf16,
        torch.get_num_threads(),
        actions.data_ptr(),
    )


def chain_backward(
    network: Network,
    saved: Any,
    table: Table,
    states: Tensor,
    d_actions: Tensor,
    d_flat: Tensor | None,
    d_states: Tensor | None,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
) -> bool:
    """The gradient of `chain`, see `reference.chain_bwd`. It uses `saved` up.

    Args:
        network, table: as in `chain`.
        saved: what `chain` returned.
        states: [B, S].
        d_actions: [R, A].
        d_flat: [P], written (or added to) where parameters lie; None if not wanted.
        d_states: [B, S], written; None if not wanted.
        scale: a factor of d_actions.
        accumulate: add to d_flat.

    Returns:
        False, with nothing written, if `saved` was used before.
    """
    d_actions = d_actions.contiguous()
    states = states.contiguous()
    B, R = states.size(0), d_actions.size(0)
    return _native.chain_backward(
        network.handle,
        saved,
        table.handle,
        _at("states", states, B * network.state_dim),
        B,
        _at("d_actions", d_actions, R * network.action_dim),
        R,
        scale,
        0 if d_flat is None else _at("d_flat", d_flat, network.size),
        accumulate,
        0 if d_states is None else _at("d_states", d_states, B * network.state_dim),
        torch.get_num_threads(),
    )


def select(
    network: Network,
    flat: Tensor,
    table: Table,
    critic: Network,
    critic_flat: Tensor,
    states: Tensor,
    candidates: int,
    noise: Tensor | None,
    seed: int,
    draw_seed: int,
    max_action: float,
    bf16: bool,
) -> Tensor:
    """Of each state's N actions one, drawn from softmax(min(Q_1, Q_2)): [B, A]; arguments as in `chain`."""
    if (critic.state_dim, critic.action_dim) != (network.state_dim, network.action_dim):
        raise ValueError("the critic was made for other sizes of states and actions than the denoiser")
    chosen = _empty(states.size(0), network.action_dim)
    states, noise = states.contiguous(), None if noise is None else noise.contiguous()
    _native.select(
        *_arguments(network, flat, table, states, candidates, noise, seed, max_action, bf16, chosen),
        critic.handle,
        _at("critic_flat", critic_flat, critic.size),
        version(critic_flat),
        draw_seed,
    )
    return chosen


def draw(
    network: Network,
    flat: Tensor,
    table: Table,
    critic: Network,
    critic_flat: Tensor,
    states: Tensor,
    candidates: int,
    noise: Tensor | None,
    seed: int,
    draw_seed: int,
    max_action: float,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """What `select` takes of what: (all candidates [R, A], which of its N each state takes, int64 [B])."""
    if (critic.state_dim, critic.action_dim) != (network.state_dim, network.action_dim):
        raise ValueError("the critic was made for other sizes of states and actions than the denoiser")
    B = states.size(0)
    actions = _empty(B * candidates, network.action_dim)  # [R, A]
    index = torch.empty(B, dtype=torch.int64, device="cpu")
    states, noise = states.contiguous(), None if noise is None else noise.contiguous()
    _native.draw(
        *_arguments(network, flat, table, states, candidates, noise, seed, max_action, bf16, actions),
        critic.handle,
        _at("critic_flat", critic_flat, critic.size),
        version(critic_flat),
        draw_seed,
        index.data_ptr(),
    )
    return actions, index


def q_values(critic: Network, flat: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(Q_1, Q_2), each [R], of states [B, S] and actions [R, A], R = B * N."""
    states, actions = states.contiguous(), actions.contiguous()
    B, R = states.shape[0], actions.shape[0]
    q = _empty(2, R)
    _native.q_values(
        critic.handle,
        _at("flat", flat, critic.size),
        version(flat),
        _at("states", states, B * critic.state_dim),
        B,
        _at("actions", actions, B * (R // max(B, 1)) * critic.action_dim),
        R // max(B, 1),
        q.data_ptr(),
        q[1].data_ptr(),
        torch.get_num_threads(),
    )
    return q[0], q[1]


def target_q(
    critic: Network, flat: Tensor, states: Tensor, actions: Tensor, rewards: Tensor, masks: Tensor, discount: float
) -> tuple[Tensor, float]:
    """(r + mask * discount * min over i of max over n of Q_i(s, a_n) [B], its mean); actions [R, A]."""
    B = states.shape[0]
    out = _empty(B)
    mean = _native.target_q(
        critic.handle,
        _at("flat", flat, critic.size),
        version(flat),
        _at("states", states, B * critic.state_dim),
        B,
        _at("actions", actions, B * (actions.shape[0] // B) * critic.action_dim),
        actions.shape[0] // B,
        _at("rewards", rewards, B),
        _at("masks", masks, B),
        discount,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out, mean


def critic_gradient(
    critic: Network, flat: Tensor, states: Tensor, actions: Tensor, target: Tensor, d_flat: Tensor
) -> tuple[float, float]:
    """Writes the gradient of mean (Q_1 - y)^2 + mean (Q_2 - y)^2 into d_flat; returns (loss, mean of both Q)."""
    B = states.shape[0]
    return _native.critic_gradient(
        critic.handle,
        _at("flat", flat, critic.size),
        version(flat),
        _at("states", states, B * critic.state_dim),
        _at("actions", actions, B * critic.action_dim),
        B,
        _at("target", target, B),
        _at("d_flat", d_flat, critic.size),
        torch.get_num_threads(),
    )


def q_gradient(
    critic: Network, flat: Tensor, which: int, states: Tensor, actions: Tensor
) -> tuple[Tensor, float, float]:
    """(dQ_i/da [B, A], mean Q_i, mean |Q_j|), i being `which` (1 or 2) and j the other."""
    B = states.shape[0]
    d_actions = _empty(B, critic.action_dim)
    q, other = _native.q_gradient(
        critic.handle,
        _at("flat", flat, critic.size),
        version(flat),
        which - 1,
        _at("states", states, B * critic.state_dim),
        _at("actions", actions, B * critic.action_dim),
        B,
        d_actions.data_ptr(),
        torch.get_num_threads(),
    )
    return d_actions, q, other


def bc_gradient(
    network: Network,
    flat: Tensor,
    table: Table,
    states: Tensor,
    actions: Tensor,
    t_seed: int,
    noise_seed: int,
    predict_epsilon: bool,
    d_flat: Tensor,
) -> float:
    """Writes the gradient of the noise-prediction loss into d_flat and returns the loss.

    t is `dql.noise.integers(t_seed, T, B)` and the noise `dql.noise.normal(noise_seed, 1, B, A)[0]`; `table` holds the
    T timesteps 0 .. T - 1 and q_sample's coefficients.
    """
    B = states.shape[0]
    return _native.bc_gradient(
        network.handle,
        _at("flat", flat, network.size),
        version(flat),
        table.handle,
        _at("states", states, B * network.state_dim),
        _at("actions", actions, B * network.action_dim),
        B,
        t_seed,
        noise_seed,
        predict_epsilon,
        _at("d_flat", d_flat, network.size),
        False,
        torch.get_num_threads(),
    )


def adam(
    flat: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, step: int, max_norm: float
) -> float:
    """Clips the gradient to max_norm (0: never) and takes Adam's step number `step`; returns the norm before clipping.

    beta = (0.9, 0.999), eps = 1e-8. The tensors' version counters count it.
    """
    size = flat.numel()
    norm = _native.adam(
        _at("flat", flat, size),
        _at("gradient", gradient, size),
        _at("exp_avg", exp_avg, size),
        _at("exp_avg_sq", exp_avg_sq, size),
        size,
        lr,
        step,
        max_norm,
    )
    torch.autograd.graph.increment_version((flat, exp_avg, exp_avg_sq))
    return norm


def lerp(target: Tensor, source: Tensor, weight: float) -> None:
    """target += weight (source - target), in place."""
    size = target.numel()
    _native.lerp(_at("target", target, size), _at("source", source, size), size, weight)
    torch.autograd.graph.increment_version(target)


@dataclass(frozen=True)
class Weights:
    """A network in training and its parameters."""

    network: Network
    flat: Tensor

    def arguments(self, name: str) -> tuple[Any, ...]:
        return self.network.handle, _at(name, self.flat, self.network.size), version(self.flat)


@dataclass(frozen=True)
class Optimizer:
    """Adam's state of a network: gradient, exp_avg and exp_avg_sq [P], step []; the last three are changed in place."""

    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    lr: float
    max_norm: float

    def arguments(self, size: int) -> tuple[Any, ...]:
        return (
            _at("gradient", self.gradient, size),
            _at("exp_avg", self.exp_avg, size),
            _at("exp_avg_sq", self.exp_avg_sq, size),
            _at("step", self.step, 1),
            self.lr,
            self.max_norm,
        )


@dataclass(frozen=True)
class Critics:
    """What an agent of Diffusion-QL has beside its actor; `candidates` of max_q_backup, else 1."""

    ema_actor: Weights
    critic: Weights
    adam: Optimizer
    target: Weights
    table: Table
    discount: float
    eta: float
    tau: float
    candidates: int

    def arguments(self) -> tuple[Any, ...]:
        return (
            *self.ema_actor.arguments("the averaged actor's flat"),
            *self.critic.arguments("the critics' flat"),
            *self.adam.arguments(self.critic.network.size),
            *self.target.arguments("the target critics' flat"),
            self.discount,
            self.eta,
            self.tau,
            self.candidates,
            self.table.handle,
        )


PHASES = (
    "rows of the batch",
    "target: chain",
    "target: Q",
    "critics: gradient",
    "critics: Adam",
    "actor: noise-prediction loss",
    "actor: chain",
    "actor: gradient of Q",
    "actor: gradient of the chain",
    "actor: Adam",
    "averages",
)
"""Of an update of Diffusion-QL; one of behaviour cloning has the first, the sixth and the tenth."""


@dataclass(frozen=True)
class Updates:
    """n updates of one agent, one after the other.

    Attributes:
        actor, adam, loss_table, predict_epsilon, max_action: of the actor.
        critics: None of an agent that clones behaviour.
        data: states [N, S], actions [N, A], rewards [N], next_states [N, S], masks [N].
        rows: int64 [n, B] of the data; None: they are the one batch.
        seeds: the bits of each update's five seeds in the order of `dql.draws.UpdateSeeds`, int64 [n, 5].
        lr_scale, ema_weight: float64 [n].
        times: None, or int64 [n, 12] that is written: when each update began and each of its phases ended, see PHASES,
            in nanoseconds of `time.perf_counter_ns`.
    """

    actor: Weights
    adam: Optimizer
    loss_table: Table
    predict_epsilon: bool
    max_action: float
    critics: Critics | None
    data: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    rows: Tensor | None
    seeds: Tensor
    lr_scale: Tensor
    ema_weight: Tensor
    times: Tensor | None = None

    def arguments(self, metrics: Tensor) -> tuple[Any, ...]:
        S, A, N = self.actor.network.state_dim, self.actor.network.action_dim, len(self.data[0])
        names = zip(("states", "actions", "rewards", "next_states", "masks"), (S, A, 1, S, 1), strict=True)
        n = len(self.seeds)
        B = N if self.rows is None else self.rows.shape[1]
        return (
            *self.actor.arguments("flat"),
            *self.adam.arguments(self.actor.network.size),
            *(() if self.critics is None else self.critics.arguments()),
            self.loss_table.handle,
            self.predict_epsilon,
            self.max_action,
            *(_at(name, tensor, N * columns) for (name, columns), tensor in zip(names, self.data, strict=True)),
            N,
            0 if self.rows is None else _numbers("rows", self.rows, torch.int64, n, B),
            B,
            n,
            _numbers("seeds", self.seeds, torch.int64, n, 5),
            _numbers("lr_scale", self.lr_scale, torch.float64, n),
            _numbers("ema_weight", self.ema_weight, torch.float64, n),
            metrics.data_ptr(),
            0 if self.times is None else _numbers("times", self.times, torch.int64, n, 12),
        )

    def count_writes(self) -> None:
        """The version counters count every write, as the kernels did."""
        n = len(self.seeds)
        written = [self.actor.flat, self.adam.exp_avg, self.adam.exp_avg_sq, self.adam.step] * n
        if (c := self.critics) is not None:
            written += [c.critic.flat, c.adam.exp_avg, c.adam.exp_avg_sq, c.adam.step, c.target.flat] * n
            written += [c.ema_actor.flat] * int(self.ema_weight.count_nonzero())
        torch.autograd.graph.increment_version(written)


def learn(agents: Sequence[Updates], threads: int) -> list[Tensor]:
    """Whole updates of agents that share no network: the same bits whatever the number of threads and of agents.

    Several agents run side by side, a thread each; so few of them that more than half of the threads would be idle, one
    after the other on all.

    Returns:
        for each agent its metrics, float64 [n, 8]: loss, mean Q, mean target and gradient's norm of the critics; loss,
        its two terms and gradient's norm of the actor. Of an agent without critics [n, 2], loss and norm.
    """
    metrics = [
        torch.empty(len(agent.seeds), 2 if agent.critics is None else 8, dtype=torch.float64, device="cpu")
        for agent in agents
    ]
    try:
        _native.learn(tuple(agent.arguments(m) for agent, m in zip(agents, metrics, strict=True)), threads)
    finally:
        for agent in agents:
            agent.count_writes()
    return metrics


def _numbers(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{name} must be {dtype} {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.data_ptr()


def activate(kind: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """(activation, its derivative) as the kernels compute them; z is a vector whose size is a multiple of 16."""
    if z.numel() % 16:
        raise ValueError(f"z must have a multiple of 16 elements, got {z.numel()}")
    h = z.clone(memory_format=torch.contiguous_format)
    slope = torch.empty_like(h)
    _native.activate(ACTIVATIONS.index(kind), _at("z", h, z.numel()), slope.data_ptr(), z.numel())
    return h, slope


def fma_ceiling(seconds: float = 0.2, bf16: bool = False) -> float:
    """FLOP/s of multiply-adds on one core's registers alone: what no product can exceed."""
    return _native.fma_ceiling(seconds, bf16)
