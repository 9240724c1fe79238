"""What a batch shows of its rows: the views and the stored attack that are drawn, and what the cache holds about them.

The trainer and `CacheDataset` both draw here, so that one's own loop sees what a recipe would have seen.
"""

import torch
from torch import Tensor

from darht.cache.format.apply_views import apply_views
from darht.cache.format.images import decode_views
from darht.cache.format.logit_codes import spread
from darht.cache.format.resample import resample_batch
from darht.cache.read.sampler import choose, draw_choices
from darht.cache.read.training_set import TrainingSet
from darht.core.fused import fused


def choose_attack(count: int, *, seed: int, number: int) -> int:
    """Which of `count` stored attacks a batch shows; `number` counts the batches of the whole run."""
    return choose(count, seed, number, "attack")


def choose_views(data: TrainingSet, at: Tensor, *, seed: int, epoch: int, attack: int | None = None) -> Tensor:
    """A view for each row, int64 `[B]`: one of all, or with an attack one of those that it ran on.

    Args:
        data: rows of the cache in memory.
        at: int64 `[B]`, positions in `data`; the rows' source indices key the draws.
        seed: keys them too.
        epoch: as well.
        attack: a position in `data.attacks`.
    """
    count = len(data.offsets) if attack is None else data.attack_count(attack)
    return draw_views(data, data.rows[at], count, seed=seed, epoch=epoch)


def draw_views(data: TrainingSet, rows: Tensor, count: int, *, seed: int, epoch: int) -> Tensor:
    """For each source index of the cache one of `count` views, or of those that the row has where they are fewer."""
    keys, limits = rows // data.same_view if data.same_view > 1 else rows, data.limits or ((0, count),)
    views = draw_choices(keys, min(count, limits[0][1]), seed, epoch, "view")
    for having, most in limits[1:] if count > limits[0][1] else ():
        views = torch.where(rows < having, draw_choices(keys, min(count, most), seed, epoch, "view"), views)
    return views


def view_pixels(data: TrainingSet, at: Tensor, views: Tensor) -> Tensor:
    """The rows in these views, uint8 `[B, 3, H, W]`."""
    if data.encoded is not None:
        boxes = None if data.boxes is None else data.boxes[at, views].cpu().numpy()
        shown = torch.from_numpy(decode_views(data.encoded[at.cpu().numpy()], boxes, data.size)).to(at.device)
        return shown if data.boxes is not None else apply_views(shown, data.offsets[views])
    if data.boxes is not None:
        return resample_batch(data.images[at], data.boxes[at, views], data.size)
    return _cut(data.images, data.offsets, at, views)


def view_logits(data: TrainingSet, at: Tensor, views: Tensor, attack: int | None = None) -> Tensor:
    """Every teacher's logits on the rows in these views, or on an attack's images of them, float32 `[B, T, C]`."""
    stored = data.clean if attack is None else data.adversarial[attack]
    held = data.held if attack is None else data.shown
    if attack is None and data.more:
        return data.logits(at, views).float()
    if not data.companions:
        return _said(stored, at, views) if held is None else _said_of_held(stored, held, at, views)
    places = views if held is None else _places(held, at, views)
    companion = data.companions[0 if attack is None else 1 + attack]
    return decode_tensors(stored[at, places], companion[at, places], data.classes)


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
    places = views if data.shown is None else _places(data.shown, at, views)
    return _moved(pixels, data.deltas[attack], at, places, data.scales[attack])


@fused
def _cut(images: Tensor, offsets: Tensor, at: Tensor, views: Tensor) -> Tensor:
    return apply_views(images[at], offsets[views])


@fused
def _said(stored: Tensor, at: Tensor, views: Tensor) -> Tensor:
    return stored[at, views].float()


@fused
def _said_of_held(stored: Tensor, held: Tensor, at: Tensor, views: Tensor) -> Tensor:
    return stored[at, _places(held, at, views)].float()


def _places(held: Tensor, at: Tensor, views: Tensor) -> Tensor:
    """Where the drawn views are among those that are held of each row, int64 `[B]`."""
    return (held[at] == views[:, None]).int().argmax(1)


@fused
def _moved(pixels: Tensor, deltas: Tensor, at: Tensor, views: Tensor, scale: float) -> Tensor:
    return (pixels + scale * deltas[at, views]).float()
