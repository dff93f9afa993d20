"""A run's folder: config.json, metrics.csv, evaluations.csv and checkpoints, each written so that a kill loses little.

config.json            RunConfig, the dataset's info and fingerprint, versions
metrics.csv            a line every log_every updates
evaluations.csv        a line an evaluation
selection.json         which checkpoint is last, best and offline
checkpoints/step-N/    agent.safetensors (networks, optimizers) and loop.json (the loop's own state)
policy.safetensors     the last policy alone, when the run has ended
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from dql.checkpoint import FILE, UNFINISHED, CheckpointError, explain, replace_folder, write_atomically

_FILES = ("config.json", "metrics.csv", "evaluations.csv", "selection.json", "policy.safetensors")
_STEP = re.compile(r"step-(\d{9})")


class RunError(RuntimeError):
    """A run that cannot be started or continued; the message says why and what to do."""


class RunDir:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.csv"
        self.evaluations_path = path / "evaluations.csv"
        self.policy_path = path / "policy.safetensors"
        self.checkpoints_path = path / "checkpoints"
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Claims the folder for this process, until it ends.

        Raises:
            RunError: another process is training there.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held open on purpose)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another --run-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.path} is in use by another process; wait for it or choose --run-dir") from error
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be locked ({error.strerror}); choose a --run-dir on a local disk"
            ) from error

    def unlock(self) -> None:
        """Gives the folder back; one in which nothing was begun is not left behind."""
        if self._lock is None:
            return
        if not self.holds_a_run():
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else, or is not empty
                self.path.rmdir()
        self._lock.close()
        self._lock = None

    def read_config(self) -> dict[str, Any]:
        """What config.json holds.

        Raises:
            RunError: this is no run folder.
        """
        try:
            values = json.loads(self.config_path.read_text())
            if not isinstance(values, dict) or not {"run", "dataset", "threads"} <= values.keys():
                raise RunError(f"{self.config_path} is damaged: fields are missing; restore it from a copy")
            return values
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{self.path} is no run: it has no config.json; give the folder that dql train named"
            ) from error
        except json.JSONDecodeError as error:
            raise RunError(f"{self.config_path} is damaged ({error}); restore it from a copy") from error

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        if not self.checkpoints_path.is_dir():
            return []
        whole = [p for p in self.checkpoints_path.iterdir() if (p / "loop.json").is_file() and (p / FILE).is_file()]
        matches = (_STEP.fullmatch(p.name) for p in whole)
        return sorted(int(m[1]) for m in matches if m)

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / f"step-{step:09d}"

    def save_checkpoint(self, step: int, agent: Any, loop: dict[str, Any]) -> None:
        """Writes a checkpoint beside the others and renames it into place, whole.

        Raises:
            CheckpointError: no space, no permission; the earlier checkpoints are untouched.
        """
        target = self.checkpoint_path(step)
        unfinished = target.with_name(f".{target.name}{UNFINISHED}")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            agent.save(unfinished)
            write_atomically(unfinished / "loop.json", json.dumps(loop).encode())
            replace_folder(unfinished, target)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise explain(target, error) from error
        except CheckpointError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def read_loop(self, step: int) -> dict[str, Any]:
        return json.loads((self.checkpoint_path(step) / "loop.json").read_text())

    def prune(self, keep: int, precious: set[int]) -> None:
        """Removes all checkpoints but the newest `keep` and the precious."""
        steps = self.steps()
        for step in steps[:-keep]:
            if step not in precious:
                # Renamed first: a kill half-way must not leave something that looks like a checkpoint.
                path = self.checkpoint_path(step)
                doomed = path.with_name(f".{path.name}.old")
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def clean(self) -> None:
        """Removes what a killed process left unfinished, and nothing else that the folder may hold."""
        for name in _FILES:
            for left in self.path.glob(f".{name}.*{UNFINISHED}"):
                left.unlink(missing_ok=True)
        for left in self.checkpoints_path.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def holds_a_run(self) -> bool:
        """Whether there is anything of a run here, whole or not."""
        return bool(self.steps()) or any((self.path / name).exists() for name in _FILES)

    def write_json(self, name: str, values: Any) -> None:
        write_atomically(self.path / name, (json.dumps(values, indent=2) + "\n").encode())

    def selection(self) -> dict[str, int]:
        """Step of "last", "best" and "offline", as far as there are such."""
        path = self.path / "selection.json"
        try:
            chosen = json.loads(path.read_text()) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise RunError(f"{path} is damaged ({error}); remove it, and resume the run to have it anew") from error
        steps = self.steps()
        if steps:
            chosen["last"] = steps[-1]
        return chosen


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to a CSV file, with a header if it is new, flushed to the operating system."""
    try:
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise explain(path, error) from error


def _whole_lines(path: Path) -> list[list[str]]:
    """The fields of each line; the last line is left out if a kill cut it before its end."""
    text = path.read_bytes().decode() if path.exists() else ""
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))


def read_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a CSV file as numbers (NaN for an empty field); a line cut short by a kill is left out."""
    header, *lines = _whole_lines(path) or [[]]
    return [{k: float(v) if v else math.nan for k, v in zip(header, line, strict=True)} for line in lines]


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the lines of updates that a resumed run will do again."""
    if not path.exists():
        return
    lines = _whole_lines(path)
    text = io.StringIO()
    csv.writer(text).writerows(line for i, line in enumerate(lines) if i == 0 or int(line[0]) <= step)
    write_atomically(path, text.getvalue().encode())


def find_checkpoint(path: str | os.PathLike[str], which: str = "last") -> Path:
    """The checkpoint folder that is meant.

    Args:
        path: a run folder, or a checkpoint folder itself.
        which: "last", "best", "offline" or a step, for a run folder.

    Raises:
        RunError: there is no such checkpoint; the sentence lists those there are.
    """
    path = Path(path)
    if (path / FILE).is_file():
        return path
    run = RunDir(path)
    run.read_config()
    steps, chosen = run.steps(), run.selection()
    step = int(which) if which.isdigit() else chosen.get(which)
    if step is None or step not in steps:
        named = ", ".join(f"{name} = {n}" for name, n in chosen.items())
        raise RunError(f"{path} has no checkpoint {which!r}; it has steps {steps} ({named or 'none selected yet'})")
    return run.checkpoint_path(step)
