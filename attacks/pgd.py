"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.objectives import OBJECTIVES, Model, ObjectiveName, input_gradient
from darht.attacks.threat import LEVELS, Norm, Threat, check_levels, to_levels
from darht.core.errors import ConfigError
from darht.core.rng import RowRng


def ascend(
    loss_of: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor, *, threat: Threat, step: float, steps: int
) -> Tensor:
    """Climb a per-row loss inside the ball and the pixel range.

    Args:
        loss_of: from pixels `[B, 3, H, W]` in [0, 1] to a loss per row `[B]`.
        x: clean pixels in [0, 1].
        delta: where to start, in levels.
        threat: the ball.
        step: the step size in levels.
        steps: how many gradient steps; every row gets all of them.

    Returns:
        The perturbation in levels; whole when start and step are whole and the norm is L-inf.
    """
    clean = to_levels(x)
    delta = (clean + threat.project(delta)).clamp(0, LEVELS) - clean
    for _ in range(steps):
        gradient = input_gradient(loss_of, (clean + delta) / LEVELS)
        delta = threat.project(delta + step * threat.direction(gradient))
        delta = (clean + delta).clamp(0, LEVELS) - clean
    return delta


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD with its full budget for every row, from a random start on whole pixel levels.

    The paper draws the start from the continuous cube; whole levels keep a stored int8 perturbation exact.

    Attributes:
        eps: radius in pixel levels.
        step: step size in pixel levels.
        steps: gradient steps.
        norm: `linf` or `l2`.
        objective: what is maximised: `ce`, `dlr` or `margin`.
        random_start: start at a random point of the ball, otherwise at the image.
    """

    eps: float = 8.0  # 8/255, the customary radius on CIFAR
    step: float = 2.0  # eps / 4, Madry et al.'s CIFAR setting
    steps: int = 10
    norm: Norm = "linf"
    objective: ObjectiveName = "ce"
    random_start: bool = True

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        check_levels("step", self.step, self.norm)
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1; got {self.steps}")

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in."""
        return Threat(eps=self.eps, norm=self.norm)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: RowRng) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]` in [0, 1] for pixels `x` and labels `y` `[B]`; `model` is in eval mode."""
        objective = OBJECTIVES[self.objective]
        start = self.threat.random_start(x.shape, generator) if self.random_start else torch.zeros_like(x)
        delta = ascend(lambda z: objective(model(z), y), x, start, threat=self.threat, step=self.step, steps=self.steps)
        return (to_levels(x) + delta) / LEVELS
