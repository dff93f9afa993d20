"""The agents: DiffusionBC (behaviour cloning by diffusion) and DiffusionQL, which adds the twin critic.

All randomness of an update is a function of (config.seed, step): a resumed run continues exactly, and a run is the
same on every backend, to rounding.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import torch

from dql import update_native
from dql.backend.base import Backend
from dql.backend.registry import check_name
from dql.checkpoint import FILE, CheckpointError, checked_device, load_tensors, reading, save_tensors, unreadable
from dql.config import Config, RunConfig
from dql.data import Batch
from dql.draws import Draws, UpdateSeeds
from dql.finite import raise_if_set
from dql.networks import FlatModule, TwinCritic, check_file_sizes, check_finite
from dql.optimizer import FlatAdam
from dql.policy import DiffusionPolicy
from dql.rundir import RunDir, find_checkpoint
from dql.sampler import sample, select
from dql.shown import shown
from dql.tensors import plain, refuse_unseen
from dql.update import checked_batch, clone, draws_of, learn, target_q
from dql.update import update as do_update

Tensor = torch.Tensor
_FORMAT = 1


class DiffusionBC:
    """Behaviour cloning with a diffusion policy: the paper's ablation. No critic, no averaging, no clipping.

    Args:
        state_dim: S.
        action_dim: A.
        config: hyper-parameters; `algorithm` is set to this class's.
        device: where the networks live.
        dtype: of the parameters; float64 is for tests.

    Attributes:
        policy: the DiffusionPolicy that is trained.
        step: updates done.

    Raises:
        ValueError: a size that makes no network, no such backend, or no such device.
        TypeError: config is no Config, or dtype no dtype of floats.
    """

    algorithm = "diffusion-bc"

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        config: Config | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise TypeError(f"config must be a dql.Config, got a {type(config).__name__}; use dql.Config(lr=...)")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a torch.dtype of floats, got {shown(dtype)}; use torch.float32")
        self.config = replace(config or Config(), algorithm=self.algorithm)  # type: ignore[arg-type]
        check_name(self.config.backend)
        self.step = 0
        # Built on the CPU from the seed alone: the same weights on every device and in every thread, whatever others
        # draw from torch's own generator meanwhile.
        generator = torch.Generator("cpu").manual_seed(self.config.seed & (2**63 - 1))
        self._build(state_dim, action_dim, checked_device(device), dtype, generator)

    def _build(
        self,
        state_dim: int,
        action_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        c = self.config
        policy = DiffusionPolicy(
            state_dim,
            action_dim,
            c.max_action,
            c.hidden_dim,
            c.num_hidden,
            c.T,
            c.beta_schedule,
            activation=c.activation,
            generator=generator,
        )
        self.policy = policy.to(device=device, dtype=dtype)
        self.actor_adam = FlatAdam(self.policy.denoiser, c.lr, self._actor_grad_norm())

    def _actor_grad_norm(self) -> float:
        return 0.0

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def lr_scale(self, step: int | None = None) -> float:
        """Factor of both learning rates at this or another step: 1, or a cosine from 1 to 0 over config.num_updates."""
        if self.config.lr_schedule == "constant":
            return 1.0
        step = self.step if step is None else step
        return 0.5 * (1 + math.cos(math.pi * min(step / self.config.num_updates, 1.0)))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update from a batch.

        Args:
            batch: states [B, S], actions [B, A], and so on, on the agent's device and in its dtype.

        Returns:
            scalar tensors by name, still on the device: `actor/bc_loss`, `actor/grad_norm`.
        """
        return do_update(self, batch)

    def draws(self, B: int) -> Draws:
        """Those of the next update, with batches of B rows."""
        return draws_of(self, UpdateSeeds.of(self.config.seed, self.step), B)

    compute = clone
    update_natively = update_native.clone

    def ema_weight(self, step: int) -> float:
        return 0.0

    @overload
    def act(self, states: np.ndarray, *, seed: int | None = None) -> np.ndarray: ...

    @overload
    def act(self, states: Tensor, *, seed: int | None = None) -> Tensor: ...

    @torch.no_grad()
    def act(self, states: Tensor | np.ndarray, *, seed: int | None = None) -> Tensor | np.ndarray:
        """Actions to take: DiffusionBC draws one a state, DiffusionQL chooses among candidates (`dql.select`).

        Args:
            states: [B, S] or one state [S]; a tensor, or a NumPy array of any float type.
            seed: of the draws; None takes one from torch's generator.

        Returns:
            [B, A] or [A], a tensor or array as the states were.
        """
        if isinstance(states, np.ndarray):
            if states.dtype.kind not in "fiub":
                raise TypeError(
                    f"states must be an array of numbers, got dtype {states.dtype}; use states.astype(float)"
                )
            if isinstance(states, np.ma.MaskedArray) and np.ma.is_masked(states):
                raise ValueError("states have masked elements, which no policy knows; use states.filled(value)")
            if states.dtype.kind == "f" and states.dtype.itemsize > 8:
                states = states.astype(np.float64)  # torch has no long double
            # a copy where torch takes no array as it is: negative strides, another byte order
            native_order = states.dtype.newbyteorder("=")
            tensor = torch.as_tensor(
                np.ascontiguousarray(states, native_order), dtype=self.policy.dtype, device=self.device
            )
            actions = self.act(tensor, seed=seed).cpu().numpy()
            raise_if_set(tensor.device)  # they are here, so this is certain
            return actions
        if not isinstance(states, Tensor):
            raise TypeError(
                f"states must be a tensor or a NumPy array, got {type(states).__name__}; "
                "flatten observations first, take env.reset()[0], and of lists np.asarray(states)"
            )
        if states.is_nested:
            plain("states", states)  # says so
        if states.dim() == 1:
            return self._act(states[None], seed)[0]
        return self._act(states, seed)

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        return sample(states, self.policy, backend=self.config.backend, seed=seed)

    def trained(self) -> list[str]:
        """Names of the networks that have an optimizer."""
        return [name.removesuffix("_adam") for name in self._optimizers()]

    def modules(self) -> dict[str, FlatModule]:
        return {"actor": self.policy.denoiser}

    def _optimizers(self) -> dict[str, FlatAdam]:
        return {"actor_adam": self.actor_adam}

    def tensors(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs, beside the config and the step."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.modules().items():
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        for prefix, optimizer in self._optimizers().items():
            tensors |= {f"{prefix}.{name}": value for name, value in optimizer.tensors().items()}
        return tensors

    def moments(self) -> list[Tensor]:
        """The optimizers' tensors, which an update changes in place: Adam's step and both averages of each network."""
        return [tensor for optimizer in self._optimizers().values() for tensor in optimizer.tensors().values()]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever the block does to networks and optimizers is undone at its end, in their own memory."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.tensors().items():
                    if name in before:
                        tensor.copy_(before[name])
                    else:  # an optimizer's, made by its first step, which begins with zeros
                        tensor.zero_()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `agent.safetensors` (networks, optimizers, config, step) into the folder, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        about = {
            "kind": "agent",
            "format": _FORMAT,
            "state_dim": self.policy.state_dim,
            "action_dim": self.policy.action_dim,
            "step": self.step,
            "config": self.config.to_dict(),
        }
        save_tensors(Path(folder) / FILE, self.tensors(), about)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}

        for prefix, module in self.modules().items():
            module.load_state_dict(under(prefix))
            check_finite(module, f"the agent's {prefix}")
        for prefix, optimizer in self._optimizers().items():
            moments = under(prefix)
            shapes = {name: list(tensor.shape) for name, tensor in moments.items()}
            size = list(optimizer.module.flat.shape)
            if moments and shapes != {"step": [], "exp_avg": size, "exp_avg_sq": size}:
                raise ValueError(f"the optimizer {prefix} has {shapes}, which do not fit {size} parameters")
            optimizer.load(moments)


class DiffusionQL(DiffusionBC):
    """Diffusion Q-learning (arXiv 2208.06193, algorithm 1).

    An update is: (1) critics towards r + mask * discount * min(Q_1', Q_2')(s', a'), a' from the averaged actor's
    chain; (2) actor down bc_loss - eta * mean(Q_i(s, a)) / mean|Q_j(s, a)|, a from its chain with the gradient through
    all steps; (3) target critics by tau, and every `ema_every` updates from `ema_start` on the averaged actor.

    Args: as DiffusionBC.

    Attributes:
        policy, step: as DiffusionBC.
        ema_policy: the averaged actor.
        critic, critic_target: TwinCritic.
    """

    algorithm = "diffusion-ql"

    def _actor_grad_norm(self) -> float:
        return self.config.grad_norm

    def _build(
        self,
        state_dim: int,
        action_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super()._build(state_dim, action_dim, device, dtype, generator)
        c = self.config
        self.ema_policy = deepcopy(self.policy).requires_grad_(False)
        critic = TwinCritic(state_dim, action_dim, c.hidden_dim, c.num_hidden, c.activation, generator=generator)
        self.critic = critic.to(device=device, dtype=dtype)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.critic_adam = FlatAdam(self.critic, c.critic_lr, c.grad_norm)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of critics, actor and averages from a batch.

        Args:
            batch: states [B, S], actions [B, A], rewards [B], next_states [B, S], masks [B], in the agent's dtype
                and on its device. Its values are not looked at (that would make the host wait): NaN in them ends up
                in the parameters. `load_dataset` has looked at its own.

        Returns:
            scalar tensors by name, still on the device (no host sync): `critic/loss`, `critic/q` (mean of both),
            `critic/target_q`, `critic/grad_norm`, `actor/loss`, `actor/bc_loss`, `actor/q_loss`, `actor/grad_norm`.
        """
        return do_update(self, batch)

    compute = learn
    update_natively = update_native.learn

    @torch.no_grad()
    def target_q(self, batch: Batch, seed: int | Tensor, backend: Backend | None = None) -> Tensor:
        """r + mask * discount * min(Q_1', Q_2')(s', a') [B]; with max_q_backup each Q' is its best of 10 actions.

        Raises:
            TypeError, ValueError: the batch does not fit the agent.
            RuntimeError: a tracer is at work.
        """
        refuse_unseen("target_q", *vars(batch).values() if isinstance(batch, Batch) else ())
        return target_q(self, checked_batch(batch, self.policy, least=0), seed, backend)

    def ema_weight(self, step: int) -> float:
        c = self.config
        return 1 - c.ema_decay if step >= c.ema_start and step % c.ema_every == 0 else 0.0

    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        c = self.config
        return select(
            states, self.policy, self.critic_target, num_candidates=c.num_candidates, backend=c.backend, seed=seed
        )

    def modules(self) -> dict[str, FlatModule]:
        return super().modules() | {
            "ema_actor": self.ema_policy.denoiser,
            "critic": self.critic,
            "critic_target": self.critic_target,
        }

    def _optimizers(self) -> dict[str, FlatAdam]:
        return super()._optimizers() | {"critic_adam": self.critic_adam}


def make_agent(
    state_dim: int,
    action_dim: int,
    config: Config,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiffusionBC | DiffusionQL:
    """The agent that `config.algorithm` names."""
    cls = DiffusionQL if config.algorithm == "diffusion-ql" else DiffusionBC
    return cls(state_dim, action_dim, config, device=device, dtype=dtype)


def load(
    folder: str | os.PathLike[str],
    which: str = "last",
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> DiffusionBC | DiffusionQL:
    """The agent of a run, or the one that `agent.save(folder)` wrote. No code in the files is run.

    Args:
        folder: a run folder, one with `agent.safetensors`, or that file.
        which: of a run: "last", "best", "offline" or a step, see `dql.evaluate.select_checkpoints`.
        device: where to put it.
        backend: of `dql.backends()`, or "auto"; None keeps the one that it was trained with.

    Raises:
        CheckpointError: missing, damaged, or no agent.
        RunError: the run has no such checkpoint.
        ValueError: there is no such device or backend.
    """
    device = checked_device(device)
    if backend is not None:
        check_name(backend)
    named = None
    try:
        is_run = (Path(folder) / "config.json").is_file()
    except OSError as error:  # a name too long
        raise unreadable(Path(folder), error) from error
    run = None
    if is_run:
        run = RunConfig.from_dict(RunDir(folder).read_config()["run"])
        folder = find_checkpoint(folder, which)
        named = int(folder.name.removeprefix("step-"))
    path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE  # the file itself will do
    tensors, about = load_tensors(path)
    if about.get("kind") != "agent":
        raise CheckpointError(f"{path} holds no agent but a {about.get('kind')}; for a policy use DiffusionPolicy.load")
    with reading(path, about, _FORMAT):
        config, dtype = Config.from_dict(about["config"]), tensors["actor.final_layer.bias"].dtype
        sizes = (about["state_dim"], about["action_dim"], config.hidden_dim, config.num_hidden)
        check_file_sizes(tensors, "actor.", *sizes)
        if run is not None and (differing := run.agent.differences(config)):
            raise ValueError(f"it is another run's, of {differing[0]}")
        if type(about["step"]) is not int or not 0 <= about["step"] < 1 << 63:
            raise ValueError(f"step {shown(about['step'])} is no number of updates")
        config = config if backend is None else replace(config, backend=backend)
        loaded = make_agent(about["state_dim"], about["action_dim"], config, dtype=dtype)
        loaded._load(tensors)
        loaded.step = about["step"]
        if named is not None and loaded.step != named:
            raise ValueError(f"it is of update {loaded.step:,}, its folder is named for {named:,}")
    if device.type == "cpu":
        return loaded
    agent = make_agent(about["state_dim"], about["action_dim"], config, device=device, dtype=dtype)
    agent._load(tensors)
    agent.step = loaded.step
    return agent
