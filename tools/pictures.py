"""Figures without a window and without global state."""

from io import BytesIO
from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from darht.core.files import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#806000", "#444444")  # Okabe and Ito


def figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, in a layout that makes room for its labels."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save(fig: Figure, path: Path) -> None:
    """Write a PNG at 150 dots per inch, whatever the file's name ends with.

    Raises:
        DarhtError: the folder cannot be written or the disk is full.
    """
    png = BytesIO()
    with matplotlib.style.context("default"):
        fig.savefig(png, dpi=150, format="png")
    write_atomic(path, png.getvalue())
