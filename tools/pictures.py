"""Figures without a window and without global state."""

from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#806000", "#444444")  # Okabe and Ito


def figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, in a layout that makes room for its labels."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: Path) -> None:
    """Write a PNG at 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context("default"):
        fig.savefig(path, dpi=150)
