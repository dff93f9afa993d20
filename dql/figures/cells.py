"""Runs side by side: each cell of a figure is a run and its evaluations, in a process of its own, and never done twice.

A cell's returns do not depend on how many run at once, for each has one CPU thread; the time of its updates does.
"""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console

from dql import noise
from dql.agents.registry import load
from dql.checkpoint import explain, write_atomically
from dql.config import RunConfig
from dql.data import DatasetInfo, TransitionDataset
from dql.evaluate import WAVE, evaluate
from dql.files import open_file
from dql.kernels.limits import MAX_ROWS
from dql.rundir import RunDir, RunError, read_rows
from dql.train import check_environment, check_fingerprint, complete, evaluation_info, fingerprint_of

LAST = 3  # evaluations at the end of a run whose mean is its score: one alone swings by hundreds
_INTERRUPTED = 130
_MOST = 1e100  # of a number that can be drawn


@dataclass(frozen=True)
class Cell:
    """One run of a figure, and with how many candidates its agents act when they are evaluated.

    Attributes:
        run: with a run_dir.
        candidates: with each the last LAST checkpoints are evaluated; with the run's own number they were in training.
    """

    run: RunConfig
    candidates: tuple[int, ...]

    @property
    def folder(self) -> Path:
        assert self.run.run_dir is not None
        return self.run.run_dir

    @property
    def results_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.csv")

    def missing(self) -> list[int]:
        """Numbers of candidates that have no result yet."""
        found = self.results()
        return [number for number in self.candidates if number not in found]

    @property
    def log_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def results(self) -> dict[int, "Result"]:
        """What `finish` wrote, by number of candidates."""
        found: dict[int, Result] = {}
        try:
            for row in read_rows(self.results_path):
                number = row.pop("num_candidates")
                if number != int(number) or number < 1 or number in found:
                    raise ValueError(f"num_candidates are different whole numbers from 1 on, got {number:g}")
                found[int(number)] = Result(**row)
        except (KeyError, TypeError, ValueError, OverflowError, RunError) as error:
            reason = error.__cause__ or error if isinstance(error, RunError) else error
            raise RunError(f"{self.results_path} cannot be used ({reason}); remove it, and it is made anew") from error
        return found


@dataclass(frozen=True)
class Result:
    """What a run came to, acting among so many candidates: means over its last LAST evaluations."""

    return_mean: float
    normalized_score: float
    ms_per_update: float
    """Median over the lines of metrics.csv."""

    def __post_init__(self) -> None:
        if not abs(self.return_mean) < _MOST or not 0 < self.ms_per_update < _MOST:
            raise ValueError(f"return {self.return_mean:g}, {self.ms_per_update:g} ms an update")
        if np.isinf(self.normalized_score):  # NaN: the dataset names no scores
            raise ValueError(f"score {self.normalized_score:g}")


def run_config(
    dataset: str, folder: Path, *, updates: int, evaluations: int, episodes: int, **options: Any
) -> RunConfig:
    """A run whose checkpoints are at its evaluations, so that the last ones can be evaluated otherwise, too."""
    every = max(updates // evaluations, 1)
    return RunConfig(
        dataset=dataset,
        run_dir=folder,
        device="cpu",
        log_every=min(100, every),
        checkpoint_every=every,
        keep=LAST,
        eval_every=every,
        eval_episodes=episodes,
        threads=1,
        **options,
    )


def finish(cell: Cell, console: Console) -> None:
    """Takes a cell to its end and writes its results.

    An evaluation that failed in training is done again.

    Raises:
        KeyboardInterrupt: a signal ended the run, after a checkpoint.
        Exception: whatever a run or an environment raises.
    """
    _, stopped_by = complete(cell.run, console=console)
    if stopped_by is not None:
        raise KeyboardInterrupt(stopped_by)
    folder = RunDir(cell.folder)
    folder.lock()  # against another figure that has this cell, too
    try:
        _evaluate(cell, folder)
    finally:
        folder.unlock()


def _evaluate(cell: Cell, folder: RunDir) -> None:
    rows = read_rows(folder.evaluations_path)[-LAST:]
    ms = float(np.median([1e3 / row["updates_per_second"] for row in read_rows(folder.metrics_path)]))
    results = cell.results()
    for number in cell.missing():
        own = number == cell.run.agent.num_candidates
        found = [
            (row["return_mean"], row["normalized_score"])
            if own and np.isfinite(row["return_mean"])
            else evaluated(cell, folder, int(row["step"]), number)
            for row in rows
        ]
        returns, scores = zip(*found, strict=True)
        results[number] = Result(float(np.mean(returns)), float(np.mean(scores)), ms)
    write_csv(cell.results_path, [{"num_candidates": number} | vars(result) for number, result in results.items()])


def evaluated(cell: Cell, folder: RunDir, step: int, candidates: int) -> tuple[float, float]:
    """(return, score) of a checkpoint, acting among another number of candidates in the same episodes."""
    agent = load(folder.path, str(step))
    agent.config = replace(agent.config, num_candidates=candidates)
    info = DatasetInfo.from_json(json.dumps(folder.read_config()["dataset"]["info"]))
    if cell.run.env is not None:
        info = info.with_env(cell.run.env, typed=True)
    seed = noise.derive(cell.run.agent.seed, "evaluation")  # the run's own
    result = evaluate(
        agent, info, episodes=cell.run.eval_episodes, seed=seed, max_episode_steps=cell.run.eval_max_steps
    )
    score = result.normalized_score
    return result.return_mean, float("nan") if score is None else score


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same keys, as a CSV file, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _work(cell: Cell, told: Connection) -> None:
    """The body of a process: its progress goes to the cell's log, its error to who started it."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with _log(cell.log_path) as log:
            finish(cell, Console(file=log, width=120))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception as error:
        told.send(" ".join(str(error).split())[:1000] or type(error).__name__)
        sys.exit(1)


def _log(path: Path) -> TextIO:
    """Raises CheckpointError where no file can be written: a link would lead elsewhere."""
    try:
        return open(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", errors="backslashreplace")
    except OSError as error:
        raise explain(path, error) from error


def _end_with_parent() -> None:
    """Whoever kills the command does not want its runs to go on unseen: they write a checkpoint and end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def run_all(
    cells: Sequence[Cell], *, jobs: int, console: Console, name: Callable[[Cell], str]
) -> list[tuple[Cell, str]]:
    """Takes all cells to their end, `jobs` at once; those that have ended are left alone.

    Returns:
        (cell, reason) of those that failed.

    Raises:
        KeyboardInterrupt: a signal; every run has written a checkpoint, and the same call goes on.
    """
    waiting = [cell for cell in cells if cell.missing()]
    done = len(cells) - len(waiting)
    failed: list[tuple[Cell, str]] = []
    context = multiprocessing.get_context("spawn")
    running: dict[BaseProcess, tuple[Cell, Connection]] = {}
    with _terminating(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                cell.folder.parent.mkdir(parents=True, exist_ok=True)
                told, tell = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_work, args=(cell, tell))
                process.start()
                tell.close()
                running[process] = (cell, told)
            ended = wait([process.sentinel for process in running])
            for process in [p for p in running if p.sentinel in ended]:
                process.join()
                cell, told = running.pop(process)
                if process.exitcode == _INTERRUPTED:
                    raise KeyboardInterrupt("a run was stopped; the same command goes on")
                done += 1
                if process.exitcode or cell.missing():
                    reason = _said(told) or f"its process died; see {cell.log_path}"
                    failed.append((cell, reason))
                    said = f"failed: {reason}"
                else:
                    results = cell.results()
                    said = ", ".join(f"{results[n].return_mean:.1f} among {n}" for n in cell.candidates)
                    said = f"return {said}; {results[cell.candidates[0]].ms_per_update:.1f} ms an update"
                console.print(f"{done}/{len(cells)}  {name(cell)}: {said}", markup=False, soft_wrap=True)
    return failed


def _said(told: Connection) -> str | None:
    """What a process that has ended said of its failure."""
    with contextlib.suppress(EOFError, OSError):
        if told.poll():
            return str(told.recv())
    return None


@contextlib.contextmanager
def _terminating(running: dict[BaseProcess, Any]) -> Iterator[None]:
    """Whatever ends the block early asks the processes to write a checkpoint and end, and waits for them."""

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = None
    with contextlib.suppress(ValueError):  # not the main thread
        previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException:
        for process in running:
            process.terminate()  # SIGTERM: `dql.loop` takes it for what it is
        for process in running:
            process.join()
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def check_cells(cells: Sequence[Cell], data: TransitionDataset) -> None:
    """Refuses runs of another figure, or of other data, before any work is done.

    Raises:
        RunError: a cell's folder holds a run with other settings, or one that began with another dataset; or nothing
            says where to evaluate.
        DatasetError: the environment to evaluate in cannot be made or used.
        ValueError: two different runs have the same folder, or there are more candidates than a call takes.
    """
    of: dict[Path, RunConfig] = {}
    for cell in cells:
        if of.setdefault(cell.folder, cell.run) != cell.run:
            raise ValueError(f"two values are too near to each other for folders of their own: {cell.folder.name}")
        most = MAX_ROWS // min(cell.run.eval_episodes, WAVE)
        if max(cell.candidates) > most:
            raise ValueError(
                f"{max(cell.candidates):,} candidates are more than the {most:,} that a call takes; ask for fewer"
            )
    if missing := [cell for cell in cells if cell.missing()]:
        run = missing[0].run
        check_environment(run, evaluation_info(run, data.info, typed=True))
    found = None
    for cell in cells:
        folder = RunDir(cell.folder)
        if not folder.config_path.exists():
            if cell.results_path.exists():
                raise RunError(f"{cell.results_path} has results of a run that is not there; remove it")
            continue
        written = folder.read_config()
        found = fingerprint_of(data) if found is None else found
        check_fingerprint(cell.run, found, written)
        old = RunConfig.from_dict(written["run"])
        if replace(cell.run.with_agent(max_action=old.agent.max_action), run_dir=old.run_dir) != old:
            raise RunError(f"{cell.folder} holds a run with other settings; remove it, or choose another --out")
