"""Batches that are staged to a GPU are those of the dataset, whatever the device is doing meanwhile."""

import pytest
import torch
from support.data_files import FIELDS, episode, make

from dql import Config, DiffusionQL
from dql.data import load_dataset
from dql.staging import Staging, batches_on
from dql.update_graphed import GraphedUpdate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda", 0)


@pytest.fixture(params=[False, True], ids=["on disk", "in memory"])
def data(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("DQL_CACHE", str(tmp_path / "cache"))
    return load_dataset(make("some/thing-v0", [episode(500, seed=1)]), in_memory=request.param)


def busy():
    torch.cuda._sleep(20_000_000)


def test_the_batches_of_the_dataset(data):
    """Behind a device that is late, and for batches that are kept."""
    kept = []
    with Staging(data, CUDA, steps=4) as staging:
        for step in range(60):
            if step % 10 == 0:
                busy()
            batch = staging.sample(37, 1, step)
            kept.append((batch, batch.states * 2))  # by the stream that is late
    for step, (batch, doubled) in enumerate(kept):
        expected = data.sample(37, 1, step)
        for name in FIELDS:
            assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name)), (name, step)
        assert torch.equal(doubled.cpu(), 2 * expected.states)


def test_other_streams(data):
    with Staging(data, CUDA, steps=4) as staging:
        for step in range(40):
            stream = torch.cuda.Stream(CUDA)
            with torch.cuda.stream(stream):
                busy()
                doubled = staging.sample(37, 1, step).states * 2
            stream.synchronize()
            assert torch.equal(doubled.cpu(), 2 * data.sample(37, 1, step).states)


@pytest.mark.parametrize("graphed", [False, True])
def test_updates(graphed, data):
    """Recorded, too: the thread makes no call that would end a recording."""

    def losses(of):
        agent = DiffusionQL(data.state_dim, data.action_dim, Config(hidden_dim=16, batch_size=32), device=CUDA)
        update = GraphedUpdate(agent, 32).update if graphed else agent.update
        with batches_on(of, CUDA) as batches:
            return [update(batches.sample(32, 0, step))["critic/loss"].clone() for step in range(80)]

    assert torch.equal(torch.stack(losses(data)), torch.stack(losses(data.to(CUDA))))
