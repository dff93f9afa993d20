"""The backend "cpp" under several Python threads at once, and after a fork."""

import ctypes
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.networks import make_critic, needs_cpp, same_bits, states_of
from support.networks import make_policy as policy_of

import dql

Tensor = torch.Tensor
THREADS, CALLS = 8, 12
pytestmark = needs_cpp
needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork processes"
)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def make_policy(seed: int = 5) -> dql.DiffusionPolicy:
    return policy_of(seed, T=20)


def at_once(jobs: list[Callable[[], object]]) -> list[object]:
    """Runs every job in a thread of its own, all started together; gives their results, raises their errors."""
    results: list[object] = [None] * len(jobs)
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(i: int) -> None:
        try:
            start.wait(timeout=60)
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    if errors:
        raise errors[0]
    return results


def sampling(policy: dql.DiffusionPolicy, critic: dql.TwinCritic, i: int) -> list[Tensor]:
    """What one thread asks for: every kind of call, sizes of its own."""
    found = []
    for call in range(CALLS):
        states = states_of(1 + 7 * i + call)
        with torch.no_grad():
            found.append(dql.sample(states, policy, seed=call, num_steps=5, backend="cpp"))
            found.append(dql.sample(states, policy, seed=call, backend="cpp"))
            found.append(dql.sample(states, policy, seed=call, num_candidates=3, num_steps=2, backend="cpp"))
        found.append(dql.select(states, policy, critic, num_candidates=5, seed=call, num_steps=5, backend="cpp"))
    return found


def gradients(policy: dql.DiffusionPolicy, i: int) -> list[Tensor]:
    found = []
    for call in range(CALLS):
        states = states_of(1 + 5 * i + call).requires_grad_(True)
        actions = dql.sample(states, policy, seed=call, num_steps=5, backend="cpp")
        found += torch.autograd.grad(actions.square().sum(), [states, *policy.parameters()])
    return found


def train(policy: dql.DiffusionPolicy, steps: int = 4 * CALLS) -> list[Tensor]:
    """By hand: torch's Adam hangs in a child that was forked after its own threads had worked."""
    flat = policy.denoiser.flat
    for step in range(steps):
        policy.denoiser.zero_grad()
        dql.sample(states_of(33), policy, seed=step, num_steps=5, backend="cpp").square().sum().backward()
        with torch.no_grad():
            flat.sub_(flat.grad, alpha=1e-3)
    return [flat.detach().clone()]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["one policy", "a policy each"])
def test_callers_at_once(shared, threads):
    """Eight threads sample, select and backpropagate while another trains a policy of its own."""
    critic = make_critic()

    def jobs() -> list[Callable[[], list[Tensor]]]:
        policies = [make_policy(0 if shared else i) for i in range(THREADS)]
        if shared:
            policies = [policies[0]] * THREADS
        kinds = [(lambda p, i: sampling(p, critic, i)) if i % 2 else gradients for i in range(THREADS)]
        made = [lambda i=i: kinds[i](policies[i], i) for i in range(THREADS)]
        return [*made, lambda: train(make_policy(99))]

    want = [job() for job in jobs()]
    with torch_threads(threads):
        got = at_once(jobs())
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert same_bits(one, other), f"thread {i} got something else than alone"


def test_one_policy_is_changed_while_others_sample():
    """The parameters that a call began with serve it to its end: every result is that of one version."""
    policy, states = make_policy(), states_of(200)
    versions = [policy.denoiser.flat.detach() * (1 + 0.05 * i) for i in range(6)]

    def run() -> Tensor:
        with torch.no_grad():
            return dql.sample(states, policy, seed=1, backend="cpp")

    want = []
    for version in versions:
        with torch.no_grad():
            policy.denoiser.flat.copy_(version)
        want.append(run())
    done = threading.Event()

    # torch's copy_ releases the GIL, so a call could begin in the middle of it and find a mixture; this keeps it.
    write = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(("memmove", ctypes.PyDLL(None)))
    flat = policy.denoiser.flat

    def change() -> None:
        try:
            for i in range(200):
                write(flat.data_ptr(), versions[i % 6].data_ptr(), flat.nbytes)
                run()
        finally:
            done.set()

    def sample() -> list[Tensor]:
        found = []
        while not done.is_set() or not found:
            found.append(run())
        return found

    _, *results = at_once([change, sample, sample, sample])
    for found in results:
        assert all(any(torch.equal(actions, w) for w in want) for actions in found)
    assert torch.equal(run(), want[199 % 6])


def test_many_step_tables_at_once():
    """More tables than a policy keeps, each thread going round in an order of its own."""
    policy, states = make_policy(), states_of(40)
    tables = [dql.StepTable.ddim(policy.schedule, k, stochasticity=0.5) for k in range(1, 21)]

    def run(k: int) -> Tensor:
        return dql.sample(states, policy, seed=1, sampler=tables[k], backend="cpp")

    with torch.no_grad():
        want = [run(k) for k in range(20)]

    def go_round(i: int) -> list[Tensor]:
        with torch.no_grad():  # torch's switch is each thread's own
            return [run((i * 3 + k * (1 + 2 * (i % 4))) % 20) for k in range(40)]

    for i, found in enumerate(at_once([lambda i=i: go_round(i) for i in range(THREADS)])):
        for k, actions in enumerate(found):
            assert torch.equal(actions, want[(i * 3 + k * (1 + 2 * (i % 4))) % 20])


def test_one_graph_backwards_from_several_threads():
    """retain_graph=True allows it: one of them uses up what the forward pass saved, the others run it again."""
    policy = make_policy()
    states = states_of(300).requires_grad_(True)
    inputs = [states, *policy.parameters()]
    for seed in range(5):
        actions = dql.sample(states, policy, seed=seed, backend="cpp")
        loss = actions.square().sum()
        again = dql.sample(states, policy, seed=seed, backend="cpp").square().sum()
        want = list(torch.autograd.grad(again, inputs))
        found = at_once([lambda loss=loss: list(torch.autograd.grad(loss, inputs, retain_graph=True))] * 4)
        assert all(same_bits(got, want) for got in found)


def in_child(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Runs the function in a forked process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        theirs.send([tensor.numpy() for tensor in function()])

    process = context.Process(target=run)
    process.start()
    try:
        assert ours.poll(60), "the child hangs, or has died"
        return [torch.from_numpy(array) for array in ours.recv()]
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_samples_and_trains():
    """The pool's threads are not in the child; it makes its own."""
    critic = make_critic()

    def work() -> list[Tensor]:
        policy = make_policy()
        return sampling(policy, critic, 1) + [g.detach() for g in gradients(policy, 2)] + train(policy, 3)

    want = work()
    with torch_threads(3):
        assert same_bits(work(), want)  # the pool has its threads now
        assert same_bits(in_child(work), want)
        assert same_bits(in_child(lambda: in_child(work)), want)  # a child's child
        assert same_bits(work(), want)  # and the parent goes on


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forks_while_others_call():
    policy, states = make_policy(), states_of(64)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [dql.sample(states, policy, seed=1, num_steps=5, backend="cpp")]

    want = run()
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            assert same_bits(run(), want)

    def fork() -> None:
        try:
            for _ in range(5):
                assert same_bits(in_child(run), want)
        finally:
            done.set()

    with torch_threads(2):
        at_once([fork, keep_busy, keep_busy])


class Relabelled(torch.utils.data.Dataset):
    """States with actions of a policy, drawn in the loader's workers."""

    def __init__(self, policy: dql.DiffusionPolicy) -> None:
        self.policy = policy

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return dql.sample(states_of(i + 1), self.policy, seed=i, num_steps=5, backend="cpp")[0]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_in_the_workers_of_a_data_loader():
    dataset = Relabelled(make_policy())
    want = torch.stack([dataset[i] for i in range(24)])
    with torch_threads(2):
        dataset[3]
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            assert torch.equal(torch.cat(list(loader)), want)
