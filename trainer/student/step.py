"""What one training step works on, and what a recipe is."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from darht.trainer.student.model import StudentOutput

Objective = Callable[[Tensor, Tensor], Tensor]  # (student's logits [B, C], pixels [B, 3, H, W]) -> [B], maximised
When = Literal["always", "never", "some"]
TeachersNeeded = Literal["none", "any", "robust", "both"]
Learned = dict[str, Tensor]  # what a recipe carries from step to step; part of the checkpoint


class Step(NamedTuple):
    """One step's images and targets.

    Attributes:
        x: what the student trains on, pixels `[B, 3, H, W]` in [0, 1]; clean or adversarial.
        clean: the views that `x` was made from.
        y: labels `[B]`.
        answer: the teachers' logits `[B, T, C]` on any pixels near `clean`, as well as they are known.
        targets: teachers' logits for `x`, `[B, T, C]`.
        clean_targets: teachers' logits for `clean`, `[B, T, C]`.
        supervises: bool `[B, T]`: which teachers may be listened to on a row of `x`; vanilla ones only on clean rows.
        robust: bool `[T]`: false for vanilla teachers.
        done: share of the run that is done, in [0, 1).
        start: the student's logits where `x` was started from, for its last rows; None unless `inner: warm`.
    """

    x: Tensor
    clean: Tensor
    y: Tensor
    answer: Callable[[Tensor], Tensor]
    targets: Tensor
    clean_targets: Tensor
    supervises: Tensor
    robust: Tensor
    done: float
    start: Tensor | None = None


class Recipe(Protocol):
    """An outer loss with the inner objective that goes with it.

    Attributes:
        adversarial_when: which steps are adversarial: `always`, `never`, or `some`, where `clean_share` and `clean_by`
            decide.
        teachers_needed: which: `none`, `any`, `robust`, or `both` robust and vanilla ones.
        uses_adversarial_logits: whether it looks at what they say about adversarial images; others quote them on
            clean ones.
    """

    adversarial_when: ClassVar[When]
    teachers_needed: ClassVar[TeachersNeeded]
    uses_adversarial_logits: ClassVar[bool]

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Tensor:
        """A scalar; `out` is `student(step.x)`."""

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """What the student's adversarial examples maximise."""
