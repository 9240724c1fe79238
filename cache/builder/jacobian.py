"""Rows of a teacher's Jacobian: how its logits change with each pixel, for what it would say about nearby images.

A robust teacher is nearly linear inside the ball, so `T(x) + J(x) delta` stands for `T(x + delta)` where no teacher is
at hand: in the training of a student on its own adversarial examples.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from darht.attacks.threat import LEVELS
from darht.core.errors import ModelError

_MAX = 127


def jacobian_rows(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `count` logits per image.

    Args:
        model: a frozen teacher, pixels in [0, 1] to logits `[B, C]`.
        x: pixels `[B, 3, H, W]` in [0, 1].
        y: labels `[B]`.
        count: K, how many classes: all C of them in order, or the true one and then the teacher's strongest others.

    Returns:
        int8 `[B, K, 3, H, W]`, float32 scales `[B, K]` (scale times integer is logits per pixel level), and the int16
        classes `[B, K]`.

    Raises:
        ModelError: a gradient that is not finite.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        classes = _classes(logits.detach(), y, count)
        chosen = logits.gather(1, classes)
        rows = [torch.autograd.grad(chosen[:, k].sum(), x, retain_graph=k + 1 < count)[0] for k in range(count)]
    gradients = torch.stack(rows, dim=1) / LEVELS
    if not bool(torch.isfinite(gradients).all()):
        raise ModelError("a gradient is not finite, so that there is no Jacobian")
    scales = gradients.flatten(2).abs().amax(2) / _MAX
    values = (gradients / scales.clamp(min=torch.finfo(scales.dtype).tiny)[..., None, None, None]).round()
    return values.to(torch.int8), scales.float(), classes.to(torch.int16)


def _classes(logits: Tensor, y: Tensor, count: int) -> Tensor:
    if count == logits.shape[1]:
        return torch.arange(count, device=y.device).expand(len(y), count)
    others = logits.scatter(1, y[:, None], -torch.inf).topk(count - 1, dim=1).indices
    return torch.cat([y[:, None], others], dim=1)


def as_arrays(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[np.ndarray, ...]:
    """The batches of a unit, one after the other, as values, scales and classes."""
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
