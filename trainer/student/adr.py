"""ADR: adversarial training whose soft labels come from the student's own average."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.core.errors import ConfigError
from darht.trainer.student.distances import check_number
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.step import Learned, Loss, Objective, Recipe, Step, TeachersNeeded, When


def annealed(ends: tuple[float, ...], done: float) -> float:
    """From the first value to the second along a half cosine, for a share `done` of the run."""
    first, last = ends
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Adr(Recipe):
    """ADR (Wu et al. 2024, arXiv 2305.12118) on PGD training: no teacher but the averaged student, and soft labels.

    With P the softmax of the averaged student's logits on the clean view at a temperature, and y the one-hot label::

        share = clip(trust - (max P - P_y), 0, 1)         target = share P + (1 - share) y
        loss = mean CE(target, S(x'))

    so that the label is never less probable than another class by more than what trust leaves. Temperature and trust
    change along half cosines. The inner loop ascends the same loss.

    Attributes:
        temperature: of P at the run's beginning and end; 2 and 1 on CIFAR-10.
        trust: the same for the largest share of P; 0.7 and 0.95 on CIFAR-10.
    """

    temperature: tuple[float, ...] = (2.0, 1.0)
    trust: tuple[float, ...] = (0.7, 0.95)
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "none"
    uses_average: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "trust"):
            if len(getattr(self, name)) != 2:
                raise ConfigError(f"{name} is a value for each end of the run; got {list(getattr(self, name))}")
        for value in self.temperature:
            check_number("temperature", value, 1e-3, float("inf"))
        for value in self.trust:
            check_number("trust", value)

    def target(self, step: Step) -> Tensor:
        """The soft labels `[B, C]`."""
        assert step.average is not None
        said = F.softmax(step.average / annealed(self.temperature, step.done), dim=-1)
        label = torch.zeros_like(said).scatter(-1, step.y[:, None], 1.0)
        gap = said.amax(-1) - (said * label).sum(-1)
        share = (annealed(self.trust, step.done) - gap).clamp(0, 1)[:, None]
        return share * said + (1 - share) * label

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """Cross-entropy with the soft labels."""
        return Loss(F.cross_entropy(out.logits, self.target(step)))

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """The same of each row."""
        target = self.target(step)
        return lambda logits, x: F.cross_entropy(logits, target, reduction="none")
