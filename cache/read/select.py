"""Rows chosen by what teachers said about them: a query over stored logits, for training on a part of a cache."""

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darht.cache.read.loader import training_rows
from darht.cache.read.reader import Cache
from darht.core.errors import ConfigError

_ROWS = 4096  # whose logits are in memory at a time


@dataclass(frozen=True)
class Selection:
    """Which rows to train on.

    Rows without labels are chosen among, where a cache has some, and those with labels are kept; else all are.

    Attributes:
        by: `entropy` of the teachers' mean probabilities on the image itself, view 0: how unsure they are together.
        keep: the share that is kept.
        end: `lowest` keeps rows that teachers are sure about, `highest` those that they are not.
    """

    by: Literal["entropy"] = "entropy"
    keep: float = 0.5
    end: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is a share in (0, 1]; got {self.keep:g}")


def entropies(cache: Cache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The entropy of the teachers' mean probabilities on view 0 of some rows, in order, in nats.

    Raises:
        ConfigError: the cache has no teachers.
        CorruptError: a checksum fails.
    """
    if not cache.teachers:
        raise ConfigError(f"{cache.folder} has no teachers whose entropy could be taken")
    found = np.empty(cache.rows)
    for first in range(int(rows.min()), int(rows.max()) + 1, _ROWS):
        block = slice(first, min(first + _ROWS, cache.rows))
        said = [_probabilities(cache.logits(name, rows=block)) for name in cache.teachers]
        mean = np.mean(said, axis=0)
        found[block] = -(mean * np.log(np.maximum(mean, 1e-30))).sum(1)
    return found[rows]


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(1, keepdims=True)
    return shares


def candidates(cache: Cache) -> NDArray[np.int64]:
    """The rows to train on among which is chosen."""
    rows, labelled = training_rows(cache), cache.spec.data.labelled
    return rows[rows >= labelled] if labelled < cache.rows else rows


def rows_to_leave_out(cache: Cache, selection: Selection) -> NDArray[np.int64]:
    """The candidates that are not chosen, sorted; of two rows that are alike the first is kept.

    Raises:
        ConfigError, CorruptError: as `entropies`.
    """
    rows = candidates(cache)
    values = entropies(cache, rows)
    order = np.argsort(values if selection.end == "lowest" else -values, kind="stable")
    return np.sort(rows[order[max(1, int(selection.keep * len(rows) + 0.5)) :]])


def select(cache: Cache, selection: Selection | None) -> Cache:
    """The cache with the rows excluded that are not chosen; the one that is given stays as it is.

    Raises:
        ConfigError, CorruptError: as `entropies`.
    """
    if selection is None:
        return cache
    chosen = copy.copy(cache)
    chosen.excluded = tuple(sorted({*cache.excluded, *rows_to_leave_out(cache, selection).tolist()}))
    return chosen
