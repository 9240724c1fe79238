"""Which teachers share their weaknesses: the transferability matrix, read from a cache at no extra cost.

Every teacher has already answered every stored adversarial example, so the matrix takes no gradient and no forward
pass.
"""

from pathlib import Path

import numpy as np
import torch

from darht.attacks.transfer import TransferMatrix, balanced_rows, heat_map
from darht.cache.read.reader import Cache
from darht.core.files import write_atomic
from darht.tools.predictions import Bools, Ints, Predictions, read_predictions
from darht.tools.vectors import need_attacks


def stored_transfer(cache: Cache, *, balanced: bool = False, predictions: Predictions | None = None) -> TransferMatrix:
    """Read the matrix on view 0 of every row; where an attack's target is its source, the entry is white-box accuracy.

    Args:
        cache: a sealed cache.
        balanced: count equally many rows of each class, the first ones, as `darht.attacks.transfer` does; else all.
        predictions: of this cache, where they were read already.

    Raises:
        ConfigError: the cache holds no attacks.
    """
    need_attacks(cache)
    predictions = predictions or read_predictions(cache)
    clean, right, C = predictions.right_clean, predictions.right, len(cache.spec.data.classes)
    shape = (len(predictions.attacks), len(predictions.teachers), C)
    counted, held = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for a, source in enumerate(predictions.sources):
        of_source = clean[predictions.teachers.index(source)]
        for t in range(len(predictions.teachers)):
            both = of_source & clean[t]
            rows = _first_of_each(predictions.labels, both) if balanced else both
            counted[a, t] = _by_class(predictions.labels, rows, C)
            held[a, t] = _by_class(predictions.labels, rows & right[a, t], C)
    return TransferMatrix(
        attacks=predictions.attacks,
        sources=predictions.sources,
        teachers=predictions.teachers,
        clean=100 * clean.mean(1),
        counted_by_class=counted,
        right_by_class=held,
    )


def _first_of_each(labels: Ints, eligible: Bools) -> Bools:
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[balanced_rows(torch.from_numpy(labels), torch.from_numpy(eligible), len(labels)).numpy()] = True
    return chosen


def _by_class(labels: Ints, rows: Bools, classes: int) -> Ints:
    return np.bincount(labels[rows], minlength=classes)


def draw(matrix: TransferMatrix, path: Path) -> None:
    """Write the matrix as a heat map (PNG); dark cells are attacks that work."""
    made_on = [f"{attack}\non {source}" for attack, source in zip(matrix.attacks, matrix.sources, strict=True)]
    asked_of = [f"{name}\nclean {value:.1f} %" for name, value in zip(matrix.teachers, matrix.clean, strict=True)]
    write_atomic(path, heat_map(matrix.accuracy.tolist(), made_on, asked_of))
