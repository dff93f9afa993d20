"""Which algorithms there are, and reading an agent from its file."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from dql.agents.base import FORMAT, Agent
from dql.agents.bc import BC, GaussianBC
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.agents.iql import IQL
from dql.agents.td3_bc import TD3BC
from dql.backend.registry import check_name
from dql.checkpoint import FILE, CheckpointError, checked_device, load_tensors, reading, unreadable
from dql.config import DIFFUSION, Config, RunConfig
from dql.rundir import RunDir, find_checkpoint
from dql.shown import shown

ALGORITHMS: dict[str, type[Agent]] = {
    agent.algorithm: agent for agent in (DiffusionQL, DiffusionBC, BC, GaussianBC, TD3BC, IQL)
}


def make_agent(
    state_dim: int,
    action_dim: int,
    config: Config,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Agent:
    """The agent that `config.algorithm` names."""
    return ALGORITHMS[config.algorithm](state_dim, action_dim, config, device=device, dtype=dtype)


def load(
    folder: str | os.PathLike[str],
    which: str = "last",
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Agent:
    """The agent of a run, or the one that `agent.save(folder)` wrote. No code in the files is run.

    Args:
        folder: a run folder, one with `agent.safetensors`, or that file.
        which: of a run: "last", "best", "offline" or a step, see `dql.evaluate.select_checkpoints`.
        device: where to put it.
        backend: of `dql.backends()`, or "auto"; None keeps the one that it was trained with.

    Raises:
        CheckpointError: missing, damaged, or no agent.
        RunError: the run has no such checkpoint.
        ValueError: there is no such device or backend.
    """
    device = checked_device(device)
    if backend is not None:
        check_name(backend)
    run, named = None, None
    try:
        is_run = (Path(folder) / "config.json").is_file()
    except OSError as error:  # a name too long
        raise unreadable(Path(folder), error) from error
    if is_run:
        run, folder = RunDir(folder), find_checkpoint(folder, which)
        named = int(folder.name.removeprefix("step-"))
    path = Path(folder) if Path(folder).is_file() else Path(folder) / FILE  # the file itself will do
    tensors, about = load_tensors(path)
    if about.get("kind") != "agent":
        raise CheckpointError(f"{path} holds no agent but a {about.get('kind')}; for a policy use DiffusionPolicy.load")
    with reading(path, about, FORMAT):
        config = Config.from_dict(about["config"])
        dtype = tensors[min(name for name in tensors if name.startswith("actor."))].dtype
        ALGORITHMS[config.algorithm].check_file(tensors, about["state_dim"], about["action_dim"], config)
        if run is not None:
            written = RunConfig.from_dict(run.read_config()["run"])
            if differing := written.agent.differences(config):
                raise ValueError(f"it is another run's, of {differing[0]}")
        if type(about["step"]) is not int or not 0 <= about["step"] < 1 << 63:
            raise ValueError(f"step {shown(about['step'])} is no number of updates")
    if backend is not None:
        if config.algorithm not in DIFFUSION:
            raise ValueError(
                f"{path} holds an agent of {config.algorithm}, which has no reverse chain to run: leave the backend out"
            )
        config = replace(config, backend=backend)
    with reading(path, about, FORMAT):
        loaded = make_agent(about["state_dim"], about["action_dim"], config, dtype=dtype)
        loaded.load_tensors(tensors)
        loaded.step = about["step"]
        if named is not None and loaded.step != named:
            raise ValueError(f"it is of update {loaded.step:,}, its folder is named for {named:,}")
        if run is not None and named is not None and (foreign := run.foreign(named)):
            raise ValueError(f"it is no checkpoint of this run: it is of {foreign[0]}")
        loaded.check_moments()
    if device.type == "cpu":
        return loaded
    agent = make_agent(about["state_dim"], about["action_dim"], config, device=device, dtype=dtype)
    agent.load_tensors(tensors)
    agent.step = loaded.step
    return agent
