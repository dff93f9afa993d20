"""`dql demo`: from nothing to a diffusion policy that beats its data and its clones, in minutes on a CPU."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dql import noise
from dql.agents.base import Agent
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.config import Config, RunConfig
from dql.data import TransitionDataset, load_dataset
from dql.evaluate import confidence_interval, evaluate
from dql.policy import DiffusionPolicy
from dql.report import action_distribution, learning_curve
from dql.rundir import RunDir, RunError
from dql.sampler import sample
from dql.train import OtherSettingsError, complete

T = TypeVar("T")
CLONE = 4  # updates of DiffusionBC for one of Diffusion-QL, which costs five: fewer leave it shorter of its data
ETA = 20.0  # the paper's 1 leaves the policy near the data, two thirds of whose actions are random
DATASET = "dql/pendulum/mixed-v0"
EVALUATIONS = 8  # of a run, beside that of the untrained agent
_ALGORITHMS = {"BC": "bc", "DiffusionBC": "diffusion-bc", "Diffusion-QL": "diffusion-ql"}
# angle from upright in degrees, angular velocity in radians per second
_STATES = ((180.0, 0.0), (120.0, 4.0), (30.0, -1.0), (0.0, 0.0))


def demo(folder: Path, *, updates: int, episodes: int, seed: int, fresh: bool, console: Console) -> dict[str, float]:
    """Makes the data, trains BC, DiffusionBC and Diffusion-QL on it, evaluates them, and writes table and pictures.

    What an earlier, interrupted demo finished is used again.

    Args:
        folder: where runs, pictures and the policy go.
        updates: of Diffusion-QL and BC; DiffusionBC takes CLONE times as many.
        episodes: of the final evaluation.
        seed: of training; the dataset's is always 0.
        fresh: start over, dropping the folder's earlier demo.
        console: where it speaks.

    Returns:
        mean return by name: data, BC, DiffusionBC, Diffusion-QL, and Diffusion-QL's policy alone.

    Raises:
        RunError: the folder holds a demo with other settings.
        ValueError: a setting that makes no run.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    lengths = {name: updates * (CLONE if algorithm == "diffusion-bc" else 1) for name, algorithm in _ALGORITHMS.items()}
    runs = {
        name: _run_config(folder / algorithm, algorithm, lengths[name], seed) for name, algorithm in _ALGORITHMS.items()
    }
    if fresh:
        for run in runs.values():  # the demo's own, whatever else the folder holds
            _remove(run.run_dir)
    dataset, seconds["data"] = _timed(lambda: _dataset(console))
    info = dataset.info
    console.print(f"data: {len(dataset):,} transitions of {DATASET}, {info.num_episodes} episodes")

    agents: dict[str, Agent] = {}
    for name, run in runs.items():
        console.print(f"training {name} for {run.agent.num_updates:,} updates")
        agents[name], seconds[f"train {name}"] = _timed(partial(_train, run, console))

    results = {}
    for name, agent in agents.items():
        results[name], seconds[f"evaluate {name}"] = _timed(
            partial(evaluate, agent, info, episodes=episodes, seed=noise.derive(seed, "demo"))
        )

    best = agents["Diffusion-QL"]
    assert isinstance(best, DiffusionQL)
    alone = _PolicyAlone(best.policy)
    results["Diffusion-QL, policy alone"], seconds["evaluate policy alone"] = _timed(
        partial(evaluate, alone, info, episodes=episodes, seed=noise.derive(seed, "demo"))
    )

    table = Table(
        title=f"Pendulum-v1: return (higher is better) of {episodes} episodes, {len(info.episode_returns)} of the data",
        caption="score: 0 is a random policy, 100 the controller without noise. BC: an MLP that regresses the action. "
        "Diffusion-QL acts as published: of 50 candidates the critic chooses one. Policy alone: one sample, no "
        "critic, as DiffusionBC acts.",
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
            {name: agent.policy for name, agent in agents.items() if isinstance(agent, DiffusionBC)}
            | {"Diffusion-QL, acting": best},
            folder / "actions.png",
            states=torch.stack([radians.cos(), radians.sin(), velocities], dim=1),
            titles=[f"{angle:.0f} deg from upright, {velocity:+.0f} rad/s" for angle, velocity in _STATES],
        )

    _, seconds["pictures"] = _timed(pictures)
    policy_path = folder / "policy.safetensors"
    best.policy.save(policy_path)
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
    own = {"eta": ETA} if algorithm == "diffusion-ql" else {}
    return RunConfig(
        dataset=DATASET,
        agent=Config(algorithm=algorithm, num_updates=updates, seed=seed, **own),  # type: ignore[arg-type]
        run_dir=folder,
        device="cpu",
        checkpoint_every=500,
        keep=1,
        eval_every=max(updates // EVALUATIONS, 1),
        eval_at_start=True,
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


def _train(run: RunConfig, console: Console) -> Agent:
    assert run.run_dir is not None
    before = RunDir(run.run_dir).steps()
    if before and before[-1] == run.agent.num_updates:
        console.print(f"  already trained: {run.run_dir}", soft_wrap=True)
    try:
        agent, stopped_by = complete(run, console=console)
    except OtherSettingsError as error:
        raise RunError(
            f"{run.run_dir} holds a demo with other settings; start over with --fresh, or choose --out"
        ) from error
    if stopped_by is not None:
        raise KeyboardInterrupt(f"stopped by {stopped_by}; run dql demo again to continue")
    return agent
