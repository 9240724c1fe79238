"""Which rows, in which order, in which view: pure functions of (seed, epoch), without a store."""

import numpy as np
import torch
from torch import Tensor

from darht.core.rng import RowRng, derive_seed


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An exact permutation of `rows`, int64 `[n]`."""
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "order", epoch)))
    return generator.permutation(rows)


def draw_choices(rows: Tensor, count: int, seed: int, epoch: int, what: str) -> Tensor:
    """One of `count` things (a view, an attack) for each row in this epoch, int64 `[B]`."""
    return RowRng.create(seed, what, epoch, rows=rows).integers(0, count - 1, (1,))[:, 0]


def coin(share: float, seed: int, step: int) -> bool:
    """True in `share` of the steps, decided for each step on its own."""
    draw = RowRng.create(seed, "coin", rows=torch.tensor([step])).uniform((1,)).item()
    return draw < share
