"""`dql bench tune`: measures the tiles of `dql.kernels.triton.tiles` on the GPU here, and keeps the best on disk.

For each kind of pass, precision and number of rows:
1. every candidate is compiled, in several processes, for chain and critics; what does not fit the GPU or spills is out;
2. each of the others must give the heuristic's results within rounding;
3. all are timed in turn, round by round, by CUDA graphs of the real chain; then the fastest few against the heuristic;
4. the heuristic's tile stays unless another is faster by more than 3% in the median of those last rounds.

Forward passes are timed with the prologue that packs their weights, backward passes without the products that make
weight gradients of what they leave: those take no tile from here. A backward pass starts from what the tile that was
found for "saving" leaves.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch

from dql.backend.base import BackendUnavailable, Chain
from dql.backend.gpu import TRITON
from dql.kernels import limits
from dql.kernels.capture import repeated, replay_seconds
from dql.kernels.layout import DenoiserSpec
from dql.kernels.triton import aot, candidates, packing, tiles
from dql.kernels.triton.candidates import Candidate, Wanted
from dql.kernels.triton.tiles import Shape, Tile
from dql.policy import DiffusionPolicy

Tensor = torch.Tensor
KINDS = ("forward", "saving", "backward")  # in this order: a backward pass needs the tile of "saving"
PRECISIONS = ("fp32", "bf16")  # tf32 has the tiles of fp32
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # of a whole tensor, relative to the heuristic's: |got - want| / |want|
GAIN = 0.03  # that a tile must have to replace the heuristic's
FINALISTS = 3  # beside the heuristic's
NO_BOUND = 1e5  # of actions: without clamps, rounding cannot cut a gradient off
SEED = 3

SAMPLE_SECONDS = 1e-3  # of one sample at least, by several calls; events tick in half a microsecond
MAX_CALLS = 20  # in one graph
WARM_SECONDS = 0.05  # an idle GPU's clocks are low
MIN_ROUNDS, MAX_ROUNDS = 9, 200


class Problem:
    """One chain of random parameters and states, to be run by any tile.

    Args:
        spec: sizes of the denoiser.
        precision: one of PRECISIONS.
        rows: R, a state each.
        steps: K.
        device: where it runs.
    """

    def __init__(self, spec: DenoiserSpec, precision: str, rows: int, steps: int, device: torch.device) -> None:
        own = torch.Generator("cpu").manual_seed(0)
        policy = DiffusionPolicy(
            spec.state_dim, spec.action_dim, NO_BOUND, spec.hidden_dim, spec.num_hidden, T=steps, generator=own
        ).to(device)
        self.states = torch.randn(rows, spec.state_dim, generator=own).to(device)  # [R, S]
        self.d_actions = torch.randn(rows, spec.action_dim, generator=own).to(device)  # [R, A]
        self.rows, self.precision, self.flat = rows, precision, policy.denoiser.buffer.detach()
        runner = TRITON.chain_runner(
            Chain(
                self.flat, policy.denoiser.weights, spec, self.states, 1, None, SEED, policy.step_table(), NO_BOUND,
                precision, policy.denoiser.kept,
            )
        )  # fmt: skip
        from dql.kernels.triton.runner import ChainRunner

        assert isinstance(runner, ChainRunner)
        self.runner = runner

    def shape(self, kind: str) -> Shape:
        sizes = self.runner.sizes
        return Shape(kind, sizes.HP, self.precision == "bf16", self.rows, sizes.AP)

    def heuristic(self, kind: str) -> Tile:
        return tiles.heuristic(self.runner.arch, self.runner.processors, self.shape(kind))

    def saved(self, tile: Tile) -> Any:
        """What a forward pass by `tile` leaves for backward passes."""
        return self._forward("saving", tile)[1]

    def _forward(self, kind: str, tile: Tile) -> tuple[Tensor, Any]:
        with tiles.forced(tile):
            return self.runner.forward(self.flat, self.states, 1, None, SEED, kind == "saving")

    def _backward(self, saved: Any, tile: Tile, wanted: bool) -> list[Tensor]:
        """Gradients of every parameter and of the states; [] if not wanted."""
        with tiles.forced(tile):
            d_flat, d_states = self.runner.backward(self.flat, saved, self.states, self.d_actions, wanted, wanted)
        if d_flat is None or d_states is None:
            return []
        return [*self.runner.spec.layout.views(d_flat).values(), d_states]

    def call(self, kind: str, tile: Tile, saved: Any = None) -> Callable[[], object]:
        """What is timed; a backward pass needs `saved`."""
        if kind == "backward":
            return lambda: self._backward(saved, tile, False)
        return lambda: self._forward(kind, tile)

    def results(self, kind: str, tile: Tile, saved: Any = None) -> list[Tensor]:
        """What is compared: actions, with "saving" the gradients that follow too, or gradients of `saved`."""
        if kind == "backward":
            return self._backward(saved, tile, True)
        actions, left = self._forward(kind, tile)
        return [actions, *(self._backward(left, self.heuristic("backward"), True) if left is not None else [])]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest |got - want| / |want| of all tensors; infinite where one is not finite."""
    largest = 0.0
    for g, w in zip(got, want, strict=True):
        difference, size = float((g.double() - w.double()).norm()), float(w.double().norm())
        if difference != 0:
            largest = max(largest, difference / size if size > 0 and difference < float("inf") else float("inf"))
    return largest


def race(calls: dict[Tile, Callable[[], object]], seconds: float) -> dict[Tile, list[float]]:
    """Device time of each call in seconds, once a round; `seconds` is about how long the rounds last together."""
    pool = torch.cuda.graph_pool_handle()  # one for all: no graph reads what another left, so they may share memory
    once = repeated(next(iter(calls.values())), warm_ups=1, pool=pool)
    replay_seconds(once)
    count = max(1, min(int(SAMPLE_SECONDS / replay_seconds(once)) + 1, MAX_CALLS))
    graphs = {tile: repeated(call, count, warm_ups=1, pool=pool) for tile, call in calls.items()}
    warm = time.perf_counter() + WARM_SECONDS
    for graph in graphs.values():
        replay_seconds(graph)
    while time.perf_counter() < warm:
        replay_seconds(once)
    times: dict[Tile, list[float]] = {tile: [] for tile in calls}
    order, stop = list(calls), time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        for tile in order:
            times[tile].append(replay_seconds(graphs[tile]) / count)
        order.reverse()  # nobody always follows the same one
    return times


@dataclass(frozen=True)
class Outcome:
    """What was found for one shape.

    Attributes:
        key: the shape's in the file.
        heuristic_seconds: None if the heuristic's tile was refused.
        best: None if every tile was refused.
        measured: how many tiles were timed.
        wrong: tiles that launch and whose results are not the heuristic's: a defect, and never chosen.
        rounds: how many decided.
    """

    kind: str
    precision: str
    rows: int
    key: str
    heuristic: Tile
    heuristic_seconds: float | None
    best: Tile | None
    best_seconds: float | None
    measured: int = 0
    wrong: tuple[Tile, ...] = ()
    rounds: int = 0

    @property
    def gain(self) -> float | None:
        """How much faster the best is than the heuristic's: 0.1 is 10%."""
        if self.heuristic_seconds is None or self.best_seconds is None:
            return None
        return self.heuristic_seconds / self.best_seconds - 1


def decide(times: dict[Tile, list[float]], heuristic: Tile) -> Tile:
    """The tile with the least median, or the heuristic's, if it is among them and not slower by more than GAIN."""
    best = min(times, key=lambda tile: median(times[tile]))
    if heuristic in times and median(times[heuristic]) <= median(times[best]) * (1 + GAIN):
        return heuristic
    return best


def agreeing(problem: Problem, kind: str, kept: list[Tile], saved: Any) -> tuple[list[Tile], tuple[Tile, ...]]:
    """(tiles whose results are those of the first one, the others)."""
    want = problem.results(kind, kept[0], saved)
    limit = TOLERANCES[problem.precision]
    right = [tile for tile in kept if distance(problem.results(kind, tile, saved), want) <= limit]
    return right, tuple(tile for tile in kept if tile not in right)


def measure(problem: Problem, kind: str, kept: list[Tile], saved: Any, seconds: float) -> Outcome:
    """Compares and times tiles that launch; `saved` is what a backward pass starts from."""
    runner, heuristic = problem.runner, problem.heuristic(kind)
    key = tiles.key(runner.arch, runner.processors, problem.shape(kind))
    outcome = Outcome(kind, problem.precision, problem.rows, key, heuristic, None, None, None)
    if not kept:
        return outcome
    kept, wrong = agreeing(problem, kind, sorted(kept, key=lambda tile: tile != heuristic), saved)
    if not kept:  # NaN is not even what it is itself
        return replace(outcome, wrong=wrong)
    times = race({tile: problem.call(kind, tile, saved) for tile in kept}, seconds / 2)
    fastest = sorted((tile for tile in kept if tile != heuristic), key=lambda tile: median(times[tile]))
    last = [*(t for t in kept if t == heuristic), *fastest[:FINALISTS]]
    times = race({tile: problem.call(kind, tile, saved) for tile in last}, seconds / 2)
    best = decide(times, heuristic)
    return replace(
        outcome,
        heuristic_seconds=median(times[heuristic]) if heuristic in times else None,
        best=best,
        best_seconds=median(times[best]),
        measured=len(kept),
        wrong=wrong,
        rounds=len(times[best]),
    )


# The command


def tune(
    *,
    spec: DenoiserSpec,
    rows: str,
    precision: str,
    kinds: str,
    steps: int,
    seconds: float,
    arch: str | None = None,
    jobs: int | None = None,
    as_json: bool = False,
    dry_run: bool = False,
) -> int:
    """`dql bench tune`; gives the exit code.

    Args:
        spec: sizes of the denoiser.
        rows: numbers of rows, joined by commas.
        precision: of PRECISIONS, joined by commas.
        kinds: of KINDS, joined by commas.
        steps: K.
        seconds: of measurement for each shape, about.
        arch: with `dry_run`, what to compile for.
        jobs: compiling processes; by default one a core.
        as_json: print JSON.
        dry_run: compile and list the candidates, measure nothing.

    Raises:
        ValueError: an argument that cannot be; or rows that do not fit into the GPU's memory.
        BackendUnavailable: there is no GPU to measure on, or no Triton.
    """
    precisions, passes = _some(precision, PRECISIONS, "--precision"), _some(kinds, KINDS, "--kinds")
    numbers = sorted({_number(text) for text in rows.split(",")})
    if (limit := limits.unfit(spec)) is not None:
        raise ValueError(f"nothing to tune for this network: {limit}")
    if not 1 <= steps <= limits.MAX_STEPS:
        raise ValueError(f"--steps must be from 1 to {limits.MAX_STEPS}, not {steps}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds must be positive, not {seconds}")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable('Triton is not installed; pip install -e ".[triton]" (Linux only)')
    if arch is not None and not dry_run:
        raise ValueError("--arch goes with --dry-run: tiles are measured on the GPU that is here")
    number = aot.architecture(_architecture_here() if arch is None else arch)

    HP, AP = packing.rounded(spec.hidden_dim), packing.rounded(spec.action_dim)
    processors = 0 if dry_run else torch.cuda.get_device_properties("cuda").multi_processor_count
    of_shape: dict[tuple[str, str, int], list[Tile]] = {}
    for p in precisions:
        for R in numbers:
            for kind in passes:
                shape = Shape(kind, HP, p == "bf16", R, AP)
                first = [] if dry_run else [tiles.heuristic(number, processors, shape)]
                of_shape[kind, p, R] = list(dict.fromkeys(first + candidates.for_shape(number, shape)))
    wanted: list[Wanted] = list(dict.fromkeys((kind, p, t) for (kind, p, _), some in of_shape.items() for t in some))
    if dry_run:
        with _Progress() as progress:
            found = candidates.compiled(number, spec, wanted, jobs, progress=progress.compiled)
        _print_candidates(number, found, as_json)
        return 0

    outcomes, device = [], torch.device("cuda", torch.cuda.current_device())
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton")}
    with _Progress() as progress, torch.no_grad():
        found = candidates.compiled(number, spec, wanted, jobs, keep=True, progress=progress.compiled)
        kept = {(c.kind, c.precision, c.tile) for c in found if c.refused is None}
        for p in precisions:
            for R in numbers:
                progress.tell(f"{p}, {R:,} rows")
                some = {kind: [t for t in of_shape[kind, p, R] if (kind, p, t) in kept] for kind in passes}
                try:
                    for outcome in _measure_all(Problem(spec, p, R, steps, device), some, seconds):
                        outcomes.append(outcome)
                        if outcome.best is not None:  # at once: what is found stays, whatever comes next
                            tiles.remember({outcome.key: outcome.best}, about)
                except torch.OutOfMemoryError:
                    raise ValueError(
                        f"the GPU has not the memory for {R:,} rows of {p} with a backward pass; leave them "
                        f"out of --rows, or give --kinds forward; what was found before is in {tiles.tuned_path()}"
                    ) from None
    _print_outcomes(
        outcomes, about, f"{len(found) - len(kept)} of {len(found)} compiled tiles do not fit or spill", as_json
    )
    return 0


def _measure_all(problem: Problem, some: dict[str, list[Tile]], seconds: float) -> Iterator[Outcome]:
    saving = problem.heuristic("saving")
    for kind, kept in some.items():
        saved = None
        if kind == "backward":
            saved, usual = problem.saved(saving), problem.heuristic(kind)
            kept = [t for t in kept if saved.rows % t.rows == 0 or t == usual]  # others would run with fewer rows
        outcome = measure(problem, kind, kept, saved, seconds)
        if kind == "saving" and outcome.best is not None:
            saving = outcome.best
        yield outcome


def _architecture_here() -> int:
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "no CUDA device: tiles are measured on the GPU that will use them; --dry-run --arch sm_90 lists the "
            "candidates without one"
        )
    if TRITON.stands_in():
        raise BackendUnavailable("TRITON_INTERPRET=1 runs kernels on the CPU; unset it to measure them on the GPU")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _some(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            tf32 = "; tf32 uses the tiles of fp32" if name == "tf32" else ""
            raise ValueError(f"{flag} takes {', '.join(known)}, joined by commas, not {name!r}{tf32}")
    return [name for name in known if name in names]


def _number(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if not 1 <= number <= limits.MAX_ROWS:
        raise ValueError(f"--rows takes numbers from 1 to {limits.MAX_ROWS}, joined by commas, not {text.strip()!r}")
    return number


class _Progress:
    """A line on a terminal, nothing elsewhere."""

    def __enter__(self) -> "_Progress":
        from dql.terminal import make_console

        console = make_console(stderr=True)
        self._status = console.status("compiling") if console.is_terminal else None
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def compiled(self, done: int, of: int) -> None:
        self.tell(f"{done} of {of} tiles compiled")

    def tell(self, said: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(said))  # or it would be markup


def _text(tile: Tile | None) -> str:
    return "" if tile is None else f"{tile.rows} x {tile.chunk}, ring {tile.stages}, {tile.warps} warps"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.1f}"


def _print(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    from dql.terminal import make_console

    console = make_console()
    table = Table(title=title, title_justify="left")
    for column in columns:
        left = column in ("pass", "precision", "dropped because") or column.endswith("tile")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_candidates(arch: int, found: list[Candidate], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"arch": arch} | asdict(c) for c in found], indent=2))
        return
    rows = []
    for c in found:
        sizes = ("", "") if c.report is None else (str(c.report.registers), f"{c.report.shared:,}")
        rows.append((c.kind, c.precision, _text(c.tile), *sizes, c.refused or ""))
    left = sum(c.refused is None for c in found)
    columns = ("pass", "precision", "tile", "registers", "shared", "dropped because")
    _print(f"sm_{arch}: {left} of {len(found)} tiles would be measured", columns, rows)


def _print_outcomes(outcomes: list[Outcome], about: dict[str, str], dropped: str, as_json: bool) -> None:
    path = tiles.tuned_path()
    if as_json:
        shapes = [asdict(o) | {"gain": o.gain} for o in outcomes]
        print(json.dumps({"about": about, "file": str(path), "shapes": shapes}, indent=2))
        return
    rows = []
    for o in outcomes:
        before = _microseconds(o.heuristic_seconds) or "dropped"
        gain = "" if o.gain is None else "the same" if o.best == o.heuristic else f"{o.gain:+.1%}"
        best = (_text(o.best) or "none fits", _microseconds(o.best_seconds))
        rows.append((o.kind, o.precision, f"{o.rows:,}", _text(o.heuristic), before, *best, gain, str(o.measured)))
    columns = ("pass", "precision", "rows", "heuristic's tile", "us", "best tile", "us", "faster by", "measured")
    _print(f"{about['gpu']}: {dropped}", columns, rows)
    for o in outcomes:
        for tile in o.wrong:
            print(f"left out, a defect: {_text(tile)} gives other results in {o.key}")
    print(f"written to {path}; processes that start from now on use it")
