"""Rows worth a look: what fools all teachers, what one alone gets right, doubtful labels, repeats in the test."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darht.cache.read.reader import Cache
from darht.cache.read.select import Selection, rows_to_leave_out
from darht.core.class_names import name_of_class
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.files import write_atomic
from darht.tools.duplicates import Pair
from darht.tools.predictions import Bools, Ints, Predictions, read_predictions, softmax
from darht.tools.vectors import Floats, blocks, need_attacks

KINDS = ("fooled-all", "only-one", "label-candidate", "duplicate")
MARGIN = 0.5  # in probability: with less, teachers of 40 % accuracy would call every tenth label wrong


@dataclass(frozen=True, kw_only=True)
class FooledRow:
    """A row that every teacher answers rightly when clean, and the attacks whose one example fools all of them."""

    row: int
    attacks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LoneRow:
    """A row that one teacher alone gets right, clean and under every stored example."""

    row: int
    teacher: str


@dataclass(frozen=True, kw_only=True)
class LabelCandidate:
    """A row whose label all teachers doubt: given and suggested class, and how much more probable the latter is.

    It may be the teachers who are wrong: `darht.tools.label_judgement` says how often they are.
    """

    row: int
    label: int
    suggested: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What `find_rows` finds.

    Attributes:
        fooled_all: most attacks first.
        only_one: in row order.
        label_candidates: largest margin first.
        duplicates: most alike first; None where there was no test split to compare with.
    """

    fooled_all: tuple[FooledRow, ...]
    only_one: tuple[LoneRow, ...]
    label_candidates: tuple[LabelCandidate, ...]
    duplicates: tuple[Pair, ...] | None

    def rows(self, kind: str) -> list[int]:
        """The rows of one kind, in the order found, each once."""
        found: Any = dict(
            zip(KINDS, (self.fooled_all, self.only_one, self.label_candidates, self.duplicates), strict=True)
        )
        return list(dict.fromkeys(one.row for one in found[kind] or ()))


def find_rows(
    cache: Cache,
    *,
    margin: float = MARGIN,
    duplicates: tuple[Pair, ...] | None = None,
    predictions: Predictions | None = None,
) -> RowReport:
    """Look through all rows.

    Args:
        cache: a sealed cache.
        margin: how much more probable another class must be than the label, in [0, 1).
        duplicates: from `find_duplicates`.
        predictions: of this cache, where they were read already.

    Raises:
        ConfigError: the cache has no attacks, or the margin is out of range.
    """
    need_attacks(cache)
    if not 0 <= margin < 1:
        raise ConfigError(f"--margin is a difference of probabilities in [0, 1); got {margin:g}")
    predictions = predictions or read_predictions(cache)
    return RowReport(
        fooled_all=_fooled_all(predictions),
        only_one=_only_one(predictions),
        label_candidates=_label_candidates(cache, predictions, margin),
        duplicates=duplicates,
    )


def _fooled_all(predictions: Predictions) -> tuple[FooledRow, ...]:
    fooled: Bools = ~np.any(predictions.right, axis=1) & np.all(predictions.right_clean, axis=0)
    rows = np.flatnonzero(fooled.any(0))
    rows = rows[np.argsort(-fooled[:, rows].sum(0), kind="stable")]
    return tuple(
        FooledRow(row=int(row), attacks=tuple(predictions.attacks[a] for a in np.flatnonzero(fooled[:, row])))
        for row in rows
    )


def _only_one(predictions: Predictions) -> tuple[LoneRow, ...]:
    stands: Bools = np.all(predictions.right, axis=0) & predictions.right_clean
    rows = np.flatnonzero(stands.sum(0) == 1)
    return tuple(LoneRow(row=int(row), teacher=predictions.teachers[int(stands[:, row].argmax())]) for row in rows)


def _label_candidates(cache: Cache, predictions: Predictions, margin: float) -> tuple[LabelCandidate, ...]:
    labels, p = predictions.labels, mean_probabilities(cache)
    best, lead = find_doubts(p, labels, class_confidence(p, labels), predictions.clean, margin)
    flagged = np.flatnonzero(best >= 0)
    flagged = flagged[np.argsort(-lead[flagged], kind="stable")]
    return tuple(
        LabelCandidate(row=int(i), label=int(labels[i]), suggested=int(best[i]), margin=round(float(lead[i]), 4))
        for i in flagged
    )


def class_confidence(p: Floats, labels: Ints) -> Floats:
    """How probable each class is on average among its own rows, `[C]`, from `p` `[N, C]`; NaN where it has none."""
    counts = np.bincount(labels, minlength=p.shape[1])
    sums = np.bincount(labels, weights=p[np.arange(len(labels)), labels], minlength=p.shape[1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def find_doubts(
    p: Floats, labels: Ints, confidence: Floats, answers: NDArray[np.int32], margin: float
) -> tuple[Ints, Floats]:
    """Confident learning (Northcutt et al. 2021, arXiv 1911.00068) on the teachers' mean probabilities `[N, C]`.

    A class is a candidate for a row when it is at least as probable as it is on average among its own rows. To be
    flagged, the best candidate must not be the label, all teachers must name it, and it must lead by the margin.

    Returns:
        The class that is suggested for each row, or -1; and its lead.
    """
    candidates = np.where(p >= confidence, p, np.float32(-1))  # NaN is never reached
    best, most = candidates.argmax(1), candidates.max(1)
    lead: Floats = most - p[np.arange(len(p)), labels]
    flagged = (answers == best).all(0) & (best != labels) & (lead >= margin) & (most > 0)
    return np.where(flagged, best, -1), lead


def mean_probabilities(cache: Cache) -> Floats:
    """The mean of what all teachers think probable about each row that has a label, `[N, C]`."""
    total = np.zeros((cache.spec.data.labelled, len(cache.spec.data.classes)), dtype=np.float32)
    for teacher in cache.spec.teachers:
        for rows in blocks(cache, f"logits/{teacher}/clean", labelled=True):
            total[rows] += softmax(cache.logits(teacher, rows=rows))
    return total / np.float32(len(cache.spec.teachers))


def write_rows(cache: Cache, report: RowReport, path: Path, exclude: tuple[str, ...]) -> Ints:
    """Write `rows.json`: what was found, and under `rows` those of the kinds in `exclude`, for darht-train --exclude.

    Raises:
        ConfigError: a kind that does not exist.
    """
    unknown = sorted(set(exclude) - set(KINDS))
    if unknown:
        raise ConfigError(f"kinds of rows are {', '.join(KINDS)}; got {', '.join(unknown)}")
    rows = np.array(sorted({row for kind in exclude for row in report.rows(kind)}), dtype=np.int64)
    found = {key.replace("_", "-"): value for key, value in asdict(report).items()}
    content = {
        "cache_root_hash": cache.root_hash,
        "kinds": list(exclude),
        "rows": rows.tolist(),
        "found": found,
    }
    write_atomic(path, (json.dumps(_finite(content), indent=1) + "\n").encode())
    return rows


def write_selection(cache: Cache, selection: Selection, path: Path) -> Ints:
    """Write the rows that a selection leaves out, for darht-train --exclude; gives them.

    Raises:
        ConfigError: the cache has no teachers.
    """
    rows = rows_to_leave_out(cache, selection)
    about = {"cache_root_hash": cache.root_hash, "selection": to_plain(selection), "rows": rows.tolist()}
    write_atomic(path, (json.dumps(about, indent=1) + "\n").encode())
    return rows


def _finite(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124


def draw(cache: Cache, report: RowReport, path: Path, test: np.ndarray | None = None, *, most: int = 12) -> None:
    """Write the gallery (PNG): up to `most` rows of each kind that was found; duplicates with their test image."""
    from darht.tools.pictures import figure, save

    kinds = [kind for kind in KINDS if report.rows(kind)]
    lines = len(kinds) + ("duplicate" in kinds and test is not None)
    fig = figure(0.6 + 1.15 * most, 0.7 + 1.7 * max(1, lines))
    grid = fig.subplots(max(1, lines), most, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, kind in enumerate(kinds):
        for axes, row in zip(grid[line], report.rows(kind)[:most], strict=False):
            axes.imshow(cache.clean(slice(row, row + 1))[0].transpose(1, 2, 0), interpolation="nearest")
            axes.set_title(f"row {row}\n{_caption(cache, report, kind, row)}", fontsize=6.5)
        grid[line][0].text(-0.15, 0.5, kind, rotation=90, va="center", ha="right", transform=grid[line][0].transAxes)
    if lines > len(kinds) and report.duplicates and test is not None:
        shown = {pair.row: pair for pair in reversed(report.duplicates)}
        for axes, row in zip(grid[-1], report.rows("duplicate")[:most], strict=False):
            axes.imshow(test[shown[row].test].transpose(1, 2, 0), interpolation="nearest")
            axes.set_title(f"test {shown[row].test}", fontsize=6.5)
    fig.suptitle("Rows worth a look" if kinds else "No row of any kind was found", fontsize=10)
    save(fig, path)


def _caption(cache: Cache, report: RowReport, kind: str, row: int) -> str:
    classes = cache.spec.data.classes
    label = name_of_class(classes, int(cache.read("label", slice(row, row + 1))[0]))
    if kind == "fooled-all":
        return f"{label}\n{next(len(one.attacks) for one in report.fooled_all if one.row == row)} attacks"
    if kind == "only-one":
        return f"{label}\n{next(one.teacher for one in report.only_one if one.row == row)} alone"
    if kind == "label-candidate":
        return f"{label}?\n{classes[next(one.suggested for one in report.label_candidates if one.row == row)]}"
    best = next(one for one in report.duplicates or () if one.row == row)
    return f"{label}\n{best.pixels:.2f}{' mirrored' if best.mirrored else ''}"
