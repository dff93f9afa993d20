"""What cannot be used is refused by one sentence with the dataset, the episode or file, and the remedy."""

import gymnasium
import h5py
import numpy as np
import pytest
from support.data_files import A, S, assert_one_sentence, cut_file, d4rl_file, episode, folder, make

from dql.data import (
    DatasetError,
    DatasetNotFoundError,
    load_dataset,
)


def with_value(name, value):
    buffer = episode(4, seed=5)
    array = np.array(getattr(buffer, name))
    array[2] = value
    return episode(4, seed=5, **{name: array})


@pytest.mark.parametrize("name", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_name_the_episode(name, value):
    make("some/bad-v0", [episode(3), with_value(name, value), episode(2)])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "episode 1", "NaN", "repair")


def test_a_bad_last_observation_is_found():
    observations = np.zeros((4, S))
    observations[3] = np.nan  # seen only as a next state
    make("some/bad-v0", [episode(3), episode(3, observations=observations)])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "episode 1", "next_states")


def test_numbers_too_large_for_float32_are_found():
    make("some/bad-v0", [with_value("observations", 1e39)])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "episode 0", "float32")


@pytest.mark.parametrize(
    ("name", "size"),
    [("actions", (3, A)), ("terminations", (5,)), ("truncations", (3,)), ("observations", (4, S))],
)
def test_mismatched_lengths_name_the_episode(name, size):
    make("some/bad-v0", [episode(3), episode(4, **{name: np.zeros(size, np.float32)})])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "episode 1", name, size[0], "record")


def test_wrong_widths_name_the_episode():
    make("some/bad-v0", [episode(3), episode(3, observations=np.zeros((4, 2)))])
    make("some/bad-v1", [episode(3), episode(3, actions=np.zeros((3, 1), np.float32))])
    for dataset_id in ("some/bad-v0", "some/bad-v1"):
        with pytest.raises(DatasetError) as error:
            load_dataset(dataset_id)
        assert_one_sentence(error, dataset_id, "episode 1", "where the space says", "record")


def test_actions_outside_the_bounds():
    make("some/bad-v0", [episode(3), with_value("actions", [0.5, -1.75])])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "episode 1", "1.75", "[-1, 1]", "rescale or clip")


def test_actions_outside_by_rounding_are_clipped():
    ds = load_dataset(make("some/near-v0", [with_value("actions", [0.5, -1.000005])]))
    assert ds.actions[2].tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("low", "high"),
    [([-1, -1], [2, 2]), ([-1, -2], [1, 2]), ([-np.inf, -np.inf], [np.inf, np.inf]), ([0, 0], [1, 1])],
    ids=["asymmetric", "non-uniform", "unbounded", "one-sided"],
)
def test_action_bounds_that_are_not_one_number(low, high):
    box = gymnasium.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    make("some/bad-v0", [episode(3)], action_space=box)
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "gymnasium.wrappers.RescaleAction")


def test_discrete_actions():
    make("some/bad-v0", [episode(3, actions=np.array([0, 1, 1]))], action_space=gymnasium.spaces.Discrete(2))
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "Discrete", "continuous")


def test_image_observations():
    space = gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    make("some/bad-v0", [episode(2, observations=images)], observation_space=space)
    with pytest.raises(DatasetError) as error:
        load_dataset("some/bad-v0")
    assert_one_sentence(error, "some/bad-v0", "images")


def test_missing_datasets_say_how_to_get_them():
    make("mujoco/hopper/medium-v0", [episode(3)])
    cases = {
        "dql/hopper/medium-v0": ["`dql data make dql/hopper/medium-v0`"],
        "mujoco/hopper/simple-v0": ["`minari download mujoco/hopper/simple-v0`", "download=True"],
        "mujoco/hoper/medium-v0": ["near to it", "mujoco/hopper/medium-v0"],
        "mujoco/hopper/medium-expert-v0": ["`minari download mujoco/hopper/expert-v0`"],
        "nowhere/at-all.hdf5": ["nowhere/at-all.hdf5", "check the path"],
        "not an id": ["no such file", "dql data list"],
    }
    for name, parts in cases.items():
        with pytest.raises(DatasetNotFoundError) as error:
            load_dataset(name)
        assert_one_sentence(error, name, *parts)
        assert isinstance(error.value, FileNotFoundError)
        assert isinstance(error.value, ValueError)


def test_an_empty_folder_is_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetNotFoundError) as error:
        load_dataset(str(tmp_path / "empty"))
    assert_one_sentence(error, "empty", "main_data.hdf5", "above `data`")


@pytest.mark.parametrize(
    "damage", ["cut short", "no main file", "no metadata", "metadata cut", "episode missing", "array missing"]
)
@pytest.mark.parametrize("namespace", ["mujoco", "dql"])
def test_half_downloaded_datasets(damage, namespace):
    dataset_id = make(f"{namespace}/hopper/medium-v0", [episode(50), episode(60)])
    data = folder(dataset_id) / "data"
    if damage == "cut short":
        cut_file(data / "main_data.hdf5")
    elif damage == "no main file":
        (data / "main_data.hdf5").unlink()
    elif damage == "no metadata":
        (data / "metadata.json").unlink()
    elif damage == "metadata cut":
        cut_file(data / "metadata.json")
    else:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_1" if damage == "episode missing" else "episode_1/rewards"]
    with pytest.raises(DatasetError) as error:
        load_dataset(dataset_id)
    command = f"dql data make {dataset_id}" if namespace == "dql" else f"minari download {dataset_id}"
    assert_one_sentence(error, dataset_id, "remove", folder(dataset_id), command)
    if "missing" in damage:
        assert_one_sentence(error, "episode 1")


def test_empty_datasets(tmp_path):
    make("some/empty-v0", [])
    with pytest.raises(DatasetError) as error:
        load_dataset("some/empty-v0")
    assert_one_sentence(error, "some/empty-v0", "empty")
    d4rl_file(tmp_path / "hopper.hdf5", N=0)
    with pytest.raises(DatasetError) as error:
        load_dataset(str(tmp_path / "hopper.hdf5"))
    assert_one_sentence(error, "hopper.hdf5", "empty")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    monkeypatch.setenv("MINARI_REMOTE", "nosuch://place")  # Minari's own error for an unknown store, without a network
    with pytest.raises(DatasetError) as error:
        load_dataset("mujoco/hopper/medium-v0", download=True)
    assert_one_sentence(
        error,
        "mujoco/hopper/medium-v0",
        "could not be downloaded",
        "network",
        folder("mujoco/hopper/medium-v0"),
    )


def test_d4rl_files_that_are_refused(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"

    def refuse(*parts, path=path, **changes):
        d4rl_file(path, **changes)
        with pytest.raises(DatasetError) as error:
            load_dataset(str(path))
        assert_one_sentence(error, path.name, *parts)

    refuse("rewards", "not a D4RL file", rewards=None)
    refuse("10 rewards", "9 actions", "again", actions=np.zeros((9, A)))
    refuse("actions", "shape (10,)", actions=np.zeros(10))
    refuse("next_observations", "(10, 2)", "again", timeouts=[3], next_observations=np.zeros((10, 2)))
    bad = np.zeros((10, S))
    bad[7, 1] = np.nan
    refuse("row 7", "states", "NaN", timeouts=[2], observations=bad)
    refuse("row 4", "size 3", "rescale or clip", actions=np.eye(10, A, -4) * 3)
    refuse("timeouts", "D4RL name", path=tmp_path / "mine.hdf5")
    d4rl_file(path, N=1000)
    cut_file(path)
    with pytest.raises(DatasetError) as error:
        load_dataset(str(path))
    assert_one_sentence(error, path, "half-downloaded", "download hopper_medium-v2.hdf5 again")
