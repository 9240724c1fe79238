"""What a batch shows of its rows: the views and the stored attack that are drawn, and what the cache holds about them.

The trainer and `CacheDataset` both draw here, so that one's own loop sees what a recipe would have seen.
"""

import torch
from torch import Tensor

from darht.cache.format.apply_views import apply_views
from darht.cache.format.logit_codes import spread
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
    if attack is None and data.drawn is not None:
        return data.drawn[at]
    count = len(data.offsets) if attack is None else data.deltas[attack].shape[1]
    return draw_views(data.rows[at], count, seed=seed, epoch=epoch, together=data.same_view)


def draw_views(rows: Tensor, count: int, *, seed: int, epoch: int, together: int = 1) -> Tensor:
    """One of `count` views for each source index, int64 `[B]`; so many neighbours `together` have the same."""
    return draw_choices(rows // together if together > 1 else rows, count, seed, epoch, "view")


def view_pixels(data: TrainingSet, at: Tensor, views: Tensor) -> Tensor:
    """The rows in these views, uint8 `[B, 3, H, W]`."""
    return apply_views(data.images[at], data.offsets[views])


def view_logits(data: TrainingSet, at: Tensor, views: Tensor, attack: int | None = None) -> Tensor:
    """Every teacher's logits on the rows in these views, or on an attack's images of them, float32 `[B, T, C]`."""
    stored = data.clean if attack is None else data.adversarial[attack]
    if attack is None and data.drawn is not None:
        views = torch.zeros_like(at)
    if not data.companions:
        return stored[at, views].float()
    companion = data.companions[0 if attack is None else 1 + attack]
    return decode_tensors(stored[at, views], companion[at, views], data.classes)


def decode_tensors(main: Tensor, companion: Tensor, classes: int) -> Tensor:
    """Logits of all classes, float32 `[..., C]`, as `cache.format.logit_codes.decode` has them."""
    if main.dtype == torch.int8:
        return main * companion[..., :1] + companion[..., 1:]
    k = companion.shape[-1]
    rest = main[..., k:].float() - spread(classes, k)
    return rest.expand(*rest.shape[:-1], classes).scatter(-1, companion.long(), main[..., :k].float())


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
