"""Transferability: what examples made on one model do to another.

The images are class-balanced and answered rightly by both models of a pair, so that a column says what the examples do
and not how good the target is. The diagonal is the white-box accuracy.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darht.attacks.apgd import APGD
from darht.attacks.engine.engine import Engine
from darht.attacks.engine.slots import forward_all
from darht.attacks.objectives import Model
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.files import write_atomic
from darht.core.rng import RowRng
from darht.core.stats import wilson


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pair.

    Attributes:
        correct: images that the target still answers rightly under every attack.
        count: images that both models answer rightly when clean.
    """

    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """The target's accuracy in per cent; NaN when no image was left."""
        return 100 * self.correct / self.count if self.count else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval in per cent."""
        low, high = wilson(self.correct, self.count)
        return 100 * low, 100 * high


@dataclass(frozen=True, kw_only=True)
class TransferMatrix:
    """`cells[source][target]`: the target's accuracy on what was made against the source.

    Attributes:
        names: of the models, in order; rows are sources and columns targets.
        cells: as many rows as names, each with as many cells.
        record: attacks, images, seed.
    """

    names: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    record: dict[str, Any]

    def table(self) -> str:
        """Markdown: accuracy in per cent with its 95 % interval."""
        head = ["| made on \\ asked of |", *(f" {name} |" for name in self.names)]
        rule = ["|---|", *("---|" for _ in self.names)]
        lines = ["".join(head), "".join(rule)]
        for name, row in zip(self.names, self.cells, strict=True):
            lines.append(f"| {name} |" + "".join(f" {_text(cell)} |" for cell in row))
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """The matrix as plain data."""
        rows = [
            [
                {
                    "correct": cell.correct,
                    "count": cell.count,
                    "accuracy": round(cell.accuracy, 4) if cell.count else None,
                    "interval95": [round(end, 4) for end in cell.interval],
                }
                for cell in row
            ]
            for row in self.cells
        ]
        return {"names": list(self.names), "cells": rows, **self.record}

    def save(self, folder: Path) -> list[Path]:
        """Write `transfer.md`, `transfer.json` and the heat map `transfer.png`; returns their paths."""
        paths = [folder / f"transfer.{ending}" for ending in ("md", "json", "png")]
        write_atomic(paths[0], (self.table() + "\n").encode())
        write_atomic(paths[1], (json.dumps(self.plain(), indent=2) + "\n").encode())
        write_atomic(paths[2], self._picture())
        return paths

    def _picture(self) -> bytes:
        values = [[cell.accuracy for cell in row] for row in self.cells]
        return heat_map(values, self.names, self.names)


def heat_map(values: Sequence[Sequence[float]], made_on: Sequence[str], asked_of: Sequence[str]) -> bytes:
    """A PNG of accuracies in per cent: dark cells are examples that fool."""
    import io

    from matplotlib.figure import Figure

    width, height = 3.5 + 0.9 * len(asked_of), 2.0 + 0.9 * len(made_on)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(asked_of)), asked_of, rotation=45, ha="right")
    axes.set_yticks(range(len(made_on)), made_on)
    axes.set_xlabel("asked of")
    axes.set_ylabel("made on")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            shade = "white" if value < 50 else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=shade)
    figure.colorbar(image, label="accuracy %")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _text(cell: Cell) -> str:
    low, high = cell.interval
    return f"{cell.accuracy:.1f} [{low:.1f}, {high:.1f}]" if cell.count else "no images"


def balanced_rows(y: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Up to `count` eligible rows with equally many of each class, the first of each; int64 positions, sorted."""
    classes = y.unique().tolist()
    each = [(eligible & (y == label)).nonzero().squeeze(1) for label in classes]
    quota = min(max(count // len(classes), 1), *(len(rows) for rows in each))
    chosen = torch.cat([rows[:quota] for rows in each])
    return chosen.sort().values


def transfer_matrix(
    models: Mapping[str, Model],
    x: Tensor,
    y: Tensor,
    *,
    attacks: Sequence[Any] = (APGD(),),
    count: int = 1000,
    seed: int = 0,
    engine: Engine | None = None,
    on_cell: Callable[[str, str, Cell], None] = lambda source, target, cell: None,
) -> TransferMatrix:
    """Attack every model and ask every other.

    Args:
        models: by name; pixels in [0, 1] to logits, in eval mode.
        x: clean pixels `[N, 3, H, W]` in [0, 1].
        y: labels `[N]`; a row's position keys its random numbers.
        attacks: the target must withstand all of them.
        count: how many images for a pair, of each class equally many; fewer where fewer are answered rightly.
        seed: of the attacks.
        engine: how the attacks run, by the rule `full`: an example that stops at its first success seldom transfers.
        on_cell: told each cell when it is known.

    Raises:
        ConfigError: no models, no attacks, or an engine with the rule `first_hit`.
    """
    engine = engine or Engine(rule="full")
    if not models or not attacks or engine.rule != "full":
        raise ConfigError("a transfer matrix needs models, attacks, and an engine with the rule full")
    right = {name: forward_all([model], x, engine.slots).argmax(1) == y for name, model in models.items()}
    cells = []
    for source in models:
        chosen = {target: balanced_rows(y, right[source] & right[target], count) for target in models}
        used = torch.cat(list(chosen.values())).unique()
        generator = RowRng.create(seed, "transfer", source, rows=used)
        streams = [(attack, generator.fold(k)) for k, attack in enumerate(attacks)] if len(used) else []
        made = [engine.run(one, models[source], x[used], y[used], generator=g).x_adv for one, g in streams]
        line = []
        for target, model in models.items():
            held = torch.isin(used, chosen[target])
            line.append(_ask(model, [x_adv[held] for x_adv in made], y[used][held], engine.slots))
            on_cell(source, target, line[-1])
        cells.append(tuple(line))
    record = {"attacks": [{"kind": type(one).__name__, **to_plain(one)} for one in attacks], "seed": seed}
    return TransferMatrix(names=tuple(models), cells=tuple(cells), record=record)


def _ask(model: Model, made: list[Tensor], y: Tensor, slots: int) -> Cell:
    alive = torch.ones_like(y, dtype=torch.bool)
    for x_adv in made if len(y) else ():
        alive &= forward_all([model], x_adv, slots).argmax(1) == y
    return Cell(correct=int(alive.sum()), count=len(y))
