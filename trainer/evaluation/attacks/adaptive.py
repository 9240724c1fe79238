"""Attacks that know the feature-map student: its rows, its head, and what its teachers said (design page, section 5).

Each climbs another loss of the same network; only what fools the prediction z counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darht.attacks import APGD, SAGA, AutoSAGA
from darht.attacks.objectives import Model, cross_entropy, dlr, input_gradient, margin
from darht.attacks.pgd import climb
from darht.attacks.threat import LEVELS, Threat, to_levels
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.evaluation.attacks.suite import for_dlr, from_other, logit_ratio, step_of, weights_of
from darht.trainer.evaluation.measure import AttackStep, Measurement
from darht.trainer.student.distances import kl_rows
from darht.trainer.student.model import Student, StudentOutput
from darht.trainer.student.twin import Twin

ALIVE = "the images still alive"
STEPS, STARTS = 40, 2
Loss = Callable[[StudentOutput, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Climb:
    """PGD up any loss of a student's output; a row leaves when z is fooled.

    The step halves after half of the steps, down to one pixel level in L-inf: large steps find the region, small ones
    the point. The first start is the image itself, the others are random.

    Attributes:
        student: whose rows are looked at.
        loss: from output, labels and extra rows to a loss for each row, `[B]`.
        threat: the ball.
        samples: draws of a random student that each gradient is the mean of.
        fast: the same network for less (`fast_student`), which is climbed on; the student itself confirms what fools.
    """

    student: Student
    loss: Loss
    threat: Threat
    samples: int = 1
    fast: nn.Module | None = None

    def __call__(self, x: Tensor, y: Tensor, generator: RowRng, extra: Tensor) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]`; rows that nothing fools end at their last point."""
        best = x.clone()
        left = torch.arange(len(y), device=y.device)
        for start in range(STARTS):
            if len(left):
                best[left], fooled = self._run(
                    x[left], y[left], generator[left].fold("start", start), extra[left], start
                )
                left = left[~fooled]
        return best

    def _run(self, x: Tensor, y: Tensor, generator: RowRng, extra: Tensor, start: int) -> tuple[Tensor, Tensor]:
        clean, threat = to_levels(x), self.threat
        delta = threat.random_start(x.shape, generator).to(x.dtype) if start else torch.zeros_like(clean)
        delta = climb(clean, torch.zeros_like(clean), delta, threat=threat, step=1.0)
        fooled = torch.zeros_like(y, dtype=torch.bool)
        for k in range(STEPS):
            going = (~fooled).nonzero().squeeze(1)
            if not len(going):
                break
            at = ((clean + delta) / LEVELS)[going]
            gradient = input_gradient(self._loss_of(y[going], extra[going]), at)
            step = step_of(threat, share=4.0 if k < STEPS // 2 else 8.0)
            moved = climb(clean[going], delta[going], threat.direction(gradient), threat=threat, step=step)
            delta[going] = moved
            fooled[going] = self._fooled(((clean + delta) / LEVELS)[going], y[going])
        return (clean + delta) / LEVELS, fooled

    def _loss_of(self, y: Tensor, extra: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.stack([self.loss(self._net(z), y, extra) for _ in range(self.samples)]).mean(0)

    @property
    def _net(self) -> nn.Module:
        return self.student if self.fast is None else self.fast

    @torch.no_grad()
    def _fooled(self, x: Tensor, y: Tensor) -> Tensor:
        fooled = self._answers(self._net, x) != y
        if self.fast is not None and bool(fooled.any()):
            fooled[fooled.clone()] = self._answers(self.student, x[fooled]) != y[fooled]
        return fooled

    def _answers(self, net: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([net(x).logits for _ in range(self.samples)]).mean(0).argmax(1)


def fast_student(student: Student, probe: Tensor) -> nn.Module | None:
    """The student with BatchNorm folded, checked on pixels `[B, 3, H, W]`; None for one that draws random numbers."""
    if student.dropout.p:  # who confirms would draw too
        return None
    return Twin(student, probe).current()


def row_losses(teachers: int, classes: int) -> dict[str, Loss]:
    """The losses by name: z, each row, all rows, the row nearest to flipping, and the ensemble of z and rows."""
    losses: dict[str, Loss] = {"z, ce": lambda out, y, _: cross_entropy(out.logits, y)}
    sharp = dlr if classes >= 4 else margin
    losses["z, dlr"] = lambda out, y, _: sharp(out.logits, y)
    for t in range(teachers):
        losses[f"row {t}, ce"] = lambda out, y, _, t=t: cross_entropy(out.feature_map[:, t], y)  # type: ignore[misc]
        losses[f"row {t}, dlr"] = lambda out, y, _, t=t: sharp(out.feature_map[:, t], y)  # type: ignore[misc]
    losses["all rows, ce"] = lambda out, y, _: _over_rows(cross_entropy, out, y).mean(1)
    losses["nearest row"] = lambda out, y, _: _over_rows(margin, out, y).amax(1)
    losses["ensemble of z and rows"] = _ensemble
    return losses


def _over_rows(objective: Callable[[Tensor, Tensor], Tensor], out: StudentOutput, y: Tensor) -> Tensor:
    """The objective of every row of the map, `[B, T]`."""
    return torch.stack([objective(row, y) for row in out.feature_map.unbind(1)], 1)


def _ensemble(out: StudentOutput, y: Tensor, _: Tensor) -> Tensor:
    """Cross-entropy of the mean probability of z and all rows."""
    everything = torch.cat([out.logits[:, None], out.feature_map], 1).log_softmax(2)
    mean = everything.logsumexp(1) - np.log(everything.shape[1])
    return F.nll_loss(mean, y, reduction="none")


def away_from_teachers(out: StudentOutput, y: Tensor, said: Tensor) -> Tensor:
    """KL of every row from what its teacher said about the clean image, summed; `said` is `[B, T, C]`."""
    parts = [kl_rows(said[:, t], out.feature_map[:, t]) for t in range(said.shape[1])]
    return torch.stack(parts, 1).sum(1)


def run_adaptive(
    m: Measurement,
    student: Student,
    names: tuple[str, ...],
    teachers: Mapping[str, Model],
    said: Tensor | None,
    *,
    samples: int = 1,
) -> None:
    """All adaptive attacks on the student, each on the images that are still alive.

    Args:
        m: the evaluation.
        student: with its feature map, frozen, in eval mode.
        names: of the map's rows.
        teachers: those that are there, by name, frozen.
        said: what all teachers say about the clean images, `[N, T, C]`; None where that is not known.
        samples: draws for each gradient of a random student.
    """  # fmt: skip
    nothing = torch.zeros(m.count, 0, device=m.setup.device)
    losses = row_losses(len(names), student.num_classes) if names else {}
    fast = fast_student(student, m.setup.tensors(np.arange(min(2, m.count)))[0]) if names else None
    for label, loss in losses.items():
        _ask(m, _climb_step(m, _named(label, names), Climb(student, loss, m.setup.threat, samples, fast), nothing))
    if said is not None:
        climb_away = Climb(student, away_from_teachers, m.setup.threat, samples, fast)
        _ask(m, _climb_step(m, "kl away from teachers", climb_away, said))
    elif names:
        m.left_out["adaptive:kl away from teachers"] = (
            "the cache does not hold these images, and not all teachers are there: give --teacher NAME=FOLDER"
        )
    run_teachers(m, teachers)


def run_teachers(m: Measurement, teachers: Mapping[str, Model]) -> None:
    """Strong transfer from every teacher, and from all of them at once."""
    apgd = APGD(eps=m.setup.threat.eps, norm=m.setup.threat.norm, steps=100, objective=logit_ratio(m))
    for name, model in teachers.items():
        step = from_other(f"adaptive:apgd from {name}", apgd, model, name, "adaptive", engine=m.setup.transfer_engine)
        _ask(m, step)
    for kind, attack in (("saga", SAGA), ("auto-saga", AutoSAGA)):
        if m.setup.threat.norm != "linf":
            m.left_out[f"adaptive:{kind}"] = "it takes sign steps, which only L-inf has"
        elif len(teachers) < 2:
            m.left_out[f"adaptive:{kind}"] = f"it blends at least two teachers; {len(teachers)} are there"
        else:
            _ask(
                m, _saga_step(m, kind, attack(eps=m.setup.threat.eps, step=step_of(m.setup.threat, share=8)), teachers)
            )


def _ask(m: Measurement, step: AttackStep) -> None:
    m.ask(step, np.flatnonzero(m.alive), on=ALIVE)


def _named(label: str, names: tuple[str, ...]) -> str:
    """`row 0, ce` with the name of its teacher."""
    words, _, rest = label.partition(",")
    kind, _, number = words.partition(" ")
    return f"row {names[int(number)]},{rest}" if kind == "row" else label


def _climb_step(m: Measurement, name: str, attack: Climb, extra: Tensor) -> AttackStep:
    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        parts = torch.arange(len(y), device=y.device).split(m.setup.engine.slots)
        return torch.cat([attack(x[i], y[i], generator[i], extra[generator.rows[i]]) for i in parts])

    about = {
        "kind": "pgd", "loss": name, "eps": m.setup.threat.eps, "norm": m.setup.threat.norm, "steps": STEPS,
        "restarts": STARTS, "step": step_of(m.setup.threat), "samples": attack.samples,
        "against": "the student's map and head",
    }  # fmt: skip
    if name.endswith(", dlr"):
        about |= for_dlr(m)
    if extra.shape[1:].numel():
        about["teachers said"] = float(extra.double().abs().sum())  # other teachers, another file in the ledger
    return AttackStep(
        name=f"adaptive:{name}",
        family="adaptive",
        craft=craft,
        about=about,
        threat=m.setup.threat,
        stream=("adaptive", name),
    )


def _saga_step(m: Measurement, kind: str, attack: SAGA, teachers: Mapping[str, Model]) -> AttackStep:
    def craft(x: Tensor, y: Tensor, generator: RowRng) -> Tensor:
        return attack(list(teachers.values()), x, y, generator=generator)

    about = {
        "kind": kind, "eps": attack.eps, "norm": attack.norm, "step": attack.step, "steps": attack.steps,
        "against": ", ".join(teachers), "weights": [weights_of(model) for model in teachers.values()],
    }  # fmt: skip
    return AttackStep(name=f"adaptive:{kind}", family="adaptive", craft=craft, about=about, threat=m.setup.threat)


@dataclass(frozen=True)
class FoldCheck:
    """How the folded classifier compares with the student that it was folded from.

    Attributes:
        images: compared, clean and attacked.
        differing: answers that differ.
        largest: largest difference of a logit, as a share of the largest logit.
    """

    images: int
    differing: int
    largest: float


@torch.no_grad()
def compare_folded(student: Student, folded: nn.Module, pixels: list[Tensor]) -> FoldCheck:
    """Ask both about the same pixels; a student that draws random numbers with the same draws."""
    images, differing, largest = 0, 0, 0.0
    for number, x in enumerate(pixels):
        with borrowed_generator(0, "fold", number):
            want = student(x).logits
        with borrowed_generator(0, "fold", number):
            got = folded(x)
        images += len(x)
        differing += int((want.argmax(1) != got.argmax(1)).sum())
        largest = max(largest, float((want - got).abs().max() / want.abs().max().clamp(min=1e-12)))
    return FoldCheck(images, differing, largest)
