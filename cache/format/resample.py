"""A box of an image resized to a square, in integers: the same bits in numpy and in torch, on any machine.

The filter is the triangle, as wide as a source pixel or a result's, whichever is larger ("antialiased bilinear", as
Pillow and torchvision resize). Weights are multiples of 2**-22 that sum to 1; rows are resized first, then columns, and
both passes round to whole levels. `docs/cache-format.md` specifies every step.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # who reads with numpy alone needs no torch
    from torch import Tensor

_BITS = 22
_HALF = 1 << (_BITS - 1)


def filter_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a side of `length` make each of `size` results, and with which weights.

    Returns:
        Positions int64 `[size, K]` in 0..length-1, and weights int32 `[size, K]` whose rows sum to 2**22.
    """
    wide = max(length, size)
    centre = (2 * np.arange(size, dtype=np.int64) + 1) * length
    first = np.maximum(0, (centre - 2 * wide - size) // (2 * size) + 1)
    position = first[:, None] + np.arange(-(-2 * wide // size))
    share = 2 * wide - np.abs((2 * position + 1) * size - centre[:, None])
    share = np.where(position < length, np.maximum(share, 0), 0)
    until = np.cumsum(share, axis=1)
    total = until[:, -1:]
    bound = (until * (2 << _BITS) + total) // (2 * total)
    weights = np.diff(bound, axis=1, prepend=0).astype(np.int32)
    return np.minimum(position, length - 1), weights


def resample(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """One view of one image.

    Args:
        image: uint8 `[3, H, W]`.
        box: (top, left, height, width, flip), inside of the image.
        size: S.

    Returns:
        uint8 `[3, S, S]`.
    """
    top, left, height, width, flip = (int(value) for value in box)
    cut = image[:, top : top + height, left : left + width]
    rows = _along(cut, *filter_taps(width, size), axis=2)
    square = _along(rows, *filter_taps(height, size), axis=1)
    return np.ascontiguousarray(square[:, :, ::-1] if flip else square)


def _along(values: np.ndarray, position: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
    total: int | np.ndarray = _HALF
    for tap in range(position.shape[1]):
        total = total + values.take(position[:, tap], axis=axis).astype(np.int32) * weights[:, tap].reshape(shape)
    return (np.asarray(total) >> _BITS).astype(np.uint8)


def centre_boxes(sizes: np.ndarray) -> np.ndarray:
    """View 0 of resized crops: the centred square of images of `sizes` `[n, 2]` (height, width), int32 `[n, 5]`."""
    height, width = sizes.astype(np.int64).T
    side = np.minimum(height, width)
    found = np.stack([(height - side) // 2, (width - side) // 2, side, side, np.zeros_like(side)], axis=1)
    return found.astype(np.int32)


def resample_all(images: Iterable[np.ndarray], boxes: np.ndarray, size: int) -> np.ndarray:
    """A view of each of some images, which may differ in size, uint8 `[n, 3, S, S]`."""
    found = np.empty((len(boxes), 3, size, size), dtype=np.uint8)
    for at, (image, box) in enumerate(zip(images, boxes, strict=True)):
        found[at] = resample(image, box, size)
    return found


def centred(images: np.ndarray, size: int) -> np.ndarray:
    """Images uint8 `[n, 3, H, W]` as view 0 of resized crops shows them, uint8 `[n, 3, S, S]`."""
    return resample_all(images, centre_boxes(np.tile(images.shape[2:], (len(images), 1))), size)


def resample_batch(images: "Tensor", boxes: "Tensor", size: int) -> "Tensor":
    """A view of each image of a batch, on any device.

    Args:
        images: uint8 `[B, 3, H, W]`.
        boxes: integers `[B, 5]` of (top, left, height, width, flip).
        size: S.

    Returns:
        uint8 `[B, 3, S, S]`, the bits of `resample`.
    """
    import torch

    if images.device.type == "cpu":  # a third of the time of gathers
        return torch.from_numpy(resample_all(images.numpy(), boxes.numpy(), size))
    return resample_by_gathers(images, boxes, size)


def resample_by_gathers(images: "Tensor", boxes: "Tensor", size: int) -> "Tensor":
    """What `resample_batch` does on a GPU: integers, gathered, multiplied and added, for all images at once."""
    import torch

    top, left, height, width, flip = boxes.long().unbind(1)
    B, C, H, _ = images.shape
    columns, across = _batch_taps(width, size, images.shape[3])
    columns = torch.where(flip[:, None, None] == 1, columns.flip(1), columns) + left[:, None, None]
    across = torch.where(flip[:, None, None] == 1, across.flip(1), across)
    total = torch.full((B, C, H, size), _HALF, dtype=torch.int32, device=images.device)
    for tap in range(columns.shape[2]):
        index = columns[:, None, None, :, tap].expand(B, C, H, size)
        total += images.gather(3, index).int() * across[:, None, None, :, tap]
    resized = (total >> _BITS).to(torch.uint8)
    rows, down = _batch_taps(height, size, H)
    rows = rows + top[:, None, None]
    total = torch.full((B, C, size, size), _HALF, dtype=torch.int32, device=images.device)
    for tap in range(rows.shape[2]):
        index = rows[:, None, :, tap, None].expand(B, C, size, size)
        total += resized.gather(2, index).int() * down[:, None, :, tap, None]
    return (total >> _BITS).to(torch.uint8)


def _batch_taps(length: "Tensor", size: int, most: int) -> tuple["Tensor", "Tensor"]:
    """`filter_taps` of sides of several lengths, of at most `most` pixels: `[B, size, K]`."""
    import torch

    device = length.device
    wide = length.clamp(min=size)[:, None]
    centre = (2 * torch.arange(size, device=device) + 1) * length[:, None]
    first = (torch.div(centre - 2 * wide - size, 2 * size, rounding_mode="floor") + 1).clamp(min=0)
    position = first[..., None] + torch.arange(-(-2 * max(most, size) // size), device=device)
    share = 2 * wide[..., None] - ((2 * position + 1) * size - centre[..., None]).abs()
    share = torch.where(position < length[:, None, None], share.clamp(min=0), 0)
    until = share.cumsum(2)
    total = until[..., -1:]
    bound = torch.div(until * (2 << _BITS) + total, 2 * total, rounding_mode="floor")
    weights = torch.diff(bound, dim=2, prepend=torch.zeros_like(total)).int()
    return torch.minimum(position, length[:, None, None] - 1), weights
