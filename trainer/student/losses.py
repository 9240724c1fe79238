"""Recipes: outer losses and the inner objectives that go with them, each a frozen dataclass of its settings.

A recipe looks at one `Step` and at what the student said about its images; what the teachers said is in the step.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.core.errors import ConfigError
from darht.core.fused import fused
from darht.trainer.student.adr import Adr
from darht.trainer.student.baselines import At, Kd, Trades
from darht.trainer.student.distances import (
    Correct,
    check_number,
    correct_targets,
    kl_rows,
    mean_kept,
    mean_log_probabilities,
    teacher_weights,
)
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.saad import Saad
from darht.trainer.student.step import (
    LabelRecipe,
    Learned,
    Loss,
    Objective,
    Per,
    Recipe,
    Step,
    TeachersNeeded,
    When,
    indirect_gradient_rows,
)


@dataclass(frozen=True, kw_only=True)
class Darht(LabelRecipe):
    """The released DARHT objective in its three phases: CE; CE + sum_t w_t KD_t; sum_t w_t KD_t (arXiv 2402.15586).

    Attributes:
        phases: shares of the run at which KD joins CE, and at which CE leaves; 50 and 118 of 350 epochs. Only CE
            reaches the head: in a short run a later end is better.
        kd: `kl` on probabilities or `mse` on raw logits.
        weights: exp(-CE(T_t, y)) with the CE of the batch, as released, or of each row.
        clean_share: of the batches or rows; the released code tosses a fair coin for each batch.
        clean_by: whether the coin is tossed for each batch or for each row.
        correct: what becomes of a teacher that is wrong about a row: `none`; `drop`: it is not listened to there;
            `mix`: the label's share in its answer is raised until the label wins, with `kd: kl`.
    """

    phases: tuple[float, ...] = (50 / 350, 118 / 350)
    kd: Literal["kl", "mse"] = "kl"
    weights: Per = "batch"
    clean_share: float = 0.5
    clean_by: Per = "batch"
    correct: Correct = "none"
    adversarial_when: ClassVar[When] = "some"
    teachers_needed: ClassVar[TeachersNeeded] = "any"
    uses_adversarial_logits: ClassVar[bool] = True
    needs_feature_map: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.phases) != 2 or not 0 <= self.phases[0] <= self.phases[1] <= 1:
            raise ConfigError(f"phases are two rising shares in [0, 1]; got {list(self.phases)}")
        check_number("clean_share", self.clean_share)
        if self.correct == "mix" and self.kd == "mse":
            raise ConfigError("correct: mix mixes probabilities, kd: mse compares logits; set kd: kl, or correct: drop")

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """CE on z in the first two phases; the weighted distances of the map's rows in the last two."""
        if step.done < self.phases[0]:
            return Loss(self.label_loss(out.logits, step.y))
        how = self.kd, self.weights, self.correct
        distillation = _distillation(step.targets, out.feature_map, step.y, step.supervises, how, known=step.known)
        if step.done < self.phases[1]:
            return Loss(self.label_loss(out.logits, step.y) + distillation)
        return Loss(distillation)

    def clean_mix(self) -> tuple[float, Per]:
        """As the settings say."""
        return self.clean_share, self.clean_by

    def phases_by_name(self) -> tuple[tuple[float, str], ...]:
        """Cross-entropy alone, both, distillation alone."""
        return (0.0, "CE"), (self.phases[0], "CE + KD"), (self.phases[1], "KD")

    def needs_all_logits(self) -> str:
        """The squared distance of logits."""
        return "kd: mse" if self.kd == "mse" else ""

    def head_trained_until(self) -> float:
        """Where cross-entropy leaves: only it reaches the head."""
        return self.phases[1]


@fused
def _distillation(
    targets: Tensor,
    feature_map: Tensor,
    y: Tensor,
    supervises: Tensor,
    how: tuple[str, Per, Correct],
    *,
    known: Tensor | None,
) -> Tensor:
    """`sum_t w_t KD_t` of teachers' logits and the student's map, both `[B, T, C]`, the mean over rows."""
    kd, per, correct = how
    weights = teacher_weights(targets, y, per) * supervises
    corrected, kept = correct_targets(targets, y, correct, known)
    if kept is not None:
        weights = weights * kept
    distances = kl_rows(corrected, feature_map) if kd == "kl" else (targets - feature_map).square().mean(-1)
    return (weights * distances).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class Rslad(Recipe):
    """RSLAD (Zi et al. 2021, equation 8): KL to the teacher's clean probabilities, on clean and adversarial images.

    Several teachers are averaged as probabilities; the paper has one.

    Attributes:
        clean_weight: of the clean term; 1/6 in the paper.
        correct: what becomes of a row that the teachers' mean gets wrong: `none`; `drop`: it is left out; `mix`: the
            label's share is raised until the label wins, in the inner loop too.
    """

    clean_weight: float = 1 / 6
    correct: Correct = "none"
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "robust"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clean_weight", self.clean_weight)

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """A blend of the two distances."""
        target, kept = self._target(step)
        clean = student(step.clean)
        gap = mean_kept(kl_rows(target, clean.logits), kept)
        adversarial = mean_kept(kl_rows(target, out.logits), kept)
        return Loss(self.clean_weight * gap + (1 - self.clean_weight) * adversarial, clean)

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """The distance from the teacher's clean probabilities."""
        target, _ = self._target(step)
        return lambda logits, x: kl_rows(target, logits)

    def _target(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The robust teachers' mean on the clean view, `[B, C]`, and which rows count."""
        said = mean_log_probabilities(step.only(step.clean_targets, robust=True))
        return correct_targets(said, step.y, self.correct, step.known)


@dataclass(frozen=True, kw_only=True)
class Ard(LabelRecipe):
    """ARD (Goldblum et al. 2020, equation 2): on adversarial images match the teacher's clean probabilities.

    Attributes:
        tau: temperature; 30 in the paper.
        alpha: share of distillation, the rest is CE on clean images; 1 in the paper's CIFAR-10 runs.
    """

    tau: float = 30.0
    alpha: float = 1.0
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "robust"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_number("tau", self.tau, 1e-3, float("inf"))

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """`alpha * tau^2 * KL(T^tau(x) || S^tau(x')) + (1 - alpha) * CE(S(x), y)`."""
        target = mean_log_probabilities(step.only(step.clean_targets, robust=True), self.tau)
        loss = self.alpha * self.tau**2 * kl_rows(target, out.logits / self.tau).mean()
        if self.alpha == 1:
            return Loss(loss)
        clean = student(step.clean)
        return Loss(loss + (1 - self.alpha) * self.label_loss(clean.logits, step.y), clean)

    def has_label_term(self) -> bool:
        """Unless distillation has it all."""
        return self.alpha < 1


@dataclass(frozen=True, kw_only=True)
class Mtard(Recipe):
    """MTARD (Zhao et al. 2022): vanilla teachers on clean images, robust ones on adversarial images, learned weights.

    The weights follow the two losses relative to their first values (equations 7-9), so that the student learns from
    both at the same pace. The released code also divides both distances by C and steps on the student at 2/255 from a
    tiny Gaussian; here distances are those of the paper, and `inner` says where examples start.

    Attributes:
        rate: of the weights; 0.025 in the paper.
        beta: how hard the slower one is preferred; 1 in the paper.
        milestones: shares of the run at which the rate falls to a tenth: where its released code drops the learning
            rate, epochs 215, 260 and 285 of 300.
    """

    rate: float = 0.025
    beta: float = 1.0
    milestones: tuple[float, ...] = (215 / 300, 260 / 300, 285 / 300)
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "both"
    uses_adversarial_logits: ClassVar[bool] = True
    needs_whole_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rate", self.rate)
        check_number("beta", self.beta, 0.0, float("inf"))
        for milestone in self.milestones:
            check_number("milestones", milestone)

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """`(1 - w) KL(T_vanilla(x) || S(x)) + w KL(T_robust(x') || S(x'))`."""
        vanilla = mean_log_probabilities(step.only(step.clean_targets, robust=False))
        robust = mean_log_probabilities(step.only(step.targets, robust=True))
        said = student(step.clean)
        clean = kl_rows(vanilla, said.logits).mean()
        adversarial = kl_rows(robust, out.logits).mean()
        rate = self.rate * 0.1 ** sum(step.done >= milestone for milestone in self.milestones)
        weight = self._learn(learned, clean.detach(), adversarial.detach(), rate)
        return Loss((1 - weight) * clean + weight * adversarial, said)

    def _learn(self, learned: Learned, clean: Tensor, adversarial: Tensor, rate: float) -> Tensor:
        if not learned:
            learned |= {"clean": clean, "adversarial": adversarial, "weight": torch.full_like(clean, 0.5)}
        slow = (adversarial / learned["adversarial"].clamp(min=1e-12)) ** self.beta
        fast = (clean / learned["clean"].clamp(min=1e-12)) ** self.beta
        share = slow / (slow + fast).clamp(min=1e-12)
        learned["weight"] = rate * share + (1 - rate) * learned["weight"]
        return learned["weight"]


@dataclass(frozen=True, kw_only=True)
class AdaAd(Recipe):
    """AdaAD (Huang et al. 2023): inner and outer loop both ask the teacher about x'; with IGDM's term on request.

    Live teachers answer exactly; from a cache, `targets: first-order` gives `T(x) + J(x) delta` and its gradient.

    Attributes:
        alpha: share of the adversarial distance, the rest is on clean images; 1 in the paper's CIFAR-10 runs.
        igdm: weight at the end of the run of `KL(softmax(T(x+d) - T(x-d)) || softmax(S(x+d) - S(x-d)))` (Lee et al.
            2025, arXiv 2312.03286); 20 in its released code, 0 for none. It grows in proportion to the share of the run
            that is done, as there with the epoch.
        gradient: weight of `|grad_x CE(T(x), y) - grad_x CE(S(x), y)|^2` on clean images (KDIGA, Shao et al. 2021),
            pixels in [0, 1]; the teacher's gradient is `J^T (softmax T(x) - y)` from its stored Jacobian. 0 for none.
        correct: what becomes of a row that the teachers' mean gets wrong: `none`; `drop`: it is left out; `mix`: the
            label's share is raised until the label wins, in the inner loop too.
    """

    alpha: float = 1.0
    igdm: float = 0.0
    gradient: float = 0.0
    correct: Correct = "none"
    adversarial_when: ClassVar[When] = "always"
    teachers_needed: ClassVar[TeachersNeeded] = "robust"
    uses_adversarial_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        check_number("igdm", self.igdm, 0.0, float("inf"))
        check_number("gradient", self.gradient, 0.0, float("inf"))

    def loss(self, student: nn.Module, step: Step, out: StudentOutput, learned: Learned) -> Loss:
        """`alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)) + done * igdm * ... + gradient * ...`."""
        target, kept = self._target(step.targets, step)
        loss = self.alpha * mean_kept(kl_rows(target, out.logits), kept)
        clean = student(step.clean) if self.alpha < 1 else None
        if clean is not None:
            target, kept = self._target(step.clean_targets, step)
            loss = loss + (1 - self.alpha) * mean_kept(kl_rows(target, clean.logits), kept)
        if self.igdm:
            loss = loss + self.igdm * step.done * indirect_gradient_rows(student, step, out).mean()
        if self.gradient:
            loss = loss + self.gradient * self._gradient_distance(student, step)
        return Loss(loss, clean)

    def _gradient_distance(self, student: nn.Module, step: Step) -> Tensor:
        """The mean over rows of the squared distance of the input gradients of teacher and student."""
        x = step.clean.detach().requires_grad_()
        said = mean_log_probabilities(step.only(step.answer(x), robust=True))
        (theirs,) = torch.autograd.grad(F.cross_entropy(said, step.y, reduction="sum"), x)
        own = F.cross_entropy(student(x).logits, step.y, reduction="sum")
        (mine,) = torch.autograd.grad(own, x, create_graph=True)
        return (mine - theirs).square().flatten(1).sum(1).mean()

    def inner(self, student: nn.Module, step: Step) -> Objective:
        """The distance between teacher and student at the very point, with the gradient of both."""
        return lambda logits, x: kl_rows(self._target(step.answer(x), step)[0], logits)

    def _target(self, logits: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """The robust teachers' mean of answers `[B, T, C]`, `[B, C]`, and which rows count."""
        said = mean_log_probabilities(step.only(logits, robust=True))
        return correct_targets(said, step.y, self.correct, step.known)

    def compares_points(self) -> str:
        """IGDM's term, or the gradients', where there is one."""
        return "igdm" if self.igdm else self.second_order()

    def second_order(self) -> str:
        """The distance of gradients."""
        return "gradient" if self.gradient else ""


RECIPES: dict[str, type[Recipe]] = {
    "darht": Darht,
    "rslad": Rslad,
    "ard": Ard,
    "mtard": Mtard,
    "adaad": AdaAd,
    "saad": Saad,
    "kd": Kd,
    "at": At,
    "trades": Trades,
    "adr": Adr,
}
