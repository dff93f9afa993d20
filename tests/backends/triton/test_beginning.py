"""What an update begins with, in Triton's interpreter: the batch and the draws of `dql.noise`, to the bit."""

import importlib.util

import pytest
import torch

from dql import noise
from dql.kernels import triton as kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton (Linux only)", allow_module_level=True)

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("interpreted", "poisoned")
SEEDS = (2**64 - 1, 5, 2**63, 2**63 + 9, 77)  # target, bc_noise, actor, bc_t, coin


def rows(n: int, S: int, A: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n)
    shapes = ((n, S), (n, A), (n,), (n, S), (n,))
    return [torch.randn(*shape, generator=draw) for shape in shapes]


def made(B: int, S: int, A: int, T: int):
    """(the beginning, its batch, t, seeds, scalars)."""
    batch = [torch.empty_like(tensor) for tensor in rows(B, S, A)]
    t, seeds, scalars = torch.full((B,), -1), torch.full((6,), -1), torch.empty(4)
    return kernels.update_ops().Beginning(batch, t, seeds, scalars, T), batch, t, seeds, scalars


@pytest.mark.parametrize(("B", "S", "A", "T", "n"), [(1, 1, 1, 1, 1), (37, 17, 6, 5, 1000), (64, 130, 20, 1000, 2**17)])
def test_rows_of_a_dataset_and_draws(B, S, A, T, n):
    """Of rows that begin anywhere in a block of Philox."""
    source = rows(n, S, A)
    beginning, batch, t, seeds, scalars = made(B, S, A, T)
    for first in (0, 3 * B, 1001):
        beginning.run(source, (2**64 - 3, first), SEEDS, 0.3, 0.005)
        index = noise.integers(2**64 - 3, n, first + B)[first:]
        assert all(torch.equal(got, tensor[index]) for got, tensor in zip(batch, source, strict=True))
        assert torch.equal(t, noise.integers(SEEDS[3], T, B))
        assert [int(seed) % 2**64 for seed in seeds[::2]] == list(SEEDS[:3])
        heads = int(noise.integers(SEEDS[4], 2, 1))
        assert torch.equal(scalars, torch.tensor([heads, 1 - heads, 0.3, 0.005]))


def test_both_sides_of_the_coin():
    beginning, _, _, _, scalars = made(3, 2, 2, 5)
    seen = set()
    for coin in range(8):
        beginning.run(rows(3, 2, 2), None, (*SEEDS[:4], coin), 1.0, 0.0)
        heads = int(noise.integers(coin, 2, 1))
        assert scalars.tolist() == [heads, 1 - heads, 1.0, 0.0]
        seen.add(heads)
    assert seen == {0, 1}


def test_a_batch_is_copied():
    beginning, batch, *_ = made(37, 17, 6, 5)
    source = rows(37, 17, 6)
    beginning.run(source, None, SEEDS, 1.0, 0.0)
    assert all(torch.equal(got, tensor) for got, tensor in zip(batch, source, strict=True))


def test_memory_that_the_kernel_would_leave():
    beginning, batch, t, seeds, scalars = made(5, 3, 2, 5)
    for source, told in (
        (rows(5, 4, 2), "states"),
        (rows(5, 3, 1), "actions"),
        (rows(6, 3, 2), "a batch has 5 rows, got 6"),
    ):
        with pytest.raises(ValueError, match=told):
            beginning.run(source, None, SEEDS, 1.0, 0.0)
    with pytest.raises(ValueError, match="a dataset has from 1 to 2\\^32 rows, got 0"):
        beginning.run(rows(0, 3, 2), (1, 0), SEEDS, 1.0, 0.0)
    for wrong in ((t.int(), seeds, scalars), (t, seeds[:5], scalars), (t, seeds, scalars.double())):
        with pytest.raises(ValueError, match=r"must be .* in one piece"):
            kernels.update_ops().Beginning(batch, *wrong, 5)
