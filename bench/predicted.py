"""The written model of the CUDA kernels' time (kernels/cuda/plan.py) beside what a GPU took: what a lease calibrates.

    python bench/predicted.py bench/results/REPORT.json [--clock 1.9]

For each forward pass of `cuda` in a report: the tiling that the model chooses today, what it takes it to last, its
largest part, and the measured device time, of whatever tiling was chosen then. The report tells how many clusters its
GPU runs at a time; where it does not, as many as there are multiprocessors for.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bounds import FORWARD
from json_files import read_json

CLUSTERS = "clusters"  # the check of gpu/checks.py that counts them


@dataclass(frozen=True)
class Prediction:
    """What the model says of a forward pass.

    Attributes:
        us: microseconds of the device.
        bound: the largest part of them, a field of `plan.Cost`.
        tiling: in short: "solo 8", "cluster 4 x 16", "streamed 32", "wide 128" rows.
    """

    us: float
    bound: str
    tiling: str


def predicted(
    B: int, precision: str, multiprocessors: int, placed: Mapping[int, int], clock: float
) -> Prediction | None:
    """Of `dql.sample` at the benches' sizes on a Hopper GPU. None where nothing can be asked of the extension.

    Args:
        placed: blocks a cluster -> how many clusters run at a time.
        clock: of the multiprocessors, in Hz.
    """
    from rivals import A, H, S, T

    from dql.kernels.cuda import plan
    from dql.kernels.layout import DenoiserSpec

    rows = -(-B // plan.FEW_ROWS) * plan.FEW_ROWS
    problem = plan.Problem(DenoiserSpec(S, A, H), precision, rows, T, 1, False)
    found = []
    for tiling in plan.possible(problem, 90, True):
        at_once = multiprocessors if tiling.cluster == 1 else placed.get(tiling.cluster)
        try:
            fits = plan.shared_bytes(problem, tiling) <= 227 * 1024
        except ImportError as error:
            print(f"no sizes can be asked for: {error}; run python setup.py build_cuda_emulator", file=sys.stderr)
            return None
        if fits and at_once != 0:
            found.append((plan.cost(problem, tiling, multiprocessors, at_once), tiling))
    told, tiling = min(found, key=lambda pair: pair[0].total)
    return Prediction(1e6 * told.total / clock, told.bound, str(tiling))


def placed_in(report: dict[str, Any]) -> dict[int, int]:
    """Blocks a cluster -> clusters at a time, as the report's checks found them: "15 of 8"."""
    found = (f["what"] for check in report.get("checks", []) if check["kind"] == CLUSTERS for f in check["found"])
    matches = filter(None, (re.fullmatch(r"(\d+) of (\d+)", what) for what in found))
    return {int(match[2]): int(match[1]) for match in matches}


def main() -> int:
    """Prints the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--clock", type=float, default=1.9, help="of the multiprocessors, in GHz")
    told = parser.parse_args()
    report = read_json(told.report)
    if not isinstance(report, dict) or not isinstance(report.get("tables"), dict):
        print(f"{told.report} is no report of a bench; give one, such as bench/results/REPORT.json", file=sys.stderr)
        return 1
    os.environ.setdefault("DQL_CUDA_EMULATE", "1")  # sizes are the same, and it needs no GPU
    from table import GPU_TITLE

    rows = [row for row in report["tables"].get(GPU_TITLE, []) if row["problem"] == FORWARD]
    rows = [row for row in rows if re.fullmatch(r"dql-cuda-\w+", row["contender"])]
    if not rows:
        print(f"{told.report} has no forward pass of cuda; give a report that bench/gpu.sh wrote", file=sys.stderr)
        return 1
    multiprocessors = int(report.get("gpu", {}).get("multiprocessors", 132))
    print("| B | precision | measured, us | tiling today | predicted, us | largest part |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["precision"], row["B"])):
        said = predicted(row["B"], row["precision"], multiprocessors, placed_in(report), 1e9 * told.clock)
        model = ("", "", "") if said is None else (said.tiling, f"{said.us:.1f}", said.bound)
        cells = (str(row["B"]), row["precision"], f"{row['device_us'][1]:.1f}", *model)
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
