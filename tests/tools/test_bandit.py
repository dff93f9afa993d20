"""The bandit of the paper's toy figures: its numbers, its data, each small method, and the figures' claims."""

import csv
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from rich.console import Console

from dql.checkpoint import CheckpointError
from dql.figures import bandit as figures
from dql.figures import bandit_methods as methods
from dql.figures.bandit import MODES, RADIUS, REWARDS, STD, UPDATES, bandit, bandit_data, numbers, true_rewards

QUIET = Console(quiet=True)
LOSS = {  # which of its losses falls, of each method
    methods.GaussianMLE: "actor/loss",
    methods.TD3BC: "actor/loss",
    methods.CVAE: "vae/loss",
    methods.BCQ: "vae/loss",
    methods.MMD: "vae/loss",
    methods.BEARMMD: "vae/loss",
}


def a_critic():
    critic = methods.RewardCritic(0, 1, 1e-3).critic.requires_grad_(False)
    for model in (critic.q1_model, critic.q2_model):
        model[-1].bias.add_(3)  # away from 0, by which the Q term would divide
    return critic


def make(kind, updates=100, lr=1e-2, seed=0):
    improves = kind in (methods.TD3BC, methods.BCQ, methods.BEARMMD)
    return kind(seed, updates, lr, *([a_critic()] if improves else []))


def batch(step=0, seed=0):
    data = bandit_data(seed)
    rows = data.indices(100, seed, step)
    return data.actions[rows], data.rewards[rows]


# The numbers.


def test_numbers_of_actions_made_by_hand():
    at = torch.tensor(MODES)
    near = at[3] + torch.tensor([0.1, -0.1])  # 0.141 away
    far = at[3] + torch.tensor([0.11, -0.11])  # 0.156 away
    found = numbers(torch.stack([at[0], at[2], at[3], near, far, torch.zeros(2), torch.tensor([-3.0, 0.8])]))
    assert found.within == pytest.approx(4 / 7)
    assert found.modes == (0.25, 0.0, 0.25, 0.5)
    assert found.reward == pytest.approx((3.0 + 1.5 + 5.0 + 5.0) / 7), "outside of every circle it is 0"


def test_the_circle_belongs_to_the_mode():
    edge = torch.tensor([[0.8 + RADIUS, -0.8], [0.8, -0.8 - RADIUS], [0.8 + RADIUS + 1e-4, -0.8]])
    assert true_rewards(edge).tolist() == [5.0, 5.0, 0.0]


def test_none_within():
    found = numbers(torch.zeros(3, 2))
    assert (found.within, found.reward) == (0.0, 0.0)
    assert all(math.isnan(share) for share in found.modes), "shares of no actions are no numbers"
    table = figures._table({"nowhere": found}, 3, 20)
    assert table.splitlines()[1] == "nowhere,0.0000,,,,,0.0000,3,20"


@pytest.mark.parametrize(
    ("actions", "sentence"),
    [
        (torch.tensor([[0.0, math.nan]]), "1 of them not finite"),
        (torch.tensor([[0.0, math.inf], [0.0, 0.0]]), "1 of them not finite"),
        (torch.zeros(3, 3), r"must be finite numbers \[n, 2\], got \[3, 3\]"),
        (torch.zeros(0, 2), "there are no actions"),
    ],
)
def test_what_has_no_numbers_is_refused(actions, sentence):
    with pytest.raises(ValueError, match=sentence):
        numbers(actions)


# The data.


def test_the_data():
    data = bandit_data(0)
    assert (data.actions.shape, data.states.abs().sum(), data.masks.sum()) == ((10_000, 2), 0, 0)
    assert data.actions.abs().max() == 1, "clipped, as four deviations of a few are"
    for i, (mode, reward) in enumerate(zip(MODES, REWARDS, strict=True)):
        actions, rewards = (x[2500 * i : 2500 * (i + 1)] for x in (data.actions, data.rewards))
        # five standard errors of 2,500 draws
        assert (actions.mean(0) - torch.tensor(mode)).abs().max() < 5 * STD / 50
        assert (actions.std(0) / STD - 1).abs().max() < 5 / math.sqrt(2 * 2500)
        assert abs(rewards.mean() - reward) < 5 * 0.5 / 50
        assert abs(rewards.std() / 0.5 - 1) < 5 / math.sqrt(2 * 2500)
        assert torch.corrcoef(torch.cat([actions, rewards[:, None]], 1).T).fill_diagonal_(0).abs().max() < 5 / 50
    found = numbers(data.actions)
    assert found.within == pytest.approx(1 - math.exp(-4.5), abs=0.005), "a Rayleigh variable within 3 deviations"
    assert found.modes == pytest.approx((0.25,) * 4, abs=0.003)


def test_data_are_the_seeds():
    assert torch.equal(bandit_data(3).actions, bandit_data(3).actions)
    assert not torch.equal(bandit_data(3).actions, bandit_data(4).actions)


# The small methods.


@pytest.mark.parametrize("kind", LOSS, ids=lambda kind: kind.__name__)
def test_the_loss_falls(kind):
    method = make(kind, updates=40)
    losses = [method.update(*batch(step))[LOSS[kind]] for step in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.01
    actions = method.sample(50)
    assert (actions.shape, actions.requires_grad) == ((50, 2), False)
    assert actions.isfinite().all()


def test_the_critic_learns_rewards():
    learner = methods.RewardCritic(0, 80, 1e-2)
    losses = [learner.update(*batch(step))["critic/loss"] for step in range(80)]
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        for values in learner.critic(methods.zero_states(4), torch.tensor(MODES)):
            assert values.tolist() == pytest.approx(REWARDS, abs=0.5)


def test_an_update_of_the_gaussian_by_hand():
    method = make(methods.GaussianMLE, lr=1e-3)
    actions, rewards = batch()
    *_, last = method.net
    before, hidden = last.bias.detach().clone(), method.net[:-1](methods.zero_states(1))
    mean, log_std = last(hidden).detach()[0].double().chunk(2)
    z = (actions - mean) / log_std.exp()  # [B, A]
    loss = (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(1).mean()
    assert method.update(actions, rewards)["actor/loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradient = torch.cat([-(z / log_std.exp()).mean(0), (1 - z**2).mean(0)])
    step = -1e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first
    assert torch.allclose(last.bias.detach() - before, step.float(), atol=1e-6)


def test_the_cvaes_loss_by_hand():
    method = make(methods.CVAE)
    actions, _ = batch()
    state = method.generator.get_state()
    loss = method.vae_loss(actions).item()
    method.generator.set_state(state)
    mean, log_std = method.encoder(torch.cat([torch.zeros(100, 2), actions], 1)).detach().chunk(2, dim=1)
    z = mean + log_std.exp() * torch.randn(100, 4, generator=method.generator)
    decoded = method.decoder(torch.cat([torch.zeros(100, 2), z], 1)).detach().tanh()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert loss == pytest.approx(((decoded - actions) ** 2).mean().item() + 0.5 * kl.mean().item(), rel=1e-4)


def test_mmd_by_hand():
    x, y = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)).double()

    def k(a, b):
        return np.mean([[math.exp(-float((p - q).abs().sum()) / 40) for q in b] for p in a])

    want = [math.sqrt(k(a, a) + k(b, b) - 2 * k(a, b) + 1e-6) for a, b in zip(x, y, strict=True)]
    assert methods.mmd(x, y, 20.0).tolist() == pytest.approx(want, rel=1e-9)


def test_the_q_term_by_hand():
    method = make(methods.TD3BC)
    actions = batch()[0].requires_grad_()
    q1, q2 = method.critic(methods.zero_states(100), actions)
    either = [-(q / other.detach().abs().mean()).mean() for q, other in ((q1, q2), (q2, q1))]
    gradients = [torch.autograd.grad(term, actions, retain_graph=True)[0] for term in either]
    seen = set()
    for _ in range(20):
        found = method.q_term(method.critic, actions)
        i = int(abs(found - either[1]) < abs(found - either[0]))
        assert found.item() == pytest.approx(either[i].item(), rel=1e-5)
        assert torch.allclose(torch.autograd.grad(found, actions)[0], gradients[i], atol=1e-7)
        seen.add(i)
    assert seen == {0, 1}, "the coin has two sides"


def test_bcq_moves_actions_by_phi_at_most():
    method = make(methods.BCQ)
    actions = torch.tensor([[0.0, 0.5], [1.0, -1.0]])
    moved = method.perturbed(actions).detach()
    assert (moved - actions).abs().max() <= 0.05 + 1e-6
    assert moved.abs().max() <= 1


def test_bears_lambda_ascends_the_violation():
    for threshold, sign in ((0.0, 1), (10.0, -1)):
        method = make(methods.BEARMMD, lr=3e-3)
        method.threshold = threshold
        before = method.log_lambda.item()
        method.update(*batch())
        assert method.log_lambda.item() - before == pytest.approx(sign * 1e-2, rel=1e-3), "Adam's first step"


def test_a_critic_is_moved_by_no_method():
    for kind in (methods.TD3BC, methods.BCQ, methods.BEARMMD):
        method = make(kind)
        before = method.critic.flat.detach().clone()
        method.update(*batch())
        assert torch.equal(method.critic.flat, before)


# All together.


def test_the_seed_alone_says_what_comes_out(monkeypatch):
    monkeypatch.setattr(figures, "SAMPLES", 50)
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = figures.train(bandit_data(0), 0, 2, QUIET)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is left alone"
    assert torch.get_num_threads() == threads
    torch.manual_seed(6)
    again, other = (figures.train(bandit_data(seed), seed, 2, QUIET) for seed in (0, 1))
    assert list(first) == [*figures.CLONING[1:], *figures.IMPROVEMENT[1:]]
    for name, actions in first.items():
        assert actions.shape == (50, 2)
        assert torch.equal(actions, again[name]), name
        assert not torch.equal(actions, other[name]), name


@pytest.fixture
def _untrained(monkeypatch):
    def train(*_):
        raise AssertionError("work was done before the arguments were looked at")

    monkeypatch.setattr(figures, "train", train)


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"updates": 0}, "updates must be at least 1, got 0; leave it out for 2,000"),
        ({"updates": 2.5}, "updates must be an integer, got 2.5"),
        ({"updates": True}, "updates must be an integer, got True"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
        ({"seed": 1 << 64}, "seed must be an integer from 0"),
    ],
)
def test_wrong_arguments(wrong, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        bandit(tmp_path / "new", console=QUIET, **wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("_untrained")
def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file; give a folder for the figures"):
        bandit(tmp_path / "file", console=QUIET)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory; choose a folder"):
        bandit(tmp_path / "file" / "below", console=QUIET)
    with pytest.raises(CheckpointError, match=r"cannot write /proc/.*; choose a folder that you may write to"):
        bandit("/proc/figures", console=QUIET)
    (tmp_path / "bandit.csv").mkdir()
    with pytest.raises(CheckpointError, match=r"bandit.csv is a folder, .*; remove it"):
        bandit(tmp_path, console=QUIET)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SAMPLES", 100)
    found = bandit(tmp_path / "a" / "b", updates=1, console=QUIET)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == set(figures._FILES)
    for name, content in files.items():
        assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "csv": b"method,"}[name[-3:]])
    rows = list(csv.reader(files["bandit.csv"].decode().splitlines()))[1:]
    assert [row[0] for row in rows] == list(found) == ["data", *figures.CLONING[1:], *figures.IMPROVEMENT[1:]]
    for name, *values in rows:
        within, modes, reward = astuple(found[name])
        want = [within, *modes, reward, 0, 1]
        assert [float(v) if v else math.nan for v in values] == pytest.approx(want, abs=5e-5, nan_ok=True)
    assert bandit(tmp_path / "a" / "b", updates=1, console=QUIET)["data"] == found["data"]
    again = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert again == files, "the same seed gives the same files, in the place of the old ones"


def test_what_the_figures_claim():
    """In three quarters of the updates, without the methods that are no diffusion."""
    data, updates = bandit_data(0), 3 * UPDATES // 4
    critic = figures.train_critic(data, 0, updates, QUIET)
    found = {n: numbers(a) for n, a in figures.train_diffusion(data, critic, 0, updates, QUIET).items()}
    cloned, improved = found["DiffusionBC"], found["Diffusion-QL"]
    assert cloned.within >= 0.95
    assert all(0.2 <= share <= 0.3 for share in cloned.modes)
    assert improved.within >= 0.9
    assert improved.modes[3] >= 0.95
    assert improved.reward > cloned.reward + 2
