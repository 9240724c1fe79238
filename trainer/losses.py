"""Outer losses, as functions of what the student said and what the teachers would have said."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from darht.trainer.config import TrainConfig
from darht.trainer.student import Student


class Step(NamedTuple):
    """One step's images and targets.

    Attributes:
        x: what the student trains on, pixels `[B, 3, H, W]` in [0, 1]; clean or adversarial.
        clean: the views that `x` was made from.
        y: labels `[B]`.
        targets: teachers' logits for `x`, `[B, T, C]`.
        clean_targets: teachers' logits for `clean`, `[B, T, C]`.
        supervises: bool `[T]`: which teachers may be listened to on `x`; vanilla ones only on clean images.
        done: share of the run that is done, in [0, 1).
    """

    x: Tensor
    clean: Tensor
    y: Tensor
    targets: Tensor
    clean_targets: Tensor
    supervises: Tensor
    done: float


Loss = Callable[[Student, Step, TrainConfig], Tensor]
InnerObjective = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class Recipe:
    """An outer loss with the inner objective that goes with it.

    Attributes:
        loss: a scalar from the student, the step and the settings.
        inner: what the student's adversarial examples maximise: `[B]` from the student's logits and the step.
        always_adversarial: `x` is adversarial in every step; otherwise a coin decides.
    """

    loss: Loss
    inner: InnerObjective
    always_adversarial: bool


def kl_rows(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) over the last axis, in nats."""
    target = F.log_softmax(target_logits, dim=-1)
    return (target.exp() * (target - F.log_softmax(logits, dim=-1))).sum(-1)


def teacher_weights(targets: Tensor, y: Tensor, per: str) -> Tensor:
    """`w_t = exp(-CE(T_t, y))` as `[B, T]`: with the mean CE of the batch as released, or with each row's own."""
    B, T, C = targets.shape
    ce = F.cross_entropy(targets.reshape(B * T, C), y.repeat_interleave(T), reduction="none").view(B, T)
    return torch.exp(-(ce.mean(0, keepdim=True).expand(B, T) if per == "batch" else ce))


def darht(student: Student, step: Step, config: TrainConfig) -> Tensor:
    """The released DARHT objective in its three phases: CE; CE + sum_t w_t KD_t; sum_t w_t KD_t (arXiv 2402.15586)."""
    out = student(step.x)
    if step.done < config.phases[0]:
        return F.cross_entropy(out.logits, step.y)
    weights = teacher_weights(step.targets, step.y, config.weights) * step.supervises
    if config.kd_loss == "kl":
        distances = kl_rows(step.targets, out.feature_map)
    else:
        distances = (step.targets - out.feature_map).square().mean(-1)
    distillation = (weights * distances).sum(1).mean()
    if step.done < config.phases[1]:
        return F.cross_entropy(out.logits, step.y) + distillation
    return distillation


def rslad(student: Student, step: Step, config: TrainConfig) -> Tensor:
    """RSLAD (Zi et al. 2021, equation 8): KL to the teacher's clean probabilities, on clean and adversarial images.

    Several teachers are averaged as probabilities; the paper has one.
    """
    target = _mean_log_probabilities(step)
    adversarial = _kl_to(target, student(step.x).logits).mean()
    clean = _kl_to(target, student(step.clean).logits).mean()
    return config.rslad_clean * clean + (1 - config.rslad_clean) * adversarial


def adversarial_training(student: Student, step: Step, config: TrainConfig) -> Tensor:
    """Cross-entropy on `x`, without teachers (Madry et al. 2018)."""
    return F.cross_entropy(student(step.x).logits, step.y)


def _mean_log_probabilities(step: Step) -> Tensor:
    logits = step.clean_targets[:, step.supervises]
    return F.log_softmax(logits, dim=-1).exp().mean(1).clamp(min=1e-12).log()


def _kl_to(log_target: Tensor, logits: Tensor) -> Tensor:
    return (log_target.exp() * (log_target - F.log_softmax(logits, dim=-1))).sum(-1)


def _inner_ce(logits: Tensor, step: Step) -> Tensor:
    return F.cross_entropy(logits, step.y, reduction="none")


def _inner_kl(logits: Tensor, step: Step) -> Tensor:
    return _kl_to(_mean_log_probabilities(step), logits)


RECIPES: dict[str, Recipe] = {
    "darht": Recipe(darht, _inner_ce, always_adversarial=False),
    "rslad": Recipe(rslad, _inner_kl, always_adversarial=True),
    "at": Recipe(adversarial_training, _inner_ce, always_adversarial=False),
}
