"""Networks whose result is what is left when nearly equal numbers are taken from each other: nothing, where operands
that are to have sixteen bits have eight."""

import torch

import dql

Tensor = torch.Tensor
ROWS, ACTIONS = 200, 6
Sampled = tuple[dql.DiffusionPolicy, Tensor, Tensor]  # policy, states [ROWS, S], noise [1, ROWS, ACTIONS] of zeros


def first_layer(S: int, device: str = "cpu") -> Sampled:
    """Of (1 + 2^-9) (1 + 2^-10) - 1 nothing is left where either factor is rounded to bf16; the product of what is then
    cut off is far below the rest."""
    policy, tensors = _zeros(S)
    with torch.no_grad():
        tensors["mid_layer.0.weight"][:, -S:] = 1 + 2**-9
        tensors["mid_layer.0.bias"][:] = -1
        tensors["mid_layer.2.weight"][:] = tensors["mid_layer.4.weight"][:] = torch.eye(256)
        tensors["final_layer.weight"][:] = 2**-8
    states = torch.zeros(ROWS, S)
    states[torch.arange(ROWS), torch.arange(ROWS) % S] = 1 + 2**-10
    return policy.to(device), states.to(device), torch.zeros(1, ROWS, ACTIONS, device=device)


def last_layer(column: int, device: str = "cpu") -> Sampled:
    """The same of the last layer, by one column of its input, a bias."""
    policy, tensors = _zeros(17)
    with torch.no_grad():
        tensors["mid_layer.4.bias"][column] = 1 + 2**-10
        tensors["final_layer.weight"][:, column] = 1 + 2**-9
        tensors["final_layer.bias"][:] = -1
    return policy.to(device), torch.zeros(ROWS, 17, device=device), torch.zeros(1, ROWS, ACTIONS, device=device)


def _zeros(S: int) -> tuple[dql.DiffusionPolicy, dict[str, Tensor]]:
    policy = dql.DiffusionPolicy(S, ACTIONS, T=1, max_action=1e5, activation="relu")
    with torch.no_grad():
        policy.denoiser.flat.zero_()
    return policy, dict(policy.denoiser.named_parameters())
