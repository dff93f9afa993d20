"""What a tensor must be before its address goes to a kernel, and what torch must not be doing while kernels run.

A kernel gets an address and reads what lies there: the sign that a view is to have, that a tensor is a stand-in without
memory, or that a tracer waits to see torch's operators is nothing that it could notice. So all of it is looked at here.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from dql.kernels.limits import MANY

Tensor = torch.Tensor

lost: list[str] = []
"""What this torch has no more of that which is looked at here and that it does not document; a test wants none."""


def _of_torch(path: str, instead: Any) -> Any:
    """torch.PATH; where a later torch has none, `instead`: then that kind of misuse goes unnoticed, all else runs."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        lost.append(path)
    return instead if found is None else found


_tracing_state = _of_torch("_C._get_tracing_state", lambda: None)
_mode_depth = _of_torch("_C._len_torch_dispatch_stack", lambda: 0)
_mode = _of_torch("_C._get_dispatch_mode", lambda mode: None)
# The list of the modes before dispatch, make_fx's first: read as it is, for this is asked in every call.
_pre_dispatch_modes = _of_torch(
    "_ops._mode_stack_state_for_pre_dispatch._ModeStackStateForPreDispatch__infra_modes", [None]
)
_is_wrapped = _of_torch("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: False)
_forward: Any = forward_ad
if not hasattr(forward_ad, "_current_level"):
    lost.append("autograd.forward_ad._current_level")
    _forward = SimpleNamespace(_current_level=-1)
_transformation = _of_torch("_C._functorch.maybe_current_level", lambda: None)
_own_dispatch = torch.Tensor.__torch_dispatch__
_MODES = _of_torch("_C._TorchDispatchModeKey", None)
_TRACERS = (
    {}
    if _MODES is None
    else {
        _MODES.PROXY: "make_fx or torch.export",
        _MODES.FAKE: "FakeTensorMode",
        _MODES.FUNCTIONAL: "functionalization",
    }
)
LOWEST_ADDRESS = 4 << 20
"""Programs and their memory begin above. A tensor whose storage was freed has the address 0 plus its offset there."""

HIDING = LOWEST_ADDRESS // 16  # elements, of up to 16 bytes


def plain(name: str, tensor: Any, *, whole: bool = False) -> Tensor:
    """The tensor with ordinary memory: itself, or where a view is to be negative, its values.

    Parameters, and subclasses that torch runs like a Tensor, are ordinary.

    Args:
        name: of the tensor, in the plural, for the sentence.
        tensor: what was given.
        whole: look whether the storage was made too small, of few elements too: three times slower than whether it is
            there at all, which the state of one robot is not to pay.

    Raises:
        TypeError: it is no tensor, or one that holds no values of its own: fake, masked, a wrapper, sparse, nested, on
            the meta device, or inside a transformation of torch.func.
        ValueError: its storage was freed (or made too small), or never was (torch._efficientzerotensor).
    """
    kind = type(tensor)
    if kind is Tensor and not whole:
        try:
            # Of what is below, each has no address or a low one; the offset is too small to hide that. Or is cut off.
            if (
                tensor.data_ptr() >= LOWEST_ADDRESS
                and tensor.storage_offset() < HIDING
                and not tensor.is_neg()
                and not tensor.is_nested
                and (tensor.numel() < MANY or has_memory(tensor))
            ):
                return tensor
        except RuntimeError:  # torch's, of tensors that have no address
            pass
    if kind is not Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {kind.__name__}; use torch.as_tensor(...)")
        if kind.__torch_dispatch__ is not _own_dispatch:
            raise TypeError(
                f"{name} must be an ordinary torch.Tensor, got a {kind.__name__}, which stands for memory that is not "
                "its own; give the tensor that it was made from"
            )
    if tensor.layout is not torch.strided or tensor.is_nested:
        remedy = "torch.nested.to_padded_tensor(...)" if tensor.is_nested else ".to_dense()"
        kind_of = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense torch.Tensor, got a {kind_of} one; use {remedy}")
    if tensor.device.type == "meta":
        raise TypeError(f"{name} must hold values, got a tensor on the meta device, which holds none; make it anew")
    if _is_wrapped(tensor):
        raise TypeError(transformed(name))
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    try:
        there = has_memory(tensor)
    except RuntimeError:  # is_grads_batched has batches of its own
        raise TypeError(transformed(name)) from None
    if not there:
        raise ValueError(f"{name} have no memory: their storage was freed, or never was; give a tensor with values")
    return tensor


def transformed(name: str) -> str:
    """The sentence for who transforms what they call."""
    return (
        f"{name} cannot be a tensor inside a transformation of torch (vmap, torch.func.grad, jacrev, functionalize, "
        "is_grads_batched), which kernels cannot see; call it outside, with all rows in one batch, and use "
        "torch.autograd.grad"
    )


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a dense tensor reaches as far as its elements."""
    count = tensor.numel()
    if not count:
        return True
    if tensor._is_zerotensor():
        return False
    if not tensor.is_contiguous():
        count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + count) * tensor.element_size()


def incoming(gradient: Tensor) -> Tensor:
    """A gradient that autograd brings, with ordinary memory; zeros that torch did not write out are."""
    if not _is_wrapped(gradient) and gradient._is_zerotensor():
        return torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    return plain("the incoming gradients", gradient)


def transforming() -> bool:
    """Whether a transformation of torch.func is under way."""
    return _transformation() is not None


def unseen() -> bool:
    """Whether torch is doing something that `refuse_unseen` may refuse; quickly."""
    return (
        _mode_depth() != 0
        or _tracing_state() is not None
        or _pre_dispatch_modes[0] is not None
        or _forward._current_level >= 0
    )


def untraceable(call: str, tracer: str) -> str:
    """The sentence for who traces it."""
    return (
        f"{call} cannot be traced by {tracer}: its kernels are no operators of torch, and the graph would hold "
        "uninitialised memory; write the whole chain with policy.export_onnx(path), or call it outside the traced code"
    )


def refuse_unseen(call: str, *tensors: Any) -> None:
    """Refuses to run kernels where torch would not see what they do.

    Args:
        call: what was called, for the sentence.
        *tensors: its inputs; those with a tangent of forward-mode differentiation are refused.

    Raises:
        RuntimeError: a tracer is at work, whose graph would hold uninitialised memory for the result, or a tangent
            would be lost.
    """
    tracer = "torch.jit.trace (or torch.onnx.export, which uses it)" if _tracing_state() is not None else None
    if tracer is None and _pre_dispatch_modes[0] is not None:
        tracer = "make_fx or torch.export"
    if tracer is None and _mode_depth():
        found = (name for mode, name in _TRACERS.items() if _mode(mode) is not None)
        tracer = next(found, None)
    if tracer is not None:
        raise RuntimeError(untraceable(call, tracer))
    if _forward._current_level >= 0:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"{call} has no forward-mode derivative; take the reverse one with torch.autograd.grad, or give "
                    "it the primal alone"
                )


class _WithoutDerivative(torch.autograd.Function):
    """Gradients as they are, on the way to all that they depend on: whoever differentiates them gets an error."""

    @staticmethod
    def forward(ctx: Any, sentence: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.sentence = sentence
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.sentence)


def first_order(sentence: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the `backward` of an autograd function whose gradients have no derivative of their own.

    torch's `once_differentiable` gives constants where the incoming gradient needs none, although the gradients depend
    on the inputs, and where it raises it does so off the way to them, which `torch.autograd.grad` never goes: a
    gradient penalty would silently vanish. Here whoever differentiates them gets an error, and nobody else: with
    create_graph=True alone nothing is raised.

    Args:
        sentence: of the RuntimeError that a second derivative raises.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor) -> Any:
            if not torch.is_grad_enabled():  # no create_graph
                return backward(ctx, *gradients)
            with torch.no_grad():
                found = backward(ctx, *gradients)
            depends = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor.requires_grad]
            return _WithoutDerivative.apply(sentence, len(found), *found, *depends)

        return run

    return decorate
