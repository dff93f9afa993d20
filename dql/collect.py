"""Makes Minari datasets on this machine, offline, from behaviour policies that ship with the package.

Every episode is a function of (seed, part of the recipe, episode index) alone: its environment seed, its
snapshot, its noise level and all its noise come from that triple. Episodes are kept in index order until the
steps are reached, so a dataset depends neither on `num_envs` nor on timing, and `medium-expert` begins with
the very episodes of `medium`. The episode that crosses the wanted number of steps is cut there and marked as
truncated, once a part.

Environments are stepped one after the other in this process with one batched policy evaluation: on 2 cores,
with 16 environments (Gymnasium 1.4, mujoco 4.0), plain stepping was 1.8 (Hopper), 2.5 (HalfCheetah) and 5
times (Pendulum) as fast as AsyncVectorEnv.

None of this is D4RL's data: never set the scores beside D4RL's.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "RECIPES",
    "LinearPolicy",
    "MadeDataset",
    "Part",
    "Recipe",
    "behaviour_policy",
    "make_dataset",
    "resolve",
]

MAX_STEPS = 10_000_000
REFERENCE_EPISODES = 20
REFERENCE_SEED = 123
_BEHAVIOURS = Path(__file__).parent / "behaviours"
_CHUNK_STEPS = 100_000  # steps held in memory before they go to the file


@dataclass(frozen=True)
class Part:
    """Episodes of one kind. Each draws one snapshot, one noise level and one share of random actions.

    Attributes:
        name: Enters the seeds, so recipes that share a part share its episodes.
        snapshots: "hopper-0/240" (search and iteration), "controller" (the pendulum's) or "random"; drawn
            uniformly.
        noise_std: Range of the episode's Gaussian noise, in units of half the action range; drawn uniformly.
        random_prob: Range of the episode's probability of a uniformly random action; drawn uniformly.
    """

    name: str
    snapshots: tuple[str, ...]
    noise_std: tuple[float, float] = (0.0, 0.0)
    random_prob: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made; its parts get equal shares of the steps."""

    id: str
    env_id: str
    steps: int
    description: str
    parts: tuple[Part, ...]
    needs_mujoco: bool = True

    @property
    def short_name(self) -> str:
        """The id without namespace and version: "hopper-medium-expert"."""
        return self.id.removeprefix("dql/").removesuffix("-v0").replace("/", "-")


@dataclass(frozen=True)
class MadeDataset:
    """What was made. The return statistics leave out episodes that were cut, unless there are no others."""

    dataset_id: str
    steps: int
    episodes: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    ref_min_score: float
    ref_max_score: float
    seconds: float
    path: Path


@dataclass(frozen=True)
class LinearPolicy:
    """a = M ((s - mean) / std), not clipped (Mania, Guy, Recht 2018, section 3, V2)."""

    name: str
    M: np.ndarray  # [A, S]
    mean: np.ndarray  # [S]
    std: np.ndarray  # [S]
    return_mean: float  # of 10 deterministic episodes when it was found

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Actions [..., A], float64 and not clipped, of observations [..., S]."""
        return _linear_actions(self.M, self.mean, self.std, observations)


def _linear_actions(M: np.ndarray, mean: np.ndarray, std: np.ndarray, observations: np.ndarray) -> np.ndarray:
    # One column at a time: BLAS would round a row differently in batches of other sizes, and an episode must
    # not depend on what runs beside it.
    white = (observations - mean) / std  # [..., S]
    actions = np.zeros(np.broadcast_shapes(M.shape[:-1], (*white.shape[:-1], M.shape[-2])))  # [..., A]
    for i in range(M.shape[-1]):
        actions += M[..., i] * white[..., i, None]
    return actions


def energy_controller(observations: np.ndarray) -> np.ndarray:
    """Swings Pendulum-v1 up by its energy and holds it with a PD rule near the top.

    With theta = 0 upright the environment has theta'' = 15 sin(theta) + 3 u, so
    E = theta'^2 / 2 + 15 (cos(theta) - 1) is 0 upright at rest and dE/dt = 3 u theta': torque along the
    velocity pumps (Astrom and Furuta 2000).

    Args:
        observations: [N, 3], (cos theta, sin theta, theta').

    Returns:
        Torques [N, 1] in [-2, 2], float64.
    """
    cos, sin, speed = (observations[:, i].astype(np.float64) for i in range(3))  # [N] each
    theta = np.arctan2(sin, cos)
    energy = 0.5 * speed**2 + 15.0 * (cos - 1.0)
    pump = -2.0 * np.clip(0.5 * energy, -1.0, 1.0) * np.where(speed >= 0.0, 1.0, -1.0)
    hold = -(7.0 * theta + 1.5 * speed)  # gains that leave the noisy episodes a mean return near -800
    near = (np.abs(theta) < 0.3) & (np.abs(speed) < 3.0)
    return np.clip(np.where(near, hold, pump), -2.0, 2.0)[:, None]


# --------------------------------------------------------------------------- recipes
_SEARCHES = {
    "halfcheetah-0": 11,
    "halfcheetah-1": 6,
    "hopper-0": 16,
    "hopper-1": 12,
    "hopper-2": 19,
    "walker2d-0": 6,
}
_ENV_IDS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
# (mid-level snapshot, its noise), (best snapshot, its noise): the mid-level ones score about 0.4 of the
# best; the expert's small noise shows the learner what happens beside the expert's path.
_LEVELS = {
    "hopper": (("hopper-0/240", 0.2), ("hopper-0/320", 0.05)),
    "halfcheetah": (("halfcheetah-0/40", 0.1), ("halfcheetah-1/100", 0.05)),
    "walker2d": (("walker2d-0/60", 0.1), ("walker2d-0/120", 0.05)),
}


def _recipes() -> dict[str, Recipe]:
    found = [
        Recipe(
            id="dql/pendulum/mixed-v0",
            env_id="Pendulum-v1",
            steps=40_000,
            description="An energy swing-up controller; each episode takes uniformly random actions with a "
            "probability drawn between 30% and 100%.",
            parts=(Part("pendulum/mixed", ("controller",), random_prob=(0.3, 1.0)),),
            needs_mujoco=False,
        )
    ]
    for env, ((mid, mid_noise), (best, best_noise)) in _LEVELS.items():
        medium = Part(f"{env}/medium", (mid,), noise_std=(mid_noise, mid_noise))
        expert = Part(f"{env}/expert", (best,), noise_std=(best_noise, best_noise))
        every = tuple(
            f"{s}/{20 * (i + 1)}" for s, n in _SEARCHES.items() if s.startswith(env) for i in range(n)
        )
        mixed = Part(f"{env}/mixed", ("random", *every), noise_std=(0.0, 0.3))
        told = {
            "medium": (200_000, (medium,), f"Linear policy {mid}, Gaussian action noise {mid_noise}."),
            "expert": (
                200_000,
                (expert,),
                f"The best linear policy, {best}, Gaussian action noise {best_noise}.",
            ),
            "medium-expert": (400_000, (medium, expert), "Half the steps as in medium, half as in expert."),
            "mixed": (
                200_000,
                (mixed,),
                f"Each episode draws one of {len(every)} linear policies, poor to best, or the random "
                + "policy, and Gaussian action noise between 0 and 0.3.",
            ),
        }
        found += [
            Recipe(f"dql/{env}/{k}-v0", _ENV_IDS[env], n, text, parts) for k, (n, parts, text) in told.items()
        ]
    return {recipe.id: recipe for recipe in found}


RECIPES: dict[str, Recipe] = _recipes()


def resolve(name: str) -> Recipe:
    """The recipe of a dataset id ("dql/hopper/medium-v0") or short name ("hopper-medium").

    Raises:
        ValueError: No such recipe; lists those there are and the nearest.
    """
    names = {recipe.short_name: recipe for recipe in RECIPES.values()} | RECIPES
    if name in names:
        return names[name]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(recipe.short_name for recipe in RECIPES.values())
    raise ValueError(
        f"no recipe {name!r}.{hint} Known: {known} (or their ids, such as 'dql/hopper/medium-v0')."
    )


# --------------------------------------------------------------------------- the shipped policies
def behaviour_policy(search: str, iteration: int | None = None) -> LinearPolicy:
    """Loads a shipped linear policy.

    Args:
        search: A search ("hopper-0"), or an environment ("hopper") for the best of all its searches.
        iteration: A snapshot's iteration; None takes the best by its recorded mean return.

    Raises:
        ValueError: No such search or snapshot, or a file that does not hold what its README says.
    """
    files = [s for s in _SEARCHES if s == search or (iteration is None and s.rsplit("-", 1)[0] == search)]
    if not files:
        raise ValueError(
            f"no behaviour policy {search!r}; searches: {', '.join(_SEARCHES)}"
            f"{'' if iteration is None else ' (with an iteration, name the search and not the environment)'}."
        )
    if iteration is None:
        bests = [(name, data, int(np.argmax(data["return_mean"]))) for name, data in map(_read_search, files)]
        name, data, i = max(bests, key=lambda best: best[1]["return_mean"][best[2]])
    else:
        name, data = _read_search(search)
        known = data["iteration"].tolist()
        if iteration not in known:
            raise ValueError(f"search {search!r} has no snapshot of iteration {iteration}; it has {known}.")
        i = known.index(iteration)
    return LinearPolicy(
        name=f"{name}/{data['iteration'][i]}",
        M=data["M"][i].astype(np.float64),
        mean=data["mean"][i].astype(np.float64),
        std=data["std"][i].astype(np.float64),
        return_mean=float(data["return_mean"][i]),
    )


@functools.cache
def _read_search(search: str) -> tuple[str, dict[str, np.ndarray]]:
    return search, _read_behaviours(_BEHAVIOURS / f"{search}.npz")


def _read_behaviours(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one search's file, checked against behaviours/README.md."""
    remedy = "Reinstall diffusion-ql: the file is part of the package."
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except Exception as error:
        # numpy raises OSError, ValueError, EOFError or BadZipFile, by the kind of damage.
        raise ValueError(f"cannot read the behaviour policies {path}: {error}. {remedy}") from error
    shape: tuple[int, ...] = data["M"].shape if "M" in data else ()
    if len(shape) != 3 or shape[0] < 1:
        raise ValueError(f"{path}: M must be [n, A, S] with n >= 1 but is {shape or 'absent'}. {remedy}")
    n, _, S = shape
    wanted = dict.fromkeys(("iteration", "return_mean", "return_std", "length_mean", "env_steps"), (n,))
    for key, want in (wanted | {"mean": (n, S), "std": (n, S)}).items():
        have = data[key].shape if key in data else "absent"
        if have != want:
            raise ValueError(f"{path}: {key} must be {want} but is {have}. {remedy}")
    if not all(np.isfinite(array).all() for array in data.values()) or (data["std"] <= 0).any():
        raise ValueError(f"{path}: an array holds NaN or infinity, or std is not positive. {remedy}")
    return data


# --------------------------------------------------------------------------- collection
@dataclass
class _Episode:
    """One episode's arrays, T steps, and where they came from."""

    seed: int
    snapshot: str
    noise_std: float
    random_prob: float
    observations: np.ndarray  # [T + 1, S]
    actions: np.ndarray  # [T, A] float32, clipped: what the environment was given
    rewards: np.ndarray  # [T] float64
    terminated: bool
    truncated: bool
    cut: bool  # truncated by the end of the collection and not by the environment


class _Slot:
    """One environment, and preallocated arrays for the episode that runs in it."""

    def __init__(self, env_id: str) -> None:
        import gymnasium

        # These environments are Gymnasium's own: checking every step of them finds nothing.
        self.env = gymnasium.make(env_id, disable_env_checker=True)
        spec, states, actions = self.env.spec, self.env.observation_space, self.env.action_space
        assert spec is not None
        assert spec.max_episode_steps is not None
        assert isinstance(states, gymnasium.spaces.Box)
        assert isinstance(actions, gymnasium.spaces.Box)
        self.horizon: int = spec.max_episode_steps
        self.low, self.high = actions.low, actions.high  # [A] each
        (S,), (A,) = states.shape, actions.shape
        self.observations = np.empty((self.horizon + 1, S), states.dtype)
        self.actions = np.empty((self.horizon, A), np.float32)
        self.rewards = np.empty(self.horizon, np.float64)
        self.index = -1  # of the episode in it; -1: idle

    def start(self, part: Part, seed: int, index: int, policies: dict[str, LinearPolicy]) -> None:
        """Resets for episode `index` and draws all its randomness at once, in a fixed order."""
        source = np.random.SeedSequence([seed, zlib.crc32(part.name.encode()), index])
        rng = np.random.default_rng(source)
        self.index, self.length, self.terminated, self.truncated = index, 0, False, False
        self.seed = int(source.generate_state(1)[0])
        self.snapshot = part.snapshots[rng.integers(len(part.snapshots))]
        self.noise_std = float(rng.uniform(*part.noise_std))
        self.random_prob = 1.0 if self.snapshot == "random" else float(rng.uniform(*part.random_prob))
        self.policy = policies.get(self.snapshot)
        shape = self.actions.shape  # [T, A]
        self.noise = self.noise_std * 0.5 * (self.high - self.low) * rng.standard_normal(shape)
        self.is_random = rng.random(shape[0]) < self.random_prob
        self.random_actions = rng.uniform(self.low, self.high, shape)
        self.observations[0], _ = self.env.reset(seed=self.seed)

    def step(self, action: np.ndarray) -> None:
        """Takes the policy's action [A], noise added and clipped, or a random one."""
        t = self.length
        action = self.random_actions[t] if self.is_random[t] else action + self.noise[t]
        self.actions[t] = np.clip(action, self.low, self.high)
        observation, self.rewards[t], self.terminated, self.truncated, _ = self.env.step(self.actions[t])
        self.length = t + 1
        self.observations[t + 1] = observation

    def take(self) -> _Episode:
        """The finished episode, copied out; the slot is idle afterwards."""
        T = self.length
        self.index = -1
        return _Episode(
            self.seed,
            self.snapshot,
            self.noise_std,
            self.random_prob,
            self.observations[: T + 1].copy(),
            self.actions[:T].copy(),
            self.rewards[:T].copy(),
            self.terminated,
            self.truncated,
            cut=False,
        )


def _cut(episode: _Episode, steps: int) -> _Episode:
    """The episode's first `steps` steps; its end is a truncation unless it ended by itself just there."""
    if len(episode.rewards) > steps:
        episode.observations = episode.observations[: steps + 1]
        episode.actions, episode.rewards = episode.actions[:steps], episode.rewards[:steps]
        episode.terminated = episode.truncated = False
    if not (episode.terminated or episode.truncated):
        episode.truncated = episode.cut = True
    return episode


def _collect(
    env_id: str,
    part: Part,
    seed: int,
    num_envs: int,
    *,
    steps: int | None = None,
    episodes: int = MAX_STEPS,
    advance: Callable[[int], None] = lambda kept: None,
) -> Iterator[_Episode]:
    """Yields episodes 0, 1, 2, ... of a part, in order, until they hold `steps` steps, or `episodes` of them.

    Episode j is needed only while episodes 0 .. j-1 hold fewer than `steps` steps; what they hold so far is a
    lower bound, so an episode that this bound rules out is never started, or dropped.
    """
    with contextlib.ExitStack() as stack:
        slots = [_Slot(env_id)]
        stack.callback(slots[0].env.close)
        wanted = episodes if steps is None else -(-steps // slots[0].horizon)  # more would only run ahead
        for _ in range(min(num_envs, wanted) - 1):
            slots.append(_Slot(env_id))
            stack.callback(slots[-1].env.close)

        policies = {
            s: behaviour_policy(s.rsplit("/", 1)[0], int(s.rsplit("/", 1)[1]))
            for s in part.snapshots
            if "/" in s
        }
        limit = sys.maxsize if steps is None else steps
        finished: dict[int, _Episode] = {}  # those that wait for an earlier one
        launched = yielded = yielded_steps = 0
        while True:
            running = {slot.index: slot for slot in slots if slot.index >= 0}
            held = (
                yielded_steps
                + sum(len(e.rewards) for e in finished.values())
                + sum(s.length for s in running.values())
            )
            advance(min(limit, held))
            if held >= limit:
                bound = yielded_steps  # steps surely held by the episodes before j
                for j in sorted(running.keys() | finished.keys()):
                    if bound >= limit:
                        finished.pop(j, None)
                        if j in running:
                            running.pop(j).index = -1
                        continue
                    bound += running[j].length if j in running else len(finished[j].rewards)
                    if bound >= limit and j in running:
                        # Long enough, whatever the earlier ones turn out to be.
                        finished[j] = running.pop(j).take()
            else:
                for slot in slots:
                    if slot.index < 0 and launched < episodes:
                        slot.start(part, seed, launched, policies)
                        running[launched] = slot
                        launched += 1
            while yielded in finished and yielded_steps < limit:
                episode = finished.pop(yielded)
                if steps is not None:
                    episode = _cut(episode, min(len(episode.rewards), limit - yielded_steps))
                yielded, yielded_steps = yielded + 1, yielded_steps + len(episode.rewards)
                yield episode
            if not running:
                return
            for slot, action in zip(running.values(), _policy_actions(list(running.values())), strict=True):
                slot.step(action)
                if slot.terminated or slot.truncated:
                    index = slot.index  # take() clears it
                    finished[index] = slot.take()


def _policy_actions(slots: list[_Slot]) -> np.ndarray:
    """The noise-free actions [N, A] of the running episodes."""
    observations = np.stack([slot.observations[slot.length] for slot in slots])  # [N, S]
    if slots[0].snapshot == "controller":
        return energy_controller(observations)
    actions = np.zeros((len(slots), slots[0].actions.shape[1]))  # [N, A]; the random policy's rows stay 0
    rows = [i for i, slot in enumerate(slots) if slot.policy is not None]
    if rows:
        policies = [slots[i].policy for i in rows]
        M, mean, std = (np.stack([getattr(p, key) for p in policies]) for key in ("M", "mean", "std"))
        actions[rows] = _linear_actions(M, mean, std, observations[rows])
    return actions


@functools.cache
def _reference_scores(env_id: str) -> tuple[float, float]:
    """Mean returns of the random policy and of the best behaviour policy without noise, measured here."""
    env = env_id.split("-")[0].lower()
    best = "controller" if env == "pendulum" else behaviour_policy(env).name
    means = []
    for snapshot in ("random", best):
        part = Part(f"{env}/reference", (snapshot,))
        episodes = _collect(env_id, part, REFERENCE_SEED, 4, episodes=REFERENCE_EPISODES)
        means.append(float(np.mean([episode.rewards.sum() for episode in episodes])))
    return means[0], means[1]


# --------------------------------------------------------------------------- the dataset
def make_dataset(
    name: str,
    *,
    steps: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    num_envs: int = 16,
) -> MadeDataset:
    """Makes a dataset where Minari finds it (MINARI_DATASETS_PATH, or ~/.minari/datasets).

    It is written under a hidden name on the same disk and moved to its place whole, so an interrupted make
    leaves nothing there. The same name, steps, seed and versions of gymnasium, mujoco and numpy give the same
    arrays.
    Each episode's metadata hold its environment seed and its behaviour: snapshot, noise_std and random_prob.

    Args:
        name: A dataset id or short name of `RECIPES`.
        steps: Environment steps in the dataset, 1 to 10 million; None takes the recipe's.
        seed: Any integer from 0.
        overwrite: Replace a dataset that is there, once the new one is whole.
        progress: Show a progress bar, if the standard error is a terminal.
        num_envs: Environments stepped together; it changes the speed only.

    Returns:
        The dataset's id, place, size, returns and reference scores.

    Raises:
        ValueError: Unknown name; steps, seed or num_envs out of range.
        FileExistsError: The dataset is there and `overwrite` is false.
        ModuleNotFoundError: The recipe needs mujoco.
        OSError: The disk has too little room.
    """
    recipe = resolve(name)
    steps = recipe.steps if steps is None else steps
    _check_whole("steps", steps, len(recipe.parts), MAX_STEPS)
    _check_whole("seed", seed, 0, None)
    _check_whole("num_envs", num_envs, 1, 1024)
    if recipe.needs_mujoco:
        _check_mujoco(recipe.id)
    from minari.storage.datasets_root_dir import get_dataset_path

    root, place = get_dataset_path(), get_dataset_path(recipe.id)
    if place.exists() and not overwrite:
        raise FileExistsError(
            f"the dataset {recipe.id} is already there, in {place}; pass overwrite=True "
            "(dql data make --overwrite) to replace it."
        )
    started = time.perf_counter()
    staging = Path(tempfile.mkdtemp(prefix=".dql-make-", dir=root))  # Minari's listing skips hidden folders
    try:
        with _quiet_mujoco():
            _check_room(recipe, steps, root)
            ref_min, ref_max = _reference_scores(recipe.env_id)
            with _progress_bar(recipe, steps, progress) as advance:
                returns, episodes = _write(
                    recipe, steps, seed, num_envs, (ref_min, ref_max), staging, advance
                )
        _publish(recipe.id, staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return MadeDataset(
        dataset_id=recipe.id,
        steps=steps,
        episodes=episodes,
        return_mean=float(np.mean(returns)),
        return_std=float(np.std(returns)),
        return_min=float(np.min(returns)),
        return_max=float(np.max(returns)),
        ref_min_score=ref_min,
        ref_max_score=ref_max,
        seconds=time.perf_counter() - started,
        path=place,
    )


def _check_whole(name: str, value: int, low: int, high: int | None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or value < low
        or (high and value > high)
    ):
        allowed = f"an integer of {low:,} or more" if high is None else f"an integer from {low:,} to {high:,}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _check_mujoco(dataset_id: str) -> None:
    try:
        import mujoco  # noqa: F401, I001

        import gymnasium.envs.mujoco  # noqa: F401  after mujoco, without which it raises no ImportError
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the recipe {dataset_id} needs mujoco ({error}); "
            'install it with: pip install "diffusion-ql[mujoco]"'
        ) from error


def _check_room(recipe: Recipe, steps: int, root: Path) -> None:
    slot = _Slot(recipe.env_id)
    row = slot.observations[0].nbytes + slot.actions[0].nbytes + slot.rewards[0].nbytes + 2
    slot.env.close()
    # HDF5 fills up chunks and describes each array: 26 bytes a row became 100 (Pendulum), 110 became 142
    # (Hopper).
    needed = steps * (2 * row + 100) + 2**24
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{recipe.id} with {steps:,} steps needs about {needed / 1e6:,.0f} MB in {root}, "
            f"where {free / 1e6:,.0f} MB are free; make room, take fewer steps, or set "
            "MINARI_DATASETS_PATH to another disk.",
        )


def _write(
    recipe: Recipe,
    steps: int,
    seed: int,
    num_envs: int,
    references: tuple[float, float],
    staging: Path,
    advance: Callable[[int], None],
) -> tuple[list[float], int]:
    """Collects and writes the dataset under `staging`; gives the returns and the number of episodes."""
    import minari
    from minari.data_collector import EpisodeBuffer

    dataset = None
    whole: list[float] = []  # returns
    cut: list[float] = []
    behaviours: list[dict[str, str | float]] = []
    for chunk in _chunks(_all_episodes(recipe, steps, seed, num_envs, advance)):
        buffers = []
        for episode in chunk:
            T = len(episode.rewards)
            terminations, truncations = np.zeros(T, bool), np.zeros(T, bool)
            terminations[-1], truncations[-1] = episode.terminated, episode.truncated
            arrays = (episode.observations, episode.actions, episode.rewards, terminations, truncations)
            buffers.append(EpisodeBuffer(None, episode.seed, None, *arrays))
            (cut if episode.cut else whole).append(float(episode.rewards.sum()))
            behaviours.append(
                {
                    "snapshot": episode.snapshot,
                    "noise_std": episode.noise_std,
                    "random_prob": episode.random_prob,
                }
            )
        if dataset is not None:
            with _interrupts_deferred():
                dataset.update_dataset_from_buffer(buffers)
            continue
        with _minari_root(staging), warnings.catch_warnings(), _interrupts_deferred():
            # An author's address and a link to the code are wanted of published datasets: this is not one.
            warnings.filterwarnings("ignore", message=r"`(code_permalink|author_email)`")
            dataset = minari.create_dataset_from_buffers(
                recipe.id,
                buffers,
                env=recipe.env_id,  # without it Minari drops the reference scores
                eval_env=recipe.env_id,
                algorithm_name="dql.collect",
                author="diffusion-ql",
                description=_description(recipe, steps, seed),
                ref_min_score=references[0],
                ref_max_score=references[1],
                num_episodes_average_score=REFERENCE_EPISODES,
                data_format="hdf5",
                requirements=[f"{package}=={version}" for package, version in _versions(recipe).items()],
            )
    assert dataset is not None  # steps >= 1, so there was a chunk
    with _interrupts_deferred():
        dataset.storage.update_episode_metadata(behaviours, range(len(behaviours)))
    return whole or cut, len(behaviours)


def _all_episodes(
    recipe: Recipe, steps: int, seed: int, num_envs: int, advance: Callable[[int], None]
) -> Iterator[_Episode]:
    done = 0
    for k, part in enumerate(recipe.parts, start=1):
        share = steps * k // len(recipe.parts) - done

        def advance_from_here(held: int, before: int = done) -> None:
            advance(before + held)

        yield from _collect(recipe.env_id, part, seed, num_envs, steps=share, advance=advance_from_here)
        done += share


def _chunks(episodes: Iterator[_Episode]) -> Iterator[list[_Episode]]:
    chunk: list[_Episode] = []
    steps = 0
    for episode in episodes:
        chunk.append(episode)
        steps += len(episode.rewards)
        if steps >= _CHUNK_STEPS:
            yield chunk
            chunk, steps = [], 0
    if chunk:
        yield chunk


def _versions(recipe: Recipe) -> dict[str, str]:
    from importlib.metadata import version

    return {p: version(p) for p in ("gymnasium", "numpy", *(("mujoco",) if recipe.needs_mujoco else ()))}


def _description(recipe: Recipe, steps: int, seed: int) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in _versions(recipe).items())
    return (
        f"{recipe.description} Made by `dql data make {recipe.short_name}`, {steps} steps, seed {seed}, "
        f"with {versions}. The last episode of each of its {len(recipe.parts)} part(s) may be cut and is "
        "then marked as truncated. Reference scores: mean return of the random policy and of the best "
        f"behaviour policy without noise, {REFERENCE_EPISODES} episodes each, measured where it was made. "
        "This is not D4RL data; never compare scores with D4RL's."
    )


def _publish(dataset_id: str, staging: Path, place: Path) -> None:
    """Moves the dataset from `staging` to its place, which it takes whole; one that was there goes last."""
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = dataset_id.rsplit("/", 1)[0]
    if namespace not in list_local_namespaces():
        create_namespace(namespace)
    old = staging / "replaced"
    if place.exists():
        place.rename(old)
    try:
        (staging / dataset_id).rename(place)
    except BaseException:
        if old.exists():
            old.rename(place)
        raise


@contextlib.contextmanager
def _minari_root(path: Path) -> Iterator[None]:
    """Minari takes its root from the environment only, so it is set there for one call."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done.

    Python drops an exception that a signal raises inside a weakref callback, and h5py runs thousands of those
    while it writes: the key press would be lost.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """Keeps mujoco from writing MUJOCO_LOG.TXT into the working directory about HalfCheetah's model file."""
    mujoco = sys.modules.get("mujoco")
    if mujoco is None:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(
        lambda text: None if "settotalmass" in str(text) else warnings.warn(str(text), stacklevel=2)
    )
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


@contextlib.contextmanager
def _progress_bar(recipe: Recipe, steps: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the number of steps held so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(recipe.id),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]:,.0f} steps/s"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("collect", total=steps, speed=0.0)
        yield lambda held: bar.update(
            task, completed=held, speed=held / (time.perf_counter() - started + 1e-9)
        )
