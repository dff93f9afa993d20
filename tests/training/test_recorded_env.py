"""Which environment of a dataset is made: nothing that is read runs as code, and no wrapper changes what is scored."""

import json
import os
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dql.datasets.info import DatasetError, DatasetInfo
from dql.datasets.observations import observation_layout, observation_rule
from dql.environments import make_env
from dql.recorded_env import PURE, missing_wrappers, reward_wrappers

PENDULUM = json.loads(gymnasium.spec("Pendulum-v1").to_json())


def info(spec, *, max_action=2.0, rule="box", **fields) -> DatasetInfo:
    text = spec if isinstance(spec, str) or spec is None else json.dumps(spec)
    return DatasetInfo("some/thing-v0", text, None, None, 0, np.zeros(0), rule, max_action, **fields)


def wrapper(name, module="gymnasium.wrappers", **kwargs):
    return {"name": name, "entry_point": f"{module}:{name}", "kwargs": kwargs}


def recorded(env: gymnasium.Env) -> str:
    """The spec as Minari stores it."""
    return env.spec.to_json()


def refused(of: DatasetInfo, *parts: str) -> None:
    with pytest.raises(DatasetError) as error:
        make_env(of)
    text = str(error.value)
    assert "\n" not in text
    for part in ("some/thing-v0", *parts):
        assert part in text, f"{part!r} is not in: {text}"


MARK = "from pathlib import Path; Path({path!r}).touch()"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "Mine-v0", "entry_point": "trap:Env"},
        {"id": "Mine-v0", "entry_point": "os:system", "kwargs": {"command": "touch ran"}},
        {"id": "trap:Mine-v0", "entry_point": None},
        {"id": "trap:Mine-v0"},
        {"additional_wrappers": [wrapper("Env", "trap")]},
        {"additional_wrappers": [{"name": "Env", "entry_point": "trap:Env", "kwargs": {}}]},
        {"vector_entry_point": "trap:Env", "id": "Mine-v0", "entry_point": "trap:Env"},
        {"kwargs": {"xml_file": "/tmp/model.xml"}},
        {"kwargs": {"xml_file": ".model.xml"}},
        {"kwargs": {"xml_file": "~model.xml"}},
        {"kwargs": {"g": {"a": ["trap:Env"]}}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_nothing_that_a_record_names_is_imported(tmp_path, monkeypatch, changes):
    (tmp_path / "trap.py").write_text(f"{MARK.format(path=str(tmp_path / 'ran'))}\nEnv = print")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(info(PENDULUM | changes), "is not made", "if you trust it, name it with --env")
    assert not (tmp_path / "ran").exists()
    assert "trap" not in sys.modules


@pytest.mark.parametrize("entry_point", ["trap:Env", "os:system", PENDULUM["entry_point"]])
def test_a_registered_id_is_made_from_its_registration(entry_point):
    env = make_env(info(PENDULUM | {"entry_point": entry_point}))
    assert type(env.unwrapped).__name__ == "PendulumEnv"


def test_the_typed_environment_may_be_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "myenv.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Reach-v0', entry_point=PendulumEnv, max_episode_steps=7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    try:
        env = make_env(info(None).with_env("myenv:Reach-v0"))
        assert env.spec.max_episode_steps == 7
        assert str(tmp_path) not in sys.path
        # what the user typed is not what a file says
        read = DatasetInfo.from_json(info(None).with_env("myenv:Reach-v0").to_json())
        refused(read, "'myenv:Reach-v0' would import a module")
        assert not DatasetInfo.from_json(json.dumps(json.loads(read.to_json()) | {"env_is_typed": True})).env_is_typed
    finally:
        gymnasium.registry.pop("Reach-v0", None)
        sys.modules.pop("myenv", None)


def test_a_typed_environment_that_is_not_there():
    refused(info(None).with_env("nomodule:Reach-v0"), "nomodule:Reach-v0", "cannot be imported")
    refused(info(None).with_env("Reach-v77"), "not known to Gymnasium")


@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "{", '{"id": 7}', '{"id": ""}', "[" * 100_000, '{"id": "Pendulum-v1", "kwargs": 3}',
     '{"id": "Pendulum-v1", "kwargs": {"g": [], "nothing": 1}}', '{"id": "Pendulum-v1", "max_episode_steps": "x"}',
     '{"id": "Pendulum-v1", "max_episode_steps": 0}', '{"id": "Pendulum-v1", "max_episode_steps": true}',
     '{"id": "Pendulum-v1", "additional_wrappers": 3}', '{"id": "Pendulum-v1", "additional_wrappers": [3]}',
     '{"id": "Pendulum-v1", "additional_wrappers": [{"name": "TimeLimit", "kwargs": {}}]}',
     '{"id": "Pendulum-v1", "additional_wrappers": [{"name": "TimeLimit", "kwargs": 3}]}',
     '{"id": "Pendulum-v1", "additional_wrappers": [{"name": "Nothing"}]}'],
    ids=range(17),
)  # fmt: skip
def test_a_record_of_any_shape_is_one_sentence(text):
    refused(info(text))


def test_recorded_wrappers_are_made_again():
    """Without a statistic of their own: the environment shows and takes what it did when it was recorded."""
    plain = gymnasium.make("Pendulum-v1")
    wrapped = gymnasium.wrappers.RescaleAction(plain, -1.0, 1.0)
    wrapped = gymnasium.wrappers.FrameStackObservation(wrapped, 2)
    env = make_env(info(recorded(wrapped), max_action=1.0, state_dim=6, observation_layout="[2, 3]"))
    a, b = env.reset(seed=3)[0], wrapped.reset(seed=3)[0]
    assert a.tolist() == b.reshape(-1).tolist()
    a, b = (e.step(np.array([0.5], np.float32)) for e in (env, wrapped))
    assert a[0].tolist() == b[0].reshape(-1).tolist()
    assert a[1] == b[1]
    bounds = [wrapper("RescaleAction", min_action=[-1.0], max_action=[1.0])]  # arrays, as a written record has them
    env = make_env(info(PENDULUM | {"additional_wrappers": bounds}, max_action=1.0))
    assert env.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32)
    assert all(hasattr(gymnasium.wrappers, name) for name in PURE)


def test_the_recorded_limit_is_kept():
    assert make_env(info(PENDULUM | {"max_episode_steps": 5})).spec.max_episode_steps == 5
    assert make_env(info(PENDULUM | {"max_episode_steps": None})).spec.max_episode_steps is None
    assert make_env(info({"id": "Pendulum-v1"})).spec.max_episode_steps == 200


@pytest.mark.parametrize("name", ["NormalizeObservation", "TransformObservation", "DiscretizeObservation"])
def test_wrappers_that_show_something_else_are_refused(name):
    """NormalizeObservation's statistics are in no record: with fresh ones a policy scores -20.8, the truth is -5.3."""
    refused(info(PENDULUM | {"additional_wrappers": [wrapper(name)]}), name, "--env")


def test_a_score_is_of_the_raw_reward():
    plain, env = gymnasium.make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    env = gymnasium.wrappers.NormalizeReward(gymnasium.wrappers.ClipReward(env, -1, 1))
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    text = recorded(env)
    assert reward_wrappers(text) == ["ClipReward", "NormalizeReward"]
    made = make_env(info(text))
    plain.reset(seed=1)
    made.reset(seed=1)
    for _ in range(10):
        action = np.array([1.5], np.float32)
        assert made.step(action)[1] == plain.step(action)[1]


def test_names_that_a_terminal_would_obey():
    names = ["mypackage:A\x1b[2J", "minari:DataCollectorV0", "gymnasium.wrappers:RecordEpisodeStatisticsV0"]
    listed = [{"name": "x", "entry_point": name, "kwargs": {}} for name in names]
    told = missing_wrappers(json.dumps(PENDULUM | {"additional_wrappers": listed}), json.dumps(PENDULUM))
    assert told == ["A\\x1b[2J"]


def test_a_foreign_wrapper_is_no_reason_not_to_read():
    """What is not made is asked for by whoever evaluates, and may be named; the wrappers of rewards are still told."""
    foreign = {"name": "Mine", "entry_point": "mypackage.wrappers:Mine", "kwargs": {}}
    spec = PENDULUM | {"additional_wrappers": [foreign, wrapper("NormalizeReward"), 3]}
    assert reward_wrappers(json.dumps(spec)) == ["NormalizeReward"]
    for wrappers in (3, None, [3], [{}], {"a": 1}):
        assert reward_wrappers(json.dumps(PENDULUM | {"additional_wrappers": wrappers})) == []
    refused(info(spec), "'mypackage.wrappers:Mine' would run as code", "--env")
    assert make_env(info(spec).with_env("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"id is text .*--env ID"):
        info(spec).with_env("")


def test_nothing_is_drawn_or_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrappers = [wrapper("RecordVideo", video_folder="videos"), wrapper("HumanRendering")]
    env = make_env(info(PENDULUM | {"additional_wrappers": wrappers, "kwargs": {"render_mode": "human"}}))
    assert env.render_mode is None
    assert not list(tmp_path.iterdir())


class Shown(gymnasium.Env):
    """Shows any observation space."""

    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape):
    return spaces.Box(-9, 9, shape)


@pytest.mark.parametrize(
    ("data", "environment"),
    [
        (spaces.Dict(speed=box(1), angle=box(1)), spaces.Dict(speed=box(1), slope=box(1))),
        (spaces.Dict(speed=box(2), angle=box(1)), spaces.Dict(speed=box(1), angle=box(2))),
        (spaces.Dict(a=spaces.Dict(b=box(2))), spaces.Dict(a=spaces.Tuple([box(2)]))),
        (spaces.Tuple([box(1), box(2)]), spaces.Tuple([box(2), box(1)])),
        (spaces.Dict(a=spaces.Discrete(3)), spaces.Dict(a=box(3))),
        (spaces.Dict(a=spaces.Discrete(3)), spaces.Dict(a=spaces.Discrete(3, start=1))),
        (spaces.Dict(a=spaces.MultiDiscrete([2, 3])), spaces.Dict(a=spaces.MultiDiscrete([3, 2]))),
        (box(2, 3), box(3, 2)),
    ],
)
def test_spaces_of_one_size_are_not_the_same(data, environment):
    gymnasium.register("Shown-v0", entry_point=Shown, kwargs={"space": environment}, max_episode_steps=3)
    try:
        rule = observation_rule(data)
        of = info({"id": "Shown-v0"}, rule=rule, max_action=1.0, observation_layout=observation_layout(data, rule))
        refused(of, "Shown-v0", observation_layout(data, rule), "evaluate in the environment that recorded the data")
        same = observation_layout(environment, rule)
        make_env(info({"id": "Shown-v0"}, rule=rule, max_action=1.0, observation_layout=same))
    finally:
        del gymnasium.registry["Shown-v0"]


def test_a_run_folder_imports_no_module(pendulum, tiny, dql_here, tmp_path, monkeypatch):
    """What was typed at `dql train` is typed again where the run goes on: its config.json may be a stranger's."""
    (tmp_path / "myenv.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Reach-v0', entry_point=PendulumEnv, max_episode_steps=7)\n"
    )
    few = ["--num-updates", "4", "--eval-every", "2", "--eval-episodes", "1", "--device", "cpu"]
    run = ["--dataset", pendulum, "--run-dir", tmp_path / "run"]
    try:
        assert dql_here("train", *run, *tiny, *few, "--env", "myenv:Reach-v0").code == 0
        sys.modules.pop("myenv")
        gymnasium.registry.pop("Reach-v0")
        longer = ["train", "--resume", tmp_path / "run", "--num-updates", "6"]
        dql_here(*longer).refused("myenv:Reach-v0", "--env myenv:Reach-v0 again")
        dql_here("eval", tmp_path / "run", "--episodes", "1").refused(
            "myenv:Reach-v0", "would import a module", "--env"
        )
        assert "myenv" not in sys.modules
        assert dql_here(*longer, "--env", "myenv:Reach-v0").code == 0
        assert dql_here("eval", tmp_path / "run", "--episodes", "1", "--env", "myenv:Reach-v0").code == 0
    finally:
        gymnasium.registry.pop("Reach-v0", None)
        sys.modules.pop("myenv", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"kwargs": {"frame_skip": 10**9}},
        {"kwargs": {"maze_map": [[1] * 400] * 400}},
        {"max_episode_steps": 10**9},
        {"additional_wrappers": [wrapper("FrameStackObservation", stack_size=10**8)]},
        {"additional_wrappers": [wrapper("FrameStackObservation", nothing=3)]},
        {"additional_wrappers": [wrapper("DelayObservation", delay=3)] * 3000},
        {"kwargs": {"frame_skip": 900}, "additional_wrappers": [wrapper("RepeatAction", num_repeats=900)]},
        {"additional_wrappers": [wrapper("RepeatAction", num_repeats=90), wrapper("MaxAndSkipObservation", skip=90)]},
    ],
    ids=range(8),
)
def test_numbers_that_would_never_end(changes):
    refused(info(PENDULUM | changes), "is not made", "--env")


@pytest.mark.parametrize("counting", [wrapper("RepeatAction", num_repeats=4), wrapper("TimeAwareObservation")])
def test_a_limit_beside_what_counts_steps(counting):
    """TimeLimit(RepeatAction(env, 4), 20) is recorded as the reverse is, which ends after 5."""
    refused(info(PENDULUM | {"max_episode_steps": 20, "additional_wrappers": [counting]}), "inside or outside of")
    fields = {"rule": "box"}
    make_env(info(PENDULUM | {"additional_wrappers": [counting]}, **fields))


def test_who_recorded_is_no_wrapper_of_the_environment():
    recorder = {
        "name": "DataCollector",
        "entry_point": "minari.data_collector.data_collector:DataCollector",
        "kwargs": {},
    }
    old = {"name": "AutoResetWrapper", "entry_point": "gymnasium.wrappers.autoreset:AutoResetWrapper", "kwargs": {}}
    assert make_env(info(PENDULUM | {"additional_wrappers": [recorder, old]})).reset(seed=0)[0].shape == (3,)


def test_wrappers_of_a_registration_are_made_once():
    """A record lists them as well."""
    own = (gymnasium.wrappers.RepeatAction.wrapper_spec(num_repeats=2),)
    base = gymnasium.spec("Pendulum-v1")
    gymnasium.register("Repeated-v0", entry_point=base.entry_point, max_episode_steps=20, additional_wrappers=own)
    try:
        text = recorded(gymnasium.make("Repeated-v0"))
        assert len(json.loads(text)["additional_wrappers"]) == 1
        env, plain = make_env(info(text)), gymnasium.make("Repeated-v0")
        env.reset(seed=0), plain.reset(seed=0)
        for _ in range(3):
            action = np.ones(1, np.float32)
            np.testing.assert_allclose(env.step(action)[0], plain.step(action)[0])
        repeat = json.loads(text)["additional_wrappers"][0]
        for others in ([wrapper("TimeAwareObservation")], [], [3], [repeat | {"kwargs": {"num_repeats": 3}}]):
            other = json.loads(text) | {"additional_wrappers": others}
            refused(info(other), "its wrappers are not those of the registration here (RepeatAction)")
    finally:
        del gymnasium.registry["Repeated-v0"]
