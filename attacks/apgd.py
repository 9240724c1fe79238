"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, "Reliable evaluation of adversarial robustness ..."), algorithm 1.

Written from the paper and checked, image by image, against the authors' code. Two things are the code's and not the
paper's, and kept because every published number has them: the plain step's point also counts as a candidate, and the
first window of the step-size rule compares the first loss with 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State
from darht.attacks.objectives import ObjectiveName, targeted_dlr, targeted_margin
from darht.attacks.threat import Norm, check_levels, row_norms
from darht.core.device import constant
from darht.core.errors import ConfigError

_MOMENTUM = 0.75  # the paper's alpha: the share of the new step, the rest is the last displacement
_TINY = 1e-12


@dataclass(kw_only=True)
class APGDState(State):
    """Rows of Auto-PGD; `best` is the point of highest loss.

    Attributes:
        before: the iterate before `query`.
        best_gradient: the gradient at `best`.
        low, high: the smallest and largest pixels that the L-inf ball allows.
        step: step size in pixels, `[S, 1, 1, 1]`.
        loss: at the last look.
        rises: how often the loss rose since the last checkpoint.
        checked: the best loss at the last checkpoint.
        halved: whether the last checkpoint halved the step.
        run_target: the class of this run; the label for `APGD`.
    """

    before: Tensor
    best_gradient: Tensor
    low: Tensor
    high: Tensor
    step: Tensor
    loss: Tensor
    rises: Tensor
    checked: Tensor
    halved: Tensor
    run_target: Tensor


@lru_cache
def checkpoints(steps: int) -> tuple[int, ...]:
    """The length of the window that ends at iteration i (from 1 to `steps`), 0 where none ends.

    The first window is 22 % of the steps; each is 3 % shorter than the one before, not below 6 %.
    """
    window, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    lengths, since = [0], 0
    for _ in range(steps):
        since += 1
        lengths.append(window if since == window else 0)
        if since == window:
            since, window = 0, max(window - shorter, shortest)
    return tuple(lengths)


class _AutoPGD(SingleModel):
    """What the untargeted and the targeted attack share."""

    steps: int
    rho: float
    eot: int

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        for name in ("steps", "eot"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.rho < 1:
            raise ConfigError(f"rho must lie between 0 and 1; got {self.rho:g}")

    @property
    def looks(self) -> int:
        """One for the start, and one for each step."""
        return self.steps + 1

    def _loss(self, state: APGDState) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError

    def _begin(self, rows: Rows, run_target: Tensor) -> APGDState:
        radius, x = self.threat.radius, rows.x
        noise = self._noise(rows)
        query = (x + radius * noise).clamp(0.0, 1.0)
        per_row = x.new_zeros(len(x))
        return APGDState.begin(
            rows,
            query,
            before=query.clone(),
            best_gradient=torch.zeros_like(x),
            low=(x - radius).clamp(min=0.0),
            high=(x + radius).clamp(max=1.0),
            step=torch.full_like(per_row, 2.0 * radius)[:, None, None, None],
            loss=per_row,
            rises=per_row.clone(),
            checked=per_row.clone(),
            halved=torch.ones_like(rows.y, dtype=torch.bool),
            run_target=run_target,
        )

    def _noise(self, rows: Rows) -> Tensor:
        shape, dtype = tuple(rows.x.shape[1:]), rows.x.dtype
        if self.norm == "linf":
            cube = 2 * rows.generator.uniform(shape).to(dtype) - 1
            return cube / (cube.abs().amax((1, 2, 3), keepdim=True) + _TINY)
        return _unit(rows.generator.normal(shape).to(dtype))

    def look(self, oracle: Oracle, state: State) -> None:
        """Evaluate the iterate; keep it where its loss is the best; at a checkpoint perhaps halve the step."""
        assert isinstance(state, APGDState)
        state.logits, loss, state.gradient = oracle.gradient(state.query, self._loss(state), self.eot)
        state.hit = state.fooled()
        first = state.looks == 0
        state.rises = torch.where(first, 0.0, state.rises + (loss > state.loss))
        state.checked = torch.where(first, loss, state.checked)
        state.loss = torch.where(first, 0.0, loss)
        improved = loss > state.score
        state.best = _chosen(improved, state.query, state.best)
        state.best_gradient = _chosen(improved, state.gradient, state.best_gradient)
        state.score = torch.where(improved, loss, state.score)
        self._check(state, patient=oracle.patient)
        state.looks += 1
        state.done = state.looks > self.steps

    def _check(self, state: APGDState, *, patient: bool) -> None:
        windows = constant(checkpoints(self.steps), state.looks.device)[state.looks.clamp(max=self.steps)]
        if not patient and not bool(windows.any()):
            return
        ends = windows > 0
        stuck = state.rises <= windows * self.rho
        stuck |= ~state.halved & (state.checked >= state.score)
        state.halved = torch.where(ends, stuck, state.halved)
        state.checked = torch.where(ends, state.score, state.checked)
        state.rises = torch.where(ends, 0.0, state.rises)
        back = ends & stuck
        state.step = _chosen(back, state.step / 2.0, state.step)
        state.query = _chosen(back, state.best, state.query)
        state.gradient = _chosen(back, state.best_gradient, state.gradient)

    def move(self, oracle: Oracle, state: State) -> None:
        """A step along the steepest ascent, then three quarters of it and a quarter of the last displacement."""
        assert isinstance(state, APGDState)
        here, share = state.query, torch.where(state.looks == 1, 1.0, _MOMENTUM).to(state.x.dtype)[:, None, None, None]
        drift = here - state.before
        if self.norm == "linf":
            ahead = torch.addcmul(here, state.gradient.sign(), state.step)
            ahead = torch.minimum(torch.maximum(ahead, state.low), state.high).sub_(here).mul_(share).add_(here)
            ahead.add_(drift.mul_(1 - share))
            ahead = torch.minimum(torch.maximum(ahead, state.low), state.high)
        else:
            ahead = self._into_l2(here + state.step * _unit(state.gradient), state.x)
            ahead = self._into_l2(here + (ahead - here) * share + drift * (1 - share), state.x)
        state.before, state.query = here, ahead

    def _into_l2(self, point: Tensor, x: Tensor) -> Tensor:
        delta = point - x
        return (x + _unit(delta) * row_norms(delta).clamp(max=self.threat.radius)).clamp(0.0, 1.0)


def _chosen(rows: Tensor, fresh: Tensor, old: Tensor) -> Tensor:
    """`fresh` in these rows (bool `[S]`), `old` in the others."""
    return torch.where(rows[:, None, None, None], fresh, old)


def _unit(value: Tensor) -> Tensor:
    return value / (value.square().sum((1, 2, 3), keepdim=True).sqrt() + _TINY)


@dataclass(frozen=True, kw_only=True)
class APGD(_AutoPGD):
    """Auto-PGD on cross-entropy, DLR or the margin; all defaults are the paper's.

    Attributes:
        eps: radius in pixel levels.
        steps: gradient steps; the start is evaluated as well.
        norm: `linf` or `l2`.
        objective: what is maximised: `ce`, `dlr` or `margin`.
        rho: the share of steps in a window that must raise the loss.
        eot: gradients averaged at each step, for models that draw random numbers (20 in AutoAttack `rand`).
    """

    eps: float = 8.0
    steps: int = 100
    norm: Norm = "linf"
    objective: ObjectiveName = "ce"
    rho: float = 0.75
    eot: int = 1

    def start(self, rows: Rows, run: int) -> APGDState:
        """At a random point of the ball, scaled to reach its surface, as in the authors' code."""
        return self._begin(rows, rows.y)

    def _loss(self, state: APGDState) -> Callable[[Tensor], Tensor]:
        return lambda logits: state.objective(self.objective, logits)


@dataclass(frozen=True, kw_only=True)
class APGDT(_AutoPGD):
    """Auto-PGD towards one wrong class after the other, the clean image's likeliest first; all defaults the paper's.

    Where targets are chosen, it aims at those alone.

    Attributes:
        eps: radius in pixel levels.
        steps: gradient steps for each target.
        norm: `linf` or `l2`.
        objective: `dlr`, the paper's targeted DLR, or `margin`, for models with fewer than 4 classes.
        targets: how many wrong classes; all of them if there are fewer.
        rho: the share of steps in a window that must raise the loss.
        eot: gradients averaged at each step.
    """

    eps: float = 8.0
    steps: int = 100
    norm: Norm = "linf"
    objective: Literal["dlr", "margin"] = "dlr"
    targets: int = 9
    rho: float = 0.75
    eot: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise ConfigError(f"targets must be at least 1; got {self.targets}")

    def runs(self, classes: int) -> int:
        """The targets."""
        return min(self.targets, classes - 1)

    def start(self, rows: Rows, run: int) -> APGDState:
        """At a random point of the ball, aiming at one class."""
        return self._begin(rows, class_of_run(rows, run, self.runs(rows.clean.shape[1]))[0])

    def _loss(self, state: APGDState) -> Callable[[Tensor], Tensor]:
        objective = targeted_dlr if self.objective == "dlr" else targeted_margin
        return lambda logits: objective(logits, state.y, state.run_target)


def class_of_run(rows: Rows, run: int, classes: int) -> tuple[Tensor, int]:
    """The wrong class that a run aims at, `[B]`, and how many restarts came before the run.

    Of `classes` runs the k-th takes the class with the k-th largest clean logit after the largest; where somebody
    chose the targets there is one run, which takes those.
    """
    if rows.targets is not None:
        return rows.targets, run
    return rows.clean.sort(dim=1).indices[:, -2 - run % classes], run // classes
