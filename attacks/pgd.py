"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State, observe
from darht.attacks.objectives import ObjectiveName, input_gradient
from darht.attacks.threat import LEVELS, Norm, Threat, check_levels, to_levels
from darht.core.errors import ConfigError
from darht.core.fused import fused


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
    clean, delta, query = _begin(x, delta, threat)
    for _ in range(steps):
        gradient = input_gradient(loss_of, query)
        delta, query = _moved(clean, delta, gradient, threat, step)
    return delta


@fused
def _begin(x: Tensor, delta: Tensor, threat: Threat) -> tuple[Tensor, Tensor, Tensor]:
    """Clean pixels in levels, a start moved into the ball and the pixel range, and the pixels there."""
    clean = to_levels(x)
    delta = (clean + threat.project(delta)).clamp(0, LEVELS) - clean
    return clean, delta, (clean + delta) / LEVELS


@fused
def _moved(clean: Tensor, delta: Tensor, gradient: Tensor, threat: Threat, step: float) -> tuple[Tensor, Tensor]:
    """The perturbation after a step along the gradient, and the pixels there."""
    delta = climb(clean, delta, threat.direction(gradient), threat=threat, step=step)
    return delta, (clean + delta) / LEVELS


def climb(clean: Tensor, delta: Tensor, direction: Tensor, *, threat: Threat, step: float) -> Tensor:
    """One step, back into the ball and into the pixel range; all in levels."""
    delta = threat.project(delta + step * direction)
    return (clean + delta).clamp(0, LEVELS) - clean


@dataclass(kw_only=True)
class LevelState(State):
    """Rows of an attack that lives on pixel levels.

    Attributes:
        clean: clean pixels in levels.
        delta: the perturbation in levels.
    """

    clean: Tensor
    delta: Tensor

    def go(self, delta: Tensor, steps: int) -> None:
        """Look at this perturbation next; done after so many steps."""
        self.delta = delta
        self.query = self.best = (self.clean + delta) / LEVELS
        self.done = self.looks >= steps


L = TypeVar("L", bound=LevelState)


def start_on_levels(kind: type[L], threat: Threat, rows: Rows, start: Tensor, **more: Tensor) -> L:
    """New rows at their images plus `start` levels, moved into the ball and the pixel range."""
    levels = to_levels(rows.x)
    delta = (levels + threat.project(start)).clamp(0, LEVELS) - levels
    return kind.begin(rows, (levels + delta) / LEVELS, clean=levels, delta=delta, **more)


def check_sign_attack(eps: float, step: float, steps: int, norm: Norm) -> None:
    """The rules of every attack that walks in steps on pixel levels.

    Raises:
        ConfigError: eps or step not in whole levels, or fewer than one step.
    """
    check_levels("eps", eps, norm)
    check_levels("step", step, norm)
    if steps < 1:
        raise ConfigError(f"steps must be at least 1; got {steps}")


class OnLevels(SingleModel):
    """What attacks share that stay on whole pixel levels in L-inf."""

    @property
    def whole_levels(self) -> bool:
        """Sign steps of whole levels from a whole start never leave the grid."""
        return self.norm == "linf"


class Steps(OnLevels):
    """What attacks share that climb in steps of one size, from the image or from a random point of the ball."""

    step: float
    steps: int
    random_start: bool

    def __post_init__(self) -> None:
        check_sign_attack(self.eps, self.step, self.steps, self.norm)

    @property
    def looks(self) -> int:
        """One for each step."""
        return self.steps

    def start(self, rows: Rows, run: int) -> LevelState:
        """At a random point on whole levels, or at the image."""
        start = torch.zeros_like(rows.x)
        if self.random_start:
            start = self.threat.random_start(rows.x.shape, rows.generator).to(rows.x.dtype)
        return start_on_levels(LevelState, self.threat, rows, start)

    def move(self, oracle: Oracle, state: State) -> None:
        """One step along the steepest ascent."""
        assert isinstance(state, LevelState)
        direction = self.threat.direction(state.gradient)
        state.go(climb(state.clean, state.delta, direction, threat=self.threat, step=self.step), self.steps)


@dataclass(frozen=True, kw_only=True)
class PGD(Steps):
    """PGD with its full budget for every row, from a random start, in L-inf on whole pixel levels.

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

    def look(self, oracle: Oracle, state: State) -> None:
        """The objective's gradient at the iterate."""
        state.score = observe(oracle, state, lambda logits: state.objective(self.objective, logits))
