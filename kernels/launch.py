"""How Triton kernels are compiled and launched: one way for real launches, for machines without a GPU and for tests.

A `Kernel` is a jit function with all its constants. Its signature comes from the annotations of the function, so what
`dql.kernels.aot` compiles and examines for an architecture is, to the byte, what is launched on it:

    "*fp32", "*op"    a pointer to float32, or to the operands' dtype (float32 or bfloat16), aligned to 16 bytes
    "*fp32 any"       a pointer aligned to its element alone: the caller's tensors, which may be slices
    "i32", "i64", "fp32"    a number
    tl.constexpr      a constant

With TRITON_INTERPRET=1 the same kernels run on the CPU, on NumPy, slowly. Its bfloat16 cannot be trusted (dots multiply
bit patterns, casts truncate) and it knows no PTX, so there operands of bf16 and tf32 are float32 that were rounded by
hand: the constant EMULATE.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .capture import refuse_while_capturing

Tensor = torch.Tensor
INTERPRETED: bool = triton.knobs.runtime.interpret
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Kernel:
    """A jit function, the values of its constexpr parameters, and how it is laid on a multiprocessor."""

    function: Any  # triton.JITFunction; under the interpreter triton's stand-in for one
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # a thread; ptxas told nothing may spill for the sake of more blocks

    @classmethod
    def of(
        cls,
        function: Any,
        *,
        num_warps: int,
        num_stages: int = 1,
        max_registers: int | None = None,
        **constants: Any,
    ) -> "Kernel":
        return cls(function, tuple(constants.items()), num_warps, num_stages, max_registers)

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    @cached_property
    def _compiled(self) -> dict[int, Any]:
        return {}

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
        """(type of each parameter, which are multiples of 16), as Triton's compiler takes them."""
        constants = dict(self.constants)
        operand = "bf16" if constants.get("BF16") else "fp32"
        types, aligned = {}, {}
        for i, parameter in enumerate(self.function.params):
            kind = parameter._param.annotation
            if parameter.is_constexpr:
                types[parameter.name] = "constexpr"
                continue
            pointer, _, alignment = kind.partition(" ")
            types[parameter.name] = pointer.replace("op", operand)
            if pointer.startswith("*") and not alignment:
                aligned[(i,)] = [["tt.divisibility", 16]]
        return types, aligned

    def compile(self, arch: int) -> Any:
        """Triton's CompiledKernel for compute capability `arch` (80, 90, 100, 120); needs no GPU.

        Raises:
            RuntimeError: under the interpreter, which compiles nothing.
        """
        if INTERPRETED:
            raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1; unset it")
        types, aligned = self.signature()
        source = ASTSource(self.function, types, dict(self.constants), aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    def launch(self, grid: Grid, *arguments: Any) -> None:
        """Runs it on the current stream of the tensors' device (which is the current one), or in the interpreter.

        Args:
            grid: programs along each axis.
            *arguments: every parameter that is no constant, in order; tensors, numbers, or None for a null pointer.
        """
        if INTERPRETED:
            self.function[grid](*arguments, **dict(self.constants), num_warps=self.num_warps)
            return
        device = torch.cuda.current_device()
        loaded = self._compiled.get(device)
        if loaded is None:
            refuse_while_capturing()
            major, minor = torch.cuda.get_device_capability(device)
            compiled = self.compile(10 * major + minor)
            loaded = self._compiled[device] = (compiled.run, compiled.function, compiled.packed_metadata, self._rest)
        run, function, metadata, rest = loaded
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*grid, stream, function, metadata, None, None, None, *addresses, *rest)

    @cached_property
    def _rest(self) -> tuple[Any, ...]:
        """What stands in the places of the constants, which follow the arguments."""
        return (None,) * len(self.constants)


def architecture(device: torch.device) -> int:
    """The compute capability, 80 or 90, say; under the interpreter 0."""
    if INTERPRETED or device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many there are; under the interpreter 8."""
    if INTERPRETED or device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
