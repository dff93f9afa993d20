"""The numbers of docs/claims.md are those of the files that it names."""

import csv
import re
import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import claims

PAGE = (ROOT / "docs" / "claims.md").read_text()


def test_the_comparison_is_what_its_runs_wrote():
    assert claims.table(ROOT / "docs" / "results") in PAGE
    for folder in ("hopper-medium-expert", "pendulum-mixed"):
        found = claims.scores(ROOT / "docs" / "results" / folder)
        assert list(found) == list(claims.NAMES) and {len(seeds) for seeds in found.values()} == {3}
        for path in (ROOT / "docs" / "results" / folder).glob("*.csv"):
            with open(path) as file:
                rows = list(csv.DictReader(file))
            assert [int(row["step"]) for row in rows] == [*range(2500, 20_001, 2500)], path
            assert {row["episodes"] for row in rows} == {"20"}, path


def test_the_longer_runs_are_what_they_wrote():
    names = {
        "bc": "BC, 100,000 updates",
        "td3-bc": "TD3+BC, 100,000 updates",
        "iql": "IQL, 100,000 updates",
        "iql-temperature-0.5": "IQL, 20,000 updates, temperature 0.5",
        "diffusion-ql": "Diffusion-QL, 100,000 updates",
    }
    folder = ROOT / "docs" / "results" / "hopper-longer"
    assert {path.stem for path in folder.iterdir()} == names.keys()
    for stem, name in names.items():
        with open(folder / f"{stem}.csv") as file:
            rows = list(csv.DictReader(file))
        returns = [float(row["return_mean"]) for row in rows]
        low, high = min(returns), max(returns)
        assert f"| {name} | {claims.score(folder / f'{stem}.csv'):,.0f} | {low:,.0f} to {high:,.0f} |" in PAGE
        assert rows[-1]["step"] == ("20000" if "temperature" in stem else "100000")


def test_a_score_by_hand(tmp_path):
    for seed, returns in ((0, (9, 9, 1, 2, 3)), (1, (0, 4, 4, 4)), (7, (1, 1, 1))):
        lines = "".join(f"{i},{value}\n" for i, value in enumerate(returns))
        (tmp_path / f"bc-seed{seed}.csv").write_text("step,return_mean\n" + lines)
    assert claims.scores(tmp_path) == {"bc": [2, 4, 1]}
    # mean 7/3; s = 1.5275; t = 4.3027: half = 4.3027 * 1.5275 / sqrt(3) = 3.79
    assert claims.cell([2.0, 4.0, 1.0]) == "2 ± 4 (2, 4, 1)"
    (tmp_path / "bc-seed8.csv").write_text("step,return_mean\n1,2\n")
    with pytest.raises(ValueError, match="has not 3 evaluations at its end that succeeded"):
        claims.scores(tmp_path)


@pytest.mark.parametrize("name", ["eta", "steps", "candidates"])
def test_the_ablations_are_what_their_runs_wrote(name):
    path = ROOT / "docs" / "results" / "ablations" / f"{name}.csv"
    assert claims.ablation_table(path) in PAGE
    with open(path) as file:
        rows = list(csv.DictReader(file))
    value = next(iter(rows[0]))
    acting = {float(row[value]) if name == "candidates" else row["candidates"] for row in rows}
    assert acting == ({1, 10, 50} if name == "candidates" else {"50", "1"})
    runs = {(row[value], row["candidates"], row["seed"]) for row in rows}
    assert (
        len(runs) == len(rows) == {"eta": 6, "steps": 5, "candidates": 3}[name] * 3 * (1 if name == "candidates" else 2)
    )


def test_the_readmes_numbers_of_eta_are_the_pages():
    readme = (ROOT / "README.md").read_text()
    (said,) = re.findall(r"\*\*Cloning and improvement are balanced\*\*.*?!\[", readme, re.DOTALL)
    (row,) = re.findall(r"^\| eta \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    alone = {line.split(" | ")[0].strip("| "): line.split(" | ")[2].split()[0] for line in row.splitlines()[2:] if line}
    numbers = [alone["0"], alone["2"], alone["200"]]
    assert re.findall(r"-\d+", said) == [numbers[0], "-794", *numbers[1:], "-153"]


def test_the_commands_are_those_of_the_algorithms():
    from dql.agents.registry import ALGORITHMS

    named = set(re.findall(r"--algorithm ([\w-]+)", PAGE))
    assert named == set(ALGORITHMS) - {"bc-gaussian"}


def test_the_bandits_table_is_what_its_runs_wrote():
    tables = []
    for seed in (0, 1, 2):
        with open(ROOT / "docs" / "results" / "bandit" / f"seed{seed}.csv") as file:
            tables.append({row["method"]: row for row in csv.DictReader(file)})
        assert {(row["seed"], row["updates"]) for row in tables[-1].values()} == {(str(seed), "2000")}
    for method in tables[0]:
        cells = []
        for table in tables:
            names = ("within", "upper_left", "lower_left", "upper_right", "lower_right", "true_reward")
            within, *modes, reward = (float(table[method][name]) for name in names)
            cells.append(f"{within:.1%}; {', '.join(f'{100 * share:.0f}' for share in modes)}; {reward:.2f}")
        assert f"| {' | '.join(cells)} |" in PAGE, method
    for table in tables:
        cloned, improved = table["DiffusionBC"], table["Diffusion-QL"]
        assert float(cloned["within"]) >= 0.95
        assert all(0.2 <= float(share) <= 0.3 for share in list(cloned.values())[2:6])
        assert float(improved["within"]) * float(improved["lower_right"]) >= 0.95, "of all samples"
