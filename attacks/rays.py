"""RayS (Chen & Gu 2020, arXiv 2006.12792): an L-inf attack that sees nothing but the predicted class.

It looks for the sign direction along which the decision boundary is nearest. Blocks of the direction are flipped, the
whole image first, then halves, quarters and so on; a flip is kept when the boundary is nearer along the new direction,
which one query decides and a binary search then measures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.base import SingleModel
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State
from darht.attacks.threat import LEVELS, Norm, check_levels
from darht.core.errors import ConfigError

_FARTHEST = 1.0  # the radius in pixels at which every pixel of any image is black or white


@dataclass(kw_only=True)
class RayState(State):
    """Rows of the search.

    Attributes:
        ray: the best direction so far, -1 or 1 for every value of the image.
        radius: where the boundary lies along it, pixels.
        low, high: the bracket of the running binary search, pixels; high is 0 while none runs.
        level, block: which block is flipped: number `block` of `2**level`.
    """

    ray: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor
    level: Tensor
    block: Tensor


@dataclass(frozen=True, kw_only=True)
class RayS(SingleModel):
    """Hard-label search for the nearest boundary; a row is fooled when the boundary lies inside the ball.

    The paper stops a binary search at 1e-3 in units of the L2 norm; here the tolerance is in pixel levels, which means
    the same for every size of image.

    Attributes:
        eps: radius in pixel levels.
        queries: questions for each image; the paper's 10,000.
        tolerance: of the binary search, pixel levels.
        norm: `linf`.
    """

    eps: float = 8.0
    queries: int = 10_000
    tolerance: float = 0.05
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_levels("eps", self.eps, self.norm)
        if self.norm != "linf":
            raise ConfigError(f"rays searches sign directions, which only L-inf has; got norm {self.norm}")
        if self.queries < 1 or self.tolerance <= 0:
            raise ConfigError(
                f"queries must be at least 1 and tolerance above 0; got {self.queries} and {self.tolerance:g}"
            )

    def start(self, rows: Rows, run: int) -> RayState:
        """The direction of all ones; the first question is the white image."""
        ray = torch.ones_like(rows.x)
        radius = rows.x.new_full((len(rows.x),), _FARTHEST)
        whole = torch.zeros_like(rows.y)
        query = _along(rows.x, ray, radius)
        low, high = torch.zeros_like(radius), torch.zeros_like(radius)
        return RayState.begin(
            rows, query, ray=ray, radius=radius, low=low, high=high, level=whole - 1, block=whole.clone()
        )

    def look(self, oracle: Oracle, state: State) -> None:
        """Ask for the class at the query, and note what it says about the boundary."""
        assert isinstance(state, RayState)
        state.logits = oracle.logits(state.query)
        wrong = state.fooled()
        asked = self._asked(state)
        state.hit = wrong & (asked <= self.threat.radius)
        searching = state.high > 0
        state.low = torch.where(searching & ~wrong, asked, state.low)
        state.high = torch.where(wrong, asked, state.high)
        state.looks += 1
        self._settle(state)

    def move(self, oracle: Oracle, state: State) -> None:
        """The next point: the middle of a running bracket, else the boundary's radius along the next direction."""
        assert isinstance(state, RayState)
        state.query = _along(state.x, self._flipped(state), self._asked(state))
        state.done = state.looks >= self.queries

    def _asked(self, state: RayState) -> Tensor:
        """The radius that the query lies at, `[B]` pixels."""
        return torch.where(state.high > 0, (state.low + state.high) / 2, state.radius)

    def _settle(self, state: RayState) -> None:
        """Where a search has ended keep its direction; where nothing is searched go on to the next block."""
        ended = (state.high > 0) & (state.high - state.low <= self.tolerance / LEVELS)
        state.ray = torch.where(ended[:, None, None, None], self._flipped(state), state.ray)
        state.radius = torch.where(ended, state.high, state.radius)
        state.best = _along(state.x, state.ray, state.radius.clamp(max=self.threat.radius))
        state.score = -state.radius
        idle = ended | (state.high == 0)
        state.low, state.high = (torch.where(ended, 0.0, end) for end in (state.low, state.high))
        size = self._size(state)
        last = (state.block + 1) * size >= state.ray[0].numel()
        wrap = last & (size == 1)  # every single value was flipped: begin again with the whole image
        state.level = torch.where(idle & last, torch.where(wrap, 0, state.level + 1), state.level)
        state.block = torch.where(idle, torch.where(last, 0, state.block + 1), state.block)

    def _size(self, state: RayState) -> Tensor:
        """Values in a block, `[B]`; level -1 is the start, where nothing is flipped and the block is everything."""
        count = torch.full_like(state.level, state.ray[0].numel())
        return -(-count // (2 ** state.level.clamp(min=0)))

    def _flipped(self, state: RayState) -> Tensor:
        """The best direction with the signs of the current block turned."""
        size = self._size(state)
        position = torch.arange(state.ray[0].numel(), device=state.ray.device)
        first = (state.block * size)[:, None]
        inside = (position >= first) & (position < first + size[:, None]) & (state.level >= 0)[:, None]
        return torch.where(inside.view_as(state.ray), -state.ray, state.ray)


def _along(x: Tensor, ray: Tensor, radius: Tensor) -> Tensor:
    return (x + radius[:, None, None, None] * ray).clamp(0.0, 1.0)
