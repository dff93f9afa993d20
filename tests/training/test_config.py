"""What a Config and a RunConfig take for a value, and what they refuse."""

import json
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from dql import DiffusionQL
from dql.agents.registry import ALGORITHMS
from dql.config import Config, RunConfig
from dql.kernels.layout import ACTIVATIONS, CriticSpec, DenoiserSpec
from dql.schedule import BETA_SCHEDULES


# Values of a RunConfig.
def test_a_run_config_takes_what_means_a_value():
    agent = Config(hidden_dim=np.int64(16), lr=np.float32(0.5), max_q_backup=np.bool_(True), seed=np.uint64(2**64 - 1))
    run = RunConfig(Path("a.hdf5"), agent, run_dir="some/where", keep=np.int8(2), device=torch.device("cpu"))
    assert (run.dataset, run.run_dir, run.device, run.keep) == ("a.hdf5", Path("some/where"), "cpu", 2)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    for config in (run, agent):
        for name, value in vars(config).items():
            assert type(value) in (str, int, float, bool, type(None), type(Path()), Config), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": None}, "dataset must be a string, got None"),
        ({"agent": {}}, r"agent must be a dql\.Config, got {}"),
        ({"run_dir": 3}, "run_dir must be a path, got 3"),
        ({"device": None}, "device must be a string, got None"),
        ({"keep": "3"}, "keep must be an integer, got '3'"),
        ({"keep": True}, "keep must be an integer, got True"),
        ({"eval_every": 2.0}, r"eval_every must be an integer, got 2\.0"),
        ({"eval_max_steps": 0}, "eval_max_steps must be at least 1, got 0"),
        ({"env": 5}, "env must be a string, got 5"),
        ({"graphed": "no"}, "graphed must be True or False, got 'no'"),
        ({"threads": 10**400}, "threads must be below 2\\^64"),
    ],
)
def test_a_run_config_refuses_what_does_not(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        RunConfig(**{"dataset": "x"} | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_q_backup": "yes"}, "max_q_backup must be True or False, got 'yes'"),
        ({"max_q_backup": 1}, "max_q_backup must be True or False, got 1"),
        ({"lr": True}, "lr must be a finite number, got True"),
        ({"lr": "1e-3"}, "lr must be a finite number, got '1e-3'"),
        ({"eta": 10**400}, "eta must be a finite number"),
        ({"backend": None}, "backend must be a string, got None"),
        (
            {"algorithm": ["diffusion-ql"]},
            "algorithm must be one of diffusion-ql, diffusion-bc, bc, bc-gaussian, td3-bc, iql, got",
        ),
        ({"hidden_dim": np.float64(16)}, "hidden_dim must be an integer"),
    ],
)
def test_a_config_refuses_what_is_of_another_kind(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**changes)


def test_a_config_names_every_field_of_the_networks():
    """But what the data say, and the embedding's size, the paper's: a field that is left out cannot be trained with."""
    of_networks = {field.name for spec in (DenoiserSpec, CriticSpec) for field in fields(spec)}
    others = {"hidden_dim": 24, "num_hidden": 2, "activation": "relu"}
    others |= {f.name: not f.default for f in fields(Config) if f.name in of_networks and isinstance(f.default, bool)}
    assert others.keys() == of_networks - {"state_dim", "action_dim", "time_dim"}
    agent = DiffusionQL(3, 2, Config(**others))
    for spec in (agent.policy.denoiser.spec, agent.critic.spec):
        for name in others.keys() & {field.name for field in fields(spec)}:
            assert getattr(spec, name) == others[name], (spec, name)


def test_a_config_knows_every_activation_and_schedule():
    kinds = get_type_hints(Config)
    assert get_args(kinds["activation"]) == ("auto", *ACTIVATIONS)
    assert get_args(kinds["beta_schedule"]) == BETA_SCHEDULES


def test_algorithms_have_defaults_of_their_own():
    """The published networks: three layers of Mish for a denoiser, two of ReLU for the baselines."""
    assert get_args(get_type_hints(Config)["algorithm"]) == tuple(ALGORITHMS)
    for algorithm in ALGORITHMS:
        config = Config(algorithm=algorithm)
        own = (3, "mish") if algorithm.startswith("diffusion") else (2, "relu")
        assert (config.num_hidden, config.activation) == own
        assert config.lr_schedule == ("cosine" if algorithm == "iql" else "constant")
        assert Config.from_dict(config.to_dict()) == config
    assert Config(algorithm="iql", num_hidden=3, activation="silu", lr_schedule="constant").num_hidden == 3


@pytest.mark.parametrize(
    ("algorithm", "changes", "sentence"),
    [
        ("diffusion-ql", {"alpha": 1.0}, "alpha is read by td3-bc alone, and this is diffusion-ql; leave it out"),
        ("td3-bc", {"expectile": 0.9}, "expectile is read by iql alone"),
        ("iql", {"eta": 2.0}, "eta is read by diffusion-ql alone"),
        ("bc", {"discount": 0.9}, "discount is read by diffusion-ql and td3-bc and iql alone"),
        ("td3-bc", {"backend": "cpp"}, "backend is read by diffusion-ql and diffusion-bc alone"),
        ("bc-gaussian", {"T": 3}, "T is read by diffusion-ql and diffusion-bc alone"),
        ("td3-bc", {"policy_delay": 0}, "policy_delay must be at least 1, got 0"),
        ("iql", {"expectile": 1.5}, r"expectile must be from 0 to 1, got 1\.5"),
        ("iql", {"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ("diffusion-bc", {"actor_gradient": "one-step"}, "actor_gradient is read by diffusion-ql alone"),
        ("diffusion-bc", {"eta": 5.0}, "eta is read by diffusion-ql alone, and this is diffusion-bc"),
        ("diffusion-bc", {"tau": 0.1}, "tau is read by diffusion-ql and td3-bc and iql alone"),
    ],
)
def test_a_field_that_the_algorithm_does_not_read_is_refused(algorithm, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(algorithm=algorithm, **changes)


def test_another_algorithm_in_a_run_has_its_own_defaults():
    run = RunConfig("x", Config(lr=1e-3)).with_agent(algorithm="iql")
    assert run.agent == Config(algorithm="iql", lr=1e-3)
    assert run.with_agent(seed=3).agent == Config(algorithm="iql", lr=1e-3, seed=3)
    chosen = Config(num_hidden=4, activation="relu", lr_schedule="cosine", eta=3.0, hidden_dim=64)
    for algorithm in ("diffusion-bc", "bc"):
        want = Config(algorithm=algorithm, num_hidden=4, activation="relu", lr_schedule="cosine", hidden_dim=64)
        assert chosen.of(algorithm) == want, "what was chosen is kept, what is not read is left out"
    with pytest.raises(ValueError, match="eta is read by diffusion-ql alone"):
        chosen.of("bc", eta=2.0)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        chosen.of("sac")


def test_an_old_file_of_diffusion_bc_is_read():
    """It may hold fields that did nothing."""
    old = Config().to_dict() | {"algorithm": "diffusion-bc", "eta": 20.0, "num_candidates": 2, "T": 7}
    assert Config.from_dict(old) == Config(algorithm="diffusion-bc", T=7)
    for name, value in (("eta", "rubbish"), ("tau", float("nan")), ("num_candidates", -5), ("alpha", 3.0)):
        with pytest.raises(ValueError, match=name):
            Config.from_dict(old | {name: value})


def test_the_demos_runs_are_runs(tmp_path):
    """Whether each algorithm reads what the demo sets; the demo itself is slow."""
    from dql import demo

    runs = [demo._run_config(tmp_path, algorithm, 4000, 0) for algorithm in demo._ALGORITHMS.values()]
    assert [run.agent.eta for run in runs] == [1.0, 1.0, 20.0]


def test_the_papers_hyper_parameters_are_of_its_algorithm():
    for task in ("hopper-medium-v2", "walker2d-medium-v2"):
        with pytest.raises(ValueError, match="are of diffusion-ql and diffusion-bc alone, not of 'iql'"):
            Config.tuned(task, algorithm="iql")
    assert Config.tuned("pen-human-v1", algorithm="diffusion-bc") == Config(
        algorithm="diffusion-bc", lr=3e-5, reward_tune="normalize", num_updates=1_000_000
    )
