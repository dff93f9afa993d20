"""The training loop: data in, run folder out. A run that is killed and resumed ends as if it had never been."""

import hashlib
import json
import math
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.live import Live

from dql import __version__, noise
from dql.agent import DiffusionBC, DiffusionQL, load, make_agent
from dql.checkpoint import CheckpointError, checked_device
from dql.config import Config, RunConfig
from dql.data import DatasetInfo, TransitionDataset, load_dataset
from dql.evaluate import Evaluation, Scored, evaluate, select_checkpoints, worth_keeping
from dql.graphed_update import GraphedUpdate
from dql.rundir import RunDir, RunError, append_row, drop_rows_after
from dql.terminal import TrainingProgress, make_console

_PLAIN_LINE_EVERY = 30.0  # seconds between two lines of progress where there is no terminal


class TrainingDivergedError(RunError):
    """A loss became NaN or infinite; the message names the last good checkpoint and what to change."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: the run folder.
        agent: as it is after the last update.
        step: updates done.
        evaluations: those of this process, with their steps; evaluations.csv has all.
        stopped_by: name of the signal that ended it early, or None.
        seconds: spent in updates, over all resumptions.
    """

    path: Path
    agent: DiffusionBC | DiffusionQL
    step: int
    evaluations: list[tuple[int, Evaluation]]
    stopped_by: str | None
    seconds: float


def default_run_dir(run: RunConfig) -> Path:
    """runs/<dataset>-<algorithm>-seed<seed>."""
    name = Path(run.dataset).stem if run.dataset.endswith(".hdf5") else run.dataset
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in name).strip("-.")
    return Path("runs") / f"{name}-{run.agent.algorithm}-seed{run.agent.seed}"


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
    if run.graphed and device.type != "cuda":
        raise RunError(
            f"--graphed records a CUDA graph, and this run is on {device}; leave it out or use --device cuda"
        )
    return device


def train(run: RunConfig, *, dataset: TransitionDataset | None = None, console: Console | None = None) -> RunResult:
    """Starts a run and takes it to its end.

    Args:
        run: what to do; `run.agent.max_action` is replaced by the dataset's.
        dataset: already loaded (with `run.agent.reward_tune` applied); None loads `run.dataset`.
        console: where progress is shown; None for a new one.

    Raises:
        RunError: the folder holds a run already or is in use, or the dataset's rewards are tuned otherwise.
        ValueError: the device is not there.
        DatasetError: the data, or the environment to evaluate in, cannot be used.
        CheckpointError: the disk is full or not writable.
        TrainingDivergedError: a loss became NaN.
    """
    console = console or make_console()
    folder = RunDir(run.run_dir or default_run_dir(run))
    folder.lock()
    try:
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
        data = load_dataset(run.dataset, reward_tune=run.agent.reward_tune) if dataset is None else dataset
        if data.reward_tune != run.agent.reward_tune:
            raise RunError(
                f"the dataset's rewards are tuned {data.reward_tune!r}, the agent's config says "
                f"{run.agent.reward_tune!r}; load it with load_dataset(..., reward_tune={run.agent.reward_tune!r})"
            )
        data = data.to(device)
        run = run.with_agent(max_action=data.max_action)
        info = _evaluation_info(run, data.info)
        agent = make_agent(data.state_dim, data.action_dim, run.agent, device=device)
        folder.write_json("config.json", _describe(run, data, info, _fingerprint(data), torch.get_num_threads()))
        return _Loop(run, folder, data, info, agent, console).run()
    finally:
        folder.unlock()


def resume(path: Path, *, num_updates: int | None = None, console: Console | None = None) -> RunResult:
    """Continues a run from its last checkpoint, exactly.

    Args:
        path: the run folder.
        num_updates: a new length; only with a constant learning rate, whose past does not depend on it.
        console: where progress is shown.

    Raises: as `train`; also RunError for a folder that is no run, has no checkpoint, or whose dataset has changed.
    """
    console = console or make_console()
    folder = RunDir(path)
    written = folder.read_config()
    run = RunConfig.from_dict(written["run"])
    folder.lock()
    try:
        if num_updates is not None and num_updates != run.agent.num_updates:
            if run.agent.lr_schedule != "constant":
                raise RunError("the length of a run with a cosine schedule cannot be changed: its past depends on it")
            done = max(folder.steps(), default=0)
            if num_updates < done:
                raise RunError(f"{path} has done {done:,} updates already; --num-updates {num_updates:,} is fewer")
            run = run.with_agent(num_updates=num_updates)
        device = _device_of(run)
        torch.set_num_threads(written["threads"])  # sums over rows depend on how threads split them
        data = load_dataset(run.dataset, reward_tune=run.agent.reward_tune).to(device)
        fingerprint = _fingerprint(data)
        if fingerprint != written["dataset"]["fingerprint"]:
            raise RunError(
                f"dataset {run.dataset} is not the one this run began with (fingerprint {fingerprint}, it was "
                f"{written['dataset']['fingerprint']}); restore it or start a new run"
            )
        info = _evaluation_info(run, data.info)
        folder.clean()
        steps = folder.steps()
        if steps:
            try:
                agent = load(folder.checkpoint_path(steps[-1]), device=device)
            except CheckpointError as error:
                earlier = f"update {steps[-2]:,}" if len(steps) > 1 else "the beginning"
                raise RunError(
                    f"{error}: remove {folder.checkpoint_path(steps[-1])}, and resuming starts from {earlier}"
                ) from error
            agent.config = replace(agent.config, num_updates=run.agent.num_updates)
            state = folder.read_loop(steps[-1])
        else:  # killed before the first checkpoint: from the start, which is as exact
            agent = make_agent(data.state_dim, data.action_dim, run.agent, device=device)
            state = None
        folder.write_json("config.json", _describe(run, data, info, fingerprint, written["threads"]))
        for file in (folder.metrics_path, folder.evaluations_path):
            drop_rows_after(file, agent.step)
        complete = " (it is complete: --num-updates N lengthens it)" if agent.step >= run.agent.num_updates else ""
        console.print(f"resuming {path} at update {agent.step:,}{complete}", markup=False, soft_wrap=True)
        return _Loop(run, folder, data, info, agent, console, state).run()
    finally:
        folder.unlock()


def _evaluation_info(run: RunConfig, info: DatasetInfo) -> DatasetInfo:
    """The dataset's info with the environment to evaluate in; builds it once, so that nothing fails hours later."""
    from dql.environments import make_env

    if run.env is not None:
        info = replace(info, env_spec=json.dumps({"id": run.env}))
    if run.eval_every:
        if info.env_spec is None:
            raise RunError(
                f"dataset {info.dataset_id} names no environment to evaluate in; name one with --env, "
                "or train without evaluations, --eval-every 0"
            )
        make_env(info).close()
    return info


def _fingerprint(data: TransitionDataset) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (data.states, data.actions, data.rewards, data.next_states, data.masks):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _describe(
    run: RunConfig, data: TransitionDataset, info: DatasetInfo, fingerprint: str, threads: int
) -> dict[str, Any]:
    return {
        "run": run.to_dict(),
        "dataset": {
            "transitions": len(data),
            "state_dim": data.state_dim,
            "action_dim": data.action_dim,
            "fingerprint": fingerprint,
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


class _Means:
    """Running means of an update's metrics, kept on the device: no sync until somebody reads them."""

    def __init__(self, sums: list[float] | None = None, count: int = 0) -> None:
        self.sums: torch.Tensor | None = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        self.count = count

    def add(self, values: torch.Tensor) -> None:
        self.sums = values.clone() if self.sums is None else self.sums.to(values.device).add_(values)
        self.count += 1

    def read(self) -> list[float]:
        return [] if self.sums is None else (self.sums / max(self.count, 1)).tolist()

    def state(self) -> dict[str, Any]:
        return {"sums": None if self.sums is None else self.sums.tolist(), "count": self.count}


class _Loop:
    """The loop over updates and everything that happens between them."""

    def __init__(
        self,
        run: RunConfig,
        folder: RunDir,
        data: TransitionDataset,
        info: DatasetInfo,
        agent: DiffusionBC | DiffusionQL,
        console: Console,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.folder, self.data, self.info, self.agent = run, folder, data, info, agent
        self.update = GraphedUpdate(agent, run.agent.batch_size).update if run.graphed else agent.update
        self.console = console
        state = state or {}
        self.seconds: float = state.get("seconds", 0.0)
        self.since_log = _Means(**state.get("since_log", {}))
        self.since_evaluation = _Means(**state.get("since_evaluation", {}))
        self.scored = [Scored(**s) for s in state.get("evaluations", [])]
        self.names: list[str] = state.get("names", [])
        self.saved_step = agent.step if state else -1
        self.results: list[tuple[int, Evaluation]] = []
        self.stop: str | None = None

    def run(self) -> RunResult:
        run, agent = self.config, self.agent
        if self.saved_step >= 0:  # resumed: the kill may have come between a checkpoint and its tidying
            self._tidy()
        with _signals(self._on_signal), _progress(run.agent, agent.step, self.console) as show:
            last_seconds, last_step = self.seconds, agent.step
            started = time.perf_counter() - self.seconds
            while agent.step < run.agent.num_updates and self.stop is None:
                self._update()
                step = agent.step
                ended = step == run.agent.num_updates
                if step % run.log_every == 0 or ended:
                    self.seconds = time.perf_counter() - started
                    rate = (step - last_step) / max(self.seconds - last_seconds, 1e-9)
                    last_seconds, last_step = self.seconds, step
                    show(step, rate, self._log(rate))
                evaluating = bool(run.eval_every) and (step % run.eval_every == 0 or ended)
                if evaluating:
                    self._check(dict(zip(self.names, self.since_log.read(), strict=False)))
                    before = time.perf_counter()
                    self._evaluate()
                    started += time.perf_counter() - before  # `seconds` are those of updates
                if evaluating or ended or step % run.checkpoint_every == 0:
                    self.seconds = time.perf_counter() - started
                    self._save()
            self.seconds = time.perf_counter() - started
        if self.stop is not None and self.saved_step != agent.step:
            self._save()
        if self.stop is None:
            agent.policy.save(self.folder.policy_path)
        return RunResult(self.folder.path, agent, agent.step, self.results, self.stop, self.seconds)

    def _on_signal(self, name: str) -> None:
        self.stop = name

    def _update(self) -> None:
        c = self.config.agent
        metrics = self.update(self.data.sample(c.batch_size, c.seed, self.agent.step))
        self.names = list(metrics)
        values = torch.stack(list(metrics.values())).double()
        self.since_log.add(values)
        self.since_evaluation.add(values)

    def _log(self, rate: float) -> dict[str, float]:
        means = dict(zip(self.names, self.since_log.read(), strict=True))
        self._check(means)
        row = {"step": self.agent.step, "seconds": round(self.seconds, 3), "updates_per_second": round(rate, 3)}
        append_row(self.folder.metrics_path, row | means)
        self.since_log = _Means()
        return means

    def _check(self, means: dict[str, float]) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            steps = self.folder.steps()
            where = (
                f"the last good checkpoint is {self.folder.checkpoint_path(steps[-1])}" if steps else "none is saved"
            )
            raise TrainingDivergedError(
                f"{bad[0]} became NaN or infinite before update {self.agent.step:,}; {where}; try a lower --lr, "
                "--reward-tune normalize, or another --grad-norm"
            )

    def _evaluate(self) -> None:
        run, step = self.config, self.agent.step
        result = evaluate(
            self.agent, self.info, episodes=run.eval_episodes, seed=noise.derive(run.agent.seed, "evaluation")
        )
        self.results.append((step, result))
        bc_loss = dict(zip(self.names, self.since_evaluation.read(), strict=True))["actor/bc_loss"]
        self.since_evaluation = _Means()
        self.scored.append(Scored(step, result.return_mean, bc_loss))
        append_row(self.folder.evaluations_path, {"step": step} | result.to_dict() | {"bc_loss": bc_loss})
        low, high = result.return_interval
        score = "" if result.normalized_score is None else f", normalised score {result.normalized_score:.1f}"
        self.console.print(
            f"update {step:,}: return {result.return_mean:.1f} [{low:.1f}, {high:.1f}] "
            f"over {run.eval_episodes} episodes{score}",
            markup=False,
            soft_wrap=True,
        )

    def _save(self) -> None:
        """A checkpoint, and what follows from it."""
        self._check(dict(zip(self.names, self.since_log.read(), strict=False)))
        loop = {
            "seconds": self.seconds,
            "since_log": self.since_log.state(),
            "since_evaluation": self.since_evaluation.state(),
            "evaluations": [vars(s) for s in self.scored],
            "names": self.names,
        }
        step = self.agent.step
        self.folder.save_checkpoint(step, self.agent, loop)
        self.saved_step = step
        self._tidy()

    def _tidy(self) -> None:
        """The selection written, and the checkpoints removed that nothing asks for any more."""
        if self.scored:
            chosen = select_checkpoints(self.scored, self.config.top_k) | {"last": self.saved_step}
            self.folder.write_json("selection.json", chosen)
        self.folder.prune(self.config.keep, worth_keeping(self.scored, self.config.top_k) | {self.saved_step})


@contextmanager
def _signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to end after the update at hand; a second Ctrl-C interrupts at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        stop(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs that has the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(config: Config, step: int, console: Console) -> Iterator[Callable[[int, float, dict[str, float]], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    total = config.num_updates
    shown = {"actor/bc_loss": "bc", "actor/q_loss": "q_loss", "critic/loss": "critic", "critic/target_q": "target"}

    def losses(means: dict[str, float]) -> dict[str, float]:
        return {short: means[name] for name, short in shown.items() if name in means}

    if not console.is_terminal:
        spoken = time.monotonic()

        def line(step: int, rate: float, means: dict[str, float]) -> None:
            nonlocal spoken
            if time.monotonic() - spoken >= _PLAIN_LINE_EVERY or step == total:
                spoken = time.monotonic()
                left = (total - step) / max(rate, 1e-9)
                said = "  ".join(f"{name} {value:.4g}" for name, value in losses(means).items())
                console.print(
                    f"{step:,}/{total:,}  {rate:.1f} updates/s  {left:.0f} s left  {said}",
                    markup=False,
                    soft_wrap=True,
                )

        yield line
        return
    bar = TrainingProgress(config.algorithm, total, step)
    with Live(bar, console=console):
        yield lambda step, rate, means: bar.update(step, rate, losses(means))
