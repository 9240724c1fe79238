"""The inner maximisation: one training step's images and targets, from the cache and, for `pgd`, the student."""

import torch
from torch import Tensor, nn

from darht.attacks.pgd import ascend
from darht.cache.loader import TrainingSet
from darht.cache.sampler import coin, draw_choices
from darht.cache.views import apply_views
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig, TrainConfig
from darht.trainer.losses import RECIPES, Step


def draw_step(
    student: nn.Module, data: TrainingSet, at: Tensor, config: TrainConfig, *, epoch: int, number: int, done: float
) -> Step:
    """Decide what one step sees, and fetch it.

    Args:
        student: for `inner: pgd`; taken in the mode it is in.
        data: rows of the cache in memory.
        at: int64 `[B]`, positions in `data`; `data.rows[at]` are the rows' source indices, which key all draws.
        config: the recipe.
        epoch: keys the draws of views and random starts.
        number: of the step in the whole run; keys the coin and the choice of a cached attack.
        done: share of the run that is done.
    """
    adversarial = RECIPES[config.recipe].always_adversarial or not coin(config.clean_share, config.seed, number)
    if adversarial and config.inner.kind == "cached":
        return _cached(data, at, config, epoch=epoch, number=number, done=done)
    step = _clean(data, at, config, epoch=epoch, done=done)
    return _pgd(student, step, data.rows[at], data, config, epoch=epoch) if adversarial else step


def _clean(data: TrainingSet, at: Tensor, config: TrainConfig, *, epoch: int, done: float) -> Step:
    """A view of each row, and what every teacher said about exactly that view."""
    views = draw_choices(data.rows[at], len(data.offsets), config.seed, epoch, "view")
    x = apply_views(data.images[at], data.offsets[views]).float() / 255
    targets = data.clean[at, views].float()
    return Step(x, x, data.labels[at], targets, targets, torch.ones_like(data.robust), done)


def _cached(data: TrainingSet, at: Tensor, config: TrainConfig, *, epoch: int, number: int, done: float) -> Step:
    """A stored adversarial image of each row, and what every teacher said about exactly these pixels."""
    draw = draw_choices(torch.tensor([number]), len(data.attacks), config.seed, 0, "attack")
    attack = int(draw)
    deltas, answers = data.deltas[attack], data.adversarial[attack]
    views = draw_choices(data.rows[at], deltas.shape[1], config.seed, epoch, "view")
    pixels = apply_views(data.images[at], data.offsets[views])
    x = (pixels + data.units[attack] * deltas[at, views]).float() / 255
    clean_targets, targets = data.clean[at, views].float(), answers[at, views].float()
    return Step(x, pixels.float() / 255, data.labels[at], targets, clean_targets, data.robust, done)


def _pgd(student: nn.Module, step: Step, rows: Tensor, data: TrainingSet, config: TrainConfig, *, epoch: int) -> Step:
    """The student's own adversarial examples; teachers are quoted on the view they start from."""
    generator = RowRng.create(config.seed, "inner", epoch, rows=rows)
    step = step._replace(supervises=data.robust)
    return step._replace(x=maximise(student, step, config.inner, config.recipe, generator))


def maximise(student: nn.Module, step: Step, inner: InnerConfig, recipe: str, generator: RowRng) -> Tensor:
    """PGD on the student against its recipe's inner objective, in eval mode so that batch statistics stay out of it."""
    objective, attack = RECIPES[recipe].inner, inner.pgd()
    was_training = student.training
    student.eval()
    try:
        start = attack.threat.random_start(step.clean.shape, generator)
        delta = ascend(
            lambda x: objective(student(x).logits, step),
            step.clean,
            start,
            threat=attack.threat,
            step=inner.step,
            steps=inner.steps,
        )
    finally:
        student.train(was_training)
    return (step.clean * 255 + delta).round() / 255
