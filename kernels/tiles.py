"""How a problem is laid on a GPU: rows a program, inputs a chunk, depth of the ring of chunks, warps.

A program of ROWS rows streams every weight once a step from the L2 cache, whatever ROWS is. So:
- few rows: tiles of 16, the least that tensor cores take, one for each multiprocessor; more rows a tile would leave
  multiprocessors idle and save nothing;
- more rows than 16 for each multiprocessor: tiles of 32, and of 64 where that fits, halve the traffic again. 64 rows
  are also what Hopper's and Blackwell's large products want.

What fits was found by compiling for sm_80, 90, 100 and 120 (`dql kernels`): shared memory under the architecture's
limit, no spilled register. `dql bench tune` measures the choices on the GPU at hand; what it found is used
from then on.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .aot import ARCHITECTURES
from .launch import INTERPRETED

_ROOMY = 160 * 1024  # bytes of shared memory a program may have on data-centre GPUs; others have 99 KB


@dataclass(frozen=True)
class Tile:
    """ROWS rows a program, CHUNK inputs of a layer at a time in a ring of `stages`, `warps` warps."""

    rows: int
    chunk: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Shape:
    """What a tile is chosen for.

    Attributes:
        kind: "forward", "saving" (forward that saves for a backward pass), "backward"; of a chain or of critics.
        HP: padded hidden width.
        bf16: whether operands are bf16.
        rows: R.
        AP: padded action size.
    """

    kind: str
    HP: int
    bf16: bool
    rows: int
    AP: int = 16


def choose(arch: int, processors: int, shape: Shape) -> Tile:
    """The tile for a shape: what `dql bench tune` measured for it on this GPU, else the heuristic's.

    Args:
        arch: compute capability, 80 or 90, say; 0 under the interpreter, where large tiles are fast.
        processors: multiprocessors of the GPU.
        shape: the problem.
    """
    if INTERPRETED:
        rows = 16 if shape.rows <= 16 else 32 if shape.rows <= 64 else 256
        return Tile(rows, max(16, shape.HP // 2), 2, 4)
    return measured(arch, processors, shape) or heuristic(arch, processors, shape)


def heuristic(arch: int, processors: int, shape: Shape) -> Tile:
    """The tile that the module's rules give."""
    HP, bf16 = shape.HP, shape.bf16
    roomy = shared_memory(arch) >= _ROOMY
    per_processor = -(-shape.rows // processors)
    rows = 16
    if per_processor > 16 and HP <= 256 and shape.AP <= 32:
        rows = 32
    if per_processor > 32 and _fits_64(arch, shape):
        rows = 64
    if bf16:
        chunk, stages = (64, 3) if HP <= 256 else (32, 3)
        if rows == 64 and HP == 256 and not roomy:
            chunk = 32
    elif HP <= 128:
        chunk, stages = 32, 3
    elif HP == 256:
        chunk, stages = (32, 3) if rows == 16 and roomy else (16, 4)
    else:
        chunk, stages = 16, 3 if roomy else 2
    return Tile(rows, min(chunk, HP), stages, 4 if HP <= 64 and rows < 64 else 8)


def _fits_64(arch: int, shape: Shape) -> bool:
    """Whether 64 rows a program need no more registers than there are."""
    if not shape.bf16 or shape.AP > 32:
        return False
    return shape.HP <= 128 or (shape.HP == 256 and shape.kind == "forward" and arch >= 90)


def shared_memory(arch: int) -> int:
    """Bytes that one program may have; of an architecture that is not in the list, the least of those that are."""
    known = {a: limits.shared_per_block for a, limits in ARCHITECTURES.items()}
    return known.get(arch, min(known.values()))


def bucket(rows: int) -> int:
    """The power of two that stands for a number of rows in the file of measured tiles."""
    return 1 << max(0, (rows - 1).bit_length())


def tuned_path() -> Path:
    """Where `dql bench tune` keeps what it measured: $DQL_TILES, or tiles.json in the cache folder."""
    if named := os.environ.get("DQL_TILES"):
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dql" / "tiles.json"


def key(arch: int, processors: int, shape: Shape) -> str:
    return (
        f"sm_{arch} x{processors} {shape.kind} H{shape.HP} {'bf16' if shape.bf16 else 'float32'} R{bucket(shape.rows)}"
    )


@cache
def _tuned(path: Path) -> dict[str, Tile]:
    """What the file holds; nothing of a missing one.

    Raises:
        ValueError: it is damaged.
    """
    try:
        text = path.read_text()
    except OSError:
        return {}
    try:
        return {name: Tile(**fields) for name, fields in json.loads(text)["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of `dql bench tune` ({type(error).__name__}: {error}); delete it or tune again"
        ) from error


def measured(arch: int, processors: int, shape: Shape) -> Tile | None:
    """The tile that `dql bench tune` found best for such a shape, or None."""
    return _tuned(tuned_path()).get(key(arch, processors, shape))


def remember(tiles: dict[str, Tile], about: dict[str, Any]) -> Path:
    """Adds measured tiles to the file, atomically; returns its path."""
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**_tuned(path), **tiles}
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({"about": about, "tiles": {k: asdict(t) for k, t in merged.items()}}, indent=1))
    scratch.replace(path)
    _tuned.cache_clear()
    return path


def candidates(arch: int, shape: Shape) -> list[Tile]:
    """Every tile worth a measurement for a shape; some will not fit, which compiling tells."""
    rows = [r for r in (16, 32, 64) if r == 16 or r // 2 < shape.rows]
    chunks = [c for c in ((32, 64, 128) if shape.bf16 else (16, 32, 64)) if c <= shape.HP] or [shape.HP]
    return [Tile(r, c, s, w) for r in rows for c in chunks for s in (2, 3, 4) for w in (4, 8, 16)]
