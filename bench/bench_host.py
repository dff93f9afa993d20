"""What a call of `dql.sample` costs its host: all of it in Python and in Triton's launcher, the driver stubbed. Of
`cuda` the extension's part of a launch is missing, too.

It needs no GPU: `stubbed` says what of a GPU's host is missing then. The least of many short bursts counts, as what a
busy machine adds is not the code's. Nothing is computed, so nothing can be compared; the kernels of a call are counted.
"""

import time
from collections.abc import Callable

import pytest
import rivals
import stubbed
import torch
from table import HOST_TITLE
from torch import Tensor

import dql

BATCH_SIZES = (1, 256)
BURSTS, CALLS = 200, 200
KERNELS = {
    ("triton", "fp32"): ["prologue", "chain_fwd"],
    ("cuda", "fp32"): ["prologue", "chain_forward"],
    ("cuda", "bf16"): ["chain_forward"],
}


def least_us(call: Callable[[], object], bursts: int) -> list[float]:
    """Microseconds of a call: of each burst the mean, sorted."""
    times = []
    for _ in range(bursts):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return sorted(times)


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "unseeded"])
@pytest.mark.parametrize("B", BATCH_SIZES)
@pytest.mark.parametrize(("backend", "precision"), KERNELS)
def test_sample(
    backend: str, precision: str, B: int, seeded: bool, device: torch.device, benchmark, record, request
) -> None:
    if (reason := stubbed.impossible(backend)) is not None:
        pytest.skip(reason)
    bursts = BURSTS // 10 if request.config.getoption("short") else BURSTS
    states = torch.randn(B, rivals.S, generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    policy = dql.DiffusionPolicy(rivals.S, rivals.A, hidden_dim=rivals.H).to(device)
    seed = 0 if seeded else None

    def call() -> Tensor:
        return dql.sample(states, policy, backend=backend, seed=seed, precision=precision)

    with torch.no_grad():
        launched: list[stubbed.Launch] = []
        with stubbed.driver(backend, policy, launched):
            for _ in range(3):  # the second call prepares, the third is as those that are timed
                launched.clear()
                call()
            assert [name for name, _, _ in launched] == KERNELS[backend, precision]
        with stubbed.driver(backend, policy):
            for _ in range(3):
                call()
            times = benchmark.pedantic(least_us, args=(call, bursts), rounds=1)
    told = {"least_us": times[0], "median_us": times[len(times) // 2], "bursts": bursts, "calls_a_burst": CALLS}
    record(HOST_TITLE, backend=backend, precision=precision, B=B, seeded=seeded, **told)
