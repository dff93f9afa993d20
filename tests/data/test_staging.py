"""Batches that a thread gathers ahead of need: those of the dataset, for every order of steps and every fault."""

import gc
import threading
import time
import weakref

import pytest
import torch
from support.data_files import FIELDS, assert_one_sentence, episode, make

from dql.data import DatasetError, load_dataset
from dql.datasets.cache import cache_path
from dql.datasets.sources import resolve
from dql.staging import HostLane, Staging, batches_on

CPU = torch.device("cpu")
THING = "some/thing-v0"


class LateLane:
    """A device whose copies are done as late as they may be: at once it has nothing but NaN."""

    def __init__(self):
        self.log, self.buffers, self.memory = [], [], []

    def buffer(self, count):
        self.buffers.append(weakref.ref(found := torch.full((count,), torch.nan)))
        return found

    def send(self, buffer):
        memory = torch.full_like(buffer, torch.nan)
        self.memory.append(weakref.ref(memory))
        self.log.append("send")
        return memory, [memory, buffer]

    def sent(self, ticket):
        if ticket:
            memory, buffer = ticket
            memory.copy_(buffer)
            ticket.clear()

    def receive(self, memory, ticket):
        self.sent(ticket)


@pytest.fixture
def data():
    return load_dataset(make(THING, [episode(40, "termination", seed=1), episode(30, seed=2)]), in_memory=False)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dql-staging")]


def assert_batch(batch, data, *draw):
    expected = data.sample(*draw)
    for name in FIELDS:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), (name, draw)
        assert getattr(batch, name).is_contiguous()
        assert getattr(batch, name).data_ptr() % 64 == 0, "kernels may read it in wide words"


ORDERS = {
    "in order": [(8, 5, step) for step in range(40)],
    "resumed": [(8, 5, step) for step in range(250, 270)],
    "backwards": [(8, 5, step) for step in reversed(range(20))],
    "jumps": [(8, 5, step) for step in (0, 100, 3, 4, 101, 9, 8, 7, 300, 0, 0, 1)],
    "other seeds": [(8, seed, step) for step in range(9) for seed in (1, 2)],
    "other sizes": [(size, 5, step) for step in range(9) for size in (8, 37, 1)],
}


@pytest.mark.parametrize("lane", [lambda: HostLane(CPU), LateLane], ids=["host", "late"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_batches_of_the_dataset(order, lane, data):
    with Staging(data, CPU, steps=4, lane=lane()) as staging:
        for draw in ORDERS[order]:
            assert_batch(staging.sample(*draw), data, *draw)


def test_batches_may_be_kept(data):
    with Staging(data, CPU, steps=4, lane=LateLane()) as staging:
        kept = [staging.sample(8, 0, step) for step in range(30)]
    for step, batch in enumerate(kept):
        assert_batch(batch, data, 8, 0, step)


def test_they_are_gathered_and_sent_ahead(data):
    lane = LateLane()
    with Staging(data, CPU, steps=4, lane=lane) as staging:
        staging.sample(8, 0, 0)
        assert staging._gathering is not None
        staging._gathering[1].result(60)
        staging.sample(8, 0, 1)
        assert lane.log == ["send", "send"], "the block after this one"
        staging._gathering[1].result(60)
        staging.sample(8, 0, 2)
        assert lane.log == ["send", "send"], "no more than one ahead"
        staging.sample(8, 0, 4)
        assert lane.log == ["send", "send", "send"]


def test_memory_is_bounded(data):
    lane = LateLane()
    with Staging(data, CPU, steps=4, lane=lane) as staging:
        for step in range(200):
            staging.sample(8, 0, step)
            assert sum(memory() is not None for memory in lane.memory) <= 3, (
                "this block, the next, and for a moment the one before"
            )
        assert len(lane.buffers) == 2
    assert not any(buffer() is not None for buffer in lane.buffers)


def test_what_the_thread_raises_is_raised_to_the_caller(data):
    (source,) = resolve(THING)
    with Staging(data, CPU, steps=4) as staging:
        staging.sample(8, 0, 0)
        cache_path(source).write_bytes(b"")
        for _ in range(2):  # and again, whoever goes on
            with pytest.raises(DatasetError) as error:
                [staging.sample(8, 0, step) for step in range(20)]
            assert_one_sentence(error, "changed while its rows were in use")


def test_it_goes_on_after_an_error(data):
    with Staging(data, CPU, steps=4) as staging:
        staging.sample(8, 0, 0)
        data.states, whole = data.states[:5], data.states
        with pytest.raises((IndexError, RuntimeError)):
            staging.sample(8, 0, 50)
        data.states = whole
        assert_batch(staging.sample(8, 0, 50), data, 8, 0, 50)


@pytest.mark.parametrize("draw", [(0, 0, 0), (8, 0, -1), (8, -1, 0), (8, 2**64, 0)])
def test_the_refusals_of_the_dataset(draw, data):
    with Staging(data, CPU) as staging:
        with pytest.raises(ValueError, match=r".") as error:
            staging.sample(*draw)
        with pytest.raises(ValueError, match=r".") as expected:
            data.sample(*draw)
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_thread_ends_with_the_block(ends, data):
    def use(staging):
        with staging:
            staging.sample(8, 0, 0)
            assert threads()
            raise ends

    staging = Staging(data, CPU)
    with pytest.raises(ends):
        use(staging)
    assert not threads()
    with pytest.raises(RuntimeError):
        staging.sample(8, 0, 1000)


def test_the_thread_ends_with_the_last_reference(data):
    staging = Staging(data, CPU)
    staging.sample(8, 0, 0)
    assert threads()
    del staging
    gc.collect()  # the fixture looks


def test_a_dataset_that_is_there_is_not_staged(data):
    with batches_on(data, CPU) as batches:
        assert batches is data
    with batches_on(data, torch.device("meta")) as batches:
        assert isinstance(batches, Staging)
        assert batches.sample(8, 0, 0).states.device.type == "meta"
    with pytest.raises(ValueError, match="staged from the CPU's memory, and these data are on meta"):
        Staging(data.to("meta"), CPU)
