"""Where data comes from: ids, folders, D4RL files, concatenations, and the cache."""

import os

import numpy as np
import pytest
import torch
from support.data_files import (
    FIELDS,
    assert_one_sentence,
    assert_same,
    d4rl_file,
    edit_metadata,
    episode,
    folder,
    make,
)

from dql.data import (
    DatasetError,
    load_dataset,
)
from dql.datasets.cache import cache_path
from dql.datasets.sources import resolve


def test_a_minari_folder_by_path(tmp_path, monkeypatch):
    make("some/thing-v0", [episode(4)])
    by_id = load_dataset("some/thing-v0", cache=False)
    moved = tmp_path / "else.where" / "copy"
    moved.parent.mkdir()
    folder("some/thing-v0").rename(moved)
    for path in (moved, moved / "data", moved / "data" / "main_data.hdf5"):
        assert_same(load_dataset(str(path), cache=False), by_id)
    monkeypatch.chdir(moved.parent)
    assert_same(load_dataset("copy"), by_id)


def test_arrow_datasets_are_read_too():
    pytest.importorskip("pyarrow", reason="Minari's arrow format needs pyarrow")
    buffers = [episode(4, seed=1), episode(3, "termination", seed=2)]
    a = load_dataset(make("some/arrow-v0", buffers, data_format="arrow"))
    b = load_dataset(make("some/hdf5-v0", buffers))
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def test_concatenation_and_the_medium_expert_alias():
    make("mujoco/hopper/medium-v0", [episode(4, "termination", seed=1)])
    make("mujoco/hopper/expert-v0", [episode(3, seed=2), episode(2, seed=3)])
    medium, expert = (load_dataset(f"mujoco/hopper/{half}-v0") for half in ("medium", "expert"))
    joined = load_dataset("mujoco/hopper/medium-v0+mujoco/hopper/expert-v0")
    for name in FIELDS:
        assert torch.equal(getattr(joined, name), torch.cat([getattr(medium, name), getattr(expert, name)]))
    assert joined.info.num_episodes == 3
    assert joined.info.num_truncations == 2
    expected = np.concatenate([medium.info.episode_returns, expert.info.episode_returns])
    assert joined.info.episode_returns.tolist() == expected.tolist()
    alias = load_dataset("mujoco/hopper/medium-expert-v0")
    assert alias.info.dataset_id == "mujoco/hopper/medium-expert-v0"
    assert all(torch.equal(getattr(alias, name), getattr(joined, name)) for name in FIELDS)
    make("mujoco/hopper/medium-expert-v0", [episode(7, seed=9)])
    assert len(load_dataset("mujoco/hopper/medium-expert-v0")) == 7, "a dataset of that name comes first"


def test_parts_must_fit_together():
    make("some/one-v0", [episode(2)])
    make("some/two-v0", [episode(2)], refs=(-1.0, 8.0))
    with pytest.raises(DatasetError) as error:
        load_dataset("some/one-v0+some/two-v0")
    assert_one_sentence(error, "some/one-v0", "some/two-v0", "ref_max_score", "9.0", "8.0", "join datasets of")


def test_d4rl_without_next_observations_drops_rows_without_a_next_state(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    arrays = d4rl_file(path, terminals=[2], timeouts=[6])
    ds = load_dataset(str(path))
    rows = [0, 1, 2, 3, 4, 5, 7, 8]  # 6 timed out, 9 is the last
    np.testing.assert_array_equal(ds.states.numpy(), arrays["observations"][rows])
    np.testing.assert_array_equal(ds.next_states.numpy(), arrays["observations"][np.array(rows) + 1])
    assert ds.rewards.tolist() == rows
    assert ds.masks.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert ds.info.episode_returns.tolist() == [0 + 1 + 2, 3 + 4 + 5 + 6], "whole returns; the open end is no episode"
    assert ds.info.num_episodes == 3
    assert ds.info.num_truncations == 1
    assert (ds.info.ref_min_score, ds.info.ref_max_score) == (-20.272305, 3234.3)
    assert ds.info.env_id == "Hopper-v5"
    assert ds.max_action == 1.0
    assert "-v2" in ds.info.note


def test_d4rl_with_next_observations_keeps_every_row(tmp_path):
    path = tmp_path / "walker2d_medium_replay-v2.hdf5"
    arrays = d4rl_file(path, terminals=[2], timeouts=[6], next_observations=True)
    ds = load_dataset(str(path))
    assert len(ds) == 10
    assert ds.masks.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(ds.next_states.numpy(), arrays["next_observations"])


def test_d4rl_without_timeouts_uses_the_time_limit_of_the_task(tmp_path):
    path = tmp_path / "pen-cloned-v1.hdf5"  # at most 100 steps
    d4rl_file(path, N=350, terminals=[19])
    ds = load_dataset(str(path))
    assert ds.info.episode_lengths.tolist() == [20, 100, 100, 100]  # ends at 19, 119, 219, 319
    assert len(ds) == 350 - 4
    assert not {119.0, 219.0, 319.0, 349.0} & set(ds.rewards.tolist())


@pytest.mark.parametrize(
    ("name", "env_id", "ref_max"),
    [
        ("halfcheetah_medium_expert-v2.hdf5", "HalfCheetah-v5", 12135.0),
        ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5", "AntMaze_UMaze-v4", 1.0),
        ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse.hdf5", "AntMaze_Large-v4", 1.0),
        ("antmaze-medium-play-v0.hdf5", "AntMaze_Medium-v4", 1.0),
        ("mini_kitchen_microwave_kettle_light_slider-v0.hdf5", None, 4.0),
        ("pen-v0_demos_clipped.hdf5", "AdroitHandPen-v1", 3076.8331018826877),
        ("open-maze.hdf5", None, None),
    ],
)
def test_d4rl_tasks_are_recognised_by_the_file_name(tmp_path, name, env_id, ref_max):
    d4rl_file(tmp_path / name, timeouts=[4])
    info = load_dataset(str(tmp_path / name)).info
    assert info.env_id == env_id
    assert info.ref_max_score == (None if ref_max is None else pytest.approx(ref_max, rel=1e-9))


# ---- the cache ---------------------------------------------------------------------------------------------------


def the_cache_file(name):
    (source,) = resolve(name)
    return cache_path(source)


def blank(dataset_id):
    """Makes the source unreadable without a change of size or time: only the cache can answer then."""
    main = folder(dataset_id) / "data" / "main_data.hdf5"
    stat = main.stat()
    main.write_bytes(b"\0" * stat.st_size)
    os.utime(main, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_cache_hit_equals_the_reading_and_reads_nothing():
    make("some/thing-v0", [episode(4, "termination"), episode(3)])
    read = load_dataset("some/thing-v0", cache=False)
    assert not the_cache_file("some/thing-v0").exists(), "cache=False writes none"
    assert_same(load_dataset("some/thing-v0"), read)
    blank("some/thing-v0")
    assert_same(load_dataset("some/thing-v0"), read)
    with pytest.raises(DatasetError):
        load_dataset("some/thing-v0", cache=False)


def test_a_changed_source_is_read_again():
    make("some/thing-v0", [episode(4)])
    load_dataset("some/thing-v0")
    edit_metadata("some/thing-v0", ref_max_score=123.0)
    assert load_dataset("some/thing-v0").info.ref_max_score == 123.0
    assert len(list(the_cache_file("some/thing-v0").parent.iterdir())) == 1, "overwritten, not added"


@pytest.mark.parametrize("damage", ["cut short", "one byte", "empty", "text"])
def test_a_damaged_cache_file_is_rebuilt(damage):
    make("some/thing-v0", [episode(40)])
    read = load_dataset("some/thing-v0")
    path = the_cache_file("some/thing-v0")
    whole = path.read_bytes()
    middle = len(whole) - 100
    path.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"hello, this is no safetensors file",
        }[damage]
    )
    assert_same(load_dataset("some/thing-v0"), read)
    blank("some/thing-v0")
    assert_same(load_dataset("some/thing-v0"), read)


def test_a_cache_that_cannot_be_written_costs_only_the_caching(tmp_path, monkeypatch):
    make("some/thing-v0", [episode(4)])
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DQL_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_dataset("some/thing-v0")) == 4
