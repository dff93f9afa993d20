"""dql.collect: recipes, shipped behaviour policies, and whole Minari datasets made by real environments."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dql.collect import make as collect
from dql.collect import recipes

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")

try:
    collect._check_mujoco("dql/hopper/medium-v0")
    NO_MUJOCO = None
except ModuleNotFoundError as error:
    NO_MUJOCO = str(error)
needs_mujoco = pytest.mark.skipif(NO_MUJOCO is not None, reason=NO_MUJOCO or "")

PENDULUM = "dql/pendulum/mixed-v0"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def hdf5_contents(path: Path) -> dict[str, np.ndarray]:
    """Every array and attribute of a dataset's file."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            found[name] = node[()]
        found.update({f"{name}@{key}": np.asarray(value) for key, value in node.attrs.items()})

    with h5py.File(path / "data" / "main_data.hdf5") as file:
        file.visititems(visit)
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a)


def check_dataset(dataset: minari.MinariDataset, steps: int, cuts: int) -> None:
    """What holds for every dataset made: shapes, bounds, ends, reference scores, environment."""
    env = dataset.recover_environment()
    space = env.action_space
    assert env.spec.id == dataset.recover_environment(eval_env=True).spec.id
    assert dataset.total_steps == steps
    short = 0
    for episode in dataset.iterate_episodes():
        T = len(episode.rewards)
        assert episode.observations.shape == (T + 1, *env.observation_space.shape)
        assert episode.observations.dtype == env.observation_space.dtype
        assert episode.actions.shape == (T, *space.shape)
        assert episode.actions.dtype == np.float32
        assert (episode.actions >= space.low).all()
        assert (episode.actions <= space.high).all()
        assert np.isfinite(episode.observations).all()
        assert np.isfinite(episode.rewards).all()
        ends = episode.terminations | episode.truncations
        assert ends[-1]
        assert not ends[:-1].any()
        short += bool(episode.truncations[-1] and env.spec.max_episode_steps > T)
    assert short <= cuts
    metadata = dataset.storage.metadata
    assert metadata["ref_min_score"] < metadata["ref_max_score"]
    scores = minari.get_normalized_score(dataset, np.array([metadata["ref_min_score"], metadata["ref_max_score"]]))
    assert scores == pytest.approx([0.0, 1.0])
    assert "never compare scores with D4RL's" in metadata["description"]


def test_import_is_light() -> None:
    heavy = ("minari", "gymnasium", "mujoco", "rich")
    code = f"import sys, dql.collect; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------- recipes and policies
def test_recipes_cover_what_is_promised() -> None:
    kinds = ("medium", "expert", "medium-expert", "mixed")
    wanted = {f"dql/{env}/{kind}-v0" for env in ("hopper", "halfcheetah", "walker2d") for kind in kinds}
    assert set(recipes.RECIPES) == wanted | {PENDULUM}
    assert not recipes.RECIPES[PENDULUM].needs_mujoco
    for recipe in recipes.RECIPES.values():
        assert recipes.resolve(recipe.id) is recipe
        assert recipes.resolve(recipe.short_name) is recipe
        for part in recipe.parts:
            for snapshot in part.snapshots:
                if "/" in snapshot:
                    search, iteration = snapshot.split("/")
                    assert recipes.behaviour_policy(search, int(iteration)).name == snapshot


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'hopper-medium-expert'\?.*Known: pendulum-mixed, ") as caught:
        recipes.resolve("hoper-medium-expert")
    assert "walker2d-mixed" in str(caught.value)
    with pytest.raises(ValueError, match=r"no recipe 'zzz'\. Known"):
        recipes.resolve("zzz")


@pytest.mark.parametrize("search", recipes._SEARCHES)
def test_shipped_policies_are_as_documented(search: str) -> None:
    """Each file against its row in behaviours/README.md."""
    data = recipes._read_behaviours(recipes._BEHAVIOURS / f"{search}.npz")
    readme = (recipes._BEHAVIOURS / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"\| {search}\.npz \| (\d+) \| \((\d+), (\d+)\) \| (.+) \|", readme)
    n, A, S = (int(row[i]) for i in (1, 2, 3))
    assert data["M"].shape == (n, A, S)
    assert data["mean"].shape == data["std"].shape == (n, S)
    told = re.findall(r"(\d+): (-?\d+)±(\d+)", row[4])
    assert data["iteration"].tolist() == [int(t[0]) for t in told]
    assert data["return_mean"] == pytest.approx([int(t[1]) for t in told], abs=0.51)
    assert data["return_std"] == pytest.approx([int(t[2]) for t in told], abs=0.51)
    for key in ("M", "mean", "std", "return_mean", "return_std", "length_mean"):
        assert data[key].dtype == np.float32
    assert n == recipes._SEARCHES[search]


def test_behaviour_policy_is_the_documented_formula() -> None:
    policy = recipes.behaviour_policy("hopper-0", 240)
    observations = np.random.default_rng(0).standard_normal((7, 11))
    wanted = ((observations - policy.mean) / policy.std) @ policy.M.T
    np.testing.assert_allclose(policy(observations), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(policy(observations[3]), policy(observations)[3])


def test_behaviour_policy_best_and_errors() -> None:
    assert recipes.behaviour_policy("hopper").name == "hopper-0/320"
    assert recipes.behaviour_policy("hopper-1").name == "hopper-1/180"
    with pytest.raises(ValueError, match="no behaviour policy 'ant'; searches: halfcheetah-0"):
        recipes.behaviour_policy("ant")
    with pytest.raises(ValueError, match="name the search and not the environment"):
        recipes.behaviour_policy("hopper", 20)
    with pytest.raises(ValueError, match=r"no snapshot of iteration 7; it has \[20, 40"):
        recipes.behaviour_policy("hopper-0", 7)


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hopper-0.npz"
    whole = recipes._read_behaviours(recipes._BEHAVIOURS / "hopper-0.npz")
    for change, message in (
        ({"mean": whole["mean"][:, :3]}, r"mean must be \(16, 11\) but is \(16, 3\)"),
        ({"M": whole["M"][0]}, "M must be"),
        ({"std": 0 * whole["std"]}, "std is not positive"),
        ({"M": np.array([object()])}, "allow_pickle=False"),
    ):
        np.savez(path, **(whole | change))
        with pytest.raises(ValueError, match=message):
            recipes._read_behaviours(path)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"cannot read the behaviour policies .* Reinstall diffusion-ql"):
        recipes._read_behaviours(path)


# --------------------------------------------------------------------------- pendulum
def test_pendulum_dataset(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = collect.make_dataset("pendulum-mixed", steps=1_900)
    assert capfd.readouterr() == ("", "")  # silent: this is no terminal
    assert made.path == root / PENDULUM
    dataset = minari.load_dataset(PENDULUM)
    check_dataset(dataset, 1_900, cuts=1)
    assert (
        (made.dataset_id, made.steps, made.episodes)
        == (PENDULUM, 1_900, dataset.total_episodes)
        == (PENDULUM, 1_900, 10)
    )
    assert [len(episode) for episode in dataset.iterate_episodes()] == [200] * 9 + [100]
    assert dataset[9].truncations[-1]
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()][:9]  # the cut one does not count
    assert made.return_mean == pytest.approx(np.mean(returns))
    assert (made.return_min, made.return_max) == pytest.approx((min(returns), max(returns)))
    assert (made.ref_min_score, made.ref_max_score) == (
        dataset.storage.metadata["ref_min_score"],
        dataset.storage.metadata["ref_max_score"],
    )
    behaviours = list(dataset.storage.get_episode_metadata(range(10)))
    assert {b["snapshot"] for b in behaviours} == {"controller"}
    probabilities = [b["random_prob"] for b in behaviours]
    assert min(probabilities) >= 0.3
    assert max(probabilities) <= 1.0
    assert len(set(probabilities)) == 10
    assert PENDULUM in minari.list_local_datasets()
    assert [p.name for p in root.iterdir()] == ["dql"]


def test_recorded_episodes_replay(root: Path) -> None:
    """The stored seed and actions give the stored observations and rewards in a fresh environment."""
    collect.make_dataset("pendulum-mixed", steps=500)
    dataset = minari.load_dataset(PENDULUM)
    env = dataset.recover_environment()
    for episode, metadata in zip(
        dataset.iterate_episodes(), dataset.storage.get_episode_metadata(range(3)), strict=True
    ):
        observation, _ = env.reset(seed=metadata["seed"])
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(observation, episode.observations[t])
            observation, reward, *_ = env.step(action)
            assert reward == episode.rewards[t]


def test_same_seed_same_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of environments and the size of the chunks that are written."""
    first = hdf5_contents(collect.make_dataset("pendulum-mixed", steps=2_000).path)
    monkeypatch.setattr(collect, "_CHUNK_STEPS", 300)
    for num_envs in (1, 3, 16):
        again = collect.make_dataset("pendulum-mixed", steps=2_000, num_envs=num_envs, overwrite=True)
        assert same(first, hdf5_contents(again.path)), f"num_envs={num_envs}"
    other = collect.make_dataset("pendulum-mixed", steps=2_000, seed=1, overwrite=True)
    assert not same(first, hdf5_contents(other.path))


def test_existing_dataset_needs_overwrite(root: Path) -> None:
    before = hdf5_contents(collect.make_dataset("pendulum-mixed", steps=300).path)
    with pytest.raises(FileExistsError, match=r"already there, in .*overwrite=True"):
        collect.make_dataset("pendulum-mixed", steps=400)
    assert same(before, hdf5_contents(root / PENDULUM))
    collect.make_dataset("pendulum-mixed", steps=400, overwrite=True)
    assert minari.load_dataset(PENDULUM).total_steps == 400
    assert [p.name for p in root.iterdir()] == ["dql"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one child process")
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_make_leaves_nothing(root: Path, existing: bool) -> None:
    before = hdf5_contents(collect.make_dataset("pendulum-mixed", steps=300).path) if existing else None
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dql.collect import make, make_dataset\nmake._CHUNK_STEPS = 2_000\n"
        "make_dataset('pendulum-mixed', steps=10_000_000, overwrite=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(root.glob(".dql-make-*/dql/pendulum/mixed-v0/data/main_data.hdf5")):  # the first chunk is written
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=60)[1]
    assert not list(root.glob(".dql-make-*"))
    if existing:
        assert same(before, hdf5_contents(root / PENDULUM))
    else:
        assert not (root / PENDULUM).exists()
        assert minari.list_local_datasets() == {}


@pytest.mark.parametrize("before", [None, "elsewhere"])
def test_environment_variable_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("MINARI_DATASETS_PATH", before)
    with collect._minari_root(tmp_path):
        assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path)
    assert os.environ.get("MINARI_DATASETS_PATH") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer from 1 to 10,000,000, got 0"),
        ({"steps": 10_000_001}, "steps must be an integer from 1 to 10,000,000, got 10000001"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"num_envs": 0}, "num_envs must be an integer from 1"),
    ],
)
def test_wrong_arguments(root: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect.make_dataset("pendulum-mixed", **arguments)
    assert not list(root.iterdir())


def test_full_disk_is_told_before_the_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collect.shutil.disk_usage(root)
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"needs about \d+ MB in .*, where 1 MB are free; make room"):
        collect.make_dataset("pendulum-mixed")
    assert not list(root.iterdir())


def test_missing_mujoco_tells_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)  # what an import finds where mujoco is not installed
    with pytest.raises(ModuleNotFoundError, match=r'pip install "diffusion-ql\[mujoco\]"'):
        collect.make_dataset("hopper-medium", steps=100)


# --------------------------------------------------------------------------- mujoco
@needs_mujoco
def test_medium_expert_is_half_and_half(root: Path) -> None:
    collect.make_dataset("hopper-medium-expert", steps=2_001)
    dataset = minari.load_dataset("dql/hopper/medium-expert-v0")
    check_dataset(dataset, 2_001, cuts=2)
    behaviours = dataset.storage.get_episode_metadata(dataset.episode_indices)
    steps: dict[str, int] = {}
    for episode, behaviour in zip(dataset.iterate_episodes(), behaviours, strict=True):
        steps[behaviour["snapshot"]] = steps.get(behaviour["snapshot"], 0) + len(episode)
    assert steps == {"hopper-0/240": 1_000, "hopper-0/320": 1_001}

    collect.make_dataset("hopper-medium", steps=1_000)  # the same episodes as in the first half
    for episode, twin in zip(minari.load_dataset("dql/hopper/medium-v0"), dataset, strict=False):
        np.testing.assert_array_equal(episode.observations, twin.observations)
        np.testing.assert_array_equal(episode.actions, twin.actions)


@needs_mujoco
def test_mixed_switches_snapshots_between_episodes(root: Path) -> None:
    first = collect.make_dataset("hopper-mixed", steps=3_000, num_envs=2)
    dataset = minari.load_dataset("dql/hopper/mixed-v0")
    check_dataset(dataset, 3_000, cuts=1)
    behaviours = list(dataset.storage.get_episode_metadata(dataset.episode_indices))
    assert len({b["snapshot"] for b in behaviours}) > len(behaviours) / 2
    assert len({b["noise_std"] for b in behaviours}) == len(behaviours)
    assert all(0 <= b["noise_std"] <= 0.3 for b in behaviours)
    before = hdf5_contents(first.path)
    again = collect.make_dataset("hopper-mixed", steps=3_000, num_envs=7, overwrite=True)
    assert same(before, hdf5_contents(again.path))


@needs_mujoco
@pytest.mark.parametrize("env", ["halfcheetah", "walker2d"])
def test_other_environments(root: Path, env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    collect.make_dataset(f"{env}-expert", steps=600)
    assert [p.name for p in root.iterdir()] == ["dql"]  # mujoco left no log
    check_dataset(minari.load_dataset(f"dql/{env}/expert-v0"), 600, cuts=1)
