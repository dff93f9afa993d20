"""Prints a bench report as the README's table: python bench/table.py bench/results/REPORT.json"""

import json
import sys
from pathlib import Path


def time(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.3g} ms"


def table(report: dict) -> str:
    """A line a problem. `published` is its median in the rounds beside dql; the ratio is the median over pairs."""
    rows = [row for row in report["rows"] if row["speedup_over"]["published"] is not None]
    lines = [
        "| | `dql`, eager | published | faster than published | faster than torch.compile |",
        "|---|---|---|---|---|",
    ]
    for ours in (row for row in rows if row["contender"] == "dql-eager"):
        compiled = [
            row["speedup_over"]["published"]
            for row in rows
            if row["problem"] == ours["problem"] and row["contender"].startswith("compile")
        ]
        ratio = ours["speedup_over"]["published"]
        low, _, high = ours["speedup_over_published_quartiles"]
        rival = f"{ratio / max(compiled):.2f}x" if compiled else ""
        lines.append(
            f"| {ours['problem']} | {time(ours['median_us'])} | {time(ours['baseline_median_us'])} "
            f"| {ratio:.2f}x ({low:.2f} to {high:.2f}) | {rival} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python bench/table.py bench/results/REPORT.json")
    print(table(json.loads(Path(sys.argv[1]).read_text())))
