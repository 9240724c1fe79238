"""`inner: fat`: PGD that stops a row soon after it is misclassified (FAT, Zhang et al. 2020, algorithm 1)."""

import torch
from torch import Tensor, nn

from darht.attacks.pgd import PGD, climb
from darht.attacks.threat import LEVELS, to_levels
from darht.trainer.student.step import Objective, Step


def friendly_ascent(
    student: nn.Module, step: Step, objective: Objective, start: Tensor, *, attack: PGD, tau: int
) -> Tensor:
    """The perturbation of each row in levels, `tau` steps after the row is misclassified first.

    Rows that have stopped are computed and do not move, so that shapes are constant and no device is asked how many are
    left.

    Args:
        student: in eval mode.
        step: clean views and labels.
        objective: is climbed.
        start: in levels, inside the ball.
        attack: radius, step size, and the most steps.
        tau: steps that a row may go on.
    """
    clean, threat = to_levels(step.clean), attack.threat
    delta = (clean + start).clamp(0, LEVELS) - clean
    left, going = torch.full_like(step.y, tau), torch.ones_like(step.y, dtype=torch.bool)
    for _ in range(attack.steps):
        with torch.enable_grad():
            x = ((clean + delta) / LEVELS).requires_grad_()
            logits = student(x).logits
            (gradient,) = torch.autograd.grad(objective(logits, x).sum(), x)
        wrong = going & (logits.argmax(1) != step.y)
        going = going & (~wrong | (left > 0))
        left = left - wrong.long()
        moved = climb(clean, delta, threat.direction(gradient), threat=threat, step=attack.step)
        delta = torch.where(going[:, None, None, None], moved, delta)
    return delta
