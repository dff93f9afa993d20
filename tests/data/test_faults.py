"""Faults of data that would train without a word, and files that strangers wrote: the right value, or one sentence."""

import json
import os
import subprocess
import sys
import warnings

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from support.data_files import A, S, assert_one_sentence, d4rl_file, edit_metadata, episode, folder, make

from dql.collect import make_dataset
from dql.data import (
    DatasetError,
    DatasetNotFoundError,
    TransitionDataset,
    describe,
    list_datasets,
    load_dataset,
)
from dql.datasets.d4rl import recognise
from dql.datasets.info import DatasetInfo, is_antmaze
from dql.datasets.observations import flatten_observation


def box(*shape):
    return spaces.Box(-9, 9, shape, np.float64)


def refuse(dataset_id, *parts, **options):
    with pytest.raises(DatasetError) as error:
        load_dataset(str(dataset_id), **options)
    assert_one_sentence(error, *parts)


# One order of the members


SPACE = spaces.Dict(
    speed=box(1),
    angle=box(1),
    inner=spaces.Dict(z=box(2), a=spaces.Tuple([spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 2])])),
)
# as the environment has them: speed before angle, z before a
ROWS = [
    {"speed": [7.0], "angle": [1.0], "inner": {"z": [5.0, 6.0], "a": (2, [1, 0])}},
    {"speed": [8.0], "angle": [2.0], "inner": {"z": [3.0, 4.0], "a": (3, [0, 1])}},
]
WANT = [[1, 0, 1, 0, 0, 1, 1, 0, 5, 6, 7], [2, 0, 0, 1, 1, 0, 0, 1, 3, 4, 8]]


def stacked(rows):
    if isinstance(rows[0], dict):
        return {key: stacked([row[key] for row in rows]) for key in rows[0]}
    if isinstance(rows[0], tuple):
        return tuple(stacked([row[i] for row in rows]) for i in range(len(rows[0])))
    return np.array(rows)


@pytest.mark.parametrize("ordered", [False, True])
def test_members_have_one_order_in_data_and_environment(ordered):
    space = SPACE if not ordered else spaces.Dict(dict(reversed(SPACE.spaces.items())), sort_keys=False)
    make("some/mixed-v0", [episode(1, observations=stacked(ROWS))], observation_space=space)
    data = load_dataset("some/mixed-v0")
    assert data.states.tolist() + data.next_states.tolist() == WANT
    for row, want in zip(ROWS, WANT, strict=True):
        seen = {key: np.array(value) if isinstance(value, list) else value for key, value in row.items()}
        assert flatten_observation(seen, space, data.info.observation_rule).tolist() == want
    assert data.info.observation_layout == (
        "{angle: [1], inner: {a: (one of 1 to 3, each one of [2, 2] from [0, 0]), z: [2]}, speed: [1]}"
    )


# Goals


GOALS = spaces.Dict(achieved_goal=box(2), desired_goal=box(2), observation=box(1))


def goal_episode(goal, seed=0):
    rng = np.random.default_rng(seed)
    observations = {
        "achieved_goal": rng.normal(size=(4, 2)),
        "desired_goal": np.broadcast_to(np.array(goal, float), (4, 2)),
        "observation": rng.normal(size=(4, 1)),
    }
    return episode(3, observations=observations, rewards=np.zeros(3))


@pytest.mark.parametrize("goals", [[(1, 2), (1, 2)], [(1, 2), (1, 3)]], ids=["constant", "varies"])
@pytest.mark.parametrize("name", ["some/pointmaze-v0", "some/antmaze-v0"])
def test_a_goal_that_varies_is_kept_or_said_to_be_dropped(goals, name):
    make(name, [goal_episode(goal, i) for i, goal in enumerate(goals)], observation_space=GOALS)
    data, varies, antmaze = load_dataset(name), goals[0] != goals[1], "antmaze" in name
    if varies and not antmaze:
        assert data.info.observation_rule == "achieved_goal+desired_goal+observation"
        assert data.states[:, 2:4].tolist() == [[1, 2]] * 3 + [[1, 3]] * 3
        assert data.info.observation_layout == "{achieved_goal: [2], desired_goal: [2], observation: [1]}"
    else:
        assert data.info.observation_rule == "achieved_goal+observation"
        assert data.state_dim == 3
        assert data.info.observation_layout == "{achieved_goal: [2], observation: [1]}"
    assert ("desired_goal differs" in data.info.note) == (varies and antmaze)


def test_a_nested_goal_that_varies():
    goals = spaces.Dict(kettle=box(1), burner=box(1))
    space = spaces.Dict(achieved_goal=goals, desired_goal=goals, observation=box(1))

    def of(kettle):
        goal = {"kettle": np.full((4, 1), kettle), "burner": np.full((4, 1), 7.0)}
        return episode(3, observations={"achieved_goal": goal, "desired_goal": goal, "observation": np.zeros((4, 1))})

    make("some/kitchen-v0", [of(1.0), of(1.0)], observation_space=space)
    assert load_dataset("some/kitchen-v0").states.tolist() == [[0.0]] * 6
    make("some/kitchen-v1", [of(1.0), of(2.0)], observation_space=space)
    assert load_dataset("some/kitchen-v1").states.tolist() == [[7.0, 1.0, 0.0]] * 3 + [[7.0, 2.0, 0.0]] * 3


@pytest.mark.parametrize("goals", [[(1, 1), (1, 1)], [(1, 1), (2, 2)], [(1, 1), (2, 2), (3, 3)]])
def test_joined_goals(goals):
    """Each dataset has one goal, and they have several: without them its rows would not tell the tasks apart."""
    for i, goal in enumerate(goals[:2]):
        more = [goal_episode(goals[2], 7)] if i and len(goals) > 2 else []
        make(f"some/goal{i}-v0", [goal_episode(goal, i), *more], observation_space=GOALS)
    data = load_dataset("some/goal0-v0+some/goal1-v0")
    if goals[0] == goals[1]:
        assert data.state_dim == 3
    else:
        assert data.info.observation_rule == "achieved_goal+desired_goal+observation"
        assert data.info.observation_layout == "{achieved_goal: [2], desired_goal: [2], observation: [1]}"
        assert data.states[:, 2:4].tolist() == [[*goal] for goal in goals for _ in range(3)]
        assert data.next_states[:3, 2:4].tolist() == [[1, 1]] * 3
        assert (data.info.state_dim, data.info.dropped_goal) == (5, None)


def test_discrete_goals_are_kept():
    space = spaces.Dict(achieved_goal=spaces.Discrete(3), desired_goal=spaces.Discrete(3), observation=box(1))
    rows = {"achieved_goal": np.array([0, 1, 2, 0]), "desired_goal": np.full(4, 2), "observation": np.zeros((4, 1))}
    make("some/discrete-v0", [episode(3, observations=rows)], observation_space=space)
    assert load_dataset("some/discrete-v0").states.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_other_records_of_one_environment_are_not_joined():
    made = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    for i, changes in enumerate([{}, {"reward_threshold": 3.0}, {"kwargs": {"g": 1.0}}, {"max_episode_steps": 7}]):
        make(f"some/join{i}-v0", [episode(3, seed=i)])
        edit_metadata(f"some/join{i}-v0", env_spec=json.dumps(made | changes))
    assert len(load_dataset("some/join0-v0+some/join1-v0")) == 6
    for i in (2, 3):
        refuse(f"some/join0-v0+some/join{i}-v0", "cannot be joined", "Pendulum-v1", "other arguments")


def test_dense_rewards_are_no_successes():
    make("some/antmaze-dense-v0", [episode(3, rewards=np.array([0.1, 0.2, 0.9]))])
    refuse("some/antmaze-dense-v0", "episode 0", "infos/success", "not 0 and 1")
    make("some/antmaze-sparse-v0", [episode(3, rewards=np.array([0.0, 1.0, 1.0]))])
    assert len(load_dataset("some/antmaze-sparse-v0")) == 2


def test_a_folder_is_no_name(tmp_path):
    for name in ("a", "b"):
        make(f"some/{name}-v0", [episode(3)])
        (tmp_path / "antmaze").mkdir(exist_ok=True)
        folder(f"some/{name}-v0").rename(tmp_path / "antmaze" / name)
    path = tmp_path / "antmaze"
    assert not load_dataset(path / "a").info.is_antmaze
    joined = load_dataset(f"{path / 'a'}+{path / 'b'}").info
    assert not joined.is_antmaze
    assert "antmaze" in joined.dataset_id
    text = joined.to_json()
    assert not DatasetInfo.from_json(text).is_antmaze


def test_clipped_rewards_are_named_where_the_evaluation_is_plain():
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    clip = {"name": "ClipReward", "entry_point": "gymnasium.wrappers.transform_reward:ClipReward", "kwargs": {}}
    make("some/plain-v0", [episode(3)])
    recorded = json.dumps(spec | {"additional_wrappers": [clip]})
    edit_metadata("some/plain-v0", env_spec=recorded, eval_env_spec=json.dumps(spec))
    assert "ClipReward" in load_dataset("some/plain-v0").info.note


def test_episodes_of_a_d4rl_file_end_where_its_rows_break(tmp_path):
    path = tmp_path / "mine.hdf5"
    observations = np.arange(30, dtype=np.float32)[:, None] + 100.0 * (np.arange(30) // 10)[:, None]
    arrays = {"observations": observations, "next_observations": observations + 1, "actions": np.zeros((30, 1))}
    d4rl_file(path, N=30, terminals=[29], **{**arrays, "rewards": np.ones(30)})
    info = load_dataset(path).info
    assert (info.num_episodes, info.episode_returns.tolist(), info.num_truncations) == (3, [10.0] * 3, 2)


def test_a_fault_of_the_disk_drops_nothing(monkeypatch):
    from dql.datasets import minari as reader

    def fails(*arguments):
        raise OSError(5, "Input/output error")

    make("some/disk-v0", [episode(3), episode(3)])
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_array", fails)
        refuse("some/disk-v0", "Input/output error", drop_broken=True)
    assert load_dataset("some/disk-v0", drop_broken=True).info.note == ""


def test_only_its_own_file_stands_for_a_minari_folder(tmp_path):
    make("some/mixed-v0", [episode(3)])
    other = folder("some/mixed-v0") / "data" / "hopper_medium-v2.hdf5"
    d4rl_file(other, timeouts=[3])
    assert load_dataset(other).info.dataset_id == "hopper_medium-v2.hdf5"
    assert load_dataset(other.with_name("main_data.hdf5")).info.dataset_id == "some/mixed-v0"
    for name in ("some/mixed-v0+", "+some/mixed-v0", "some/mixed-v0++some/mixed-v0"):
        refuse(name, "a name is missing beside a +")


@pytest.mark.parametrize("name", ["\x1b]0;title\x07red", "\ud800", "a\nb"])
def test_names_that_a_terminal_would_obey(name, dql_here):
    make("some/odd-v0", [episode(3)])
    edit_metadata("some/odd-v0", dataset_id=name, env_spec=json.dumps({"id": name}))
    for done in (dql_here("data", "list"), dql_here("data", "info", folder("some/odd-v0"))):
        assert done.code == 0
        assert not {"\x1b", "\x07", "\ud800"} & set(done.out + done.err)
    assert load_dataset("some/odd-v0").info.env_spec is None


# Names


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("D4RL/antmaze/umaze-v1", True),
        ("Ant_maze_u-maze_noisy.hdf5", True),
        ("antmaze-large-play-v0", True),
        ("AntMaze_UMaze-v4", True),
        ("some/giant-maze-v0", False),
        ("giantmaze-v0", False),
        ("elephant_maze", False),
        ("antmazes", False),
    ],
)
def test_antmaze_is_a_word(name, found):
    assert is_antmaze(name, None) == is_antmaze("some/thing-v0", name) == found


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("hopper_medium-v2.hdf5", "Hopper-v5"),
        ("my-hopper.hdf5", "Hopper-v5"),
        ("grasshopper.hdf5", None),
        ("hoppers.hdf5", None),
        ("hopper2.hdf5", None),
        ("walker2d_expert-v2.hdf5", "Walker2d-v5"),
        ("skywalker2d.hdf5", None),
        ("halfcheetah_random-v2.hdf5", "HalfCheetah-v5"),
        ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", "AntMaze_Large-v4"),
        ("Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", "AntMaze_Medium-v4"),
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5", "AntMaze_UMaze-v4"),
        ("giant_maze_umaze.hdf5", None),
        ("pen-human-v1.hdf5", "AdroitHandPen-v1"),
        ("pencil.hdf5", None),
    ],
)
def test_a_file_is_evaluated_in_its_own_environment(name, env_id):
    task = recognise(name)
    assert (None if task is None else task.env_id) == env_id


# Datasets in memory


def tensors(N=6, **changes):
    rng = torch.Generator().manual_seed(0)
    made = {
        "states": torch.randn(N, S, generator=rng),
        "actions": torch.rand(N, A, generator=rng) * 2 - 1,
        "rewards": torch.randn(N, generator=rng),
        "next_states": torch.randn(N, S, generator=rng),
        "masks": torch.ones(N),
    }
    return {**made, **changes}


def in_memory(info=None, **changes):
    info = info or DatasetInfo("mine", None, None, None, 1, np.zeros(0), "box", 1.0)
    return TransitionDataset(**tensors(**changes), info=info)


def with_(name, row, value):
    changed = tensors()[name].clone()
    changed[row] = value
    return {name: changed}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (with_("actions", 2, 100.0), ("row 2", "size 100", "rescale or clip")),
        (with_("actions", 2, -1.0001), ("row 2", "[-1, 1]")),
        (with_("masks", 4, 2.0), ("row 4", "0 or 1, got 2")),
        (with_("masks", 4, 0.5), ("row 4", "0 or 1")),
        (with_("masks", 4, torch.nan), ("row 4", "masks")),
        *[(with_(name, 3, v), ("row 3", f"{name} hold NaN")) for name in ("states", "rewards", "next_states", "actions")
          for v in (torch.nan, torch.inf, -torch.inf)],
    ],
)  # fmt: skip
def test_a_dataset_in_memory_is_looked_at(changes, parts):
    with pytest.raises(DatasetError) as error:
        in_memory(**changes)
    assert_one_sentence(error, "mine", *parts)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_of_actions_that_is_none(bound):
    with pytest.raises(DatasetError, match="max_action"):
        in_memory(DatasetInfo("mine", None, None, None, 1, np.zeros(0), "box", bound))


def test_what_is_no_info_and_no_memory_is_refused():
    with pytest.raises(TypeError, match="info must be a DatasetInfo, got None"):
        TransitionDataset(**tensors(), info=None)
    with pytest.raises(TypeError, match="meta device"):
        in_memory(rewards=torch.zeros(6, device="meta"))
    with pytest.raises(DatasetError, match="its info says"):
        in_memory(DatasetInfo("mine", None, None, None, 1, np.zeros(0), "box", 1.0, state_dim=9))
    with pytest.raises(ValueError, match="device 'nope' cannot be used"):
        in_memory().to("nope")
    with pytest.raises(TypeError, match="named by a string or a path"):
        load_dataset(b"some/thing-v0")


def test_arrays_and_empty_rows_are_refused():
    with pytest.raises(TypeError, match=r"masks must be a float32 tensor, got ndarray; use torch.as_tensor"):
        in_memory(masks=np.ones(6, np.float32))
    with pytest.raises(ValueError, match="a dimension at least"):
        in_memory(states=torch.zeros(6, 0), next_states=torch.zeros(6, 0))
    with pytest.raises(ValueError, match="a dimension at least"):
        in_memory(actions=torch.zeros(6, 0))


def test_what_a_mask_hides_is_zero():
    states = with_("next_states", 1, torch.nan)["next_states"]
    masks = with_("masks", 1, 0.0)["masks"]
    data = in_memory(next_states=states, masks=masks)
    assert data.next_states[1].tolist() == [0.0] * S
    assert states[1].isnan().all()  # the caller's is as it was
    assert torch.equal(data.next_states[2:], states[2:])
    last = np.random.default_rng(1).normal(size=(4, S))
    last[3, 1] = np.nan
    make("some/end-v0", [episode(3, "termination", observations=last), episode(3)])
    data = load_dataset("some/end-v0")
    assert data.next_states[2].tolist() == np.where(np.isnan(last[3]), 0, last[3]).astype(np.float32).tolist()


def test_rounding_is_clipped_in_a_copy():
    actions = with_("actions", 0, 1.000005)["actions"]
    assert in_memory(actions=actions).actions[0].tolist() == [1.0, 1.0]
    assert actions[0, 0] > 1


# Episodes that were cut


def test_make_and_info_agree(monkeypatch):
    """An episode cut by --steps is no complete one: its return moves the worst, and with it iql_locomotion."""
    made = make_dataset("pendulum-mixed", steps=450, seed=3, progress=False)
    data = load_dataset(made.dataset_id)
    assert (made.episodes, data.info.num_episodes, len(data.info.episode_returns)) == (3, 3, 2)
    facts = describe(data)["episode_return"]
    assert (facts["min"], facts["max"]) == pytest.approx((made.return_min, made.return_max), rel=1e-6)
    assert data.info.num_truncations == 3
    # one that was made before `cut` was written down
    with h5py.File(folder(made.dataset_id) / "data" / "main_data.hdf5", "a") as file:
        for group in file.values():
            group.attrs.pop("cut")
    again = load_dataset(made.dataset_id, cache=False)
    assert again.info.episode_returns.tolist() == data.info.episode_returns.tolist()


# Episodes that cannot be used


def test_broken_episodes_can_be_left_out():
    bad = np.zeros((4, S))
    bad[1] = np.inf
    episodes = [
        episode(3, seed=1),
        episode(3, observations=np.zeros((3, S))),  # its last observation is missing
        episode(3, observations=bad),
        episode(3, actions=np.full((3, A), 7.0, np.float32)),
        episode(3, seed=2),
    ]
    make("some/broken-v0", episodes)
    refuse("some/broken-v0", "episode 1", "4", "drop_broken", "--drop-broken")
    data = load_dataset("some/broken-v0", drop_broken=True)
    assert (data.info.num_episodes, len(data)) == (2, 6)
    assert data.info.note == "left out for what they lack or hold: episodes 1, 2, 3"
    want = np.concatenate([episodes[0].rewards, episodes[4].rewards]).astype(np.float32)
    assert data.rewards.tolist() == want.tolist()
    refuse("some/broken-v0", "episode 1")  # what was cached is of another kind
    make("some/broken-v1", episodes[1:4])
    refuse("some/broken-v1", "none of its 3 episodes", drop_broken=True)


def test_a_run_leaves_them_out_too(dql_here, tmp_path, tiny):
    make("some/broken-v0", [episode(20), episode(3, observations=np.zeros((3, S))), episode(20)])
    flags = ["--dataset", "some/broken-v0", "--num-updates", "3", "--eval-every", "0", "--run-dir", tmp_path / "run"]
    dql_here("train", *flags, *tiny).refused("episode 1", "--drop-broken")
    dql_here("data", "info", "some/broken-v0").refused("--drop-broken")
    assert "episodes 1" in dql_here("data", "info", "some/broken-v0", "--drop-broken").out
    assert dql_here("train", *flags, *tiny, "--drop-broken").code == 0
    assert dql_here("train", "--resume", tmp_path / "run", "--num-updates", "5").code == 0


# Files of strangers


def edited(dataset_id="some/hostile-v0", **options):
    make(dataset_id, [episode(3), episode(3)], **options)
    return h5py.File(folder(dataset_id) / "data" / "main_data.hdf5", "a")


def replace(file, name, **options):
    del file[name]
    return file.create_dataset(name, **options)


def complex_values(file):
    replace(file, "episode_1/rewards", data=np.ones(3, complex))


def texts(file):
    replace(file, "episode_1/rewards", data=["a", "b", "c"], dtype=h5py.string_dtype())


def references(file):
    replace(file, "episode_1/rewards", data=[file["episode_0"].ref] * 3, dtype=h5py.ref_dtype)


def compound(file):
    replace(file, "episode_1/rewards", data=np.zeros(3, [("a", "f4"), ("b", "f4")]))


def claimed(file):
    replace(file, "episode_1/rewards", shape=(10**13,), dtype="f8", chunks=(1024,))


def scalar(file):
    replace(file, "episode_1/rewards", data=1.0)


def half(file):
    replace(file, "episode_1/terminations", data=[0.0, 0.5, 1.0])


def group(file):
    del file["episode_1/rewards"]
    file.create_group("episode_1/rewards")


def array(file):
    del file["episode_1"]
    file["episode_1"] = np.zeros(3)


def soft(file):
    del file["episode_1/rewards"]
    file["episode_1/rewards"] = h5py.SoftLink("/episode_0/rewards")


def dangling(file):
    del file["episode_1/rewards"]
    file["episode_1/rewards"] = h5py.SoftLink("/nowhere")


def external_link(file):
    del file["episode_1/rewards"]
    file["episode_1/rewards"] = h5py.ExternalLink("/etc/hostname", "/")


def external_storage(file):
    del file["episode_1/rewards"]
    file.create_dataset("episode_1/rewards", shape=(3,), dtype="f8", external=[("/etc/passwd", 0, 24)])


def virtual(file):
    del file["episode_1/rewards"]
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (3,))
    file.create_virtual_dataset("episode_1/rewards", layout)


def empty(file):
    replace(file, "episode_1/rewards", data=h5py.Empty("f4"))


@pytest.mark.parametrize(
    "damage",
    [complex_values, texts, references, compound, claimed, scalar, half, group, array, soft, dangling, external_link,
     external_storage, virtual, empty],
)  # fmt: skip
def test_minari_files_of_strangers(damage):
    with edited() as file:
        damage(file)
    refuse("some/hostile-v0", "some/hostile-v0", "episode 1")


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
def test_pipes_are_not_waited_for(name, tmp_path):
    """Nor in the cache, which is written anew."""
    make("some/pipe-v0", [episode(3)])
    load_dataset("some/pipe-v0")
    entries = list((tmp_path / "cache").rglob("*.safetensors"))
    for entry in entries:
        entry.unlink()
        os.mkfifo(entry)
    assert len(load_dataset("some/pipe-v0")) == 3
    assert entries
    assert all(entry.is_file() for entry in entries)
    file = folder("some/pipe-v0") / "data" / name
    file.unlink()
    os.mkfifo(file)
    refuse("some/pipe-v0", name, "no regular file")


def test_groups_that_hold_themselves():
    space = spaces.Dict(a=box(1))
    rows = {"a": np.zeros((4, 1))}
    make("some/loop-v0", [episode(3, observations=rows), episode(3, observations=rows)], observation_space=space)
    with h5py.File(folder("some/loop-v0") / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/observations/again"] = file["episode_1/observations"]
        chain = file.create_group("deep")
        for _ in range(40):  # every path through it: 2^40 of them
            chain["a"] = chain["b"] = file.create_group(f"g{len(file)}")
            chain = chain["a"]
        file["episode_1/observations/deep"] = file["deep"]
    assert len(load_dataset("some/loop-v0")) == 6  # only what the space names is looked at


def test_an_episode_under_many_names():
    make("some/many-v0", [episode(3), episode(3)])
    with h5py.File(folder("some/many-v0") / "data" / "main_data.hdf5", "a") as file:
        file["episode_2"] = file["episode_0"]
    edit_metadata("some/many-v0", total_episodes=3)
    refuse("some/many-v0", "episode 2", "is episode 0 under another name")
    edit_metadata("some/many-v0", total_episodes=10**15)
    refuse("some/many-v0", "1,000,000,000,000,000 episodes", "holds 3", drop_broken=True)


def test_names_with_a_slash():
    """HDF5 makes groups of them."""
    space = spaces.Dict({"robot/pos": box(2), "robot/vel": box(1)})
    rows = {"robot/pos": np.ones((4, 2)), "robot/vel": np.full((4, 1), 2.0)}
    make("some/slash-v0", [episode(3, observations=rows)], observation_space=space)
    assert load_dataset("some/slash-v0").states.tolist() == [[1, 1, 2]] * 3


@pytest.mark.parametrize("damage", [complex_values, texts, claimed, scalar, group, soft, external_link, virtual, empty])
def test_d4rl_files_of_strangers(tmp_path, damage):
    path = tmp_path / "hopper_medium-v2.hdf5"
    arrays = d4rl_file(path, timeouts=[3])
    with h5py.File(path, "a") as file:
        file.create_group("episode_0")
        file["episode_1/rewards"] = arrays["rewards"][:3]
        damage(file)
        file.move("episode_1/rewards", "new")
        del file["rewards"]
        file.move("new", "rewards")
    refuse(path, "hopper_medium-v2.hdf5", "rewards")


def test_d4rl_flags_and_widths(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    d4rl_file(path, timeouts=[3])
    with h5py.File(path, "a") as file:
        replace(file, "terminals", data=np.full(10, 0.5))
    refuse(path, "terminals hold other values than 0 and 1")
    for name in ("observations", "actions"):
        d4rl_file(path, timeouts=[3], **{name: np.zeros((10, 0))})
        refuse(path, name, "(10, 0)")
    d4rl_file(path, timeouts=[3], rewards=np.zeros((10, 2)))
    refuse(path, "rewards", "(10, 2)")


SPACE_JSON = {"type": "Box", "dtype": "float32", "shape": [3], "low": [-1.0] * 3, "high": [1.0] * 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"total_episodes": "two"},
        {"total_episodes": -1},
        {"total_episodes": 1.5},
        {"total_episodes": 10**12},
        {"total_episodes": None},
        {"observation_space": None},
        {"observation_space": 7},
        {"observation_space": "{"},
        {"observation_space": {"type": "Box"}},
        {"observation_space": {"type": "Nothing"}},
        {"observation_space": SPACE_JSON | {"shape": [10**6, 10**6], "low": -1, "high": 1}},
        {"observation_space": SPACE_JSON | {"shape": [-1]}},
        {"observation_space": SPACE_JSON | {"shape": "big"}},
        {"observation_space": SPACE_JSON | {"dtype": "object"}},
        {"observation_space": {"type": "Discrete", "n": 10**12, "start": 0}},
        {"observation_space": {"type": "MultiDiscrete", "dtype": "int64", "nvec": [10**9], "start": [0]}},
        {"observation_space": {"type": "MultiDiscrete", "dtype": "int64", "nvec": [[10**9]], "start": [[0]]}},
        {"observation_space": {"type": "Tuple", "subspaces": 7}},
        {"action_space": SPACE_JSON | {"shape": [0], "low": [], "high": []}},
        {"data_format": "nothing"},
        {"data_format": 7},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_metadata_of_strangers(changes):
    make("some/hostile-v0", [episode(3), episode(3)])
    edit_metadata("some/hostile-v0", **changes)
    refuse("some/hostile-v0", "some/hostile-v0")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", "", "\0"])
def test_metadata_that_is_none(text):
    make("some/hostile-v0", [episode(3)])
    (folder("some/hostile-v0") / "data" / "metadata.json").write_text(text)
    refuse("some/hostile-v0", "metadata")


@pytest.mark.parametrize("spec", [7, "7", "[]", '{"id": 7}', "[" * 100_000, {"id": "Pendulum-v1"}])
@pytest.mark.parametrize("score", ["high", None, [1], "nan", 1e400])
def test_fields_that_say_nothing_cost_only_themselves(spec, score):
    make("some/odd-v0", [episode(3), episode(3)])
    edit_metadata("some/odd-v0", env_spec=spec, ref_max_score=score)
    data = load_dataset("some/odd-v0")
    assert (data.info.env_spec, data.info.ref_min_score, data.info.ref_max_score) == (None, None, None)


def test_one_broken_dataset_costs_the_list_one_line():
    for name in ("some/a-v0", "some/b-v0", "some/c-v0"):
        make(name, [episode(3)])
    edit_metadata("some/a-v0", total_steps="many")
    (folder("some/b-v0") / "data" / "metadata.json").write_text("[" * 100_000)
    problems = {d.dataset_id: d.problem for d in list_datasets()}
    assert [name for name, problem in problems.items() if problem is None] == ["some/c-v0"]


def test_other_kinds_of_file_and_of_name(tmp_path):
    np.savez(tmp_path / "mine.npz", a=np.zeros(3))
    refuse(tmp_path / "mine.npz", "TransitionDataset")
    make("some/path-v0", [episode(3)])
    assert len(load_dataset(folder("some/path-v0"))) == 3  # a Path, as well
    for name in ("", "\0", "x" * 5000):
        with pytest.raises(DatasetNotFoundError):
            load_dataset(name)


def test_without_a_home_folder(tmp_path):
    """As in a container whose user has no entry and no HOME: what is named by variables or by its path still works."""
    path = tmp_path / "hopper_medium-v2.hdf5"
    d4rl_file(path, timeouts=[3])
    code = (
        "import os, pathlib, dql\n"
        "def none(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = none\n"
        f"print(len(dql.load_dataset({str(path)!r})))\n"
        "try: dql.load_dataset('some/thing-v0')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "DQL_CACHE", "MINARI_DATASETS_PATH")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "8",
        "this user has no home folder (HOME is not set): set HOME, or MINARI_DATASETS_PATH",
    ], done.stderr


def test_rewards_that_a_wrapper_changed_are_named():
    env = gymnasium.wrappers.ClipReward(gymnasium.make("Pendulum-v1"), -1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        episodes = [episode(3, actions=np.zeros((3, 1), np.float32))]
        minari.create_dataset_from_buffers("some/clipped-v0", episodes, env=env)
    note = load_dataset("some/clipped-v0").info.note
    assert note == "its rewards were changed by ClipReward; evaluations score the environment's own reward"


def test_wrappers_that_evaluations_lack_are_named():
    """Data recorded through NormalizeObservation, evaluated in the bare environment that it names for that."""
    bare = gymnasium.make("Pendulum-v1")
    env = gymnasium.wrappers.NormalizeObservation(gymnasium.wrappers.RescaleAction(bare, -1, 1))
    episodes = [episode(3, observations=np.zeros((4, 3), np.float32), actions=np.zeros((3, 1), np.float32))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("some/seen-v0", episodes, env=env, eval_env="Pendulum-v1")
        minari.create_dataset_from_buffers("some/plain-v0", episodes, env=bare, eval_env="Pendulum-v1")
    assert load_dataset("some/seen-v0").info.note == (
        "it was recorded through NormalizeObservation and RescaleAction, which its environment for evaluations lacks: "
        "there a policy sees or does something else than in the data"
    )
    assert load_dataset("some/plain-v0").info.note == ""


def test_a_d4rl_antmaze_file_is_evaluated(tmp_path):
    """Its rows are [achieved_goal, observation], as today's environment shows them by the goal rule."""
    path = tmp_path / "antmaze-umaze-v0.hdf5"
    d4rl_file(path, timeouts=[3], observations=np.zeros((10, 29)), actions=np.zeros((10, 8)))
    info = load_dataset(path).info
    assert info.observation_rule == "achieved_goal+observation"
    pytest.importorskip("gymnasium_robotics", reason="its environments make AntMaze")
    from dql.environments import make_env

    assert make_env(info).reset(seed=0)[0].shape == (29,)
