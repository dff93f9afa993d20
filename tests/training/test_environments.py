"""Evaluation environments show what the data shows, AntMaze ends at its first success, and what is missing is named."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from support import ROOT

from dql.datasets.info import DatasetError, DatasetInfo
from dql.datasets.observations import flatten_observation, flatten_rows, observation_rule
from dql.environments import make_env


def info_for(spec, *, rule="box", dataset_id="some/thing-v0", max_action=1.0, **fields):
    return DatasetInfo(
        dataset_id,
        None if spec is None else spec.to_json(),
        None,
        None,
        0,
        np.zeros(0),
        rule,
        max_action,
        **fields,
    )


class GoalWalk(gymnasium.Env):
    """A real little goal environment: the position moves by the action, success is being within 0.5 of 2.0.

    Like Minari's AntMaze it never terminates and goes on rewarding.
    """

    observation_space = spaces.Dict(
        {
            "achieved_goal": spaces.Box(-np.inf, np.inf, (1,), np.float64),
            "desired_goal": spaces.Box(-np.inf, np.inf, (1,), np.float64),
            "observation": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        }
    )
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, with_success: bool = True):
        self.with_success, self.position, self.time = with_success, 0.0, 0

    def _look(self):
        return {
            "achieved_goal": np.array([self.position]),
            "desired_goal": np.array([2.0]),
            "observation": np.array([self.time, -self.position]),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = 0.0, 0
        return self._look(), {"success": False} if self.with_success else {}

    def step(self, action):
        self.position, self.time = self.position + float(action[0]), self.time + 1
        success = abs(self.position - 2.0) < 0.5
        dense = 0.25 + success  # positive from the start where infos tell success
        return (
            self._look(),
            dense if self.with_success else float(success),
            False,
            False,
            {"success": success} if self.with_success else {},
        )


@pytest.fixture(scope="module")
def walk_spec():
    gymnasium.register("Walk-v0", entry_point=GoalWalk, max_episode_steps=6)
    yield walk_json
    del gymnasium.registry["Walk-v0"]


def walk_json(**kwargs):
    """The EnvSpec JSON without entry point: the registered environment is made by its name."""
    return json.dumps({"id": "Walk-v0", "entry_point": None, "max_episode_steps": 6, "kwargs": kwargs})


def walk_info(spec_json, dataset_id="D4RL/antmaze/walk-v1"):
    return DatasetInfo(
        dataset_id,
        spec_json,
        0.0,
        1.0,
        0,
        np.zeros(0),
        "achieved_goal+observation",
        1.0,
        state_dim=3,
        action_dim=1,
    )


def run(env, actions):
    env.reset(seed=0)
    return [env.step(np.array([a], np.float32)) for a in actions]


@pytest.mark.parametrize("goal", [2.0, 4.0])
def test_an_environment_with_another_goal_than_the_data_says_so(walk_spec, goal):
    """The goal is left out of the rows, as it is the same in all: nothing else would show that the task is another."""
    layout = "{achieved_goal: [1], desired_goal: [1], observation: [2]}"
    dropped = {"at": 1, "values": [goal], "rule": "achieved_goal+desired_goal+observation", "layout": layout}
    info = replace(walk_info(walk_spec(), "some/walk-v0"), dropped_goal=dropped, max_action=1.0)
    env = make_env(DatasetInfo.from_json(info.to_json()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert env.reset(seed=1)[0].shape == (3,)
    told = [str(warning.message) for warning in caught]
    assert told == [] if goal == 2.0 else "Walk-v0 does not have the goal [4.0] that all episodes of dataset" in told[0]


def test_a_strange_goal_ends_no_evaluation(walk_spec, monkeypatch):
    """Rows do not have it: what an environment shows there is another goal, and no error."""
    layout = "{achieved_goal: [1], desired_goal: [1], observation: [2]}"
    dropped = {"at": 1, "values": [2.0], "rule": "achieved_goal+desired_goal+observation", "layout": layout}
    env = make_env(replace(walk_info(walk_spec(), "some/walk-v0"), dropped_goal=dropped))
    look = GoalWalk._look
    for goal in (None, np.zeros((1, 2)), np.array(["x"])):
        monkeypatch.setattr(GoalWalk, "_look", lambda self, goal=goal: look(self) | {"desired_goal": goal})
        with pytest.warns(UserWarning, match="does not have the goal"):
            assert env.reset(seed=1)[0].shape == (3,)


@pytest.mark.parametrize(
    "change",
    [
        {"values": 3},
        {"values": ["x"]},
        {"values": [float("inf")]},
        {"values": [10**400]},
        {"values": [1e300]},
        {"at": 1.5},
        {"rule": 1},
        {"layout": None},
    ],
)
def test_a_goal_that_nobody_wrote(walk_spec, change):
    goal = {"at": 1, "values": [2.0], "rule": "achieved_goal+desired_goal+observation", "layout": ""} | change
    with pytest.raises(ValueError, match="has the dropped_goal"):
        DatasetInfo.from_json(replace(walk_info(walk_spec()), dropped_goal=goal).to_json())


@pytest.mark.parametrize("with_success", [True, False], ids=["infos", "reward"])
def test_antmaze_ends_at_its_first_success(walk_spec, with_success):
    env = make_env(walk_info(walk_spec(with_success=with_success)))
    steps = run(env, [1.0, 1.0])
    assert [s[1] for s in steps] == [0.0, 1.0]
    assert [s[2] for s in steps] == [False, True]
    observation = steps[1][0]
    assert observation.dtype == np.float32
    assert observation.tolist() == [2.0, 2.0, -2.0]
    assert env.observation_space.shape == (3,)
    assert env.observation_space.dtype == np.float32
    assert env.observation_space.contains(observation)


def test_antmaze_without_success_is_truncated_with_score_0(walk_spec):
    steps = run(make_env(walk_info(walk_spec())), [0.0] * 6)
    assert [s[1] for s in steps] == [0.0] * 6
    assert not any(s[2] for s in steps)
    assert [s[3] for s in steps] == [False] * 5 + [True]


def test_other_goal_environments_are_left_alone(walk_spec):
    info = walk_info(walk_spec(), dataset_id="some/walk-v0")
    steps = run(make_env(info), [1.0, 1.0])
    assert [s[1] for s in steps] == [0.25, 1.25]
    assert not any(s[2] for s in steps)


def test_a_minari_spec_makes_its_environment():
    spec = gymnasium.spec("Pendulum-v1")
    env = make_env(info_for(spec, max_action=2.0, state_dim=3, action_dim=1))
    plain = gymnasium.make("Pendulum-v1")
    a, b = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    assert a.dtype == np.float32
    assert a.tolist() == b.tolist()
    assert env.spec.max_episode_steps == 200
    old = json.loads(spec.to_json())
    old |= {"autoreset": False, "apply_api_compatibility": False}  # keys of EnvSpec before Gymnasium 1.0
    info = DatasetInfo("a/b-v0", json.dumps(old), None, None, 0, np.zeros(0), "box", 2.0)
    assert make_env(info).reset(seed=3)[0].tolist() == b.tolist()


def test_mujoco_observations_become_float32():
    for module in ("mujoco", "imageio"):  # Gymnasium's MuJoCo environments import both
        pytest.importorskip(module, reason='needs pip install "diffusion-ql[mujoco]"')
    env = make_env(info_for(gymnasium.spec("Hopper-v5"), state_dim=11, action_dim=3))
    observation = env.reset(seed=0)[0]
    plain = gymnasium.make("Hopper-v5").reset(seed=0)[0]
    assert plain.dtype == np.float64, "else this test tests nothing"
    assert observation.dtype == np.float32
    assert observation.tolist() == plain.astype(np.float32).tolist()
    named = DatasetInfo(
        "hopper_medium-v2.hdf5",
        json.dumps({"id": "Hopper-v5", "entry_point": None, "max_episode_steps": 1000, "kwargs": {}}),
        None, None, 0, np.zeros(0), "box", 1.0,
    )  # fmt: skip
    assert make_env(named).reset(seed=0)[0].tolist() == observation.tolist()


def test_environments_can_be_vectorised():
    info = info_for(gymnasium.spec("Pendulum-v1"), max_action=2.0)
    envs = gymnasium.vector.SyncVectorEnv([partial(make_env, info)] * 3)
    assert envs.reset(seed=0)[0].shape == (3, 3)
    assert envs.single_observation_space.dtype == np.float32


def test_one_rule_for_data_and_environments():
    space = spaces.Dict({"b": spaces.Box(-9, 9, (2, 2)), "a": spaces.Discrete(3), "c": spaces.MultiBinary(2)})
    rule = observation_rule(space)
    assert rule == "flatten"
    rows = [space.sample() for _ in range(4)]
    stacked = {key: np.stack([row[key] for row in rows]) for key in space.spaces}
    flat = flatten_rows(stacked, space, rule)
    assert flat.dtype == np.float32
    for row, expected in zip(rows, flat, strict=True):
        np.testing.assert_array_equal(flatten_observation(row, space, rule), expected)
        np.testing.assert_array_equal(spaces.flatten(space, row), expected)


@pytest.mark.parametrize("space", [spaces.Text(4), spaces.Dict({"x": spaces.Sequence(spaces.Discrete(2))})])
def test_spaces_without_a_row_are_refused(space):
    with pytest.raises(ValueError, match="no fixed row of numbers"):
        observation_rule(space)


def refused(info, *parts):
    with pytest.raises(DatasetError) as error:
        make_env(info)
    text = str(error.value)
    assert "\n" not in text
    for part in (info.dataset_id, *parts):
        assert part in text, f"{part!r} is not in: {text}"


def test_a_dataset_without_an_environment():
    refused(info_for(None), "names no environment", "env=")


def test_an_unknown_environment():
    spec = json.dumps({"id": "NoSuchThing-v3", "entry_point": None, "kwargs": {}})
    refused(
        DatasetInfo("a/b-v0", spec, None, None, 0, np.zeros(0), "box", 1.0),
        "NoSuchThing",
        "install the package",
    )


def test_an_environment_of_other_spaces():
    pendulum = gymnasium.spec("Pendulum-v1")
    refused(info_for(pendulum, max_action=2.0, state_dim=29), "3 observations", "29", "version")
    refused(info_for(pendulum, max_action=1.0), "[-1, 1]", "that recorded the data")
    refused(info_for(pendulum, max_action=2.0, rule="observation"), "'box'", "'observation'", "version")


def run_without(module, code):
    """Runs code in a fresh interpreter where `module` cannot be imported."""
    program = f"import sys; sys.modules[{module!r}] = None\n" + textwrap.dedent(code)
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout


MAKE = """
    import json, numpy as np, gymnasium
    from dql.datasets.info import DatasetError, DatasetInfo
    from dql.environments import make_env
    try:
        make_env(DatasetInfo("some/thing-v0", {spec}, None, None, 0, np.zeros(0), "box", 1.0))
    except DatasetError as error:
        print(error)
"""


def test_missing_mujoco_names_the_extra():
    out = run_without("mujoco", MAKE.format(spec='gymnasium.spec("Hopper-v5").to_json()'))
    assert "Hopper-v5" in out
    assert 'pip install "diffusion-ql[mujoco]"' in out
    assert out.count("\n") == 1


@pytest.mark.parametrize("entry_point", [None, "gymnasium_robotics.envs.franka_kitchen:KitchenEnv"])
def test_missing_gymnasium_robotics_is_named(entry_point):
    spec = json.dumps({"id": "FrankaKitchen-v1", "entry_point": entry_point, "kwargs": {}})
    out = run_without("gymnasium_robotics", MAKE.format(spec=repr(spec)))
    assert "FrankaKitchen-v1" in out
    assert "pip install gymnasium-robotics" in out
    assert out.count("\n") == 1
