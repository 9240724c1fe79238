"""What one training step works on, and what a recipe is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from darht.core.device import constant
from darht.core.errors import ConfigError
from darht.trainer.student.distances import check_number, kl_rows, label_rows, smoothed_label_loss
from darht.trainer.student.model import StudentOutput

Objective = Callable[[Tensor, Tensor], Tensor]  # (student's logits [B, C], pixels [B, 3, H, W]) -> [B], maximised
When = Literal["always", "never", "some"]
TeachersNeeded = Literal["none", "any", "robust", "both"]
Per = Literal["batch", "row"]
Learned = dict[str, Tensor]  # what a recipe carries from step to step; part of the checkpoint


class Step(NamedTuple):
    """One step's images and targets.

    Attributes:
        x: what the student trains on, pixels `[B, 3, H, W]` in [0, 1]; clean or adversarial.
        clean: the views that `x` was made from.
        y: labels `[B]`; of a row that has none, what the robust teachers say together about `clean`.
        answer: the teachers' logits `[B, T, C]` on any pixels near `clean`, as well as they are known.
        targets: teachers' logits for `x`, `[B, T, C]`.
        clean_targets: teachers' logits for `clean`, `[B, T, C]`.
        supervises: bool `[B, T]`: which teachers may be listened to on a row of `x`; vanilla ones only on clean rows.
        robust: bool `[T]` on the CPU: false for vanilla teachers.
        done: share of the run that is done, in [0, 1).
        start: the student's logits where `x` was started from, for its last rows; None unless `inner: warm`.
        average: the averaged student's logits for `clean`, `[B, C]`; None for recipes that do not use them.
        known: bool `[B]`, which rows have a label of their own; None where all do.
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
    average: Tensor | None = None
    known: Tensor | None = None

    def only(self, logits: Tensor, *, robust: bool) -> Tensor:
        """Of teachers' logits `[B, T, C]` those of robust teachers, or of vanilla ones; a GPU is not waited for."""
        places = tuple(t for t, role in enumerate(self.robust.tolist()) if role is robust)
        return logits[:, constant(places, logits.device)]


class Loss(NamedTuple):
    """What a step costs.

    Attributes:
        value: a scalar.
        clean: `student(step.clean)`, where the loss asked for it; training accuracy is counted on it too.
    """

    value: Tensor
    clean: StudentOutput | None = None


def indirect_gradient_rows(student: nn.Module, step: Step, out: StudentOutput) -> Tensor:
    """IGDM's distance of each row (Lee et al. 2025, arXiv 2312.03286), `[B]`: between what teachers and student change.

    `KL(softmax(T(x+d) - T(x-d)) || softmax(S(x+d) - S(x-d)))`, T the mean of the robust teachers' logits.
    """
    mirrored = 2 * step.clean - step.x
    theirs = step.only(step.targets - step.answer(mirrored), robust=True).mean(1)
    return kl_rows(theirs, out.logits - student(mirrored).logits)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """An outer loss with the inner objective that goes with it, and what the rest of a run must know of it.

    Attributes:
        awp: size of the adversarial weight perturbation (Wu et al. 2020) relative to each layer's weights: a step has
            the gradient at the nearby weights that cost most, at twice the passes; 0.005 in the paper, 0 for none.
        adversarial_when: which steps are adversarial: `always`, `never`, or `some`, where `clean_share` and `clean_by`
            decide.
        teachers_needed: which: `none`, `any`, `robust`, or `both` robust and vanilla ones.
        uses_adversarial_logits: whether it looks at what they say about adversarial images; others quote them on
            clean ones.
        needs_feature_map: whether it trains the student's map, a row of logits for each teacher.
        uses_average: whether it asks the averaged student about clean images.
        needs_whole_batches: whether it learns from a batch's mean, which parts of a batch would change.
    """

    awp: float = 0.0
    adversarial_when: ClassVar[When]
    teachers_needed: ClassVar[TeachersNeeded]
    uses_adversarial_logits: ClassVar[bool] = False
    needs_feature_map: ClassVar[bool] = False
    needs_whole_batches: ClassVar[bool] = False
    uses_average: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("awp", self.awp)

    @abstractmethod
    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """What `step` costs; `out` is `student(step.x)`."""

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """What the student's adversarial examples maximise: cross-entropy, unless the recipe has its own."""
        return lambda logits, x: label_rows(logits, step.y)

    def clean_mix(self) -> tuple[float, Per]:
        """The share that stays clean, and of what: of the batches, or of the rows of each."""
        return float(self.adversarial_when == "never"), "batch"

    def phases_by_name(self) -> tuple[tuple[float, str], ...]:
        """Where its phases begin, in shares of the run, and what is trained in them; empty for a single one."""
        return ()

    def head_trained_until(self) -> float:
        """The share of the run after which nothing reaches the head."""
        return 1.0

    def second_order(self) -> str:
        """The setting that takes the gradient of a gradient, which a compiled network does not have; or ''."""
        return ""

    def needs_all_logits(self) -> str:
        """The setting that compares raw logits of all classes, as its line in the recipe; or ''."""
        return ""

    def compares_points(self) -> str:
        """The setting that compares teachers at two points of one image, for which quoted logits are no use; or ''."""
        return ""


@dataclass(frozen=True, kw_only=True)
class LabelRecipe(Recipe):
    """A recipe with a term that has labels.

    Attributes:
        smoothing: share of the label's probability that goes to all classes alike (Szegedy et al. 2016), in the outer
            loss; examples still ascend the cross-entropy of the label itself. 0 for none.
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("smoothing", self.smoothing)
        if self.smoothing and not self.has_label_term():
            raise ConfigError(f"smoothing is of a term with labels, which this loss lacks; got {self.smoothing:g}")

    def has_label_term(self) -> bool:
        """Whether the settings leave the labels a share in the loss."""
        return True

    def label_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of logits `[B, C]` against `(1 - smoothing) onehot(y) + smoothing / C`."""
        return smoothed_label_loss(logits, y, self.smoothing)
