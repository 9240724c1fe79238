"""What every attack against one model answers in the same way."""

from torch import Tensor

from darht.attacks.engine.engine import FULL
from darht.attacks.engine.state import Attack, State
from darht.attacks.objectives import Model
from darht.attacks.threat import Norm, Threat
from darht.core.rng import RowRng


class SingleModel:
    """A base for the frozen dataclasses that are attacks; they add their fields, `start`, `look` and `move`.

    It is not a dataclass itself, so that the fields of an attack, which are its record, stand in its own file alone.
    """

    eps: float
    norm: Norm

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in, or, where it minimises the distance, in which a hit must lie."""
        return Threat(eps=self.eps, norm=self.norm)

    @property
    def whole_levels(self) -> bool:
        """Whether the perturbations are whole pixel levels without rounding."""
        return False

    def __call__(
        self: Attack,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: RowRng | None = None,
        targets: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Craft adversarial examples; every row gets its whole budget.

        Args:
            model: logits `[B, C]` of pixels, in eval mode.
            x: clean pixels `[B, 3, H, W]` in [0, 1].
            y: labels `[B]`, of any integer type.
            generator: random numbers keyed by row; attacks without any do not draw from it.
            targets: a class for each row that the model shall answer, `[B]`; by default any but the label.
            seed: of the random numbers where there is no `generator`; they are then keyed by the row's place in `x`.

        Returns:
            Adversarial pixels `[B, 3, H, W]` in [0, 1].

        Raises:
            ConfigError, ModelError: see `Engine.run`.
        """
        return FULL.craft(self, model, x, y, generator=generator, targets=targets, seed=seed)

    @property
    def looks(self) -> int | None:
        """Depends on the row."""
        return None

    def runs(self, classes: int) -> int:
        """One."""
        return 1

    @property
    def helped(self) -> bool:
        """No: each look needs the one before it."""
        return False

    def lend(self, state: State, living: Tensor) -> None:
        """Empty slots are of no use."""
