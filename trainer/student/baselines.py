"""The recipes to compare with: distillation on clean images, and adversarial training without teachers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from darht.trainer.student.distances import check_number, kl_rows, mean_log_probabilities
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import LabelRecipe, Learned, Loss, Objective, Per, Step, TeachersNeeded, When


@dataclass(frozen=True, kw_only=True)
class Kd(LabelRecipe):
    """Knowledge distillation on clean images (Hinton et al. 2015), from all teachers.

    Attributes:
        tau: temperature; 4 is customary on CIFAR.
        alpha: share of distillation, the rest is CE; 0.9 is customary.
    """

    tau: float = 4.0
    alpha: float = 0.9
    adversarial_when: ClassVar[When] = "never"
    teachers_needed: ClassVar[TeachersNeeded] = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_number("tau", self.tau, 1e-3, float("inf"))

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """`alpha * tau^2 * KL(T^tau || S^tau) + (1 - alpha) * CE`."""
        target = mean_log_probabilities(step.clean_targets, self.tau)
        distillation = self.tau**2 * kl_rows(target, out.logits / self.tau).mean()
        return Loss(self.alpha * distillation + (1 - self.alpha) * self.label_loss(out.logits, step.y))

    def has_label_term(self) -> bool:
        """Unless distillation has it all."""
        return self.alpha < 1


@dataclass(frozen=True, kw_only=True)
class At(LabelRecipe):
    """Adversarial training without teachers (Madry et al. 2018).

    Attributes:
        clean_share: of the batches or rows; 0 in the paper.
        clean_by: whether the coin is tossed for each batch or for each row.
    """

    clean_share: float = 0.0
    clean_by: Per = "batch"
    adversarial_when: ClassVar[When] = "some"
    teachers_needed: ClassVar[TeachersNeeded] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clean_share", self.clean_share)

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """Cross-entropy on `x`."""
        return Loss(self.label_loss(out.logits, step.y))

    def clean_mix(self) -> tuple[float, Per]:
        """As the settings say."""
        return self.clean_share, self.clean_by


@dataclass(frozen=True, kw_only=True)
class Trades(LabelRecipe):
    """TRADES without teachers (Zhang et al. 2019): CE on clean images, and the student's own distance from them.

    The inner loop starts as `inner` says, not at the paper's small Gaussian step.

    Attributes:
        beta: weight of the distance; 6 in the paper.
    """

    beta: float = 6.0
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 0.0, float("inf"))

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """`CE(S(x), y) + beta KL(S(x) || S(x'))`."""
        clean = student(step.clean)
        value = self.label_loss(clean.logits, step.y) + self.beta * kl_rows(clean.logits, out.logits).mean()
        return Loss(value, clean)

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """The distance from what the student says about the clean images now."""
        with torch.no_grad():
            clean = student(step.clean).logits
        return lambda logits, x: kl_rows(clean, logits)
