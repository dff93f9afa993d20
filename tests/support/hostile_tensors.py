"""Tensors that are no ordinary memory, by kind: each is made of an ordinary one, whose shape it has."""

from collections.abc import Callable

import torch
from torch._subclasses import FakeTensorMode

Tensor = torch.Tensor


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(str(func))


def fake(like: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(like.shape)


def freed(like: Tensor) -> Tensor:
    made = like.clone()
    made.untyped_storage().resize_(0)
    return made


def freed_slice(like: Tensor) -> Tensor:
    made = torch.stack([like, like])[1]
    made.untyped_storage().resize_(0)
    return made


def cut_off(like: Tensor) -> Tensor:
    made = like.clone()
    made.untyped_storage().resize_(4 * (like.numel() - 1))
    return made


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": fake,
    "masked": lambda like: torch.masked.masked_tensor(like.clone(), torch.ones_like(like, dtype=torch.bool)),
    "wrapper": Wrapper,
    "zero": lambda like: torch._efficientzerotensor(tuple(like.shape)),
    "meta": lambda like: torch.empty(like.shape, device="meta"),
    "sparse": lambda like: like.to_sparse(),
    "sparse rows": lambda like: like.reshape(len(like), -1).to_sparse_csr(),
    "nested": lambda like: torch.nested.nested_tensor(list(like)),
    "jagged": lambda like: torch.nested.nested_tensor(list(like), layout=torch.jagged),
    "freed": freed,
    "freed slice": freed_slice,
    "cut off": cut_off,
}
