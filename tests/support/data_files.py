"""Real dataset files for the tests: Minari datasets of random numbers and D4RL-like HDF5 files."""

import json
import os
import warnings
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

S, A = 3, 2
OBSERVATIONS = gymnasium.spaces.Box(-np.inf, np.inf, (S,), np.float64)
ACTIONS = gymnasium.spaces.Box(-1.0, 1.0, (A,), np.float32)
FIELDS = ("states", "actions", "rewards", "next_states", "masks")


def episode(length, end="truncation", *, seed=0, **changes):
    """One episode of random numbers that ends by a termination, a truncation or not at all."""
    rng = np.random.default_rng(seed)
    last = np.arange(length) == length - 1
    fields = {
        "observations": rng.normal(size=(length + 1, S)),
        "actions": rng.uniform(-1, 1, (length, A)).astype(np.float32),
        "rewards": rng.normal(size=length),
        "terminations": last & (end == "termination"),
        "truncations": last & (end == "truncation"),
    }
    return EpisodeBuffer(**{**fields, **changes})


def make(
    dataset_id,
    episodes,
    *,
    observation_space=OBSERVATIONS,
    action_space=ACTIONS,
    refs=(-1.0, 9.0),
    env=None,
    **kw,
):
    """Writes a real Minari dataset; the reference scores go straight into its metadata, as no environment runs here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            env=env,
            observation_space=observation_space,
            action_space=action_space,
            **kw,
        )
    if refs is not None:
        edit_metadata(dataset_id, ref_min_score=refs[0], ref_max_score=refs[1])
    return dataset_id


def folder(dataset_id):
    return Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id


def edit_metadata(dataset_id, /, **changes):
    path = folder(dataset_id) / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.info == b.info


def assert_one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"


def d4rl_file(path, N=10, *, terminals=(), timeouts=None, next_observations=False, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(N, S)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, A)).astype(np.float32),
        "rewards": np.arange(N, dtype=np.float32),
        "terminals": np.isin(np.arange(N), terminals),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.isin(np.arange(N), timeouts)
    if next_observations is True:
        arrays["next_observations"] = rng.normal(size=(N, S)).astype(np.float32)
    elif next_observations is not False:
        arrays["next_observations"] = next_observations
    arrays.update(changes)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is not None:
                file[key] = array
    return arrays


def cut_file(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
