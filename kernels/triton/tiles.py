"""How a problem is laid on a GPU: rows a program, inputs a chunk, depth of the ring of chunks, warps.

A program of ROWS rows streams every weight once a step from the L2 cache, whatever ROWS is. So:
- few rows: tiles of 16, the least that tensor cores take, one for each multiprocessor; more rows a tile would leave
  multiprocessors idle and save nothing;
- more rows than 16 for each multiprocessor: tiles of 32, and of 64 where that fits, halve the traffic again. 64 rows
  are also what Hopper's and Blackwell's large products want.

What fits was found by compiling for sm_80, 90, 100 and 120 (`dql kernels`): shared memory under the architecture's
limit, no spilled register. What another compiler makes of a tile is found out where it runs (`launch.fitting`), and
where it does not fit the next smaller one is taken. `dql bench tune` measures the choices on the GPU at hand; what it
found is used by every process that starts later.

Importing this module imports no Triton.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES

_ROOMY = 160 * 1024  # bytes of shared memory a program may have on data-centre GPUs; others have 99 KB


@dataclass(frozen=True)
class Tile:
    """ROWS rows a program, CHUNK inputs of a layer at a time in a ring of `stages`, `warps` warps."""

    rows: int
    chunk: int
    stages: int
    warps: int


def next_smaller(tile: Tile) -> Tile | None:
    """The tile that is tried where one does not fit: a shallower ring, then smaller chunks, then fewer rows."""
    if tile.stages > 2:
        return replace(tile, stages=tile.stages - 1)
    if tile.chunk > 16:
        return replace(tile, chunk=tile.chunk // 2)
    return replace(tile, rows=tile.rows // 2) if tile.rows > 16 else None


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
    """The tile for a shape: a forced one, else what `dql bench tune` measured on this GPU, else the heuristic's.

    Args:
        arch: compute capability, 80 or 90, say; 0 under the interpreter, where large tiles are fast.
        processors: multiprocessors of the GPU.
        shape: the problem.

    Raises:
        ValueError: the file of measured tiles is damaged.
    """
    if _forced:
        forward, backward = _forced[-1]
        return backward if shape.kind == "backward" else forward
    if arch == 0:
        rows = 16 if shape.rows <= 16 else 32 if shape.rows <= 64 else 256
        return Tile(rows, max(16, shape.HP // 2), 2, 4)
    return measured(arch, processors, shape) or heuristic(arch, processors, shape)


def is_forced() -> bool:
    """Whether a tile is forced, whatever fits."""
    return bool(_forced)


_forced: list[tuple[Tile, Tile]] = []  # innermost last; of all threads, as torch runs backward passes in its own


@contextlib.contextmanager
def forced(tile: Tile, backward: Tile | None = None) -> Iterator[None]:
    """`choose` gives this tile, whatever fits: for measurements and tests. Plans made earlier keep theirs.

    Args:
        tile: of every kind, or of forward passes where `backward` is given.
        backward: of backward passes.
    """
    entry = (tile, backward or tile)
    _forced.append(entry)
    try:
        yield
    finally:
        _forced.remove(entry)


@lru_cache(maxsize=4096)  # asked for at every call of a chain
def heuristic(arch: int, processors: int, shape: Shape) -> Tile:
    """The tile that the module's rules give."""
    HP, bf16 = shape.HP, shape.bf16
    roomy = shared_memory(arch) >= _ROOMY
    per_processor = -(-shape.rows // processors)
    blackwell = arch >= 100  # its compiler needs more registers for the same
    rows = 16
    if per_processor > 16 and HP <= 256 and (shape.AP <= 16 or (bf16 and shape.AP <= 32 and not blackwell)):
        rows = 32
    if per_processor > 32 and _fits_64(arch, shape):
        rows = 64
    if bf16:
        chunk, stages = (64, 3) if HP <= 256 and not (blackwell and rows > 16) else (32, 3)
        if rows == 64 and HP == 256 and not blackwell:
            stages = 2
    elif HP <= 128:
        chunk, stages = 32, 3
    elif HP == 256:
        chunk, stages = (32, 3) if rows == 16 and roomy and not blackwell else (16, 4)
    else:
        chunk, stages = 16, 3 if roomy else 2
    return Tile(rows, min(chunk, HP), stages, 4 if HP <= 64 and rows < 64 else 8)


def _fits_64(arch: int, shape: Shape) -> bool:
    """Whether 64 rows a program need no more registers than there are."""
    if not shape.bf16 or shape.AP > 16:
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
    """Where `dql bench tune` keeps what it measured: $DQL_TILES, or tiles.json in $DQL_CACHE or ~/.cache/dql."""
    return _path(os.environ.get("DQL_TILES"), os.environ.get("DQL_CACHE"))


@lru_cache(maxsize=8)  # asked for at every call of a chain
def _path(named: str | None, folder: str | None) -> Path:
    return Path(named) if named else Path(folder or Path.home() / ".cache" / "dql") / "tiles.json"


def key(arch: int, processors: int, shape: Shape) -> str:
    """A shape's name in the file, together with the GPU's; every number of rows up to the next power of two has it."""
    operands = "bf16" if shape.bf16 else "float32"
    return f"sm_{arch} x{processors} {shape.kind} H{shape.HP} A{shape.AP} {operands} R{bucket(shape.rows)}"


@lru_cache(maxsize=8)
def _tuned(path: Path) -> dict[str, Tile]:
    """What the file holds; nothing of a missing one.

    Raises:
        ValueError: it is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    try:
        return {name: _checked(Tile(**fields)) for name, fields in json.loads(data)["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no file of this version's `dql bench tune` ({type(error).__name__}: {error}); delete it or run "
            "`dql bench tune` again, which replaces it"
        ) from error


def _checked(tile: Tile) -> Tile:
    """The tile, if a kernel can have it.

    Raises:
        ValueError: none can.
    """
    powers = (tile.rows, tile.chunk, tile.warps)
    whole = all(type(n) is int and n > 0 for n in (*powers, tile.stages))
    if not whole or any(n & (n - 1) for n in powers) or min(tile.rows, tile.chunk) < 16 or tile.warps > 32:
        raise ValueError(f"{tile} is no tile")
    return tile


def measured(arch: int, processors: int, shape: Shape) -> Tile | None:
    """The tile that `dql bench tune` found best for such a shape, or None.

    Raises:
        ValueError: the file is damaged.
    """
    tuned = _tuned(tuned_path())
    return tuned.get(key(arch, processors, shape)) if tuned else None


def remember(tiles: dict[str, Tile], about: dict[str, Any]) -> Path:
    """Adds measured tiles to the file, atomically; a damaged one is replaced.

    Args:
        tiles: by `key`.
        about: where they were measured, for a reader of the file.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written.
    """
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    _tuned.cache_clear()  # another process may have written since
    try:
        known = _tuned(path)
    except ValueError:
        known = {}
    text = json.dumps({"about": about, "tiles": {k: asdict(t) for k, t in {**known, **tiles}.items()}}, indent=1)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text + "\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
        _tuned.cache_clear()
    return path
