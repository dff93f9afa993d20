"""`dql demo`, for real but short: the whole of it in a process of its own, on the whole dataset."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest

from dql.demo import CLONE, EVALUATIONS
from dql.rundir import RunDir, read_rows

SHORT = ("--updates", "20", "--episodes", "2")


@pytest.fixture(scope="module")
def shown(tmp_path_factory, dql_command):
    """(working folder, what the first demo there said); the environment of the commands."""
    place = tmp_path_factory.mktemp("demo")
    env = os.environ | {
        "MINARI_DATASETS_PATH": str(place / "minari"),
        "DQL_CACHE": str(place / "cache"),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "100",
    }
    done = run(dql_command("demo", *SHORT), place, env)
    assert done.returncode == 0, done.stderr
    return place, env, done.stdout


def run(command, place, env):
    return subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
    )


def test_it_makes_the_dataset_and_says_so(shown):
    place, _, said = shown
    assert "making dql/pendulum/mixed-v0" in said
    assert "40,000 transitions" in said
    assert (place / "minari" / "dql" / "pendulum" / "mixed-v0" / "data" / "main_data.hdf5").exists()


def test_the_table(shown):
    _, _, said = shown
    for name in (r"data \(behaviour\)", "BC", "DiffusionBC", "Diffusion-QL"):
        row = re.search(rf"│ {name}\s+│\s*(-?[\d.]+) │\s*\[(-?[\d.]+), (-?[\d.]+)\] │\s*(-?[\d.]+) │", said)
        assert row, (name, said)
        mean, low, high, _ = map(float, row.groups())
        assert low <= mean <= high < 0
    behaviour = float(re.search(r"data \(behaviour\)\s+│\s*(-?[\d.]+)", said)[1])
    assert -950 < behaviour < -650, "FACTS: data with mean return -807"


def test_it_says_where_the_seconds_went(shown):
    _, _, said = shown
    line = " ".join(said[said.index("seconds: ") :].split())
    for part in ("data", "train BC", "train DiffusionBC", "train Diffusion-QL", "evaluate DiffusionBC", "pictures"):
        assert re.search(rf"{part} \d+", line), part
    assert re.search(r"\d+ in all, \d+ thread\(s\)", line)


def test_the_pictures(shown):
    place, _, _ = shown
    for name in ("learning_curve.png", "actions.png"):
        data = (place / "runs" / "demo" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data[-8:-4] == b"IEND"
        width, height = struct.unpack(">II", data[16:24])
        assert min(width, height) >= 300
        assert len(data) > 10_000, "the picture is empty"


def test_all_runs_are_there(shown):
    place, _, _ = shown
    for algorithm, times in {"bc": 1, "diffusion-bc": CLONE, "diffusion-ql": 1}.items():
        folder = RunDir(place / "runs" / "demo" / algorithm)
        assert folder.steps()[-1] == 20 * times
        evaluated = [row["step"] for row in read_rows(folder.evaluations_path)]
        every = 20 * times // EVALUATIONS
        assert evaluated == sorted({*range(0, 20 * times + 1, every), 20 * times}), "from the untrained agent on"
        assert folder.read_config()["run"]["agent"]["algorithm"] == algorithm


def test_the_printed_lines_work(shown):
    """The three lines, taken from what was printed and nothing else, in a fresh Python."""
    place, env, said = shown
    lines = [line.strip() for line in said.strip().splitlines()[-3:]]
    assert lines[0].startswith("import dql")
    assert "dql.sample(" in lines[2]
    done = run([sys.executable, "-c", "\n".join(lines)], place, env)
    assert done.returncode == 0, done.stderr
    action = float(re.fullmatch(r"tensor\(\[\[(-?[\d.]+)\]\].*\)\s*", done.stdout)[1])
    assert -2.0 <= action <= 2.0


def test_again_uses_what_is_there(shown, dql_command):
    place, env, first = shown
    checkpoints = {p: p.stat().st_mtime_ns for p in (place / "runs" / "demo").rglob("agent.safetensors")}
    (place / "runs" / "demo" / "actions.png").unlink()
    done = run(dql_command("demo", *SHORT), place, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already trained") == 3
    assert "making" not in done.stdout
    assert table(done.stdout) == table(first), "the same agents, the same episodes"
    assert {p: p.stat().st_mtime_ns for p in (place / "runs" / "demo").rglob("agent.safetensors")} == checkpoints
    assert (place / "runs" / "demo" / "actions.png").exists()


def table(said):
    return [line for line in said.splitlines() if line.startswith("│")]


def test_other_settings_are_refused(shown, dql_command):
    place, env, _ = shown
    done = run(dql_command("demo", "--updates", "21", "--episodes", "2"), place, env)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "--fresh" in line
    assert "--out" in line
    assert RunDir(place / "runs" / "demo" / "diffusion-ql").steps()[-1] == 20


def test_fresh_starts_over(shown, dql_command):
    place, env, _ = shown
    shutil.copytree(place / "runs" / "demo", place / "fresh")
    done = run(dql_command("demo", "--updates", "1", "--episodes", "1", "--fresh", "--out", "fresh"), place, env)
    assert done.returncode == 0, done.stderr
    for algorithm, times in {"bc": 1, "diffusion-bc": CLONE, "diffusion-ql": 1}.items():
        assert RunDir(place / "fresh" / algorithm).steps()[-1] == times
    json.loads((place / "fresh" / "diffusion-ql" / "config.json").read_text())


def test_fresh_drops_nothing_else(shown, dql_command):
    """`--fresh --out ~/thesis` must not cost a thesis."""
    place, env, _ = shown
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter1.tex").write_text("years of work")
    run(dql_command("demo", "--updates", "0", "--fresh", "--out", "thesis"), place, env)  # ends before training
    assert (place / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize("flags", [("--updates", "0"), ("--episodes", "0"), ("--seed", "-1")], ids=" ".join)
def test_bad_settings_are_refused_before_training(flags, shown, dql_command):
    place, env, _ = shown
    other = ("--updates", "2") if flags[0] != "--updates" else ()
    out = "bad" + "".join(flags)
    done = run(dql_command("demo", *other, *flags, f"--out={out}"), place, env)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (place / out / "diffusion-bc").exists()
