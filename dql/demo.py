"""`dql demo`: from nothing to a diffusion policy that beats its data, in minutes on a CPU."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dql import noise
from dql.agent import DiffusionBC, load
from dql.config import Config, RunConfig
from dql.data import TransitionDataset, load_dataset
from dql.evaluate import confidence_interval, evaluate
from dql.policy import DiffusionPolicy
from dql.report import action_distribution, learning_curve
from dql.rundir import RunDir, RunError
from dql.sampler import sample
from dql.train import resume, train

T = TypeVar("T")
ETA = 20.0  # the paper's 1 leaves the policy near the data, two thirds of whose actions are random
DATASET = "dql/pendulum/mixed-v0"
CLONING = 5  # times as many updates, each far shorter: after as many its return is far below the data's
_ALGORITHMS = {"DiffusionBC": "diffusion-bc", "Diffusion-QL": "diffusion-ql"}
# angle from upright in degrees, angular velocity in radians per second
_STATES = ((180.0, 0.0), (120.0, 4.0), (30.0, -1.0), (0.0, 0.0))


def demo(folder: Path, *, updates: int, episodes: int, seed: int, fresh: bool, console: Console) -> dict[str, float]:
    """Makes the data, trains DiffusionBC and Diffusion-QL on it, evaluates both, and writes table and pictures.

    What an earlier, interrupted demo finished is used again.

    Args:
        folder: where runs, pictures and the policy go.
        updates: of Diffusion-QL; DiffusionBC does CLONING times as many.
        episodes: of the final evaluation.
        seed: of training; the dataset's is always 0.
        fresh: start over, dropping the folder's earlier demo.
        console: where it speaks.

    Returns:
        mean return by name: data, DiffusionBC, Diffusion-QL, and Diffusion-QL's policy alone.

    Raises:
        RunError: the folder holds a demo with other settings.
        ValueError: a setting that makes no run.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    lengths = {"DiffusionBC": CLONING * updates, "Diffusion-QL": updates}
    runs = {
        name: _run_config(folder / algorithm, algorithm, lengths[name], seed) for name, algorithm in _ALGORITHMS.items()
    }
    if fresh:
        for run in runs.values():  # the demo's own, whatever else the folder holds
            _remove(run.run_dir)
    dataset, seconds["data"] = _timed(lambda: _dataset(console))
    info = dataset.info
    console.print(f"data: {len(dataset):,} transitions of {DATASET}, {info.num_episodes} episodes")

    agents: dict[str, DiffusionBC] = {}
    for name, run in runs.items():
        console.print(f"training {name} for {lengths[name]:,} updates")
        agents[name], seconds[f"train {name}"] = _timed(partial(_train, run, console))

    results = {}
    for name, agent in agents.items():
        results[name], seconds[f"evaluate {name}"] = _timed(
            partial(evaluate, agent, info, episodes=episodes, seed=noise.derive(seed, "demo"))
        )

    alone = _PolicyAlone(agents["Diffusion-QL"].policy)
    results["Diffusion-QL, policy alone"], seconds["evaluate policy alone"] = _timed(
        partial(evaluate, alone, info, episodes=episodes, seed=noise.derive(seed, "demo"))
    )

    table = Table(
        title=f"Pendulum-v1: return (higher is better) of {episodes} episodes, {len(info.episode_returns)} of the data",
        caption="score: 0 is a random policy, 100 the controller without noise. Diffusion-QL acts as published: of "
        "50 candidates the critic chooses one. Policy alone: one sample, no critic, as DiffusionBC acts.",
    )
    for header in ("", "mean return", "95% interval", "score"):
        table.add_column(header, justify="left" if not header else "right")
    rows = {"data (behaviour)": info.episode_returns} | {name: r.returns for name, r in results.items()}
    for name, returns in rows.items():
        low, high = confidence_interval(returns)
        score = info.normalized_score(float(np.mean(returns)))
        table.add_row(
            name, f"{np.mean(returns):.1f}", f"[{low:.1f}, {high:.1f}]", "" if score is None else f"{score:.1f}"
        )
    console.print(table)

    def pictures() -> None:
        learning_curve(
            {name: folder / algorithm for name, algorithm in _ALGORITHMS.items()},
            info.episode_returns,
            folder / "learning_curve.png",
        )
        radians = torch.deg2rad(torch.tensor([angle for angle, _ in _STATES]))
        velocities = torch.tensor([velocity for _, velocity in _STATES])
        action_distribution(
            dataset,
            {name: agent.policy for name, agent in agents.items()} | {"Diffusion-QL, acting": agents["Diffusion-QL"]},
            folder / "actions.png",
            states=torch.stack([radians.cos(), radians.sin(), velocities], dim=1),
            titles=[f"{angle:.0f} deg from upright, {velocity:+.0f} rad/s" for angle, velocity in _STATES],
        )

    _, seconds["pictures"] = _timed(pictures)
    policy_path = folder / "policy.safetensors"
    agents["Diffusion-QL"].policy.save(policy_path)
    spent = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    plain = partial(console.print, soft_wrap=True)
    plain(f"seconds: {spent}; {time.perf_counter() - started:.0f} in all, {torch.get_num_threads()} thread(s)")
    plain(f"pictures: {folder / 'learning_curve.png'}, {folder / 'actions.png'}")
    plain(
        f"the agent, critic and all: dql.load({str(folder / _ALGORITHMS['Diffusion-QL'])!r}); its policy, in Python:\n"
    )
    for line in (
        "import dql, torch",
        f"policy = dql.DiffusionPolicy.load({str(policy_path)!r})",
        "print(dql.sample(torch.tensor([[-1.0, 0.0, 0.0]]), policy))  # hanging down, at rest",
    ):
        plain(f"    {line}")
    means = {name: r.return_mean for name, r in results.items()}
    return {"data": float(info.episode_returns.mean())} | means


class _PolicyAlone:
    """Acts by one sample of a policy."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy

    def act(self, states: np.ndarray, *, seed: int | None = None) -> np.ndarray:
        with torch.no_grad():
            return sample(torch.as_tensor(states, dtype=self.policy.dtype), self.policy, seed=seed).numpy()


def _remove(folder: Path | None) -> None:
    """Renamed first: a kill half-way must not leave half a run."""
    if folder is not None and folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _run_config(folder: Path, algorithm: str, updates: int, seed: int) -> RunConfig:
    return RunConfig(
        dataset=DATASET,
        agent=Config(algorithm=algorithm, num_updates=updates, eta=ETA, seed=seed),  # type: ignore[arg-type]
        run_dir=folder,
        device="cpu",
        checkpoint_every=500,
        keep=1,
        eval_every=max(updates // 4, 1),
        eval_episodes=10,
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _dataset(console: Console) -> TransitionDataset:
    from dql.collect import make_dataset
    from dql.datasets.sources import local_ids

    if DATASET not in local_ids():
        console.print(f"making {DATASET}")
        make_dataset(DATASET, seed=0)
    return load_dataset(DATASET)


def _train(run: RunConfig, console: Console) -> DiffusionBC:
    assert run.run_dir is not None
    folder = RunDir(run.run_dir)
    if folder.config_path.exists():
        old = RunConfig.from_dict(folder.read_config()["run"])
        if replace(old, agent=replace(old.agent, max_action=run.agent.max_action)) != run:
            raise RunError(f"{run.run_dir} holds a demo with other settings; start over with --fresh, or choose --out")
        if folder.policy_path.exists():
            console.print(f"  already trained: {run.run_dir}", soft_wrap=True)
            return load(folder.checkpoint_path(folder.steps()[-1]))
        result = resume(run.run_dir, console=console)
    else:
        result = train(run, console=console)
    if result.stopped_by is not None:
        raise KeyboardInterrupt(f"stopped by {result.stopped_by}; run dql demo again to continue")
    return result.agent
