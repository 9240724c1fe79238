"""The attacks of Carlini & Wagner (2017, arXiv 1608.04644): the L2 attack, and the margin form of the L-inf one."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State, observe
from darht.attacks.pgd import Steps
from darht.attacks.threat import Norm, check_levels
from darht.core.errors import ConfigError

_INSIDE = 0.999999  # keeps atanh finite at pixels 0 and 1, as the authors' code does
_ADAM = (0.9, 0.999, 1e-8)
_MOST = 1e10  # the authors' largest c


@dataclass(kw_only=True)
class CWState(State):
    """Rows of the L2 attack; `best` is the nearest adversarial point so far, or the image.

    Attributes:
        origin: the image in atanh space.
        shift: what is optimised, in that space.
        first, second: Adam's moments.
        c, c_low, c_high: the weight of the margin and its bracket, `[S]`.
        found: this c has led to an adversarial point.
        step: steps taken with this c.
        search: values of c tried.
        previous: the objective at the last check for progress.
    """

    origin: Tensor
    shift: Tensor
    first: Tensor
    second: Tensor
    c: Tensor
    c_low: Tensor
    c_high: Tensor
    found: Tensor
    step: Tensor
    search: Tensor
    previous: Tensor


@dataclass(frozen=True, kw_only=True)
class CW(SingleModel):
    """Minimise `|delta|^2 + c * max(confidence - margin, 0)` with Adam in tanh space, searching over c by bisection.

    The paper takes 10,000 steps for each c; 1,000 with a step of 0.01 is the authors' later code. A result outside
    the ball is drawn into it, and a row is hit when the point lies in it.

    Attributes:
        eps: radius in pixel levels; 128 is the customary 0.5 on CIFAR.
        norm: `l2`; see `CWLinf` for the other.
        steps: Adam steps for each c.
        searches: values of c.
        first_c: where the search starts; c is multiplied by 10 until something is found.
        rate: Adam's step size.
        confidence: by how much the wrong logit must exceed the right one (the paper's kappa).
        abort_early: a row leaves a c whose objective has not fallen by 0.01 % over a tenth of the steps.
    """

    eps: float = 128.0
    norm: Literal["l2"] = "l2"
    steps: int = 1000
    searches: int = 9
    first_c: float = 1e-3
    rate: float = 1e-2
    confidence: float = 0.0
    abort_early: bool = True

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        for name in ("steps", "searches", "first_c", "rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.confidence < 0:
            raise ConfigError(f"confidence must be at least 0; got {self.confidence:g}")

    def start(self, rows: Rows, run: int) -> CWState:
        """At the image."""
        x = rows.x
        per_row = x.new_zeros(len(x))
        zero = torch.zeros_like(x)
        return CWState.begin(
            rows,
            x.clone(),
            origin=torch.atanh((2 * x - 1) * _INSIDE),
            shift=zero,
            first=zero.clone(),
            second=zero.clone(),
            c=per_row + self.first_c,
            c_low=per_row,
            c_high=per_row + _MOST,
            found=torch.zeros_like(rows.y, dtype=torch.bool),
            step=torch.zeros_like(rows.y),
            search=torch.zeros_like(rows.y),
            previous=per_row + torch.inf,
        )

    def look(self, oracle: Oracle, state: State) -> None:
        """The objective's gradient with respect to the pixels; the point is kept where it is the nearest so far."""
        assert isinstance(state, CWState)
        square = (state.query - state.x).square().sum((1, 2, 3))
        penalty = observe(oracle, state, lambda logits: (self.confidence - state.margin(logits)).clamp(min=0.0))
        wrong = state.margin(state.logits) > self.confidence
        state.found |= wrong
        nearer = (wrong & (-square > state.score)).nonzero().squeeze(1)
        state.best[nearer], state.score[nearer] = state.query[nearer], -square[nearer]
        state.hit = wrong & (square <= self.threat.radius**2)
        self._next_c(state, square + state.c * penalty)
        state.done = state.search >= self.searches
        state.best[state.done] = self.threat.clip(state.best, state.x)[state.done]

    def _next_c(self, state: CWState, objective: Tensor) -> None:
        check = (state.step % -(-self.steps // 10) == 0) & self.abort_early
        stuck = check & (objective > 0.9999 * state.previous)
        state.previous = torch.where(check, objective, state.previous)
        over = stuck | (state.step >= self.steps)
        if not bool(over.any()):
            return
        state.c_high = torch.where(over & state.found, state.c, state.c_high)
        state.c_low = torch.where(over & ~state.found, state.c, state.c_low)
        middle = torch.where(state.c_high < _MOST, (state.c_low + state.c_high) / 2, state.c * 10)
        state.c = torch.where(over, middle, state.c)
        state.search += over
        state.step[over], state.found[over], state.previous[over] = -1, False, torch.inf
        for value in (state.shift, state.first, state.second):
            value[over] = 0.0

    def move(self, oracle: Oracle, state: State) -> None:
        """One Adam step of the shift; rows that begin a new c look at the image again."""
        assert isinstance(state, CWState)
        fresh = state.step < 0
        state.step += 1
        pull = 2 * (state.query - state.x) + state.c[:, None, None, None] * state.gradient
        slope = pull * 2 * state.query * (1 - state.query)  # d pixel / d shift = (1 - tanh^2) / 2 = 2 p (1 - p)
        beta1, beta2, tiny = _ADAM
        count = state.step.clamp(min=1).to(slope.dtype)[:, None, None, None]
        first = beta1 * state.first + (1 - beta1) * slope
        second = beta2 * state.second + (1 - beta2) * slope.square()
        moved = self.rate * (first / (1 - beta1**count)) / ((second / (1 - beta2**count)).sqrt() + tiny)
        keep = fresh[:, None, None, None]
        state.first, state.second = torch.where(keep, 0.0, first), torch.where(keep, 0.0, second)
        state.shift = torch.where(keep, 0.0, state.shift - moved)
        state.query = torch.where(keep, state.x, (torch.tanh(state.origin + state.shift) + 1) / 2)


@dataclass(frozen=True, kw_only=True)
class CWLinf(Steps):
    """Sign steps on the margin, no further than `confidence`: the form in which later work runs it (Madry et al. 2018).

    The paper's own L-inf attack shrinks a threshold by 0.9 until it fails; at a fixed eps it reduces to this.

    Attributes:
        eps: radius in pixel levels.
        step: step size in pixel levels.
        steps: gradient steps.
        confidence: the margin beyond which a row is left alone (kappa; Madry et al. take 50).
        random_start: start at a random point of the ball, otherwise at the image.
        norm: `linf`.
    """

    eps: float = 8.0
    step: float = 2.0
    steps: int = 30
    confidence: float = 50.0
    random_start: bool = True
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "linf":
            raise ConfigError(f"cw-linf is the L-inf form; got norm {self.norm}: use cw")
        if self.confidence < 0:
            raise ConfigError(f"confidence must be at least 0; got {self.confidence:g}")

    def look(self, oracle: Oracle, state: State) -> None:
        """The capped margin's gradient at the iterate; zero where the cap is reached, so that the row stays."""
        state.score = observe(oracle, state, lambda logits: state.margin(logits).clamp(max=self.confidence))
