"""What the compiler made of a kernel, for any NVIDIA architecture, on a machine without a GPU.

A kernel that agrees with its reference in the interpreter may still ask for more shared memory than a multiprocessor
has, or keep its tile in local memory. So every kernel that a heuristic can pick is compiled for real targets here, and
examined: what ptxas and the cubin say of its resources, how many blocks fit on a multiprocessor, which instructions it
is made of. `dql kernels` prints it, the tests assert it.

How the parts of a kernel show in the machine code (Triton 3.7.1; its ptxas is CUDA 12.8 for sm_80 to sm_90, 13.1 from
sm_100 up):

    product on tensor cores    HMMA on all; HGMMA where wgmma is reached (sm_90, tiles of 64 rows up); UTCHMMA for
                               tcgen05 (sm_100, same), its accumulator in tensor memory. sm_120 has HMMA alone
    product without them       FFMA (float32, input_precision="ieee")
    cp.async                   LDGSTS
    spills, local arrays       STL, LDL (the slow path of sin and cos shows as a few of each and a stack of 32 bytes)
    exp, log, rcp, rsqrt       MUFU
    barrier of a block         BAR

Importing this module imports no Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .architectures import ARCHITECTURES, RESERVED, Limits
from .compile_pool import compile_pool

if TYPE_CHECKING:
    from .launch import Kernel

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
COUNTED = (*TENSOR_CORES, "FFMA", "FFMA2", "MUFU", "LDGSTS", "BAR", "LDL", "STL")
LISTING = "dql.kernels.triton.catalogue"  # has every_kernel(arch) -> Iterator[tuple[str, Kernel]]


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one architecture.

    Attributes:
        kernel: name of the jit function.
        arch: compute capability, 90 for sm_90.
        registers: of a thread.
        stack: bytes of local memory of a thread, spills included.
        spill_stores, spill_loads: bytes of a thread, counted once for each instruction in the code.
        shared: bytes of a block, static and dynamic, without the driver's reserve.
        tensor_memory: columns of a block.
        warps: of a block.
        blocks_per_sm: how many blocks a multiprocessor holds at a time; 0 if it cannot launch.
        instructions: how often each of COUNTED stands in the code, and the "total" (NOP aside).
        tf32_products: how many products of tf32 numbers the kernel asks for; each of float32's is three of them.
        tf32_roundings: how often it rounds float32 numbers for them by cvt.rna.tf32.
        cvt_tf32: how often that stands in the PTX.
        warnings: what ptxas warned of, such as wgmma that it had to serialize.
        seconds: compile time, from Python to cubin, without cache.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_memory: int
    warps: int
    blocks_per_sm: int
    instructions: dict[str, int]
    tf32_products: int
    tf32_roundings: int
    cvt_tf32: int
    warnings: tuple[str, ...]
    seconds: float

    @property
    def limits(self) -> Limits:
        return ARCHITECTURES[self.arch]

    @property
    def warps_per_sm(self) -> int:
        return self.blocks_per_sm * self.warps

    @property
    def tensor_cores(self) -> str | None:
        """Which of TENSOR_CORES the kernel has, joined by +; None if it has none."""
        return "+".join(name for name in TENSOR_CORES if self.instructions[name]) or None


@dataclass(frozen=True)
class Examined:
    """One kernel of the list: its report, or why there is none.

    Attributes:
        instead: where it did not fit: why, and the smaller tile that is taken, whose report this is.
    """

    label: str
    arch: int
    report: Report | None
    error: str | None = None
    instead: str | None = None


def architecture(name: str | int) -> int:
    """The key of ARCHITECTURES that "sm_90", "sm_90a", "90" or 90 names.

    Raises:
        ValueError: it is none of them.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)a?", str(name).strip())
    if match is None or int(match[1]) not in ARCHITECTURES:
        known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
        raise ValueError(f"unknown architecture {str(name)!r}; dql knows the limits of {known}")
    return int(match[1])


def occupancy(arch: int, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> int:
    """Blocks that a multiprocessor holds at a time; 0 if not even one.

    Registers are given to a warp in units of 256, from the quarter of the file that its scheduler owns; shared memory
    to a block in units of 128 bytes, on top of the driver's reserve; tensor memory in powers of two from 32 columns.

    Args:
        arch: a key of ARCHITECTURES.
        registers: of a thread.
        warps: of a block.
        shared: bytes of a block.
        tensor_memory: columns of a block.
    """
    limits = ARCHITECTURES[arch]
    if warps > limits.warps_per_block or shared > limits.shared_per_block:
        return 0
    of_a_warp = _up(max(1, registers) * 32, 256)
    if of_a_warp * _up(warps, 4) > limits.registers:
        return 0
    blocks = [
        limits.blocks,
        limits.warps // warps,
        limits.registers // 4 // of_a_warp * 4 // warps,
        limits.shared // _up(shared + RESERVED, 128),
    ]
    if tensor_memory:
        blocks.append(limits.tensor_memory // max(32, 1 << (tensor_memory - 1).bit_length()))
    return min(blocks)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def fits(report: Report) -> str | None:
    """None if the kernel can launch on its architecture; else the limit that it breaks, in one sentence."""
    limits, sm = report.limits, f"sm_{report.arch}"
    if report.shared > limits.shared_per_block:
        return f"it asks for {report.shared:,} bytes of shared memory; a block of {sm} has {limits.shared_per_block:,}"
    if report.warps > limits.warps_per_block:
        return f"it has {report.warps} warps; a block of {sm} has at most {limits.warps_per_block}"
    if report.tensor_memory > limits.tensor_memory:
        return f"it asks for {report.tensor_memory} columns of tensor memory; {sm} has {limits.tensor_memory}"
    if report.blocks_per_sm == 0:
        asked = report.registers * report.warps * 32
        return f"it asks for {asked:,} registers a block; a multiprocessor of {sm} has {limits.registers:,}"
    return None


def examine(kernel: "Kernel", arch: int) -> Report:
    """Compiles `kernel` for compute capability `arch`, past Triton's cache, and reads what came of it.

    Raises:
        ValueError: an architecture that is not in ARCHITECTURES.
        RuntimeError: under the interpreter, which compiles nothing; or the compiler's own, if it fails.
    """
    arch = architecture(arch)
    from . import internals as triton_internals

    fresh = triton_internals.compiled_afresh(lambda: kernel.compile(arch))
    compiled, needs = fresh.compiled, triton_internals.figures(fresh.compiled)
    with tempfile.TemporaryDirectory(prefix="dql-kernels-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _resource_usage(_output(fresh.cuobjdump, "-res-usage", cubin), needs.name)
        counts = count_instructions(_output(fresh.nvdisasm, "-c", cubin))
    # from sm_90 up the cubin counts the driver's reserve as static shared memory, if the kernel uses any
    static = usage["SHARED"] - (RESERVED if arch >= 90 and usage["SHARED"] >= RESERVED else 0)
    shared = needs.shared + static
    stores, loads, warnings = parse_log(fresh.log)
    return Report(
        kernel=kernel.name,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        tensor_memory=needs.tensor_memory,
        warps=needs.warps,
        blocks_per_sm=occupancy(arch, usage["REG"], needs.warps, shared, needs.tensor_memory),
        instructions=counts,
        tf32_products=len(re.findall(r"tt\.dot .*inputPrecision = tf32 : tensor<[^>]*xf32", compiled.asm["ttir"])),
        tf32_roundings=len(re.findall(r"elementwise_inline_asm \"cvt\.rna\.tf32\.f32", compiled.asm["ttir"])),
        cvt_tf32=len(re.findall(r"\bcvt\.rna\.tf32\.f32\b", compiled.asm["ptx"])),
        warnings=warnings,
        seconds=fresh.seconds,
    )


def _fitting(kernel: "Kernel", arch: int) -> tuple[Report, None, str | None]:
    """(report, None, what is said where it is of a smaller tile), as `launch.fitting` chooses where it runs."""
    first = report = examine(kernel, arch)
    tried = kernel
    while fits(report) is not None and tried.smaller is not None and (less := tried.smaller()) is not None:
        tried, report = less, examine(less, arch)
    if report is first or fits(report) is not None:
        return first, None, None
    return report, None, f"does not fit with {kernel.tile}: {fits(first)}; taken instead: {tried.tile}"


def _output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def _resource_usage(text: str, name: str) -> dict[str, int]:
    """cuobjdump's line for one function: "REG:40 STACK:0 SHARED:0 ..." as a dict."""
    line = re.search(rf"Function {re.escape(name)}:\s*\n\s*(.*)", text)
    if line is None:
        raise RuntimeError(f"cuobjdump tells nothing of {name}: {text.strip()!r}")
    return {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line[1])}


def parse_log(log: str) -> tuple[int, int, tuple[str, ...]]:
    """(bytes of spill stores, bytes of spill loads, warnings) of what `ptxas -v` said, all functions together.

    Raises:
        RuntimeError: there is no word of spills in it.
    """
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not found:
        raise RuntimeError(f"ptxas tells nothing of spills: {log.strip()!r}")
    told = [line.strip() for line in log.splitlines() if re.search(r"warning|performance loss", line, re.IGNORECASE)]
    warnings = (re.sub(r"^ptxas[\w-]*\s+\w+\s*:\s*", "", line) for line in told)
    return sum(int(s) for s, _ in found), sum(int(s) for _, s in found), tuple(dict.fromkeys(warnings))


def instructions(sass: str) -> Counter[str]:
    """How often each instruction stands in a disassembly, by name without modifiers."""
    # /*0a50*/  @!P0 LDGSTS.E.BYPASS.128 [R5], ... : the address, perhaps a predicate, the name, its modifiers
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE))


def count_instructions(sass: str) -> dict[str, int]:
    """How often each of COUNTED stands in a disassembly, and the "total" of all instructions but NOP."""
    names = instructions(sass)
    return {name: names[name] for name in COUNTED} | {"total": names.total() - names["NOP"]}


def examine_all(
    architectures: Iterable[int],
    only: str = "*",
    jobs: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    listing: str = LISTING,
) -> list[Examined]:
    """Examines every kernel of the list for every architecture, in `jobs` processes.

    They are fresh processes without TRITON_INTERPRET, so this works in an interpreted one too.

    Args:
        architectures: keys of ARCHITECTURES.
        only: globs, separated by commas, of which a label must match one.
        jobs: processes; by default one a core.
        progress: called with (done, of how many, label).
        listing: module with `every_kernel(arch) -> Iterator[tuple[str, Kernel]]`.

    Raises:
        ValueError: no label matches `only`, jobs < 1.
        ChildProcessError: a process died.
    """
    with compile_pool(jobs) as pool:
        labels = [(arch, label) for arch in architectures for label in pool.submit(_labels, listing, arch).result()]
        chosen = [(arch, label) for arch, label in labels if matches(label, only)]
        if not chosen:
            known = sorted({label for _, label in labels})
            raise ValueError(f"no kernel's label matches {only!r}; there are {len(known)}, such as {known[:3]}")
        futures = [pool.submit(_examine_one, listing, arch, label) for arch, label in chosen]
        done = []
        for i, future in enumerate(futures):
            if progress is not None:
                progress(i, len(chosen), chosen[i][1])
            done.append(future.result())
        return done


def matches(label: str, only: str) -> bool:
    """Whether one of the globs, joined by commas, fits the label."""
    return any(fnmatchcase(label, glob.strip()) for glob in only.split(","))


@lru_cache
def _listed(listing: str, arch: int) -> dict[str, "Kernel"]:
    pairs: Iterator[tuple[str, Kernel]] = import_module(listing).every_kernel(arch)
    kernels: dict[str, Kernel] = {}
    for label, kernel in pairs:
        if label in kernels:
            raise ValueError(f"two kernels of {listing}.every_kernel({arch}) are called {label!r}")
        kernels[label] = kernel
    return kernels


def _labels(listing: str, arch: int) -> list[str]:
    return list(_listed(listing, arch))


def _examine_one(listing: str, arch: int, label: str) -> Examined:
    """One kernel, by its label: jit functions do not travel between processes."""
    try:
        return Examined(label, arch, *_fitting(_listed(listing, arch)[label], arch))
    except Exception as error:  # the compiler's are of many types; one kernel's failure must not hide the others
        return Examined(label, arch, None, f"{type(error).__name__}: {error}".strip())
