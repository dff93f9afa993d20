"""The loop over updates and what happens between them: lines of metrics, checkpoints, evaluations.

A checkpoint comes before the evaluation at its update and says that this one is owed; once it is done, loop.json is
written again. So an evaluation that is stopped, killed or crashes costs itself alone, and a resumed run does it again.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dql import noise
from dql.agents.base import Agent
from dql.agents.diffusion import DiffusionBC
from dql.checkpoint import CheckpointError
from dql.config import DIFFUSION, RunConfig
from dql.data import DatasetInfo, TransitionDataset
from dql.evaluate import Evaluation, EvaluationStopped, Scored, evaluate, select_checkpoints, worth_keeping
from dql.progress import progress
from dql.rundir import RunDir, RunError, append_row
from dql.shown import said
from dql.staging import Source, batches_on
from dql.update_graphed import GraphedUpdate

# What evaluations.csv has for an evaluation that failed, beside its step and bc_loss.
_NO_RESULT: dict[str, Any] = dict.fromkeys(Evaluation(np.zeros(1), np.zeros(1, np.int64), None).to_dict())


class TrainingDivergedError(RunError):
    """A loss became NaN or infinite; the message names the last good checkpoint and what to change."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: the run folder.
        agent: as it is after the last update.
        step: updates done.
        evaluations: those of this process that succeeded, with their steps; evaluations.csv has all.
        stopped_by: name of the signal that ended it early, or None.
        seconds: spent in updates, over all resumptions.
    """

    path: Path
    agent: Agent
    step: int
    evaluations: list[tuple[int, Evaluation]]
    stopped_by: str | None
    seconds: float


class _Interrupted(BaseException):
    """A signal came during an evaluation: no environment's `except Exception` is to keep it."""


class _Means:
    """Running means of an update's metrics, kept on the device: no sync until somebody reads them."""

    def __init__(self, sums: list[float] | None = None, count: int = 0) -> None:
        self.sums: torch.Tensor | None = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        self.count = count

    def add(self, values: torch.Tensor) -> None:
        self.sums = values.clone() if self.sums is None else self.sums.to(values.device).add_(values)
        self.count += 1

    def read(self) -> list[float]:
        return [] if self.sums is None else (self.sums / max(self.count, 1)).tolist()

    def state(self) -> dict[str, Any]:
        return {"sums": None if self.sums is None else self.sums.tolist(), "count": self.count}


@dataclass
class LoopState:
    """What a checkpoint holds beside the agent, in loop.json."""

    seconds: float = 0.0
    since_log: _Means = field(default_factory=_Means)
    since_evaluation: _Means = field(default_factory=_Means)
    scored: list[Scored] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Of an update's metrics."""
    evaluation_owed: bool = False
    """The evaluation at this update has not been done."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; the inverse of `from_dict`."""
        return {
            "seconds": self.seconds,
            "since_log": self.since_log.state(),
            "since_evaluation": self.since_evaluation.state(),
            "evaluations": [
                vars(s) | {"return_mean": None if math.isnan(s.return_mean) else s.return_mean} for s in self.scored
            ],
            "names": self.names,
            "evaluation_owed": self.evaluation_owed,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoopState":
        """Raises ValueError for what `to_dict` never gives; an earlier version's loop.json has no `evaluation_owed`."""
        known = {"seconds", "since_log", "since_evaluation", "evaluations", "names", "evaluation_owed"}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown field {unknown[0]!r}")
        if missing := sorted(known - {"evaluation_owed"} - values.keys()):
            raise ValueError(f"field {missing[0]!r} is missing")
        names, scored, owed = values["names"], values["evaluations"], values.get("evaluation_owed", False)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names are no list of strings")
        if names and "actor/bc_loss" not in names:
            raise ValueError("names have no actor/bc_loss")
        if not isinstance(owed, bool):
            raise ValueError("evaluation_owed is neither true nor false")
        if not isinstance(scored, list) or not all(
            isinstance(s, dict) and s.keys() == {"step", "return_mean", "bc_loss"} and type(s["step"]) is int
            for s in scored
        ):
            raise ValueError("evaluations are no list of steps, returns and losses")
        return cls(
            _number(values["seconds"]),
            _means(values["since_log"], len(names)),
            _means(values["since_evaluation"], len(names)),
            [
                Scored(
                    s["step"],
                    math.nan if s["return_mean"] is None else _number(s["return_mean"]),
                    _number(s["bc_loss"]),
                )
                for s in scored
            ],
            names,
            owed,
        )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e308:
        raise ValueError(f"{value!r:.80} is no number")
    return value


def _means(values: Any, count: int) -> _Means:
    if not isinstance(values, dict) or values.keys() != {"sums", "count"} or type(values["count"]) is not int:
        raise ValueError("means are no sums and their count")
    sums = values["sums"]
    if sums is not None and (not isinstance(sums, list) or len(sums) != count):
        raise ValueError(f"sums are no list of {count} numbers")
    if not 0 <= values["count"] < 1 << 53:
        raise ValueError(f"count is {values['count']!r:.80}")
    return _Means(None if sums is None else [_number(value) for value in sums], values["count"])


class Loop:
    """The loop over updates and everything that happens between them.

    Args:
        run: what to do.
        folder: where it is written.
        data: on the agent's device, or on the CPU, from which their batches are staged.
        info: names the environment to evaluate in.
        agent: as it is after its last update.
        console: where progress is shown.
        origin: what a checkpoint says about whose it is, see `dql.train`.
        state: of the checkpoint that is resumed; None at the beginning.
        evaluates: whether the environment can be made here; if not, every evaluation counts as failed.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: RunDir,
        data: TransitionDataset,
        info: DatasetInfo,
        agent: Agent,
        console: Console,
        origin: dict[str, Any],
        state: LoopState | None = None,
        *,
        evaluates: bool = True,
    ) -> None:
        self.config, self.folder, self.data, self.info, self.agent = run, folder, data, info, agent
        self.update = agent.update
        if run.graphed:
            assert isinstance(agent, DiffusionBC)
            self.update = GraphedUpdate(agent, run.agent.batch_size).update
        self.console, self.origin, self.evaluates = console, origin, evaluates
        self.state = state or LoopState()
        self.saved_step = -1 if state is None else agent.step
        self.results: list[tuple[int, Evaluation]] = []
        self.stop: str | None = None
        self.rolling_out = False
        self.batches: Source = data

    def run(self) -> RunResult:
        """Takes the run to its end, or to a signal.

        Raises:
            CheckpointError: the disk is full or not writable.
            TrainingDivergedError: a loss became NaN.
        """
        run, agent, state = self.config, self.agent, self.state
        with (
            _signals(self._on_signal),
            progress(run.agent, agent.step, self.console) as show,
            batches_on(self.data, agent.device) as self.batches,
        ):
            if self.saved_step >= 0:  # resumed: what ended it may have come between a checkpoint and what follows it
                self._tidy()
                if log_owed(run, state, agent.step):
                    self._log(agent.step / max(state.seconds, 1e-9))
                if state.evaluation_owed:
                    self._evaluate()
            elif run.eval_at_start and run.eval_every:
                state.evaluation_owed = True
                self._save()
                self._evaluate()
            last_seconds, last_step = state.seconds, agent.step
            started = time.perf_counter() - state.seconds
            while agent.step < run.agent.num_updates and self.stop is None:
                self._update()
                step = agent.step
                ended = step == run.agent.num_updates
                state.evaluation_owed = bool(run.eval_every) and (step % run.eval_every == 0 or ended)
                if step % run.log_every == 0 or ended:
                    state.seconds = time.perf_counter() - started
                    rate = (step - last_step) / max(state.seconds - last_seconds, 1e-9)
                    last_seconds, last_step = state.seconds, step
                    show(step, rate, self._log(rate))
                if state.evaluation_owed or ended or step % run.checkpoint_every == 0:
                    state.seconds = time.perf_counter() - started
                    self._save()
                if state.evaluation_owed:
                    before = time.perf_counter()
                    self._evaluate()
                    started += time.perf_counter() - before  # `seconds` are those of updates
            state.seconds = time.perf_counter() - started
        if self.stop is not None and self.saved_step != agent.step:
            self._save()
        if self.stop is None and run.agent.algorithm in DIFFUSION:
            agent.save_policy(self.folder.policy_path)
        return RunResult(self.folder.path, agent, agent.step, self.results, self.stop, state.seconds)

    def _on_signal(self, name: str) -> None:
        self.stop = name
        if self.rolling_out:  # its checkpoint is written: nothing is lost, and a step that blocks is not waited for
            raise _Interrupted

    def _update(self) -> None:
        c = self.config.agent
        metrics = self.update(self.batches.sample(c.batch_size, c.seed, self.agent.step))
        self.state.names = list(metrics)
        values = torch.stack(list(metrics.values())).double()
        self.state.since_log.add(values)
        self.state.since_evaluation.add(values)

    def _log(self, rate: float) -> dict[str, float]:
        means = dict(zip(self.state.names, self.state.since_log.read(), strict=True))
        self._check(means)
        row = {"step": self.agent.step, "seconds": round(self.state.seconds, 3), "updates_per_second": round(rate, 3)}
        try:
            append_row(self.folder.metrics_path, row | means)
        except CheckpointError:
            # There may be room for a checkpoint all the same: then a resumed run has only this line to write.
            if self.saved_step != self.agent.step:
                with suppress(CheckpointError):
                    self._save()
            raise
        self.state.since_log = _Means()
        return means

    def _check(self, means: dict[str, float]) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            steps = self.folder.steps()
            where = (
                f"the last good checkpoint is {self.folder.checkpoint_path(steps[-1])}" if steps else "none is saved"
            )
            raise TrainingDivergedError(
                f"{bad[0]} became NaN or infinite before update {self.agent.step:,}; {where}; try a lower --lr, "
                "--reward-tune normalize, or another --grad-norm"
            )

    def _evaluate(self) -> None:
        """The evaluation that the checkpoint of this update owes; it stays owed if a signal ends it."""
        run, step, state = self.config, self.agent.step, self.state
        try:
            result = self._roll_out() if self.evaluates else None
        except (EvaluationStopped, _Interrupted):
            self.rolling_out = False
            return
        except Exception as error:  # whatever an environment raises: the training does not depend on it
            if self.stop is not None:
                return
            result = None
            self._say(
                f"update {step:,}: the evaluation failed ({said(error)}); its line in evaluations.csv is empty, and "
                "the run goes on"
            )
        losses = dict(zip(state.names, state.since_evaluation.read(), strict=True))
        bc_loss = losses.get("actor/bc_loss")  # none before the first update
        described = _NO_RESULT if result is None else result.to_dict()
        append_row(self.folder.evaluations_path, {"step": step} | described | {"bc_loss": bc_loss})
        if bc_loss is not None:  # what has learnt nothing is not to be selected
            state.scored.append(Scored(step, math.nan if result is None else result.return_mean, bc_loss))
        state.since_evaluation, state.evaluation_owed = _Means(), False
        if result is not None:
            self.results.append((step, result))
            low, high = result.return_interval
            score = "" if result.normalized_score is None else f", normalised score {result.normalized_score:.1f}"
            self._say(
                f"update {step:,}: return {result.return_mean:.1f} [{low:.1f}, {high:.1f}] "
                f"over {run.eval_episodes} episodes{score}"
            )
        self.folder.save_loop(step, self._written())
        self._tidy()

    def _roll_out(self) -> Evaluation:
        run = self.config
        self.rolling_out = True
        try:
            return evaluate(
                self.agent,
                self.info,
                episodes=run.eval_episodes,
                seed=noise.derive(run.agent.seed, "evaluation"),
                max_episode_steps=run.eval_max_steps,
                stop=lambda: self.stop is not None,
            )
        finally:
            self.rolling_out = False

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _written(self) -> dict[str, Any]:
        return self.state.to_dict() | {"of": self.origin | {"step": self.agent.step}}

    def _save(self) -> None:
        """A checkpoint, and what follows from it."""
        self._check(dict(zip(self.state.names, self.state.since_log.read(), strict=False)))
        step = self.agent.step
        self.folder.save_checkpoint(step, self.agent, self._written())
        self.saved_step = step
        self._tidy()

    def _tidy(self) -> None:
        """The selection written, and the checkpoints removed that nothing asks for any more."""
        scored = self.state.scored
        if scored:
            chosen = select_checkpoints(scored, self.config.top_k) | {"last": self.saved_step}
            self.folder.write_json("selection.json", chosen)
        self.folder.prune(self.config.keep, worth_keeping(scored, self.config.top_k) | {self.saved_step})


def log_owed(run: RunConfig, state: LoopState, step: int) -> bool:
    """Whether the line of metrics at this update could not be written: else its sums would have begun anew."""
    return state.since_log.count > 0 and (step % run.log_every == 0 or step == run.agent.num_updates)


@contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to end after the update at hand; a second Ctrl-C interrupts at once."""

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
