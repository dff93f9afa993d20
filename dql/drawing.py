"""Figures: made without a display, one colour a subject in all of them, written atomically as PNG and PDF."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dql.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable without red-green vision (Okabe and Ito).
COLORS = {
    "data": "#7f7f7f",
    "DiffusionBC": "#0072B2",
    "Diffusion-QL": "#D55E00",
    "Diffusion-QL, acting": "#E69F00",
    "BC": "#56B4E9",
    "TD3+BC": "#009E73",
    "IQL": "#CC79A7",
    "EDP": "#000000",
}
DPI = 150


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", np.ndarray]:
    """(figure, axes [rows, columns]) of so many inches, laid out so that nothing overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def write_figure(figure: "Figure", path: Path, kinds: Iterable[str] = ("png", "pdf")) -> list[Path]:
    """Writes the figure as path.png and path.pdf; gives their paths. The same figure makes the same bytes.

    Raises:
        CheckpointError: no space, no permission.
    """
    written = []
    for kind in kinds:
        data = io.BytesIO()
        # matplotlib writes the time of day into a PDF
        figure.savefig(data, format=kind, dpi=DPI, metadata={"CreationDate": None} if kind == "pdf" else None)
        written.append(path.with_name(f"{path.name}.{kind}"))
        write_atomically(written[-1], data.getvalue())
    return written
