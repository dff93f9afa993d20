"""`dql figure steps | eta | candidates`: which runs, what they come to, pictures, and going on after a kill."""

import copy
import csv
import io
import os
import shutil
import signal
import subprocess
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from dql.checkpoint import CheckpointError
from dql.config import RunConfig
from dql.data import load_dataset
from dql.evaluate import seed_interval
from dql.figures.ablations import Settings, ablation, cells_of, default_values, draw
from dql.figures.cells import Cell, check_cells, evaluated, finish, run_all
from dql.figures.command import _seeds, figure
from dql.rundir import RunDir, RunError, read_rows
from dql.train import complete

QUIET = Console(file=io.StringIO(), width=200)


@pytest.fixture
def settings(pendulum):
    return Settings(
        pendulum, (0, 1), 6, num_candidates=4, evaluations=3, episodes=1, hidden_dim=16, batch_size=16, eval_max_steps=9
    )


def test_the_values():
    assert default_values("steps", Settings("x")) == (1, 2, 5, 10, 20)
    assert default_values("candidates", Settings("x")) == (1, 10, 50)
    etas = default_values("eta", Settings("x", eta=20.0))
    assert etas[0] == 0 and etas[-1] / etas[1] == 100 and 20 in etas


def test_figures_share_the_runs_that_both_need(settings, tmp_path):
    steps = cells_of("steps", (2, 5), settings, tmp_path)
    etas = cells_of("eta", (0.0, 1.0), settings, tmp_path)
    many = cells_of("candidates", (1, 3, 4), settings, tmp_path)
    assert len({cell.folder for cell in many.values()}) == 2, "the same agents, a run a seed"
    assert steps[5, 1].folder == etas[1.0, 1].folder == many[3, 1].folder
    assert steps[5, 1].run == etas[1.0, 1].run == many[3, 1].run
    assert steps[2, 0].run.agent.T == 2 and etas[0.0, 0].run.agent.eta == 0.0
    assert steps[5, 0].candidates == (4, 1) and many[3, 0].candidates == (4, 3, 1)
    every = {cell.run.threads for cells in (steps, etas, many) for cell in cells.values()}
    assert every == {1}, "numbers must not depend on how many run at once"


def test_a_cell_is_what_its_run_was(settings, tmp_path):
    cell = cells_of("steps", (2,), settings, tmp_path)[2, 1]
    finish(cell, QUIET)
    rows = read_rows(RunDir(cell.folder).evaluations_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    results = cell.results()
    assert results[4].return_mean == pytest.approx(np.mean([row["return_mean"] for row in rows]), rel=1e-12)
    assert results[4].normalized_score == pytest.approx(np.mean([row["normalized_score"] for row in rows]), rel=1e-12)
    assert results[1].return_mean != results[4].return_mean and not cell.missing()
    assert results[4].ms_per_update > 0

    # Evaluated again with the run's own number, the checkpoints give what they gave in training.
    for row in rows:
        got = evaluated(cell, RunDir(cell.folder), int(row["step"]), 4)
        assert got == (row["return_mean"], pytest.approx(row["normalized_score"]))


def test_only_what_is_missing_is_done(settings, tmp_path):
    cell = cells_of("steps", (2,), settings, tmp_path)[2, 0]
    finish(cell, QUIET)
    before = {path: path.stat().st_mtime_ns for path in cell.folder.rglob("agent.safetensors")}
    more = replace(cell, candidates=(4, 3, 1))
    assert more.missing() == [3]
    finish(more, QUIET)
    assert more.results().keys() == {4, 3, 1} and more.results()[1] == cell.results()[1]
    assert {path: path.stat().st_mtime_ns for path in cell.folder.rglob("agent.safetensors")} == before
    assert run_all([more], jobs=1, console=QUIET, name=str) == [], "nothing to do: no process is started"


def test_a_folder_with_another_run_is_refused_before_any_work(settings, tmp_path):
    cells = [*cells_of("steps", (2, 3), settings, tmp_path).values()]
    finish(cells[0], QUIET)
    data = load_dataset(settings.dataset)
    check_cells(cells, data)
    with pytest.raises(RunError, match="holds a run with other settings"):
        ablation("steps", replace(settings, updates=9), tmp_path, values=(2, 3), console=QUIET)
    other = copy.copy(data)
    other.rewards = data.rewards + 1  # made anew under the same name
    with pytest.raises(RunError, match="is not the one this run began with"):
        check_cells(cells, other)
    assert not cells[2].folder.exists()


def test_a_figure_has_no_more_than_was_asked_for(settings, tmp_path):
    """Though another one left more in the folder that they share."""
    seeds = replace(settings, seeds=(0,))
    for cell in cells_of("candidates", (1, 3, 4), seeds, tmp_path).values():
        finish(cell, QUIET)
    ablation("steps", seeds, tmp_path, values=(5,), console=QUIET)
    assert [row["candidates"] for row in read_rows(tmp_path / "steps.csv")] == [4, 1]
    ablation("candidates", seeds, tmp_path, values=(3, 4), console=QUIET)
    assert [row["num_candidates"] for row in read_rows(tmp_path / "candidates.csv")] == [3, 4]


def test_an_environment_of_ones_own_is_known_when_the_command_goes_on(settings, tmp_path, monkeypatch):
    """No module is imported because a folder says so; this one the caller names."""
    text = """import gymnasium
gymnasium.register("Own-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=9)
"""
    (tmp_path / "own_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    named = replace(settings, env="own_module:Own-v0", seeds=(0,))
    (cell,) = cells_of("steps", (2,), named, tmp_path).values()
    finish(cell, QUIET)
    before = cell.results()
    cell.results_path.unlink()
    shutil.rmtree(RunDir(cell.folder).checkpoint_path(6))
    finish(cell, QUIET)
    assert [r.return_mean for r in cell.results().values()] == [r.return_mean for r in before.values()]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_log_that_is_no_file_is_not_written_to(kind, settings, tmp_path):
    (cell,) = cells_of("steps", (2,), replace(settings, seeds=(0,)), tmp_path).values()
    cell.log_path.parent.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    {"link": lambda: cell.log_path.symlink_to(victim), "pipe": lambda: os.mkfifo(cell.log_path),
     "folder": cell.log_path.mkdir}[kind]()  # fmt: skip
    ((_, reason),) = run_all([cell], jobs=1, console=QUIET, name=str)
    assert str(cell.log_path) in reason and victim.read_text() == "mine"


def test_another_runs_checkpoint_is_not_evaluated(settings, tmp_path):
    """Its rows would stand under this run's value."""
    mine, other = cells_of("eta", (1.0, 50.0), replace(settings, seeds=(0,)), tmp_path).values()
    for cell in (mine, other):
        finish(cell, QUIET)
    mine.results_path.unlink()
    for step in RunDir(mine.folder).steps():
        shutil.copy(RunDir(other.folder).checkpoint_path(step) / "agent.safetensors",
                    RunDir(mine.folder).checkpoint_path(step))  # fmt: skip
    with pytest.raises(CheckpointError, match="another run's, of eta 50"):
        finish(mine, QUIET)


@pytest.mark.parametrize(
    "line",
    ["inf,1,2,3", "2.7,1,2,3", "4,1,2,3", "0,1,2,3", "2,nan,nan,nan", "2,1e308,2,3", "2,1,2,-3", "2,1,inf,3", "x,1,2,3",
     "2,1,2", "\udcff"],
)  # fmt: skip
def test_results_that_cannot_be_are_refused(line, settings, tmp_path):
    cell = cells_of("steps", (2,), settings, tmp_path)[2, 0]
    cell.results_path.parent.mkdir(parents=True)
    text = f"num_candidates,return_mean,normalized_score,ms_per_update\n4,1,nan,3\n{line}\n"
    cell.results_path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=r"\.csv cannot be used .*; remove it, and it is made anew"):
        cell.results()


def test_an_evaluation_that_failed_in_training_is_done_again(settings, tmp_path, monkeypatch):
    whole = cells_of("steps", (2,), settings, tmp_path / "whole")[2, 0]
    finish(whole, QUIET)
    cell = cells_of("steps", (2,), settings, tmp_path / "failed")[2, 0]
    with monkeypatch.context() as patch:
        patch.setattr("dql.session.evaluate_all", lambda agents, *_, **__: [ZeroDivisionError()] * len(agents))
        complete(cell.run, console=QUIET)
    assert np.isnan(read_rows(RunDir(cell.folder).evaluations_path)[-1]["return_mean"])
    finish(cell, QUIET)
    assert [r.return_mean for r in cell.results().values()] == [r.return_mean for r in whole.results().values()]


@pytest.mark.parametrize(
    ("name", "changes", "values", "sentence"),
    [
        ("steps", {}, (0,), "T must be at least 1, got 0"),
        ("steps", {}, (1.5,), r"T must be whole numbers, got 1\.5"),
        ("eta", {}, (-1.0,), r"eta must not be negative, got -1\.0"),
        ("eta", {}, (), "no values of eta"),
        ("candidates", {}, (0,), "num_candidates must be at least 1, got 0"),
        ("steps", {"seeds": ()}, None, "seeds must be different numbers"),
        ("steps", {"seeds": (1, 1)}, None, "seeds must be different numbers"),
        ("steps", {"evaluations": 2}, None, "evaluations must be at least 3, got 2"),
        ("steps", {"updates": 2}, None, "2 updates are fewer than 3 evaluations"),
        ("steps", {"updates": 20}, None, "20 updates cannot be divided by 3 evaluations; use --updates 21"),
        ("steps", {"env": "NoSuch-v0"}, None, "NoSuch"),
        ("steps", {"env": "CartPole-v1"}, None, "CartPole-v1 has 4 observations a step"),
        (
            "candidates",
            {"episodes": 20},
            (2, 1e8),
            "100,000,000 candidates are more than the 53,687,091 that a call takes; ask for fewer",
        ),
        ("steps", {"dataset": "no/such-v0"}, None, "no/such-v0"),
        ("steps", {}, (2, 2000), "T must be an integer from 1 to 1000, got 2000"),
        ("eta", {}, (1.0, 1.0000002), "two values are too near to each other"),
    ],
)
def test_what_makes_no_figure_is_refused(name, changes, values, sentence, settings, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        ablation(name, replace(settings, **changes), tmp_path / "out", values=values, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_seeds_and_values_on_the_command_line():
    assert _seeds("0-2,7") == (0, 1, 2, 7)
    for text in ("", "a", "3-1", "0-99999999", "1-", "-1"):
        with pytest.raises(ValueError, match="--seeds takes"):
            _seeds(text)
    with pytest.raises(ValueError, match="unknown figure 'eat'; dql figure draws bandit, steps, eta and candidates"):
        figure(["eat"])
    for text in ("1,x", "nan", "1,,2"):
        with pytest.raises(ValueError, match="--values takes numbers"):
            figure(["eta", "--dataset", "a/b-v0", "--values", text])


def rows_of(name, values, seeds, numbers=(50, 1)):
    return [
        {name: v, "seed": s, "candidates": n, "return_mean": 10.0 * v + s - n, "normalized_score": 0.0,
         "ms_per_update": v + s} for v in values for s in seeds for n in numbers]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "lines"),
    [("steps", "T", ["one of 50 candidates", "policy alone"]), ("eta", "eta", ["one of 50 candidates", "policy alone"]),
     ("candidates", "num_candidates", ["chosen by softmax(min Q)"])],
)  # fmt: skip
def test_the_picture_shows_the_rows(name, field, lines):
    rows = rows_of(field, (0, 2, 20), (0, 1, 2), (50, 1) if len(lines) == 2 else (50,))
    rows[0]["return_mean"] = float("nan")  # an evaluation that failed
    picture = draw(name, rows, np.array([-30.0, -10.0]), Settings("a/b-v0"))
    ax = picture.axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["data, mean return", *lines]
    mean = next(line for line in ax.lines if line.get_label() == lines[0])
    assert mean.get_ydata()[1:].tolist() == [20 + 1 - 50, 200 + 1 - 50]
    assert mean.get_ydata()[0] == pytest.approx(1.5 - 50), "of the seeds that were evaluated"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "2", "20"]
    low, high = ax.get_ylim()
    assert low < -50 and high > 200 - 1 + 2 - (50 if len(lines) == 1 else 1)
    texts = {text.get_text() for text in ax.texts}
    if name == "eta":
        without = draw(name, rows_of(field, (2, 20), (0,)), np.array([-30.0]), Settings("a/b-v0"))
        assert not without.axes[0].texts, "where no value is 0, no end is behaviour cloning"
        assert "one seed" in without.get_supxlabel()
    assert texts == ({"behaviour cloning", "improvement"} if name == "eta" else set())
    assert len(picture.axes) == (2 if name == "steps" else 1)
    fixed = {"steps": "eta = 1, ", "eta": "T = 5, ", "candidates": "T = 5, eta = 1, "}[name]
    assert picture.get_supxlabel().startswith(f"{fixed}20,000 updates; ")


def test_the_picture_says_what_it_lacks():
    """Seeds whose runs failed, and data without a whole episode."""
    rows = [row for row in rows_of("eta", (0, 1), (0, 1, 2)) if row["eta"] == 0 or row["seed"] == 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw("eta", rows, np.array([]), Settings("a/b-v0"))
    assert "95% t interval over 1 to 3 seeds, none where there is one" in picture.get_supxlabel()
    labels = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert labels == ["one of 50 candidates", "policy alone"]
    (outline,) = picture.axes[0].collections[0].get_paths()
    assert outline.vertices[:, 0].max() == 0, "no band where there is one seed"


def test_the_interval_over_seeds():
    """Student's t, as tables have it."""
    for n, t in ((2, 12.706), (3, 4.303), (5, 2.776), (6, 2.571), (8, 2.365), (11, 2.228), (31, 2.042), (1001, 1.962)):
        values = np.array([0.0] * (n - n % 2) + [0.0] * (n % 2))
        values[: n // 2], values[n // 2 : 2 * (n // 2)] = -1, 1
        low, high = seed_interval(values)
        half = t * values.std(ddof=1) / np.sqrt(n)
        assert (low, high) == (
            pytest.approx(-half, abs=2e-3 * half + 1e-9),
            pytest.approx(half, abs=2e-3 * half + 1e-9),
        )
    assert seed_interval(np.array([7.0])) == (7.0, 7.0)


def test_a_run_that_fails_is_named_and_the_others_are_drawn(settings, tmp_path):
    cells = [*cells_of("steps", (2,), settings, tmp_path).values()]
    broken = Cell(replace(cells[1].run, dataset="no/such-v0"), cells[1].candidates)
    said = io.StringIO()
    failed = run_all([cells[0], broken], jobs=2, console=Console(file=said, width=300), name=lambda c: c.folder.name)
    assert [cell for cell, _ in failed] == [broken] and not cells[0].missing()
    assert "no/such-v0" in failed[0][1] and f"failed: {failed[0][1]}" in " ".join(said.getvalue().split())


def test_stopped_and_started_again_it_ends_the_same(settings, tmp_path, dql_command):
    """SIGTERM to the command alone: its runs write checkpoints and end; the same command goes on."""
    flags = ["--dataset", settings.dataset, "--seeds", "0-1", "--values", "2,3", "--updates", "60",
             "--evaluations", "3", "--episodes", "1", "--num-candidates", "4", "--hidden-dim", "16",
             "--batch-size", "16", "--eval-max-steps", "9", "--jobs", "2"]  # fmt: skip

    def start(out):
        return subprocess.Popen(dql_command("figure", "steps", *flags, "--out", str(out)), stderr=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True)  # fmt: skip

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    until = time.monotonic() + 100
    while not list(killed.glob("runs/*/config.json")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, (out, err)
    assert not (killed / "steps.csv").exists()
    for path in (killed, whole):
        process = start(path)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, (out, err)
    assert table(killed) == table(whole) and len(table(whole)) == 8
    assert (whole / "steps.png").read_bytes()[:4] == b"\x89PNG" and (whole / "steps.pdf").read_bytes()[:4] == b"%PDF"


def table(folder):
    with open(folder / "steps.csv") as file:
        return [{k: v for k, v in row.items() if k != "ms_per_update"} for row in csv.DictReader(file)]


def test_a_run_config_of_a_cell_reads_back(settings, tmp_path):
    run = cells_of("eta", (0.5,), settings, tmp_path)[0.5, 0].run
    assert RunConfig.from_dict(run.to_dict()) == run
