"""Calibration on clean images, and accuracy under common corruptions: what robustness must not cost in silence."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from darht.core.stats import wilson
from darht.trainer.evaluation.checks.corruptions import CORRUPTIONS, FORM, SEVERITIES, corrupt
from darht.trainer.evaluation.ledger import Arrays, Entry
from darht.trainer.evaluation.measure import Measurement

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy lie apart (Guo et al. 2017, arXiv 1706.04599).

    Attributes:
        error: expected calibration error in per cent: the mean gap over equally wide bins of confidence, weighted by
            their images.
        confidence: mean confidence in each bin that is not empty, in [0, 1].
        accuracy: share of right answers in it.
        counts: images in it.
    """

    error: float
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    counts: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """As it stands in `eval.json`."""
        bins = zip(self.confidence, self.accuracy, self.counts, strict=True)
        return {
            "ece": round(self.error, 4),
            "bins": [{"confidence": round(c, 4), "accuracy": round(a, 4), "count": n} for c, a, n in bins],
        }


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """Expected calibration error of logits `[N, C]` against labels `[N]`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    sure, right = (shifted / shifted.sum(1, keepdims=True)).max(1), logits.argmax(1) == labels
    index = np.minimum((sure * bins).astype(int), bins - 1)
    filled = np.unique(index)
    counts = np.array([(index == k).sum() for k in filled])
    confidence = np.array([sure[index == k].mean() for k in filled])
    accuracy = np.array([right[index == k].mean() for k in filled])
    error = float(100 * (counts * np.abs(confidence - accuracy)).sum() / len(labels))
    return Calibration(error, *(tuple(part.tolist()) for part in (confidence, accuracy, counts)))


def run_corruptions(m: Measurement) -> dict[str, Any]:
    """Accuracy in per cent under every corruption and severity, each with its interval, and the mean over all of them.

    The mean has no interval: all severities are of the same images.
    """
    table: dict[str, list[float]] = {}
    spans: dict[str, list[list[float]]] = {}
    for name in CORRUPTIONS:
        right = [_right(m, name, severity) for severity in SEVERITIES]
        table[name] = [round(100 * float(part.mean()), 4) for part in right]
        spans[name] = [interval(int(part.sum()), len(part)) for part in right]
    mean = float(np.mean(list(table.values())))
    head = {"mean_accuracy": round(mean, 4), "images": m.count, "seed": m.setup.seed}
    return {**head, "accuracy": table, "interval95": spans}


def interval(right: int, count: int) -> list[float]:
    """95 % Wilson interval in per cent, as it stands in `eval.json`."""
    return [round(100 * end, 4) for end in wilson(right, count)]


def _right(m: Measurement, name: str, severity: int) -> np.ndarray:
    batches = list(m.setup.batches(np.arange(m.count)))
    entries = [_entry(m, name, severity, rows) for rows in batches]
    m.setup.ledger.share_out(entries, lambda done: None)
    parts = []
    for rows, entry in zip(batches, entries, strict=True):
        parts.append(m.setup.get(entry)["right"])
        m.setup.on_batch(
            f"corruption: {name}", (severity - 1) * m.count + int(rows[-1]) + 1, 5 * m.count, int(m.alive.sum())
        )
    return np.concatenate(parts)


def _entry(m: Measurement, name: str, severity: int, rows: np.ndarray) -> Entry:
    def ask() -> Arrays:
        images = corrupt(m.setup.source.images[rows], name, severity, rows=rows.tolist(), seed=m.setup.seed)
        x = torch.from_numpy(np.ascontiguousarray(images)).to(m.setup.device).float() / 255
        with m.setup.drawing(f"corruption {name} {severity}", rows):
            return {"right": m.setup.ask(x).argmax(1).cpu().numpy() == m.setup.source.labels[rows]}

    facts = {"rows": rows.tolist(), "seed": m.setup.seed, "severity": severity, "form": FORM}
    return Entry(f"corruption {name} {severity}", facts, ask)
