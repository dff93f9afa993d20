"""A run's folder: what is kept, selected, cleaned away, and what a kill or a full disk does to its files."""

import json
import resource
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dql.agents.diffusion import DiffusionBC
from dql.checkpoint import CheckpointError
from dql.config import Config, RunConfig
from dql.rundir import RunDir, RunError, append_row, drop_rows_after, find_checkpoint, read_rows
from dql.train import resume, train


@pytest.fixture
def run_config(pendulum, tmp_path):
    agent = Config(algorithm="diffusion-bc", hidden_dim=16, num_hidden=2, batch_size=16, num_updates=60)
    return RunConfig(pendulum, agent, run_dir=tmp_path / "run", device="cpu", log_every=10, checkpoint_every=10,
                     eval_every=0, eval_episodes=1, keep=2)  # fmt: skip


@pytest.fixture
def agent():
    return DiffusionBC(3, 1, Config(hidden_dim=16, num_hidden=2))


def test_the_newest_and_the_precious_are_kept(tmp_path, agent):
    folder = RunDir(tmp_path)
    for step in (10, 20, 30, 40, 50):
        folder.save_checkpoint(step, agent, {})
    folder.prune(2, {20})
    assert folder.steps() == [20, 40, 50]
    folder.prune(2, {20})
    assert folder.steps() == [20, 40, 50]
    folder.prune(1, set())
    assert folder.steps() == [50]
    folder.prune(3, set())
    assert folder.steps() == [50]


def test_a_run_keeps_the_last_checkpoints(run_config):
    train(run_config)
    folder = RunDir(run_config.run_dir)
    assert folder.steps() == [50, 60]
    assert folder.selection() == {"last": 60}
    assert find_checkpoint(run_config.run_dir) == folder.checkpoint_path(60)
    with pytest.raises(RunError, match=r"no checkpoint 'best'; it has steps \[50, 60\] \(last = 60\)"):
        find_checkpoint(run_config.run_dir, "best")


def test_selection_names_checkpoints_that_are_there(run_config):
    from dataclasses import replace

    run = replace(run_config, eval_every=15, keep=1, top_k=0)
    train(run)
    folder = RunDir(run.run_dir)
    written = json.loads((run.run_dir / "selection.json").read_text())
    del written["digest"]
    rows = read_rows(folder.evaluations_path)
    assert [row["step"] for row in rows] == [15, 30, 45, 60]
    assert written["last"] == 60
    assert written["best"] == max(rows, key=lambda row: row["return_mean"])["step"]
    assert written["offline"] == min(rows, key=lambda row: row["bc_loss"])["step"]
    assert folder.steps() == sorted(set(written.values()))
    for name, step in written.items():
        assert find_checkpoint(run.run_dir, name) == folder.checkpoint_path(step)
        assert find_checkpoint(run.run_dir, str(step)) == folder.checkpoint_path(step)
        assert find_checkpoint(folder.checkpoint_path(step)) == folder.checkpoint_path(step)


def test_the_selection_of_an_ended_run_is_complete(run_config):
    """A kill between the last checkpoint and its selection.json: the resumption has only that left to do."""
    from dataclasses import replace

    run = replace(run_config, eval_every=20, keep=1, top_k=0)
    train(run)
    folder = RunDir(run.run_dir)
    expected = folder.selection()
    (run.run_dir / "selection.json").unlink()
    resume(run.run_dir)
    assert folder.selection() == expected


def test_unfinished_files_are_cleaned_away(run_config):
    train(run_config)
    folder = RunDir(run_config.run_dir)
    before = sorted(run_config.run_dir.rglob("*"))
    unfinished = folder.checkpoints_path / ".step-000000070.unfinished"
    unfinished.mkdir()
    (unfinished / "agent.safetensors").write_bytes(b"half")
    (folder.checkpoints_path / ".step-000000060.old").mkdir()
    (run_config.run_dir / ".config.json.abc123.unfinished").write_text("{")
    assert folder.steps() == [50, 60], "what is unfinished is no checkpoint"
    resume(run_config.run_dir)
    assert sorted(run_config.run_dir.rglob("*")) == before


def test_a_start_cleans_what_a_killed_start_left(run_config):
    run_config.run_dir.mkdir()
    left = run_config.run_dir / ".config.json.abc123.unfinished"
    left.write_text("{")
    bystanders = [run_config.run_dir / name for name in (".env.local", ".d/precious", ".config.json.mine", "a.csv")]
    for file in bystanders:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    train(run_config)
    assert not left.exists()
    assert all(file.read_text() == "mine" for file in bystanders), "only the run's own temporaries go"


@pytest.mark.parametrize("missing", [["config.json"], ["config.json", "metrics.csv", "policy.safetensors"]])
def test_the_remains_of_a_run_are_no_place_for_another(run_config, missing):
    """A checkpoint that is newer than the new run's would be taken for its last."""
    train(run_config)
    for name in missing:
        (run_config.run_dir / name).unlink()
    with pytest.raises(RunError, match="remains of a run without"):
        train(run_config)


def test_a_checkpoint_half_removed_is_none(run_config):
    """`prune` was killed between two files of a folder."""
    train(run_config)
    folder = RunDir(run_config.run_dir)
    (folder.checkpoint_path(50) / "agent.safetensors").unlink()
    assert folder.steps() == [60]


# CSV files
ROWS = [{"step": 10, "seconds": 0.125, "loss": -1.5e-05}, {"step": 20, "seconds": 0.25, "loss": 1234.5678},
        {"step": 30, "seconds": 0.375, "loss": 2.25}]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    for row in ROWS:
        append_row(tmp_path / "table.csv", row)
    return tmp_path / "table.csv"


def test_rows_come_back_exactly(table):
    assert read_rows(table) == ROWS
    assert read_rows(table.with_name("absent.csv")) == []


def test_an_empty_field_is_nan(tmp_path):
    append_row(tmp_path / "t.csv", {"step": 1, "score": None})
    (row,) = read_rows(tmp_path / "t.csv")
    assert row["step"] == 1
    assert row["score"] != row["score"]


def test_rows_of_updates_to_come_are_dropped(table):
    drop_rows_after(table, 20)
    assert read_rows(table) == ROWS[:2]
    drop_rows_after(table, 0)
    assert read_rows(table) == []
    append_row(table, ROWS[0])
    assert read_rows(table) == ROWS[:1], "the header is still there"
    drop_rows_after(table.with_name("absent.csv"), 0)
    assert not table.with_name("absent.csv").exists()


def test_a_line_cut_short_is_dropped(table):
    """Wherever a kill or a full disk cut the file: whole lines remain, and lines added later are whole."""
    whole = table.read_bytes()
    wrong = {}
    for size in range(len(whole)):
        cut = table.with_name("cut.csv")
        cut.write_bytes(whole[:size])
        lines = max(whole[:size].count(b"\n") - 1, 0)  # without the header
        if read_rows(cut) != ROWS[:lines]:
            wrong[size] = read_rows(cut)
    assert wrong == {}


def test_after_a_cut_a_resumed_run_writes_whole_lines(table):
    whole = table.read_bytes()
    wrong = {}
    for size in range(len(whole)):
        cut = table.with_name("cut.csv")
        cut.write_bytes(whole[:size])
        done = max(whole[:size].count(b"\n") - 1, 0)
        drop_rows_after(cut, 10 * done)  # the checkpoint: a line's is written after the line
        for row in ROWS[done:]:
            append_row(cut, row)
        if cut.read_bytes() != whole:
            wrong[size] = cut.read_text()
    assert wrong == {}


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=10, unique=True).map(sorted),
    after=st.integers(0, 60),
)
@settings(max_examples=100, deadline=None)
def test_dropping_rows(steps, after, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    for step in steps:
        append_row(path, {"step": step, "loss": step / 3})
    drop_rows_after(path, after)
    assert read_rows(path) == [{"step": s, "loss": s / 3} for s in steps if s <= after]


# A full disk: the operating system refuses to make a file longer than a limit, with a real OSError in the midst of
# writing. Only a process of its own may have such a limit.
FULL = """
import resource, sys
import torch._dynamo  # before the limit: it may write caches
import dql.cli, dql.train, dql.data, dql.datasets.cache, dql.environments
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(dql.cli.main(sys.argv[2:]))
"""


@pytest.fixture
def full_disk(tmp_path):
    def run(limit, *arguments):
        return subprocess.run(
            [sys.executable, "-c", FULL, str(limit), *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, timeout=120,
        )  # fmt: skip

    return run


def assert_one_sentence(done, *parts):
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-600:]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert str(part) in lines[0]


def test_no_room_for_a_checkpoint(run_config, full_disk):
    train(run_config)
    folder = RunDir(run_config.run_dir)
    before = {p: p.read_bytes() for p in folder.checkpoints_path.rglob("*") if p.is_file()}
    biggest = max(len(data) for data in before.values())
    config = folder.config_path.stat().st_size
    assert config + 500 < biggest - 500, "the limit must let config.json pass and stop a checkpoint"
    done = full_disk(biggest - 500, "train", "--resume", run_config.run_dir, "--num-updates", 200)
    assert_one_sentence(done, "agent.safetensors", "File too large", "free some space")
    assert {p: p.read_bytes() for p in folder.checkpoints_path.rglob("*") if p.is_file()} == before
    assert list(folder.checkpoints_path.glob(".*")) == []
    again = resume(run_config.run_dir)  # with room
    assert again.step == 200


def test_no_room_for_a_line_of_metrics(run_config, full_disk):
    from dataclasses import replace

    run = replace(run_config.with_agent(num_updates=420), log_every=1, checkpoint_every=420)
    train(run)
    folder = RunDir(run.run_dir)
    limit = folder.metrics_path.stat().st_size + 130  # in the midst of a line
    assert limit > max(p.stat().st_size for p in folder.checkpoints_path.rglob("*") if p.is_file())
    done = full_disk(limit, "train", "--resume", run.run_dir, "--num-updates", 430)
    assert_one_sentence(done, "metrics.csv")
    # There was room for a checkpoint: the line is lost for now, the updates before it are not.
    (before, stopped) = folder.steps()
    assert before == 420
    assert [row["step"] for row in read_rows(folder.metrics_path)] == list(range(1, stopped))
    assert folder.metrics_path.read_bytes().endswith(b"\n"), "no half line"
    resume(run.run_dir)
    assert [row["step"] for row in read_rows(folder.metrics_path)] == list(range(1, 431))


def test_no_room_for_the_first_file(pendulum, tiny, full_disk, tmp_path):
    done = full_disk(500, "train", "--dataset", pendulum, *tiny, "--eval-every", 0, "--run-dir", tmp_path / "run")
    assert_one_sentence(done, "config.json")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_failed_checkpoint_leaves_the_others(tmp_path, agent):
    """In this process: the limit is lifted again at once."""
    folder = RunDir(tmp_path)
    folder.save_checkpoint(10, agent, {"a": 1})
    before = (folder.checkpoint_path(10) / "agent.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            folder.save_checkpoint(20, agent, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.steps() == [10]
    assert folder.read_loop(10)["a"] == 1
    assert (folder.checkpoint_path(10) / "agent.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.checkpoints_path.iterdir()) == ["step-000000010"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another folder"):
        RunDir(tmp_path / "file" / "run").lock()


def test_a_lock_ends_with_its_process(tmp_path):
    """SIGKILL leaves no lock behind."""
    code = """
    import os, signal, sys
    from pathlib import Path
    from dql.rundir import RunDir, RunError
    folder = RunDir(Path(sys.argv[1]))
    folder.lock()
    try:
        RunDir(Path(sys.argv[1])).lock()
    except RunError as error:
        assert "another process" in str(error)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=False)
    assert done.returncode == -9
    folder = RunDir(tmp_path)
    folder.lock()
    folder.unlock()


def test_a_start_that_fails_leaves_no_folder(run_config, tmp_path):
    run = replace(run_config, dataset="dql/nowhere/none-v0", run_dir=tmp_path / "never")
    with pytest.raises(FileNotFoundError):
        train(run)
    assert not run.run_dir.exists()
    run.run_dir.mkdir()
    (run.run_dir / "mine").write_text("kept")
    with pytest.raises(FileNotFoundError):
        train(run)
    assert [p.name for p in run.run_dir.iterdir()] == ["mine"]


def test_no_room_for_the_cache(pendulum, tiny, full_disk, tmp_path, monkeypatch):
    """It costs the caching alone: the run is trained, and nothing half written is left."""
    monkeypatch.setenv("DQL_CACHE", str(tmp_path / "cache"))
    done = full_disk(
        30_000, "train", "--dataset", pendulum, *tiny[:6], "--num-updates", 3, "--eval-every", 0, "--run-dir",
        tmp_path / "run", "--algorithm", "diffusion-bc",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert RunDir(tmp_path / "run").steps() == [3]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_no_obstacle_where_nothing_changes(run_config, full_disk):
    """A run that has ended, resumed: its tables, config and selection are as they were, so none is written."""
    train(run_config)
    (run_config.run_dir / "policy.safetensors").unlink()
    config, policy = (run_config.run_dir / "config.json").stat().st_size, 12_000
    done = full_disk(max(config, 500) - 100, "train", "--resume", run_config.run_dir)
    assert_one_sentence(done, "policy.safetensors", "free some space")  # and nothing before that
    assert full_disk(10 * policy, "train", "--resume", run_config.run_dir).returncode == 0
    assert (run_config.run_dir / "policy.safetensors").exists()
    assert not [p for p in run_config.run_dir.rglob("*") if p.name.endswith(".unfinished")]


def test_a_line_that_finds_no_room_leaves_the_table_as_it_was(table):
    whole = table.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))
    try:
        with pytest.raises(CheckpointError, match=r"table\.csv.*what was there before is untouched; free some space"):
            append_row(table, ROWS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert table.read_bytes() == whole
    append_row(table, ROWS[0])
    assert read_rows(table) == [*ROWS, ROWS[0]]
