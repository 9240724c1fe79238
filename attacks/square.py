"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search, no gradient."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from darht.attacks import squares_l2
from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State
from darht.attacks.squares_l2 import window
from darht.attacks.threat import Norm, check_levels, row_norms
from darht.core.errors import ConfigError

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the square's area, for a budget of 10,000 queries


@dataclass(kw_only=True)
class SquareState(State):
    """Rows of the random search; `best` is the point of highest loss.

    Attributes:
        low, high: the smallest and largest pixels that the L-inf ball allows.
        plan: int16 `[S, queries, 6]`: top and left of two windows, sign bits, side; of every proposal to come.
        owner: the slot whose search an empty slot helps; -1 for none.
        ahead: how many proposals after the owner's next one the helper tries; 0 in a slot that helps nobody.
    """

    low: Tensor
    high: Tensor
    plan: Tensor
    owner: Tensor
    ahead: Tensor


@dataclass(frozen=True, kw_only=True)
class Square(SingleModel):
    """Random squares of flipped sign, kept where they raise the loss.

    Defaults are AutoAttack's: 5,000 queries with the schedule for 10,000 as it stands. The paper's own code never
    proposes the last row and column and shares one square among the batch; here every image draws its own, anywhere.

    Most proposals fail, so empty slots try those that would come next if they all did: see `lend`.

    Attributes:
        eps: radius in pixel levels.
        queries: proposals; the start is one query more.
        norm: `linf` or `l2`.
        objective: what is raised: `margin` or `ce`.
        area: the share of the image that the first squares cover (the paper's p).
        rescale: stretch the paper's schedule, which is for 10,000 queries, to `queries`.
    """

    eps: float = 8.0
    queries: int = 5000
    norm: Norm = "linf"
    objective: Literal["margin", "ce"] = "margin"
    area: float = 0.8
    rescale: bool = False

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        if self.queries < 1:
            raise ConfigError(f"queries must be at least 1; got {self.queries}")
        if not 0 < self.area <= 1:
            raise ConfigError(f"area must lie in (0, 1]; got {self.area:g}")

    def start(self, rows: Rows, run: int) -> SquareState:
        """Vertical stripes in L-inf, a grid of patterns in L2; everything random is drawn here."""
        x, radius = rows.x, self.threat.radius
        if self.norm == "linf":
            stripes = _signs(rows.generator.words((x.shape[1], 1, x.shape[3]), 1)).to(x.dtype)
            query = (x + radius * stripes).clamp(0.0, 1.0)
        else:
            tiles = squares_l2.tiles(rows).to(x.dtype)
            query = (x + radius * tiles / row_norms(tiles)).clamp(0.0, 1.0)
        low, high = (x - radius).clamp(min=0.0), (x + radius).clamp(max=1.0)
        nobody = torch.full_like(rows.y, -1)
        return SquareState.begin(
            rows, query, low=low, high=high, plan=self._plan(rows), owner=nobody, ahead=torch.zeros_like(rows.y)
        )

    def _plan(self, rows: Rows) -> Tensor:
        height, width = rows.x.shape[2:]
        words = rows.generator.words((self.queries, 5))
        sides = self.sides(height, width)
        side = torch.tensor(sides, device=words.device).expand(len(words), -1)
        tops = [(words[..., k] * (height - side + 1)) >> 32 for k in (0, 2)]
        lefts = [(words[..., k] * (width - side + 1)) >> 32 for k in (1, 3)]
        columns = [tops[0], lefts[0], tops[1], lefts[1], words[..., 4] >> 24, side]
        return torch.stack(columns, dim=-1).to(torch.int16)

    @lru_cache  # noqa: B019  the attack is a frozen value of a few numbers
    def sides(self, height: int, width: int) -> tuple[int, ...]:
        """The side of the square that each proposal flips: its area is halved at fixed queries."""
        sides = []
        for query in range(self.queries):
            position = int(query / self.queries * 10_000) if self.rescale else query
            share = self.area / 2 ** sum(position > halving for halving in _HALVINGS)
            side = max(round(math.sqrt(share * height * width)), 1 if self.norm == "linf" else 3)
            sides.append(min(side + (self.norm == "l2" and side % 2 == 0), height, width))
        return tuple(sides)

    @property
    def helped(self) -> bool:
        """Empty slots try later proposals."""
        return True

    def lend(self, state: State, living: Tensor) -> None:
        """Let the slots without a row try the proposals that follow, each from its owner's best point.

        The first in order that is accepted counts, and those after it are forgotten, since the search would have
        made them from another point: the same search, in fewer passes.
        """
        assert isinstance(state, SquareState)
        owners, empty = living.nonzero().squeeze(1), (~living).nonzero().squeeze(1)
        state.owner, state.ahead = torch.full_like(state.owner, -1), torch.zeros_like(state.ahead)
        if len(owners):
            number = torch.arange(len(empty), device=empty.device)
            owner = owners[number % len(owners)]
            state.owner[empty], state.ahead[empty] = owner, number // len(owners) + 1
            state.y[empty], state.target[empty] = state.y[owner], state.target[owner]

    def look(self, oracle: Oracle, state: State) -> None:
        """Ask for the proposal's loss; keep the proposal where it is higher, or where it fools."""
        assert isinstance(state, SquareState)
        helpers = (state.ahead > 0).nonzero().squeeze(1)
        if len(helpers):
            state.query[helpers] = self._propose(state, state.owner[helpers], state.ahead[helpers])
        state.logits = oracle.logits(state.query)
        state.hit = state.fooled()
        loss = state.objective(self.objective, state.logits)
        if len(helpers):
            loss = self._first_accepted(state, loss)
        better = ((loss > state.score) | state.hit).nonzero().squeeze(1)
        state.best[better] = state.query[better]
        state.score[better] = torch.maximum(loss[better], state.score[better])
        state.done = state.looks >= self.queries
        state.looks += 1

    def _first_accepted(self, state: SquareState, loss: Tensor) -> Tensor:
        """Give every row what its first accepted proposal saw, or, where none is, the last one; returns its loss."""
        slots = torch.arange(len(loss), device=loss.device)
        owner = torch.where(state.ahead > 0, state.owner, slots)
        asked = state.looks[owner] + state.ahead
        counts = (state.ahead == 0) | ((asked <= self.queries) & (state.looks[owner] > 0))  # the start is no proposal
        accepted = counts & ((loss > state.score[owner]) | state.hit)
        never = len(loss)
        order, late = torch.where(accepted, state.ahead, never), torch.where(counts, state.ahead, 0)
        first = torch.full_like(owner, never).scatter_reduce(0, owner, order, "amin")
        last = torch.zeros_like(owner).scatter_reduce(0, owner, late, "amax")
        used = torch.where(first < never, first, last)
        chosen = (counts & (state.ahead == used[owner])).nonzero().squeeze(1)
        seen = slots.scatter(0, owner[chosen], chosen)
        moved = ((seen != slots) & (first < never)).nonzero().squeeze(1)
        state.query[moved] = state.query[seen[moved]]
        state.logits, state.hit = state.logits[seen], state.hit[seen]
        state.looks = state.looks + torch.where(state.ahead > 0, 0, used)
        return loss[seen]

    def move(self, oracle: Oracle, state: State) -> None:
        """The next proposal."""
        assert isinstance(state, SquareState)
        slots = torch.arange(len(state.looks), device=state.looks.device)
        state.query = self._propose(state, slots, torch.zeros_like(slots))

    def _propose(self, state: SquareState, slots: Tensor, ahead: Tensor) -> Tensor:
        """The proposals that come so many after the next one of these slots."""
        at = (state.looks[slots] - 1 + ahead).clamp(0, self.queries - 1)
        plan = state.plan[slots, at].long()
        x, best, low, high = (_rows(value, slots) for value in (state.x, state.best, state.low, state.high))
        inside = window(plan[:, 0], plan[:, 1], plan[:, 5], x)
        signs = (plan[:, 4, None] >> torch.arange(x.shape[1], device=at.device)) & 1
        if self.norm == "linf":
            flipped = torch.where(signs[:, :, None, None] == 1, high, low)
            return torch.where(inside, flipped, best)
        delta = squares_l2.propose(best - x, plan, signs, inside, self.threat.radius)
        delta = self.threat.radius * delta / row_norms(delta)
        return (x + delta).clamp(0.0, 1.0)


def _rows(value: Tensor, slots: Tensor) -> Tensor:
    """The rows of these slots; all of them are not copied."""
    return value if len(slots) == len(value) else value[slots]


def _signs(words: Tensor) -> Tensor:
    return 2 * (words & 1) - 1
