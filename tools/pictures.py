"""Figures without a window and without global state."""

from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
