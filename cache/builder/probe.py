"""What a teacher does to a few hundred images: enough to see, before hours are spent, that it makes no sense.

One pass over the images, a short attack on a few of them, and the same few asked alone, in another order and again.
All of it on a copy of the teacher, with the caller's random numbers given back: nothing of it reaches a cache.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks import FGSM, MIM, PGD, Threat
from darht.attacks.engine.query_model import NoGradientError, Oracle
from darht.attacks.objectives import cross_entropy
from darht.attacks.threat import LEVELS
from darht.cache.builder.answers import Difference, compare, find_cycle, is_distribution
from darht.cache.builder.pixels import first_views
from darht.cache.sources.load import FileSource, Source
from darht.core.errors import ModelError
from darht.core.nets.classifier import Classifier
from darht.core.rng import RowRng, borrowed_generator
from darht.core.stats import beyond_chance

_IMAGES, _FEW, _STEPS = 256, 32, 10
_ROUNDING = 1e-4  # of a row's norm: more than the order of a sum explains
_BATCH = 2e-2  # half precision that is summed in another order stays below; a net that looks at its batch does not
_GAIN = 0.05  # of the images: what another normalisation must win before it is proposed


@dataclass(frozen=True, kw_only=True)
class TeacherProbe:
    """What was seen.

    Attributes:
        asked: how many images.
        right: how many of them the teacher answers rightly.
        classes: C.
        few: how many images were attacked, and asked in several ways.
        attack: what they were attacked with, in words.
        robust: those of them right when clean and when attacked.
        no_gradient: those whose cross-entropy has no gradient.
        gradient_needed: whether anything is made from this teacher's gradients.
        probabilities: whether the outputs look like probabilities.
        constant: whether all images get one answer, though not all have one label.
        swapped: classes whose outputs seem exchanged: most images of each are answered with the next.
        better: another normalisation and how many images are right with it, where that is many more.
        batch: how answers differ when images are asked alone or in another order.
        again: how they differ when the same batch is asked again, by a copy that has seen other images.
        training: modules that stay in train mode.
    """

    asked: int
    right: int
    classes: int
    few: int
    attack: str
    robust: int
    no_gradient: int
    gradient_needed: bool
    probabilities: bool
    constant: bool
    swapped: tuple[int, ...]
    better: tuple[str, int] | None
    batch: Difference
    again: Difference
    training: tuple[str, ...]

    def line(self) -> str:
        """All figures, for a person."""
        outputs = "probabilities" if self.probabilities else "logits"
        return (
            f"clean {100 * self.right / self.asked:.1f} % of {self.asked} images (guessing: below {self.bound}), "
            f"under {self.attack} {100 * self.robust / self.few:.1f} % of {self.few}, {self.no_gradient} of {self.few} "
            f"without gradient, outputs are {outputs}, alone or in another order they differ by "
            f"{self.batch.size:.1e} of their norm, asked again by {self.again.size:.1e}"
        )

    @property
    def bound(self) -> int:
        """Right answers that guessing among C classes reaches in less than one of 1,000 such questions."""
        return beyond_chance(self.asked, 1 / self.classes)

    def problems(self, classes: tuple[str, ...]) -> list[str]:
        """Why the teacher makes no sense, each with its numbers and the fix; `classes` are the names."""
        return [*self._answer_problems(classes), *self._steadiness_problems()]

    def _answer_problems(self, classes: tuple[str, ...]) -> list[str]:
        found = []
        share = f"clean accuracy is {100 * self.right / self.asked:.1f} %, {self.right} of {self.asked} images"
        if self.right < self.bound <= self.asked:
            found.append(
                f"{share}: guessing among {self.classes} classes reaches {self.bound - 1} once in 1,000 times: mend "
                "the order of its classes, its --mean, --std and --resize, or train it longer"
            )
        elif self.constant:
            found.append(f"{share}: all get one answer: mend its weights, --mean and --std")
        if self.swapped:
            names = " -> ".join(classes[label] for label in (*self.swapped, self.swapped[0]))
            found.append(f"its outputs are in another class order ({names}): bring the last layer's rows into order")
        if self.better is not None:
            found.append(f"{share}; {self.better[0]} {self.better[1]} are right: import it so")
        if self.probabilities:
            found.append("its outputs are probabilities, where raw logits are stored: leave the softmax or sigmoid out")
        if self.gradient_needed and 2 * self.no_gradient > self.few:
            found.append(
                f"no gradient reaches the pixels of {self.no_gradient} of {self.few} images (it rounds, detaches or is "
                "saturated), so that no attack works: leave that step out, or attack with kind: square"
            )
        return found

    def _steadiness_problems(self) -> list[str]:
        found = steadiness_problems(self.batch, self.again, self.few)
        if self.training:
            found.append(f"it stays in train mode ({', '.join(self.training[:3])}): let eval() reach its modules")
        return found

    @property
    def warning(self) -> str:
        """What is told and not refused; empty when nothing is."""
        return "" if self._steadiness_problems() else steadiness_warning(self.batch, self.few)


def probe_teacher(
    model: Classifier,
    source: Source | FileSource,
    *,
    attack: Any = None,
    gradient_needed: bool = True,
    device: torch.device,
    size: int = 0,
) -> TeacherProbe:
    """Ask a teacher about some images, drawn once for all from the source.

    Args:
        model: in eval mode; a copy of it is asked, on `device`.
        source: the images.
        attack: of the cache, or None for PGD at 8 levels; what is not PGD, FGSM or MIM is replaced by PGD in its ball.
        gradient_needed: whether a teacher without gradient is to be refused.
        device: where to compute.
        size: side that the teacher sees of an image's centred square; 0 for images as they are.

    Raises:
        ModelError: it does not answer one image by itself, or what it answers is not finite.
    """
    labelled = np.flatnonzero(source.labels >= 0)
    rows = labelled[np.sort(np.random.default_rng(0).permutation(len(labelled))[:_IMAGES])]
    x = torch.from_numpy(first_views(source, rows, size)).to(device).float() / LEVELS
    y = torch.from_numpy(source.labels[rows]).to(device)
    few = np.random.default_rng(1).permutation(len(rows))[:_FEW]
    short, words = _short(attack)
    with borrowed_generator(0, "probe"):
        asked, fresh = _copies(model, device)
        batch, again = _steadiness(asked, fresh, x[few])
        logits = _answers(asked, x)
        alive, dead = _attack(asked, x[few], y[few], short)
        better = _better(asked, x, y, logits.argmax(1) == y)
    answers, labels, C = logits.argmax(1).tolist(), y.tolist(), len(source.classes)
    return TeacherProbe(
        asked=len(y), right=int((logits.argmax(1) == y).sum()), classes=C, few=len(few), attack=words, robust=alive,
        no_gradient=dead, gradient_needed=gradient_needed, probabilities=is_distribution(logits),
        constant=len(set(answers)) == 1 < len(set(labels)), swapped=find_cycle(labels, answers, C), better=better,
        batch=batch, again=again, training=tuple(n or "itself" for n, part in asked.named_modules() if part.training),
    )  # fmt: skip


def probe_steadiness(model: Classifier, size: int) -> tuple[Difference, Difference]:
    """How answers differ by batch, and from one time to the next, on noise of `size` pixels; for want of images.

    Raises:
        ModelError: the teacher does not answer one image by itself.
    """
    noise = np.random.default_rng(0).integers(0, 256, (_FEW, 3, size, size)).astype(np.float32)
    with borrowed_generator(0, "probe"):
        return _steadiness(*_copies(model, torch.device("cpu")), torch.from_numpy(noise) / LEVELS)


def steadiness_problems(batch: Difference, again: Difference, few: int = _FEW) -> list[str]:
    """What is refused of such differences, with the numbers and the fix."""
    if again.size > _ROUNDING:
        return [
            f"the same images in the same batch get other answers when asked again ({again.about(few)}): it draws "
            "random numbers (F.dropout needs training=self.training) or remembers what it has seen"
        ]
    if batch.size > _BATCH or (batch.size > _BATCH / 20 and batch.changed):
        return [
            f"images get other answers alone or in another order than in a batch ({batch.about(few)}): it normalises "
            "over its batch or keeps a state; call eval(), or let it treat each image by itself"
        ]
    return []


def steadiness_warning(batch: Difference, few: int = _FEW) -> str:
    """What is told of a difference that is not refused; empty where it is no more than the order of sums."""
    rounding = f"answers depend on the batch by the size of rounding ({batch.about(few)})"
    return rounding if batch.size > _ROUNDING else ""


def _copies(model: Classifier, device: torch.device) -> tuple[Classifier, Classifier | None]:
    """The copy that is asked, and one that has seen nothing; where copying fails, the teacher itself and none."""
    try:
        return copy.deepcopy(model).to(device), copy.deepcopy(model).to(device)
    except (RuntimeError, TypeError, AttributeError):
        return model.to(device), None


@torch.no_grad()
def _steadiness(asked: Classifier, fresh: Classifier | None, x: Tensor) -> tuple[Difference, Difference]:
    """How answers about images differ by company and order, and from one time to the next."""
    noise = torch.from_numpy(np.random.default_rng(2).integers(-4, 5, x.shape)).to(x) / LEVELS
    near = (x + noise).clamp(0, 1)
    first = asked(x)
    try:
        alone = torch.cat([asked(x[k : k + 1]) for k in range(len(x))])
    except Exception as error:  # batch norm left in train mode, squeezes: foreign code fails in its own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"the teacher answers {len(x)} images and not one by itself ({reason})") from error
    turned = asked(x.flip(0)).flip(0)
    again = compare(first, asked(x))
    if fresh is not None:
        again = max(again, compare(fresh(near), asked(near)), key=lambda one: one.size)
    return max(compare(first, alone), compare(first, turned), key=lambda one: one.size), again


@torch.no_grad()
def _answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    logits = torch.cat([model(part).float() for part in x.split(_FEW)])
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).any(1).sum())
        raise ModelError(f"the teacher's output is NaN or infinite for {bad} of {len(x)} images: check its weights")
    return logits


def _attack(model: nn.Module, x: Tensor, y: Tensor, attack: Any) -> tuple[int, int]:
    """How many of some images are right when clean and when attacked, and for how many there is no gradient."""
    right = _answers(model, x).argmax(1) == y
    try:
        _, _, gradient = Oracle(model).gradient(x, lambda logits: cross_entropy(logits, y))
        x_adv = attack(model, x, y, generator=RowRng.create(0, "probe", rows=torch.arange(len(y), device=y.device)))
    except NoGradientError:
        return int(right.sum()), len(y)
    withstands = right & (_answers(model, x_adv).argmax(1) == y)
    return int(withstands.sum()), int((gradient == 0).flatten(1).all(1).sum())


def _short(attack: Any) -> tuple[Any, str]:
    """A cheap attack in the same ball, and its name."""
    if isinstance(attack, PGD | MIM):
        attack = replace(attack, steps=min(attack.steps, _STEPS))
    elif not isinstance(attack, FGSM):
        ball = Threat(eps=8.0) if attack is None else attack.threat
        eps = max(1.0, float(int(ball.eps)))
        attack = PGD(eps=eps, step=max(1.0, eps // 4), steps=_STEPS, norm=ball.norm)
    steps = f"-{attack.steps}" if isinstance(attack, PGD | MIM) else ""
    norm = "" if attack.norm == "linf" else f" {attack.norm}"
    return attack, f"{type(attack).__name__}{steps} at {attack.eps:g}/255{norm}"


def _better(model: Classifier, x: Tensor, y: Tensor, right: Tensor) -> tuple[str, int] | None:
    """Another normalisation with which clearly more images are right: one was forgotten, or there are two."""
    for words, pixels in _normalised(model, x).items():
        try:
            other = _answers(model, pixels).argmax(1) == y
        except Exception:  # a net of somebody else may assert the range of its pixels: then it is no better
            continue
        won, lost = int((other & ~right).sum()), int((right & ~other).sum())
        if won - lost > max(_GAIN * len(y), 3.3 * (won + lost) ** 0.5):  # McNemar's test at 0.1 %
            return words, int(other.sum())
    return None


def _normalised(model: Classifier, x: Tensor) -> dict[str, Tensor]:
    """Pixels that give what the network would get with the data's own normalisation, with 0.5, or with none."""
    mean, std = model.preprocess.mean.to(x), model.preprocess.std.to(x)
    if float(mean.max()) > 2:
        scale = 255 if float(std.max()) > 2 else 1
        return {_options(mean / 255, std / scale): (x - mean / 255) * scale + mean}
    if bool((mean != 0).any()) or bool((std != 1).any()):
        return {"without --mean and --std": x * std + mean}
    own, spread = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    return {_options(own, spread): (x - own) / spread, "with --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5": 2 * x - 1}


def _options(mean: Tensor, std: Tensor) -> str:
    """As a person would write it on the command line."""
    texts = [",".join(f"{value:.3f}" for value in values.flatten().tolist()) for values in (mean, std)]
    return f"with --mean {texts[0]} --std {texts[1]}"
