"""`bench/parts.py`: limits of time, what is said of a part, and that nothing is left running."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest
from parts import NOTHING_TO_DO, OutOfTimeError, Part, Task, run_stages

SECONDS = f"60.{os.getpid()}"  # nobody else's
SLEEPER = (
    f"import subprocess, time; subprocess.Popen(['sleep', '{SECONDS}']); print('slept', flush=True); time.sleep(60)"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(stages, logs: Path, seconds: float = 30.0):
    outcomes = {}
    for of_stage in run_stages(stages, time.monotonic() + seconds, logs, dict(os.environ)):
        outcomes |= of_stage
    return outcomes


def commands(*codes: str):
    def work(task: Task) -> str | None:
        exits = [task.run(python(code)) for code in codes]
        return f"exit codes {exits}" if any(exits) else None

    return work


def sleepers() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if SECONDS.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


def test_outcomes(tmp_path):
    def broken(task: Task) -> str | None:
        raise KeyError("what")

    stage = [
        Part("fine", commands("print('good')"), 1, 20),
        Part("red", commands("print('bad')", "import sys; sys.exit(3)"), 1, 20),
        Part(
            "absent", commands(f"print('first'); print('no such thing here'); raise SystemExit({NOTHING_TO_DO})"), 1, 20
        ),
        Part("broken", broken, 1, 20),
    ]
    outcomes = run([stage], tmp_path)
    assert {name: o.outcome for name, o in outcomes.items()} == {
        "fine": "passed",
        "red": "failed",
        "absent": "skipped",
        "broken": "failed",
    }
    assert outcomes["red"].why == "exit codes [0, 3]"
    assert outcomes["absent"].why == "no such thing here"
    assert outcomes["broken"].why == "KeyError: 'what'"
    assert [name for name, o in outcomes.items() if o.is_fine] == ["fine", "absent"]
    assert (tmp_path / "fine.log").read_text().endswith("good\n")


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_out_of_time_leaves_nothing_running(tmp_path):
    task = Task("slow", tmp_path / "slow.log", time.monotonic() + 2, patience=0.2)
    with pytest.raises(OutOfTimeError):
        task.run(python(SLEEPER))
    assert "slept" in (tmp_path / "slow.log").read_text()
    stop = time.monotonic() + 10  # the kernel takes a moment
    while sleepers() and time.monotonic() < stop:
        time.sleep(0.05)
    assert not sleepers()
    with pytest.raises(OutOfTimeError):  # nothing is left of its time
        task.run(python("print(1)"))


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_what_a_command_leaves_behind_is_gone(tmp_path):
    """In a session of its own, too, and whether the command ended well or not."""
    start = f"import subprocess, sys; subprocess.Popen(['sleep', '{SECONDS}'], start_new_session=True); sys.exit(3)"
    task = Task("untidy", tmp_path / "untidy.log", time.monotonic() + 20)
    assert task.run(python(start)) == 3
    assert not sleepers()


def test_an_interrupt_comes_first(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('report written')"
    task = Task("slow", tmp_path / "slow.log", time.monotonic() + 2)
    with pytest.raises(OutOfTimeError):
        task.run(python(code))
    assert "report written" in (tmp_path / "slow.log").read_text()


def test_later_stages_keep_what_they_need(tmp_path):
    limits = {}

    def note(task: Task) -> str | None:
        limits[task.name] = task.left
        return None

    def part(name: str, least: float, most: float, vital: bool = False) -> Part:
        return Part(name, note, least, most, vital)

    stages = [
        [part("v", 10, 90, vital=True)],
        [part("a", 10, 200)],
        [part("b", 20, 30), part("c", 50, 1000)],
        [part("d", 30, 1000)],
    ]
    outcomes = run(stages, tmp_path, 100.0)
    want = {
        "v": 90,
        "a": 20,
        "b": 30,
        "c": 70,
        "d": 100,
    }  # its own most; 100 less 50 and 30; its own most; 100 less 30; what remains
    assert limits == pytest.approx(want, abs=2)
    assert {name: o.limit for name, o in outcomes.items()} == pytest.approx(want, abs=2)


def test_what_has_no_time_is_not_run(tmp_path):
    outcomes = run([[Part("late", commands("print(1)"), 5, 10)]], tmp_path, 0.0)
    assert (outcomes["late"].outcome, outcomes["late"].is_fine) == ("not run", False)
    assert "no time" in str(outcomes["late"])
