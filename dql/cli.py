"""The command line: `dql demo | data | train | eval | figure | export | kernels | bench | doctor`."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from dql.config import DIFFUSION, TUNED, Config, RunConfig, tuned_eval_episodes
from dql.terminal import make_console

if TYPE_CHECKING:
    from dql.evaluate import Evaluation

_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}  # exit codes, as a shell reports them


def demo(
    out: Path = Path("runs/demo"), updates: int = 4000, episodes: int = 50, seed: int = 0, fresh: bool = False
) -> int:
    """Make a dataset, train BC, DiffusionBC and Diffusion-QL on it, compare them, draw pictures: minutes on a CPU.

    Args:
        out: Folder of runs, pictures and the policy.
        updates: Updates of Diffusion-QL and BC; DiffusionBC takes four times as many.
        episodes: Episodes of the final evaluation.
        seed: Of training.
        fresh: Drop the folder's earlier demo and start over.
    """
    from dql.demo import demo as run_demo

    run_demo(out, updates=updates, episodes=episodes, seed=seed, fresh=fresh, console=make_console())
    return 0


def data_list(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """The datasets on this machine, and the recipes that `dql data make` knows.

    Args:
        as_json: Print JSON.
    """
    from dql.collect.recipes import RECIPES
    from dql.datasets.sources import datasets_root, list_datasets

    found = list_datasets()
    if as_json:
        print(json.dumps([asdict(d) for d in found], indent=2))
        return 0
    console = make_console()
    console.print(f"datasets in {datasets_root()}")  # a table's title would be folded to its width
    table = Table()
    for header in ("id", "steps", "episodes", "MB", "environment", "random .. expert return"):
        table.add_column(header, justify="right" if header in ("steps", "episodes", "MB") else "left", overflow="fold")
    for d in found:
        scores = (
            ""
            if d.ref_min_score is None or d.ref_max_score is None
            else f"{d.ref_min_score:.4g} .. {d.ref_max_score:.4g}"
        )
        table.add_row(
            d.dataset_id, f"{d.steps:,}", f"{d.episodes:,}", f"{d.size_mb:.1f}", d.env_id or "", d.problem or scores
        )
    console.print(table)
    here = {d.dataset_id for d in found}
    table = Table(title="recipes: dql data make ID")
    for header in ("id", "steps", "made", "what"):
        table.add_column(header, no_wrap=header != "what")
    for recipe in RECIPES.values():
        table.add_row(recipe.id, f"{recipe.steps:,}", "yes" if recipe.id in here else "", recipe.description)
    console.print(table)
    return 0


def data_info(
    dataset: tyro.conf.Positional[str],
    drop_broken: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """What a dataset holds.

    Args:
        dataset: A Minari id, ids joined by +, a folder, or a D4RL .hdf5 file.
        drop_broken: Leave out episodes that cannot be used, instead of refusing the dataset.
        as_json: Print JSON.
    """
    from dql.data import describe, load_dataset

    facts = describe(load_dataset(dataset, drop_broken=drop_broken))
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    console = make_console()
    console.print(facts["dataset_id"])
    table = Table(show_header=False)
    for key, value in facts.items():
        if value not in (None, ""):
            table.add_row(key.replace("_", " "), _brief(value))
    console.print(table)
    return 0


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_brief(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def data_make(
    recipe: tyro.conf.Positional[str], steps: int | None = None, seed: int = 0, overwrite: bool = False
) -> int:
    """Make a dataset on this machine, offline, from behaviour policies that ship with the package.

    Args:
        recipe: An id or short name of `dql data list`, e.g. pendulum-mixed.
        steps: Transitions; by default the recipe's own number.
        seed: Of environments and actions.
        overwrite: Replace a dataset of that id.
    """
    from dql.collect import make_dataset

    made = make_dataset(recipe, steps=steps, seed=seed, overwrite=overwrite)
    cut = "" if made.complete_episodes else " (of episodes that were cut: no whole one fits)"
    make_console().print(
        f"{made.dataset_id}: {made.steps:,} steps in {made.episodes:,} episodes, return {made.return_mean:.1f} ± "
        f"{made.return_std:.1f} ({made.return_min:.1f} to {made.return_max:.1f}){cut}, "
        f"random {made.ref_min_score:.1f}, expert {made.ref_max_score:.1f}; {made.seconds:.0f} s\n"
        f"train on it: dql train --dataset {made.dataset_id}",
    )
    return 0


@dataclass(frozen=True)
class TrainArguments:
    """Train an agent on a dataset, or continue a run."""

    dataset: str | None = None
    """A Minari dataset id, ids joined by +, a folder of one, or a D4RL .hdf5 file."""
    seeds: str | None = None
    """Several seeds in one process, as 0-7 or 0,3,5-9, a run folder each; on a CPU they take a core each."""
    resume: tuple[Path, ...] = ()
    """Continue the run in this folder, or those of several seeds; beside it only --num-updates, --data-on, --env and
    --eval-* may be given."""
    tuned: str | None = None
    """Start from the paper's hyper-parameters for this task, e.g. hopper-medium-expert-v2."""
    run_dir: Path | None = None
    """Where the run is written; by default runs/<dataset>-<algorithm>-seed<seed>. Of several seeds, the folder that
    holds their folders seed<seed>."""
    device: str = RunConfig.device
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    data_on: Literal["auto", "device", "disk"] = RunConfig.data_on
    """Where the dataset lies: in the device's memory; or on disk, in the cache, from which batches are fetched ahead of
    need; auto leaves it on disk if it takes more than half of the memory that is free. The batches are the same."""
    log_every: int = RunConfig.log_every
    """Updates between two lines of metrics.csv, each the mean since the last."""
    checkpoint_every: int = RunConfig.checkpoint_every
    """Updates between two checkpoints; a killed run loses at most this many."""
    keep: int = RunConfig.keep
    """Newest checkpoints kept, beside those that model selection may ask for."""
    eval_every: int = RunConfig.eval_every
    """Updates between two evaluations, and once at the end; 0 for none."""
    eval_at_start: bool = RunConfig.eval_at_start
    """Evaluate the agent before its first update, too."""
    eval_episodes: int = RunConfig.eval_episodes
    """Episodes of an evaluation."""
    eval_max_steps: int | None = None
    """Steps after which an episode of an evaluation is cut; needed where the environment has no time limit."""
    env: str | None = None
    """Gymnasium id to evaluate in, where the dataset names none."""
    top_k: int = RunConfig.top_k
    """Offline model selection takes the checkpoint whose bc_loss ranks this (0 is the lowest)."""
    threads: int = RunConfig.threads
    """CPU threads; 0 leaves torch's choice."""
    drop_broken: bool = RunConfig.drop_broken
    """Leave out a Minari dataset's episodes that lack something or hold what cannot be used, instead of refusing it."""
    graphed: bool = RunConfig.graphed
    """On a GPU, record the update as a CUDA graph and replay it: one launch instead of one for each small kernel."""
    profile: Path | None = None
    """Measure 100 updates instead of training: where their time goes, and a trace of them in this file."""
    agent: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)


_SEEDS = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?")
_MOST_SEEDS = 10_000

# Flags that may stand beside --resume, and the arguments of dql.train.resume that they are.
_RESUMABLE = {
    "--num-updates": "num_updates",
    "--data-on": "data_on",
    "--eval-every": "eval_every",
    "--eval-episodes": "eval_episodes",
    "--eval-max-steps": "eval_max_steps",
    "--env": "env",
}


def train(arguments: list[str]) -> int:
    """`dql train`: parses the flags, then trains."""
    from dql import train as training
    from dql.parallel import is_first

    defaults = TrainArguments()
    task, algorithm = _value_of("--tuned", arguments), _value_of("--algorithm", arguments)
    if algorithm is not None:  # whose own defaults the flags change
        defaults = replace(defaults, agent=Config(algorithm=algorithm))  # type: ignore[arg-type]
    if task is not None:
        if defaults.agent.algorithm not in DIFFUSION:
            raise ValueError(f"--tuned has hyper-parameters of {' and '.join(DIFFUSION)} alone; leave it out")
        agent = Config.tuned(task, algorithm=defaults.agent.algorithm)
        defaults = replace(
            defaults, tuned=task, agent=agent, top_k=TUNED[task].top_k, eval_episodes=tuned_eval_episodes(task)
        )
    args = _parse_train(arguments, defaults)
    console = make_console()
    console.quiet = not is_first()
    if args.resume:
        _only(("--resume", *_RESUMABLE), arguments)
        if sum(argument.split("=", 1)[0] == "--resume" for argument in arguments) > 1:
            raise ValueError("--resume is given twice, and the last alone would count; name runs after one --resume")
        given = {name: value for flag, name in _RESUMABLE.items() if (value := _value_of(flag, arguments)) is not None}
        values = vars(args) | {"num_updates": args.agent.num_updates}
        results = training.resume_seeds(args.resume, **{name: values[name] for name in given}, console=console)
    elif _value_of("--max-action", arguments) is not None:
        raise ValueError("--max-action cannot be given: a run takes it from its dataset")
    elif args.dataset is None:
        raise ValueError("dql train needs --dataset ID (see `dql data list`) or --resume RUN")
    else:
        values = {k: v for k, v in vars(args).items() if k not in ("resume", "tuned", "seeds", "profile")}
        if args.profile is not None:
            from dql.profile import profile

            if args.seeds is not None:
                raise ValueError("--profile measures one agent; leave --seeds out")
            profile(RunConfig(**values), args.profile).show(console)
            return 0
        if args.seeds is None:
            results = [training.train(RunConfig(**values), console=console)]
        elif _value_of("--seed", arguments) is not None:
            raise ValueError("--seed and --seeds cannot both be given; leave one of them out")
        else:
            results = training.train_seeds(RunConfig(**values), parse_seeds(args.seeds), console=console)
    paths = " ".join(shlex.quote(str(result.path)) for result in results)
    stopped_by = results[0].stopped_by
    if stopped_by is not None:
        console.print(
            f"stopped by {stopped_by} after update {min(result.step for result in results):,}, checkpoint written; "
            f"continue with\n    dql train --resume {paths}",
            soft_wrap=True,
        )
        return _SIGNALS.get(stopped_by, 1)
    steps, seconds = sum(result.step for result in results), max(result.seconds for result in results)
    of = "" if len(results) == 1 else f" of {len(results)} seeds"
    console.print(
        f"{steps:,} updates{of} in {seconds:.0f} s ({steps / max(seconds, 1e-9):.1f}/s); evaluate with\n    "
        + "\n    ".join(f"dql eval {shlex.quote(str(result.path))}" for result in results),
        soft_wrap=True,
    )
    return 0


def parse_seeds(text: str) -> list[int]:
    """The seeds that `0-7`, `0,3` or `0,3,5-9` name.

    Raises:
        ValueError: it names none, one twice, or more than 10,000.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"--seeds must be like 0-7 or 0,3,5-9, got {text!r:.80}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST_SEEDS:
            raise ValueError(f"--seeds has {part.strip()!r:.80}, which must go up, by less than {_MOST_SEEDS:,}")
        seeds += range(first, last + 1)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds names a seed twice in {text!r:.80}")
    return seeds


def _parse_train(arguments: list[str], defaults: TrainArguments) -> TrainArguments:
    """tyro.cli, but what a config refuses is raised as the ValueError that it was, not shown in a box."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[TrainArguments], args=arguments, default=defaults, prog="dql train"
            )
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None:
            if isinstance(error, ValueError):
                raise error from None
            error = error.__context__
        sys.stderr.write(shown.getvalue())
        raise


def _only(allowed: tuple[str, ...], arguments: list[str]) -> None:
    flags = {a.split("=", 1)[0].replace("_", "-") for a in arguments if a.startswith("--")}
    if extra := sorted(flags - set(allowed)):
        raise ValueError(f"{extra[0]} cannot be given with --resume: a resumed run keeps its own configuration")


def _value_of(flag: str, arguments: list[str]) -> str | None:
    value = None  # the last one counts, as in the parser
    for i, argument in enumerate(arguments):
        if argument.replace("_", "-") == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        if argument.split("=", 1)[0].replace("_", "-") == flag and "=" in argument:
            value = argument.split("=", 1)[1]
    return value


def evaluate(
    run: tyro.conf.Positional[Path],
    checkpoint: str = "all",
    episodes: int = 10,
    seed: int = 0,
    device: str = "auto",
    backend: str | None = None,
    env: str | None = None,
    eval_max_steps: int | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Roll out a run's checkpoints in its environment, with episodes that training did not see.

    Args:
        run: A run folder.
        checkpoint: last, best, offline, a step, or all of the selected ones.
        episodes: Episodes of each checkpoint.
        seed: Of environments and actions.
        device: auto, cpu, cuda, ...
        backend: auto, cpp, eager, ... instead of the run's own.
        env: Gymnasium id, where the dataset names none.
        eval_max_steps: Steps after which an episode is cut; by default what the run says.
        as_json: Print JSON.
    """
    from dql import noise
    from dql.agents.registry import load
    from dql.data import DatasetInfo
    from dql.evaluate import evaluate as roll_out
    from dql.rundir import RunDir, find_checkpoint
    from dql.shown import said
    from dql.train import resolve_device

    folder = RunDir(run)
    written = folder.read_config()
    info = DatasetInfo.from_json(json.dumps(written["dataset"]["info"]))
    eval_max_steps = eval_max_steps or written["run"].get("eval_max_steps")
    if (named := written["run"].get("env") if env is None else env) is not None:
        info = info.with_env(named, typed=env is not None)
    names = list(folder.selection()) or ["last"] if checkpoint == "all" else [checkpoint]
    done: dict[Path, Evaluation] = {}
    rows = {}
    for name in names:
        path = find_checkpoint(run, name)
        if path not in done:
            agent = load(run, name, device=resolve_device(device), backend=backend)
            seed_of_all = noise.derive(seed, "eval")
            limits: Any = {"episodes": episodes, "max_episode_steps": eval_max_steps}
            try:
                done[path] = roll_out(agent, info, seed=seed_of_all, **limits)
            except (ValueError, OSError, ImportError):
                raise
            except Exception as error:  # whatever an environment raises
                raise ValueError(f"environment {info.env_id} failed ({said(error)})") from error
        rows[name] = {"step": int(path.name.removeprefix("step-")), "path": str(path)} | done[path].to_dict()
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    console = make_console()
    console.print(f"{info.dataset_id} in {info.env_id}: {episodes} new episodes each")
    table = Table(caption=_SELECTION_NOTE)
    for header in ("checkpoint", "update", "mean return", "95% interval", "normalised score"):
        table.add_column(header, justify="left" if header == "checkpoint" else "right")
    for name, row in rows.items():
        score = row["normalized_score"]
        table.add_row(
            name,
            f"{row['step']:,}",
            f"{row['return_mean']:.1f}",
            f"[{row['return_low']:.1f}, {row['return_high']:.1f}]",
            "" if score is None else f"{score:.1f}",
        )
    console.print(table)
    return 0


_SELECTION_NOTE = (
    "last: the final checkpoint; best: the highest return of the evaluations in training (the paper's online "
    "selection); offline: by bc_loss rank top_k, without an environment"
)


def export(
    source: tyro.conf.Positional[Path],
    which: str = "last",
    out: Path | None = None,
    sampler: str = "ddpm",
    num_steps: int | None = None,
    num_candidates: int | None = None,
) -> int:
    """Write a policy's whole reverse chain as one ONNX file, the noise an input, for runtimes without torch.

    Args:
        source: A run folder, an agent's folder, or a policy's .safetensors file.
        which: Checkpoint of a run: last, best, offline or a step.
        out: File to write; by default policy.onnx in the folder, or the policy's file with .onnx.
        sampler: ddpm (the paper's), ddim or dpm-solver++.
        num_steps: Steps to run; by default as many as the policy was trained with.
        num_candidates: Actions for each state; by default one, without a dimension of its own.
    """
    from dql.agents.diffusion import DiffusionBC
    from dql.agents.registry import load
    from dql.policy import DiffusionPolicy

    if not source.exists():
        raise ValueError(f"{source} does not exist; give a run's or an agent's folder, or a policy's .safetensors file")
    if not source.is_dir():
        if which != "last":
            raise ValueError(f"--which chooses among a run's checkpoints, but {source} is a file; leave it out")
        policy = DiffusionPolicy.load(source)
        target = source.with_suffix(".onnx")
    else:
        agent = load(source, which)
        if not isinstance(agent, DiffusionBC):
            raise ValueError(
                f"{source} holds an agent of {agent.algorithm}: dql export writes the reverse chain of "
                f"{' or '.join(DIFFUSION)}, and it has none"
            )
        policy = agent.policy
        target = source / ("policy.onnx" if which == "last" else f"policy-{which}.onnx")
    target = target if out is None else out
    policy.export_onnx(target, sampler=sampler, num_steps=num_steps, num_candidates=num_candidates)
    K, rows = policy.T if num_steps is None else num_steps, "B" if num_candidates is None else f"B, {num_candidates}"
    A = policy.action_dim
    make_console().print(
        f"{target}: states [B, {policy.state_dim}], noise [{K}, {rows}, {A}] -> actions [{rows}, {A}], float32; "
        f"{sampler}, {target.stat().st_size / 1e6:.1f} MB; noise is standard normal, drawn anew for every call",
        soft_wrap=True,
    )
    return 0


def kernels(
    arch: str = "sm_80,sm_90,sm_100",
    only: str = "*",
    jobs: int | None = None,
    backend: Literal["triton", "cuda"] = "triton",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Compile every Triton kernel, without a GPU; print registers, spills, shared memory, occupancy, instructions.

    Args:
        arch: Architectures, joined by commas: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120.
        only: Globs, separated by commas, of which a kernel's label must match one, e.g. "chain_fwd bf16*".
        jobs: Compile in this many processes; by default one a core.
        backend: With cuda print, for the architectures that the extension was built for, what ptxas told then.
        as_json: Print JSON.
    """
    from dql.kernel_table import cuda_kernels
    from dql.kernel_table import kernels as run_kernels

    if backend == "cuda":
        return cuda_kernels(only=only, as_json=as_json)
    return run_kernels(arch, only=only, jobs=jobs, as_json=as_json)


def bench_tune(
    hidden_dim: int = 256,
    state_dim: int = 17,
    action_dim: int = 6,
    num_hidden: int = 3,
    rows: str = "1,256,2560,65536",
    precision: str = "fp32,bf16",
    kinds: str = "forward,saving,backward",
    steps: int = 5,
    seconds: float = 2.0,
    arch: str | None = None,
    jobs: int | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    dry_run: bool = False,
) -> int:
    """Measure how the Triton kernels are best laid on the GPU here, and keep that for processes that start later.

    Args:
        hidden_dim: Of the policy.
        state_dim: Of the policy.
        action_dim: Of the policy.
        num_hidden: Hidden layers of the policy.
        rows: Actions a call, joined by commas; each stands for all numbers up to the next power of two.
        precision: fp32 (serves tf32 too) and bf16, joined by commas.
        kinds: forward, saving (forward that a backward pass follows) and backward, joined by commas.
        steps: Diffusion steps.
        seconds: Measure each shape about this long.
        arch: With --dry-run, the architecture: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.
        jobs: Compile in this many processes; by default one a core.
        as_json: Print JSON.
        dry_run: Compile and list the candidates, without a GPU; measure nothing.
    """
    from dql.kernels.layout import DenoiserSpec
    from dql.tune import tune

    return tune(
        spec=DenoiserSpec(state_dim, action_dim, hidden_dim, num_hidden),
        rows=rows,
        precision=precision,
        kinds=kinds,
        steps=steps,
        seconds=seconds,
        arch=arch,
        jobs=jobs,
        as_json=as_json,
        dry_run=dry_run,
    )


def doctor(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Versions, CPU, GPU, and what each backend says.

    Args:
        as_json: Print JSON.
    """
    from dql.doctor import cuda_extension_rows, examine, extension_rows

    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    console = make_console()
    table = Table(show_header=False, title=f"dql {facts['dql']}")
    packages = facts["packages"].items()
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in packages if version))
    table.add_row("not installed", ", ".join(name for name, version in packages if version is None))
    cpu, gpu = facts["cpu"], facts["gpu"]
    table.add_row("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads")
    table.add_row("cpu features", " ".join(cpu["features"]))
    table.add_row("gpu", gpu.get("reason") or "; ".join(f"{d['name']} (sm_{d['capability']})" for d in gpu["devices"]))
    table.add_row("compilers", "; ".join(f"{k}: {v or 'not found'}" for k, v in facts["compilers"].items()))
    rows = extension_rows(facts["extension"]) | cuda_extension_rows(facts["cuda_extension"])
    for name, text in rows.items():
        table.add_row(name, text)
    for name, folder in facts["folders"].items():
        table.add_row(name, folder)
    for name, reason in facts["backends"].items():
        table.add_row(f"backend {name}", "available" if reason is None else reason)
    console.print(table)
    return 0


_DATA: dict[str, Callable[..., Any]] = {"list": data_list, "info": data_info, "make": data_make}
_BENCH: dict[str, Callable[..., Any]] = {"tune": bench_tune}
_COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "eval": evaluate,
    "export": export,
    "kernels": kernels,
    "doctor": doctor,
}
_HELP = """usage: dql COMMAND ...

  demo     make data, train, evaluate and draw, in minutes on a CPU
  data     list | info ID | make RECIPE: datasets on this machine
  train    --dataset ID, or --resume RUN
  eval     RUN: roll out its checkpoints
  figure   bandit | steps | eta | candidates: the paper's claims as pictures, with their numbers
  export   RUN: its policy as one ONNX file
  kernels  what the compiler makes of the Triton kernels, per architecture, without a GPU
  bench    tune: measures the best layout of the kernels on this GPU, and keeps it
  doctor   versions, hardware, backends

dql COMMAND --help tells more."""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if arguments[0] == "--version":
        from dql import __version__

        print(f"dql {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "train":
        return train(rest)
    if command == "figure":
        from dql.figures.command import figure

        return figure(rest)
    if command == "data":
        return tyro.extras.subcommand_cli_from_dict(_DATA, args=rest, prog="dql data")
    if command == "bench":
        return tyro.extras.subcommand_cli_from_dict(_BENCH, args=rest, prog="dql bench")
    if command in _COMMANDS:
        return tyro.cli(_COMMANDS[command], args=rest, prog=f"dql {command}")
    raise ValueError(
        f"unknown command {command!r}; dql has demo, data, train, eval, figure, export, kernels, bench and doctor"
    )


def main(arguments: list[str] | None = None) -> int:
    """The console script: every failure is one sentence on stderr and a non-zero exit.

    One that was not foreseen leaves its traceback in a file of its own, which the sentence names.
    """
    from dql.backend.base import BackendUnavailable
    from dql.checkpoint import CheckpointError
    from dql.rundir import RunError

    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (BackendUnavailable, CheckpointError, RunError, ValueError, OSError, ImportError) as error:
        if isinstance(error, UnicodeError):
            return _unforeseen(error)
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted {error}".strip(), file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            reason = f" ({_one_line(error)[:200]})" if str(error) else ""
            print(f"error: there is not enough memory for that: ask for less{reason}", file=sys.stderr)
            return 1
        return _unforeseen(error)


_LONGEST = 1000  # characters of a sentence: what was typed may be in it
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # Names of files may be no text, and a terminal obeys what a dataset is called.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 60]} ... {text[-50:]}"


def _unforeseen(error: BaseException) -> int:
    """Says what was raised, and where the traceback is; gives the exit code."""
    place = "it could not be written to a file"
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="dql-error-", suffix=".txt")
        with open(handle, "w", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
        place = f"its traceback is in {path}"
    told = f"{type(error).__name__}: {_one_line(error)[:400]}"
    print(f"error: {told} (dql did not foresee this; {place}, please report it)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
