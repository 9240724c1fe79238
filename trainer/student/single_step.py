"""One step on the student without a memory of rows: from the label's pattern (LIET), or from wide noise (N-FGSM)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks.threat import LEVELS
from darht.core.fused import fused
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig
from darht.trainer.student.step import Recipe, Step

EVERY = 20  # steps of training for which the labels' patterns serve, as in LIET
NOISY = (0.1, 0.5)  # the least and the largest share of a row's pixels that noise replaces in its label's pattern
WIDTH = 2  # of N-FGSM's noise, in eps; the paper's k


@dataclass(eq=False)
class LabelPatterns:
    """What the student holds to be the sign of each label, where a row's step starts (LIET, Pan et al. 2025, ICCV).

    Attributes:
        signs: int8 `[C, 3, H, W]`, the signs of the gradient of the label's cross-entropy on a constant grey image.
        step: of the run, at which they were taken; negative while they are not.
    """

    signs: Tensor
    step: int = -EVERY

    @classmethod
    def create(cls, classes: int, image_shape: tuple[int, ...], device: torch.device) -> "LabelPatterns":
        """None yet, for `classes` labels and images of `image_shape`."""
        return cls(torch.zeros(classes, *image_shape, dtype=torch.int8, device=device))

    def is_due(self, number: int) -> bool:
        """Whether they are not there yet, or `EVERY` steps old."""
        return self.step < 0 or number - self.step >= EVERY

    def refresh(self, student: nn.Module, number: int) -> None:
        """Take them anew: one pass over C grey images, in eval mode."""
        was_training = student.training
        student.eval()
        try:
            grey = torch.full(self.signs.shape, 0.5, device=self.signs.device, requires_grad=True)
            labels = torch.arange(len(grey), device=grey.device)
            loss = F.cross_entropy(student(grey).logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, grey)
        finally:
            student.train(was_training)
        self.signs, self.step = gradient.sign().to(torch.int8), number

    def starts(self, y: Tensor, eps: float, generator: RowRng) -> Tensor:
        """Where rows with the labels `y` start, whole levels `[B, 3, H, W]`: plus or minus the pattern, part noise."""
        shape, eps = self.signs.shape[1:], int(eps)
        side = 2 * generator.integers(0, 1, (1, 1, 1)) - 1
        low, high = NOISY
        share = low + (high - low) * generator.uniform((1, 1, 1), draw=1)
        noisy = generator.uniform((1, *shape[1:]), draw=2) < share
        noise = generator.integers(-eps, eps, tuple(shape), draw=3)
        return torch.where(noisy, noise, side * eps * self.signs[y]).float()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"signs": self.signs, "step": torch.tensor(self.step)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint kept."""
        self.signs.copy_(state["signs"])
        self.step = int(state["step"])

    def look(self, rows: Tensor) -> None:
        """Nothing: rows leave nothing behind."""

    def alone(self) -> None:
        """Nothing: no process waits for another's rows."""

    def join(self, total: Callable[[Tensor], object], claim: object) -> None:
        """Agree with other processes, whose batch norm may differ within an epoch: the sign of the sum."""
        votes = self.signs.float()
        total(votes)
        self.signs.copy_(votes.sign())


def label_step(
    student: nn.Module, step: Step, patterns: LabelPatterns, *, recipe: Recipe, inner: InnerConfig, generator: RowRng
) -> Step:
    """One signed step from the labels' patterns, and the student's logits at the start of it, in the mode it is in."""
    levels = (step.clean * LEVELS).round()
    start = (levels + patterns.starts(step.y, inner.eps, generator)).clamp(0, LEVELS) - levels
    logits, sign = _ascent(student, step, levels + start, recipe)
    delta = inner.pgd().threat.project(start + inner.length * sign)
    return step._replace(x=(levels + delta).clamp(0, LEVELS) / LEVELS, start=logits)


def noise_step(student: nn.Module, step: Step, *, recipe: Recipe, inner: InnerConfig, generator: RowRng) -> Step:
    """N-FGSM (de Jorge et al. 2022): noise of twice the radius, one signed step, and no projection onto the ball."""
    levels, width = (step.clean * LEVELS).round(), int(WIDTH * inner.eps)
    noise = generator.integers(-width, width, tuple(levels.shape[1:])).float()
    start = (levels + noise).clamp(0, LEVELS)
    _, sign = _ascent(student, step, start, recipe)
    return step._replace(x=(start + inner.length * sign).clamp(0, LEVELS) / LEVELS)


def _ascent(student: nn.Module, step: Step, at: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Logits with their graph and the sign of the recipe's inner gradient, at pixels in levels."""
    x = (at / LEVELS).requires_grad_()
    logits = student(x).logits
    objective = recipe.inner(student, step)(logits, x).sum()
    (gradient,) = torch.autograd.grad(objective, x, retain_graph=True)
    return logits, gradient.sign()


@fused
def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of the softmax of logits `[B, C]`, in nats, as `[B]`."""
    p, q = F.log_softmax(one, dim=-1), F.log_softmax(other, dim=-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.full_like(p, 2.0))
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)
