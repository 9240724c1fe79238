"""The nearest point of a hyperplane inside the pixel box, in L-inf and L2.

The authors of FAB sort all coordinates; here Newton's method on the piecewise linear equation of the one multiplier
finds the same point in a few passes. Its steps only ever grow, and stop exactly where the set of free coordinates no
longer changes, so a row's result depends on that row alone.
"""

import torch
from torch import Tensor

from darht.attacks.threat import Norm

_PASSES = 40  # the set of free coordinates shrinks at each pass; 4 to 8 suffice in practice
_TINY = 1e-12
_FAR = 1e12  # finite: 0 times it is 0


def to_hyperplane(point: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The smallest displacement that closes the gap, or comes as near as the box allows.

    Args:
        point: pixels `[B, 3, H, W]` in [0, 1].
        normal: the hyperplane's normal, the same shape.
        gap: `normal . point - offset`, `[B]`; what the displacement must undo.
        norm: of the displacement.

    Returns:
        The displacement, `[B, 3, H, W]`; `point` plus it lies in [0, 1].
    """
    heading = normal.sign().mul_(-gap.sign()[:, None, None, None])  # 0 where nothing is to be gained
    room = heading.add(1.0).mul_(0.5).sub_(point).abs_()  # to the face of the box that lies ahead
    weight = normal.abs()
    wanted = gap.abs()[:, None, None, None]
    if norm == "linf":
        size = _solve(room, weight, weight * room, wanted)
        moved = torch.minimum(room, size, out=room)
    else:
        size = _solve(room / weight.clamp(min=_TINY), weight.square(), weight * room, wanted)
        moved = torch.minimum(room, weight.mul_(size), out=room)
    return moved.mul_(heading)


def _solve(limit: Tensor, slope: Tensor, most: Tensor, wanted: Tensor) -> Tensor:
    """The t with sum(where(t < limit, slope * t, most)) = wanted, `[B, 1, 1, 1]`; very large if there is none."""
    everything = most.sum((1, 2, 3), keepdim=True)
    size = torch.zeros_like(wanted)
    free, part = torch.empty_like(limit), torch.empty_like(limit)  # written again at each pass: new ones cost 3 times
    for _ in range(_PASSES):
        torch.gt(limit, size, out=free)
        steep = torch.mul(slope, free, out=part).sum((1, 2, 3), keepdim=True)
        fixed = everything - free.mul_(most).sum((1, 2, 3), keepdim=True)
        further = torch.where(steep > 0, (wanted - fixed) / steep.clamp(min=_TINY), _FAR)
        grown = torch.maximum(size, further)
        if bool((grown <= size).all()):
            break
        size = grown
    return size
