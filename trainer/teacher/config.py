"""What `darht-teacher train` does, as a frozen dataclass."""

from dataclasses import dataclass, field
from typing import Literal

from darht.attacks import PGD
from darht.core.errors import ConfigError
from darht.core.keys import check_seed
from darht.trainer.config import OptimConfig


@dataclass(frozen=True)
class TeachConfig:
    """How a teacher is trained.

    Attributes:
        algorithm: `standard`, `pgd-at` (Madry et al. 2018), `trades` (Zhang et al. 2019), `fat` (Zhang et al. 2020).
        optim: the optimizer and its schedule.
        eps, step, steps: of the PGD inside, in pixel levels.
        beta: `trades`: weight of the robust term; 6 in the paper.
        tau: `fat`: steps that an example may go on after it is misclassified first.
        padding: of the random crop; 0 for none.
        flip: whether images are mirrored at random; digits and text must not be.
        precision: `bf16` for autocast; weights stay float32.
        compile: through `torch.compile`.
        seed: of everything random.
    """

    algorithm: Literal["standard", "pgd-at", "trades", "fat"] = "pgd-at"
    optim: OptimConfig = field(default_factory=OptimConfig)
    eps: float = 8.0
    step: float = 2.0
    steps: int = 10
    beta: float = 6.0
    tau: int = 1
    padding: int = 4
    flip: bool = True
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.pgd()
        check_seed(self.seed)
        if self.tau < 0:
            raise ConfigError(f"tau counts steps and is at least 0; got {self.tau}")
        if self.beta < 0:
            raise ConfigError(f"beta must be at least 0; got {self.beta:g}")
        if not 0 <= self.padding <= 127:
            raise ConfigError(f"padding must lie in 0..127 pixels; got {self.padding}")

    def pgd(self) -> PGD:
        """The attack's settings, checked."""
        return PGD(eps=self.eps, step=self.step, steps=self.steps)
