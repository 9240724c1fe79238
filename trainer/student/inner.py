"""The inner maximisation: one training step's images and targets, from the cache and, unless `cached`, the student."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from darht.attacks.pgd import PGD, ascend
from darht.attacks.threat import LEVELS, to_pixels
from darht.cache.read.draw import adversarial_levels, choose_attack, choose_views, draw_views, view_logits, view_pixels
from darht.cache.read.sampler import coin
from darht.cache.read.training_set import TrainingSet
from darht.core.fused import fused
from darht.core.rng import RowRng
from darht.trainer.config import TrainConfig
from darht.trainer.student.friendly import friendly_ascent
from darht.trainer.student.memory import Memory
from darht.trainer.student.single_step import label_step, noise_step
from darht.trainer.student.step import Recipe, Step
from darht.trainer.student.targets import (
    Answer,
    clean_answer,
    first_order_answer,
    live_answer,
    nearest_answer,
    paired_answer,
    pseudo_labels,
)
from darht.trainer.student.twin import Twin
from darht.trainer.student.warm import WarmMemory, warm_step

RECOVERY_STEPS = 2  # of PGD, in steps that are to cure a collapsed warm student


@dataclass(frozen=True, eq=False)
class Examples:
    """Where the examples of a run come from.

    Attributes:
        config: the recipe's file.
        recipe: its outer loss.
        memory: of `inner: warm`.
        teachers: loaded for `teachers: live`, in the cache's order.
        average: of the student, in eval mode, for recipes that ask it.
        rows: of the cache; where it is known, the views of all rows are drawn once in an epoch and then looked up.
        twin: of the student, which PGD steps ascend on; the student itself where there is none.
        layout: of the pixels that the student is shown, which each pass would else turn into its own.
    """

    config: TrainConfig
    recipe: Recipe
    memory: Memory | None = None
    teachers: Sequence[nn.Module] = ()
    average: nn.Module | None = None
    rows: int = 0
    twin: Twin | None = None
    layout: torch.memory_format = torch.contiguous_format
    _drawn: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def attacked(self, student: nn.Module) -> nn.Module:
        """The network that PGD ascends on until the student changes."""
        return student if self.twin is None else self.twin.current()

    def views(self, data: TrainingSet, at: Tensor, epoch: int, attack: int | None = None) -> Tensor:
        """As `choose_views` draws them, int64 `[B]`; one draw takes over a hundred launches of a GPU."""
        if not self.rows:
            return choose_views(data, at, seed=self.config.seed, epoch=epoch, attack=attack)
        count = len(data.offsets) if attack is None else data.attack_count(attack)
        key = (epoch, count, at.device)
        if key not in self._drawn:
            for old in [one for one in self._drawn if one[0] != epoch]:
                del self._drawn[old]
            every = torch.arange(self.rows, device=at.device)
            self._drawn[key] = draw_views(data, every, count, seed=self.config.seed, epoch=epoch)
        return _look_up(self._drawn[key], data.rows, at)

    def _coins(self, rows: Tensor, epoch: int) -> Tensor:
        """A number in [0, 1) for each source index, where these are; drawn for all rows at once, of the same bits."""
        if not self.rows:
            return RowRng.create(self.config.seed, "coin", epoch, rows=rows).uniform((1,))[:, 0]
        key = (epoch, 0, rows.device)
        if key not in self._drawn:
            every = torch.arange(self.rows, device=rows.device)
            self._drawn[key] = RowRng.create(self.config.seed, "coin", epoch, rows=every).uniform((1,))[:, 0]
        return self._drawn[key][rows]

    def draw(
        self,
        student: nn.Module,
        data: TrainingSet,
        at: Tensor,
        *,
        epoch: int,
        number: int,
        done: float,
        pgd_share: float,
    ) -> Step:
        """Decide what one step sees, and fetch it.

        Args:
            student: for `warm` and `pgd`; taken in the mode it is in.
            data: rows of the cache in memory.
            at: int64 `[B]` on the CPU, positions in `data`; `data.keys[at]` are the rows' source indices, which key all
                draws.
            epoch: keys the draws of views and random starts.
            number: of the step in the whole run; keys the coins and the choice of a cached attack.
            done: share of the run that is done.
            pgd_share: share of the `warm` steps that are PGD steps instead.
        """
        draw = _Draw(self, data, epoch, number, done, pgd_share)
        if self.recipe.adversarial_when == "never":
            return draw.clean(at)
        if self.recipe.adversarial_when == "always":
            return draw.adversarial(student, at)
        share, per = self.recipe.clean_mix()
        if per == "batch":
            return draw.clean(at) if coin(share, self.config.seed, number) else draw.adversarial(student, at)
        clean = self._coins(data.keys[at], epoch) < share  # on the CPU, where it decides shapes
        others = int((~clean).sum())
        if others <= int(self.config.inner.single_step):  # one step on one row would have no batch statistics
            return draw.clean(at)
        if others == len(at):
            return draw.adversarial(student, at)
        here = data.sent(at)
        data, at = data.reordered(at, clean, here, self._coins(data.rows[here], epoch) < share)
        draw, count = replace(draw, data=data), len(at) - others
        adversarial = draw.adversarial(student, at[count:])
        return _together(draw.clean(at[:count]), adversarial)


@dataclass(frozen=True, eq=False)
class _Draw:
    """One step's draws."""

    examples: Examples
    data: TrainingSet
    epoch: int
    number: int
    done: float
    pgd_share: float

    @property
    def config(self) -> TrainConfig:
        return self.examples.config

    def clean(self, at: Tensor) -> Step:
        """A view of each row, and what every teacher said about exactly that view."""
        return self._clean(at, ask=True)[0]

    def _clean(self, at: Tensor, *, ask: bool) -> tuple[Step, Tensor, Tensor]:
        """Also the offsets and the source indices of the rows.

        Live teachers are asked if `ask`; what the cache says is the same to its precision.
        """
        data, at = self.data, self.data.sent(at)
        views = self.examples.views(data, at, self.epoch)
        x, said = _pixels(view_pixels(data, at, views), self.examples.layout), view_logits(data, at, views)
        targets = said
        if ask and self.examples.teachers:
            with torch.no_grad():
                targets = live_answer(self.examples.teachers)(x)
        supervises = _flags((True,) * len(data.robust), at.device).expand(len(at), -1)
        answer = clean_answer(targets)
        labels, offsets, rows = _of_rows(data.labels, data.offsets, data.rows, at, views)
        y, known = self._labels(labels, said)
        step = Step(x, x, y, answer, targets, targets, supervises, data.robust, self.done, known=known)
        return step, offsets, rows

    def _labels(self, labels: Tensor, said: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels `[B]` with pseudo-labels from what teachers `said` about clean views, and which are the rows' own."""
        if self.data.labelled is None:
            return labels, None
        known = labels >= 0
        return torch.where(known, labels, pseudo_labels(said, self.data.robust)), known

    def adversarial(self, student: nn.Module, at: Tensor) -> Step:
        """Stored adversarial images, or the student's own with what stands for the teachers' answers to them.

        Live teachers are asked once, as in released code: about the examples, or about clean images by the recipes that
        quote them on these.
        """
        if self.config.inner.kind == "cached":
            return self._cached(at)
        here = self.data.sent(at)
        uses_adversarial_logits = self.examples.recipe.uses_adversarial_logits
        step, offsets, rows = self._clean(here, ask=not uses_adversarial_logits)
        step = step._replace(
            supervises=self._robust(at),
            answer=self._answer(here, offsets, step.clean, step.clean_targets),
        )
        if self.examples.recipe.uses_average:
            assert self.examples.average is not None
            with torch.no_grad():
                step = step._replace(average=self.examples.average(step.clean).logits)
        inner = self.config.inner
        if inner.single_step and not coin(self.pgd_share, self.config.seed, self.number, "careful"):
            step = self._single(student, step, at, rows, offsets=offsets)
        else:
            generator = RowRng.create(self.config.seed, "inner", self.epoch, rows=rows)
            attack = inner.pgd(RECOVERY_STEPS) if inner.single_step else inner.pgd()
            frozen, tau = self.examples.attacked(student), inner.tau if inner.kind == "fat" else None
            step = step._replace(x=maximise(frozen, step, attack, self.examples.recipe, generator, tau=tau))
        if not uses_adversarial_logits:
            return step
        with torch.no_grad():
            return step._replace(targets=step.answer(step.x))

    def _single(self, student: nn.Module, step: Step, at: Tensor, rows: Tensor, *, offsets: Tensor) -> Step:
        """One step on the student from where `inner` says."""
        inner, recipe, memory = self.config.inner, self.examples.recipe, self.examples.memory
        if isinstance(memory, WarmMemory):
            memory.begin(self.data, at, inner.pgd().threat, inner, self.config.seed)
            return warm_step(student, step, memory, rows, offsets, recipe=recipe, inner=inner)
        generator = RowRng.create(self.config.seed, "single", self.epoch, rows=rows)
        if memory is None:
            return noise_step(student, step, recipe=recipe, inner=inner, generator=generator)
        if memory.is_due(self.number):
            memory.refresh(self.examples.attacked(student), self.number)
        return label_step(student, step, memory, recipe=recipe, inner=inner, generator=generator)

    def _cached(self, at: Tensor) -> Step:
        """A stored adversarial image of each row, and what every teacher said about exactly these pixels."""
        data, config = self.data, self.config
        attack = choose_attack(len(data.attacks), seed=config.seed, number=self.number)
        at = data.sent(at)
        views = self.examples.views(data, at, self.epoch, attack)
        pixels = view_pixels(data, at, views)
        layout = self.examples.layout
        x = _pixels(adversarial_levels(data, at, views, attack, pixels), layout)
        clean, targets = view_logits(data, at, views), view_logits(data, at, views, attack)
        seen, robust = _pixels(pixels, layout), self._robust(at)
        y, known = self._labels(data.labels[at], clean)
        if data.boxes is None:
            answer = nearest_answer(data, at, data.offsets[views], seen, clean)
        else:
            answer = paired_answer(seen, clean, x, targets)
        return Step(x, seen, y, answer, targets, clean, robust, data.robust, self.done, known=known)

    def _robust(self, at: Tensor) -> Tensor:
        """Bool `[B, T]`, the robust teachers."""
        return _flags(tuple(self.data.robust.tolist()), self.data.images.device).expand(len(at), -1)

    def _answer(self, at: Tensor, offsets: Tensor, clean: Tensor, clean_targets: Tensor) -> Answer:
        if self.examples.teachers:
            return live_answer(self.examples.teachers)
        if self.config.targets == "nearest":
            return nearest_answer(self.data, at, offsets, clean, clean_targets)
        if self.config.targets == "first-order":
            return first_order_answer(self.data, at, offsets, clean, clean_targets)
        return clean_answer(clean_targets)


def maximise(
    student: nn.Module, step: Step, attack: PGD, recipe: Recipe, generator: RowRng, *, tau: int | None = None
) -> Tensor:
    """PGD on the student against its recipe's inner objective, in eval mode so that batch statistics stay out of it.

    With `tau` a row stops so many steps after it is misclassified first.
    """
    was_training = student.training
    student.eval()
    try:
        objective = recipe.inner(student, step)
        start = attack.threat.random_start(step.clean.shape, generator)
        if tau is not None:
            delta = friendly_ascent(student, step, objective, start, attack=attack, tau=tau)
        else:
            delta = ascend(
                lambda x: objective(student(x).logits, x),
                step.clean,
                start,
                threat=attack.threat,
                step=attack.step,
                steps=attack.steps,
            )
    finally:
        student.train(was_training)
    return _whole_levels(step.clean, delta)


@fused
def _pixels(levels: Tensor, layout: torch.memory_format) -> Tensor:
    """Levels in [0, 255] to pixels in [0, 1], float32, in the layout that the student works in."""
    return to_pixels(levels).contiguous(memory_format=layout)


@fused
def _whole_levels(clean: Tensor, delta: Tensor) -> Tensor:
    """Clean pixels and a perturbation in levels to pixels on whole levels."""
    return (clean * LEVELS + delta).round() / LEVELS


@fused
def _of_rows(labels: Tensor, offsets: Tensor, rows: Tensor, at: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, offsets of the views, and source indices of the rows at these positions."""
    return labels[at], offsets[views], rows[at]


@functools.cache
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """Flags that never change, on a device, which they are sent to once."""
    return torch.tensor(values, dtype=torch.bool, device=device)


@fused
def _look_up(table: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """What the rows at these positions have in a table of all rows of the cache."""
    return table[rows[at]]


def _together(clean: Step, adversarial: Step) -> Step:
    """One batch of two parts, for the coin that is tossed for each row."""
    n = len(clean.y)
    return adversarial._replace(
        x=torch.cat([clean.x, adversarial.x]),
        clean=torch.cat([clean.clean, adversarial.clean]),
        y=torch.cat([clean.y, adversarial.y]),
        known=None if clean.known is None or adversarial.known is None else torch.cat([clean.known, adversarial.known]),
        answer=lambda x: torch.cat([clean.answer(x[:n]), adversarial.answer(x[n:])]),
        targets=torch.cat([clean.targets, adversarial.targets]),
        clean_targets=torch.cat([clean.clean_targets, adversarial.clean_targets]),
        supervises=torch.cat([clean.supervises, adversarial.supervises]),
    )
