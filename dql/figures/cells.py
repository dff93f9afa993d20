"""Runs side by side: each cell of a figure is a run and its evaluations, in a process of its own, and never done twice.

A cell's numbers do not depend on how many run at once: each has one CPU thread.
"""

import contextlib
import csv
import io
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dql import noise
from dql.agents.registry import load
from dql.checkpoint import write_atomically
from dql.config import RunConfig
from dql.data import DatasetInfo
from dql.evaluate import evaluate
from dql.rundir import RunDir, RunError, read_rows
from dql.train import complete

LAST = 3  # evaluations at the end of a run whose mean is its score: one alone swings by hundreds
_INTERRUPTED = 130


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
        found = {}
        try:
            for row in read_rows(self.results_path):
                number = int(row.pop("num_candidates"))
                found[number] = Result(**row)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.results_path} is damaged ({error}); remove it, and it is made anew") from error
        return found


@dataclass(frozen=True)
class Result:
    """What a run came to, acting among so many candidates: means over its last LAST evaluations."""

    return_mean: float
    normalized_score: float
    ms_per_update: float
    """Median over the lines of metrics.csv."""


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

    Raises:
        KeyboardInterrupt: a signal ended the run, after a checkpoint.
        Exception: whatever a run raises.
    """
    _, stopped_by = complete(cell.run, console=console)
    if stopped_by is not None:
        raise KeyboardInterrupt(stopped_by)
    folder = RunDir(cell.folder)
    rows = read_rows(folder.evaluations_path)[-LAST:]
    ms = float(np.median([1e3 / row["updates_per_second"] for row in read_rows(folder.metrics_path)]))
    results = cell.results()
    for number in cell.missing():
        if number == cell.run.agent.num_candidates:
            found = [(row["return_mean"], row["normalized_score"]) for row in rows]
        else:
            found = [evaluated(cell, folder, int(row["step"]), number) for row in rows]
        returns, scores = zip(*found, strict=True)
        results[number] = Result(float(np.mean(returns)), float(np.mean(scores)), ms)
    write_csv(cell.results_path, [{"num_candidates": number} | vars(result) for number, result in results.items()])


def evaluated(cell: Cell, folder: RunDir, step: int, candidates: int) -> tuple[float, float]:
    """(return, score) of a checkpoint, acting among another number of candidates in the same episodes."""
    agent = load(folder.checkpoint_path(step))
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


def _work(cell: Cell) -> None:
    """The body of a process: its progress and errors go to the cell's log."""
    with open(cell.log_path, "a", errors="backslashreplace") as log:
        try:
            finish(cell, Console(file=log, width=120))
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)
        except Exception as error:
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=log)
            sys.exit(1)


def run_all(cells: Sequence[Cell], *, jobs: int, console: Console, name: Callable[[Cell], str]) -> list[Cell]:
    """Takes all cells to their end, `jobs` at once; those that have ended are left alone.

    Returns:
        the cells that failed; each has said why.

    Raises:
        KeyboardInterrupt: a signal; every run has written a checkpoint, and the same call goes on.
    """
    waiting = [cell for cell in cells if cell.missing()]
    done, failed = len(cells) - len(waiting), []
    context = multiprocessing.get_context("spawn")
    running: dict[BaseProcess, Cell] = {}
    with _terminating(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                cell.folder.parent.mkdir(parents=True, exist_ok=True)
                process: BaseProcess = context.Process(target=_work, args=(cell,))
                process.start()
                running[process] = cell
            ended = wait([process.sentinel for process in running])
            for process in [p for p in running if p.sentinel in ended]:
                process.join()
                cell = running.pop(process)
                if process.exitcode == _INTERRUPTED:
                    raise KeyboardInterrupt("a run was stopped; the same command goes on")
                done += 1
                if process.exitcode:
                    failed.append(cell)
                    said = f"failed: {last_error(cell)}"
                else:
                    results = cell.results()
                    said = ", ".join(f"{results[n].return_mean:.1f} among {n}" for n in cell.candidates)
                    said = f"return {said}; {results[cell.candidates[0]].ms_per_update:.1f} ms an update"
                console.print(f"{done}/{len(cells)}  {name(cell)}: {said}", markup=False, soft_wrap=True)
    return failed


def last_error(cell: Cell) -> str:
    """The last line of a cell's log, if it is an error's."""
    with contextlib.suppress(OSError):
        lines = cell.log_path.read_text(errors="replace").strip().splitlines()
        if lines and lines[-1].startswith("error: "):
            return lines[-1].removeprefix("error: ")
    return f"its process died; see {cell.log_path}"


@contextlib.contextmanager
def _terminating(running: dict[BaseProcess, Cell]) -> Iterator[None]:
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


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuses runs of another figure before any work is done.

    Raises:
        RunError: a cell's folder holds a run with other settings.
    """
    for cell in cells:
        folder = RunDir(cell.folder)
        if not folder.config_path.exists():
            if cell.results_path.exists():
                raise RunError(f"{cell.results_path} has results of a run that is not there; remove it")
            continue
        old = RunConfig.from_dict(folder.read_config()["run"])
        if replace(cell.run.with_agent(max_action=old.agent.max_action), run_dir=old.run_dir) != old:
            raise RunError(f"{cell.folder} holds a run with other settings; remove it, or choose another --out")
