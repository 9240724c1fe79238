"""The proposals of Square Attack in L2 (Andriushchenko et al. 2020, algorithm 3): mass moves from window to window."""

from functools import lru_cache

import torch
from torch import Tensor

from darht.attacks.engine.state import Rows

_TINY = 1e-12


def window(top: Tensor, left: Tensor, side: Tensor, like: Tensor) -> Tensor:
    """Which pixels lie in each row's square, bool `[B, 1, H, W]`."""
    height, width = like.shape[2:]
    rows = torch.arange(height, device=top.device)
    columns = torch.arange(width, device=top.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


@lru_cache
def pattern(side: int) -> Tensor:
    """Two bumps of opposite sign, one above the other, of unit norm, `[side, side]` (the paper's eta)."""
    upper = side // 2
    both = torch.cat([_bump(upper, side), -_bump(side - upper, side)])
    return both / both.square().sum().sqrt()


def _bump(height: int, width: int) -> Tensor:
    """Nested rectangles around the middle, the k-th of weight 1 / k**2, of unit norm."""
    bump = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for k in range(max(height // 2, width // 2) + 1):
        rows = slice(max(top - k, 0), min(top + k + 1, height))
        columns = slice(max(left - k, 0), min(left + k + 1, width))
        bump[rows, columns] += 1.0 / (k + 1) ** 2
    return bump / bump.square().sum().sqrt() if height else bump


def tiles(rows: Rows) -> Tensor:
    """The start: patterns on a 5 by 5 grid with random signs and one random orientation for each tile."""
    count, channels, height, width = rows.x.shape
    side = max(height // 5, 1)
    words = rows.generator.words((channels + 1, height // side, width // side), 1) & 1
    signs = 2 * words[:, :-1] - 1
    shape = pattern(side).to(rows.x.device)
    turned = torch.where(words[:, -1, :, :, None, None] == 1, shape, shape.T)
    canvas = torch.zeros(count, channels, height, width, device=rows.x.device)
    filled = (signs[..., None, None] * turned[:, None]).permute(0, 1, 2, 4, 3, 5)
    filled = filled.reshape(count, channels, height // side * side, width // side * side)
    top, left = (height - filled.shape[2]) // 2, (width - filled.shape[3]) // 2
    canvas[:, :, top : top + filled.shape[2], left : left + filled.shape[3]] = filled
    return canvas


def propose(delta: Tensor, plan: Tensor, signs: Tensor, inside: Tensor, radius: float) -> Tensor:
    """Add a pattern to the first window, with the norm that the second window and the slack in the ball give up.

    Args:
        delta: the perturbations `[B, C, H, W]` in pixels.
        plan: int64 `[B, 6]`, see `SquareState`.
        signs: 0 or 1, `[B, C]`.
        inside: the first window, bool `[B, 1, H, W]`.
        radius: of the ball, in pixels.
    """
    second = window(plan[:, 2], plan[:, 3], plan[:, 5], delta)
    budget = (radius**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0.0) / delta.shape[1]
    freed = (delta * (inside | second)).square().sum((2, 3), keepdim=True)
    old = delta * inside
    fresh = old / (old.square().sum((2, 3), keepdim=True).sqrt() + _TINY)
    fresh = fresh + (2 * signs - 1)[:, :, None, None] * _placed(plan, delta)
    fresh = fresh / (fresh.square().sum((2, 3), keepdim=True).sqrt() + _TINY) * (budget + freed).sqrt()
    return torch.where(inside, fresh, delta.masked_fill(second, 0.0))


def _placed(plan: Tensor, like: Tensor) -> Tensor:
    """Each row's pattern at its first window, turned by a bit of the plan, `[B, 1, H, W]`; garbage elsewhere."""
    height, width = like.shape[2:]
    side, turned = plan[:, 5, None, None], (plan[:, 4, None, None] >> 7) & 1
    row = (torch.arange(height, device=plan.device)[None, :, None] - plan[:, 0, None, None]).clamp(min=0)
    column = (torch.arange(width, device=plan.device)[None, None, :] - plan[:, 1, None, None]).clamp(min=0)
    row, column = torch.minimum(row, side - 1), torch.minimum(column, side - 1)
    table, first = _table(min(height, width))
    start = first.to(plan.device)[plan[:, 5]][:, None, None]
    index = start + torch.where(turned == 1, column * side + row, row * side + column)
    return table.to(like)[index][:, None]


@lru_cache
def _table(largest: int) -> tuple[Tensor, Tensor]:
    """All patterns one after the other, and where the pattern of each side begins."""
    sides = range(1, largest + 1)
    first = torch.tensor([0, *(side * side for side in sides)]).cumsum(0)
    return torch.cat([pattern(side).flatten() for side in sides]), torch.cat([first[:1], first[:-1]])
