"""How CUDA graphs are recorded, as far as that can be seen without a GPU: the stream, and the proof after it."""

import contextlib

import pytest
import torch

from dql.kernels import capture


class Stream:
    """Of a GPU that is not there: which one, and what waited for it."""

    def __init__(self, device: int) -> None:
        self.device, self.waited = device, []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """What `recorded` asks of torch.cuda, for a second GPU that is the current one; gives the log of what it did."""
    log, stack = [], [Stream(1)]

    @contextlib.contextmanager
    def on(stream):
        stack.append(stream)
        yield
        stack.pop()

    @contextlib.contextmanager
    def graph(made, pool=None, stream=None):
        log.append(("graph", pool, stream))
        with on(stream):
            yield

    fakes = {"current_device": lambda: 1, "current_stream": lambda: stack[-1], "Stream": Stream, "stream": on}
    fakes |= {"graph": graph, "CUDAGraph": object}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture, "mend_after_capture", lambda stream: log.append(("mended", stream)))
    return log, stack


def test_a_graph_is_recorded_on_a_stream_of_its_own_gpu(cuda):
    log, stack = cuda
    first, streams = stack[0], []
    _, result = capture.recorded(lambda: streams.append(stack[-1]) or len(streams), warm_ups=2, pool="shared")
    assert result == 3
    ((what, pool, stream),) = log
    assert (what, pool) == ("graph", "shared")
    assert isinstance(stream, Stream) and stream.device == 1  # torch's own might be another GPU's
    assert streams[0] is streams[1] is not streams[2] is stream
    assert first.waited == [streams[0]] and streams[0].waited == [first]


def test_another_warm_up(cuda):
    calls = []
    capture.recorded(lambda: calls.append("call"), warm_up=lambda: calls.append("warm"), warm_ups=3)
    assert calls == ["warm", "warm", "warm", "call"]


def test_a_capture_that_fails_is_mended(cuda):
    log, stack = cuda

    def waits():
        if len(log) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture.recorded(waits)
    assert log[-1] == ("mended", stack[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_that_writes_is_believed(dtype):
    """Whatever it writes: NaN of a policy that holds NaN is a result."""
    actions, loss = torch.zeros(5, 3, dtype=dtype), torch.zeros((), dtype=dtype)

    def replay():
        actions.copy_(torch.tensor([1.0, float("nan"), float("-inf")]))
        loss.fill_(0.0)

    capture.prove(replay, [actions, loss, torch.zeros(0, dtype=dtype)])
    assert actions[0, 0] == 1


def test_one_that_does_not_write_everything_is_not():
    actions, loss = torch.zeros(5, 3), torch.zeros(())
    for replay in (lambda: None, lambda: actions.fill_(1), lambda: (loss.fill_(1), actions[:4].fill_(1))):
        with pytest.raises(RuntimeError, match="does not write its results when it is replayed"):
            capture.prove(replay, [actions, loss])
