"""What an attack maximises: one number per row from logits `[B, C]` and labels `[B]`."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from darht.core.errors import ConfigError

Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]
ObjectiveName = Literal["ce", "dlr", "margin"]
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, `[B]` nats."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The largest wrong logit less the right one, `[B]`; above 0 where the row is misclassified (Carlini & Wagner)."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    return wrong - right


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, `[B]` (Croce & Hein 2020, equation 6): invariant to shift and scale of the logits.

    Raises:
        ConfigError: fewer than 4 classes.
    """
    _check_dlr(logits)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit less the right one, `[B]`."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio, `[B]` (Croce & Hein 2020, equation 7), larger is closer to the target.

    Raises:
        ConfigError: fewer than 4 classes.
    """
    _check_dlr(logits)
    top = logits.topk(4, dim=1).values
    return targeted_margin(logits, y, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


def _check_dlr(logits: Tensor) -> None:
    if logits.shape[1] < 4:
        raise ConfigError(f"dlr needs at least 4 classes; got {logits.shape[1]}: use ce or margin")


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


def objective_of(name: ObjectiveName, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """The objective of this name, `[B]`; where somebody chose a target, the larger the closer to that.

    A targeted `margin` is above 0 where the target is predicted; `dlr` is then the targeted one.
    """
    if target is None:
        return OBJECTIVES[name](logits, y)
    return targeted_dlr(logits, y, target) if name == "dlr" else -OBJECTIVES[name](logits, target)


def margin_of(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """The margin, above 0 where an attack has succeeded: any wrong class, or the target where there is one."""
    return margin(logits, y) if target is None else -margin(logits, target)


def input_gradient(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the *sum* of per-row losses with respect to `x` alone, so that batch size does not change it.

    Weights get no gradient and keep their `requires_grad`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(x).sum(), x)
    return gradient
