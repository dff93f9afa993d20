"""What happens between the updates of a run: lines of metrics, checkpoints, evaluations.

A checkpoint comes before the evaluation at its update and says that this one is owed; once it is done, loop.json is
written again. So an evaluation that is stopped, killed or crashes costs itself alone, and a resumed run does it again.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dql import noise
from dql.agents.base import Agent
from dql.checkpoint import CheckpointError
from dql.config import DIFFUSION, RunConfig
from dql.data import DatasetInfo, TransitionDataset
from dql.evaluate import Evaluation, Scored, select_checkpoints, worth_keeping
from dql.rundir import RunDir, RunError, append_row
from dql.shown import said
from dql.staging import Source

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


class _Means:
    """Running means of an update's metrics."""

    def __init__(self, sums: list[float] | None = None, count: int = 0) -> None:
        self.sums: torch.Tensor | None = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        self.count = count

    def add(self, values: torch.Tensor) -> None:
        self.sums = values.clone() if self.sums is None else self.sums.add_(values)
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
    """What happens between the updates of one run: which of it is owed when, and writing it. `dql.session` drives it.

    Args:
        run: what to do.
        folder: where it is written.
        data: on the agent's device, or on the CPU, from which their batches are staged.
        info: names the environment to evaluate in.
        agent: as it is after its last update.
        console: where evaluations are told of.
        origin: what a checkpoint says about whose it is, see `dql.train`.
        state: of the checkpoint that is resumed; None at the beginning.
        evaluates: whether the environment can be made here; if not, every evaluation counts as failed.
        name: stands before what is told, where several runs tell.
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
        name: str = "",
    ) -> None:
        self.config, self.folder, self.data, self.info, self.agent = run, folder, data, info, agent
        self.console, self.origin, self.evaluates, self.name = console, origin, evaluates, name
        self.state = state or LoopState()
        self.saved_step = -1 if state is None else agent.step
        self.results: list[tuple[int, Evaluation]] = []
        self.batches: Source = data
        self.rate, self.means, self.logged = 0.0, dict[str, float](), False
        self._last_log = (self.state.seconds, agent.step)
        self._left = False

    @property
    def ended(self) -> bool:
        """Whether all updates are done."""
        return self.agent.step >= self.config.agent.num_updates

    @property
    def complete(self) -> bool:
        """Whether it has ended and owes nothing but its policy."""
        return self.ended and not self.state.evaluation_owed

    def begin(self) -> None:
        """What a run writes before its first update, or a resumed one because what ended it came between a checkpoint
        and what follows that.

        Raises: as `write`.
        """
        if self.saved_step >= 0:
            self._tidy()
            if log_owed(self.config, self.state, self.agent.step):
                self._log(self.agent.step / max(self.state.seconds, 1e-9))
        elif self.config.eval_at_start and self.config.eval_every:
            self.state.evaluation_owed = True
            self._save()

    def until(self) -> int:
        """Updates until something is to be written."""
        run, step = self.config, self.agent.step
        every = [n for n in (run.log_every, run.checkpoint_every, run.eval_every) if n]
        return min(run.agent.num_updates - step, *(n - step % n for n in every))

    def took(self, names: list[str], values: torch.Tensor, seconds: float) -> None:
        """The metrics of the updates that were done, float64 [n, m], and how long the run's updates took in all."""
        self.state.names, self.state.seconds = names, seconds
        # One after the other, in blocks or not: the same sums. On the host: a GPU is waited for once a block, in place
        # of two launches an update.
        for row in values.cpu():
            self.state.since_log.add(row)
            self.state.since_evaluation.add(row)

    def write(self) -> None:
        """What is owed at this update: a line of metrics, a checkpoint. Afterwards `state.evaluation_owed` and `logged`
        are right.

        Raises:
            CheckpointError: the disk is full or not writable.
            TrainingDivergedError: a loss became NaN.
        """
        run, state, step = self.config, self.state, self.agent.step
        state.evaluation_owed = bool(run.eval_every) and (step % run.eval_every == 0 or self.ended)
        self.logged = step % run.log_every == 0 or self.ended
        if self.logged:
            seconds, first = self._last_log
            self.rate = (step - first) / max(state.seconds - seconds, 1e-9)
            self._last_log = state.seconds, step
            self.means = self._log(self.rate)
        if state.evaluation_owed or self.ended or step % run.checkpoint_every == 0:
            self._save()

    def end(self) -> None:
        """The policy of a run that is complete; a checkpoint where it was stopped. Nothing the second time.

        Raises: as `write`.
        """
        if self._left:
            return
        self._left = True
        if self.saved_step != self.agent.step:
            self._save()
        if self.complete and self.config.agent.algorithm in DIFFUSION:
            self.agent.save_policy(self.folder.policy_path)

    def result(self, stopped_by: str | None) -> RunResult:
        return RunResult(self.folder.path, self.agent, self.agent.step, self.results, stopped_by, self.state.seconds)

    def evaluated(self, result: Evaluation | Exception | None) -> None:
        """The evaluation that the checkpoint of this update owes is done: its result, what was raised in it (whatever
        an environment raises: the training does not depend on it), or None where there is no environment.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        run, step, state = self.config, self.agent.step, self.state
        if isinstance(result, Exception):
            self._say(
                f"update {step:,}: the evaluation failed ({said(result)}); its line in evaluations.csv is empty, and "
                "the run goes on"
            )
            result = None
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

    @property
    def evaluation_seed(self) -> int:
        return noise.derive(self.config.agent.seed, "evaluation")

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

    def _say(self, text: str) -> None:
        self.console.print(f"{self.name}{text}", markup=False, soft_wrap=True)

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


class Following(Loop):
    """The same of a process that is not the first of its run: it computes what the first one writes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.evaluates = False

    def _log(self, rate: float) -> dict[str, float]:
        self.state.since_log = _Means()
        return {}

    def _save(self) -> None:
        self.saved_step = self.agent.step

    def _tidy(self) -> None:
        pass

    def end(self) -> None:
        pass

    def evaluated(self, result: Evaluation | Exception | None) -> None:
        self.state.since_evaluation, self.state.evaluation_owed = _Means(), False


def log_owed(run: RunConfig, state: LoopState, step: int) -> bool:
    """Whether the line of metrics at this update could not be written: else its sums would have begun anew."""
    return state.since_log.count > 0 and (step % run.log_every == 0 or step == run.agent.num_updates)
