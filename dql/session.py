"""Takes runs to their ends side by side, in one process: updates in blocks, what each run owes in between, evaluations
of all that owe one, signals.

Each run is to the bit what it would be alone: how many updates are done between two looks at the signals changes
nothing, nor do the other runs.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from rich.console import Console

from dql.agents.diffusion import DiffusionBC
from dql.checkpoint import CheckpointError
from dql.data import TransitionDataset
from dql.ensemble import Block, Ensemble, one_by_one
from dql.evaluate import Evaluation, EvaluationStopped, evaluate_all
from dql.loop import Loop, RunResult
from dql.parallel import Shard, ShardedUpdate
from dql.progress import Show, progress
from dql.rundir import RunError
from dql.staging import batches_on
from dql.update_graphed import GraphedUpdate

_A_BLOCK = 0.2  # seconds of updates between two looks at the signals
_MOST = 256


class SeedsFailedError(RunError):
    """Of several runs some failed, and the others have ended; the message names each with its reason."""


class _Interrupted(BaseException):
    """A signal came during an evaluation: no environment's `except Exception` is to keep it."""


OwnUpdate = Callable[[], dict[str, torch.Tensor]]
"""A run's next update, where it is not `agent.update`."""


def _graphed(loop: Loop) -> OwnUpdate:
    assert isinstance(loop.agent, DiffusionBC)
    update = GraphedUpdate(loop.agent, loop.config.agent.batch_size)
    c = loop.config.agent

    def next_update() -> dict[str, torch.Tensor]:
        if isinstance(loop.batches, TransitionDataset):
            return update.update_from(loop.batches)
        return update.update(loop.batches.sample(c.batch_size, c.seed, loop.agent.step))

    return next_update


def _sharded(loop: Loop, shard: Shard) -> OwnUpdate:
    update = ShardedUpdate(loop.agent, shard)
    return lambda: update.update(update.batch(loop.data))


class Session:
    """Runs of one algorithm on one device, one for each seed.

    Args:
        loops: the runs.
        console: where progress is shown.
        threads: CPU threads for all of them.
        shard: this process's part of their batches, where several processes share them.
    """

    def __init__(self, loops: Sequence[Loop], console: Console, threads: int, shard: Shard | None = None) -> None:
        self.loops, self.console, self.threads = list(loops), console, threads
        self.ensemble = Ensemble([loop.agent for loop in loops], threads=threads)
        self.shard = shard
        self.own: dict[Loop, OwnUpdate] = {}
        for loop in loops if loops[0].config.graphed or shard is not None else ():
            self.own[loop] = _graphed(loop) if shard is None else _sharded(loop, shard)
        self.failed: dict[Loop, RunError | CheckpointError] = {}
        self.stop: str | None = None
        self.rolling_out = False
        self._block = 1  # updates between two looks at the signals

    def run(self) -> list[RunResult]:
        """Takes the runs to their ends, or to a signal. What fails in one of several costs the others nothing.

        Raises:
            CheckpointError: of a single run: the disk is full or not writable.
            TrainingDivergedError: of a single run: a loss became NaN.
            SeedsFailedError: that, of some of several.
        """
        config, step = self.loops[0].config.agent, min(loop.agent.step for loop in self.loops)
        with (
            _signals(self._on_signal),
            progress(config, step, self.console, len(self.loops)) as show,
            contextlib.ExitStack() as staged,
        ):
            for loop in self.loops:
                self._guard(loop, loop.begin)
                loop.batches = staged.enter_context(batches_on(loop.data, loop.agent.device))
            self._evaluate()
            began = [loop.state.seconds for loop in self.loops]
            started, apart = time.perf_counter(), 0.0
            while going := [loop for loop in self._whole() if not loop.ended]:
                count = self._agreed(self._block)
                if not count:
                    break
                blocks = self._advance({loop: min(loop.until(), count) for loop in going})
                elapsed = time.perf_counter() - started - apart
                for loop, base in zip(self.loops, began, strict=True):
                    if loop in blocks:
                        names, values = blocks[loop]
                        loop.took(names, values, base + elapsed)
                        self._guard(loop, loop.write)
                if any(loop.logged for loop in going):
                    self._show(show)
                apart += self._evaluate()  # `seconds` are those of updates
        for loop in self._whole():
            self._guard(loop, loop.end)
        if self.failed:
            reasons = "; ".join(f"{loop.folder.path}: {error}" for loop, error in self.failed.items())
            raise SeedsFailedError(
                f"{len(self.failed)} of {len(self.loops)} runs failed, the others did not: {reasons}"
            )
        return [loop.result(self.stop) for loop in self.loops]

    def _show(self, show: Show) -> None:
        """The run that is furthest behind, and the means of all."""
        told = [loop for loop in self._whole() if loop.means]
        if told:
            rate = sum(loop.rate for loop in told) / len(told)
            means = {name: sum(loop.means[name] for loop in told) / len(told) for name in told[0].means}
            show(min(loop.agent.step for loop in told), rate, means)

    def _whole(self) -> list[Loop]:
        return [loop for loop in self.loops if loop not in self.failed]

    def _guard(self, loop: Loop, act: Callable[[], None]) -> None:
        try:
            act()
        except (RunError, CheckpointError) as error:
            if len(self.loops) == 1:
                raise
            self.failed[loop] = error
            self.console.print(f"{loop.name}{error}", markup=False, soft_wrap=True)

    def _agreed(self, count: int) -> int:
        """How many updates are done now, in all processes; 0 if one of them was asked to stop."""
        if self.shard is None:
            return 0 if self.stop is not None else count
        least, stop = self.shard.agree(count, self.stop is not None)
        if stop:
            self.stop = self.stop or signal.Signals.SIGTERM.name
        return 0 if stop else least

    def _advance(self, counts: dict[Loop, int]) -> dict[Loop, Block]:
        began = time.perf_counter()
        blocks: dict[Loop, Block] = {}
        if self.own:
            stop = self._asked_to_stop if self.shard is None else lambda: False  # several processes stop together
            blocks = {loop: one_by_one(self.own[loop], count, stop) for loop, count in counts.items()}
        else:
            found = self.ensemble.advance(
                [loop.batches for loop in self.loops], [counts.get(loop, 0) for loop in self.loops], self._asked_to_stop
            )
            blocks = {loop: block for loop, block in zip(self.loops, found, strict=True) if block is not None}
        done = max(len(values) for _, values in blocks.values())
        each = (time.perf_counter() - began) / done
        self._block = max(1, min(int(_A_BLOCK / max(each, 1e-9)), 2 * done, _MOST))
        return blocks

    def _evaluate(self) -> float:
        """The evaluations that checkpoints owe; they stay owed if a signal ends them. Runs that are complete with them
        end here: the others may take hours more. Returns the seconds it took."""
        began = time.perf_counter()
        owing = [loop for loop in self._whole() if loop.state.evaluation_owed and self.stop is None]
        results: dict[Loop, Evaluation | Exception | None] = {loop: None for loop in owing if not loop.evaluates}
        try:
            results |= self._roll_out([loop for loop in owing if loop.evaluates])
        except (EvaluationStopped, _Interrupted):
            self.rolling_out = False
            return time.perf_counter() - began
        for loop, result in results.items():
            if not isinstance(result, Exception) or self.stop is None:
                self._guard(loop, lambda loop=loop, result=result: loop.evaluated(result))  # type: ignore[misc]
        for loop in self._whole():
            if loop.complete:
                self._guard(loop, loop.end)
        return time.perf_counter() - began

    def _roll_out(self, loops: list[Loop]) -> dict[Loop, Evaluation | Exception | None]:
        if not loops:
            return {}
        run = loops[0].config
        self.rolling_out = True
        try:
            found = evaluate_all(
                [loop.agent for loop in loops],
                [loop.info for loop in loops],
                episodes=run.eval_episodes,
                seeds=[loop.evaluation_seed for loop in loops],
                max_episode_steps=run.eval_max_steps,
                stop=self._asked_to_stop,
                workers=self.threads if loops[0].agent.device.type == "cpu" else 1,
            )
        finally:
            self.rolling_out = False
        return dict(zip(loops, found, strict=True))

    def _asked_to_stop(self) -> bool:
        return self.stop is not None

    def _on_signal(self, name: str) -> None:
        self.stop = name
        if self.rolling_out:  # its checkpoint is written: nothing is lost, and a step that blocks is not waited for
            raise _Interrupted


@contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to end after the updates at hand; a second Ctrl-C interrupts at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        stop(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs that has the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
