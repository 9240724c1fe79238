"""Resized crops as views: which box of its image a row's view shows, in whole numbers throughout.

A box is drawn as torchvision's RandomResizedCrop draws it: a share of the area, a ratio of the sides, and a place; up
to ten times until it lies inside of the image. Its draws are keyed by (seed, source row, view), and the arithmetic is
that of integers, so that every machine comes to the same boxes. View 0 is the centred square.
"""

from decimal import Decimal, localcontext

import numpy as np
import torch

from darht.cache.format.resample import centre_boxes
from darht.cache.format.spec import ViewSpec
from darht.core.rng import RowRng

_ONE = 1 << 16  # shares and ratios are in units of 2**-16
_RATIOS = 256  # that a box may have: evenly spaced logarithms
_ATTEMPTS = 10  # of torchvision
_DIGITS = 40  # of a ratio before it is rounded, so that it is rounded alike everywhere


def ratio_table(low: float, high: float) -> np.ndarray:
    """The ratios of width to height that a box may have, int64 `[256]` in units of 2**-16."""
    with localcontext() as context:
        context.prec = _DIGITS
        first, last = Decimal(repr(low)).ln(), Decimal(repr(high)).ln()
        values = [(first + (last - first) * k / (_RATIOS - 1)).exp() * _ONE for k in range(_RATIOS)]
        return np.array([int(value.to_integral_value()) for value in values], dtype=np.int64)


def draw_boxes(sizes: np.ndarray, rows: np.ndarray, views: ViewSpec, seed: int) -> np.ndarray:
    """The boxes of some rows in every view.

    Args:
        sizes: height and width of each row's image, `[n, 2]`.
        rows: source indices, int64 `[n]`.
        views: of the spec.
        seed: of the spec.

    Returns:
        int32 `[n, V, 5]` of (top, left, height, width, flip).
    """
    n, drawn, ratio = len(rows), views.count - 1, views.ratio
    found = np.empty((n, views.count, 5), dtype=np.int32)
    found[:, 0] = centre_boxes(sizes)
    if not drawn:
        return found
    numbers = torch.arange(1, views.count).repeat(n)
    keyed = torch.from_numpy(np.repeat(rows.astype(np.int64), drawn))
    words = RowRng.create(seed, "resized-crop", rows=keyed, views=numbers).words((4 * _ATTEMPTS + 1,)).numpy()
    size = np.repeat(sizes.astype(np.int64), drawn, axis=0)
    box = _fallback(size, ratio)
    waiting = np.arange(len(words))
    table, low, high = ratio_table(ratio[0], ratio[1]), _units(views.scale[0]), _units(views.scale[1])
    for attempt in range(_ATTEMPTS):
        own, (height, width) = words[waiting, 4 * attempt : 4 * attempt + 4], size[waiting].T
        area = height * width * (low + ((high - low + 1) * own[:, 0] >> 32)) // _ONE
        chosen = table[own[:, 1] >> 24]
        w, h = _root(area * chosen // _ONE), _root(area * _ONE // chosen)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        top, left = (height - h + 1) * own[:, 2] >> 32, (width - w + 1) * own[:, 3] >> 32
        box[waiting[fits]] = np.stack([top, left, h, w], axis=1)[fits]
        waiting = waiting[~fits]
    mirrored = (words[:, -1] & 1) * int(views.flip)
    found[:, 1:] = np.column_stack([box, mirrored]).reshape(n, drawn, 5)
    return found


def _units(share: float) -> int:
    return round(share * _ONE)


def _root(values: np.ndarray) -> np.ndarray:
    """The square root of integers below 2**48, rounded to the nearest."""
    doubled = 4 * values
    root = np.sqrt(doubled.astype(np.float64)).astype(np.int64)
    root -= root * root > doubled
    root += (root + 1) * (root + 1) <= doubled
    return (root + 1) // 2


def _fallback(size: np.ndarray, ratio: tuple[float, ...]) -> np.ndarray:
    """The largest centred box whose ratio is allowed, `[n, 4]`: for images so long that no draw fits."""
    low, high = _units(ratio[0]), _units(ratio[1])
    height, width = size.T
    w = np.minimum(width, np.maximum(1, height * high // _ONE))
    h = np.minimum(height, np.maximum(1, width * _ONE // low))
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
