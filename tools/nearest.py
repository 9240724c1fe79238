"""Exact nearest neighbours in a stream: the best k of every query, however many blocks go by."""

import numpy as np

from darht.tools.predictions import Ints
from darht.tools.vectors import Floats


class Nearest:
    """The k best rows of Q queries among the rows seen so far.

    Attributes:
        cosines: `[Q, k]`, best first; -inf where fewer than k rows were seen.
        rows: int64 `[Q, k]`; -1 there.
    """

    def __init__(self, queries: Floats, k: int, exclude: Ints | None = None) -> None:
        """`exclude[q]` is the row that query q must not find: itself."""
        self.queries, self.exclude = queries, exclude
        self.cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
        self.rows = np.full((len(queries), k), -1, dtype=np.int64)

    def see(self, first: int, vectors: Floats) -> None:
        """Look at rows `first`, `first + 1`, ... with unit vectors `[n, D]`."""
        k, numbers = self.cosines.shape[1], np.arange(first, first + len(vectors))
        cosines = self.queries @ vectors.T
        if self.exclude is not None:
            cosines[self.exclude[:, None] == numbers[None]] = -np.inf
        if len(vectors) > k:
            best = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
            cosines, rows = np.take_along_axis(cosines, best, 1), numbers[best]
        else:
            rows = np.broadcast_to(numbers, cosines.shape)
        rows = np.where(np.isneginf(cosines), -1, rows)
        cosines, rows = np.hstack([self.cosines, cosines]), np.hstack([self.rows, rows])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        self.cosines, self.rows = np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def recall(found: Ints, exact: Ints) -> float:
    """The share of the exact neighbours `[Q, k]` that are among the found ones `[Q, k]`."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
    return float(np.sum(hits) / exact.size)


def without_self(rows: Ints, queries: Ints, k: int) -> Ints:
    """Drop each query from its own list `[Q, k + 1]`, or the last one where it was not found; `[Q, k]`."""
    drop = np.where((rows == queries[:, None]).any(1), (rows == queries[:, None]).argmax(1), k)
    keep = np.arange(k + 1)[None] != drop[:, None]
    kept: Ints = rows[keep].reshape(len(rows), k)
    return kept
