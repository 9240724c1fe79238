"""Train a teacher: `standard`, `pgd-at`, `trades` or `fat`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks.objectives import cross_entropy, input_gradient
from darht.attacks.pgd import ascend
from darht.attacks.prepare import takes_channels_last
from darht.attacks.threat import LEVELS, to_levels
from darht.cache.sampler import draw_choices, epoch_order
from darht.cache.source import Source
from darht.cache.stream import level_counts
from darht.cache.teachers import Card, Preprocessing, Teacher, save_teacher
from darht.cache.views import apply_views, crop_flip_offsets
from darht.core.config import to_plain
from darht.core.device import keep_memory
from darht.core.errors import CacheError
from darht.core.files import is_free
from darht.core.nets import build, check_pixels
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.config import TeachConfig
from darht.trainer.losses import kl_rows
from darht.trainer.schedule import descend, make_optimizer
from darht.trainer.setup import normalisation
from darht.trainer.train import check_finite

OnStep = Callable[[int, int, int, float], None]


def teach(
    config: TeachConfig,
    source: Source,
    arch: str,
    kwargs: dict[str, Any],
    *,
    resize: int | None = None,
    device: torch.device,
    on_step: OnStep = lambda step, total, images, loss: None,
) -> tuple[Teacher, Card]:
    """Train a network on a source and describe it.

    Args:
        config: algorithm and schedule.
        source: the training split.
        arch: as `darht.core.nets.build` takes it.
        kwargs: of the architecture.
        resize: side in pixels that the network wants; None for the source's.
        device: where to train.
        on_step: told step, steps in all, images and loss after each step.

    Returns:
        The teacher in eval mode, and its card without weights hash and accuracies.

    Raises:
        ConfigError, ModelError: the architecture is unknown, or does not take images of this size.
    """
    images = torch.from_numpy(source.images).to(device)
    labels = torch.from_numpy(source.labels).to(device)
    norm = normalisation(level_counts(images))
    preprocessing = Preprocessing(resize=resize, mean=norm.mean, std=norm.std)
    with borrowed_generator(config.seed, "teacher"):
        teacher = Teacher(build(arch, len(source.classes), kwargs), preprocessing).to(device)
        check_pixels(teacher, images, arch)
        takes_channels_last(teacher.eval(), images[:2].float() / LEVELS)
        keep_memory()
        _fit(teacher, images, labels, config, on_step)
    card = Card(
        arch=arch,
        kwargs=kwargs,
        num_classes=len(source.classes),
        preprocessing=preprocessing,
        training=to_plain(config),
        data={"source": source.name, "split": source.split, "rows": len(images), "sha256": source.sha256},
        weights_sha256="",
    )
    teacher.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return teacher.eval().requires_grad_(False), card


def _fit(teacher: Teacher, images: Tensor, labels: Tensor, config: TeachConfig, on_step: OnStep) -> None:
    optimizer = make_optimizer(teacher, config.optim)
    offsets = torch.from_numpy(crop_flip_offsets(config.padding, flip=config.flip)).to(images.device)
    steps = max(1, len(images) // config.optim.batch_size)
    total = steps * config.optim.epochs
    everything = torch.arange(len(images)).numpy()
    for epoch in range(config.optim.epochs):
        order = torch.from_numpy(epoch_order(everything, config.seed, epoch)).to(images.device)
        for number, rows in enumerate(order.split(config.optim.batch_size)[:steps], start=epoch * steps):
            views = draw_choices(rows, len(offsets), config.seed, epoch, "view")
            x = apply_views(images[rows], offsets[views]).float() / LEVELS
            generator = RowRng.create(config.seed, "inner", epoch, rows=rows)
            loss = outer_loss(teacher, x, labels[rows], config, generator)
            descend(loss, teacher, optimizer, config.optim, number / total)
            value = float(loss.detach())
            check_finite(value, epoch + 1)
            on_step(number + 1, total, len(rows), value)


def outer_loss(model: nn.Module, x: Tensor, y: Tensor, config: TeachConfig, generator: RowRng) -> Tensor:
    """The training loss of one batch; examples are crafted in eval mode, the loss is taken in train mode."""
    if config.algorithm == "standard":
        return F.cross_entropy(model.train()(x), y)
    model.eval()
    x_adv = craft(model, x, y, config, generator)
    model.train()
    if config.algorithm == "trades":
        clean = model(x)
        return F.cross_entropy(clean, y) + config.beta * kl_rows(clean, model(x_adv)).mean()
    return F.cross_entropy(model(x_adv), y)


def craft(model: nn.Module, x: Tensor, y: Tensor, config: TeachConfig, generator: RowRng) -> Tensor:
    """The algorithm's adversarial examples.

    TRADES maximises the KL divergence from the clean prediction; it starts here from whole levels in the ball where
    the paper starts from small Gaussian noise. FAT stops each example `tau` steps after it is misclassified first.
    """
    threat, clean = config.pgd().threat, to_levels(x)
    start = threat.random_start(x.shape, generator)
    if config.algorithm == "fat":
        return (clean + _friendly(model, x, y, start, config)) / LEVELS
    if config.algorithm == "trades":
        with torch.no_grad():
            reference = model(x)
        delta = ascend(
            lambda z: kl_rows(reference, model(z)), x, start, threat=threat, step=config.step, steps=config.steps
        )
    else:
        delta = ascend(
            lambda z: cross_entropy(model(z), y), x, start, threat=threat, step=config.step, steps=config.steps
        )
    return (clean + delta) / LEVELS


def _friendly(model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, config: TeachConfig) -> Tensor:
    threat, clean = config.pgd().threat, to_levels(x)
    delta = (clean + delta).clamp(0, LEVELS) - clean
    left = torch.full_like(y, config.tau)
    going = torch.arange(len(y), device=y.device)
    for _ in range(config.steps):
        wrong = _answers(model, (clean + delta)[going]) != y[going]
        keep = ~wrong | (left[going] > 0)
        left[going] -= wrong.long()
        going = going[keep]
        if not len(going):
            break
        levels = (clean + delta)[going]
        gradient = input_gradient(partial(_loss, model, y[going]), levels / LEVELS)
        moved = threat.project(delta[going] + config.step * threat.direction(gradient))
        delta[going] = (clean[going] + moved).clamp(0, LEVELS) - clean[going]
    return delta


def _loss(model: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


@torch.no_grad()
def _answers(model: nn.Module, levels: Tensor) -> Tensor:
    answers: Tensor = model(levels / LEVELS).argmax(1)
    return answers


def save(folder: Path, teacher: Teacher, card: Card) -> Card:
    """Write a freshly trained teacher's folder.

    Raises:
        CacheError: the folder is not empty.
    """
    check_free(folder)
    return save_teacher(folder, teacher.net, card)


def check_free(folder: Path) -> None:
    """Raise CacheError when `folder` already holds something, before hours go into training what cannot be saved."""
    if not is_free(folder):
        raise CacheError(f"{folder} is not empty: choose a new or empty --out folder")
