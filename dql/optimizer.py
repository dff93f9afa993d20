"""Adam over a module's flat buffer: one pass over all parameters."""

import torch

from dql.backend.base import UpdateOps
from dql.draws import Part
from dql.kernels.cpp import binding
from dql.networks import FlatModule
from dql.tensors import plain

Tensor = torch.Tensor
_MOST_STEPS = 1 << 24  # float32, which torch counts in, holds no more of them


class FlatAdam:
    """Adam over a module's flat buffer, with the gradient's norm clipped; no host sync."""

    def __init__(self, module: FlatModule, lr: float, grad_norm: float) -> None:
        self.module, self.lr, self.grad_norm = module, lr, grad_norm
        self.adam = torch.optim.Adam([module.flat], lr=lr, fused=True)

    def step(self, loss: Tensor, lr_scale: float | Tensor, shard: Part | None = None) -> Tensor:
        """Backpropagates the loss and takes a step; returns the gradient's norm before clipping.

        Of a part of a batch the gradient is averaged over the parts first. A scalar tensor of the module's device may
        scale the learning rate: then the step can be recorded.
        """
        if self.adam.param_groups[0]["params"][0] is not self.module.flat:
            self._reattach()
        self.module.zero_grad()
        loss.backward()
        gradient = self.module.flat.grad
        assert gradient is not None
        if shard is not None:
            shard.mean_(gradient)
        norm = torch.linalg.vector_norm(gradient)
        if self.grad_norm > 0:
            gradient.mul_((self.grad_norm / (norm + 1e-6)).clamp_(max=1))
        group = self.adam.param_groups[0]
        # torch wants "capturable" for a CUDA graph; the fused step keeps its count on the device with or without it
        group["lr"], group["capturable"] = self.lr * lr_scale, isinstance(lr_scale, Tensor) and lr_scale.is_cuda
        self.adam.step()
        torch.autograd.graph.increment_version(self.module.flat)  # the fused step does not say that it wrote
        return norm

    def step_natively(self, lr_scale: float) -> float:
        """`step` for a gradient that is in `flat.grad` already, in one native call; it leaves that unclipped."""
        given = self.native()
        given.step.add_(1)
        return binding.adam(
            self.module.buffer,
            given.gradient,
            given.exp_avg,
            given.exp_avg_sq,
            self.lr * lr_scale,
            int(given.step),
            self.grad_norm,
        )

    def native(self) -> binding.Optimizer:
        """The gradient's memory and Adam's state, for native code to write."""
        self.module.attach_gradients()
        flat, state = self.module.flat, self._state()
        assert flat.grad is not None
        moments = state["exp_avg"], state["exp_avg_sq"]
        return binding.Optimizer(flat.grad, *moments, state["step"], self.lr, self.grad_norm)

    def step_fused(
        self, ops: UpdateOps, lr_scale: float | Tensor, average: tuple[Tensor, float | Tensor] | None = None
    ) -> Tensor:
        """`step` for a gradient that is in `flat.grad` already, by kernels that move an average, too; it leaves that
        clipped. Returns the norm [1]."""
        flat, state = self.module.flat, self._state()
        assert flat.grad is not None
        moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
        norm = ops.adam(self.module.buffer, flat.grad, *moments, self.lr, lr_scale, self.grad_norm, average)
        for written in (flat, flat.grad, *moments, *([] if average is None else average[:1])):
            torch.autograd.graph.increment_version(written)
        return norm

    def _state(self) -> dict[str, Tensor]:
        """Adam's, made if no step was taken."""
        flat = self.module.flat
        if self.adam.param_groups[0]["params"][0] is not flat:
            self._reattach()
        state: dict[str, Tensor] = self.adam.state[flat]
        if not state:
            zeros = torch.zeros_like(self.module.buffer)
            state.update(step=zeros.new_zeros(()), exp_avg=zeros, exp_avg_sq=zeros.clone())
        return state

    def _check(self, tensors: dict[str, Tensor]) -> None:
        if tensors.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"Adam's state is step, exp_avg and exp_avg_sq, got {', '.join(sorted(tensors))}")
        for name, value in tensors.items():
            plain(f"Adam's {name}", value, whole=True)
            shape = [] if name == "step" else list(self.module.flat.shape)
            if list(value.shape) != shape or not (value.is_floating_point() or name == "step"):
                raise ValueError(
                    f"Adam's {name} must be floats {shape} as this module's parameters, got {value.dtype} "
                    f"{list(value.shape)}; load what was saved of the same networks"
                )
        step = float(tensors["step"])
        if not 0 <= step <= _MOST_STEPS or step != int(step):
            raise ValueError(f"Adam's step must be a whole number from 0 to {_MOST_STEPS:,}, got {step:g}")
        for name in ("exp_avg", "exp_avg_sq"):
            value = tensors[name]
            if bool(value.isnan().any()) or (name == "exp_avg_sq" and bool((value < 0).any())):
                raise ValueError(f"Adam's {name} holds NaN or, of squares, negative values; take another checkpoint")
            if name == "exp_avg" and bool(value.isinf().any()):  # a square may be, of a gradient that has none itself
                raise ValueError("Adam's exp_avg holds infinite values, as of a training that diverged; take another")

    def _reattach(self) -> None:
        """Follows a module that was moved or cast, which gave it a new buffer."""
        tensors = self.tensors()
        self.adam = torch.optim.Adam([self.module.flat], lr=self.lr, fused=True)
        self.load(tensors)

    def tensors(self) -> dict[str, Tensor]:
        state = self.adam.state.get(self.adam.param_groups[0]["params"][0])
        if not state:
            return {}
        return {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave; of no tensors, that no step was taken.

        Raises:
            ValueError: they are not this module's: a key, a shape, a dtype, or a number that Adam never has.
            TypeError: one is no tensor.
        """
        flat = self.module.flat
        if tensors:
            self._check(tensors)
            state = {  # memory of its own, in one piece
                name: torch.empty(
                    value.shape, dtype=torch.float32 if name == "step" else flat.dtype, device=flat.device
                ).copy_(value.detach())
                for name, value in tensors.items()
            }
            self.adam.state[flat] = state
