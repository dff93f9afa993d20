"""Initial weights are the seed's alone, in threads too; networks are shared with other processes as any module is."""

import copy
import hashlib
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dql.agents.registry import make_agent
from dql.config import Config
from dql.policy import DiffusionPolicy


# Initial weights.
def digest(agent):
    whole = hashlib.sha256()
    for name, tensor in agent.tensors().items():
        whole.update(name.encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


# Taken when torch's own generator was forked and seeded for them: a run's weights are still those.
@pytest.mark.parametrize(
    ("seed", "algorithm", "hidden_dim", "num_hidden", "activation", "float32", "float64"),
    [
        (0, "diffusion-ql", 16, 2, "mish", "6adb6f16d55f0707", "3994cc2bb0b8f429"),
        (1, "diffusion-ql", 32, 3, "relu", "987a50715e267515", "94511410362e1258"),
        (2**64 - 1, "diffusion-ql", 16, 2, "silu", "895efadccd212ae2", "8b20adb480cdf943"),
        (2**63 + 5, "diffusion-bc", 16, 4, "mish", "00eba63714f4f332", "31fd4afff2a528c7"),
        (7, "diffusion-bc", 256, 3, "mish", "8b934bb87de030d6", "e0b5da79ef607cfc"),
        (7, "diffusion-ql", 256, 3, "mish", "54e3226a1f29056f", "c6f07d14f30441e4"),
    ],
)
def test_initial_weights_are_what_they_were(seed, algorithm, hidden_dim, num_hidden, activation, float32, float64):
    config = Config(algorithm=algorithm, hidden_dim=hidden_dim, num_hidden=num_hidden, activation=activation, seed=seed)
    assert digest(make_agent(3, 2, config)) == float32
    assert digest(make_agent(3, 2, config, dtype=torch.float64)) == float64


def test_initial_weights_in_threads():
    """While others build theirs and draw from torch's own generator, which stays where it was."""
    configs = [Config(hidden_dim=64, num_hidden=2, seed=seed) for seed in range(8)]
    alone = [digest(make_agent(3, 2, config)) for config in configs]
    over = threading.Event()

    def draw():
        while not over.is_set():
            torch.rand(3)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                assert list(pool.map(lambda config: digest(make_agent(3, 2, config)), configs)) == alone
    finally:
        over.set()
        drawing.join()
    before = torch.get_rng_state()
    make_agent(3, 2, configs[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_module_touches_torchs_own_generator():
    """Seeding or forking it is a race between threads: nothing in the package does."""

    import dql

    used = re.compile(r"fork_rng|torch\.manual_seed\(|np\.random\.(seed|rand|normal|uniform)\(|random\.seed\(")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(dql.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if used.search(line)
    ]
    assert found == []


def test_a_network_of_ones_own_draws_as_every_module_does():
    from dql.networks import TwinCritic
    from dql.policy import DiffusionPolicy

    torch.manual_seed(5)
    first = DiffusionPolicy(3, 2, hidden_dim=16), TwinCritic(3, 2, 16)
    torch.manual_seed(5)
    again = DiffusionPolicy(3, 2, hidden_dim=16), TwinCritic(3, 2, 16)
    own = torch.Generator().manual_seed(5)
    third = DiffusionPolicy(3, 2, hidden_dim=16, generator=own), TwinCritic(3, 2, 16, generator=own)
    for others in (again, third):
        assert torch.equal(first[0].denoiser.flat, others[0].denoiser.flat)
        assert torch.equal(first[1].flat, others[1].flat)


def test_an_agent_on_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used \(.*\); use 'cpu'"):
        make_agent(3, 2, Config(hidden_dim=16), device="cuda")


# Networks shared between processes.
def in_another_process(policy, critic, turn, answers):
    """Runs in a spawned process: adds to what it was given, then says what it sees of the other's writes."""
    policy.denoiser.flat_parameters()
    with torch.no_grad():
        policy.denoiser.flat.add_(0.25)
        critic.get_parameter("q1_model.0.weight").fill_(7.0)
    answers.put("written")
    turn.get()
    answers.put((policy.denoiser.flat.sum().item(), critic.flat.sum().item()))
    # Training goes on there as anywhere: a step of an optimizer is seen too.
    optimizer = torch.optim.SGD([policy.denoiser.flat], lr=1.0)
    policy.bc_loss(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.ones(4, 2)).backward()
    optimizer.step()
    answers.put(policy.denoiser.flat.sum().item())


@pytest.mark.parametrize("shared", [True, False])
def test_a_spawned_process_shares_the_networks(shared):
    """Whether share_memory() was called or torch's pickling did it, as for every nn.Module."""
    import dql

    policy, critic = DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2), dql.TwinCritic(3, 2, 16, 2)
    if shared:
        policy.share_memory()
        critic.share_memory()
    states, before = torch.randn(5, 3), policy.denoiser.flat.detach().clone()
    actions = dql.sample(states, policy, seed=1)
    context = torch.multiprocessing.get_context("spawn")
    turn, answers = context.Queue(), context.Queue()
    process = context.Process(target=in_another_process, args=(policy, critic, turn, answers))
    process.start()
    try:
        assert answers.get(timeout=60) == "written"
        assert torch.equal(policy.denoiser.flat, before + 0.25)
        assert (critic.get_parameter("q1_model.0.weight") == 7.0).all()
        policy.denoiser.flat_parameters()
        after = dql.sample(states, policy, seed=1)  # by whatever backend: nothing derived from the old weights is used
        assert not torch.equal(after, actions)
        torch.testing.assert_close(after, dql.sample(states, policy, seed=1, backend="eager"))
        with torch.no_grad():
            policy.denoiser.get_parameter("final_layer.bias").fill_(3.0)
            critic.flat.mul_(0.5)
        turn.put("read")
        assert answers.get(timeout=60) == (policy.denoiser.flat.sum().item(), critic.flat.sum().item())
        total = policy.denoiser.flat.sum().item()
        stepped = answers.get(timeout=60)
        assert stepped != total
        assert policy.denoiser.flat.sum().item() == stepped
    finally:
        process.join(20)
        process.kill()
    assert process.exitcode == 0


def test_copies_share_nothing():
    """A deep copy or a plain pickle of a shared network is one's own."""
    policy = DiffusionPolicy(3, 2, hidden_dim=16, num_hidden=2).share_memory()
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        other.denoiser.flat_parameters()
        with torch.no_grad():
            other.denoiser.flat.zero_()
        assert other.denoiser.get_parameter("final_layer.weight").eq(0).all()
        assert not policy.denoiser.get_parameter("final_layer.weight").eq(0).all()
