"""What the command line prints of others comes out to the letter, and can be copied."""

import json

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
