"""Clean logits of views that only the first rows of a cache have, in memory."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from darht.cache.format.layout import CLEAN_FROM
from darht.cache.read.reader import Cache


@dataclass(frozen=True)
class MoreViews:
    """Clean logits of views that only the first rows of a cache have; v of them, for m rows.

    Attributes:
        first: the first of these views.
        rows: rows of the cache below this number have them.
        slots: int64 `[n]`, where in `values` those of each row held are; 0 of a row that has none.
        values: float `[m, v, T, C]`.
    """

    first: int
    rows: int
    slots: Tensor
    values: Tensor

    @property
    def stop(self) -> int:
        """One past the last of these views."""
        return self.first + self.values.shape[1]

    def each(self, change: Callable[[Tensor], Tensor]) -> "MoreViews":
        """The same after a change of every tensor."""
        return dataclasses.replace(self, slots=change(self.slots), values=change(self.values))

    def take(self, at: Tensor) -> "MoreViews":
        """Only those of the rows at positions `at`."""
        slots = torch.arange(len(at), device=self.slots.device)
        return dataclasses.replace(self, slots=slots, values=self.values.index_select(0, self.slots[at]))

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Give each of `rows` that has these views a slot, in their order; gives the slots, int64 `[len(rows)]`."""
        there = rows < self.rows
        slots: np.ndarray = np.where(there, np.cumsum(there) - 1, 0)
        self.slots[: len(rows)] = torch.from_numpy(slots)
        return slots

    def fill(self, cache: Cache, teachers: Sequence[str], slot: int, rows: slice) -> None:
        """Read what those of `rows` have that have these views, to `slot` and after it.

        Raises:
            CorruptError: a checksum fails.
        """
        having = slice(rows.start, min(rows.stop, self.rows))
        if having.start < having.stop:
            values = self.values[slot : slot + having.stop - having.start]
            names = [f"logits/{name}/{CLEAN_FROM}{self.first}" for name in teachers]
            cache.read_into({name: values[:, :, t].numpy() for t, name in enumerate(names)}, having)

    def copy_from(self, other: "MoreViews", rows: Tensor, at: Tensor) -> None:
        """Take over what the rows at positions `at` of another set have, whose source indices are `rows`; on a CPU."""
        kept = at[rows[at] < self.rows]
        self.values[: len(kept)] = other.values[other.slots[kept]]
