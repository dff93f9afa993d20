"""Parts of a long run on a borrowed machine: each with a limit of time, a log, and an outcome that is said.

Stages follow each other, the parts of one stage run side by side. There is one deadline for all: a part gets what is
left of it, less what the later stages need at least. Whoever is not done then is killed, with all that it started:
nothing runs on into the time of another part, nothing that happens to one part stops the others. Commands write what
they find as they find it. Lines of their output that begin with `SAID` are printed as they come; all of it is in a log.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SAID = "» "
NOTHING_TO_DO = 77  # a command's exit code: its last line says why
MARK = "DQL_BENCH_PART"  # in the environment of a command and of all that it starts, in sessions of their own or not
TO_DIE = 10.0  # seconds; a process that a broken device does not let go of is left behind

_numbers = itertools.count()


@dataclass
class Outcome:
    """How a part went: "passed", "failed", "not done" (out of time), "skipped" (nothing to do here) or "not run"."""

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
    """`work(task)` does it, by `task.run`, and returns None, or what is wrong; `least` seconds are kept for it."""

    name: str
    work: "Callable[[Task], str | None]"
    least: float


class OutOfTimeError(Exception):
    """The limit is over."""


class NothingToDoError(Exception):
    """The part cannot run here, and says why; that is no failure."""


@dataclass
class Task:
    """What a part's work is given: the log of its commands, a deadline of `time.monotonic`, their environment."""

    log: Path
    deadline: float
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def of(self, name: str) -> "Task":
        """The same with a log of its own."""
        return Task(self.log.with_name(f"{name}.log"), self.deadline, self.environment)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, command: Sequence[str | Path], output: Path | None = None, most: float = float("inf")) -> int:
        """Runs a command and returns its exit code.

        Args:
            command: program and arguments.
            output: takes its standard output instead of the log.
            most: seconds of this command alone.

        Raises:
            OutOfTimeError: it was not done in time; it and all that it started are gone.
            NothingToDoError: it ended with NOTHING_TO_DO.
        """
        words = [str(word) for word in command]
        limit = min(most, self.left)
        if limit <= 0:
            raise OutOfTimeError
        # One that runs in a command itself adds to that one's mark.
        mark = f"{os.environ.get(MARK, '')}/{os.getpid()}.{next(_numbers)}"
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log.open("ab"))
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            stack.enter_context(_following(self.log))
            out = log if output is None else stack.enter_context(output.open("wb"))
            # A session of its own, to kill it with its children.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=self.environment | {MARK: mark},
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
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
    """Runs the stages until the deadline of `time.monotonic`, prints how each part went; yields a stage's outcomes."""
    for i, stage in enumerate(stages):
        end = deadline - sum(max(part.least for part in after) for after in stages[i + 1 :])
        with ThreadPoolExecutor(len(stage)) as pool:
            running = {part.name: pool.submit(_run, part, end, logs, environment) for part in stage}
            yield {name: future.result() for name, future in running.items()}


def say(text: str) -> None:
    """To whoever watches, at once."""
    print(text, flush=True)


def _run(part: Part, deadline: float, logs: Path, environment: dict[str, str]) -> Outcome:
    started = time.monotonic()
    limit = max(deadline - started, 0.0)
    task = Task(logs / f"{part.name}.log", deadline, dict(environment))
    try:
        if limit < 1:
            raise OutOfTimeError
        wrong = part.work(task)
        outcome = Outcome("passed") if wrong is None else Outcome("failed", wrong)
    except OutOfTimeError:
        outcome = Outcome("not done", f"{limit:.0f} s were not enough") if limit >= 1 else Outcome("not run", "no time")
    except NothingToDoError as error:
        outcome = Outcome("skipped", str(error))
    except Exception as error:  # a part's own bug, a full disk: that part's failure
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    outcome.seconds, outcome.limit = time.monotonic() - started, limit
    say(f"== {part.name}: {outcome}")
    return outcome


@contextlib.contextmanager
def _following(log: Path) -> Iterator[None]:
    """Prints what is said in the log from here on."""
    ended = threading.Event()

    def follow() -> None:
        with log.open(errors="replace") as file:
            file.seek(0, os.SEEK_END)
            rest, last = "", False
            while not last:
                last = ended.wait(0.1)
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    if line.startswith(SAID):
                        say(line.removeprefix(SAID))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
    word, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if any(text == word or text.startswith(word + b"/") for text in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found
