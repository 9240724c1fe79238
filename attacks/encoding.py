"""Perturbations as they are stored: whole multiples of a scale in pixel levels, inside the ball and the pixel range."""

import torch
from torch import Tensor

from darht.attacks.threat import LEVELS, Threat, to_levels

CODES = 127  # int8 without -128, so that codes are symmetric


def encode(x_adv: Tensor, x: Tensor, threat: Threat, scale: float) -> Tensor:
    """The int8 codes `[N, 3, H, W]` of a perturbation; `scale` pixel levels each.

    Rounded to the nearest code in L-inf and cut towards zero in L2, then clipped so that neither the ball nor the pixel
    range is left.
    """
    delta = threat.project(to_levels(x_adv) - to_levels(x))
    codes = delta / scale
    codes = codes.round() if threat.norm == "linf" else codes.trunc()
    limit = min(CODES, int(threat.eps / scale * (1 + 1e-6))) if threat.norm == "linf" else CODES
    codes = codes.clamp(-limit, limit)
    clean = to_levels(x)
    low, high = (-clean / scale - 1e-4).ceil(), ((LEVELS - clean) / scale + 1e-4).floor()
    return torch.minimum(torch.maximum(codes, low), high).to(torch.int8)


def decode(codes: Tensor, x: Tensor, scale: float) -> Tensor:
    """Pixels in [0, 1] of stored codes."""
    return ((to_levels(x) + codes.to(x.dtype) * scale) / LEVELS).clamp(0.0, 1.0)


def store(x_adv: Tensor, x: Tensor, threat: Threat, scale: float | None, *, whole: bool) -> tuple[Tensor, Tensor]:
    """What storing would leave of `x_adv`, and which rows it changes, bool `[N]`.

    An attack on whole levels stored in whole levels is returned as it is.
    """
    if scale is None or (whole and scale == 1.0):
        return x_adv, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    stored = decode(encode(x_adv, x, threat, scale), x, scale)
    return stored, (stored != x_adv).flatten(1).any(1)
