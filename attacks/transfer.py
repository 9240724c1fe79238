"""Transferability: what examples made on one model do to another.

The images are class-balanced and answered rightly by both models of a pair, so that a column says what the examples do
and not how good the target is. The diagonal is the white-box accuracy.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darht.attacks.apgd import APGD
from darht.attacks.engine.engine import Engine
from darht.attacks.engine.slots import forward_all
from darht.attacks.objectives import Model
from darht.attacks.threat import LEVELS
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.files import write_atomic
from darht.core.markdown import escape
from darht.core.rng import RowRng
from darht.core.stats import wilson

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferMatrix:
    """Accuracy of every target on what was made against every source, measured live or read from a cache.

    A is the number of rows of the matrix (sets of examples), T that of its columns (models that are asked), C that of
    classes. Where a row's source is the target, the entry is white-box accuracy.

    Attributes:
        attacks: what each row's examples were made with, A names.
        sources: the model that each row's examples were made on, A names.
        teachers: the models that are asked, T names.
        clean: accuracy of each of them on the clean images in per cent, `[T]`.
        counted_by_class: int `[A, T, C]`: images that source and target both answer rightly when clean.
        right_by_class: int `[A, T, C]`: those of them that the target still answers rightly.
        record: attacks, images, seed; empty where a cache says it.
    """

    attacks: tuple[str, ...]
    sources: tuple[str, ...]
    teachers: tuple[str, ...]
    clean: Floats
    counted_by_class: Ints
    right_by_class: Ints
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> Ints:
        """Images of each entry, int `[A, T]`."""
        return np.asarray(self.counted_by_class.sum(2))

    @property
    def right(self) -> Ints:
        """Images of each entry that the target still answers rightly, int `[A, T]`."""
        return np.asarray(self.right_by_class.sum(2))

    @property
    def accuracy(self) -> Floats:
        """Per cent still right, `[A, T]`; NaN where no image counts."""
        return _per_cent(self.right, self.counted)

    @property
    def accuracy_by_class(self) -> Floats:
        """Per cent still right, `[A, T, C]`; NaN where no image counts."""
        return _per_cent(self.right_by_class, self.counted_by_class)

    def interval(self, row: int, teacher: int, label: int | None = None) -> tuple[float, float]:
        """The 95 % Wilson interval of one entry in per cent, over all classes or for one."""
        chosen = slice(None) if label is None else label
        right, counted = self.right_by_class[row, teacher, chosen], self.counted_by_class[row, teacher, chosen]
        low, high = wilson(int(right.sum()), int(counted.sum()))
        return 100 * low, 100 * high

    def text(self, row: int, teacher: int, label: int | None = None) -> str:
        """One entry as text: per cent and its interval, or that no image counts."""
        values = self.accuracy if label is None else self.accuracy_by_class[:, :, label]
        low, high = self.interval(row, teacher, label)
        return "no images" if np.isnan(values[row, teacher]) else f"{values[row, teacher]:.1f} [{low:.1f}, {high:.1f}]"

    def table(self) -> str:
        """Markdown: accuracy in per cent with its 95 % interval."""
        head = ["| made on \\ asked of |", *(f" {escape(name)} |" for name in self.teachers)]
        lines = ["".join(head), "".join(["|---|", *("---|" for _ in self.teachers)])]
        for a, source in enumerate(self.sources):
            lines.append(f"| {escape(source)} |" + "".join(f" {self.text(a, t)} |" for t in range(len(self.teachers))))
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """The matrix as plain data."""
        rows = [[self._entry(a, t) for t in range(len(self.teachers))] for a in range(len(self.sources))]
        return {"names": list(self.teachers), "cells": rows, **self.record}

    def _entry(self, row: int, teacher: int) -> dict[str, Any]:
        correct, count = int(self.right[row, teacher]), int(self.counted[row, teacher])
        accuracy = round(float(self.accuracy[row, teacher]), 4) if count else None
        interval = [round(end, 4) for end in self.interval(row, teacher)]
        return {"correct": correct, "count": count, "accuracy": accuracy, "interval95": interval}

    def save(self, folder: Path) -> list[Path]:
        """Write `transfer.md`, `transfer.json` and the heat map `transfer.png`; returns their paths."""
        paths = [folder / f"transfer.{ending}" for ending in ("md", "json", "png")]
        write_atomic(paths[0], (self.table() + "\n").encode())
        write_atomic(paths[1], (json.dumps(self.plain(), indent=2) + "\n").encode())
        write_atomic(paths[2], heat_map(self.accuracy.tolist(), self.sources, self.teachers))
        return paths


def _per_cent(right: Ints, counted: Ints) -> Floats:
    return np.where(counted > 0, 100 * right / np.maximum(counted, 1), np.nan)


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


def balanced_rows(y: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Up to `count` eligible rows with equally many of each class, the first of each; int64 positions, sorted.

    A class without any eligible row is left out; so the others still say what they can.
    """
    classes = y[eligible].unique().tolist()
    if not classes:
        return torch.zeros(0, dtype=torch.int64, device=y.device)
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
) -> TransferMatrix:
    """Attack every model and ask every other.

    Args:
        models: by name; pixels in [0, 1] to logits, in eval mode.
        x: clean pixels `[N, 3, H, W]` in [0, 1], or uint8 on any device, of which only what is asked about becomes
            floating point on the device of `y`.
        y: labels `[N]`; a row's position keys its random numbers.
        attacks: the target must withstand all of them.
        count: how many images for a pair, of each class equally many; fewer where fewer are answered rightly.
        seed: of the attacks.
        engine: how the attacks run, by the rule `full`: an example that stops at its first success seldom transfers.

    Raises:
        ConfigError: no models, no attacks, or an engine with the rule `first_hit`.
    """
    engine = engine or Engine(rule="full")
    if not models or not attacks or engine.rule != "full":
        raise ConfigError("a transfer matrix needs models, attacks, and an engine with the rule full")
    right = {name: _right(model, x, y, engine.slots) for name, model in models.items()}
    C = int(y.max()) + 1 if len(y) else 0
    counted = np.zeros((len(models), len(models), C), dtype=np.int64)
    held = np.zeros_like(counted)
    for a, source in enumerate(models):
        chosen = {target: balanced_rows(y, right[source] & right[target], count) for target in models}
        used = torch.cat(list(chosen.values())).unique()
        generator = RowRng.create(seed, "transfer", source, rows=used)
        streams = [(attack, generator.fold(k)) for k, attack in enumerate(attacks)] if len(used) else []
        clean = _pixels(x[used.to(x.device)], y.device)
        made = [engine.run(one, models[source], clean, y[used], generator=g).x_adv for one, g in streams]
        for t, (target, model) in enumerate(models.items()):
            asked = torch.isin(used, chosen[target])
            labels = y[used][asked]
            alive = _withstood(model, [x_adv[asked] for x_adv in made], labels, engine.slots)
            counted[a, t] = torch.bincount(labels, minlength=C).numpy(force=True)
            held[a, t] = torch.bincount(labels[alive], minlength=C).numpy(force=True)
    record = {"attacks": [{"kind": type(one).__name__, **to_plain(one)} for one in attacks], "seed": seed}
    return TransferMatrix(
        attacks=(" + ".join(type(one).__name__ for one in attacks),) * len(models),
        sources=tuple(models),
        teachers=tuple(models),
        clean=np.array([100 * float(one.double().mean()) for one in right.values()]),
        counted_by_class=counted,
        right_by_class=held,
        record=record,
    )


def _pixels(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device).float() / LEVELS if x.dtype == torch.uint8 else x


def _right(model: Model, x: Tensor, y: Tensor, slots: int) -> Tensor:
    """Which images a model answers rightly, bool `[N]`, in pieces of whole batches, which keep the bits."""
    parts = zip(x.split(16 * slots), y.split(16 * slots), strict=True)
    found = [forward_all([model], _pixels(part, y.device), slots).argmax(1) == labels for part, labels in parts]
    return torch.cat(found) if found else torch.zeros_like(y, dtype=torch.bool)


def _withstood(model: Model, made: list[Tensor], y: Tensor, slots: int) -> Tensor:
    """Which images the model still answers rightly under every attack, bool `[N]`."""
    alive = torch.ones_like(y, dtype=torch.bool)
    for x_adv in made if len(y) else ():
        alive &= forward_all([model], x_adv, slots).argmax(1) == y
    return alive
