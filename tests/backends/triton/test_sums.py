"""Sums over rows of the Triton kernels, in parts: any number of them gives the same."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from support.cases import TOLERANCES, Case, assert_all_close, expected, make_problem, run_problem

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

from support.triton_tiles import TILED, TILES, forced, launches

from dql.kernels.triton import chain_gradients

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")


@pytest.fixture
def tiles():
    with forced(TILES[0]):
        yield


@pytest.fixture
def rows_at_a_time(monkeypatch):
    """A function that sets how many rows the sums take at a time, and for how many multiprocessors they are split."""

    def set_both(rows: int, processors: int) -> None:
        monkeypatch.setattr(chain_gradients, "_CHUNK", rows)
        monkeypatch.setattr(chain_gradients, "multiprocessors", lambda device: processors)
        chain_gradients.products_kernel.cache_clear()

    yield set_both
    chain_gradients.products_kernel.cache_clear()


def run_afresh(case: Case, precision: str = "fp32") -> dict[str, Tensor]:
    """`run` with nothing kept of an earlier call, which is kept with the step table."""
    problem = make_problem(case, torch.float32)
    return run_problem(replace(problem, table=replace(problem.table)), "triton", precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_in_parts(precision, rows_at_a_time, monkeypatch, tiles):
    """Any number of parts gives the same to rounding, and twice the same call the same bits."""
    case = Case(B=13, S=70, A=3, K=4, H=80, N=3, num_hidden=2)  # HP = 128: 4 tiles of 64 x 64, and 4 of the states
    seen = launches(monkeypatch)

    def sums(processors: int) -> tuple[int, dict[str, Tensor]]:
        rows_at_a_time(16, processors)
        seen.clear()
        result, again = (run_afresh(case, precision) for _ in range(2))
        assert all(torch.equal(again[name], result[name]) for name in result), f"{processors} multiprocessors"
        (parts, same) = (grid[1] for kernel, grid in seen if kernel.name == "chain_products")
        assert parts == same
        return parts, result

    one, want = sums(0)
    found = [one]
    for processors in (4, 10_000):
        parts, got = sums(processors)
        found.append(parts)
        assert_all_close(got, want, TOLERANCES["sums"], case=f"{case} in {parts} parts", backend="triton")
    assert found == [1, 2, 3]  # at most one for every 64 of the 4 * 48 rows


def test_more_parts_than_rows(rows_at_a_time, monkeypatch):
    """Parts beyond the last row have nothing to add, and say so."""
    case = TILED[0]
    rows_at_a_time(256, 10_000)
    chain_gradients.products_kernel(make_problem(case, torch.float32).policy.denoiser.spec, "fp32", True)
    monkeypatch.setattr(chain_gradients, "_CHUNK", 8)  # the kernel keeps its 256
    seen = launches(monkeypatch)
    got = run_afresh(case)
    assert next(grid[1] for kernel, grid in seen if kernel.name == "chain_products") > case.K * 64 / 256
    assert_all_close(got, expected(case), TOLERANCES["float32"], case=case, backend="triton")
