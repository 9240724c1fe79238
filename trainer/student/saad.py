"""SAAD: rows of a batch weighted by how unsure the teacher is about their adversarial examples."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from darht.trainer.student.distances import check_number, kl_rows, mean_log_probabilities
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import (
    Learned,
    Loss,
    Objective,
    Recipe,
    Step,
    TeachersNeeded,
    When,
    indirect_gradient_rows,
)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of the softmax of logits `[B, C]`, in nats, as `[B]`."""
    logs = F.log_softmax(logits, dim=-1)
    return -(logs.exp() * logs).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Saad(Recipe):
    """SAAD (Lee and Chung 2025, arXiv 2512.10275): what does not transfer to the teacher teaches nothing.

    With H the entropy of the teacher at the student's example x' of a row, over the rows of a batch::

        w = scale (H - min H)                 v = (w - min w) / (max w - min w)
        loss = mean of  w (KL(T(x') || S(x')) + done igdm KL(T(x') - T(m) || S(x') - S(m)))
                        + beta (1 - v) KL(T(x) || S(x)),        m = 2x - x'

    The teacher at x', x and m costs nothing with `targets: first-order`. Its released inner loop moves only the label's
    logit of the teacher along with x'; here all logits that the cache has Jacobians of move.

    Attributes:
        scale: of the weights; 5 in its released code.
        igdm: weight of the gradients' match at the end of the run, growing from 0; 1 there for CIFAR-10, 10 for more
            classes.
        beta: weight of the clean term, on rows that weigh little; 0 there for CIFAR-10.
    """

    scale: float = 5.0
    igdm: float = 1.0
    beta: float = 0.0
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "robust"
    uses_adversarial_logits: ClassVar[bool] = True
    needs_whole_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "igdm", "beta"):
            check_number(name, getattr(self, name), 0.0, float("inf"))

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """As above; the weights have no gradient."""
        target = mean_log_probabilities(step.only(step.targets, robust=True))
        unsure = entropy(target).detach()
        weights = self.scale * (unsure - unsure.min())
        rows = kl_rows(target, out.logits)
        if self.igdm:
            rows = rows + self.igdm * step.done * indirect_gradient_rows(student, step, out)
        loss = (weights * rows).mean()
        if not self.beta:
            return Loss(loss)
        clean = student(step.clean)
        quiet = 1 - (weights - weights.min()) / (weights.max() - weights.min()).clamp(min=1e-8)
        distance = kl_rows(mean_log_probabilities(step.only(step.clean_targets, robust=True)), clean.logits)
        return Loss(loss + self.beta * (quiet * distance).mean(), clean)

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """The distance between teacher and student at the very point, with the gradient of both."""
        return lambda logits, x: kl_rows(mean_log_probabilities(step.only(step.answer(x), robust=True)), logits)

    def compares_points(self) -> str:
        """The gradients' match, where there is one."""
        return "igdm" if self.igdm else ""
