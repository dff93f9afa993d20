"""Parts of a long run on a borrowed machine: each a command with a limit of time, a log, and an outcome that is said.

Stages follow each other, the parts of one stage run side by side. There is one deadline for all: a part gets what is
left of it, less what the later stages need at least. Whoever is not done then is interrupted, and after a while
killed. What a command started is killed when it ends, however it ends: nothing runs on into the time of another part.
Nothing that happens to one part stops the others.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

NOTHING_TO_DO = 77  # a command's exit code: its last line says why
MARK = "DQL_BENCH_PART"  # in the environment of a command and of all that it starts, in sessions of their own or not
TO_DIE = 10.0  # seconds; a process that a broken device does not let go of is left behind

_numbers = itertools.count()


@dataclass
class Outcome:
    """How a part went.

    Attributes:
        outcome: "passed", "failed", "not done" (out of time), "skipped" (nothing to do here) or "not run".
        why: where it did not pass; else None.
        seconds: that it took.
        limit: that it had.
    """

    outcome: str
    why: str | None = None
    seconds: float = 0.0
    limit: float = 0.0

    @property
    def is_fine(self) -> bool:
        return self.outcome in ("passed", "skipped")

    def __str__(self) -> str:
        return f"{self.outcome}{f': {self.why}' if self.why else ''} ({self.seconds:.0f} of {self.limit:.0f} s)"


@dataclass(frozen=True)
class Part:
    """A piece of the run.

    Attributes:
        name: of the part, and of its log.
        work: `work(task)` does it, by `task.run`; it returns None, or what is wrong.
        least: seconds that earlier stages must leave to it.
        most: seconds after which it is ended anyway.
        vital: nothing goes without it, so it may take what later stages need.
    """

    name: str
    work: "Callable[[Task], str | None]"
    least: float
    most: float
    vital: bool = False


class OutOfTimeError(Exception):
    """The part's limit is over."""


class NothingToDoError(Exception):
    """The part cannot run here, and says why; that is no failure."""


@dataclass
class Task:
    """What a part's work is given.

    Attributes:
        name: of the part.
        log: where its commands write to.
        deadline: of `time.monotonic`.
        environment: of its commands.
        patience: seconds from an interrupt, upon which pytest writes its report, until the kill.
    """

    name: str
    log: Path
    deadline: float
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    patience: float = 12.0

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, command: Sequence[str | Path], output: Path | None = None, most: float | None = None) -> int:
        """Runs a command, its output appended to the log, and returns its exit code.

        Args:
            command: program and arguments.
            output: takes its standard output instead of the log.
            most: seconds of this command alone.

        Raises:
            OutOfTimeError: it was not done in time; it and all that it started are gone.
            NothingToDoError: it ended with NOTHING_TO_DO.
        """
        words = [str(word) for word in command]
        limit = self.left if most is None else min(most, self.left)
        if limit <= 0:
            raise OutOfTimeError
        with contextlib.ExitStack() as files:
            log = files.enter_context(self.log.open("ab"))
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            out = log if output is None else files.enter_context(output.open("wb"))
            # One that runs in a command itself adds to that one's mark.
            mark = f"{os.environ.get(MARK, '')}/{os.getpid()}.{next(_numbers)}"
            environment = self.environment | {MARK: mark}
            # A session of its own, to kill it with its children.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.patience)
                raise OutOfTimeError from None
            finally:
                _kill(process, mark)
        if code == NOTHING_TO_DO:
            lines = (self.log if output is None else output).read_text(errors="replace").strip().splitlines()
            raise NothingToDoError(lines[-1] if lines else "it gave no reason")
        return code


def run_stages(
    stages: Sequence[Sequence[Part]], deadline: float, logs: Path, environment: dict[str, str]
) -> Iterator[dict[str, Outcome]]:
    """Runs the stages, and prints how each part went as it ends.

    Args:
        stages: of parts.
        deadline: of `time.monotonic`, of everything.
        logs: a folder; each part's log is NAME.log there.
        environment: of the commands.

    Yields:
        after each stage the outcomes of its parts, by name.
    """
    for i, stage in enumerate(stages):
        later = sum(max(part.least for part in after) for after in stages[i + 1 :])
        with ThreadPoolExecutor(len(stage)) as pool:
            ends = {part.name: deadline if part.vital else deadline - later for part in stage}
            running = {part.name: pool.submit(_run, part, ends[part.name], logs, environment) for part in stage}
            yield {name: future.result() for name, future in running.items()}


def _run(part: Part, deadline: float, logs: Path, environment: dict[str, str]) -> Outcome:
    started = time.monotonic()
    limit = max(min(part.most, deadline - started), 0.0)
    if limit < 1:
        return _said(part, Outcome("not run", "no time was left for it", 0.0, limit))
    task = Task(part.name, logs / f"{part.name}.log", started + limit, dict(environment))
    try:
        wrong = part.work(task)
        outcome = Outcome("passed") if wrong is None else Outcome("failed", wrong)
    except OutOfTimeError:
        outcome = Outcome("not done", f"{limit:.0f} s were not enough")
    except NothingToDoError as error:
        outcome = Outcome("skipped", str(error))
    except Exception as error:  # a part's own bug is that part's failure
        with task.log.open("a") as log:
            log.write(f"{type(error).__name__}: {error}\n")
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    outcome.seconds, outcome.limit = time.monotonic() - started, limit
    return _said(part, outcome)


def _said(part: Part, outcome: Outcome) -> Outcome:
    sys.stdout.write(f"== {part.name}: {outcome}\n")
    sys.stdout.flush()
    return outcome


def _kill(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """Kills what is left of a command and of what it started, and waits until it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    stop = time.monotonic() + TO_DIE
    while (alive := _marked(mark)) and time.monotonic() < stop:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(stop - time.monotonic(), 0.1))


def _marked(mark: str) -> list[int]:
    """Processes whose environment has the mark, or one that was added to."""
    words = (f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if any(word == words[0] or word.startswith(words[1]) for word in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found
