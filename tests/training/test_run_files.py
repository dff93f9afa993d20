"""A run's files that are not as they were written: flipped bits, another run's, links, strange JSON, none to read."""

import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import assert_one_sentence, brief_run, quietly

from dql.agents.diffusion import DiffusionBC
from dql.agents.registry import load
from dql.checkpoint import CheckpointError, load_tensors, save_tensors
from dql.config import Config
from dql.data import DatasetError, load_dataset
from dql.loop import LoopState
from dql.policy import DiffusionPolicy
from dql.rundir import RunDir, RunError, append_row
from dql.train import complete, resume, train


@pytest.fixture
def run_config(pendulum, tmp_path):
    return brief_run(pendulum, tmp_path / "run")


# Checkpoints that are not what was written, or another run's.
def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_no_flipped_bit_goes_unnoticed(run_config):
    """In the header, the description, any tensor, the loop's own state; and the sentence names the file."""
    run = replace(run_config, eval_every=20)
    quietly(train, run)
    folder = RunDir(run.run_dir)
    moments = random.Random(0)
    wrong = []
    for path in (
        folder.checkpoint_path(40) / "agent.safetensors",
        folder.checkpoint_path(40) / "loop.json",
        folder.policy_path,
    ):
        whole = path.read_bytes()
        for bit in moments.sample(range(8 * len(whole)), 150):
            path.write_bytes(flipped(path, bit))
            try:
                if path.name == "agent.safetensors":
                    load(path.parent)
                elif path.name == "loop.json":
                    LoopState.from_dict({k: v for k, v in folder.read_loop(40).items() if k not in ("of", "agent")})
                else:
                    DiffusionPolicy.load(path)
            except (CheckpointError, RunError, ValueError) as error:
                if path.name != "loop.json" and str(path) not in str(error):
                    wrong.append((path.name, bit, str(error)))
            else:
                wrong.append((path.name, bit))
            path.write_bytes(whole)
    assert wrong == []
    for path in (folder.checkpoint_path(40) / "agent.safetensors", folder.checkpoint_path(40) / "loop.json"):
        whole = path.read_bytes()
        path.write_bytes(flipped(path, 8 * len(whole) - 100))
        with pytest.raises(
            RunError, match=rf"{path} is damaged.*remove {path.parent}, and resuming starts from"
        ) as caught:
            quietly(resume, run.run_dir)
        assert_one_sentence(caught)
        path.write_bytes(whole)
    assert quietly(resume, run.run_dir)[0].step == 40


def test_a_checkpoint_of_an_earlier_version_has_no_digest(run_config):
    from safetensors.torch import save

    quietly(train, run_config)
    folder = RunDir(run_config.run_dir).checkpoint_path(40)
    tensors, about = load_tensors(folder / "agent.safetensors")
    assert "digest" not in about
    (folder / "agent.safetensors").write_bytes(save(tensors, metadata={"dql": json.dumps(about)}))
    loop = json.loads((folder / "loop.json").read_text())
    for added in ("digest", "of", "evaluation_owed", "agent"):
        del loop[added]
    (folder / "loop.json").write_text(json.dumps(loop))
    resumed, _ = quietly(resume, run_config.run_dir, num_updates=50)
    assert resumed.step == 50


@pytest.mark.parametrize("what", ["seed", "hidden_dim", "step", "lr", "dataset's loop"])
def test_a_checkpoint_of_another_run(what, run_config, tmp_path):
    quietly(train, run_config)
    agent = run_config.agent
    other = {
        "seed": replace(agent, seed=1),
        "hidden_dim": replace(agent, hidden_dim=32),
        "lr": replace(agent, lr=1e-4),
    }.get(what, agent)
    other = replace(run_config, agent=other, run_dir=tmp_path / "other", eval_every=0)
    if what == "step":
        other = replace(other, checkpoint_every=1, keep=5)
    if what == "dataset's loop":
        other = other.with_agent(reward_tune="normalize")
    quietly(train, other)
    source, target = (RunDir(run.run_dir).checkpoint_path(40) for run in (other, run_config))
    if what == "step":
        source = source.with_name("step-000000039")
    if what == "dataset's loop":
        shutil.copy(source / "loop.json", target / "loop.json")
    else:
        shutil.rmtree(target)
        shutil.copytree(source, target)
    with pytest.raises(RunError, match=rf"{target} is no checkpoint of this run: it is of .*, or remove") as caught:
        quietly(resume, run_config.run_dir)
    assert_one_sentence(caught)
    if what == "step":
        with pytest.raises(CheckpointError, match="it is of update 39, its folder is named for 40"):
            load(run_config.run_dir)
    if what != "dataset's loop":
        assert {"step": "update 39", "hidden_dim": "hidden_dim 32"}.get(what, what) in str(caught.value)
    shutil.rmtree(target)
    assert quietly(resume, run_config.run_dir)[0].step == 40, "as the sentence says"


# Links in a run's folder.
NAMES = (".lock", "config.json", "metrics.csv", "evaluations.csv", "selection.json", "policy.safetensors",
         "checkpoints/step-000000040/agent.safetensors", "checkpoints/step-000000040/loop.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_folder_is_refused(name, run_config, tmp_path):
    quietly(train, run_config)
    link, elsewhere = run_config.run_dir / name, tmp_path / "precious"
    shutil.move(link, elsewhere)
    before = elsewhere.write_bytes(elsewhere.read_bytes() or b"precious") and elsewhere.read_bytes()
    link.symlink_to(elsewhere)
    with pytest.raises(RunError, match=rf"{link} is a symbolic link.*put the file or folder itself there") as caught:
        quietly(resume, run_config.run_dir, num_updates=50)
    assert_one_sentence(caught)
    assert elsewhere.read_bytes() == before
    link.unlink()
    shutil.move(elsewhere, link)
    assert quietly(resume, run_config.run_dir, num_updates=50)[0].step == 50, "the lock was given back"


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000000040", "checkpoints/.step-000000050.unfinished",
                                  "checkpoints/.step-000000020.old"])  # fmt: skip
def test_a_linked_folder_is_refused(name, run_config, tmp_path):
    """Of checkpoints, and of their temporary names, which anybody can tell."""
    quietly(train, run_config)
    link, elsewhere = run_config.run_dir / name, tmp_path / "precious"
    if link.exists():
        shutil.move(link, elsewhere)
    else:
        elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    link.symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.rglob("*"))
    with pytest.raises(RunError, match=rf"{link} is a symbolic link"):
        quietly(resume, run_config.run_dir, num_updates=50)
    assert sorted(p.name for p in elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", [".lock", "metrics.csv", "evaluations.csv", "config.json", "checkpoints"])
def test_a_new_run_follows_no_link(name, run_config, tmp_path):
    """Nor a dangling one, which looks as if nothing were there."""
    for target in (tmp_path / "nothing", tmp_path / "precious"):
        run = replace(run_config, run_dir=tmp_path / f"run-{target.name}")
        run.run_dir.mkdir()
        if target.name == "precious":
            target.mkdir() if name == "checkpoints" else target.write_text("precious")
        (run.run_dir / name).symlink_to(target)
        with pytest.raises(RunError, match="is a symbolic link"):
            quietly(train, run)
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "precious").is_dir() or (tmp_path / "precious").read_text() == "precious"


def test_links_that_appear_while_a_run_is_under_way(tmp_path):
    """Each writer refuses by itself: the folder was looked at when the run began."""
    folder, elsewhere = RunDir(tmp_path / "run"), tmp_path / "precious"
    folder.path.mkdir()
    elsewhere.mkdir()
    agent = DiffusionBC(3, 1, Config(hidden_dim=16, num_hidden=2))
    (elsewhere / "rows").write_text("precious")
    folder.metrics_path.symlink_to(elsewhere / "rows")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: it is a symbolic link"):
        append_row(folder.metrics_path, {"step": 1})
    assert (elsewhere / "rows").read_text() == "precious"
    folder.save_checkpoint(1, agent, {})
    (folder.checkpoints_path / ".step-000000002.unfinished").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        folder.save_checkpoint(2, agent, {})
    shutil.move(folder.checkpoints_path, tmp_path / "moved")
    folder.checkpoints_path.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        folder.save_checkpoint(3, agent, {})
    assert [p.name for p in elsewhere.iterdir()] == ["rows"]
    # A file that is replaced whole: the link goes, what it pointed to stays.
    (folder.path / "selection.json").symlink_to(elsewhere / "rows")
    folder.write_json("selection.json", {"last": 3})
    assert (elsewhere / "rows").read_text() == "precious"
    assert not (folder.path / "selection.json").is_symlink()


def test_the_folder_itself_may_be_reached_through_a_link(run_config, tmp_path):
    (tmp_path / "big-disk").mkdir()
    run_config.run_dir.symlink_to(tmp_path / "big-disk")
    quietly(train, run_config)
    assert quietly(resume, run_config.run_dir, num_updates=50)[0].step == 50
    assert RunDir(tmp_path / "big-disk").steps()[-1] == 50


@pytest.mark.parametrize("name", [".lock", "metrics.csv"])
def test_a_pipe_is_not_waited_for(name, run_config):
    run_config.run_dir.mkdir()
    os.mkfifo(run_config.run_dir / name)
    with pytest.raises((RunError, CheckpointError)) as caught:
        quietly(train, run_config)
    assert_one_sentence(caught)


# Files of JSON that hold something else.
STRANGE = [None, "x", "", -1, 0.5, math.inf, -math.inf, math.nan, 10**400, [], {}, [[]], True, {"a": 1}, "9" * 100]


def places(values, path=()):
    """The path of every value in a tree of JSON."""
    if path:
        yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*path, key))
    elif isinstance(values, list):
        for i, value in enumerate(values[:1]):
            yield from places(value, (*path, i))


def changed(values, path, value=None, *, remove=False):
    values = copy.deepcopy(values)
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    if remove:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return values


def variants(values, number=100):
    """Some of (what was changed, the values with that) for every place and every strange thing."""
    every = []
    for path in places(values):
        every.append(((*path, "removed"), changed(values, path, remove=True)))
        every += [((*path, f"{strange!r:.20}"), changed(values, path, strange)) for strange in STRANGE]
    return random.Random(0).sample(every, min(number, len(every)))


def not_in_a_sentence(act, cases):
    """The cases that raise anything but one sentence of ours; which of them nobody minded."""
    wrong, fine = [], []
    for what, prepare in cases:
        prepare()
        try:
            act()
        except (RunError, CheckpointError, DatasetError, ValueError) as error:
            if "\n" in str(error) or len(str(error)) > 900:
                wrong.append((what, str(error)))
        except BaseException as error:
            wrong.append((what, repr(error)))
        else:
            fine.append(what)
    assert wrong == []
    return fine


@pytest.fixture
def ended(run_config):
    """A run that has ended, so that resuming does no update."""
    quietly(train, replace(run_config.with_agent(num_updates=10), eval_episodes=1))
    return RunDir(run_config.run_dir)


def test_a_config_of_strange_values(ended, monkeypatch):
    written = ended.read_config()  # without the digest, as who edits it leaves it
    cases = [
        (what, lambda values=values: ended.config_path.write_text(json.dumps(values)))
        for what, values in variants(written)
    ]
    # Nothing of it may start training: what differs from the checkpoint is another run's.
    monkeypatch.setattr("dql.session.Session._advance", lambda *_: pytest.fail("it trains"))
    cases = [case for case in cases if case[0][-2] != "num_updates" or case[0][-1] != "removed"]  # a million: longer
    fine = not_in_a_sentence(lambda: quietly(resume, ended.path), cases)
    for what in fine:
        assert what[0] in ("versions", "dataset", "run"), what
        assert what[1] != "agent" or what[2:] in [(name, "removed") for name in written["run"]["agent"]], what
    assert not [what for what in fine if what[0] == "dataset" and what[1] not in
                ("transitions", "state_dim", "action_dim", "in_memory", "info")]  # fmt: skip


def test_reading_a_run_of_strange_values(ended):
    """Who only reads it: dql eval, dql.load."""
    from dql.cli import evaluate as command
    from dql.data import DatasetInfo

    written = ended.read_config()
    info = DatasetInfo.from_json(json.dumps(written["dataset"]["info"]))
    del written["dataset"]["info"]["episode_returns"], written["dataset"]["info"]["episode_lengths"]
    written["dataset"]["info"] |= {"episode_returns": [1.0], "episode_lengths": [1]}
    assert info.max_action == 2.0
    tree = {"dataset": {"info": written["dataset"]["info"]}}
    cases = [
        (what, lambda values=values: ended.config_path.write_text(json.dumps(written | values)))
        for what, values in variants(tree)
    ]
    cases = [(what, prepare) for what, prepare in cases if len(what) > 2]

    def read():
        ended.read_config()
        command(ended.path, checkpoint="last", episodes=1, device="cpu", as_json=True)

    with contextlib.redirect_stdout(io.StringIO()):
        not_in_a_sentence(read, random.Random(1).sample(cases, 40))


def test_a_loop_of_strange_values(ended, monkeypatch):
    path = ended.checkpoint_path(10) / "loop.json"
    written = ended.read_loop(10)
    monkeypatch.setattr("dql.session.Session._advance", lambda *_: pytest.fail("it trains"))
    cases = [
        (what, lambda values=values: ended.save_loop(10, values))  # with the digest that fits
        for what, values in variants(written)
    ]
    not_in_a_sentence(lambda: quietly(resume, ended.path), cases)
    ended.save_loop(10, written)
    assert quietly(resume, ended.path)[0].step == 10
    for text in ("[]", "3", "null", '"x"', "{}", "", "{", "\xff\xfe", '{"digest": "x"}'):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RunError, match=f"{path} is damaged") as caught:
            quietly(resume, ended.path)
        assert_one_sentence(caught)


def test_a_checkpoint_of_strange_values(ended):
    path = ended.checkpoint_path(10) / "agent.safetensors"
    tensors, about = load_tensors(path)
    cases = [
        (what, lambda values=values: save_tensors(path, tensors, values))  # with the digest that fits
        for what, values in variants(about)
    ]
    fine = not_in_a_sentence(lambda: load(path.parent), cases)
    # A number of the config may be another: resuming compares them.
    assert {what[0] for what in fine if what != ("format", "True")} <= {"config"}
    cases = [
        (name, lambda name=name, value=value: save_tensors(path, tensors | {name: value}, about))
        for name in tensors
        for value in (torch.zeros(3), torch.zeros(0, 2))
    ]
    cases += [(name, lambda name=name: save_tensors(path, {k: v for k, v in tensors.items() if k != name}, about))
              for name in tensors]  # fmt: skip
    assert not_in_a_sentence(lambda: load(path.parent), cases) == []


@pytest.mark.parametrize("name", ["config.json", "selection.json", "checkpoints/step-000000010/loop.json"])
@pytest.mark.parametrize(
    "text",
    [b"[" * 200_000, b'{"run": ' + b"9" * 5000 + b"}", b'{"a": "' + b"\xff" + b'"}', b"", b"[1, 2]", b"nonsense"],
    ids=["deep", "long number", "no UTF-8", "empty", "a list", "no JSON"],
)
def test_what_is_no_json(name, text, ended, dql_here):
    path = ended.path / name
    path.write_bytes(text)
    command = ("eval", ended.path) if name == "selection.json" else ("train", "--resume", ended.path)
    assert len(dql_here(*command).refused(path, "damaged")) < 500


@pytest.mark.parametrize("name", ["metrics.csv", "evaluations.csv"])
@pytest.mark.parametrize("text", [b"step,a\r\nx,1\r\n", b"step,a\r\n\r\n\xff\r\n", b"step,a\r\n\r\n"])
def test_what_is_no_table(name, text, ended):
    (ended.path / name).write_bytes(text)
    with pytest.raises(RunError, match=f"{ended.path / name} is damaged"):
        quietly(resume, ended.path)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "evaluations.csv", "selection.json"])
def test_pipes_are_not_waited_for(name, ended):
    (ended.path / name).unlink(missing_ok=True)
    os.mkfifo(ended.path / name)
    if name == "selection.json":
        assert quietly(resume, ended.path)[0].step == 10  # which writes it anew
        assert ended.selection()["last"] == 10
        (ended.path / name).unlink()
        os.mkfifo(ended.path / name)
        with pytest.raises(RunError, match=f"{name}.*no regular file"):
            ended.selection()
        return
    with pytest.raises((RunError, CheckpointError), match=f"{name}.*no regular file") as caught:
        quietly(resume, ended.path)
    assert_one_sentence(caught)


NAMES_READ = ("config.json", "metrics.csv", "checkpoints", "checkpoints/step-000000010/agent.safetensors",
              "checkpoints/step-000000010/loop.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES_READ)
def test_what_may_not_be_read_is_not_called_damaged(name, ended):
    """In a process of another user, for whom the file says no."""
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        run = place / "run"
        shutil.copytree(ended.path, run)
        done = subprocess.run(
            [sys.executable, "-c", _AS_ANOTHER, str(run), name], capture_output=True, text=True, check=False
        )
        if done.returncode == 77:
            pytest.skip("only root can become another user")
        assert done.returncode == 0, done.stderr
        said = done.stdout.strip()
        assert "Permission denied" in said
        assert "damaged" not in said
        assert str(run / name) in said
        assert "\n" not in said
    finally:
        shutil.rmtree(place)


_AS_ANOTHER = """
import os, sys
from pathlib import Path
import dql
from dql.agents.registry import load
from dql.checkpoint import CheckpointError, load_tensors
from dql.rundir import RunDir, RunError, read_rows
import safetensors.torch, torch, dql.datasets.info
run, name = Path(sys.argv[1]), sys.argv[2]
os.chmod(run.parent, 0o755), os.chmod(run, 0o755), os.chmod(run / name, 0)
try:
    os.setuid(65534)
except OSError:
    sys.exit(77)
folder = RunDir(run)
try:
    folder.read_config()
    read_rows(folder.metrics_path)
    step = max(folder.steps())
    load_tensors(folder.checkpoint_path(step) / "agent.safetensors")
    folder.read_loop(step)
except (RunError, CheckpointError) as error:
    print(error)
"""


def test_a_foreign_checkpoint_is_not_evaluated_either(run_config, tmp_path, dql_here):
    """Also where only its agent is another run's, of other data but the same config and step."""
    quietly(train, replace(run_config, eval_every=0))
    other = replace(run_config.with_agent(seed=1), run_dir=tmp_path / "other", eval_every=0)
    quietly(train, other)
    mine, its = (RunDir(run.run_dir).checkpoint_path(40) for run in (run_config, other))
    whole = (mine / "agent.safetensors").read_bytes()
    shutil.copy(its / "agent.safetensors", mine / "agent.safetensors")
    with pytest.raises(CheckpointError, match="another run's, of seed 1, the run's is 0"):
        load(run_config.run_dir)
    for command in (("eval", run_config.run_dir, "--episodes", 1), ("export", run_config.run_dir)):
        dql_here(*command).refused("another run's, of seed 1")
    assert load(mine).config.seed == 1  # which was asked for itself
    (mine / "agent.safetensors").write_bytes(whole)
    agent = load(run_config.run_dir)
    with torch.no_grad():
        agent.policy.denoiser.flat.add_(1.0)
    agent.save(mine)
    for read in (lambda: load(run_config.run_dir), lambda: complete(replace(run_config, eval_every=0))):
        with pytest.raises(CheckpointError, match=r"is of an agent that loop\.json was not saved with"):
            read()
    with pytest.raises(RunError, match=r"an agent that loop\.json was not saved with; restore it"):
        quietly(resume, run_config.run_dir, num_updates=50)
    (mine / "loop.json").write_text("{")  # which says nothing against the agent
    assert load(run_config.run_dir).step == 40


def test_a_whole_checkpoint_of_other_data_is_not_read(run_config, tmp_path):
    """Of the same config, in a folder of the same name: two datasets' figures have such."""
    data = load_dataset(run_config.dataset)
    other_data = copy.copy(data)
    other_data.rewards = data.rewards + 1
    run = replace(run_config, eval_every=0)
    other = replace(run, run_dir=tmp_path / "other")
    quietly(train, run)
    quietly(train, other, dataset=other_data)
    mine, its = (RunDir(r.run_dir).checkpoint_path(40) for r in (run, other))
    shutil.rmtree(mine)
    shutil.copytree(its, mine)
    for read in (load, lambda _: complete(run), lambda folder: quietly(resume, folder, num_updates=50)):
        with pytest.raises((CheckpointError, RunError), match=r"is of fingerprint '\w+' in loop\.json, the run's is"):
            read(run.run_dir)


@pytest.mark.parametrize("name", ["config.json", "selection.json"])
def test_a_flipped_bit_is_noticed(name, ended):
    """Any that leaves JSON behind: a score is normalised by such a number, a policy chosen by one."""
    path = ended.path / name
    written, read = path.read_bytes(), ended.read_config if name == "config.json" else ended.selection
    want, found = read(), []
    for at in random.Random(3).sample(range(len(written)), min(200, len(written))):
        flipped = bytearray(written)
        flipped[at] ^= 1 << at % 7
        path.write_bytes(bytes(flipped))
        try:
            if read() != want:
                found.append(at)
        except RunError:
            pass
    assert found == []


def test_an_edited_config_is_used_without_its_digest(ended):
    written = json.loads(ended.config_path.read_text())
    written["run"]["eval_episodes"] = 2
    ended.config_path.write_text(json.dumps(written))
    with pytest.raises(RunError, match="not what was written; restore it from a copy or, if you changed it, remove"):
        ended.read_config()
    del written["digest"]
    ended.config_path.write_text(json.dumps(written))
    assert ended.read_config()["run"]["eval_episodes"] == 2


def test_a_run_of_data_whose_goal_was_left_out(run_config):
    """Its config.json holds the goal: it is resumed and loaded like any other."""
    import dql

    goal = {"at": 2, "values": [1.0, 1.0], "rule": "achieved_goal+desired_goal+observation", "layout": "{x}"}
    data = dql.load_dataset(run_config.dataset)
    data.info = replace(data.info, dropped_goal=goal)
    run = replace(run_config.with_agent(num_updates=10), eval_every=0)
    quietly(train, run, dataset=data)
    assert RunDir(run.run_dir).read_config()["dataset"]["info"]["dropped_goal"] == goal
    assert quietly(resume, run.run_dir, num_updates=20, dataset=data)[0].step == 20
    assert dql.load(run.run_dir).step == 20
