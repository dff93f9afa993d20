"""A 1 kHz control loop: in each period, one action for one state. What counts is the slowest call, not the median.

As in a robot's code, the thread waits for an absolute deadline, so the wait's own error does not add up; a call that
runs over the period is missed, and costs the periods it runs into. Python collects its garbage as always.
`latest_start_us` is how late the loop itself woke up, at worst: that is the machine, and it disturbs calls as much.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rivals
import torch
from rivals import A, S, T
from torch import Tensor

import dql

PERIOD = 1e-3  # seconds
SECONDS, SHORT_SECONDS = 10, 2
SPIN = 3e-4  # the last part of a wait: a sleep may end a tenth of a millisecond late, and leaves the core cold
PILOT_CALLS = 50
STATES = 1000  # observed in turn
CANDIDATES = 50
TITLE = f"control loop, {1 / PERIOD:g} Hz"
DQL = rivals.contenders()

Call = Callable[[Tensor], Any]
Times = dict[str, dict[str, np.ndarray]]  # of each call in seconds, by problem and contender


class Timer:
    """Waits for absolute deadlines, a period apart."""

    def __init__(self) -> None:
        self.deadline = time.perf_counter()
        self.late: list[float] = []  # seconds from each deadline to the end of its wait

    def wait(self) -> None:
        """Until the next deadline that is not over."""
        now = time.perf_counter()
        self.deadline += PERIOD * max(1, math.ceil((now - self.deadline) / PERIOD))
        if (rest := self.deadline - now - SPIN) > 0:
            time.sleep(rest)
        while (now := time.perf_counter()) < self.deadline:
            pass
        self.late.append(now - self.deadline)


@pytest.fixture(scope="module")
def times(request: pytest.FixtureRequest) -> Iterator[Times]:
    """Where the tests leave every call's time; drawn when all are done, if --histogram says where."""
    times: Times = {}
    yield times
    path = request.config.getoption("histogram")
    if path is not None and times:
        _draw(times, path)


@pytest.fixture
def control_loop(
    request: pytest.FixtureRequest, benchmark: Any, times: Times, record: Callable[..., None]
) -> Callable[[str, str, Call], None]:
    """`control_loop(problem, contender, call)` runs `call(state [1, S])` every period."""

    def run(problem: str, contender: str, call: Call) -> None:
        states = torch.randn(STATES, 1, S, generator=torch.Generator().manual_seed(0)).unbind()
        pilot = []
        for state in states[:PILOT_CALLS]:
            start = time.perf_counter()
            call(state)
            pilot.append(time.perf_counter() - start)
        seconds = SHORT_SECONDS if request.config.getoption("short") else SECONDS
        periods = math.ceil(float(np.median(pilot)) / PERIOD)  # that a call takes
        timer = Timer()

        def setup() -> tuple[tuple[Tensor], dict]:
            timer.wait()
            return (states[len(timer.late) % STATES],), {}

        benchmark.group = f"{TITLE}: {problem}"
        benchmark.pedantic(call, setup=setup, rounds=round(seconds / PERIOD / periods))
        if benchmark.stats is None:
            return
        calls = np.array(benchmark.stats.stats.data)
        times.setdefault(problem, {})[contender] = calls
        p50, p99, p999 = (float(q) * 1e6 for q in np.quantile(calls, (0.5, 0.99, 0.999), method="inverted_cdf"))
        row: dict[str, Any] = {
            "call": problem,
            "contender": contender,
            "p50_us": p50,
            "p99_us": p99,
            "p99.9_us": p999,
            "worst_us": float(calls.max()) * 1e6,
            "missed": int((calls > PERIOD).sum()),
            "calls": len(calls),
            "latest_start_us": max(timer.late) * 1e6,
        }
        record(TITLE, **row)

    return run


pytestmark = pytest.mark.benchmark(timer=time.perf_counter)  # whatever --benchmark-timer says: deadlines are wall time


@pytest.fixture(autouse=True)
def _on_a_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip(f"the control loop runs on a CPU, this is {device}")


@pytest.mark.parametrize("contender", DQL)
def test_sample(contender: str, control_loop: Callable[..., None]) -> None:
    backend, precision = rivals.backend_of(contender)
    actor = rivals.published_actor(torch.device("cpu"))
    policy = dql.DiffusionPolicy.from_published(actor.state_dict())
    states, noise = torch.zeros(1, S), torch.ones(T, 1, A)
    with torch.no_grad():
        got = dql.sample(states, policy, backend=backend, noise=noise, precision=precision)
        rivals.check_elements(contender, "actions", got, actor.sample(states, noise), rivals.TOLERANCES[precision])
        control_loop("sample", contender, lambda state: dql.sample(state, policy, backend=backend, precision=precision))


@pytest.mark.parametrize("contender", ["published", *DQL])
def test_select(contender: str, control_loop: Callable[..., None]) -> None:
    problem = f"select N={CANDIDATES}"
    published = rivals.published_agent(torch.device("cpu"))
    if contender == "published":
        control_loop(problem, contender, lambda state: published.act(state.numpy()))
        return
    backend, precision = rivals.backend_of(contender)
    agent = rivals.matching_agent(published, dql.Config(), torch.device("cpu"))

    def select(state: Tensor, seed: int | None = None) -> Tensor:
        return dql.select(
            state,
            agent.policy,
            agent.critic_target,
            num_candidates=CANDIDATES,
            backend=backend,
            seed=seed,
            precision=precision,
        )

    state = torch.zeros(1, S)
    with torch.no_grad():
        rivals.check_selected(contender, select(state, seed=0)[0], published, state, CANDIDATES, seed=0)
        control_loop(problem, contender, select)


def _draw(times: Times, path: Path) -> None:
    """A panel a problem, a line a contender: how many calls took how long, both axes logarithmic."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    every = np.concatenate([calls for group in times.values() for calls in group.values()]) * 1e6
    low, high = math.log10(every.min() * 0.9), math.log10(max(every.max(), PERIOD * 1e6) * 1.1)
    edges = np.logspace(low, high, int((high - low) * 40) + 2)  # 40 bins a decade
    names = list(dict.fromkeys(name for group in times.values() for name in group))
    figure = Figure(figsize=(8, 3 * len(times)), layout="constrained")
    panels = figure.subplots(len(times), sharex=True, squeeze=False).flat
    for panel, (problem, group) in zip(panels, times.items(), strict=True):
        for contender, calls in group.items():
            worst = calls.max() * 1e6
            count, _ = np.histogram(calls * 1e6, edges)
            color = f"C{names.index(contender)}"
            panel.stairs(count, edges, color=color, label=f"{contender} (worst {worst:,.0f} us)")
        panel.axvline(PERIOD * 1e6, color="gray", linestyle="--", label="the period")
        panel.set(xscale="log", yscale="log", ylim=(0.7, None), title=problem, ylabel="calls")
        panel.legend(fontsize="small")
    panel.set_xlabel("microseconds a call")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
