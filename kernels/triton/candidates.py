"""Tiles that may be faster than the heuristic's, compiled: what `dql bench tune` measures.

Importing this module imports no Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..layout import CriticSpec, DenoiserSpec
from .aot import Report, examine, fits
from .compile_pool import compile_pool
from .tiles import Shape, Tile


def for_shape(arch: int, shape: Shape) -> list[Tile]:
    """Every tile worth a measurement for a shape; some will not fit, which compiling tells."""
    rows = [r for r in (16, 32, 64) if r == 16 or r // 2 < shape.rows]
    chunks = [c for c in ((32, 64, 128) if shape.bf16 else (16, 32, 64)) if c <= shape.HP] or [shape.HP]
    # a ring deeper than a layer has chunks is the same as a shallower one
    depths = {c: [s for s in (2, 3, 4) if s <= max(2, shape.HP // c)] for c in chunks}
    return [Tile(r, c, s, w) for r in rows for c in chunks for s in depths[c] for w in (4, 8, 16)]


Wanted = tuple[str, str, Tile]  # kind of a Shape, precision, tile


@dataclass(frozen=True)
class Candidate:
    """A tile and what the compiler made of its kernels.

    Attributes:
        kind: of a Shape.
        precision: "fp32", "tf32" or "bf16".
        report: of the chain's kernel; None if it does not compile.
        refused: why it is not worth a measurement, or None.
    """

    kind: str
    precision: str
    tile: Tile
    report: Report | None
    refused: str | None


def compiled(
    arch: int,
    spec: DenoiserSpec,
    wanted: list[Wanted],
    jobs: int | None = None,
    keep: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Candidate]:
    """Compiles tiles for an architecture, in `jobs` fresh processes without TRITON_INTERPRET; needs no GPU.

    Args:
        arch: a key of ARCHITECTURES.
        spec: sizes of the denoiser; critics of the same sizes must fit too.
        wanted: what to compile.
        jobs: processes; by default one a core.
        keep: leave what is not refused in Triton's cache, for this process to load.
        progress: called with (done, of how many).

    Raises:
        ValueError: jobs < 1.
        ChildProcessError: a process died.
    """
    with compile_pool(jobs) as pool:
        futures = [pool.submit(_examine, arch, spec, *want, keep) for want in wanted]
        done: list[Candidate] = []
        for future in futures:
            progress(len(done), len(futures))
            done.append(future.result())
        return done


def _examine(arch: int, spec: DenoiserSpec, kind: str, precision: str, tile: Tile, keep: bool) -> Candidate:
    from . import chain as chains  # Triton's, which the process that asks does without
    from . import critic as twin_critics

    critics = CriticSpec(spec.state_dim, spec.action_dim, spec.hidden_dim, spec.num_hidden, spec.activation)
    if kind == "backward":
        chain = chains.chain_bwd_kernel(spec, precision, tile)
        critic = twin_critics.critic_bwd_kernel(critics, precision, tile, True, True)
    else:
        chain = chains.chain_fwd_kernel(spec, precision, tile, False, kind == "saving")
        critic = twin_critics.critic_fwd_kernel(critics, precision, tile, kind == "saving")
    report = None
    try:
        report = examine(chain, arch)
        refused = refusal(report)
        if refused is None and (of_critics := refusal(examine(critic, arch))) is not None:
            refused = f"for critics {of_critics}"
        if refused is None and keep:
            chain.compile(arch)
    except Exception as error:  # the compiler's are of many types
        told = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]  # a caret points into the source
        refused = f"it does not compile: {type(error).__name__}: {' ... '.join(dict.fromkeys(told[:1] + told[-1:]))}"
    return Candidate(kind, precision, tile, report, refused)


def refusal(report: Report) -> str | None:
    """Why such a kernel is not worth a measurement, or None."""
    if (limit := fits(report)) is not None:
        return limit
    if report.spill_stores or report.spill_loads:
        return f"it spills: {report.spill_stores} bytes stored, {report.spill_loads} loaded"
    return None
