"""What a batch shows of its rows: the views and the stored attack that are drawn, and what the cache holds about them.

The trainer and `CacheDataset` both draw here, so that one's own loop sees what a recipe would have seen.
"""

import torch
from torch import Tensor

from darht.cache.format.apply_views import apply_views
from darht.cache.read.loader import TrainingSet
from darht.cache.read.sampler import draw_choices


def choose_attack(count: int, *, seed: int, number: int) -> int:
    """Which of `count` stored attacks a batch shows; `number` counts the batches of the whole run."""
    return int(draw_choices(torch.tensor([number]), count, seed, 0, "attack"))


def choose_views(data: TrainingSet, at: Tensor, *, seed: int, epoch: int, attack: int | None = None) -> Tensor:
    """A view for each row, int64 `[B]`: one of all, or with an attack one of those that it ran on.

    Args:
        data: rows of the cache in memory.
        at: int64 `[B]`, positions in `data`; the rows' source indices key the draws.
        seed: keys them too.
        epoch: as well.
        attack: a position in `data.attacks`.
    """
    return draw_views(data, data.rows[at], seed=seed, epoch=epoch, attack=attack)


def draw_views(data: TrainingSet, rows: Tensor, *, seed: int, epoch: int, attack: int | None = None) -> Tensor:
    """As `choose_views`, of any rows of the cache by their source indices, int64 `[B]`."""
    if attack is not None:
        return draw_choices(rows, data.deltas[attack].shape[1], seed, epoch, "view")
    views = draw_choices(rows, data.clean.shape[1], seed, epoch, "view")
    for more in data.more:
        views = torch.where(rows < more.rows, draw_choices(rows, more.stop, seed, epoch, "view"), views)
    return views


def view_pixels(data: TrainingSet, at: Tensor, views: Tensor) -> Tensor:
    """The rows in these views, uint8 `[B, 3, H, W]`."""
    return apply_views(data.images[at], data.offsets[views])


def view_logits(data: TrainingSet, at: Tensor, views: Tensor, attack: int | None = None) -> Tensor:
    """Every teacher's logits on the rows in these views, or on an attack's images of them, float32 `[B, T, C]`."""
    if attack is not None:
        return data.adversarial[attack][at, views].float()
    if not data.more:
        return data.clean[at, views].float()
    logits = data.clean[at, views.clamp(max=data.clean.shape[1] - 1)]
    for more in data.more:
        theirs = more.values[more.slots[at], (views - more.first).clamp(0, more.values.shape[1] - 1)]
        logits = torch.where(((views >= more.first) & (views < more.stop))[:, None, None], theirs, logits)
    return logits.float()


def adversarial_levels(data: TrainingSet, at: Tensor, views: Tensor, attack: int, pixels: Tensor) -> Tensor:
    """The stored adversarial images of the rows in these views, in pixel levels, float32 `[B, 3, H, W]`.

    Args:
        data: rows of the cache in memory.
        at: int64 `[B]`, positions in `data`.
        views: int64 `[B]`, among those that the attack ran on.
        attack: a position in `data.attacks`.
        pixels: what `view_pixels` gave.
    """
    return (pixels + data.scales[attack] * data.deltas[attack][at, views]).float()
