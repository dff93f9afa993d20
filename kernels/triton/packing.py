"""Weights as the Triton kernels want them: padded to powers of two, and in two buffers by dtype.

The flat buffer of a network (`layout.FlatLayout`) is what optimizers write; the kernels read a copy of it that is made
on the device by one gather at the start of every call, so that it is never stale. Padding is with zeros, and every
activation maps 0 to 0, so a padded network computes what the network does.

    floats:    biases of layers 1 .. L-1 [L-1, HP] | output bias [AP] | W_x [HP, AP] | W_out [OUT, HP]
    operands:  W of layers 1 .. L-1 [L-1, HP, HP], row-major [out, in] | with a backward pass, the same transposed

Twin critics have both parts twice, one network after the other; OUT is AP, or 1 for a critic. W_x are the columns of
the first layer that multiply the action; state, time and first bias go another way, see `prologue`.

Letters: A action size, H hidden width, AP and HP the same padded, L hidden layers, P size of the flat buffer.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..layout import CriticSpec, DenoiserSpec, hidden_names

Tensor = torch.Tensor


def rounded(n: int) -> int:
    """The power of two from 16 up that a size is padded to: what Triton's tiles and the tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. On the host triton.cdiv, which works in kernels as well, takes a hundred times as long."""
    return -(-n // d)


@dataclass(frozen=True)
class PackedSizes:
    """Sizes, in elements, of a network's packed buffers and of their parts."""

    AP: int
    HP: int
    L: int
    floats: int  # of one network
    operands: int  # of one network, without the transposed part
    networks: int


def packed_sizes(spec: DenoiserSpec | CriticSpec) -> PackedSizes:
    AP, HP, L = rounded(spec.action_dim), rounded(spec.hidden_dim), spec.num_hidden
    critic = isinstance(spec, CriticSpec)
    floats = (L - 1) * HP + AP + HP * AP + (1 if critic else AP) * HP
    return PackedSizes(AP, HP, L, floats, (L - 1) * HP * HP, 2 if critic else 1)


@dataclass(frozen=True)
class FirstLayer:
    """Where the first layer's other parts lie in the flat buffer: element offsets, and the row stride of its weight."""

    stride: int
    states: int  # offset of the first state column
    bias: int


def first_layer(spec: DenoiserSpec | CriticSpec, network: int = 0) -> FirstLayer:
    """Of the denoiser, or of critic number `network` (0 or 1)."""
    slots = {slot.name: slot for slot in spec.layout.slots}
    if isinstance(spec, CriticSpec):
        weight, bias = slots[f"q{network + 1}_model.0.weight"], slots[f"q{network + 1}_model.0.bias"]
        return FirstLayer(weight.shape[1], weight.offset, bias.offset)
    weight, bias = slots["mid_layer.0.weight"], slots["mid_layer.0.bias"]
    return FirstLayer(weight.shape[1], weight.offset + spec.action_dim + spec.time_dim, bias.offset)


@lru_cache(maxsize=64)
def gather_index(spec: DenoiserSpec | CriticSpec, transposed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(floats, operands): for each packed element its place in the flat buffer, int32, or -1 for a zero."""
    views = spec.layout.views(torch.arange(spec.layout.size, dtype=torch.int32, device="cpu"))
    s = packed_sizes(spec)

    def padded(index: Tensor, *shape: int) -> Tensor:
        pads = [
            pad for have, want in zip(reversed(index.shape), reversed(shape), strict=True) for pad in (0, want - have)
        ]
        return F.pad(index, pads, value=-1).reshape(-1)

    if isinstance(spec, CriticSpec):
        networks = [
            [(f"q{q}_model.{2 * i}.weight", f"q{q}_model.{2 * i}.bias") for i in range(s.L + 1)] for q in (1, 2)
        ]
        action, out_rows = slice(spec.state_dim, spec.state_dim + spec.action_dim), 1
    else:
        networks = [[(f"{name}.weight", f"{name}.bias") for name in (*hidden_names(s.L), "final_layer")]]
        action, out_rows = slice(0, spec.action_dim), s.AP
    floats, operands, turned = [], [], []
    for layers in networks:
        (first, _), *hidden, (last, last_bias) = layers
        floats += [padded(views[bias], s.HP) for _, bias in hidden]
        floats.append(padded(views[last_bias], s.AP))
        floats.append(padded(views[first][:, action], s.HP, s.AP))
        floats.append(padded(views[last], out_rows, s.HP))
        operands += [padded(views[weight], s.HP, s.HP) for weight, _ in hidden]
        turned += [padded(views[weight].t(), s.HP, s.HP) for weight, _ in hidden]
    return torch.cat(floats).to(device), torch.cat(operands + (turned if transposed else [])).to(device)
