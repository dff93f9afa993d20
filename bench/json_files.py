"""JSON files that are whole or not there."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """None where there is no file, or no whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
