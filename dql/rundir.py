"""A run's folder: config.json, metrics.csv, evaluations.csv and checkpoints, each written so that a kill loses little.

config.json            RunConfig, the dataset's info and fingerprint, versions
metrics.csv            a line every log_every updates
evaluations.csv        a line an evaluation; one that failed has its step and bc_loss, and is empty otherwise
selection.json         which checkpoint is last, best and offline
checkpoints/step-N/    agent.safetensors (networks, optimizers) and loop.json (the loop's own state)
policy.safetensors     of a diffusion agent the last policy alone, when the run has ended

The JSON files hold a digest of the rest of them: a bit that flipped on a disk would be another run's numbers.

The folder may be reached through a symbolic link; what it holds may not be one, for a run would write through it.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from dql.checkpoint import (
    FILE,
    UNFINISHED,
    CheckpointError,
    digest_in,
    explain,
    replace_folder,
    unreadable,
    write_atomically,
)
from dql.config import RunConfig, plain_value
from dql.files import open_file, read_file

_FILES = ("config.json", "metrics.csv", "evaluations.csv", "selection.json", "policy.safetensors")
_CONFIG = {"run", "dataset", "threads", "versions"}
_LOOP = "loop.json"
_STEP = re.compile(r"step-(\d{9})")
_MOST_THREADS = 4096  # in a config.json that is to be believed


class RunError(RuntimeError):
    """A run that cannot be started or continued; the message says why and what to do."""


class RunDir:
    """The files of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = Path(path)
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.csv"
        self.evaluations_path = path / "evaluations.csv"
        self.policy_path = path / "policy.safetensors"
        self.checkpoints_path = path / "checkpoints"
        self._lock: int | None = None

    def lock(self) -> None:
        """Claims the folder for this process, until it ends.

        Raises:
            RunError: another process is training there, it cannot be written to, or something in it is a link.
        """
        import fcntl

        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open_file(file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno == errno.ELOOP and file.is_symlink():
                raise _link(file) from error
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another folder") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._refuse_links()
        except BlockingIOError as error:
            os.close(lock)
            raise RunError(f"{self.path} is in use by another process; wait, or choose another folder") from error
        except OSError as error:
            os.close(lock)
            raise RunError(
                f"{self.path} cannot be locked ({error.strerror}); choose a folder on a local disk"
            ) from error
        except RunError:
            os.close(lock)
            raise
        self._lock = lock

    def unlock(self) -> None:
        """Gives the folder back; one in which nothing was begun is not left behind."""
        if self._lock is None:
            return
        if not self.holds_a_run():
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else, or is not empty
                self.path.rmdir()
        os.close(self._lock)
        self._lock = None

    def _refuse_links(self) -> None:
        """Raises RunError if a file or folder of the run's is a symbolic link."""
        own = [*(self.path / name for name in _FILES), self.checkpoints_path]
        if not self.checkpoints_path.is_symlink():
            for folder in _listed(self.checkpoints_path):
                if folder.name.lstrip(".").startswith("step-"):
                    own += [folder, *(() if folder.is_symlink() else _listed(folder))]
        for path in own:
            if path.is_symlink():
                raise _link(path)

    def read_config(self) -> dict[str, Any]:
        """What config.json holds: "run", which makes a RunConfig, "dataset" and "threads".

        Raises:
            RunError: this is no run folder, or the file cannot be read or is damaged.
        """
        try:
            values = _read_json(self.config_path, "restore it from a copy")
            _check_digest(self.config_path, values, 'restore it from a copy or, if you changed it, remove its "digest"')
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(
                f"{self.path} is no run: it has no config.json; give the folder that dql train named"
            ) from error
        if not isinstance(values, dict) or not {"run", "dataset", "threads"} <= values.keys():
            raise RunError(f"{self.config_path} is damaged: fields are missing; restore it from a copy")
        if strange := sorted(values.keys() - _CONFIG):  # nobody writes such: the digest's own name may be damaged
            raise RunError(f"{self.config_path} is damaged: it has a field {strange[0]!r:.80}; restore it from a copy")
        try:
            RunConfig.from_dict(values["run"])
            _check_dataset(values["dataset"])
            threads = values["threads"]
            if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
                raise ValueError(f"threads must be from 1 to {_MOST_THREADS}, got {threads!r:.80}")
        except ValueError as error:
            raise RunError(f"{self.config_path} cannot be used: {error}; restore it from a copy") from error
        return values

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        found = []
        for path in _listed(self.checkpoints_path):
            match = _STEP.fullmatch(path.name)
            if match and (path / _LOOP).is_file() and (path / FILE).is_file():
                found.append(int(match[1]))
        return sorted(found)

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
            if self.checkpoints_path.is_symlink() or unfinished.is_symlink():
                raise OSError(errno.ELOOP, "it is a symbolic link")
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()  # fails if anything stands there: nothing is written into what another made
            agent.save(unfinished)
            self._write_loop(unfinished, loop)
            replace_folder(unfinished, target)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise explain(target, error) from error
        except CheckpointError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def save_loop(self, step: int, loop: dict[str, Any]) -> None:
        """Replaces a checkpoint's loop.json, atomically.

        Raises:
            CheckpointError: no space, no permission; the old one is untouched.
        """
        self._write_loop(self.checkpoint_path(step), loop)

    def _write_loop(self, folder: Path, loop: dict[str, Any]) -> None:
        loop = loop | {"agent": digest_in(folder / FILE)}
        write_atomically(folder / _LOOP, json.dumps(_with_digest(loop)).encode())

    def read_loop(self, step: int) -> dict[str, Any]:
        """What `save_checkpoint` or `save_loop` was given, and as "agent" the digest of the agent beside it.

        Raises:
            RunError: it cannot be read, or is damaged.
        """
        path = self.checkpoint_path(step) / _LOOP
        remedy = f"remove {path.parent}, and resuming starts from the checkpoint before it"
        try:
            loop = _read_json(path, remedy)
        except OSError as error:
            raise RunError(f"{unreadable(path, error)}") from error
        if not isinstance(loop, dict):
            raise RunError(f"{path} is damaged: it holds no object; {remedy}")
        _check_digest(path, loop, remedy)
        return loop

    def foreign(self, step: int) -> list[str]:
        """In what a checkpoint is not this run's, by its loop.json and the run's config.json.

        What no loop.json says (an earlier version's, or one that cannot be read) is not held against it.
        """
        written = self.read_config()
        try:
            loop = self.read_loop(step)
        except RunError:
            return []
        of = loop.get("of", {})
        if not isinstance(of, dict):
            return [f"origin {of!r:.80}"]
        expected = {
            "step": step,
            "seed": RunConfig.from_dict(written["run"]).agent.seed,
            "fingerprint": written["dataset"]["fingerprint"],
        }
        found = [
            f"{name} {of[name]!r:.80} in loop.json, the run's is {value!r}"
            for name, value in expected.items()
            if name in of and of[name] != value
        ]
        digest = loop.get("agent")
        if digest is not None and digest != digest_in(self.checkpoint_path(step) / FILE):
            found.append("an agent that loop.json was not saved with")
        return found

    def prune(self, keep: int, precious: set[int]) -> None:
        """Removes all checkpoints but the newest `keep` and the precious.

        Raises:
            CheckpointError: no permission.
        """
        steps = self.steps()
        for step in steps[:-keep]:
            if step not in precious:
                # Renamed first: a kill half-way must not leave something that looks like a checkpoint.
                path = self.checkpoint_path(step)
                doomed = path.with_name(f".{path.name}.old")
                try:
                    os.rename(path, doomed)
                except OSError as error:
                    raise explain(path, error) from error
                shutil.rmtree(doomed, ignore_errors=True)

    def clean(self) -> None:
        """Removes what a killed process left unfinished, and nothing else that the folder may hold."""
        left = [file for name in _FILES for file in self.path.glob(f".{name}.*{UNFINISHED}")]
        left += self.checkpoints_path.glob(f"step-*/.{_LOOP}.*{UNFINISHED}")
        for file in left:
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in self.checkpoints_path.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def holds_a_run(self) -> bool:
        """Whether there is anything of a run here, whole or not."""
        return bool(self.steps()) or any((self.path / name).exists() for name in _FILES)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Writes a JSON file of the folder, and in it a digest, atomically, if that changes it.

        Raises:
            CheckpointError: no space, no permission; the old file, if any, is untouched.
        """
        _write_if_changed(self.path / name, (json.dumps(_with_digest(values), indent=2) + "\n").encode())

    def selection(self) -> dict[str, int]:
        """Step of "last", "best" and "offline", as far as there are such.

        Raises:
            RunError: selection.json cannot be read or is damaged.
        """
        path, remedy = self.path / "selection.json", "remove it, and resume the run to have it anew"
        try:
            chosen = _read_json(path, remedy)
            _check_digest(path, chosen, remedy)
        except (FileNotFoundError, NotADirectoryError):
            chosen = {}
        if not isinstance(chosen, dict) or not all(type(step) is int for step in chosen.values()):
            raise RunError(f"{path} is damaged: it holds no steps by name; {remedy}")
        steps = self.steps()
        if steps:
            chosen["last"] = steps[-1]
        return chosen


def _link(path: Path) -> RunError:
    return RunError(
        f"{path} is a symbolic link, and a run would write to what it points to; put the file or folder itself there, "
        "or remove it"
    )


def _listed(folder: Path) -> list[Path]:
    """What a folder holds; nothing if there is none."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{unreadable(folder, error)}") from error


def _read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        RunError: it cannot be read, or holds no JSON.
    """
    try:
        text = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise RunError(f"{unreadable(path, error)}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers too long, lists too deep
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} is damaged ({reason}); {remedy}") from error


def _check_dataset(values: Any) -> None:
    """Raises ValueError unless this is what a config.json says about a dataset."""
    from dql.datasets.info import DatasetInfo

    if not isinstance(values, dict):
        raise ValueError(f"dataset must be an object, got {values!r:.80}")
    if not isinstance(values.get("fingerprint"), str):
        raise ValueError(f"dataset.fingerprint must be a string, got {values.get('fingerprint')!r:.80}")
    try:
        info = DatasetInfo.from_json(json.dumps(values.get("info")))
        for name, kind in get_type_hints(DatasetInfo).items():
            if kind is not np.ndarray and name != "dropped_goal":  # which from_json has looked at
                plain_value(name, kind, getattr(info, name))
        spec = None if info.env_spec is None else json.loads(info.env_spec)
        if spec is not None and not isinstance(spec["id"], str):
            raise ValueError("the environment's id is no string")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"dataset.info does not describe a dataset ({reason})") from error


def _with_digest(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"digest": _digest(values)}


def _check_digest(path: Path, values: Any, remedy: str) -> None:
    """Takes the digest out of what a file of the run holds; those of earlier versions have none.

    Raises:
        RunError: the rest is not what was written.
    """
    if not isinstance(values, dict) or "digest" not in values:
        return
    if values.pop("digest") != _digest(values):
        raise RunError(f"{path} is damaged: its content is not what was written; {remedy}")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_if_changed(path: Path, data: bytes) -> None:
    """Nothing is written where nothing changes: a full disk is no reason not to look at a run that has ended."""
    with contextlib.suppress(OSError):
        if read_file(path) == data:
            return
    write_atomically(path, data)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to a CSV file, with a header if it is new, handed to the operating system.

    Raises:
        CheckpointError: no space, no permission, or the file is a link; it is as it was.
    """
    try:
        descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(descriptor).st_size
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(row))
            if size == 0:
                writer.writeheader()
            writer.writerow(row)
            data = text.getvalue().encode()
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                os.ftruncate(descriptor, size)  # no half line
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explain(path, error) from error


def _whole_lines(path: Path) -> list[list[str]]:
    """The fields of each line; the last line is left out if a kill cut it before its end."""
    try:
        text = read_file(path).decode()
        return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{unreadable(path, error)}") from error
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}); remove it, and lines to come start a new one") from error


def read_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a CSV file as numbers (NaN for an empty field); a line cut short by a kill is left out.

    Raises:
        RunError: the file cannot be read or is damaged.
    """
    header, *lines = _whole_lines(path) or [[]]
    try:
        return [{k: float(v) if v else math.nan for k, v in zip(header, line, strict=True)} for line in lines]
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); remove it, and lines to come start a new one") from error


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the lines of updates that a resumed run will do again.

    Raises:
        RunError: the file cannot be read or is damaged.
        CheckpointError: no space, no permission; the old file is untouched.
    """
    if not path.exists():
        return
    lines = _whole_lines(path)
    text = io.StringIO()
    try:
        csv.writer(text).writerows(line for i, line in enumerate(lines) if i == 0 or int(line[0]) <= step)
    except (ValueError, IndexError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it, and lines to come start a new one") from error
    _write_if_changed(path, text.getvalue().encode())


def find_checkpoint(path: str | os.PathLike[str], which: str = "last") -> Path:
    """The checkpoint folder that is meant.

    Args:
        path: a run folder, or a checkpoint folder itself.
        which: "last", "best", "offline" or a step, for a run folder.

    Raises:
        RunError: there is no such checkpoint; the sentence lists those there are.
    """
    path, which = Path(path), str(which)
    if (path / FILE).is_file():
        return path
    run = RunDir(path)
    run.read_config()
    steps, chosen = run.steps(), run.selection()
    step = int(which) if which.isdecimal() and len(which) < 19 else chosen.get(which)
    if step is None or step not in steps:
        named = ", ".join(f"{name} = {n}" for name, n in chosen.items())
        raise RunError(f"{path} has no checkpoint {which!r}; it has steps {steps} ({named or 'none selected yet'})")
    return run.checkpoint_path(step)
