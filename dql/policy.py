"""DiffusionPolicy: a denoiser, the schedule it was trained with, and the action bound."""

import numbers
import os
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from dql.backend.kept import Kept
from dql.checkpoint import CheckpointError, checked_device, load_tensors, reading, save_tensors
from dql.networks import (
    Denoiser,
    check_file_sizes,
    check_finite,
    check_published,
    check_state_dict,
    load_published,
)
from dql.schedule import BETA_SCHEDULES, LARGEST, NoiseSchedule, StepTable
from dql.shown import shown

Tensor = torch.Tensor
_FORMAT = 1


def checked_bound(max_action: Any) -> float:
    """`max_action` as a float; NumPy's numbers are welcome.

    Raises:
        ValueError: it is no number, or none that float32 can compute with.
    """
    is_real = isinstance(max_action, numbers.Real)
    if not is_real or not 1 / LARGEST <= max_action <= LARGEST:
        raise ValueError(
            f"max_action must be a positive number, got {shown(max_action)}; it bounds the actions, from "
            f"{1 / LARGEST:g} to {LARGEST:g}"
        )
    return float(max_action)


def check_bound_fits(max_action: float, dtype: torch.dtype) -> None:
    """Raises ValueError if `max_action` is no normal number of the dtype: half precision ends at 65,504."""
    numbers_of = torch.finfo(dtype)
    if not numbers_of.smallest_normal <= max_action <= numbers_of.max:
        raise ValueError(
            f"max_action = {max_action:g} is beyond what {dtype} holds, from {numbers_of.smallest_normal:g} to "
            f"{numbers_of.max:g}; use policy.float()"
        )


class DiffusionPolicy(nn.Module):
    """A policy pi(a | s) given by the reverse diffusion of a conditional MLP (Diffusion-QL, arXiv 2208.06193).

    Args:
        state_dim: S.
        action_dim: A.
        max_action: actions lie in [-max_action, max_action].
        hidden_dim: H.
        num_hidden: hidden layers of the denoiser.
        T: diffusion steps.
        beta_schedule: "vp" (the paper's), "linear" or "cosine".
        time_dim: size of the time embedding.
        activation: "mish" (the paper's), "relu" or "silu".
        predict_epsilon: the denoiser predicts the noise (the paper's); False: it predicts x_0.
        generator: of the initial weights, a CPU generator; None draws from torch's own, as every nn.Module does.

    Attributes:
        denoiser: the network; `denoiser.flat` holds its parameters.
        schedule: the NoiseSchedule.
        kept: what backends derive from the policy and keep with it.

    Raises:
        ValueError: an argument that makes no policy, named with its value.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float = 1.0,
        hidden_dim: int = 256,
        num_hidden: int = 3,
        T: int = 5,
        beta_schedule: str = "vp",
        time_dim: int = 16,
        activation: str = "mish",
        predict_epsilon: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_action = max_action
        self.schedule = NoiseSchedule(beta_schedule, T)
        self.predict_epsilon = bool(predict_epsilon)
        self.denoiser = Denoiser(
            state_dim, action_dim, hidden_dim, num_hidden, time_dim, activation, generator=generator
        )
        self._q_sample_table: tuple[NoiseSchedule | None, Tensor | None] = (None, None)
        self.kept = Kept()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but what does not fit is refused in one sentence, and then nothing was loaded.

        Raises:
            RuntimeError: keys are missing or unknown, or shapes differ.
            TypeError, ValueError: a value is no tensor with memory; assign=True.
        """
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_action":
            value = checked_bound(value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": Kept()}  # of a shallow copy too: what is kept was made for this policy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"kept": Kept()} | state)

    @property
    def state_dim(self) -> int:
        return self.denoiser.spec.state_dim

    @property
    def action_dim(self) -> int:
        return self.denoiser.spec.action_dim

    @property
    def T(self) -> int:
        return self.schedule.T

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.flat.dtype

    @property
    def device(self) -> torch.device:
        return self.denoiser.flat.device

    def extra_repr(self) -> str:
        return f"T={self.T}, beta_schedule={self.schedule.name!r}, max_action={self.max_action:g}"

    def step_table(self, sampler: str = "ddpm", num_steps: int | None = None) -> StepTable:
        """The rows that `dql.sample` runs; None steps means T. Raises ValueError for what `StepTable.make` refuses."""
        return StepTable.make(sampler, self.schedule, num_steps, predict_epsilon=self.predict_epsilon)

    def forward(self, states: Tensor, **options: Any) -> Tensor:
        """Actions for states: `dql.sample(states, self, **options)`."""
        from dql.sampler import sample

        return sample(states, self, **options)

    def q_sample(self, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise (arXiv 2006.11239, eq. 4).

        Args:
            actions: x_0 [B, A].
            t: int64 [B], 0 .. T - 1.
            noise: [B, A].

        Returns:
            [B, A].
        """
        coefficients = self.q_sample_table(actions)[t]  # [B, 2]
        return coefficients[:, :1] * actions + coefficients[:, 1:] * noise

    def q_sample_table(self, like: Tensor) -> Tensor:
        """[T, 2]: sqrt(alphas_cumprod_t) and sqrt(1 - alphas_cumprod_t), in the dtype and on the device of `like`."""
        schedule, (of, table) = self.schedule, self._q_sample_table
        if of is not schedule or table is None or table.dtype != like.dtype or table.device != like.device:
            columns = np.stack([schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod], axis=1)
            table = torch.as_tensor(columns, dtype=like.dtype, device=like.device)
            self._q_sample_table = (schedule, table)
        return table

    def bc_loss(self, states: Tensor, actions: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The behaviour-cloning loss, the mean squared error of the predicted noise (arXiv 2208.06193, eq. 2).

        Args:
            states: [B, S].
            actions: [B, A].
            t: timesteps, int64 [B], 0 .. T - 1.
            noise: [B, A].

        Returns:
            a scalar: the mean over B and A.
        """
        prediction = self.denoiser(self.q_sample(actions, t, noise), t, states)
        return F.mse_loss(prediction, noise if self.predict_epsilon else actions)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        spec = self.denoiser.spec
        return {
            "state_dim": spec.state_dim,
            "action_dim": spec.action_dim,
            "max_action": self.max_action,
            "hidden_dim": spec.hidden_dim,
            "num_hidden": spec.num_hidden,
            "T": self.T,
            "beta_schedule": self.schedule.name,
            "time_dim": spec.time_dim,
            "activation": spec.activation,
            "predict_epsilon": self.predict_epsilon,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to one safetensors file, atomically.

        Raises:
            CheckpointError: it cannot be written (no space, no permission); the message says what to do.
        """
        about = {"kind": "policy", "format": _FORMAT, "config": self.config()}
        save_tensors(path, self.denoiser.state_dict(), about)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        sampler: str | StepTable = "ddpm",
        num_steps: int | None = None,
        num_candidates: int | None = None,
    ) -> None:
        """Writes the whole reverse chain as one ONNX file, atomically, for runtimes without torch.

        Inputs `states` [B, S] and `noise` [K, B, A] (standard normal, drawn anew for every call), output `actions`
        [B, A], all float32, B free: what `dql.sample(states, policy, noise=noise)` gives. The file's metadata name the
        sizes. Needs the extra `export`.

        Args:
            path: of the file.
            sampler: "ddpm" (the paper's), "ddim", "dpm-solver++" or a StepTable.
            num_steps: K, 1 .. T; None means T.
            num_candidates: N actions a state: noise [K, B, N, A], actions [B, N, A].

        Raises:
            ValueError: a sampler, number of steps or of candidates that `dql.sample` would refuse.
            CheckpointError: the file cannot be written; the message says what to do.
            ModuleNotFoundError: the package onnx is missing; the message says what to install.
        """
        from dql.export import export_onnx

        export_onnx(self, path, sampler=sampler, num_steps=num_steps, num_candidates=num_candidates)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "DiffusionPolicy":
        """Reads a policy written by `save`. No code in the file is run.

        Raises:
            CheckpointError: missing, damaged, no policy of this package, or one whose parameters are not finite.
        """
        device = checked_device(device)
        tensors, about = load_tensors(path)
        if about.get("kind") != "policy":
            raise CheckpointError(f"{path} holds a {about.get('kind', 'file')}, no policy; use dql.load for an agent")
        with reading(path, about, _FORMAT):
            config = about["config"]
            sizes = (config.get(name) for name in ("state_dim", "action_dim", "hidden_dim", "num_hidden"))
            check_file_sizes(tensors, "", *sizes)
            policy = cls(**config).to(tensors["final_layer.bias"].dtype)
            policy.denoiser.load_state_dict(tensors)
            check_finite(policy.denoiser, "the policy")
        return policy.to(device)

    @classmethod
    def from_published(cls, state_dict: dict[str, Tensor], max_action: float = 1.0) -> "DiffusionPolicy":
        """A policy of the authors' repository: the state_dict that its `actor*.pth` holds.

        T and the beta schedule are recognised from its `betas`; the sizes from its weights.

        Args:
            state_dict: with the keys `betas`, ... and `model.time_mlp.*`, `model.mid_layer.*`, `model.final_layer.*`.
            max_action: the bound of the environment's actions; the file does not hold it.

        Raises:
            ValueError, TypeError: it is no such state_dict; the sentence names what is missing or does not fit.
        """
        matrices = ("model.mid_layer.0.weight", "model.time_mlp.3.weight", "model.final_layer.weight")
        check_published(state_dict, "actor", {"betas": 1} | dict.fromkeys(matrices, 2))
        betas = state_dict["betas"].double().cpu().numpy()
        for name in BETA_SCHEDULES:
            # the file holds float32
            if np.allclose(NoiseSchedule(name, len(betas)).betas, betas, rtol=1e-5, atol=1e-7):
                break
        else:
            raise ValueError(
                f"the file's {len(betas)} betas are none of the published schedules ({', '.join(BETA_SCHEDULES)})"
            )
        weights = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        H, inputs = weights["mid_layer.0.weight"].shape
        A = weights["final_layer.weight"].shape[0]
        D = weights["time_mlp.3.weight"].shape[0]
        num_hidden = sum(k.startswith("mid_layer.") and k.endswith(".weight") for k in weights)
        policy = cls(inputs - A - D, A, max_action, H, num_hidden, len(betas), name, D)
        load_published(policy.denoiser, weights, "actor")
        return policy
