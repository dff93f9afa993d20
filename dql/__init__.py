"""Diffusion Q-learning, with interchangeable backends for the reverse chain. See README.md and `dql --help`."""

from dql import noise
from dql.agents.base import Agent
from dql.agents.bc import BC, GaussianBC
from dql.agents.diffusion import DiffusionBC, DiffusionQL
from dql.agents.iql import IQL
from dql.agents.registry import load
from dql.agents.td3_bc import TD3BC
from dql.backend.base import BackendUnavailable
from dql.backend.registry import backends
from dql.checkpoint import CheckpointError
from dql.config import TUNED, Config
from dql.data import Batch, TransitionDataset, load_dataset
from dql.ensemble import Ensemble
from dql.finite import check_states
from dql.graphed import GraphedSampler
from dql.networks import Denoiser, TwinCritic
from dql.policy import DiffusionPolicy
from dql.sampler import sample, select, set_policy
from dql.schedule import NoiseSchedule, StepTable
from dql.selection import Selection
from dql.update_graphed import GraphedUpdate

__version__ = "0.1.0"

__all__ = [
    # the calls
    "sample",
    "select",
    "Selection",
    "set_policy",
    "GraphedSampler",
    "check_states",
    "backends",
    "noise",
    # policies and their parts
    "DiffusionPolicy",
    "Denoiser",
    "TwinCritic",
    "NoiseSchedule",
    "StepTable",
    # training
    "DiffusionQL",
    "DiffusionBC",
    "Agent",
    "BC",
    "GaussianBC",
    "TD3BC",
    "IQL",
    "Ensemble",
    "GraphedUpdate",
    "Config",
    "TUNED",
    "load",
    # data
    "load_dataset",
    "TransitionDataset",
    "Batch",
    # errors
    "BackendUnavailable",
    "CheckpointError",
]
