"""What an experiment leaves for people: `results.md`, the picture in it, and the same numbers as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from darht.core.files import write_atomic
from darht.core.markdown import escape
from darht.tools.experiment_config import ExperimentConfig
from darht.tools.experiment_results import Result, Way, evaluation
from darht.tools.pictures import COLOURS, figure, save

PAGE, PICTURE, NUMBERS = "results.md", "results.png", "results.json"
_MARKS = "osD^vP<>X"  # one more than there are colours, so that 72 ways differ


def write_page(config: ExperimentConfig, out: Path, result: Result, command: str) -> Path:
    """Write the page, its picture and the numbers; the page's path."""
    ways = result.ways
    judge = "Worst case" if config.tier == "quick" else "AutoAttack"
    draw(ways, judge, out / PICTURE)
    numbers = {"command": command, "judge": config.score, "ways": [asdict(way) for way in ways]}
    write_atomic(out / NUMBERS, (json.dumps(numbers, indent=1) + "\n").encode())
    images = evaluation(out / "run" / config.runs(ways[0].name)[0])["data"]["rows"]
    seeds = f"means over {result.seeds} seeds" if result.seeds > 1 else "one seed"
    seeds += f" of the {config.seeds} asked for, so far" if result.seeds < config.seeds else ""
    paired = (
        f"; gains are over `{config.baseline}`, paired by image, with their 95 % interval" if config.baseline else ""
    )
    page = [
        f"# What {len(ways)} ways of training come to" if len(ways) > 1 else "# What training comes to",
        f"`{command}`, {platform.machine()} with {os.cpu_count()} cores, {_accelerator()}, torch "
        f"{torch.__version__.partition('+')[0]}, {datetime.now(UTC):%Y-%m-%d}. {images:,} test images of "
        f"{config.data['source']}, {seeds}, ± half of a 95 % interval over images{paired}. "
        "CPU seconds are of training one student; those of the cache are shared by all that use it.",
        f"![Clean accuracy and {judge} of each way of training]({PICTURE})",
        _table(
            ("student", "recipe", "inner", "teachers", "parameters", "clean", "PGD-20", judge, "gain", "clean gain",
             "CPU s", "cache s"),
            [_cells(way) for way in ways], text=4,
        ),
        _table(("teacher", "network", "trained by", "clean", "PGD-20", "seconds"), result.teachers, text=3),
        *result.facts,
    ]  # fmt: skip
    path = out / PAGE
    write_atomic(path, ("\n\n".join(page) + "\n").encode())
    return path


def _accelerator() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"


def _cells(way: Way) -> tuple[str, ...]:
    return (
        way.name, way.recipe, way.inner, ", ".join(way.teachers) or "none", f"{way.parameters:,}",
        way.clean.cell, way.pgd.cell, way.judged.cell,
        way.gain.cell if way.gain else "", way.clean_gain.cell if way.clean_gain else "",
        "-" if way.cpu_seconds is None else f"{way.cpu_seconds:.0f}",
        f"{way.cache_seconds:.0f}" if way.teachers else "",
    )  # fmt: skip


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> str:
    """A Markdown table; after the first `text` columns there are numbers."""
    rule = [*["---"] * text, *["---:"] * (len(titles) - text)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *(tuple(map(escape, row)) for row in rows)))


def draw(ways: Sequence[Way], judge: str, path: Path) -> None:
    """Clean accuracy against what the ways are judged by: a dot a way, hollow without teachers; bars are intervals."""
    drawing = figure(7.2, 4.2)
    axes = drawing.add_subplot()
    for k, way in enumerate(ways):
        x, y = way.clean, way.judged
        axes.errorbar(
            x.mean, y.mean,
            xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
            color=COLOURS[k % len(COLOURS)], marker=_MARKS[k % len(_MARKS)], markersize=8, linewidth=1, capsize=2,
            markerfacecolor=None if way.teachers else "white", linestyle="none", label=way.name,
        )  # fmt: skip
    axes.set_xlabel("Clean accuracy, % of test images")
    axes.set_ylabel(f"{judge}, % of test images")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside right center", frameon=False)
    save(drawing, path)
