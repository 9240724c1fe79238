"""Which rows, in which order, in which view: pure functions of (seed, epoch), without a store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from darht.core.keys import derive_seed
from darht.core.rng import RowRng, word


def steps_in_epoch(rows: int, batch: int, *, drop_last: bool = True) -> int:
    """Batches of an epoch: whole ones, and with `drop_last=False`, or when there is no whole one, a smaller one too."""
    return -(-rows // batch) if not drop_last or rows < batch else rows // batch


def share(at: Tensor, rank: int, world: int) -> Tensor:
    """The part of a global batch that is for one of `world` processes: in order, and at most one row more or less."""
    return at.tensor_split(world)[rank]


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An exact permutation of `rows`, int64 `[n]`."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "order", epoch)))
    return generator.permutation(rows)


@dataclass(frozen=True)
class Window:
    """A part of an epoch: rows that are held together, and the order in which they are trained on.

    Attributes:
        blocks: which blocks of rows are read, in this order.
        carried: positions in the window before, of rows that it left over; they come first in this one.
        rows: int64, the source index of every row held: the carried ones, then those of the blocks.
        order: int64, positions in `rows` to train on; whole batches, but for one that is all there is, and for the
            epoch's last when it is not dropped.
    """

    blocks: np.ndarray
    carried: np.ndarray
    rows: np.ndarray
    order: np.ndarray


def epoch_windows(
    blocks: np.ndarray,
    training: np.ndarray,
    *,
    per_window: int,
    batch: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
) -> Iterator[Window]:
    """An epoch as windows: random blocks are read together, their rows are mixed, and batches are cut.

    Every row of `training` is used at most once; fewer than `batch` rows, those that the last window leaves over, wait
    for another epoch, or with `drop_last=False` are the last batch of this one. Windows differ by at most one block in
    size. When one window holds everything, its order is `epoch_order`.

    Args:
        blocks: first row and one past the last of every block, int64 `[K, 2]`.
        training: rows to train on, in order; the others of a block are read, held, and not used.
        per_window: blocks that are read together.
        batch: rows of a step.
        seed: keys the order.
        epoch: keys it too.
        drop_last: whether only whole batches are used.
    """
    if per_window >= len(blocks):
        order = epoch_order(training, seed, epoch)
        whole = len(order) // batch * batch if drop_last and len(order) >= batch else len(order)
        yield Window(np.arange(len(blocks)), np.empty(0, np.int64), np.arange(blocks[-1, 1]), order[:whole])
        return
    trained = np.zeros(blocks[-1, 1], dtype=bool)
    trained[training] = True
    shuffled = epoch_order(np.arange(len(blocks)), derive_seed(seed, "blocks"), epoch)
    used, carried, left = 0, np.empty(0, np.int64), np.empty(0, np.int64)  # `left`: the rows at `carried`
    groups = np.array_split(shuffled, -(-len(blocks) // per_window))
    for number, group in enumerate(groups):
        own = np.concatenate([np.arange(*blocks[block]) for block in group])
        pool = np.concatenate([np.arange(len(left)), len(left) + trained[own].nonzero()[0]])
        order, rows = epoch_order(pool, derive_seed(seed, "window", number), epoch), np.concatenate([left, own])
        whole = len(order) // batch * batch
        used += whole
        if number == len(groups) - 1 and not (used and drop_last):
            whole = len(order)
        yield Window(group, carried, rows, order[:whole])
        carried = order[whole:]
        left = rows[carried]


def draw_choices(rows: Tensor, count: int, seed: int, epoch: int, what: str) -> Tensor:
    """One of `count` things (a view, an attack) for each row in this epoch, int64 `[B]`."""
    return RowRng.create(seed, what, epoch, rows=rows).integers(0, count - 1, (1,))[:, 0]


def choose(count: int, seed: int, step: int, what: str) -> int:
    """One of `count` things for a step, as `draw_choices` draws it for a row in epoch 0; without a tensor."""
    return word(step, seed, what, 0) * count >> 32


def coin(share: float, seed: int, step: int, what: str = "coin") -> bool:
    """True in `share` of the steps, decided for each step on its own; `what` names the coin."""
    return (word(step, seed, what) >> 8) * 2.0**-24 < share
