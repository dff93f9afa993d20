"""What the command line prints of others comes out to the letter, and can be copied."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap

import pytest

import dql.doctor
from dql.terminal import make_console

FOREIGN = 'pip install -e ".[triton]"; runs/[bold]a[/bold]/:cat: ' + "x" * 300


def test_nothing_is_markup(capsys):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=FOREIGN)
    table.add_column("[red]")
    table.add_row(FOREIGN)
    console = make_console()
    console.print(FOREIGN)
    console.print(table)
    console.print(Text(FOREIGN))
    said = capsys.readouterr().out
    assert said.count(FOREIGN) == 4
    assert "[red]" in said


def test_doctor_prints_commands_to_the_letter(dql_here, monkeypatch):
    facts = dql.doctor.examine()
    facts["backends"]["triton"] = f"Triton is not installed; {FOREIGN}"
    facts["folders"]["cache"] = FOREIGN
    facts["extension"] = {"built": False, "reason": FOREIGN}
    monkeypatch.setattr(dql.doctor, "examine", lambda: facts)
    assert dql_here("doctor").out.count(FOREIGN) == 3


def test_data_in_brackets(dql_here, pendulum, tmp_path, monkeypatch):
    """A folder, an id and an environment's name may have any characters, and many of them."""
    folder = tmp_path / "[bold]data[/bold]" / ("x" * 120)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    folder.mkdir(parents=True)
    assert str(folder) in dql_here("data", "list").out
    missing = dql_here("data", "info", "[red]/none-v0")
    assert "[red]/none-v0" in missing.refused()


@pytest.mark.parametrize("name", ["[bold]run[/bold]", "a [link=x] b"])
def test_runs_in_brackets(dql_here, pendulum, tiny, tmp_path, name):
    flags = ["--dataset", pendulum, "--num-updates", "20", "--eval-every", "0", *tiny]
    run = tmp_path / name
    done = dql_here("train", *flags, "--run-dir", run)
    assert done.code == 0, done.err
    (command,) = [line.strip() for line in done.out.splitlines() if line.strip().startswith("dql eval ")]
    assert command == f"dql eval '{run}'"
    resumed = dql_here("train", "--resume", run, "--num-updates", "25")
    assert f"resuming {run} at update 20" in resumed.out
    evaluated = dql_here("eval", run, "--episodes", "2", "--json")
    assert json.loads(evaluated.out)["last"]["path"].startswith(str(run))
    exported = dql_here("export", run)
    assert exported.out.startswith(f"{run}/policy.onnx: ")


# Progress, in a terminal: what is on its screen is worked out from what was written to it.
SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)


def screen(written, columns):
    """The lines of a terminal of that width, its whole scrollback; it folds what is too long, as terminals do."""
    lines, row, column = [""], 0, 0
    for number, command, char in SEQUENCE.findall(written):
        if command == "A":
            row -= int(number or 1)
        elif command == "K":
            assert number == "2", number
            lines[row] = ""
        elif command:
            assert command in "mhl", f"a sequence that this does not know: {number}{command}"  # colours, the cursor
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
        else:
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


def in_terminal(command, columns, **environment):
    """Runs it in a pseudo-terminal of that width; what it wrote there."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env) as process:
        os.close(its)
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(mine, 65536):
                written += piece
        assert process.wait(120) == 0, written.decode()
    os.close(mine)
    return written.decode()


RUN_OF_MILLIONS = """
import time
from dql.config import Config
from dql.terminal import make_console
from dql.train import _progress

losses = {"actor/loss": 0.1, "actor/bc_loss": 0.0123456, "actor/q_loss": -1.2345, "critic/loss": 12345.6,
          "critic/target_q": -1234.56}
console = make_console()
with _progress(Config(num_updates=2_000_000), 0, console) as show:
    time.sleep(0.3)
    show(1_234_000, 156.14, losses)
    time.sleep(0.3)
    console.print("update 1,234,000: return 1.0")
    show(1_234_567, 156.14, losses)
"""
NUMBERS = ["1,234,567/2,000,000", "156.1 updates/s", "1:21:42 left"]  # 765,433 updates at that rate
LOSSES = ["bc 0.01235", "q_loss -1.234", "critic 1.235e+04", "target -1235"]


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_progress_is_readable(columns):
    written = in_terminal([sys.executable, "-c", RUN_OF_MILLIONS], columns)
    first, *bar = [line for line in screen(written, columns) if line]
    said = textwrap.wrap("update 1,234,000: return 1.0", columns)
    assert [first, *bar][: len(said)] == said
    bar = [first, *bar][len(said) :]
    assert max(map(len, bar)) <= columns
    for part in (*NUMBERS, *LOSSES):
        assert sum(part in line for line in bar) == 1, (part, bar)
    if columns >= 80:
        numbers, losses = bar
        assert re.fullmatch(rf"diffusion-ql  [━╸╺ ]+  {'  '.join(map(re.escape, NUMBERS))}", numbers)
        assert losses == "  ".join(LOSSES)
        assert len(numbers) == columns, "the bar takes what is left"
    else:
        assert not any("━" in line for line in bar)


def test_a_run_in_a_terminal(dql_command, pendulum, tiny, tmp_path):
    flags = [
        "--dataset",
        pendulum,
        "--num-updates",
        "20",
        "--log-every",
        "5",
        "--eval-every",
        "10",
        "--eval-episodes",
        "1",
    ]
    written = in_terminal(dql_command("train", *flags, *tiny, "--run-dir", tmp_path / "run"), 80)
    lines = screen(written, 80)
    assert sum("20/20" in line for line in lines) == 1, "one bar, drawn over itself"
    text = " ".join(" ".join(lines).split())
    for part in (
        r"20/20",
        r"[\d.]+ updates/s",
        r"0:00:00 left",
        r"bc \S+",
        r"q_loss \S+",
        r"critic \S+",
        r"target \S+",
    ):
        assert len(re.findall(rf"(?<!\S){part}(?!\S)", text)) == 1, (part, lines)
    assert text.count("update 10: return") == text.count("update 20: return") == 1
