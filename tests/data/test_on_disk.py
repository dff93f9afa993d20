"""Data that stay on disk: mapped, read a part at a time, and in every bit what they are in memory."""

import errno
import json
import mmap
import os
import tracemalloc

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.data_files import FIELDS, A, S, assert_one_sentence, assert_same, d4rl_file, episode, folder, make

import dql.data
from dql import memory
from dql.data import REWARD_TUNES, DatasetError, describe, load_dataset
from dql.datasets import cache, info, mapped, spool
from dql.datasets.cache import cache_path
from dql.datasets.sources import resolve
from dql.datasets.spool import Spool
from dql.train import fingerprint_of

THING = "some/thing-v0"
GOALS = gymnasium.spaces.Dict(
    {key: gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
     for key in ("achieved_goal", "desired_goal", "observation")}
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of few rows, so that every pass has several."""
    monkeypatch.setattr(info, "BLOCK", 7 * S)


def goal_episode(length, goal, seed):
    rng = np.random.default_rng(seed)
    rows = {key: rng.normal(size=(length + 1, 2)) for key in ("achieved_goal", "observation")}
    rows["desired_goal"] = np.broadcast_to(np.array([goal, 1.0]), (length + 1, 2))
    return episode(length, observations=rows, rewards=rng.integers(0, 2, length).astype(float))


def minari():
    ends = ("termination", "truncation", "nothing")
    return make(THING, [episode(20 + i, ends[i % 3], seed=i) for i in range(5)])


def goals(name, *values):
    return make(name, [goal_episode(12 + i, goal, i) for i, goal in enumerate(values)], observation_space=GOALS)


def d4rl(tmp_path, name="hopper.hdf5", **options):
    d4rl_file(tmp_path / name, 50, terminals=[11, 12, 30], **options)
    return str(tmp_path / name)


def unfinished(tmp_path):
    """A next state that nothing looks at, and actions outside by rounding."""
    last = np.zeros((50, S), np.float32)
    last[30] = np.inf
    actions = np.full((50, A), 0.5, np.float32)
    actions[17] = -1.000005
    return d4rl(tmp_path, "any.hdf5", next_observations=last, actions=actions)


KINDS = {
    "minari": lambda path: minari(),
    "one goal": lambda path: goals("some/goal-v0", 3, 3),
    "two goals": lambda path: goals("some/goal-v0", 3, 4),
    "antmaze": lambda path: goals("D4RL/antmaze/umaze-v1", 3, 4),
    "joined": lambda path: f"{minari()}+{make('some/other-v0', [episode(9, seed=9)])}",
    "joined goals": lambda path: f"{goals('some/one-v0', 3, 3)}+{goals('some/two-v0', 4)}",
    "d4rl": lambda path: d4rl(path, timeouts=[20, 40]),
    "d4rl without timeouts": lambda path: d4rl(path),
    "d4rl with next states": lambda path: d4rl(path, "any.hdf5", next_observations=True),
    "d4rl in float64": lambda path: d4rl(path, observations=np.random.default_rng(1).normal(size=(50, S))),
    "d4rl with what is mended": unfinished,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_in_memory(kind, tmp_path, monkeypatch):
    name = KINDS[kind](tmp_path)
    monkeypatch.setattr(info, "BLOCK", 1 << 22)
    expected = load_dataset(name, cache=False)
    monkeypatch.setattr(info, "BLOCK", 7 * S)
    made, again = load_dataset(name, in_memory=False), load_dataset(name, in_memory=False)
    assert not expected.on_disk
    for data in (made, again):
        assert data.on_disk
        assert "on disk" in repr(data)
        assert_same(data, expected)
        assert fingerprint_of(data) == fingerprint_of(expected)
        assert describe(data) == describe(expected)
        for tensor in (getattr(data, field) for field in FIELDS):
            assert (tensor.dtype, tensor.device.type, tensor.is_contiguous()) == (torch.float32, "cpu", True)
        for step in (0, 1, 300):
            batch, other = data.sample(16, 3, step), expected.sample(16, 3, step)
            assert all(torch.equal(getattr(batch, field), getattr(other, field)) for field in FIELDS)
    in_memory = load_dataset(name)
    assert not in_memory.on_disk, "it is small"
    assert_same(in_memory, expected)


@pytest.mark.parametrize("tune", REWARD_TUNES)
def test_tuned_rewards(tune):
    expected = load_dataset(minari(), reward_tune=tune)
    data = load_dataset(THING, reward_tune=tune, in_memory=False)
    assert torch.equal(data.rewards, expected.rewards)
    assert (data.on_disk, data.reward_tune) == (True, tune)
    assert fingerprint_of(data) == fingerprint_of(expected)
    assert_same(data.to("cpu"), expected)


def test_auto_leaves_on_disk_what_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(dql.data, "available_memory", lambda: None)
    data = load_dataset(minari())
    assert not data.on_disk, "nobody says how much memory there is"
    (source,) = resolve(THING)
    for fresh in (False, True):  # from the cache, and while it is made
        for available, on_disk in ((2 * data.nbytes, False), (2 * data.nbytes - 2, True), (0, True)):
            if fresh:
                cache_path(source).unlink()
            monkeypatch.setattr(dql.data, "available_memory", lambda available=available: available)
            found = load_dataset(THING)
            assert found.on_disk == on_disk, (fresh, available)
            assert_same(found, data)
    assert not load_dataset(THING, in_memory=True).on_disk
    assert not load_dataset(THING, cache=False).on_disk, "there is no file"
    other = make("some/other-v0", [episode(30)])
    monkeypatch.setattr(dql.data, "available_memory", lambda: 2 * data.nbytes)
    assert load_dataset(f"{THING}+{other}").on_disk, "each would fit, both do not"


def test_little_memory_is_taken_while_a_dataset_is_read():
    """NumPy's, which `tracemalloc` sees: of episodes and blocks, not of the dataset."""
    make("some/long-v0", [episode(1000, seed=i) for i in range(40)])

    def peak(**options):
        tracemalloc.start()
        try:
            data = load_dataset("some/long-v0", **options)
            return tracemalloc.get_traced_memory()[1] / data.nbytes
        finally:
            tracemalloc.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_BUFFER", 1 << 14)
        patch.setattr(info, "BLOCK", 1 << 12)
        load_dataset(minari())  # imports
        assert peak(in_memory=True, cache=False) > 1, "else it is not seen"
        assert peak(in_memory=False) < 0.25
        assert peak(in_memory=False) < 0.25, "from the cache"


# The file


def mapped_file():
    (source,) = resolve(THING)
    return load_dataset(THING, in_memory=False), cache_path(source)


def test_the_cache_is_a_safetensors_file():
    minari()
    data, path = mapped_file()
    for name, array in load_file(path).items():
        assert np.array_equal(array, getattr(data, name).numpy()), name
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_of_an_earlier_version_is_mapped(monkeypatch):
    """The library wrote it, names sorted."""
    from safetensors.numpy import save_file

    minari()
    expected, path = mapped_file()
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    arrays = load_file(path)
    path.unlink()
    save_file(arrays, path, header["__metadata__"])
    monkeypatch.setattr(dql.data, "_read", None)  # nothing is read again
    assert_same(load_dataset(THING, in_memory=False), expected)
    assert_same(load_dataset(THING), expected)


def test_writes_to_the_tensors_do_not_reach_the_file():
    minari()
    data, path = mapped_file()
    before = path.read_bytes()
    data.states.zero_()
    data.rewards[3] = 7
    assert not data.states.any()
    assert path.read_bytes() == before
    assert load_dataset(THING, in_memory=False).states.all()


def damaged_header(change):
    def damage(whole):
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        text = json.dumps(change(header)).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return damage


def with_field(name, **values):
    return damaged_header(lambda header: header | {name: header[name] | values})


def without(name):
    return damaged_header(lambda header: {key: value for key, value in header.items() if key != name})


DAMAGE = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "a byte less": lambda whole: whole[:-1],
    "a row less": lambda whole: whole[:-4],
    "longer": lambda whole: whole + bytes(4),
    "one bit": lambda whole: whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:],
    "empty": lambda whole: b"",
    "a length": lambda whole: whole[:8],
    "an endless header": lambda whole: b"\xff" * 8 + whole[8:],
    "text": lambda whole: b"hello, this is no safetensors file",
    "a list": damaged_header(lambda header: [1, 2]),
    "a number": damaged_header(lambda header: 3),
    "no metadata": without("__metadata__"),
    "metadata of text": damaged_header(lambda header: header | {"__metadata__": "x"}),
    "an info of numbers": with_field("__metadata__", info=3),
    "no states": without("states"),
    "another array": damaged_header(lambda header: header | {"more": header["masks"]}),
    "another type": with_field("states", dtype="F16"),
    "a negative shape": with_field("states", shape=[-1, -3]),
    "a shape of text": with_field("states", shape=["a"]),
    "a shape of fractions": with_field("states", shape=[0.5, 3]),
    "a huge shape": with_field("states", shape=[1 << 62, 1 << 62]),
    "an empty shape": with_field("states", shape=[]),
    "offsets of text": with_field("states", data_offsets=["a", "b"]),
    "offsets outside": with_field("states", data_offsets=[1 << 62, (1 << 62) + 12]),
    "negative offsets": with_field("states", data_offsets=[-12, 0]),
    "nesting": lambda whole: (50_000).to_bytes(8, "little") + b"[" * 50_000 + bytes(100_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew(damage):
    minari()
    expected, path = mapped_file()
    whole = path.read_bytes()
    for in_memory in (False, True):
        temporary = path.with_name("x")
        temporary.write_bytes(DAMAGE[damage](whole))
        os.replace(temporary, path)
        assert_same(load_dataset(THING, in_memory=in_memory), expected)
        assert path.read_bytes() == whole


def cut(path):
    os.truncate(path, 100)


def write(path):
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(0, 0))  # a clock is too coarse for a test


@pytest.mark.parametrize("change", [cut, write])
def test_a_file_that_is_changed_while_it_is_mapped(change):
    """Cut, it would end the process with a signal at the next look at a row."""
    minari()
    data, path = mapped_file()
    data.sample(4, 0, 0)
    change(path)
    for use in (lambda: data.sample(4, 0, 0), lambda: fingerprint_of(data), lambda: describe(data)):
        with pytest.raises(DatasetError) as error:
            use()
        assert_one_sentence(error, path, "changed while its rows were in use", "start again")


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_file_that_is_replaced_stays_mapped(change):
    minari()
    data, path = mapped_file()
    before, batch = fingerprint_of(data), data.sample(4, 0, 0)
    if change == "removed":
        path.unlink()
    else:
        (path.parent / "x").write_bytes(bytes(200))
        os.replace(path.parent / "x", path)
    assert fingerprint_of(data) == before
    assert torch.equal(data.sample(4, 0, 0).states, batch.states)


class Advised:
    """A map that notes the ranges that are asked for."""

    def __init__(self, found):
        self.found, self.ranges = found, []

    def madvise(self, advice, *place):
        if advice == mmap.MADV_WILLNEED:
            self.ranges.append(place)
        self.found.madvise(advice, *place)


def test_rows_are_asked_for_at_once_after_waits_for_the_disk(monkeypatch):
    make(THING, [episode(400, seed=i) for i in range(5)])
    data, path = mapped_file()
    expected = load_dataset(THING, reward_tune="normalize")
    data = data.tune_rewards("normalize")  # these rewards are in memory
    (mapping,) = data._ahead.mappings
    mapping._map = advised = Advised(mapping._map)
    waited = 0
    monkeypatch.setattr(mapped, "_waited", lambda: waited)
    monkeypatch.setattr(mapped, "_BATCHES", 3)
    data._ahead._faults = 0
    asked = []
    for step in range(12):
        waited += {3: 7, 5: 8, 10: 100}.get(step, 0)  # pages that the batch before waited for
        advised.ranges.clear()
        batch, other = data.sample(16, 0, step), expected.sample(16, 0, step)
        assert all(torch.equal(getattr(batch, field), getattr(other, field)) for field in FIELDS)
        if advised.ranges:
            asked.append(step)
            touched = {page for start, length in advised.ranges for page in range(start, start + length)}
            rows = data.indices(16, 0, step).tolist()
            for field in FIELDS:
                tensor = getattr(data, field)
                first = tensor.data_ptr() - mapping.address
                inside = {first + row * tensor[0].nbytes for row in rows} | {
                    first + (row + 1) * tensor[0].nbytes - 1 for row in rows
                }
                assert (inside <= touched) == (field != "rewards"), field
            assert all(start % mmap.PAGESIZE == 0 for start, _ in advised.ranges)
            assert all(start + length <= path.stat().st_size for start, length in advised.ranges)
    assert asked == [5, 6, 7, 10, 11]


# What is not there


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    expected = load_dataset(minari())
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DQL_CACHE", str(tmp_path / "file" / "cache"))
    for name in (THING, d4rl(tmp_path, timeouts=[20])):
        with pytest.raises(DatasetError) as error:
            load_dataset(name, in_memory=False)
        assert_one_sentence(error, name.rsplit("/", 1)[-1], tmp_path / "file", "DQL_CACHE", "in_memory=True")
    monkeypatch.setattr(dql.data, "available_memory", lambda: 100)
    data = load_dataset(THING)
    assert not data.on_disk, "there is nowhere else"
    assert_same(data, expected)


def test_a_read_only_cache_is_mapped(monkeypatch):
    expected, _ = load_dataset(minari()), mapped_file()
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", None)
    monkeypatch.setattr(cache.tempfile, "mkstemp", None)
    assert_same(load_dataset(THING, in_memory=False), expected)


@pytest.mark.parametrize("there", [False, True], ids=["made", "cached"])
def test_a_file_that_may_not_be_mapped(there, monkeypatch):
    """As under `ulimit -v`: it is whole, so reading the source again would not help."""

    def refuses(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    minari()
    if there:
        mapped_file()
    monkeypatch.setattr(mapped.mmap, "mmap", refuses)
    with pytest.raises(DatasetError) as error:
        load_dataset(THING, in_memory=False)
    assert_one_sentence(error, "Cannot allocate memory", "in_memory=True", "ulimit -v" if there else "DQL_CACHE")
    assert not load_dataset(THING).on_disk


@pytest.mark.parametrize("buffer", [0, 1 << 20], ids=["at once", "at the end"])
def test_a_full_disk(buffer, monkeypatch):
    minari()
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "w+b"))  # noqa: SIM115
    monkeypatch.setattr(spool, "_BUFFER", buffer)
    with pytest.raises(DatasetError) as error:
        load_dataset(THING, in_memory=False)
    assert_one_sentence(error, THING, "No space left on device", "make room")


def test_a_disk_that_is_full_before_the_cache_is_written(monkeypatch):
    """The rows are on disk already, in files without a name: those are mapped."""
    expected = load_dataset(minari(), cache=False)
    monkeypatch.setattr(cache, "_save", lambda *_: False)
    data = load_dataset(THING, in_memory=False)
    assert data.on_disk
    assert_same(data, expected)
    assert torch.equal(data.sample(4, 0, 0).states, expected.sample(4, 0, 0).states)
    assert describe(data) == describe(expected)


def test_no_home(monkeypatch):
    minari()
    monkeypatch.delenv("DQL_CACHE")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DatasetError) as error:
        load_dataset(THING, in_memory=False)
    assert_one_sentence(error, "HOME", "DQL_CACHE")
    assert not load_dataset(THING).on_disk


def test_what_contradicts_itself():
    minari()
    for options, sentence in (
        ({"in_memory": False, "cache": False}, "cache=False has none; leave one of them out"),
        ({"in_memory": False, "device": "meta"}, "leaves the data on disk, and not on meta"),
        ({"in_memory": "no"}, "in_memory must be True, False or \"auto\", got 'no'"),
        ({"in_memory": None}, 'in_memory must be True, False or "auto", got None'),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_dataset(THING, **options)


@pytest.mark.parametrize("damage", ["states", "actions", "rewards"])
def test_faults_are_found_in_any_block(damage):
    """In the words, and with the row, of the reading in memory."""
    changes = {"states": "observations"}.get(damage, damage)
    values = getattr(episode(30, seed=2), changes).copy()
    values.reshape(len(values), -1)[23] = np.nan if damage != "actions" else 1.5
    make("some/bad-v0", [episode(30, seed=1), episode(30, seed=2, **{changes: values})])
    errors = []
    for options in ({"cache": False}, {"in_memory": False}):
        with pytest.raises(DatasetError) as error:
            load_dataset("some/bad-v0", **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "episode 1" in errors[0]
    assert not any(folder("some/bad-v0").parents[1].parent.rglob("*.part"))


# Parts


@pytest.mark.parametrize("most_bytes", [0, 1, 200, 500, 10**6])
def test_a_spool_is_the_concatenation(most_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_BUFFER", 150)
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(n, 5)).astype(np.float32) for n in (3, 0, 4, 1, 9)]
    rows = Spool("x", tmp_path, most_bytes)
    for block in blocks:
        rows.add(a=block[:, ::-1], b=block[:, 0])
    assert rows.on_disk == (most_bytes < 400)
    rows.change("a", lambda block: block[:, 1:])
    whole = np.concatenate(blocks)
    assert np.array_equal(rows.array("a"), whole[:, ::-1][:, 1:])
    assert np.array_equal(rows.array("b"), whole[:, 0])
    assert len(rows.mappings) == (2 if rows.on_disk else 0)
    assert not any(tmp_path.iterdir()), "its files have no names"


# Memory


GROUP = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\nactive_file 100\ninactive_file 50"}
OLD_GROUP = {
    "memory.limit_in_bytes": "900",
    "memory.usage_in_bytes": "300",
    "memory.stat": "active_file 7\ntotal_active_file 20\ntotal_inactive_file 30",
}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 8 * 1024),
        ("0::/\n", {"": GROUP}, 450),
        ("0::/a/b\n", {"a/b": GROUP | {"memory.max": "max"}, "a": GROUP}, 450),
        ("0::/a/b\n", {"a/b": GROUP | {"memory.max": "800"}, "a": GROUP}, 250),
        ("0::/of/the/host\n", {"": GROUP}, 450),
        ("0::/\n", {"": GROUP | {"memory.current": "2000"}}, 0),
        ("5:memory:/a\n3:cpu:/b\n", {"memory/a": OLD_GROUP}, 650),
        ("5:cpu,memory:/host\n", {"memory": OLD_GROUP}, 650),
        ("5:memory:/\n", {"memory": OLD_GROUP | {"memory.limit_in_bytes": str(2**63 - 4096)}}, 8 * 1024),
        ("nonsense\n0::/\n", {"": {"memory.max": "x"}}, 8 * 1024),
    ],
)
def test_available_memory(groups, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.available_memory() is None
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable:    8 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for place, contents in files.items():
        (tmp_path / "groups" / place).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (tmp_path / "groups" / place / name).write_text(text)
    assert memory.available_memory() == expected


def test_this_machine_says_how_much_memory_there_is():
    assert memory.available_memory() > 1 << 20
