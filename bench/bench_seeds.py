"""Several seeds in one process on the CPU: the updates of four agents side by side, and one after the other.

Each round times as many updates twice: of four agents on so many threads, a thread each, and of the same agents one
after the other on one.
"""

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rivals import A, S

import dql
from dql.data import DatasetInfo
from dql.kernels.cpp import binding

M, B = 4, 256
TITLE = "four seeds in one process"
SECONDS, SHORT_SECONDS, MIN_ROUNDS = 20.0, 3.0, 5


def _data(device: torch.device) -> dql.TransitionDataset:
    generator = torch.Generator().manual_seed(1)
    states, next_states = torch.randn(2, 100_000, S, generator=generator)
    actions = torch.rand(100_000, A, generator=generator) * 2 - 1
    rewards, masks = torch.randn(100_000, generator=generator), torch.ones(100_000)
    info = DatasetInfo("bench", None, None, None, 1, np.zeros(0), "Box", max_action=1.0)
    return dql.TransitionDataset(states, actions, rewards, next_states, masks, info).to(device)


@pytest.mark.skipif(binding.unavailable() is not None, reason=str(binding.unavailable()))
@pytest.mark.parametrize("threads", [2, 4])
def test_seeds(
    threads: int,
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: torch.device,
    record: Callable[..., None],
) -> None:
    if device.type != "cpu":
        pytest.skip(f"the backend cpp runs on a CPU, this is {device}")
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"this process may use {len(os.sched_getaffinity(0))} cores")
    data = _data(device)
    several = dql.Ensemble.of(S, A, dql.Config(backend="cpp", batch_size=B), seeds=range(M), threads=threads)
    own = [copy.copy(data) for _ in range(M)]
    updates, timer = 4, benchmark._timer
    alone_times: list[float] = []

    def together() -> None:
        several.advance(own, [updates] * M)

    def alone() -> None:
        several.threads = 1
        start = timer()
        for i in range(M):
            several.advance(own, [updates if j == i else 0 for j in range(M)])
        alone_times.append(timer() - start)
        several.threads = threads

    together()
    alone()
    seconds = SHORT_SECONDS if request.config.getoption("short") else SECONDS
    rounds = max(MIN_ROUNDS, int(seconds / (2 * alone_times[0])))
    alone_times.clear()
    benchmark.group = TITLE
    benchmark.pedantic(together, setup=alone, rounds=rounds)
    if benchmark.stats is None:
        return
    ratios = [one / all_ for one, all_ in zip(alone_times, benchmark.stats.stats.data, strict=False)]
    low, median, high = statistics.quantiles(ratios)
    record(
        TITLE,
        seeds=M,
        threads=threads,
        ms_per_update=statistics.median(benchmark.stats.stats.data) / (M * updates) * 1e3,
        times_as_fast_as_in_turn=median,
        quartiles=[low, high],
        rounds=len(ratios),
    )
