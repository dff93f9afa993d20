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

from dql import report
from dql.data import TransitionDataset
from dql.datasets.info import DatasetInfo
from dql.policy import DiffusionPolicy
from dql.report import COLORS, action_distribution, colors, learning_curve, seed_interval, spread_states
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
            {
                "step": 100 * (i + 1),
                "episodes": 10,
                "return_mean": mean,
                "return_low": mean - 1,
                "return_high": mean + 1,
            },
        )
    return folder


def test_learning_curve(tmp_path):
    runs = {name: evaluations(tmp_path / name, means) for name, means in (("DiffusionBC", [1, 2]), ("mine", [2, 5, 4]))}
    learning_curve(runs, np.array([0.0, 3.0, 1.0]), tmp_path / "new" / "curve.png")
    assert_picture(tmp_path / "new" / "curve.png", 960, 600)
    learning_curve({}, np.array([0.0, 3.0, 1.0]), tmp_path / "bare.png")
    assert read_png(tmp_path / "bare.png")[2] != read_png(tmp_path / "new" / "curve.png")[2]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, to be read back."""
    drawn = []
    make = report._figure

    def kept(*size):
        figure, axes = make(*size)
        drawn.append(figure)
        return figure, axes

    monkeypatch.setattr(report, "_figure", kept)
    return drawn


def read_curves(figure):
    """label -> (colour, steps, means, {step: (low, high) of the band}, the band's colour), the data's left out."""
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines()[1:]}  # the first is the data's
    found = {}
    for (label, line), band in zip(lines.items(), ax.collections, strict=True):
        ends: dict[float, list[float]] = {}
        for path in band.get_paths():
            for step, value in path.vertices:
                ends.setdefault(float(step), []).append(float(value))
        steps, means = line.get_xdata(), line.get_ydata()
        bands = {step: (min(values), max(values)) for step, values in ends.items()}
        found[label] = (to_hex(line.get_color()), list(steps), list(means), bands, to_hex(band.get_facecolor()[0]))
    return found


def test_each_curve_has_its_own_colour(tmp_path, figures):
    """Of any name, and its band has it too: a band without one would be blue whatever the line is."""
    names = ["mine", "DiffusionBC", "yours", "Diffusion-QL", *(f"run {i}" for i in range(20))]
    runs = {name: evaluations(tmp_path / name, [1, 2, 3]) for name in names}
    learning_curve(runs, np.array([0.0, 3.0]), tmp_path / "curve.png")
    curves = read_curves(figures[0])
    assert list(curves) == [f"{name}, one run, over 10 episodes" for name in names]
    seen = [color for color, *_ in curves.values()]
    assert seen == [band for *_, band in curves.values()]
    assert len({*seen, to_hex(COLORS["data"])}) == len(names) + 1
    assert seen[1] == to_hex(COLORS["DiffusionBC"])
    assert seen[3] == to_hex(COLORS["Diffusion-QL"])


def test_many_colours_differ():
    names = [f"run {i}" for i in range(100)]
    assert len({*colors([*COLORS, *names]).values()}) == len(COLORS) + 100
    assert colors(names) == colors(names)


def test_the_band_of_one_run_is_over_its_episodes(tmp_path, figures):
    learning_curve({"mine": evaluations(tmp_path / "mine", [1, 5])}, np.array([0.0, 3.0]), tmp_path / "curve.png")
    ((label, (_, steps, means, bands, _)),) = read_curves(figures[0]).items()
    assert label == "mine, one run, over 10 episodes"
    assert (steps, means, bands) == ([100, 200], [1, 5], {100: (0, 2), 200: (4, 6)})


def test_the_band_of_several_runs_is_over_them(tmp_path, figures):
    """Wide where the runs differ, of no width where they agree, whatever their episodes' intervals are."""
    seeds = [evaluations(tmp_path / str(i), means) for i, means in enumerate([[1, 5], [2, 5, 9], [3, 5, 7]])]
    learning_curve({"mine": seeds, "one": seeds[:1]}, np.array([0.0, 3.0]), tmp_path / "curve.png")
    label, (_, steps, means, bands, _) = next(iter(read_curves(figures[0]).items()))
    assert label == "mine, over 3 runs"
    assert (steps, means) == ([100, 200], [2, 5]), "where all were evaluated"
    assert bands[100] == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))  # their standard deviation is 1
    assert bands[200] == pytest.approx((5, 5))


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 12])
def test_the_interval_over_seeds_covers_the_mean(seeds):
    rng = np.random.default_rng(seeds)
    draws = rng.normal(3.0, 2.0, (4000, seeds))
    ends = np.array([seed_interval(row) for row in draws])
    covered = ((ends[:, 0] <= 3.0) & (ends[:, 1] >= 3.0)).mean()
    assert covered == pytest.approx(0.95, abs=0.014)  # four standard errors of 4,000 trials


def test_runs_that_make_no_interval(tmp_path):
    folder = evaluations(tmp_path / "mine", [1])
    for runs in ([], [folder, folder]):
        with pytest.raises(ValueError, match="mine: its runs must be one or more different folders, got "):
            learning_curve({"mine": runs}, np.array([1.0]), tmp_path / "curve.png")
    with pytest.raises(ValueError, match="needs two at least"):
        seed_interval(np.array([1.0]))


def test_policies_of_any_name_have_their_own_colour(tmp_path, figures):
    policies = {name: DiffusionPolicy(3, 1, 1.0, 16, 2) for name in ("mine", "yours", "Diffusion-QL")}
    action_distribution(dataset(50, 3, 1), policies, tmp_path / "a.png", states=torch.zeros(1, 3))
    handles = figures[0].axes[0].get_legend_handles_labels()[0]
    seen = [to_hex(h.get_facecolor() if i == 0 else h.get_edgecolor()) for i, h in enumerate(handles)]
    assert len(set(seen)) == 4
    assert (seen[0], seen[3]) == (to_hex(COLORS["data"]), to_hex(COLORS["Diffusion-QL"]))


def test_the_curve_of_a_run_without_evaluations(tmp_path):
    learning_curve({"mine": tmp_path}, np.array([1.0]), tmp_path / "curve.png")
    assert_picture(tmp_path / "curve.png", 960, 600)


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
