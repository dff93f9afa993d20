"""Hyper-parameters: `Config` of an agent, `RunConfig` of a run, and the paper's 20 tuned tasks."""

import functools
import math
import numbers
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dql.schedule import LARGEST
from dql.shown import shown


def plain_value(name: str, kind: Any, value: Any) -> Any:
    """The value as the plain Python object that a field of this kind holds, NumPy's numbers among what is welcome.

    Raises:
        ValueError: it is of another kind; the sentence names the field and the value.
    """
    options = get_args(kind)
    if type(None) in options:
        if value is None:
            return None
        (kind,) = (option for option in options if option is not type(None))
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {shown(value)}")
        return str(value)
    is_bool = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # NumPy's, no subclass
    if kind is bool:
        if not is_bool:
            raise ValueError(f"{name} must be True or False, got {shown(value)}")
        return bool(value)
    if kind is int:
        if is_bool or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be an integer, got {shown(value)}")
        if abs(int(value)) > 1 << 64:
            raise ValueError(f"{name} must be below 2^64, got a number of {int(value).bit_length()} bits")
        return int(value)
    if kind is float:
        # An integer stays one if it is Python's: "got 0" is what was given.
        if is_bool or not isinstance(value, numbers.Real) or not _is_finite(value):
            raise ValueError(f"{name} must be a finite number, got {shown(value)}")
        return value if type(value) is int else float(value)
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} must be a string, got {shown(value)}")
        return str(value)
    if kind is Path:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} must be a path, got {shown(value)}")
        return Path(value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a dql.{kind.__name__}, got {shown(value)}")
    return value


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


_hints = functools.cache(get_type_hints)


def _check_fields(config: Any) -> None:
    for name, kind in _hints(config.__class__).items():
        object.__setattr__(config, name, plain_value(name, kind, getattr(config, name)))


@dataclass(frozen=True)
class Config:
    """What an agent is made of. The defaults are the paper's; `Config.tuned` gives its choice for a task.

    Where a default is the algorithm's own, it is set when the config is made. `config.of(algorithm)` is the same for
    another algorithm; `dataclasses.replace(config, algorithm=...)` takes all values over. A field that the algorithm
    does not read, and that is not as it stands here, is refused.
    """

    algorithm: Literal["diffusion-ql", "diffusion-bc", "bc", "bc-gaussian", "td3-bc", "iql"] = "diffusion-ql"
    """diffusion-ql; its ablation diffusion-bc: no critic, no Q term, one sample to act; or a baseline: behaviour
    cloning of an action (bc) or a Gaussian (bc-gaussian), TD3+BC (td3-bc), IQL (iql)."""
    max_action: float = 1.0
    """Actions lie in [-max_action, max_action]; a run takes it from its dataset."""
    hidden_dim: int = 256
    """Width of the hidden layers, denoiser and critics."""
    num_hidden: int = 0
    """Hidden layers of each network; 0 takes the algorithm's own: 3, of the baselines 2."""
    activation: Literal["auto", "mish", "relu", "silu"] = "auto"
    """Activation of the hidden layers; auto takes the algorithm's own: mish, of the baselines relu."""
    T: int = 5
    """Diffusion steps."""
    beta_schedule: Literal["vp", "linear", "cosine"] = "vp"
    """Noise schedule."""
    eta: float = 1.0
    """Weight of the Q term in the actor's loss."""
    actor_gradient: Literal["chain", "one-step"] = "chain"
    """Where the Q term's action comes from: the whole chain, as in the paper, or EDP's approximation of it from the
    behaviour-cloning loss's own prediction, in one step (arXiv 2305.20081)."""
    discount: float = 0.99
    """Discount of the return."""
    tau: float = 0.005
    """Step of the target critics towards the critics, every update."""
    max_q_backup: bool = False
    """Bootstrap from the best of `backup_candidates` actions instead of from one."""
    backup_candidates: int = 10
    """Actions per next state for max_q_backup."""
    lr: float = 3e-4
    """Adam's learning rate for the actor."""
    critic_lr: float = 3e-4
    """Adam's learning rate for the critics (and IQL's value); the published code never changes it."""
    lr_schedule: Literal["auto", "constant", "cosine"] = "auto"
    """constant (what the published commands amount to), or a cosine to zero over num_updates; auto takes the
    algorithm's own: constant, of iql (for its actor alone) the cosine."""
    grad_norm: float = 1.0
    """Gradients are clipped to this norm, actor and critics each; 0 for no clipping. diffusion-bc never clips."""
    ema_decay: float = 0.995
    """Decay of the averaged actor, from which the critic's targets act."""
    ema_every: int = 5
    """Updates between two steps of the average."""
    ema_start: int = 1000
    """First update with such a step; until then the averaged actor is the initial one."""
    batch_size: int = 256
    """Transitions per update."""
    num_updates: int = 1_000_000
    """Length of a run, and of the cosine."""
    num_candidates: int = 50
    """Actions drawn to act, of which one is chosen by softmax(Q)."""
    alpha: float = 2.5
    """Of td3-bc: weight of the Q term in the actor's loss."""
    policy_noise: float = 0.2
    """Of td3-bc: deviation of the noise on the target's actions, for max_action 1."""
    noise_clip: float = 0.5
    """Of td3-bc: bound of that noise, for max_action 1."""
    policy_delay: int = 2
    """Of td3-bc: updates between two steps of actor and targets."""
    expectile: float = 0.7
    """Of iql: which expectile of Q the value learns."""
    temperature: float = 3.0
    """Of iql: inverse temperature of the weights exp(temperature * advantage)."""
    advantage_clip: float = 100.0
    """Of iql: bound of those weights."""
    reward_tune: Literal["none", "normalize", "iql_antmaze", "iql_locomotion", "cql_antmaze", "antmaze"] = "none"
    """Transformation of the rewards."""
    backend: str = "auto"
    """Who runs the reverse chain: auto or one of dql.backends()."""
    seed: int = 0
    """Of everything random: initial weights, data order, noise."""

    def __post_init__(self) -> None:
        _check_fields(self)
        for name, (none, own) in _OWN.items():
            if getattr(self, name) == none:
                object.__setattr__(self, name, own.get(self.algorithm, own["else"]))
        self._refuse_unread()
        for name in (
            "hidden_dim",
            "num_hidden",
            "T",
            "policy_delay",
            "backup_candidates",
            "ema_every",
            "batch_size",
            "num_updates",
            "num_candidates",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "critic_lr", "max_action", "temperature", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 1 / LARGEST <= self.max_action <= LARGEST:
            raise ValueError(f"max_action must be from {1 / LARGEST:g} to {LARGEST:g}, got {self.max_action}")
        for name in ("discount", "tau", "ema_decay", "expectile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("eta", "grad_norm", "ema_start", "alpha", "policy_noise", "noise_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")

    def _refuse_unread(self) -> None:
        """Raises ValueError for a field that was set and that the algorithm does not read: it would do nothing."""
        for name, algorithms in _unread(self.algorithm).items():
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(
                    f"{name} is read by {' and '.join(algorithms)} alone, and this is {self.algorithm}; leave it out"
                )

    def of(self, algorithm: str, **changes: Any) -> "Config":
        """The config with another algorithm: what that does not read is left out, and where a value is the default of
        this algorithm alone, it becomes the other's.

        Args:
            algorithm: its name.
            changes: other fields, which the algorithm has to read.
        """
        values = {name: value for name, value in self.to_dict().items() if name not in _unread(algorithm)}
        for name, (none, own) in _OWN.items():
            if values[name] == own.get(self.algorithm, own["else"]):
                values[name] = none
        return type(self)(**(values | changes | {"algorithm": algorithm}))

    @classmethod
    def tuned(cls, task: str, **changes: Any) -> "Config":
        """The paper's hyper-parameters for one of its 20 tasks, e.g. "hopper-medium-expert-v2".

        Raises:
            ValueError: no such task.
        """
        if not isinstance(task, str) or task not in TUNED:
            raise ValueError(f"no tuned hyper-parameters for {shown(task)}; known: {', '.join(TUNED)}")
        if changes.get("algorithm", "diffusion-ql") not in DIFFUSION:
            raise ValueError(
                f"the paper's hyper-parameters are of {' and '.join(DIFFUSION)} alone, not of "
                f"{shown(changes['algorithm'])}; leave the task out"
            )
        t = TUNED[task]
        values: dict[str, Any] = {
            "lr": t.lr,
            "eta": t.eta,
            "max_q_backup": t.max_q_backup,
            "reward_tune": t.reward_tune,
            "num_updates": t.epochs * 1000,
            "grad_norm": t.grad_norm,
        }
        unread = _unread(changes.get("algorithm", "diffusion-ql"))
        return cls(**({name: value for name, value in values.items() if name not in unread} | changes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, saved: "Config") -> list[str]:
        """In what a checkpoint's config is another run's; the length may have been changed since it was saved."""
        ours, its = self.to_dict(), saved.to_dict()
        if self.lr_schedule == "constant":
            its["num_updates"] = ours["num_updates"]
        return [f"{name} {its[name]!r}, the run's is {ours[name]!r}" for name in ours if its[name] != ours[name]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`. Raises ValueError for a field that this version does not have.

        Of diffusion-bc, what only diffusion-ql reads is left out: an earlier version wrote it, and it did nothing.
        """
        values = _known(cls, values)
        if values.get("algorithm") == "diffusion-bc":
            return cls(**values | {"algorithm": "diffusion-ql"}).of("diffusion-bc")
        return cls(**values)


DIFFUSION = ("diffusion-ql", "diffusion-bc")
"""The algorithms whose policy is a reverse chain."""

# Fields whose default depends on the algorithm: the value that stands for it, and the algorithms' own.
_OWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_hidden": (0, dict.fromkeys(DIFFUSION, 3) | {"else": 2}),
    "activation": ("auto", dict.fromkeys(DIFFUSION, "mish") | {"else": "relu"}),
    "lr_schedule": ("auto", {"iql": "cosine", "else": "constant"}),
}

# Which algorithms read a field, where it is not all of them.
_READ_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    DIFFUSION: ("T", "beta_schedule", "backend"),
    ("diffusion-ql",): (
        "eta",
        "actor_gradient",
        "max_q_backup",
        "backup_candidates",
        "grad_norm",
        "ema_decay",
        "ema_every",
        "ema_start",
        "num_candidates",
    ),
    ("diffusion-ql", "td3-bc", "iql"): ("discount", "tau", "critic_lr"),
    ("td3-bc",): ("alpha", "policy_noise", "noise_clip", "policy_delay"),
    ("iql",): ("expectile", "temperature", "advantage_clip"),
}
_DEFAULTS = {f.name: f.default for f in fields(Config)}


def _unread(algorithm: str) -> dict[str, tuple[str, ...]]:
    """The fields that the algorithm does not read, each with those that do."""
    return {name: who for who, names in _READ_BY.items() if algorithm not in who for name in names}


@dataclass(frozen=True)
class RunConfig:
    """One training run: the data, how long, and what is written when."""

    dataset: str
    """A Minari dataset id, ids joined by +, a folder of one, or a D4RL .hdf5 file."""
    agent: Config = field(default_factory=Config)
    """The agent's hyper-parameters."""
    run_dir: Path | None = None
    """Where the run is written; by default runs/<dataset>-<algorithm>-seed<seed>."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    data_on: Literal["auto", "device", "disk"] = "auto"
    """Where the dataset lies: in the device's memory; or on disk, in the cache, from which batches are fetched ahead of
    need; auto leaves it on disk if it takes more than half of the memory that is free. The batches are the same."""
    log_every: int = 100
    """Updates between two lines of metrics.csv, each the mean since the last."""
    checkpoint_every: int = 5000
    """Updates between two checkpoints; a killed run loses at most this many."""
    keep: int = 3
    """Newest checkpoints kept, beside those that model selection may ask for."""
    eval_every: int = 50_000
    """Updates between two evaluations, and once at the end; 0 for none."""
    eval_at_start: bool = False
    """Evaluate the agent before its first update, too."""
    eval_episodes: int = 10
    """Episodes of an evaluation."""
    eval_max_steps: int | None = None
    """Steps after which an episode of an evaluation is cut; needed where the environment has no time limit."""
    env: str | None = None
    """Gymnasium id to evaluate in, where the dataset names none."""
    top_k: int = 1
    """Offline model selection takes the checkpoint whose bc_loss ranks this (0 is the lowest)."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    drop_broken: bool = False
    """Leave out a Minari dataset's episodes that lack something or hold what cannot be used, instead of refusing it."""
    graphed: bool = False
    """On a GPU, record the update as a CUDA graph and replay it: one launch instead of one for each small kernel."""

    def __post_init__(self) -> None:
        if type(self.device).__name__ == "device":  # torch's
            object.__setattr__(self, "device", str(self.device))
        _check_fields(self)
        for name in ("log_every", "checkpoint_every", "keep", "eval_episodes", "eval_max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("eval_every", "top_k", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`. Raises ValueError for a field that is missing or unknown to this version."""
        values = _known(cls, values)
        for name in ("dataset", "agent"):
            if name not in values:
                raise ValueError(f"RunConfig field {name!r} is missing")
        return cls(**values | {"agent": Config.from_dict(values["agent"])})

    def with_agent(self, **changes: Any) -> "RunConfig":
        """The run with these fields of its agent changed; of another algorithm as `Config.of`."""
        if changes.get("algorithm", self.agent.algorithm) != self.agent.algorithm:
            return replace(self, agent=self.agent.of(**changes))
        return replace(self, agent=replace(self.agent, **changes))


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"the fields of a {cls.__name__} must be a dictionary, got {values!r:.80}")
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - names)
    if unknown:
        raise ValueError(f"unknown {cls.__name__} field {unknown[0]!r}; written by another version of dql?")
    return dict(values)


@dataclass(frozen=True)
class Tuned:
    """The published choices for one task (arXiv 2208.06193, appendix; repository main.py)."""

    lr: float
    eta: float
    max_q_backup: bool
    reward_tune: str
    epochs: int
    """Of 1,000 updates."""
    grad_norm: float
    top_k: int
    """Rank by bc_loss of the checkpoint that offline selection takes; see RunConfig.top_k."""


def tuned_eval_episodes(task: str) -> int:
    """Episodes of the published evaluations: 10 for the Gym tasks (-v2), 100 for the others."""
    return 10 if "v2" in task else 100


TUNED: dict[str, Tuned] = {
    "halfcheetah-medium-v2": Tuned(3e-4, 1.0, False, "none", 2000, 9.0, 1),
    "hopper-medium-v2": Tuned(3e-4, 1.0, False, "none", 2000, 9.0, 2),
    "walker2d-medium-v2": Tuned(3e-4, 1.0, False, "none", 2000, 1.0, 1),
    "halfcheetah-medium-replay-v2": Tuned(3e-4, 1.0, False, "none", 2000, 2.0, 0),
    "hopper-medium-replay-v2": Tuned(3e-4, 1.0, False, "none", 2000, 4.0, 2),
    "walker2d-medium-replay-v2": Tuned(3e-4, 1.0, False, "none", 2000, 4.0, 1),
    "halfcheetah-medium-expert-v2": Tuned(3e-4, 1.0, False, "none", 2000, 7.0, 0),
    "hopper-medium-expert-v2": Tuned(3e-4, 1.0, False, "none", 2000, 5.0, 2),
    "walker2d-medium-expert-v2": Tuned(3e-4, 1.0, False, "none", 2000, 5.0, 1),
    "antmaze-umaze-v0": Tuned(3e-4, 0.5, False, "cql_antmaze", 1000, 2.0, 2),
    "antmaze-umaze-diverse-v0": Tuned(3e-4, 2.0, True, "cql_antmaze", 1000, 3.0, 2),
    "antmaze-medium-play-v0": Tuned(1e-3, 2.0, True, "cql_antmaze", 1000, 2.0, 1),
    "antmaze-medium-diverse-v0": Tuned(3e-4, 3.0, True, "cql_antmaze", 1000, 1.0, 1),
    "antmaze-large-play-v0": Tuned(3e-4, 4.5, True, "cql_antmaze", 1000, 10.0, 2),
    "antmaze-large-diverse-v0": Tuned(3e-4, 3.5, True, "cql_antmaze", 1000, 7.0, 1),
    "pen-human-v1": Tuned(3e-5, 0.15, False, "normalize", 1000, 7.0, 2),
    "pen-cloned-v1": Tuned(3e-5, 0.1, False, "normalize", 1000, 8.0, 2),
    "kitchen-complete-v0": Tuned(3e-4, 0.005, False, "none", 250, 9.0, 2),
    "kitchen-partial-v0": Tuned(3e-4, 0.005, False, "none", 1000, 10.0, 2),
    "kitchen-mixed-v0": Tuned(3e-4, 0.005, False, "none", 1000, 10.0, 0),
}
