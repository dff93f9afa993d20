"""Makes Minari datasets on this machine, offline, from behaviour policies that ship with the package.

What the datasets are is said in `recipes`, how their episodes come about in `episodes`; this module writes them.
`medium-expert` begins with the very episodes of `medium`. The episode that crosses the wanted number of steps is cut
there and marked as truncated, once a part.

None of this is D4RL's data: never set the scores beside D4RL's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dql.collect.episodes import MAX_STEPS, Episode, Slot
from dql.collect.episodes import collect as collect_episodes
from dql.collect.recipes import Part, Recipe, behaviour_policy, resolve
from dql.shown import shown

REFERENCE_EPISODES = 20
REFERENCE_SEED = 123
_CHUNK_STEPS = 100_000  # steps held in memory before they go to the file


@dataclass(frozen=True)
class MadeDataset:
    """What was made. The return statistics leave out episodes that were cut, unless there are no others, which
    `complete_episodes` says."""

    dataset_id: str
    steps: int
    episodes: int
    complete_episodes: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    ref_min_score: float
    ref_max_score: float
    seconds: float
    path: Path


@functools.cache
def _reference_scores(env_id: str) -> tuple[float, float]:
    """Mean returns of the random policy and of the best behaviour policy without noise, measured here."""
    env = env_id.split("-")[0].lower()
    best = "controller" if env == "pendulum" else behaviour_policy(env).name
    means = []
    for snapshot in ("random", best):
        part = Part(f"{env}/reference", (snapshot,))
        episodes = collect_episodes(env_id, part, REFERENCE_SEED, 4, episodes=REFERENCE_EPISODES)
        means.append(float(np.mean([episode.rewards.sum() for episode in episodes])))
    return means[0], means[1]


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
    Each episode's metadata hold its environment seed, its behaviour (snapshot, noise_std and random_prob) and whether
    it was cut.

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

    from dql.environments import quiet_mujoco

    root, place = get_dataset_path(), get_dataset_path(recipe.id)
    if place.exists() and not overwrite:
        raise FileExistsError(
            f"the dataset {recipe.id} is already there, in {place}; pass overwrite=True "
            "(dql data make --overwrite) to replace it."
        )
    started = time.perf_counter()
    for left in root.glob(".dql-make-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".dql-make-", dir=root))  # Minari's listing skips hidden folders
    try:
        with quiet_mujoco():
            _check_room(recipe, steps, root)
            ref_min, ref_max = _reference_scores(recipe.env_id)
            with _progress_bar(recipe, steps, progress) as advance:
                returns, episodes, complete = _write(
                    recipe, steps, seed, num_envs, (ref_min, ref_max), staging, advance
                )
        _publish(recipe.id, staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return MadeDataset(
        dataset_id=recipe.id,
        steps=steps,
        episodes=episodes,
        complete_episodes=complete,
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
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low or (high and value > high):
        allowed = f"an integer of {low:,} or more" if high is None else f"an integer from {low:,} to {high:,}"
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}.")


def _check_mujoco(dataset_id: str) -> None:
    try:
        import mujoco  # noqa: F401, I001

        import gymnasium.envs.mujoco  # noqa: F401  after mujoco, without which it raises no ImportError
    except ImportError as error:
        raise ModuleNotFoundError(
            f'the recipe {dataset_id} needs mujoco ({error}); install it with: pip install "diffusion-ql[mujoco]"'
        ) from error


def _check_room(recipe: Recipe, steps: int, root: Path) -> None:
    slot = Slot(recipe.env_id)
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
) -> tuple[list[float], int, int]:
    """Collects and writes the dataset under `staging`; gives the returns, the number of episodes and of whole ones."""
    import minari
    from minari.data_collector import EpisodeBuffer

    dataset = None
    whole: list[float] = []  # returns
    cut: list[float] = []
    behaviours: list[dict[str, str | float | bool]] = []
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
                    "cut": episode.cut,  # `dql.datasets.minari` leaves its return out, too
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
    return whole or cut, len(behaviours), len(whole)


def _all_episodes(
    recipe: Recipe, steps: int, seed: int, num_envs: int, advance: Callable[[int], None]
) -> Iterator[Episode]:
    done = 0
    for k, part in enumerate(recipe.parts, start=1):
        share = steps * k // len(recipe.parts) - done

        def advance_from_here(held: int, before: int = done) -> None:
            advance(before + held)

        yield from collect_episodes(recipe.env_id, part, seed, num_envs, steps=share, advance=advance_from_here)
        done += share


def _chunks(episodes: Iterator[Episode]) -> Iterator[list[Episode]]:
    chunk: list[Episode] = []
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
def _progress_bar(recipe: Recipe, steps: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the number of steps held so far."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from dql.terminal import make_console

    console = make_console(stderr=True)
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
        yield lambda held: bar.update(task, completed=held, speed=held / (time.perf_counter() - started + 1e-9))
