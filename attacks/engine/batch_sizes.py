"""Batch sizes that leave a row's bits alone."""

import threading
from contextlib import suppress

import torch
from torch import Tensor

from darht.attacks.engine.query_model import NoGradientError, Oracle, Precision
from darht.attacks.objectives import Model, cross_entropy

SMALLEST = 16
_PATIENCE = 8  # passes with room to spare before a size is tried, which costs about three
_TRIED = (4, 8, 12)  # below 4 rows convolutions and matrix products have other kernels


def padded(count: int, slots: int, *, constant: bool = False) -> int:
    """The batch size for `count` rows: the next multiple of 16, or always `slots` where shapes must not change."""
    return slots if constant else min(slots, -(-count // SMALLEST) * SMALLEST)


class Sizes:
    """The batch sizes of one model: multiples of 16, and 4, 8 and 12 where those give the same bits.

    Which kernels run, and so in which order they add, depends on the shape of a batch and not on what is in it. So
    whether a small batch is as good as one of 16 is asked once, when few rows are left for some time, of some rows of
    the run.
    """

    def __init__(self, x: Tensor, y: Tensor, slots: int, precision: Precision, *, constant: bool) -> None:
        """For batches like pixels `x` with labels `y`, of which 16 rows at most are used."""
        index = torch.arange(SMALLEST, device=x.device) % max(len(x), 1)
        self._rows, self.slots, self.precision, self.constant = (x, y, index), slots, precision, constant
        self._lock = threading.Lock()
        self._waits = _PATIENCE
        self._same: dict[int, bool] = {}
        self._wanted: list[Tensor] = []

    def padded(self, count: int, model: Model) -> int:
        """The smallest size for `count` rows; asked before every pass that could be smaller."""
        with self._lock:
            if not self.constant and count <= max(_TRIED):
                self._waits -= 1
                if self._waits < 0:
                    return self._smallest(count, model)
        return padded(count, self.slots, constant=self.constant)

    def _smallest(self, count: int, model: Model) -> int:
        return next((size for size in _TRIED if count <= size and self._is_same(size, model)), SMALLEST)

    def _is_same(self, size: int, model: Model) -> bool:
        if size not in self._same:
            self._wanted = self._wanted or self._answers(SMALLEST, model)
            found = zip(self._answers(size, model), self._wanted, strict=True)
            self._same[size] = all(torch.equal(few, many[:size]) for few, many in found)
        return self._same[size]

    def _answers(self, size: int, model: Model) -> list[Tensor]:
        x, y, index = self._rows
        x, y, oracle = x[index[:size]], y[index[:size]], Oracle(model, self.precision)
        found = [oracle.logits(x)]
        with suppress(NoGradientError):  # Square needs none
            found += oracle.gradient(x, lambda logits: cross_entropy(logits, y))
        return found
