"""What the command line prints of others comes out to the letter, and can be copied."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

import dql.doctor
from dql.progress import line
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


def last_line(dql_command, folder: Path, arguments: tuple, columns: int) -> str:
    """What a terminal of so many columns shows of the progress when the run ends."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    running = subprocess.Popen(
        dql_command(*arguments), stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=environment
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's other side has gone
        while part := os.read(leader, 65536):
            said += part
    os.close(leader)
    assert running.wait() == 0, said.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    lines = [line for line in re.split(r"[\r\n]+", plain) if "/s" in line and "/" in line.split("/s")[0]]
    return [line for line in lines if "updates in" not in line][-1].rstrip()


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_progress_of_a_run_in_a_real_terminal(dql_command, pendulum, tiny, tmp_path, columns):
    flags = ["--dataset", pendulum, "--num-updates", "1200", "--log-every", "100", "--eval-every", "0", *tiny]
    shown = last_line(dql_command, tmp_path, ("train", *flags, "--run-dir", tmp_path / "run"), columns)
    assert len(shown) < columns
    count, rate, left = r"1,200/1,200", r"\d+\.\d/s", r"0:00:00"
    assert re.search(rf"{count}  {rate}  {left}", shown), shown
    if columns >= 80:
        assert re.search(r"bc \S+  q_loss \S+  critic \S+$|bc \S+  q_loss \S+  critic \S+  target \S+$", shown), shown
    assert ("━" * 10 in shown) == (columns >= 120)


def test_a_line_of_progress_of_any_width():
    means = {"actor/bc_loss": 0.24171, "actor/q_loss": -0.8831, "critic/loss": 1.2034, "critic/target_q": -41.2}
    text = "12,300/1,000,000  97.5/s  2:48:50  bc 0.2417  q_loss -0.8831  critic 1.203  target -41.2"

    def of(width: int) -> str:
        return line(width, 12_300, 1_000_000, 97.5, means, "diffusion-ql").plain

    for width in range(16, 200):
        assert len(of(width)) <= width
        assert "12,300/1,000,000" in of(width)
    assert of(80) == text.partition("  target")[0]
    assert of(40) == text[:33]
    assert of(len(text)) == text
    assert of(160) == "diffusion-ql  " + "━" * 40 + "  " + text
    assert line(40, 0, 10, 0.0, {}).plain == "━" * 18 + "  0/10  0.0/s  -:--:--"
    assert line(80, 0, 10**9, 277.7, {}).plain.endswith("41 days")
