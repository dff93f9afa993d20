"""The networks of the baselines: plain MLPs over one flat buffer, so that Adam, checkpoints and targets are as ever."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from dql.config import Config
from dql.kernels.layout import CriticSpec, FlatLayout
from dql.networks import FlatModule, checked_sizes, hidden_layers, linear
from dql.tensors import plain

Tensor = torch.Tensor
_MOST_LAYERS = 1000  # of a file that is to be believed
LOG_STD = (-5.0, 2.0)  # IQL's bounds of a Gaussian's log standard deviation


class MLP(FlatModule):
    """inputs -> hidden_dim x num_hidden -> outputs.

    Args:
        inputs: size of the input.
        outputs: size of the output.
        config: its hidden_dim, num_hidden and activation.
        generator: of the initial weights, torch's own distribution for nn.Linear.
        log_std: whether there is a parameter `log_std` [outputs], zero at first: of a Gaussian around the output.
    """

    log_std: Tensor

    def __init__(
        self, inputs: int, outputs: int, config: Config, generator: torch.Generator, *, log_std: bool = False
    ) -> None:
        super().__init__()
        H, n = checked_sizes(hidden_dim=config.hidden_dim, num_hidden=config.num_hidden)
        self.layout = mlp_layout(inputs, outputs, config, log_std=log_std)
        hidden = hidden_layers(inputs, H, n, config.activation, generator)
        self.net = nn.Sequential(*hidden, linear(H, outputs, generator))
        if log_std:
            self.log_std = nn.Parameter(torch.zeros(outputs))
        self.flatten_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] -> [B, outputs]."""
        if torch.is_grad_enabled():
            self.attach_gradients()
        return self.net(x)


def mlp_layout(inputs: int, outputs: int, config: Config, *, log_std: bool = False) -> FlatLayout:
    """The parameters of such an MLP."""
    shapes: dict[str, tuple[int, ...]] = {"log_std": (outputs,)} if log_std else {}
    for i in range(config.num_hidden + 1):
        rows = config.hidden_dim if i < config.num_hidden else outputs
        shapes |= {f"net.{2 * i}.weight": (rows, inputs), f"net.{2 * i}.bias": (rows,)}
        inputs = rows
    return FlatLayout.build(shapes)


def critic_layout(state_dim: int, action_dim: int, config: Config) -> FlatLayout:
    """The parameters of a TwinCritic."""
    return CriticSpec(state_dim, action_dim, config.hidden_dim, config.num_hidden, config.activation).layout


def check_shapes(tensors: Mapping[str, Tensor], layouts: Mapping[str, FlatLayout]) -> None:
    """Compares a file's networks with what they have to be.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for prefix, layout in layouts.items():
        for slot in layout.slots:
            held = tensors.get(f"{prefix}.{slot.name}")
            if held is None or tuple(held.shape) != slot.shape:
                found = "missing" if held is None else list(held.shape)
                raise ValueError(
                    f"its {prefix}.{slot.name} is {found}, and {list(slot.shape)} by the sizes that it names"
                )


def checked_file_sizes(state_dim: Any, action_dim: Any, config: Config) -> tuple[int, int]:
    """Sizes that a file names, known to be sizes. Raises ValueError."""
    state_dim, action_dim, _ = checked_sizes(state_dim=state_dim, action_dim=action_dim, hidden_dim=config.hidden_dim)
    if config.num_hidden > _MOST_LAYERS:
        raise ValueError(f"{config.num_hidden} hidden layers are more than it can hold")
    return state_dim, action_dim


def orthogonal_(network: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Orthogonal weights times `gain`, and no biases, in place (the initial weights of IQL's authors)."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), gain, generator))
                layer.bias.zero_()


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """log N(actions; mean, exp(log_std)), summed over the dimensions of an action: [B]."""
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z * z - log_std - 0.5 * _LOG_2PI).sum(dim=-1)


_LOG_2PI = 1.8378770664093453


def checked_states(states: Tensor, state_dim: int, like: Tensor) -> Tensor:
    """The states as ordinary memory [B, S]; of another shape, dtype or device than `like`'s network takes they are
    refused (ValueError, TypeError), as are NaN and infinity where looking does not wait for a GPU."""
    states = plain("states", states)
    if states.dim() != 2 or states.shape[1] != state_dim:
        raise ValueError(f"states must be [B, {state_dim}] for this agent, got {list(states.shape)}")
    if states.dtype != like.dtype or states.device != like.device:
        raise ValueError(
            f"states are {states.dtype} on {states.device}, the agent is {like.dtype} on {like.device}; convert them"
        )
    if states.is_cpu and not bool(states.isfinite().all()):
        row, column = (~states.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"states hold NaN or infinite values, the first at row {row}, column {column}; mend the source of the "
            "observations"
        )
    return states
