"""Tiles of the Triton kernels, cases to cut by them, and what is launched then."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dql.kernels.triton import runner
from dql.kernels.triton.launch import Grid, Kernel
from dql.kernels.triton.tiles import Shape, Tile
from support.cases import Case

TILES = [  # rows, chunk, stages, warps: 16 rows may stay in registers, others go through memory
    Tile(16, 16, 2, 4),
    Tile(16, 32, 3, 8),
    Tile(32, 16, 2, 4),
    Tile(64, 32, 4, 8),
    Tile(128, 16, 3, 16),
]
TILED = [
    Case(B=37, S=11, A=3, K=3, H=48),
    Case(B=9, S=3, A=40, K=3, N=5, H=24, num_hidden=2, activation="silu"),
    Case(B=19, S=5, A=20, K=2, H=130, activation="relu", max_action=3.0),
]


@contextmanager
def forced(forward: Tile, backward: Tile | None = None) -> Iterator[list[Shape]]:
    """These tiles, whatever fits better. Gives the list of the shapes that are asked for, as it grows."""
    asked: list[Shape] = []

    def choose(arch: int, processors: int, shape: Shape) -> Tile:
        asked.append(shape)
        return (backward or forward) if shape.kind == "backward" else forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "choose", choose)
        yield asked


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kernel, Grid]]:
    """Every launch from now on, in a list that grows."""
    seen: list[tuple[Kernel, Grid]] = []
    launch = Kernel.launch

    def recorded(kernel: Kernel, grid: Grid, *arguments: object) -> None:
        seen.append((kernel, grid))
        launch(kernel, grid, *arguments)

    monkeypatch.setattr(Kernel, "launch", recorded)
    return seen
