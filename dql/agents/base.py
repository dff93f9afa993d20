"""What every agent has: its config and seed, `update` and `act`, and a file that holds all of it.

All randomness of an update is a function of (config.seed, step): a resumed run continues exactly.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch

from dql import noise
from dql.checkpoint import FILE, checked_device, save_tensors
from dql.config import Config
from dql.data import Batch
from dql.finite import raise_if_set
from dql.networks import FlatModule, check_finite, checked_sizes
from dql.optimizer import FlatAdam
from dql.shown import shown
from dql.tensors import plain

if TYPE_CHECKING:
    from dql.data import TransitionDataset

Tensor = torch.Tensor
FORMAT = 1  # of the file that `save` writes


class Agent(ABC):
    """An agent that learns from batches of transitions.

    Args:
        state_dim: S.
        action_dim: A.
        config: hyper-parameters, of this algorithm; None takes its own defaults.
        device: where the networks live.
        dtype: of the parameters; float64 is for tests.

    Attributes:
        step: updates done.

    Raises:
        ValueError: a size that makes no network, a config of an algorithm with other networks, or no such device.
        TypeError: config is no Config, or dtype no dtype of floats.
    """

    algorithm: ClassVar[str]

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
        self.config = self._checked_config(config)
        state_dim, action_dim = checked_sizes(state_dim=state_dim, action_dim=action_dim)
        self.state_dim, self.action_dim, self.step = state_dim, action_dim, 0
        # Built on the CPU from the seed alone: the same weights on every device and in every thread, whatever others
        # draw from torch's own generator meanwhile.
        generator = torch.Generator("cpu").manual_seed(self.config.seed & (2**63 - 1))
        self._build(state_dim, action_dim, checked_device(device), dtype, generator)

    @classmethod
    def _checked_config(cls, config: Config | None) -> Config:
        if config is None:
            return Config(algorithm=cls.algorithm)  # type: ignore[arg-type]
        if config.algorithm != cls.algorithm:
            raise ValueError(
                f"the config is of {config.algorithm}, whose networks are others than those of {cls.algorithm}; use "
                f"dql.Config(algorithm={cls.algorithm!r}, ...)"
            )
        return config

    @abstractmethod
    def _build(
        self, state_dim: int, action_dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        """Makes networks and optimizers."""

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update from a batch; returns scalar tensors by name, among them `actor/bc_loss`."""

    @abstractmethod
    def modules(self) -> dict[str, FlatModule]:
        """The networks by name; "actor" is one."""

    @abstractmethod
    def _optimizers(self) -> dict[str, FlatAdam]:
        """The optimizers by name, NETWORK_adam."""

    @abstractmethod
    def _act(self, states: Tensor, seed: int | None) -> Tensor:
        """Actions [B, A] for states [B, S] that no one has looked at."""

    @classmethod
    @abstractmethod
    def check_file(cls, tensors: Mapping[str, Tensor], state_dim: Any, action_dim: Any, config: Config) -> None:
        """Compares the sizes that a file names with those of its tensors, before memory is taken for them.

        Raises:
            ValueError: they differ. KeyError, IndexError: a tensor is missing, or has other dimensions.
        """

    def begin(self, data: "TransitionDataset") -> None:  # noqa: B027 (most take nothing)
        """Takes from the whole dataset, once before the first update, what the algorithm needs to know of it."""

    def save_policy(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy alone, as `DiffusionPolicy.save`.

        Raises:
            ValueError: it is none that `dql.DiffusionPolicy.load` reads.
        """
        raise ValueError(
            f"an agent of {self.algorithm} has no diffusion policy; write all of it with agent.save(folder)"
        )

    @property
    def device(self) -> torch.device:
        return self.modules()["actor"].flat.device

    @property
    def dtype(self) -> torch.dtype:
        return self.modules()["actor"].flat.dtype

    def lr_scale(self, step: int | None = None) -> float:
        """Factor of the learning rates at this or another step: 1, or a cosine from 1 to 0 over config.num_updates."""
        if self.config.lr_schedule == "constant":
            return 1.0
        step = self.step if step is None else step
        return 0.5 * (1 + math.cos(math.pi * min(step / self.config.num_updates, 1.0)))

    @overload
    def act(self, states: np.ndarray, *, seed: int | None = None) -> np.ndarray: ...

    @overload
    def act(self, states: Tensor, *, seed: int | None = None) -> Tensor: ...

    @torch.no_grad()
    def act(self, states: Tensor | np.ndarray, *, seed: int | None = None) -> Tensor | np.ndarray:
        """Actions to take, as the algorithm is evaluated: its class says whether they are drawn, and how.

        Args:
            states: [B, S] or one state [S]; a tensor, or a NumPy array of any float type.
            seed: of the draws; None takes one from torch's generator.

        Returns:
            [B, A] or [A], a tensor or array as the states were.

        Raises:
            ValueError: states of another size or dtype, or a seed out of range; NaN or infinity in states or actions,
                where looking does not wait for a GPU: with tensors on one, see `dql.check_states`.
            TypeError: states that are no tensor or array of numbers.
        """
        if seed is not None:
            noise.check_seed(seed)
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
            tensor = torch.as_tensor(np.ascontiguousarray(states, native_order), dtype=self.dtype, device=self.device)
            actions = self.act(tensor, seed=seed).cpu()
            raise_if_set(tensor.device)  # they are here, so this is certain
            if not tensor.is_cpu:  # else `_act` has looked
                checked_actions(actions, self.modules()["actor"])
            return actions.numpy()
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

    def trained(self) -> list[str]:
        """Names of the networks that have an optimizer."""
        return [name.removesuffix("_adam") for name in self._optimizers()]

    def check_optimizers(self) -> None:
        """Raises RuntimeError for a network that was put in another's place: its optimizer would go on with that."""
        modules = self.modules()
        for name, optimizer in self._optimizers().items():
            network = name.removesuffix("_adam")
            if optimizer.module is not modules[network]:
                raise RuntimeError(
                    f"the agent's {network} was replaced, and its optimizer has the one before: nothing would "
                    "be learnt; load parameters into the network that is there (load_state_dict) instead"
                )

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
            ValueError: its networks have different dtypes; no such agent is read.
        """
        for name, module in self.modules().items():
            if module.flat.dtype != self.dtype:
                raise ValueError(f"its {name} is {module.flat.dtype}, and its actor {self.dtype}; convert all of them")
        about = {
            "kind": "agent",
            "format": FORMAT,
            "state_dim": self.state_dim,
            "action_dim": self.action_dim,
            "step": self.step,
            "config": self.config.to_dict(),
        }
        save_tensors(Path(folder) / FILE, self.tensors(), about)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave.

        Raises:
            ValueError, TypeError, RuntimeError: they are not such an agent's, one too many or too few, or not finite.
        """
        adams = {f"{prefix}.{name}" for prefix in self._optimizers() for name in ("step", "exp_avg", "exp_avg_sq")}
        if foreign := sorted(tensors.keys() - self.tensors().keys() - adams):
            raise ValueError(f"it has {shown(foreign[0])}, which an agent of {self.algorithm} has not")
        for prefix, module in self.modules().items():
            held = _under(prefix, tensors)
            if others := sorted(name for name, tensor in held.items() if tensor.dtype != self.dtype):
                raise ValueError(
                    f"its {prefix}.{others[0]} is {held[others[0]].dtype}, and its actor's parameters are {self.dtype}"
                )
            module.load_state_dict(held)
            check_finite(module, f"the agent's {prefix}")
        for prefix, optimizer in self._optimizers().items():
            moments = _under(prefix, tensors)
            shapes = {name: list(tensor.shape) for name, tensor in moments.items()}
            size = list(optimizer.module.flat.shape)
            if moments and shapes != {"step": [], "exp_avg": size, "exp_avg_sq": size}:
                raise ValueError(f"the optimizer {prefix} has {shapes}, which do not fit {size} parameters")
            optimizer.load(moments)

    def check_moments(self) -> None:
        """Raises ValueError if an optimizer has no state although updates were done: they would not go on as they
        were, and nothing would say so."""
        for name, optimizer in self._optimizers().items():
            if self.step >= self._first_step(name) and not optimizer.tensors():
                raise ValueError(f"it has done {self.step:,} updates, and Adam's state of {name} is missing")

    def _first_step(self, optimizer: str) -> int:
        """The update (from 1) in which an optimizer takes its first step."""
        return 1


def checked_actions(actions: Tensor, network: FlatModule) -> Tensor:
    """The actions, refused (ValueError) if they are NaN, where looking does not wait for a GPU."""
    if actions.is_cpu and not bool(actions.isfinite().all()):
        check_finite(network, "the actor")  # which is the cause, mostly
        raise ValueError(
            f"the actions are NaN, because the network left the range of {actions.dtype}: states or parameters are too "
            "large; scale them"
        )
    return actions


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
