"""The Triton kernels in the interpreter with any tile, through registers and through memory: the same float32. Other
precisions are in `triton/test_rounding_tiles`, sums over rows in `triton/test_sums`; a GPU's side is in `gpu/`."""

import importlib.util

import pytest
import torch
from support.cases import TOLERANCES, Case, assert_all_close, assert_close, expected, make_problem, run

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from support.triton_tiles import TILED, TILES, forced, launches

from dql.kernels.triton import chain as reverse_diffusion
from dql.kernels.triton.packing import packed_sizes
from dql.kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


def in_registers(case: Case, tile: Tile) -> bool:
    return reverse_diffusion.small(tile, packed_sizes(make_problem(case, torch.float32).policy.denoiser.spec))


def test_every_case_has_a_tile_that_goes_through_memory_and_most_another():
    ways = [{in_registers(case, tile) for tile in TILES} for case in TILED]
    assert ways == [{True, False}, {True, False}, {False}]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_any_tile_gives_the_same(case, tile, monkeypatch):
    usual = run(case, "triton")
    seen = launches(monkeypatch)
    with forced(tile) as asked:
        got = run(case, "triton")
    assert [shape.kind for shape in asked] == ["saving", "backward"]
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend=f"triton, {tile}")
    assert_close(got["actions"], usual["actions"], TOLERANCES["rows"], what="actions", case=case)
    chains = [(kernel, grid) for kernel, grid in seen if kernel.name in ("chain_fwd", "chain_bwd")]
    assert len(chains) == 2
    for kernel, grid in chains:
        constants = dict(kernel.constants)
        assert grid == (-(-case.rows // tile.rows), 1, 1)
        assert (constants["ROWS"], constants["HOLD"]) == (tile.rows, in_registers(case, tile))
