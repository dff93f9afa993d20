"""The command line: help, one-line errors, JSON, and the paper's hyper-parameters by name."""

import json
import subprocess
import sys
import tempfile

import pytest

import dql as dql_package
from dql.config import TUNED, Config, RunConfig
from dql.rundir import RunDir


@pytest.fixture(scope="module")
def ended_run(pendulum_home, tiny, tmp_path_factory):
    """A run with evaluations, made once, only read."""
    from dql.cli import main

    run = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(pendulum_home / "minari"))
        patch.setenv("DQL_CACHE", str(pendulum_home / "cache"))
        flags = ["--num-updates", "20", "--eval-every", "10", "--eval-episodes", "1", "--device", "cpu", "--top-k", "0"]
        assert main(["train", "--dataset", "dql/pendulum/mixed-v0", *tiny, *flags, "--run-dir", str(run)]) == 0
    return run


def trained_with(folder):
    """The RunConfig that a run has written down."""
    return RunConfig.from_dict(RunDir(folder).read_config()["run"])


COMMANDS = (["demo"], ["data"], ["data", "list"], ["data", "info"], ["data", "make"], ["train"], ["eval"], ["doctor"])


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, flag, dql_here):
    done = dql_here(*command, flag)
    assert done.code == 0
    assert done.err == ""
    assert "usage" in done.out.lower()


def test_the_overview_names_every_command(dql_here):
    assert dql_here().out == dql_here("--help").out
    for command in COMMANDS:
        assert command[0] in dql_here().out


def test_every_flag_of_train_is_explained(dql_here):
    import dataclasses
    import re

    out = dql_here("train", "--help").out
    for field in (*dataclasses.fields(RunConfig), *dataclasses.fields(Config)):
        if field.name != "agent":
            assert re.search(rf"--{field.name.replace('_', '-')}\b", out), field.name
    assert "--tuned" in out
    assert "--resume" in out


def test_version(dql_here, dql):
    from dql import __version__

    assert dql_here("--version").out == f"dql {__version__}\n"
    done = dql("--version")
    assert (done.code, done.out, done.err) == (0, f"dql {__version__}\n", "")


# Errors.
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frobnicate"], ["unknown command 'frobnicate'", "train"]),
        (["train"], ["--dataset", "--resume"]),
        (["train", "--dataset", "dql/hopper/medium-v0"], ["dql/hopper/medium-v0", "dql data make"]),
        (["train", "--dataset", "some/thing-v0"], ["some/thing-v0", "minari download"]),
        (["train", "--dataset", "absent.hdf5"], ["absent.hdf5"]),
        (["train", "--resume", "nowhere"], ["nowhere is no run"]),
        (["train", "--tuned", "hopper-expert-v9", "--dataset", "x"], ["hopper-expert-v9", "hopper-medium-expert-v2"]),
        (["data", "info", "some/thing-v0"], ["some/thing-v0"]),
        (["data", "make", "hoper-medium"], ["hoper-medium", "hopper-medium"]),
        (["data", "make", "pendulum-mixed"], ["already there", "overwrite"]),
        (["data", "make", "pendulum-mixed", "--steps", "0", "--overwrite"], ["steps"]),
        (["eval", "nowhere"], ["nowhere is no run"]),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(arguments, parts, dql_here, pendulum):
    dql_here(*arguments).refused(*parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tau", "2"], ["tau must be from 0 to 1, got 2"]),
        (["--lr", "0"], ["lr must be positive"]),
        (["--hidden-dim", "0"], ["hidden_dim must be at least 1"]),
        (["--T", "0"], ["T must be at least 1"]),
        (["--keep", "0"], ["keep must be at least 1"]),
        (["--eval-every", "-1"], ["eval_every must not be negative"]),
        (["--seed", "-1"], ["seed must be from 0"]),
        (["--device", "nonsense"], ["nonsense", "--device cpu"]),
        (["--backend", "magic", "--eval-every", "0"], ["magic", "eager"]),
        (["--env", "NoSuch-v0"], ["NoSuch-v0"]),
    ],
    ids=" ".join,
)
def test_bad_values_of_flags(flags, parts, dql_here, pendulum, tmp_path):
    dql_here("train", "--dataset", pendulum, "--run-dir", tmp_path / "run", *flags).refused(*parts)
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("doctor nonsense", "nonsense"),
        ("data", "list"),
        ("data frobnicate", "frobnicate"),
        ("data info", "data info"),
        ("eval", "eval"),
        ("train --dataset x --lr abc", "abc"),
        ("train --dataset x --beta-schedule quadratic", "quadratic"),
        ("train --dataset x --frobnicate 3", "frobnicate"),
        ("train --dataset x --num-updates", "num-updates"),
    ],
)
def test_what_the_parser_refuses(arguments, part, dql_here, pendulum):
    """Mistyped commands: whatever form the parser gives its refusal, it names the word and does not end well."""
    done = dql_here(*arguments.split())
    assert done.code in (1, 2)
    assert done.out == ""
    assert part in done.err
    assert "Traceback" not in done.err


def test_an_error_of_the_real_command(dql, pendulum):
    """stdout is empty, stderr one line, exit code 1: what a shell script sees."""
    done = dql("train", "--dataset", "some/thing-v0")
    done.refused("some/thing-v0")
    assert done.out == ""


def test_a_recipe_that_needs_mujoco_without_it(dql_here, pendulum, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "mujoco" or m.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)  # what Python does where a package is absent
    dql_here("data", "make", "hopper-medium").refused("mujoco", 'pip install "diffusion-ql[mujoco]"')


def test_a_recipe_that_does_not_fit_on_the_disk(dql_here, pendulum, monkeypatch, tmp_path):
    """A real file system, of which the package is told that next to nothing is free."""
    import shutil

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "empty"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    dql_here("data", "make", "pendulum-mixed").refused("MB", "make room")


# data
def test_data_list(dql_here, pendulum):
    (entry,) = json.loads(dql_here("data", "list", "--json").out)
    assert (entry["dataset_id"], entry["steps"], entry["episodes"]) == (pendulum, 1200, 6)
    assert (entry["env_id"], entry["problem"]) == ("Pendulum-v1", None)
    assert entry["ref_min_score"] < entry["ref_max_score"]
    table = dql_here("data", "list").out
    for word in (pendulum, "1,200", "Pendulum-v1", "dql/hopper/medium-expert-v0", "yes"):
        assert word in table


def test_data_list_of_nothing(dql_here, monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "empty"))
    assert json.loads(dql_here("data", "list", "--json").out) == []
    assert "pendulum" in dql_here("data", "list").out, "the recipes"


def test_data_info(dql_here, pendulum):
    facts = json.loads(dql_here("data", "info", pendulum, "--json").out)
    assert (facts["dataset_id"], facts["steps"], facts["state_dim"], facts["action_dim"]) == (pendulum, 1200, 3, 1)
    assert facts["max_action"] == 2.0
    assert facts["episode_length"]["mean"] == 200
    table = dql_here("data", "info", pendulum).out
    assert "1,200" in table
    assert "Pendulum-v1" in table


def test_data_make(dql_here, pendulum, monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    done = dql_here("data", "make", "pendulum-mixed", "--steps", 300, "--seed", 4)
    assert done.code == 0, done.err
    assert f"{pendulum}: 300 steps in 2 episodes" in done.out
    assert done.out.splitlines()[-1] == f"train on it: dql train --dataset {pendulum}"
    facts = json.loads(dql_here("data", "info", pendulum, "--json").out)
    assert facts["steps"] == 300


# train
def test_defaults_of_train_are_those_of_the_configuration(dql_here, pendulum, tmp_path):
    done = dql_here("train", "--dataset", pendulum, "--num-updates", 1, "--eval-every", 0, "--run-dir", tmp_path / "r")
    assert done.code == 0, done.err
    expected = RunConfig(pendulum, Config(num_updates=1, max_action=2.0), run_dir=tmp_path / "r", eval_every=0)
    assert trained_with(tmp_path / "r") == expected


@pytest.mark.parametrize("form", ["--tuned={}", "--tuned {}"])
def test_tuned(form, dql_here, pendulum, tmp_path, tiny):
    task = "antmaze-medium-play-v0"
    flags = [*form.format(task).split(), *tiny, "--num-updates", 1, "--eval-every", 0, "--eta", 0.25]
    done = dql_here("train", "--dataset", pendulum, *flags, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    run, t = trained_with(tmp_path / "run"), TUNED[task]
    assert (t.lr, t.eta, t.max_q_backup, t.reward_tune, t.grad_norm, t.top_k) == (1e-3, 2.0, True, "cql_antmaze", 2, 1)
    agent = run.agent
    assert (agent.lr, agent.max_q_backup, agent.reward_tune, agent.grad_norm) == (1e-3, True, "cql_antmaze", 2.0)
    assert run.top_k == 1
    assert (agent.eta, agent.num_updates, agent.hidden_dim) == (0.25, 1, 16), "what is said explicitly stands"


def test_every_tuned_task_is_offered(dql_here):
    for task, t in TUNED.items():
        out = dql_here("train", "--tuned", task, "--help").out
        assert f"(default: {t.epochs * 1000})" in " ".join(out.replace("│", " ").split()), task


def test_explicit_top_k_overrides_the_tuned(dql_here, pendulum, tmp_path, tiny):
    flags = ["--tuned", "hopper-medium-v2", *tiny, "--num-updates", 1, "--eval-every", 0]
    dql_here("train", "--dataset", pendulum, *flags, "--run-dir", tmp_path / "a")
    dql_here("train", "--dataset", pendulum, *flags, "--top-k", 0, "--run-dir", tmp_path / "b")
    assert (trained_with(tmp_path / "a").top_k, trained_with(tmp_path / "b").top_k) == (2, 0)


def test_train_says_how_to_go_on(dql_here, pendulum, tmp_path, tiny):
    run = tmp_path / "a-folder-whose-name-is-longer-than-a-line-of-a-terminal-that-has-eighty-columns-each" / "run"
    flags = ["--dataset", pendulum, *tiny, "--num-updates", 3, "--eval-every", 0, "--run-dir", run]
    done = dql_here("train", *flags)
    assert done.out.splitlines()[-1] == f"    dql eval {run}"
    dql_here("train", *flags).refused(f"dql train --resume {run}")
    assert dql_here("train", "--resume", run).code == 0
    assert dql_here("train", "--resume", run, "--num-updates", 5).code == 0
    assert trained_with(run).agent.num_updates == 5


def test_a_shorter_run_cannot_be_resumed_into(dql_here, pendulum, tmp_path, tiny):
    """Ten updates are done: five are not to be had any more."""
    flags = ["--dataset", pendulum, *tiny, "--num-updates", 10, "--eval-every", 0, "--run-dir", tmp_path / "run"]
    assert dql_here("train", *flags).code == 0
    dql_here("train", "--resume", tmp_path / "run", "--num-updates", 5).refused("--num-updates 5 ", "10 updates")
    assert trained_with(tmp_path / "run").agent.num_updates == 10


def test_the_default_folder(dql_here, pendulum, tmp_path, tiny):
    done = dql_here("train", "--dataset", pendulum, *tiny, "--num-updates", 1, "--eval-every", 0, "--seed", 7)
    assert done.code == 0
    assert RunDir(tmp_path / "runs" / "dql-pendulum-mixed-v0-diffusion-ql-seed7").steps() == [1]


# eval
def test_eval(dql_here, ended_run):
    rows = json.loads(dql_here("eval", ended_run, "--episodes", 2, "--json").out)
    assert set(rows) == {"last", "best", "offline"}
    written = json.loads((ended_run / "selection.json").read_text())
    for name, row in rows.items():
        assert row["step"] == written[name]
        assert row["episodes"] == 2
        assert row["return_low"] <= row["return_mean"] <= row["return_high"]
        assert row["normalized_score"] is not None
    table = dql_here("eval", ended_run, "--episodes", 2).out
    for name, row in rows.items():
        assert name in table
        assert f"{row['return_mean']:.1f}" in table, "the same seed, the same episodes"


def test_eval_of_one_checkpoint(dql_here, ended_run):
    rows = json.loads(dql_here("eval", ended_run, "--checkpoint", 10, "--episodes", 1, "--json").out)
    assert [row["step"] for row in rows.values()] == [10]
    other = json.loads(dql_here("eval", ended_run, "--checkpoint", 10, "--episodes", 1, "--seed", 1, "--json").out)
    assert rows["10"]["return_mean"] != other["10"]["return_mean"]
    dql_here("eval", ended_run, "--checkpoint", 17).refused("'17'", "[10, 20]")
    dql_here("eval", ended_run, "--episodes", 0).refused("episodes must be at least 1")
    dql_here("eval", ended_run, "--env", "NoSuch-v0").refused("NoSuch-v0")


def test_eval_counts_episodes_that_training_did_not_see(dql_here, ended_run):
    from dql.rundir import read_rows

    seen = {row["return_mean"] for row in read_rows(ended_run / "evaluations.csv")}
    rows = json.loads(dql_here("eval", ended_run, "--episodes", 1, "--json").out)
    assert seen.isdisjoint(row["return_mean"] for row in rows.values())


# doctor
def test_doctor(dql_here):
    import torch

    import dql

    facts = json.loads(dql_here("doctor", "--json").out)
    assert facts["backends"] == dql.backends()
    assert "eager" in facts["backends"]
    assert facts["backends"]["eager"] is None
    for name, reason in facts["backends"].items():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10 and "\n" not in reason), name
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["dql"] == dql.__version__
    assert facts["cpu"]["cores"] >= 1
    assert facts["gpu"]["devices"] or facts["gpu"]["reason"]
    text = dql_here("doctor").out
    for name in facts["backends"]:
        assert f"backend {name}" in text


# The last resort


def raising(error):
    def list_datasets():
        raise error

    return list_datasets


def test_what_nobody_foresaw_is_a_sentence_and_a_file(dql_here, monkeypatch, tmp_path):
    from dql.datasets import sources

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sources, "list_datasets", raising(AttributeError("no such\nthing \udc80")))
    line = dql_here("data", "list").refused("AttributeError: no such thing", "did not foresee", tmp_path)
    (file,) = tmp_path.glob("dql-error-*.txt")
    assert str(file) in line
    text = file.read_text()
    assert "Traceback" in text and "in list_datasets" in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_too_little_memory_is_a_sentence(dql_here, monkeypatch, tmp_path, error):
    from dql.datasets import sources

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sources, "list_datasets", raising(error))
    dql_here("data", "list").refused("not enough memory")
    assert not list(tmp_path.iterdir())


def test_a_sentence_is_of_one_line_and_no_novel(dql_here):
    line = dql_here("data", "info", "a\nb" + "x" * 5000).refused("a b")
    assert len(line) < 1200


def test_a_reader_that_has_seen_enough(dql_command, tmp_path):
    """As `dql doctor --json | head -1`."""
    running = subprocess.Popen(dql_command("doctor", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    said = running.stderr.read().decode()
    assert running.wait() in (0, 141)
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_a_policy_is_no_agent(dql_here, tmp_path):
    dql_package.DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2).save(tmp_path / "policy.safetensors")
    with pytest.raises(dql_package.CheckpointError, match=r"holds no agent but a policy; for a policy use Diffusion"):
        dql_package.load(tmp_path / "policy.safetensors")
