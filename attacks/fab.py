"""The fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044), in its targeted form FAB-T."""

from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.apgd import class_of_run
from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State
from darht.attacks.hyperplane import to_hyperplane
from darht.attacks.objectives import targeted_margin
from darht.attacks.threat import Norm, check_levels, row_norms
from darht.core.errors import ConfigError


@dataclass(kw_only=True)
class FABState(State):
    """Rows of FAB; `best` is the nearest adversarial point so far, or the image.

    Attributes:
        run_target: the class of this run.
        beaten: `query` is adversarial and must be drawn back.
    """

    run_target: Tensor
    beaten: Tensor


@dataclass(frozen=True, kw_only=True)
class FABT(SingleModel):
    """Find the nearest point of each of several decision boundaries; defaults are the paper's and AutoAttack's.

    Where targets are chosen, it looks for the boundary of that class alone.

    It minimises the distance and knows eps only where the search is judged: a row is hit when the point lies in
    the ball. A result outside the ball is drawn into it. AutoAttack runs it with 9 targets from one start, the image.

    Attributes:
        eps: radius in pixel levels.
        steps: iterations for each target.
        norm: `linf` or `l2`.
        targets: how many wrong classes, the likeliest first; all of them if there are fewer.
        alpha_max: the largest pull towards the image (the paper's alpha).
        eta: extrapolation beyond the hyperplane.
        beta: how far an adversarial point is drawn back to the image before the next iteration.
    """

    eps: float = 8.0
    steps: int = 100
    norm: Norm = "linf"
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        for name in ("steps", "targets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta < 1):
            raise ConfigError(
                "alpha_max must lie in [0, 1], eta be at least 1 and beta between 0 and 1; got "
                f"{self.alpha_max:g}, {self.eta:g}, {self.beta:g}"
            )

    def runs(self, classes: int) -> int:
        """The targets."""
        return min(self.targets, classes - 1)

    def start(self, rows: Rows, run: int) -> FABState:
        """At the image, aiming at one class; later restarts at half the radius in a random direction."""
        x = rows.x
        run_target, restart = class_of_run(rows, run, self.runs(rows.clean.shape[1]))
        query = x if restart == 0 else (x + 0.5 * self.threat.radius * self._noise(rows)).clamp(0.0, 1.0)
        return FABState.begin(
            rows, query.clone(), run_target=run_target, beaten=torch.zeros_like(rows.y, dtype=torch.bool)
        )

    def _noise(self, rows: Rows) -> Tensor:
        shape = tuple(rows.x.shape[1:])
        if self.norm == "linf":
            cube = 2 * rows.generator.uniform(shape).to(rows.x.dtype) - 1
            return cube / cube.abs().amax((1, 2, 3), keepdim=True)
        ball = rows.generator.normal(shape).to(rows.x.dtype)
        return ball / row_norms(ball)

    def look(self, oracle: Oracle, state: State) -> None:
        """Ask whether the point is adversarial; keep it where it is the nearest so far."""
        assert isinstance(state, FABState)
        state.logits = oracle.logits(state.query)
        state.beaten = state.fooled()
        distance = self.threat.distance(state.query, state.x)
        nearer = (state.beaten & (-distance > state.score)).nonzero().squeeze(1)
        state.best[nearer], state.score[nearer] = state.query[nearer], -distance[nearer]
        state.hit = state.beaten & (distance <= self.threat.radius)
        state.done = state.looks >= self.steps
        state.best[state.done] = self.threat.clip(state.best, state.x)[state.done]
        state.looks += 1

    def move(self, oracle: Oracle, state: State) -> None:
        """Linearise the boundary and step onto it, from the point and from the image, and blend the two."""
        assert isinstance(state, FABState)
        x, here = state.x, state.query
        back = state.beaten[:, None, None, None]
        here = torch.where(back, x + (here - x) * self.beta, here)
        _, gap, normal = oracle.gradient(here, lambda logits: self._boundary(state, logits))
        state.gradient = normal
        both = torch.cat([here, x])
        far = gap + (normal * (x - here)).sum((1, 2, 3))
        steps = to_hyperplane(both, torch.cat([normal, normal]), torch.cat([gap, far]), self.norm)
        step, clean_step = steps[: len(x)], steps[len(x) :]
        reach = self._size(step).clamp(min=1e-8)
        alpha = (reach / (reach + self._size(clean_step).clamp(min=1e-8))).clamp(max=self.alpha_max)
        blend = (here + self.eta * step) * (1 - alpha) + (x + self.eta * clean_step) * alpha
        state.query = blend.clamp_(0.0, 1.0)

    def _boundary(self, state: FABState, logits: Tensor) -> Tensor:
        """0 where the label and this run's class are equal, or, with chosen targets, the target and its best rival."""
        return state.margin(logits) if state.targeted else targeted_margin(logits, state.y, state.run_target)

    def _size(self, step: Tensor) -> Tensor:
        return step.abs().amax((1, 2, 3), keepdim=True) if self.norm == "linf" else row_norms(step)
