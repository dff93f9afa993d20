"""Training: data in, run folder out. A run that is killed and resumed ends as if it had never been."""

import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
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
from dql.loop import Following, Loop, LoopState, RunResult, TrainingDivergedError, log_owed
from dql.parallel import first_alone, processes, sharded
from dql.rundir import RunDir, RunError, drop_rows_after
from dql.session import SeedsFailedError, Session
from dql.terminal import make_console

__all__ = [
    "OtherSettingsError",
    "RunResult",
    "SeedsFailedError",
    "TrainingDivergedError",
    "complete",
    "default_run_dir",
    "of_seeds",
    "resolve_device",
    "resume",
    "resume_seeds",
    "seed_run_dir",
    "train",
    "train_seeds",
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
    (result,) = _train([run], dataset, console or make_console())
    return result


def train_seeds(
    run: RunConfig,
    seeds: Sequence[int],
    *,
    dataset: TransitionDataset | None = None,
    console: Console | None = None,
) -> list[RunResult]:
    """Runs of one config with several seeds, side by side in this process, with one dataset: on a CPU a core each.

    Each run has a folder of its own (`seed_run_dir`) and is, to the bit, the one that `train` does with its seed and
    as many threads as its config.json says; on "cpp" with any number. `resume`, `dql.load` and all others take it so.

    Args:
        run: what to do, but for the seed.
        seeds: different ones.
        dataset, console: as in `train`.

    Returns:
        the results, in the order of the seeds.

    Raises: as `train`, for the first run that cannot begin: then none has; once they have begun,
        SeedsFailedError: some failed, and the others have ended.
    """
    runs = of_seeds(run, seeds)
    for own in runs if run.run_dir is not None else ():
        if own.run_dir is not None and own.run_dir.is_symlink():  # who names a link means it; nobody named this one
            raise RunError(f"{own.run_dir} is a symbolic link; remove it, or choose another folder with --run-dir")
    return _train(runs, dataset, console or make_console())


def of_seeds(run: RunConfig, seeds: Sequence[int]) -> list[RunConfig]:
    """The runs of several seeds, each in its folder.

    Raises:
        ValueError: no seeds, or two equal ones.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")
    return [replace(run.with_agent(seed=seed), run_dir=seed_run_dir(run, seed)) for seed in seeds]


def seed_run_dir(run: RunConfig, seed: int) -> Path:
    """The folder of a seed among several: in `run.run_dir` seed<seed>, by default `default_run_dir`."""
    return default_run_dir(run.with_agent(seed=seed)) if run.run_dir is None else run.run_dir / f"seed{seed}"


def _train(runs: Sequence[RunConfig], dataset: TransitionDataset | None, console: Console) -> list[RunResult]:
    """Starts runs that differ in their seeds and folders alone, and takes them to their ends."""
    first = runs[0]
    folders = [RunDir(run.run_dir or default_run_dir(run)) for run in runs]
    with contextlib.ExitStack() as held:
        shard = held.enter_context(sharded(runs))
        writes = shard is None or shard.rank == 0
        if writes:
            for folder in folders:
                held.enter_context(_locked(folder))
                _check_unused(folder)
            for folder in folders:
                folder.clean()
        device = _device_of(first) if shard is None else shard.device
        if first.threads > (os.cpu_count() or 1):
            raise RunError(f"--threads {first.threads} is more than the {os.cpu_count()} cores of this machine")
        threads = first.threads or torch.get_num_threads()
        each = _threads_each(threads, len(runs), device)
        held.enter_context(torch_threads(each))
        with first_alone(shard):
            data = _load(first) if dataset is None else dataset
        _check_reward_tune(first, data)
        data = _placed(first, data, device)
        info = evaluation_info(first, data.info, typed=True)
        check_environment(first, info)
        fingerprint = fingerprint_of(data)
        loops = []
        for run, folder in zip(runs, folders, strict=True):
            run = run.with_agent(max_action=data.max_action)
            agent, origin = _new_agent(run, data, device), _origin(run, fingerprint, info)
            # each draws rows of its own from what it shares with the others
            name, kind = _name(run, runs), Loop if writes else Following
            loops.append(kind(run, folder, copy.copy(data), info, agent, console, origin, name=name))
        if shard is not None:
            shard.check_same(loops[0].config, loops[0].agent, fingerprint)
        with _all_or_none(folders if writes else []):
            for loop in loops if writes else ():
                described = _describe(loop.config, data, info, fingerprint, each, in_memory=dataset is not None)
                loop.folder.write_json("config.json", described)
        return Session(loops, console, threads, shard).run()


def prepare(run: RunConfig) -> tuple[Agent, TransitionDataset]:
    """A new agent of a run, and its data, both on the run's device; nothing is begun or written.

    Raises: as `train`, of devices and data.
    """
    device = _device_of(run)
    data = _placed(run, _load(run), device)
    return _new_agent(run.with_agent(max_action=data.max_action), data, device), data


def _name(run: RunConfig, runs: Sequence[RunConfig]) -> str:
    return f"seed {run.agent.seed}, " if len(runs) > 1 else ""


def _threads_each(threads: int, runs: int, device: torch.device) -> int:
    """Of torch's own kernels in each of several runs; the sums of some depend on it, so config.json holds it."""
    return max(1, threads // runs) if device.type == "cpu" else threads


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _all_or_none(folders: list[RunDir]) -> Iterator[None]:
    """Of runs that begin together none has begun if one cannot."""
    try:
        yield
    except BaseException:
        for folder in folders:
            folder.config_path.unlink(missing_ok=True)
        raise


def _check_unused(folder: RunDir) -> None:
    if folder.holds_a_run() and not folder.config_path.exists():
        raise RunError(
            f"{folder.path} holds the remains of a run without its config.json; remove it or choose --run-dir"
        )
    if folder.config_path.exists():
        raise RunError(
            f"{folder.path} holds a run already; continue it with "
            f"`dql train --resume {shlex.quote(str(folder.path))}`, or choose another folder with --run-dir"
        )


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
    (result,) = resume_seeds(
        [path],
        num_updates=num_updates,
        data_on=data_on,
        eval_every=eval_every,
        eval_episodes=eval_episodes,
        eval_max_steps=eval_max_steps,
        env=env,
        dataset=dataset,
        console=console,
    )
    return result


def resume_seeds(
    paths: Sequence[str | os.PathLike[str]],
    *,
    num_updates: int | None = None,
    data_on: str | None = None,
    eval_every: int | None = None,
    eval_episodes: int | None = None,
    eval_max_steps: int | None = None,
    env: str | None = None,
    dataset: TransitionDataset | None = None,
    console: Console | None = None,
) -> list[RunResult]:
    """`resume` of several runs side by side, as `train_seeds` began them: they may differ in their seeds, and in how
    far they have come.

    Args:
        paths: the run folders; the other arguments are those of `resume`.

    Raises: as `resume`, for the first run that cannot go on: then none does; RunError also for runs that differ in more
        than their seeds; SeedsFailedError: some failed on the way, and the others have ended.
    """
    changes = {"data_on": data_on, "eval_every": eval_every, "eval_episodes": eval_episodes, "env": env}
    changes["eval_max_steps"] = eval_max_steps
    console = console or make_console()
    folders = [RunDir(path) for path in paths]
    all_written = [folder.read_config() for folder in folders]
    runs = [_changed(RunConfig.from_dict(written["run"]), changes) for written in all_written]
    if len({folder.path.resolve() for folder in folders}) != len(folders):
        raise RunError("a run folder is named twice; name each once")
    with contextlib.ExitStack() as held:
        shard = held.enter_context(sharded(runs))
        writes = shard is None or shard.rank == 0
        for i, folder in enumerate(folders):
            if writes:
                held.enter_context(_locked(folder))
            runs[i] = _with_length(runs[i], folder, num_updates)
        _check_alike(folders, runs, all_written)
        device = _device_of(runs[0]) if shard is None else shard.device
        threads, each = runs[0].threads or torch.get_num_threads(), all_written[0]["threads"]
        held.enter_context(torch_threads(each))  # sums over rows depend on how threads split them
        with first_alone(shard):
            data = _load_again(runs[0], all_written[0]) if dataset is None else dataset
            for folder in folders if writes else ():
                folder.clean()
        data = _placed(runs[0], data, device)
        _check_reward_tune(runs[0], data)
        fingerprint = fingerprint_of(data)
        for run, written in zip(runs, all_written, strict=True):
            check_fingerprint(run, fingerprint, written)
        info = evaluation_info(runs[0], data.info, typed=env is not None)
        unable = _why_not_evaluated(runs[0], info)
        if unable is not None and env is not None:
            raise unable
        found = [
            _last_checkpoint(folder, run, data, info, fingerprint, device)
            for folder, run in zip(folders, runs, strict=True)
        ]
        if shard is not None:  # before the first process changes what the others read
            shard.check_same(runs[0], found[0][0], fingerprint)
        loops = []
        for run, folder, written, (agent, state) in zip(runs, folders, all_written, found, strict=True):
            in_memory = bool(written["dataset"].get("in_memory"))
            if writes:
                folder.write_json("config.json", _describe(run, data, info, fingerprint, each, in_memory=in_memory))
                _drop_what_comes_again(run, folder, agent.step, state)
            complete = f" (it is complete{_longer(run)})" if agent.step >= run.agent.num_updates else ""
            console.print(f"resuming {folder.path} at update {agent.step:,}{complete}", markup=False, soft_wrap=True)
            origin, name, able = _origin(run, fingerprint, info), _name(run, runs), unable is None
            own, kind = copy.copy(data), Loop if writes else Following
            loops.append(kind(run, folder, own, info, agent, console, origin, state, evaluates=able, name=name))
        if unable is not None:
            console.print(
                f"warning: its evaluations are left out, their lines in evaluations.csv empty: {unable}",
                markup=False,
                soft_wrap=True,
            )
        return Session(loops, console, threads, shard).run()


def _changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    run = replace(run, **{name: value for name, value in changes.items() if value is not None})
    if changes["env"] is None and run.env is not None and ":" in run.env and run.eval_every:
        raise RunError(
            f"this run evaluates in {run.env!r}, and no module is imported because a folder says so: give "
            f"--env {shlex.quote(run.env)} again if you trust it, or --eval-every 0"
        )
    return run


def _check_alike(folders: list[RunDir], runs: list[RunConfig], written: list[dict[str, Any]]) -> None:
    """Raises RunError unless the runs differ in their seeds and folders alone."""
    first = runs[0]
    for folder, run, own in zip(folders, runs, written, strict=True):
        same = replace(run.with_agent(seed=first.agent.seed), run_dir=first.run_dir)
        differing = [name for name, value in vars(same.agent).items() if getattr(first.agent, name) != value]
        differing += [name for name, value in vars(same).items() if name != "agent" and getattr(first, name) != value]
        if own["threads"] != written[0]["threads"]:
            differing.append("threads")
        if differing:
            raise RunError(
                f"{folders[0].path} and {folder.path} differ in {differing[0]}: runs of one config and several seeds "
                "go on together, others each in a process of its own"
            )


def _with_length(run: RunConfig, folder: RunDir, num_updates: int | None) -> RunConfig:
    """The run with a new length.

    Raises:
        RunError: its past depends on its length, or is longer.
    """
    if num_updates is None or num_updates == run.agent.num_updates:
        return run
    if run.agent.lr_schedule != "constant":
        raise RunError(
            "the length of a run with a cosine schedule cannot be changed: its past depends on it; begin a new "
            "run, of that length or with --lr-schedule constant"
        )
    done = max(folder.steps(), default=0)
    if num_updates < done:
        raise RunError(f"{folder.path} has done {done:,} updates already; --num-updates {num_updates:,} is fewer")
    return run.with_agent(num_updates=num_updates)


def _longer(run: RunConfig) -> str:
    return ": --num-updates N lengthens it" if run.agent.lr_schedule == "constant" else ""


def _drop_what_comes_again(run: RunConfig, folder: RunDir, step: int, state: LoopState | None) -> None:
    """Removes the lines of what is done again from this checkpoint on."""
    drop_rows_after(folder.metrics_path, step - 1 if state is not None and log_owed(run, state, step) else step)
    evaluated = state is not None and not state.evaluation_owed
    drop_rows_after(folder.evaluations_path, step if evaluated else step - 1)
    if state is not None and not run.eval_every:
        state.evaluation_owed = False


def complete(run: RunConfig, *, console: Console | None = None) -> tuple[Agent, str | None]:
    """Takes the run of this config to its end, whatever its folder holds of it: all, a part, or nothing.

    Returns:
        the agent, and the name of the signal that ended the run early, or None.

    Raises:
        RunError: the folder holds a run of another config, or it is one of several processes; and as `train`.
    """
    if processes() > 1:  # what one finds in the folder, another may have written meanwhile
        raise RunError("several processes share a run of `dql train`, and nothing else; start one")
    folder = RunDir(run.run_dir or default_run_dir(run))
    if not folder.config_path.exists():
        result = train(run, console=console)
        return result.agent, result.stopped_by
    old = RunConfig.from_dict(folder.read_config()["run"])
    expected = replace(run.with_agent(max_action=old.agent.max_action), run_dir=old.run_dir)
    expected = replace(expected, data_on=old.data_on)  # which changes nothing
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
