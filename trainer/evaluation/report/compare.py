"""Evaluations side by side, with a paired bootstrap over images.

Two models are asked about the same images, so the difference is taken image by image: resampling images with both
models' fates together leaves out what the images have in common, and small differences become visible.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from darht.core.bounded import show
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, CorruptError
from darht.core.files import write_atomic
from darht.core.keys import derive_seed
from darht.core.markdown import escape
from darht.core.sealed import check_named, read_sealed
from darht.trainer.evaluation.report.charts import compared, compared_axis
from darht.trainer.evaluation.report.page import render
from darht.trainer.evaluation.score import EVERYONE, NORMS, SCHEMA_VERSION

RESAMPLES = 10_000
WORST = "worst case"
_DAMAGED = (
    CorruptError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Compared:
    """One evaluation among others.

    Attributes:
        name: of the model, or of its folder where two models share a name.
        accuracies: in per cent by attack, as in `eval.json`.
        interval: of the worst case, 95 % Wilson, per cent.
        behind: how far its worst case lies behind the first one's, in points; 0 for the first.
        behind_interval: 95 % of the bootstrap.
        p: two-sided, that the two are equally robust; 1 for the first.
        believed: whether the gradient-masking checks passed.
    """

    name: str
    accuracies: dict[str, float]
    interval: tuple[float, float]
    behind: float
    behind_interval: tuple[float, float]
    p: float
    believed: bool


@dataclass(frozen=True)
class Comparison:
    """Evaluations, the most robust first.

    Attributes:
        rows: in order.
        shared: attacks that all of them were asked about on all images, without clean, the checks' and worst case; what
            was asked of other images (those still alive) cannot be compared.
        note: what was compared on what.
    """

    rows: tuple[Compared, ...]
    shared: tuple[str, ...]
    note: str

    def cells(self) -> list[list[str]]:
        """The table's rows as text."""
        return [self._cells(row, first=k == 0) for k, row in enumerate(self.rows)]

    def _cells(self, row: Compared, *, first: bool) -> list[str]:
        clean, *values = (f"{row.accuracies[name]:.1f}" for name in ("clean", *self.shared))
        low, high = row.interval
        worst = f"{row.accuracies[WORST]:.1f} [{low:.1f}, {high:.1f}]" + ("" if row.believed else " (masking!)")
        if first:
            return [row.name, clean, worst, "", "", *values]
        low, high = row.behind_interval
        p = f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001"
        return [row.name, clean, worst, f"{row.behind:.1f} [{low:.1f}, {high:.1f}]", p, *values]

    def save(self, folder: Path) -> list[Path]:
        """Write `compare.json`, `compare.md` and `compare.html`; returns their paths."""
        paths = [folder / f"compare.{ending}" for ending in ("json", "md", "html")]
        head = ["model", "clean %", "worst case %", "behind the first, points", "p", *self.shared]
        named = [[escape(name), *values] for name, *values in self.cells()]
        lines = ["| " + " | ".join(cells) + " |" for cells in (map(escape, head), ["---"] * len(head), *named)]
        write_atomic(paths[0], (json.dumps(to_plain(self), indent=2) + "\n").encode())
        write_atomic(paths[1], ("\n".join([*lines, "", self.note]) + "\n").encode())
        bars = [Markup(compared(row.accuracies["clean"], row.accuracies[WORST], row.interval)) for row in self.rows]
        facts = {"head": head, "cells": self.cells(), "rows": self.rows, "note": self.note, "bars": bars,
                 "axis": Markup(compared_axis())}  # fmt: skip
        write_atomic(paths[2], render("compare.html", facts).encode())
        return paths


def compare_runs(runs: Sequence[Path], *, seed: int = 0) -> Comparison:
    """Compare evaluations by their worst case per image.

    Args:
        runs: folders that hold `eval.json`, or such files.
        seed: of the bootstrap.

    Raises:
        CacheError: something is missing.
        ConfigError: fewer than two, or they were not asked about the same images in the same ball.
    """
    if len(runs) < 2:
        raise ConfigError(f"compare wants at least two evaluations; got {len(runs)}")
    read = [_read(run) for run in runs]
    _check_same(runs, [record for record, _ in read])
    names = _names(runs, [record for record, _ in read])
    order = sorted(range(len(read)), key=lambda k: (-int(read[k][1].sum()), names[k]))
    first = read[order[0]][1]
    rows = []
    for k in order:
        record, alive = read[k]
        scores = {score["name"]: score["accuracy"] for score in record["scores"]}
        low, high = record["robust_accuracy"]["interval95"]
        behind, interval, p = paired_bootstrap(first, alive, seed=seed)
        rows.append(Compared(names[k], scores, (low, high), behind, interval, p, record["masking"]["passed"]))
    everyone = [[s["name"] for s in record["scores"] if s["on"] == EVERYONE] for record, _ in read]
    shared = [name for name in everyone[0] if name not in ("clean", WORST) and not name.startswith("check:")]
    shared = [name for name in shared if all(name in one for one in everyone)]
    threat, data = read[0][0]["threat"], read[0][0]["data"]
    note = (
        f"{data['rows']} images of {data['source']}, {NORMS[threat['norm']]} {threat['eps']:g}/255; differences of the "
        f"worst case with 95 % intervals and two-sided p from {RESAMPLES:,} paired bootstrap resamples, seed {seed}."
    )
    over = {tuple(record["robust_accuracy"]["attack"]["over"]) for record, _ in read}
    if len(over) > 1:
        note += " Not all ran the same attacks: a worst case over more attacks is a harder one."
    return Comparison(tuple(rows), tuple(shared), note)


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, tuple[float, float], float]:
    """By how many points `second` lies behind `first`, its 95 % interval, and a two-sided p.

    Only the difference of an image counts (-1, 0 or 1; with S models of each kind a multiple of 1 / S), so a resample
    is a multinomial draw of its counts. The p is twice the smaller share of resamples on the other side of 0, ties
    counted half, never below 1 / resamples.

    Args:
        first: bool `[N]`, which images withstood everything; `[S, N]` for S models that differ by their seed alone.
        second: the same for the other model, with as many seeds.
        seed: of the resampling.
        resamples: how many.
    """
    a, b = (np.atleast_2d(alive).astype(np.int64) for alive in (first, second))
    seeds, difference = len(a), a.sum(0) - b.sum(0)
    n, values = len(difference), np.arange(-seeds, seeds + 1)
    shares = [(difference == value).mean() for value in values]
    if shares[seeds] == 1.0:
        return 0.0, (0.0, 0.0), 1.0
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap")))
    counts = generator.multinomial(n, shares, size=resamples)
    means = 100 * (counts @ values) / (n * seeds)
    low, high = np.percentile(means, [2.5, 97.5])
    below = (means < 0).mean() + (means == 0).mean() / 2
    p = float(np.clip(2 * min(below, 1 - below), 1 / resamples, 1.0))
    return float(100 * difference.mean() / seeds), (float(low), float(high)), p


def compare_seeds(
    runs: Sequence[Path], baseline: Sequence[Path], score: str = WORST
) -> tuple[float, tuple[float, float], float]:
    """By how many points a score of `runs` lies above that of `baseline`, its 95 % interval, two-sided p.

    Args:
        runs: evaluated runs that differ by their seed alone.
        baseline: as many of the other way of training.
        score: of the evaluations: `worst case`, `autoattack`, `clean` ...

    Raises:
        CacheError: an evaluation is missing, or lacks the score.
        ConfigError: they were not asked about the same images in the same ball.
    """
    read = [_read(run, score) for run in (*runs, *baseline)]
    _check_same([*runs, *baseline], [record for record, _ in read])
    alive = np.stack([stands for _, stands in read])
    return paired_bootstrap(alive[: len(runs)], alive[len(runs) :])


def mean_of_seeds(runs: Sequence[Path], score: str = WORST) -> tuple[float, tuple[float, float]]:
    """A score of evaluated runs that differ by their seed alone, in per cent, and its 95 % interval over test images.

    Raises:
        CacheError: an evaluation is missing, or lacks the score.
    """
    alive = np.stack([_read(run, score)[1] for run in runs])
    mean, interval, _ = paired_bootstrap(alive, np.zeros_like(alive))
    return mean, interval


def _read(run: Path, score: str = WORST) -> tuple[dict[str, Any], np.ndarray]:
    path = run if run.suffix == ".json" else run / "eval.json"
    try:
        sealed = read_sealed(path, "restore it")
        record = sealed.value
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"its schema is {record['schema_version']}, this is {SCHEMA_VERSION}")
        name = str(record["per_image"])
        if Path(name).name != name:
            raise ValueError(f"per_image must be a file beside it; it is {show(name)}")
        check_named(path, sealed, name, "restore it")
        images = np.load(io.BytesIO((path.parent / name).read_bytes()), allow_pickle=False)
        names = images["attacks"].tolist()
        return record, images["right"][names.index(score)] == 1
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CacheError(
            f"{path} is not an evaluation of this version ({reason}): give a folder that holds {path.name}, or measure "
            "the model again with darht-eval"
        ) from error


def _check_same(runs: Sequence[Path], records: Sequence[dict[str, Any]]) -> None:
    for what in ("data", "threat"):
        for run, record in zip(runs, records, strict=True):
            if record[what] != records[0][what]:
                raise ConfigError(
                    f"{run} and {runs[0]} differ in {what}: {record[what]} and {records[0][what]}; compare evaluations "
                    "of the same images in the same ball"
                )


def _names(runs: Sequence[Path], records: Sequence[dict[str, Any]]) -> list[str]:
    names = [record["model"]["name"] for record in records]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
