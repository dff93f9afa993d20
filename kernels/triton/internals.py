"""All that we use of Triton beyond its language, and whether the Triton that is here still has it.

Triton promises its language, not its compiler's objects: from release to release they change. `TRIED` are the releases
that everything in this file was seen to work with; of another one `unsupported` finds out, when Triton is first asked
for, before any kernel is made.

Importing this module imports no Triton: the functions do.
"""

import contextlib
import importlib.metadata
import inspect
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

LEAST, TRIED = (3, 6), ("3.6", "3.7", "3.8", "3.9")
# What a launcher takes before the kernel's own arguments.
_LAUNCHED_WITH = ("gridX", "gridY", "gridZ", "stream", "function")
_AND = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


def interpreted() -> bool:
    """Whether Triton makes kernels for its interpreter (TRITON_INTERPRET=1 when they are decorated)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """(name, annotation, whether it is a tl.constexpr) of a jit function's parameters."""
    return [(p.name, p._param.annotation, p.is_constexpr) for p in function.params]


def compile_for(
    arch: int, function: Any, types: dict[str, str], constants: dict[str, Any], aligned: dict[Any, Any], **options: Any
) -> Any:
    """Triton's compiled kernel for a compute capability: its `asm`, `metadata`, and what `launcher` takes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, types, constants, aligned)
    # Said, since from 3.10 on the default is to be another: a product and a sum in one instruction.
    options = {"enable_fp_fusion": True} | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def launcher(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """(run, fixed) of a compiled kernel, on the current GPU; it is loaded now. `run(grid x, y, z, stream, *fixed,
    *arguments)` launches it: with pointers as addresses, and None in the places of constants, which come last."""
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


def current_device() -> int:
    """The current GPU's number, once torch has used one; torch.cuda.current_device first looks whether it has."""
    return int(torch._C._cuda_getDevice())


def current_stream(device: int) -> int:
    """CUDA's handle of torch's current stream on a GPU: 0.1 us, where torch.cuda.current_stream takes 1."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def shared_memory(ordinal: int) -> int:
    """Bytes that a block of a GPU may ask for, as Triton looks at it before a launch."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(ordinal)["max_shared_mem"])


@dataclass(frozen=True)
class Figures:
    """What the compiler says that a block needs.

    Attributes:
        name: of the function in the cubin.
        warps: of a block.
        shared: bytes of shared memory that are asked for at launch.
        tensor_memory: columns.
    """

    name: str
    warps: int
    shared: int
    tensor_memory: int


def figures(compiled: Any) -> Figures:
    metadata = compiled.metadata
    return Figures(metadata.name, metadata.num_warps, metadata.shared, getattr(metadata, "tmem_size", None) or 0)


@dataclass(frozen=True)
class Fresh:
    """A kernel that was compiled past Triton's cache.

    Attributes:
        compiled: Triton's.
        log: of ptxas, the one place that tells spills from other local memory.
        seconds: that it took.
        cuobjdump, nvdisasm: paths of the tools that came with the compiler.
    """

    compiled: Any
    log: str
    seconds: float
    cuobjdump: str
    nvdisasm: str


def compiled_afresh(compile: Callable[[], Any]) -> Fresh:
    """What `compile` gives, with what the compiler told meanwhile."""
    import triton

    nvidia, compilation, cache_knobs = triton.knobs.nvidia, triton.knobs.compilation, triton.knobs.cache
    times: list[Any] = []
    log = io.StringIO()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dql-kernels-"))
        for knobs in (nvidia, compilation, cache_knobs):
            stack.enter_context(knobs.scope())
        cache_knobs.dir = str(Path(folder) / "cache")  # a new one: what comes from a cache has neither a log nor a time
        nvidia.dump_ptxas_log = True
        compilation.listener = lambda **said: times.append(said["times"])
        with contextlib.redirect_stdout(log):
            compiled = compile()
        tools = (str(nvidia.cuobjdump.path), str(nvidia.nvdisasm.path))
    seconds = (times[0].ir_initialization + times[0].total_lowering) / 1e6
    return Fresh(compiled, log.getvalue(), seconds, *tools)


@cache
def unsupported() -> str | None:
    """None if the Triton that is installed does what this file needs; else one sentence."""
    version = importlib.metadata.version("triton")
    release = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    tried = f"{TRIED[0]} to {TRIED[-1]}"
    if release < LEAST:
        return f"it needs Triton {LEAST[0]}.{LEAST[1]} or newer, and {version} is installed; pip install -U triton"
    if ".".join(map(str, release)) in TRIED:
        return None
    missing = lacks()
    if missing is None:
        return None
    return (
        f"Triton {version} is not among those that were tried ({tried}), and {missing}; pip install "
        f"'triton<{release[0]}.{release[1]}', or use backend='cuda' or 'eager'"
    )


def lacks() -> str | None:
    """What this file needs and Triton has not, in words; a small kernel is compiled to find out. None: nothing."""
    try:
        import triton
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler import CompiledKernel

        names = list(inspect.signature(CudaLauncher.__call__).parameters.values())[1:]
        given = tuple(p.name for p in names if p.kind is not p.VAR_POSITIONAL)
        if given not in (_LAUNCHED_WITH, (*_LAUNCHED_WITH, *_AND)) or names[-1].kind is not names[-1].VAR_POSITIONAL:
            return f"its launcher takes other arguments ({', '.join(given)})"
        for name in ("run", "_init_handles"):
            if not hasattr(CompiledKernel, name):
                return f"its CompiledKernel has no {name}"
        if torch.cuda.is_available():
            for name, what in (("_cuda_getCurrentRawStream", "a stream's handle"), ("_cuda_getDevice", "its GPU")):
                if not hasattr(torch._C, name):
                    return f"torch does not tell {what}"
        if triton.knobs.runtime.interpret:
            return None
        from . import probe

        told = parameters(probe.probe)
        if told != [("out", "*fp32", False), ("N", told[1][1], True)]:
            return "its functions do not tell their parameters"
        fresh = compiled_afresh(
            lambda: compile_for(80, probe.probe, {"out": "*fp32", "N": "constexpr"}, {"N": 16}, {}, num_warps=1)
        )
        needs = figures(fresh.compiled)
        if needs.warps != 1 or not fresh.compiled.asm["cubin"] or "spill stores" not in fresh.log:
            return "its compiler does not tell what a kernel needs"
        if not hasattr(fresh.compiled, "packed_metadata"):
            return "its CompiledKernel has no packed_metadata"
    except Exception as error:  # whatever was renamed
        return f"what is needed of it has changed ({type(error).__name__}: {str(error).strip().splitlines()[-1:]})"
    return None
