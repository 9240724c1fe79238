"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572)."""

from dataclasses import dataclass

from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State
from darht.attacks.objectives import ObjectiveName
from darht.attacks.pgd import PGD, LevelState, OnLevels
from darht.attacks.threat import Norm


@dataclass(frozen=True, kw_only=True)
class FGSM(OnLevels):
    """One step of size eps from the image itself, as in the paper.

    Attributes:
        eps: radius in pixel levels.
        norm: `linf` or `l2` (then one step along the normalised gradient).
        objective: what is maximised: `ce`, `dlr` or `margin`.
    """

    eps: float = 8.0
    norm: Norm = "linf"
    objective: ObjectiveName = "ce"

    def __post_init__(self) -> None:
        self._as_pgd()

    @property
    def looks(self) -> int:
        """One."""
        return 1

    def start(self, rows: Rows, run: int) -> LevelState:
        """At the image."""
        return self._as_pgd().start(rows, run)

    def look(self, oracle: Oracle, state: State) -> None:
        """The objective's gradient at the image."""
        self._as_pgd().look(oracle, state)

    def move(self, oracle: Oracle, state: State) -> None:
        """The one step."""
        self._as_pgd().move(oracle, state)

    def _as_pgd(self) -> PGD:
        return PGD(eps=self.eps, step=self.eps, steps=1, norm=self.norm, objective=self.objective, random_start=False)
