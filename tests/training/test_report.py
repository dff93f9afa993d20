"""Pictures: written as PNG without a display, for one and for many action dimensions."""

import os
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from dql.data import TransitionDataset
from dql.datasets.info import DatasetInfo
from dql.evaluate import confidence_interval
from dql.policy import DiffusionPolicy
from dql.report import COLORS, action_distribution, colors_of, learning_curve, spread_states
from dql.rundir import RunDir, append_row


def dataset(N, S, A, max_action=1.0):
    rng = torch.Generator().manual_seed(0)
    states, following = (torch.randn(N, S, generator=rng) for _ in range(2))
    actions = (torch.rand(N, A, generator=rng) * 2 - 1) * max_action
    info = DatasetInfo("some/thing-v0", None, None, None, 1, np.zeros(1), "box", max_action)
    return TransitionDataset(states, actions, torch.zeros(N), following, torch.ones(N), info)


def read_png(path):
    """Width, height and the decompressed pixels; checks signature and every chunk's checksum."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, kinds = 8, b"", []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
        at += 12 + length
    assert kinds[-1] == b"IEND"
    return width, height, zlib.decompress(pixels)


def assert_picture(path, width, height):
    found_width, found_height, pixels = read_png(path)
    assert (found_width, found_height) == (pytest.approx(width, abs=2), pytest.approx(height, abs=2))
    assert len(set(pixels)) > 50, "the picture is empty"


@pytest.mark.parametrize(("A", "panels"), [(1, 1), (6, 3)])
def test_action_distribution(A, panels, tmp_path):
    data = dataset(600, 4, A, max_action=2.0)
    policies = {name: DiffusionPolicy(4, A, 2.0, 16, 2) for name in ("DiffusionBC", "Diffusion-QL")}
    path = tmp_path / "new" / "actions.png"
    action_distribution(data, policies, path)
    assert_picture(path, 4 * 2.6 * 150, (2.3 * panels + 0.6) * 150)


def test_chosen_states_and_titles(tmp_path):
    data = dataset(50, 3, 1)  # fewer rows than neighbours are asked for
    states = torch.zeros(2, 3, dtype=torch.float64)
    action_distribution(data, {}, tmp_path / "a.png", states=states, titles=["here", "there"])
    assert_picture(tmp_path / "a.png", 2 * 2.6 * 150, 2.9 * 150)


def test_pictures_repeat(tmp_path):
    data, policy = dataset(300, 3, 2), DiffusionPolicy(3, 2, 1.0, 16, 2)
    for name in ("a", "b"):
        action_distribution(data, {"Diffusion-QL": policy}, tmp_path / f"{name}.png", seed=7)
    action_distribution(data, {"Diffusion-QL": policy}, tmp_path / "c.png", seed=8)
    a, b, c = (read_png(tmp_path / f"{name}.png")[2] for name in "abc")
    assert a == b
    assert a != c


def test_spread_states_are_far_apart():
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    data = dataset(400, 2, 1)
    data.states.copy_(centres.repeat(100, 1) + 0.1 * data.states)
    chosen = spread_states(data, 4)  # [4, 2]
    assert torch.cdist(chosen, centres).argmin(1).unique().numel() == 4, "one of each cluster"
    rows = {tuple(row) for row in data.states.tolist()}
    assert all(tuple(row) in rows for row in chosen.tolist()), "they are states of the data"


def evaluations(folder, means):
    RunDir(folder).path.mkdir()
    for i, mean in enumerate(means):
        append_row(
            RunDir(folder).evaluations_path,
            {"step": 100 * (i + 1), "return_mean": mean, "return_low": mean - 1, "return_high": mean + 1},
        )
    return folder


def test_learning_curve(tmp_path):
    runs = {name: evaluations(tmp_path / name, means) for name, means in (("DiffusionBC", [1, 2]), ("mine", [2, 5, 4]))}
    learning_curve(runs, np.array([0.0, 3.0, 1.0]), tmp_path / "new" / "curve.png")
    assert_picture(tmp_path / "new" / "curve.png", 960, 600)
    learning_curve({}, np.array([0.0, 3.0, 1.0]), tmp_path / "bare.png")
    assert read_png(tmp_path / "bare.png")[2] != read_png(tmp_path / "new" / "curve.png")[2]


def test_the_curve_of_a_run_without_evaluations(tmp_path):
    learning_curve({"mine": tmp_path}, np.array([1.0]), tmp_path / "curve.png")
    assert_picture(tmp_path / "curve.png", 960, 600)


def test_each_curve_has_one_colour_and_says_what_its_band_is(tmp_path):
    """Line and band of one name in one colour, of two names in two; episodes of one run, seeds of several."""
    alone = evaluations(tmp_path / "a", [2.0, 5.0])
    seeds = [evaluations(tmp_path / f"s{i}", [10.0 * i, 3.0, 7.0][: 2 + i % 2]) for i in range(4)]
    figure = learning_curve({"mine": alone, "other": seeds, "DiffusionBC": alone}, np.zeros(2), tmp_path / "c.png")
    ax = figure.axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()[1:]}
    assert list(lines) == [
        "mine, interval over episodes",
        "other, interval over 4 seeds",
        "DiffusionBC, interval over episodes",
    ]
    colors = [to_hex(line.get_color()) for line in lines.values()]
    bands = [to_hex(band.get_facecolor()[0][:3]) for band in ax.collections]
    assert colors == bands
    assert len({*colors, COLORS["data"].lower()}) == 4
    assert colors[2] == COLORS["DiffusionBC"].lower()
    other = lines["other, interval over 4 seeds"]
    assert other.get_xydata().tolist() == [[100.0, 15.0], [200.0, 3.0]]  # what all seeds have
    band = ax.collections[1].get_paths()[0].vertices
    low, high = confidence_interval(np.array([0.0, 10.0, 20.0, 30.0]))
    assert band[:, 1].min() == 3.0 and band[:, 1].max() == high  # no spread where the seeds agree
    assert low in band[:, 1]


def test_many_names_have_their_own_colours():
    colors = colors_of([*"abcdefg", "data"])
    assert len(set(colors.values())) == 8


def test_failed_evaluations_are_left_out(tmp_path):
    folder = evaluations(tmp_path / "a", [2.0, float("nan"), 4.0])
    figure = learning_curve({"mine": folder}, np.zeros(2), tmp_path / "c.png")
    assert figure.axes[0].get_lines()[1].get_xydata().tolist() == [[100.0, 2.0], [300.0, 4.0]]


def test_no_display_is_needed(tmp_path):
    """In a process without a display, and with a backend that cannot be: the figures use neither."""
    code = """
    import sys
    from pathlib import Path
    import numpy as np
    from dql.report import learning_curve
    learning_curve({}, np.arange(3.0), Path(sys.argv[1]))
    assert "matplotlib.pyplot" not in sys.modules  # which would choose a backend for the whole process
    """
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "curve.png")],
        env=env | {"MPLBACKEND": "tkagg"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_picture(tmp_path / "curve.png", 960, 600)


def test_curves_that_cannot_be_drawn(tmp_path):
    header = "step,return_mean,return_low,return_high"
    for name, lines in (("a", "100,1,0,2"), ("b", "150,1,0,2"), ("failed", "100,,,")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.csv").write_text(f"{header}\n{lines}\n")
    good, picture = {"a": tmp_path / "a"}, str(tmp_path / "curve.png")
    for runs, sentence in (
        ({"none": tmp_path / "none"}, "does not exist"),
        ({"both": [tmp_path / "a", tmp_path / "failed"]}, "no step in common"),
        ({"both": [tmp_path / "a", tmp_path / "b"]}, "no step in common"),
        ({"empty": []}, "has no run"),
    ):
        with pytest.raises(ValueError, match=sentence):
            learning_curve(runs, np.ones(3), picture)
    for returns in (np.zeros(0), np.array([1.0, np.nan]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="behaviour_returns must be finite numbers"):
            learning_curve(good, returns, picture)
    learning_curve(good, [1.0, 2.0], picture)
    assert (tmp_path / "curve.png").is_file()
