"""Training: data in, run folder out. A run that is killed and resumed ends as if it had never been."""

import contextlib
import hashlib
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from dql import __version__
from dql.agents.base import Agent
from dql.agents.registry import load, make_agent
from dql.checkpoint import CheckpointError, checked_device
from dql.config import DIFFUSION, RunConfig
from dql.data import SHARE, DatasetError, DatasetInfo, TransitionDataset, load_dataset
from dql.evaluate import make_limited
from dql.loop import Loop, LoopState, RunResult, TrainingDivergedError, log_owed
from dql.rundir import RunDir, RunError, drop_rows_after
from dql.terminal import make_console

__all__ = [
    "OtherSettingsError",
    "RunResult",
    "TrainingDivergedError",
    "complete",
    "default_run_dir",
    "resolve_device",
    "resume",
    "train",
]


class OtherSettingsError(RunError):
    """The folder of a run holds one with other settings; the message names them."""


def default_run_dir(run: RunConfig) -> Path:
    """runs/<dataset>-<algorithm>-seed<seed>, with -one-step after an algorithm that takes its gradient so."""
    algorithm = run.agent.algorithm + ("-one-step" if run.agent.actor_gradient == "one-step" else "")
    return Path("runs") / f"{dataset_name(run.dataset)}-{algorithm}-seed{run.agent.seed}"


def dataset_name(dataset: str) -> str:
    """What folders are called after a dataset."""
    name = Path(dataset).stem if dataset.endswith(".hdf5") else dataset
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name).strip("-.")


def resolve_device(name: str) -> torch.device:
    """The device that a RunConfig names.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checked_device(name)


def _device_of(run: RunConfig) -> torch.device:
    device = resolve_device(run.device)
    if run.graphed and run.agent.algorithm not in DIFFUSION:
        raise RunError(
            f"--graphed records an update of {' or '.join(DIFFUSION)}, and this is {run.agent.algorithm}; leave it out"
        )
    if run.graphed and device.type != "cuda":
        raise RunError(
            f"--graphed records a CUDA graph, and this run is on {device}; leave it out or use --device cuda"
        )
    return device


def train(run: RunConfig, *, dataset: TransitionDataset | None = None, console: Console | None = None) -> RunResult:
    """Starts a run and takes it to its end.

    An evaluation that fails (the environment raises, or shows NaN) is reported in a line and has an empty line in
    evaluations.csv; the run goes on.

    Args:
        run: what to do; `run.agent.max_action` is replaced by the dataset's.
        dataset: already loaded (with `run.agent.reward_tune` applied); None loads `run.dataset`.
        console: where progress is shown; None for a new one.

    Raises:
        RunError: the folder holds a run already, is in use or holds a link, or the dataset's rewards are tuned
            otherwise.
        ValueError: the device is not there.
        DatasetError: the data, or the environment to evaluate in, cannot be used.
        CheckpointError: the disk is full or not writable.
        TrainingDivergedError: a loss became NaN.
    """
    console = console or make_console()
    folder = RunDir(run.run_dir or default_run_dir(run))
    with _locked(folder):
        if folder.holds_a_run() and not folder.config_path.exists():
            raise RunError(
                f"{folder.path} holds the remains of a run without its config.json; remove it or choose --run-dir"
            )
        if folder.config_path.exists():
            raise RunError(
                f"{folder.path} holds a run already; continue it with "
                f"`dql train --resume {shlex.quote(str(folder.path))}`, or choose another folder with --run-dir"
            )
        folder.clean()
        device = _device_of(run)
        if run.threads > (os.cpu_count() or 1):
            raise RunError(f"--threads {run.threads} is more than the {os.cpu_count()} cores of this machine")
        if run.threads:
            torch.set_num_threads(run.threads)
        data = _load(run) if dataset is None else dataset
        _check_reward_tune(run, data)
        data = _placed(run, data, device)
        run = run.with_agent(max_action=data.max_action)
        info = evaluation_info(run, data.info, typed=True)
        check_environment(run, info)
        agent = _new_agent(run, data, device)
        fingerprint = fingerprint_of(data)
        threads = torch.get_num_threads()
        described = _describe(run, data, info, fingerprint, threads, in_memory=dataset is not None)
        folder.write_json("config.json", described)
        return Loop(run, folder, data, info, agent, console, _origin(run, fingerprint, info)).run()


def resume(
    path: str | os.PathLike[str],
    *,
    num_updates: int | None = None,
    data_on: str | None = None,
    eval_every: int | None = None,
    eval_episodes: int | None = None,
    eval_max_steps: int | None = None,
    env: str | None = None,
    dataset: TransitionDataset | None = None,
    console: Console | None = None,
) -> RunResult:
    """Continues a run from its last checkpoint, exactly.

    Evaluations do not change what is learnt, so they may be changed. Where their environment cannot be made on this
    machine, the run goes on with a warning, and its evaluations count as failed. Returns in another environment are not
    compared with those before: "best" is the best of those since.

    Args:
        path: the run folder.
        num_updates: a new length; only with a constant learning rate, whose past does not depend on it.
        data_on: instead of the run's own; the batches are the same.
        eval_every: instead of the run's own; 0 for no more evaluations, one that is owed included.
        eval_episodes: instead of the run's own.
        eval_max_steps: instead of the run's own.
        env: instead of the run's own.
        dataset: the one this run began with, already loaded; None loads the run's.
        console: where progress is shown.

    Raises: as `train`; also RunError for a folder that is no run, has no checkpoint, whose checkpoint is not its own,
        or whose dataset has changed; DatasetError for an environment that is named here and cannot be used.
    """
    console = console or make_console()
    folder = RunDir(path)
    written = folder.read_config()
    run = RunConfig.from_dict(written["run"])
    changes = {"eval_every": eval_every, "eval_episodes": eval_episodes, "eval_max_steps": eval_max_steps, "env": env}
    changes["data_on"] = data_on
    run = replace(run, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if env is None and run.env is not None and ":" in run.env and run.eval_every:
        raise RunError(
            f"this run evaluates in {run.env!r}, and no module is imported because a folder says so: give "
            f"--env {shlex.quote(run.env)} again if you trust it, or --eval-every 0"
        )
    with _locked(folder):
        if num_updates is not None and num_updates != run.agent.num_updates:
            if run.agent.lr_schedule != "constant":
                raise RunError(
                    "the length of a run with a cosine schedule cannot be changed: its past depends on it; begin a new "
                    "run, of that length or with --lr-schedule constant"
                )
            done = max(folder.steps(), default=0)
            if num_updates < done:
                raise RunError(f"{path} has done {done:,} updates already; --num-updates {num_updates:,} is fewer")
            run = run.with_agent(num_updates=num_updates)
        device = _device_of(run)
        torch.set_num_threads(written["threads"])  # sums over rows depend on how threads split them
        data = _placed(run, _load_again(run, written) if dataset is None else dataset, device)
        _check_reward_tune(run, data)
        fingerprint = fingerprint_of(data)
        check_fingerprint(run, fingerprint, written)
        info = evaluation_info(run, data.info, typed=env is not None)
        unable = _why_not_evaluated(run, info)
        if unable is not None and env is not None:
            raise unable
        folder.clean()
        agent, state = _last_checkpoint(folder, run, data, info, fingerprint, device)
        in_memory = bool(written["dataset"].get("in_memory"))
        described = _describe(run, data, info, fingerprint, written["threads"], in_memory=in_memory)
        folder.write_json("config.json", described)
        step = agent.step
        drop_rows_after(folder.metrics_path, step - 1 if state is not None and log_owed(run, state, step) else step)
        evaluated = state is not None and not state.evaluation_owed
        drop_rows_after(folder.evaluations_path, step if evaluated else step - 1)
        if state is not None and not run.eval_every:
            state.evaluation_owed = False
        longer = ": --num-updates N lengthens it" if run.agent.lr_schedule == "constant" else ""
        complete = f" (it is complete{longer})" if step >= run.agent.num_updates else ""
        console.print(f"resuming {path} at update {step:,}{complete}", markup=False, soft_wrap=True)
        if unable is not None:
            console.print(
                f"warning: its evaluations are left out, their lines in evaluations.csv empty: {unable}",
                markup=False,
                soft_wrap=True,
            )
        origin = _origin(run, fingerprint, info)
        return Loop(run, folder, data, info, agent, console, origin, state, evaluates=unable is None).run()


def complete(run: RunConfig, *, console: Console | None = None) -> tuple[Agent, str | None]:
    """Takes the run of this config to its end, whatever its folder holds of it: all, a part, or nothing.

    Returns:
        the agent, and the name of the signal that ended the run early, or None.

    Raises:
        RunError: the folder holds a run of another config; and as `train`.
    """
    folder = RunDir(run.run_dir or default_run_dir(run))
    if not folder.config_path.exists():
        result = train(run, console=console)
        return result.agent, result.stopped_by
    old = RunConfig.from_dict(folder.read_config()["run"])
    expected = replace(run.with_agent(max_action=old.agent.max_action), run_dir=old.run_dir)
    if differing := [name for name, value in vars(expected).items() if getattr(old, name) != value]:
        raise OtherSettingsError(
            f"{folder.path} holds a run with other settings ({', '.join(differing)}); remove it, or choose "
            "another folder"
        )
    steps = folder.steps()
    written = folder.policy_path.exists() or run.agent.algorithm not in DIFFUSION
    if (
        steps
        and steps[-1] == run.agent.num_updates
        and written
        and not folder.read_loop(steps[-1]).get("evaluation_owed")
    ):
        check_fingerprint(run, fingerprint_of(_load(run)), folder.read_config())
        return load(folder.path, str(steps[-1]), device=resolve_device(run.device)), None
    result = resume(folder.path, env=run.env, console=console)  # named here, so that a module of it is trusted
    return result.agent, result.stopped_by


@contextmanager
def _locked(folder: RunDir) -> Iterator[None]:
    folder.lock()
    try:
        yield
    finally:
        folder.unlock()


def _check_reward_tune(run: RunConfig, data: TransitionDataset) -> None:
    if data.reward_tune != run.agent.reward_tune:
        raise RunError(
            f"the dataset's rewards are tuned {data.reward_tune!r}, the agent's config says "
            f"{run.agent.reward_tune!r}; load it with load_dataset(..., reward_tune={run.agent.reward_tune!r})"
        )


def _load(run: RunConfig) -> TransitionDataset:
    in_memory: bool | Literal["auto"] = False if run.data_on == "disk" else "auto"
    if run.data_on == "device" and resolve_device(run.device).type == "cpu":
        in_memory = True
    return load_dataset(
        run.dataset, reward_tune=run.agent.reward_tune, drop_broken=run.drop_broken, in_memory=in_memory
    )


def _placed(run: RunConfig, data: TransitionDataset, device: torch.device) -> TransitionDataset:
    """The data on the device, or on the CPU, from which the loop has their batches staged."""
    stays = run.data_on == "disk" or (run.data_on == "auto" and not _fits(data, device))
    return data.to("cpu" if stays else device)


def _fits(data: TransitionDataset, device: torch.device) -> bool:
    if device.type != "cuda" or data.device == device:
        return True
    return data.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]


def _load_again(run: RunConfig, written: dict[str, Any]) -> TransitionDataset:
    try:
        return _load(run)
    except DatasetError as error:
        if not written["dataset"].get("in_memory"):
            raise
        raise RunError(
            f"this run began with a dataset that was handed over in memory, and {run.dataset!r} cannot be loaded; "
            "resume it in Python: dql.train.resume(path, dataset=...)"
        ) from error


def _new_agent(run: RunConfig, data: TransitionDataset, device: torch.device) -> Agent:
    agent = make_agent(data.state_dim, data.action_dim, run.agent, device=device)
    agent.begin(data)
    return agent


def _last_checkpoint(
    folder: RunDir, run: RunConfig, data: TransitionDataset, info: DatasetInfo, fingerprint: str, device: torch.device
) -> tuple[Agent, LoopState | None]:
    """Agent and loop of the last checkpoint, known to be this run's; a new agent if none is saved yet.

    Raises:
        RunError: the checkpoint is damaged or another run's.
    """
    steps = folder.steps()
    if not steps:  # killed before the first checkpoint: from the start, which is as exact
        return _new_agent(run, data, device), None
    step = steps[-1]
    path = folder.checkpoint_path(step)
    earlier = f"update {steps[-2]:,}" if len(steps) > 1 else "the beginning"
    remedy = f"remove {path}, and resuming starts from {earlier}"
    try:
        agent = load(path, device=device)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):  # it could not be read, which says nothing against it
            raise
        raise RunError(f"{error}: {remedy}") from error
    loop = folder.read_loop(step)
    of = loop.pop("of", {"step": step})  # an earlier version wrote none
    loop.pop("agent", None)  # nor that
    sizes = (agent.state_dim, agent.action_dim)
    differing = run.agent.differences(agent.config)
    if agent.step != step:
        differing.append(f"update {agent.step:,}, its folder is named for {step:,}")
    if sizes != (data.state_dim, data.action_dim):
        differing.append(f"sizes {sizes}, the dataset's are {(data.state_dim, data.action_dim)}")
    differing += folder.foreign(step)
    if differing:
        raise RunError(
            f"{path} is no checkpoint of this run: it is of {differing[0]}; restore it and config.json, or {remedy}"
        )
    try:
        state = LoopState.from_dict(loop)
    except ValueError as error:
        raise RunError(f"{path / 'loop.json'} is damaged: {error}; {remedy}") from error
    evaluated_in = _origin(run, fingerprint, info)["evaluated_in"]
    if of.get("evaluated_in", evaluated_in) != evaluated_in:
        # Returns in another environment say nothing of those in this one.
        state.scored = [replace(scored, return_mean=math.nan) for scored in state.scored]
    agent.config = replace(agent.config, num_updates=run.agent.num_updates)
    return agent, state


def _origin(run: RunConfig, fingerprint: str, info: DatasetInfo) -> dict[str, Any]:
    """Whose a checkpoint is, beside the agent's config, and where its evaluations were."""
    return {"seed": run.agent.seed, "fingerprint": fingerprint, "evaluated_in": [info.env_spec, run.eval_max_steps]}


def evaluation_info(run: RunConfig, info: DatasetInfo, *, typed: bool) -> DatasetInfo:
    """The dataset's info, with the environment to evaluate in; `typed` if the user named it, and no run folder."""
    return info if run.env is None else info.with_env(run.env, typed=typed)


def check_environment(run: RunConfig, info: DatasetInfo) -> None:
    """Builds the environment to evaluate in once, so that nothing fails hours later.

    Raises:
        RunError: the dataset names none.
        DatasetError: it cannot be made or used.
    """
    if not run.eval_every:
        return
    if info.env_spec is None:
        raise RunError(
            f"dataset {info.dataset_id} names no environment to evaluate in; name one with --env, "
            "or train without evaluations, --eval-every 0"
        )
    env = make_limited(info, run.eval_max_steps)
    with contextlib.suppress(Exception, SystemExit):  # nothing depends on how it closes
        env.close()


def _why_not_evaluated(run: RunConfig, info: DatasetInfo) -> RunError | DatasetError | None:
    try:
        check_environment(run, info)
    except (RunError, DatasetError) as error:
        return error
    return None


def check_fingerprint(run: RunConfig, found: str, written: dict[str, Any]) -> None:
    """Raises RunError if that is not the dataset of the run whose config.json holds `written`."""
    began = written["dataset"]["fingerprint"]
    if found != began:
        raise RunError(
            f"dataset {run.dataset} is not the one this run began with (fingerprint {found}, it was {began}); restore "
            "it or start a new run"
        )


def fingerprint_of(data: TransitionDataset) -> str:
    """A digest of all transitions."""
    digest = hashlib.blake2b(digest_size=8)
    with data.in_order():
        for tensor in (data.states, data.actions, data.rewards, data.next_states, data.masks):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _describe(
    run: RunConfig, data: TransitionDataset, info: DatasetInfo, fingerprint: str, threads: int, *, in_memory: bool
) -> dict[str, Any]:
    return {
        "run": run.to_dict(),
        "dataset": {
            "transitions": len(data),
            "state_dim": data.state_dim,
            "action_dim": data.action_dim,
            "fingerprint": fingerprint,
            "in_memory": in_memory,
            "info": json.loads(info.to_json()),
        },
        "threads": threads,
        "versions": {
            "dql": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
