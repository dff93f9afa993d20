"""The Triton kernels in the interpreter with any tile in reduced precisions, and tiles of the backward pass alone."""

import importlib.util

import pytest
from support.backends import entry
from support.cases import TOLERANCES, assert_all_close, expected, run
from support.checks import check_rounded

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from support.triton_tiles import TILED, TILES, forced, launches

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


@pytest.mark.parametrize("tile", [TILES[0], TILES[1], TILES[3]], ids=str)
@pytest.mark.parametrize("case", TILED, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_any_tile_rounds_alike(precision, case, tile):
    with forced(tile):
        check_rounded(case, "triton", precision, entry("triton").rounded[precision], str(tile))


@pytest.mark.parametrize(
    ("forward", "backward", "programs"),
    [(TILES[0], TILES[3], (3, 3)), (TILES[2], TILES[4], (2, 1)), (TILES[3], TILES[0], (1, 4))],
    ids=str,
)
def test_the_backward_pass_has_tiles_of_its_own(forward, backward, programs, monkeypatch):
    """One that does not divide the padded rows of the forward pass is halved until it does: 48 rows take 16."""
    case = TILED[0]
    seen = launches(monkeypatch)
    with forced(forward, backward):
        got = run(case, "triton")
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend="triton")
    grids = {kernel.name: grid[0] for kernel, grid in seen}
    assert (grids["chain_fwd"], grids["chain_bwd"]) == programs
