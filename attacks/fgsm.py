"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572)."""

from dataclasses import dataclass

from torch import Tensor

from darht.attacks.objectives import Model, ObjectiveName
from darht.attacks.pgd import PGD
from darht.attacks.threat import Norm, Threat
from darht.core.rng import RowRng


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """One step of size eps from the image itself.

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
    def threat(self) -> Threat:
        """The ball that the attack stays in."""
        return Threat(eps=self.eps, norm=self.norm)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, generator: RowRng) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]` in [0, 1]; `generator` is not drawn from."""
        return self._as_pgd()(model, x, y, generator=generator)

    def _as_pgd(self) -> PGD:
        return PGD(eps=self.eps, step=self.eps, steps=1, norm=self.norm, objective=self.objective, random_start=False)
