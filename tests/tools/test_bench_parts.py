"""`bench/gpu/parts.py`: limits of time, what is said of a part, and that nothing is left running."""

import contextlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu.parts import NOTHING_TO_DO, SAID, OutOfTimeError, Part, Task, run_stages

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
        Part("fine", commands("print('good')"), 1),
        Part("red", commands("print('bad')", "import sys; sys.exit(3)"), 1),
        Part("absent", commands(f"print('first'); print('no such thing here'); raise SystemExit({NOTHING_TO_DO})"), 1),
        Part("broken", broken, 1),
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
    task = Task(tmp_path / "slow.log", time.monotonic() + 2)
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
    task = Task(tmp_path / "untidy.log", time.monotonic() + 20)
    assert task.run(python(start)) == 3
    assert not sleepers()


def test_later_stages_keep_what_they_need(tmp_path):
    limits = {}

    def note(task: Task) -> str | None:
        limits[task.log.stem] = task.left
        return None

    stages = [[("a", 10)], [("b", 20), ("c", 50)], [("d", 30)]]
    outcomes = run([[Part(name, note, least) for name, least in stage] for stage in stages], tmp_path, 100.0)
    want = {"a": 20, "b": 70, "c": 70, "d": 100}  # 100 less 50 and 30; less 30; what remains, all of it
    assert limits == pytest.approx(want, abs=2)
    assert {name: o.limit for name, o in outcomes.items()} == pytest.approx(want, abs=2)


def test_what_has_no_time_is_not_run(tmp_path):
    outcomes = run([[Part("late", commands("print(1)"), 5)]], tmp_path, 0.0)
    assert (outcomes["late"].outcome, outcomes["late"].is_fine) == ("not run", False)


def test_what_is_said_comes_at_once(tmp_path, capsys):
    """While the command still runs, and nothing else of what it prints."""
    code = f"import time; print('{SAID}first', flush=True); print('other', flush=True)"
    code += f"; time.sleep(1.5); print('{SAID}last')"
    seen = {}

    def work(task: Task) -> str | None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(task.run, python(code))
            while not running.done() and "early" not in seen:
                if "first" in (text := capsys.readouterr().out):
                    seen["early"] = text
                time.sleep(0.05)
            running.result()
        return None

    run([[Part("talks", work, 1)]], tmp_path)
    assert seen["early"] == "first\n"
    said = capsys.readouterr().out
    assert said.startswith("last\n== talks: passed")


def test_a_full_disk_is_that_parts_failure(tmp_path):
    folder = tmp_path / "gone"  # where no log can be written
    task_failed = run([[Part("late", commands("print(1)"), 1)]], folder)["late"]
    assert (task_failed.outcome, task_failed.why.partition(":")[0]) == ("failed", "FileNotFoundError")
