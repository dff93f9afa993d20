"""TransitionDataset: what is read, masks, AntMaze, draws, reward tuning, description."""

import json
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from support import ROOT
from support.data_files import (
    FIELDS,
    OBSERVATIONS,
    A,
    S,
    assert_one_sentence,
    edit_metadata,
    episode,
    folder,
    make,
)

from dql import noise
from dql.data import (
    BLOCK_STEPS,
    Batch,
    DatasetError,
    DatasetInfo,
    describe,
    list_datasets,
    load_dataset,
)


def test_transitions_masks_and_info():
    buffers = [
        episode(4, "termination", seed=1),
        episode(3, "truncation", seed=2),
        episode(2, "nothing", seed=3),
    ]
    ds = load_dataset(make("some/thing-v0", buffers))
    assert (len(ds), ds.size, ds.state_dim, ds.action_dim, ds.max_action) == (9, 9, S, A, 1.0)
    assert all(getattr(ds, name).dtype == torch.float32 for name in FIELDS)
    # the true next observation, at the end of every episode too, and never the next episode's first
    expected_next = np.concatenate([b.observations[1:] for b in buffers]).astype(np.float32)
    np.testing.assert_array_equal(ds.next_states.numpy(), expected_next)
    expected = np.concatenate([b.observations[:-1] for b in buffers]).astype(np.float32)
    np.testing.assert_array_equal(ds.states.numpy(), expected)
    # only the termination masks; the truncation (row 6) and the open end (row 8) bootstrap
    assert ds.masks.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    info = ds.info
    np.testing.assert_allclose(info.episode_returns, [b.rewards.sum() for b in buffers[:2]], rtol=1e-15)
    assert info.episode_lengths.tolist() == [4, 3]
    assert info.num_episodes == 3
    assert info.num_truncations == 1
    assert (info.ref_min_score, info.ref_max_score, info.env_spec) == (-1.0, 9.0, None)
    assert info.normalized_score(4.0) == pytest.approx(50.0)
    assert "states [9, 3]" in repr(ds)
    assert "actions [9, 2]" in repr(ds)
    assert "some/thing-v0" in repr(ds)
    assert DatasetInfo.from_json(info.to_json()) == info


def test_info_remembers_the_environment():
    spec = gymnasium.spec("Pendulum-v1")
    box = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    actions = np.array([[2.0], [-1.5]], np.float32)
    make("dql/pendulum/mini-v0", [episode(2, actions=actions)], action_space=box, env=spec)
    ds = load_dataset("dql/pendulum/mini-v0")
    assert ds.info.env_id == "Pendulum-v1"
    assert ds.max_action == 2.0
    assert ds.actions.tolist() == actions.tolist()
    hopper = gymnasium.spec("Hopper-v5")
    edit_metadata("dql/pendulum/mini-v0", eval_env_spec=hopper.to_json())
    assert load_dataset("dql/pendulum/mini-v0").info.env_id == "Hopper-v5", "eval_env_spec comes first"


def test_box_of_any_shape_is_flattened_row_major():
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2, 2), np.float32)
    observations = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    ds = load_dataset(make("some/square-v0", [episode(2, observations=observations)], observation_space=space))
    assert ds.states.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ds.info.observation_rule == "box"


def test_other_dict_observations_follow_gymnasium_flatten():
    from gymnasium import spaces

    space = spaces.Dict(
        {
            "b": spaces.Box(-9, 9, (2,)),
            "a": spaces.Tuple([spaces.Discrete(3, start=1), spaces.Box(-9, 9, ())]),
        }
    )
    rows = [space.sample() for _ in range(3)]
    stacked = {
        "b": np.stack([r["b"] for r in rows]),
        "a": (np.array([r["a"][0] for r in rows]), np.array([r["a"][1] for r in rows])),
    }
    ds = load_dataset(make("some/dict-v0", [episode(2, observations=stacked)], observation_space=space))
    expected = np.stack([spaces.flatten(space, row) for row in rows])
    np.testing.assert_array_equal(ds.states.numpy(), expected[:2])
    np.testing.assert_array_equal(ds.next_states.numpy(), expected[1:])


# ---- AntMaze and kitchen -----------------------------------------------------------------------------------------

GOALS = gymnasium.spaces.Dict(
    {key: gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
     for key, size in (("achieved_goal", 2), ("desired_goal", 2), ("observation", 3))}
)  # fmt: skip


def ant_episode(length, rewards, *, seed=0, infos=None):
    rng = np.random.default_rng(seed)
    observations = {key: rng.normal(size=(length + 1, box.shape[0])) for key, box in GOALS.spaces.items()}
    return episode(length, rewards=np.array(rewards, float), observations=observations, infos=infos)


def test_antmaze_is_cut_at_the_first_success():
    first = ant_episode(6, [0, 0, 1, 1, 0, 1], seed=1)
    second = ant_episode(3, [0, 0, 0], seed=2)
    ds = load_dataset(make("D4RL/antmaze/umaze-v1", [first, second], observation_space=GOALS, refs=(0.0, 1.0)))
    assert ds.info.observation_rule == "achieved_goal+observation"
    assert ds.state_dim == 5
    assert ds.rewards.tolist() == [0, 0, 1, 0, 0, 0]
    assert ds.masks.tolist() == [1, 1, 0, 1, 1, 1], "a termination at the success, none without one"
    rows = np.concatenate([first.observations["achieved_goal"], first.observations["observation"]], axis=1)
    np.testing.assert_array_equal(ds.states[:3].numpy(), rows[:3].astype(np.float32))
    np.testing.assert_array_equal(ds.next_states[2].numpy(), rows[3].astype(np.float32))
    assert ds.info.episode_returns.tolist() == [1.0, 0.0]
    assert ds.info.episode_lengths.tolist() == [3, 3]
    assert ds.info.num_truncations == 1
    assert "first success" in ds.info.note


@pytest.mark.parametrize("rows", [5, 4], ids=["with the reset's info", "steps only"])
def test_antmaze_takes_success_from_infos_where_it_is_recorded(rows):
    success = np.zeros(rows, bool)
    success[rows - 3] = True  # after step 1
    buffer = ant_episode(4, [0.3, 0.4, 0.5, 0.6], infos={"success": success})  # a dense reward is no success
    ds = load_dataset(make("D4RL/antmaze/umaze-v1", [buffer], observation_space=GOALS))
    assert len(ds) == 2
    assert ds.masks.tolist() == [1, 0]


def test_other_goal_data_is_not_cut():
    ds = load_dataset(make("D4RL/pointmaze/umaze-v2", [ant_episode(4, [0, 1, 1, 0])], observation_space=GOALS))
    assert len(ds) == 4
    assert ds.masks.tolist() == [1, 1, 1, 1]
    assert ds.info.note == ""


def test_kitchen_keeps_the_observation_only():
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    nested = gymnasium.spaces.Dict({"kettle": box, "microwave": box})
    space = gymnasium.spaces.Dict({"achieved_goal": nested, "desired_goal": nested, "observation": OBSERVATIONS})
    goal = {"kettle": np.zeros((3, 1)), "microwave": np.ones((3, 1))}
    plain = np.arange(9.0).reshape(3, 3)
    buffer = episode(2, observations={"achieved_goal": goal, "desired_goal": goal, "observation": plain})
    ds = load_dataset(make("D4RL/kitchen/mixed-v2", [buffer], observation_space=space))
    assert ds.info.observation_rule == "observation"
    np.testing.assert_array_equal(ds.next_states.numpy(), plain[1:])


# ---- draws -------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_step_alone():
    make("some/thing-v0", [episode(50)])
    ds, fresh = load_dataset("some/thing-v0"), load_dataset("some/thing-v0")
    steps = [0, 1, BLOCK_STEPS - 1, BLOCK_STEPS, 5 * BLOCK_STEPS + 3]
    in_order = {step: ds.indices(8, 7, step).clone() for step in steps}
    fresh.indices(4, 1, 12)  # other sizes and seeds in between leave no trace
    for step in reversed(steps):
        fresh.indices(8, 8, step)
        assert torch.equal(fresh.indices(8, 7, step), in_order[step])
    rows = torch.stack(list(in_order.values()))
    assert len({tuple(row.tolist()) for row in rows}) == len(steps), "every step draws other rows"
    assert not torch.equal(ds.indices(8, 7, 0), ds.indices(8, 8, 0)), "every seed too"
    # the documented stream
    child = noise.derive(7, "data", 1)
    expected = noise.integers(child, 50, BLOCK_STEPS * 8).view(BLOCK_STEPS, 8)[0]
    assert torch.equal(in_order[BLOCK_STEPS], expected)


def test_a_batch_is_the_rows_of_its_indices():
    ds = load_dataset(make("some/thing-v0", [episode(30, "termination"), episode(20)]))
    batch, rows = ds.sample(16, 3, 5), ds.indices(16, 3, 5)
    assert isinstance(batch, Batch)
    assert len(batch) == 16
    assert "states [16, 3]" in repr(batch)
    for name in FIELDS:
        assert torch.equal(getattr(batch, name), getattr(ds, name)[rows]), name


def test_draws_are_uniform():
    ds = load_dataset(make("some/thing-v0", [episode(10)]))
    counts = torch.bincount(torch.cat([ds.indices(100, 0, step) for step in range(200)]), minlength=10)
    assert counts.sum() == 20000
    assert (counts - 2000).abs().max() < 5 * (20000 * 0.1 * 0.9) ** 0.5


def test_bad_draws_are_refused():
    ds = load_dataset(make("some/thing-v0", [episode(10)]))
    for arguments in ((0, 0, 0), (1, 0, -1), (1, -1, 0)):
        with pytest.raises(ValueError, match="must be"):
            ds.sample(*arguments)


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_reward_tunes():
    ends = [
        episode(3, "termination", rewards=np.array([1.0, 2.0, 3.0])),
        episode(2, rewards=np.array([-2.0, 0.0])),
    ]
    raw = load_dataset(make("some/thing-v0", ends))
    r = np.array([1.0, 2.0, 3.0, -2.0, 0.0])
    expected = {
        "none": r,
        "normalize": (r - 0.8) / np.sqrt(((r - 0.8) ** 2).sum() / 4),
        "iql_antmaze": r - 1,
        "iql_locomotion": 1000 * r / (6 - -2),  # the truncated episode counts: its return is -2
        "cql_antmaze": 4 * (r - 0.5),
        "antmaze": 2 * (r - 0.25),
    }
    for name, value in expected.items():
        tuned = load_dataset("some/thing-v0", reward_tune=name)
        np.testing.assert_allclose(tuned.rewards.numpy(), value, rtol=1e-6, err_msg=name)
        assert torch.equal(tuned.masks, raw.masks)
        assert tuned.reward_tune == name
        assert tuned.info == raw.info, "returns stay raw"
    assert raw.rewards.tolist() == r.tolist(), "the raw dataset is not changed"


def test_reward_tunes_that_cannot_be():
    flat = load_dataset(make("some/flat-v0", [episode(3, rewards=np.ones(3)), episode(3, rewards=np.ones(3))]))
    with pytest.raises(DatasetError) as error:
        flat.tune_rewards("normalise")
    assert_one_sentence(error, "'normalise'", "normalize", "cql_antmaze")
    with pytest.raises(DatasetError) as error:
        load_dataset("some/flat-v0", reward_tune="x")
    assert_one_sentence(error, "'x'", "normalize")
    for name in ("normalize", "iql_locomotion"):
        with pytest.raises(DatasetError) as error:
            flat.tune_rewards(name)
        assert_one_sentence(error, "some/flat-v0", "'none'")
    with pytest.raises(DatasetError) as error:
        flat.tune_rewards("antmaze").tune_rewards("antmaze")
    assert_one_sentence(error, "some/flat-v0", "already")


# ---- the list and the description --------------------------------------------------------------------------------


def test_list_datasets():
    assert list_datasets() == [], "no root yet"
    make("some/thing-v0", [episode(4), episode(3)], refs=(1.0, 2.0))
    make("dql/pendulum/mini-v0", [episode(2)], env=gymnasium.spec("Pendulum-v1"), refs=None)
    make("some/broken-v0", [episode(2)])
    (folder("some/broken-v0") / "data" / "metadata.json").unlink()
    pendulum, broken, thing = list_datasets()  # by id
    assert pendulum.dataset_id == "dql/pendulum/mini-v0"
    assert pendulum.problem is None
    assert (thing.dataset_id, thing.steps, thing.episodes, thing.env_id) == ("some/thing-v0", 7, 2, None)
    assert (thing.ref_min_score, thing.ref_max_score, thing.problem) == (1.0, 2.0, None)
    assert thing.size_mb > 0
    assert (pendulum.env_id, pendulum.ref_min_score) == ("Pendulum-v1", None)
    assert broken.dataset_id == "some/broken-v0"
    assert "minari download some/broken-v0" in broken.problem


def test_describe():
    ends = [
        episode(3, "termination", rewards=np.array([1.0, 2.0, 3.0])),
        episode(2, rewards=np.array([-2.0, 0.0])),
    ]
    figures = describe(load_dataset(make("some/thing-v0", ends)))
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["steps"], figures["episodes"], figures["terminations"], figures["truncations"]) == (
        5,
        2,
        1,
        1,
    )
    assert figures["episode_return"] == {"mean": 2.0, "std": 4.0, "min": -2.0, "max": 6.0}
    assert figures["normalized_score"]["mean"] == pytest.approx(30.0)
    assert figures["episode_length"] == {"mean": 2.5, "std": 0.5, "min": 2, "max": 3}
    assert figures["rewards"] == {"min": -2.0, "max": 3.0}
    assert len(figures["actions"]["min"]) == A
    assert len(figures["states"]["max"]) == S


def test_describe_without_complete_episodes():
    figures = describe(load_dataset(make("some/thing-v0", [episode(3, "nothing")], refs=None)))
    assert figures["episode_return"] is None
    assert figures["normalized_score"] is None


def test_importing_data_is_light():
    code = "import sys, dql.data; print([m for m in ('minari', 'gymnasium', 'h5py') if m in sys.modules])"
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
