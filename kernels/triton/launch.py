"""How Triton kernels are compiled and launched: one way for real launches, for machines without a GPU and for tests.

A `Kernel` is a jit function with all its constants. Its signature comes from the annotations of the function, so what
`dql.kernels.triton.aot` compiles and examines for an architecture is, to the byte, what is launched on it:

    "*fp32", "*op"    a pointer to float32, or to the operands' dtype (float32 or bfloat16), aligned to 16 bytes
    "*fp32 any"       a pointer aligned to its element alone: the caller's tensors, which may be slices
    "i32", "i64", "fp32"    a number
    tl.constexpr      a constant

With TRITON_INTERPRET=1 the same kernels run on the CPU, on NumPy, slowly. Its bfloat16 cannot be trusted (dots multiply
bit patterns, casts truncate) and it knows no PTX, so there operands of bf16 and tf32 are float32 that were rounded by
hand: the constant EMULATE.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..capture import refuse_while_capturing
from . import internals as triton_internals
from .architectures import ARCHITECTURES
from .tiles import is_forced

Tensor = torch.Tensor
INTERPRETED: bool = triton_internals.interpreted()
Grid = tuple[int, int, int]
_interpreter = threading.Lock()  # it exchanges functions of `triton.language` while it runs a kernel


@dataclass(frozen=True)
class Kernel:
    """A jit function, the values of its constexpr parameters, and how it is laid on a multiprocessor."""

    function: Any  # triton.JITFunction; under the interpreter triton's stand-in for one
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # a thread; ptxas told nothing may spill for the sake of more blocks
    # Of a kernel with a tile: that tile, and the same kernel with the next smaller one, or None if there is none.
    tile: Any = field(default=None, compare=False)
    smaller: "Callable[[], Kernel | None] | None" = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        function: Any,
        *,
        num_warps: int,
        num_stages: int = 1,
        max_registers: int | None = None,
        tile: Any = None,
        smaller: "Callable[[], Kernel | None] | None" = None,
        **constants: Any,
    ) -> "Kernel":
        return cls(function, tuple(constants.items()), num_warps, num_stages, max_registers, tile, smaller)

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    @cached_property
    def _compiled(self) -> dict[int, Any]:
        return {}  # by compute capability

    @cached_property
    def _loaded(self) -> dict[int, Any]:
        return {}  # launchers by GPU

    @cached_property
    def _fitting(self) -> "dict[int, Kernel]":
        return {}  # by GPU, see `fitting`

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
        """(type of each parameter, which are multiples of 16), as Triton's compiler takes them."""
        constants = dict(self.constants)
        operand = "bf16" if constants.get("BF16") else "fp32"
        types, aligned = {}, {}
        for i, (name, kind, is_constant) in enumerate(triton_internals.parameters(self.function)):
            if is_constant:
                types[name] = "constexpr"
                continue
            pointer, _, alignment = kind.partition(" ")
            types[name] = pointer.replace("op", operand)
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
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return triton_internals.compile_for(arch, self.function, types, dict(self.constants), aligned, **options)

    def misfit(self, ordinal: int) -> str | None:
        """None if a GPU can launch it, by what its compiler says, or else the limit that it breaks. It is compiled."""
        arch = _capability(ordinal)
        made = self._compiled.get(arch)
        if made is None:
            refuse_while_capturing()
            made = self._compiled[arch] = self.compile(arch)
        needs = triton_internals.figures(made)
        limit = triton_internals.shared_memory(ordinal)
        if needs.shared > limit:
            return f"it asks for {needs.shared:,} bytes of shared memory; a block of this GPU has {limit:,}"
        known = ARCHITECTURES.get(arch)
        if known is not None and needs.tensor_memory > known.tensor_memory:
            return f"it asks for {needs.tensor_memory} columns of tensor memory; this GPU has {known.tensor_memory}"
        return None

    def launch(self, grid: Grid, *arguments: Any) -> None:
        """Runs it on the current stream of the tensors' device (which is the current one), or in the interpreter.

        Args:
            grid: programs along each axis.
            *arguments: every parameter that is no constant, in order; tensors (on a GPU their addresses, too), numbers,
                or None for a null pointer.
        """
        if INTERPRETED:
            with _interpreter:
                self.function[grid](*arguments, **dict(self.constants), num_warps=self.num_warps)
            return
        device = triton_internals.current_device()
        loaded = self._loaded.get(device)
        if loaded is None:
            refuse_while_capturing()
            arch = _capability(device)
            made = self._compiled.get(arch) or self._compiled.setdefault(arch, self.compile(arch))
            loaded = self._loaded[device] = triton_internals.launcher(made)
        run, fixed = loaded
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        run(*grid, triton_internals.current_stream(device), *fixed, *addresses, *self._rest)

    @cached_property
    def _rest(self) -> tuple[Any, ...]:
        """What stands in the places of the constants, which follow the arguments."""
        return (None,) * len(self.constants)


def fixed(tensor: Tensor) -> Tensor | int:
    """A tensor that stays where it is, to be launched with often: its address, or where kernels are interpreted itself.
    Who launches must hold the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


def architecture(device: torch.device) -> int:
    """The compute capability, 80 or 90, say; under the interpreter 0."""
    if INTERPRETED or device.type != "cuda":
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def multiprocessors(device: torch.device) -> int:
    """How many there are; under the interpreter 8."""
    if INTERPRETED or device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def fitting(kernel: Kernel, device: torch.device) -> Kernel:
    """The kernel, or where this GPU cannot launch it, by its compiler's figures, the first smaller one that it can.

    How large a tile may be was found with some compilers; another one may need more for the same. So it is asked where
    it runs, once a process, and nothing is launched that must fail.

    Raises:
        RuntimeError: none fits.
    """
    if INTERPRETED or device.type != "cuda" or kernel.smaller is None or is_forced():
        return kernel
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    found = kernel._fitting.get(ordinal)
    if found is None:
        found = kernel._fitting[ordinal] = first_that_fits(kernel, lambda candidate: candidate.misfit(ordinal))
    return found


def first_that_fits(kernel: Kernel, misfit: Callable[[Kernel], str | None]) -> Kernel:
    """The kernel, or the first of those with smaller tiles for which `misfit` gives None.

    Raises:
        RuntimeError: there is none.
    """
    candidate: Kernel | None = kernel
    why: str | None = None
    while candidate is not None:
        why = misfit(candidate)
        if why is None:
            return candidate
        candidate = candidate.smaller() if candidate.smaller is not None else None
    raise RuntimeError(f"{kernel.name} fits this GPU with no tile of its rows: {why}; use backend='cuda' or 'eager'")


def _capability(ordinal: int) -> int:
    major, minor = torch.cuda.get_device_capability(ordinal)
    return 10 * major + minor
