"""The picture of a run: loss, accuracies and learning rate by epoch, with the recipe's phases."""

import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from darht.core.config import parse
from darht.core.files import write_atomic
from darht.trainer.state.checkpoint import read_log, read_run
from darht.trainer.student.losses import RECIPES

CURVES = "curves.png"
# Colour-blind safe (Okabe and Ito); held-out rows are drawn solid, training batches thin and dashed.
_CLEAN, _ROBUST, _INK, _GREY = "#0072B2", "#D55E00", "#222222", "#777777"
_SERIES = (
    ("holdout_clean", "held out, clean", _CLEAN, "-", 2.0),
    ("holdout_pgd", "held out, PGD", _ROBUST, "-", 2.0),
    ("train_clean", "training, clean", _CLEAN, "--", 1.0),
    ("train_adversarial", "training, adversarial", _ROBUST, "--", 1.0),
)
Row = dict[str, Any]


def write_curves(run: Path) -> Path:
    """Draw `RUN/curves.png` from `RUN/log.jsonl` and `RUN/run.json`; returns its path.

    Raises:
        CacheError: the folder holds no run, or one whose log is damaged.
    """
    recipe = read_run(run)["identity"]["recipe"]
    rows = read_log(run)
    title = f"{run.resolve().name}: {recipe['recipe']} on {recipe['student']['arch']}, inner {recipe['inner']['kind']}"
    picture = draw_curves(rows, epochs=recipe["optim"]["epochs"], phases=_phases(recipe), title=title)
    write_atomic(run / CURVES, picture)
    return run / CURVES


def _phases(recipe: dict[str, Any]) -> tuple[tuple[float, str], ...]:
    """Where the recipe's phases begin, in epochs, and what is trained in them."""
    kind, given = RECIPES[recipe["recipe"]], {**recipe, **recipe.get("loss", {})}  # old runs have no `loss`
    names = [field.name for field in fields(cast(Any, kind)) if field.name in given]
    loss = parse(kind, {name: given[name] for name in names}, f"loss of recipe {recipe['recipe']}")
    return tuple((share * recipe["optim"]["epochs"], name) for share, name in loss.phases_by_name())


def draw_curves(rows: Sequence[Row], *, epochs: int, phases: Sequence[tuple[float, str]], title: str) -> bytes:
    """A PNG of 960 x 960 pixels.

    Args:
        rows: the log, one row for each finished epoch; figures that were not measured are absent or None.
        epochs: of the whole run, which the horizontal axis spans from the start.
        phases: beginnings in epochs with their names, in order; empty for none.
        title: above everything.
    """
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 4, 2))
        figure.suptitle(title, fontsize=12, color=_INK)
        _line(loss, rows, "loss", color=_INK, width=1.5)
        loss.set_ylabel("training loss")
        _draw_accuracies(accuracy, rows)
        _line(rate, rows, "lr", color=_INK, width=1.5)
        rate.set_ylabel("learning rate")
        rate.set_ylim(bottom=0)
        rate.set_xlabel("epoch")
        rate.set_xlim(0.5, epochs + 0.5)
        rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axes in (loss, accuracy, rate):
            _dress(axes, phases)
        _name_phases(loss, phases, epochs)
        figure.align_ylabels()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _line(
    axes: Axes, rows: Sequence[Row], key: str, *, color: str, width: float, style: str = "-", label: str = ""
) -> None:
    """One curve; epochs without the figure are left out, and few epochs get dots so that a single one is seen."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if len(points) <= 15 else ""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=color, linewidth=width, marker=marker, markersize=2.5 + width / 2, label=label)


def _draw_accuracies(axes: Axes, rows: Sequence[Row]) -> None:
    for key, label, color, style, width in _SERIES:
        _line(axes, rows, key, color=color, width=width, style=style, label=label)
    axes.set_ylabel("accuracy %")
    axes.set_ylim(0, 100)
    scored = [row for row in rows if row.get("holdout_pgd") is not None]
    if scored:
        best = max(scored, key=lambda row: (row["holdout_pgd"], row["epoch"]))
        label = f"best: epoch {best['epoch']}, PGD {best['holdout_pgd']:.1f} %"
        axes.plot(best["epoch"], best["holdout_pgd"], "*", color=_ROBUST, markersize=13, zorder=5, label=label,
                  markeredgecolor="white", linestyle="none")  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=3, frameon=False, fontsize=9)


def _dress(axes: Axes, phases: Sequence[tuple[float, str]]) -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for start, _ in phases[1:]:
        axes.axvline(start + 0.5, color=_GREY, linewidth=1.0, linestyle=":")  # between two epochs


def _name_phases(axes: Axes, phases: Sequence[tuple[float, str]], epochs: int) -> None:
    """Each phase's name above its part of the axis; a phase too narrow for its name goes without."""
    ends = [*(start for start, _ in phases[1:]), float(epochs)]
    for (start, name), end in zip(phases, ends, strict=True) if phases else ():
        if (end - start) / epochs >= 0.018 * len(name):
            middle = (start + end) / 2 + 0.5
            axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", color=_GREY, fontsize=10)
