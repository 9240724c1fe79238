"""Train a teacher: `standard`, `pgd-at`, `trades` or `fat`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.attacks.objectives import cross_entropy, input_gradient
from darht.attacks.pgd import ascend, climb
from darht.attacks.threat import LEVELS, to_levels
from darht.cache.builder.teachers import Card, is_teacher_folder, load_teacher, read_card
from darht.cache.format.apply_views import apply_views
from darht.cache.format.views import check_padding, crop_flip_offsets
from darht.cache.read.sampler import draw_choices, epoch_order
from darht.cache.read.stream import level_counts
from darht.cache.sources.load import Source
from darht.core.config import canonical_json, spec_diff, to_plain
from darht.core.device import keep_memory
from darht.core.errors import CacheError, ConfigError, SpecMismatchError
from darht.core.files import is_free
from darht.core.nets import build, check_pixels
from darht.core.nets.classifier import Classifier
from darht.core.nets.compiled import Compiled
from darht.core.nets.layout import to_channels_last, to_contiguous
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng, borrowed_generator
from darht.core.tensors import load_tensors, save_tensors
from darht.core.trust import trusting
from darht.core.version import VERSION
from darht.trainer.progress.metrics import LossReader
from darht.trainer.schedule import descend, make_optimizer
from darht.trainer.state.checkpoint import CHECKPOINT
from darht.trainer.state.pause import Pause
from darht.trainer.student.distances import kl_rows
from darht.trainer.student.distributed import rank_and_world
from darht.trainer.student.setup import normalisation
from darht.trainer.student.train import check_finite
from darht.trainer.teacher.config import TeachConfig

OnStep = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Checkpoints:
    """Keeps a training that is under way.

    Attributes:
        path: of the file; None to keep nothing.
        identity: of the training, as plain data.
    """

    path: Path | None
    identity: dict[str, Any]

    def save(self, teacher: Classifier, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Keep what the step after these depends on, in one atomic file."""
        if self.path is not None:
            state = {"identity": self.identity, "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
            save_tensors(self.path, state | {"pause": vars(Pause.here(steps))})

    def load(self, teacher: Classifier, optimizer: torch.optim.Optimizer) -> int:
        """Go on where the file stands, if there is one; the steps that are done.

        Raises:
            CacheError: it is damaged.
            SpecMismatchError: it keeps another training.
        """
        if self.path is None or not self.path.is_file():
            return 0
        state = load_tensors(self.path)
        differences = spec_diff(state["identity"], self.identity)
        if differences:
            where = self.path.parent
            raise SpecMismatchError(
                f"{where} holds another training: {'; '.join(differences)}; choose another --out folder"
            )
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        pause = Pause.read(state["pause"])
        pause.set_generators()
        return pause.steps


def teach(
    config: TeachConfig,
    source: Source,
    arch: str,
    kwargs: dict[str, Any],
    *,
    resize: int | None = None,
    device: torch.device,
    checkpoint: Path | None = None,
    on_step: OnStep = lambda step, total, images, loss: None,
) -> tuple[Classifier, Card]:
    """Train a network on a source and describe it.

    Args:
        config: algorithm and schedule.
        source: the training split.
        arch: as `darht.core.nets.build` takes it.
        kwargs: of the architecture.
        resize: side in pixels that the network wants; None for the source's.
        device: where to train.
        checkpoint: a file that is written after every epoch, and after the step at which `on_step` raises
            KeyboardInterrupt; where it lies already training goes on from it, to the bits of one that never stopped.
        on_step: told step, steps in all, images and loss after each step.

    Returns:
        The teacher in eval mode, and its card without weights hash and accuracies.

    Raises:
        ConfigError, ModelError: the architecture is unknown, or does not take images of this size; a batch is larger
            than the source, or a crop may lie outside of its images.
        SpecMismatchError: `checkpoint` keeps another training.
    """
    config.optim.check_rows(len(source.images))
    check_padding(config.padding, source.images.shape[1:])
    card = expected_card(config, source, arch, kwargs, resize=resize)
    images = torch.from_numpy(source.images).to(device)
    labels = torch.from_numpy(source.labels).to(device)
    identity = {**_plain(card), "darht": VERSION}
    with borrowed_generator(config.seed, "teacher"):
        teacher = Classifier(build(arch, len(source.classes), kwargs), card.preprocessing).to(device)
        check_pixels(teacher, images, arch)
        to_channels_last(teacher, images[:2].float() / LEVELS)
        keep_memory()
        _fit(teacher, config, (images, labels), checkpoints=Checkpoints(checkpoint, identity), on_step=on_step)
    to_contiguous(teacher)
    return teacher.eval().requires_grad_(False), card


def expected_card(
    config: TeachConfig, source: Source, arch: str, kwargs: dict[str, Any], *, resize: int | None = None
) -> Card:
    """What is known of a teacher before its training: all but weights hash and accuracies."""
    norm = normalisation(level_counts(torch.from_numpy(source.images)))
    return Card(
        arch=arch,
        kwargs=kwargs,
        num_classes=len(source.classes),
        preprocessing=Preprocessing(resize=resize, mean=norm.mean, std=norm.std),
        training=to_plain(config),
        data={"source": source.name, "split": source.split, "rows": len(source.images), "sha256": source.sha256},
        weights_sha256="",
        classes=source.classes,
    )


def _plain(card: Card) -> dict[str, Any]:
    """A card as plain data, without what only a finished training knows; the data's hash covers the class names."""
    plain = cast(dict[str, Any], json.loads(canonical_json(replace(card, weights_sha256="", accuracy={}))))
    return {key: value for key, value in plain.items() if key != "classes"}


def is_finished(folder: Path, expected: Card) -> bool:
    """Whether `folder` holds the teacher that the training of `expected` makes, whole and measured.

    Raises:
        SpecMismatchError: it holds another teacher.
        ModelError: its weights are not those of its card.
    """
    if (folder / CHECKPOINT).is_file() or not is_teacher_folder(folder):
        return False
    differences = spec_diff(_plain(read_card(folder)), _plain(expected))
    if differences:
        raise SpecMismatchError(
            f"{folder} holds another teacher: {'; '.join(differences)}; choose another --out folder"
        )
    with trusting():  # its card names what was asked for
        load_teacher(folder, torch.device("cpu"))
    return True


def _fit(
    teacher: Classifier, config: TeachConfig, data: tuple[Tensor, Tensor], *, checkpoints: Checkpoints, on_step: OnStep
) -> None:
    images, labels = data
    optimizer = make_optimizer(teacher, config.optim)
    offsets = torch.from_numpy(crop_flip_offsets(config.padding, flip=config.flip)).to(images.device)
    forward = Compiled(teacher) if config.compile else teacher
    steps = max(1, len(images) // config.optim.batch_size)
    total, losses = steps * config.optim.epochs, LossReader()
    for step, epoch, rows in _batches(labels, config, steps, start=checkpoints.load(teacher, optimizer)):
        views = draw_choices(rows, len(offsets), config.seed, epoch, "view")
        x = apply_views(images[rows], offsets[views]).float() / LEVELS
        generator = RowRng.create(config.seed, "inner", epoch, rows=rows)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = outer_loss(forward, x, labels[rows], config, generator)
        descend(loss, teacher, optimizer, config.optim, step / total)
        value = losses.read(loss.detach(), at_once=(step + 1) % steps == 0)  # before the epoch's checkpoint
        check_finite(value, epoch + 1)
        if (step + 1) % steps == 0:
            checkpoints.save(teacher, optimizer, step + 1)
        try:
            on_step(step + 1, total, len(rows), value)
        except KeyboardInterrupt:
            checkpoints.save(teacher, optimizer, step + 1)
            raise


def _batches(labels: Tensor, config: TeachConfig, steps: int, *, start: int) -> Iterator[tuple[int, int, Tensor]]:
    """Step, epoch and rows of every batch from step `start` on."""
    everything = torch.arange(len(labels)).numpy()
    for epoch in range(start // steps, config.optim.epochs):
        order = torch.from_numpy(epoch_order(everything, config.seed, epoch)).to(labels.device)
        for number, rows in enumerate(order.split(config.optim.batch_size)[:steps], start=epoch * steps):
            if number >= start:
                yield number, epoch, rows


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
    """FAT's perturbation in levels; on a CPU rows that have stopped cost nothing, elsewhere shapes stay as they are."""
    threat, clean = config.pgd().threat, to_levels(x)
    delta = (clean + delta).clamp(0, LEVELS) - clean
    if x.device.type != "cpu":
        return _friendly_in_one_shape(model, clean, y, delta, config)
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


def _friendly_in_one_shape(model: nn.Module, clean: Tensor, y: Tensor, delta: Tensor, config: TeachConfig) -> Tensor:
    """The same with every row in every step, so that a GPU is not asked how many are left; all in levels."""
    threat, left, going = config.pgd().threat, torch.full_like(y, config.tau), torch.ones_like(y, dtype=torch.bool)
    for _ in range(config.steps):
        wrong = (_answers(model, clean + delta) != y) & going
        going = going & (~wrong | (left > 0))
        left = left - wrong.long()
        gradient = input_gradient(partial(_loss, model, y), (clean + delta) / LEVELS)
        moved = climb(clean, delta, threat.direction(gradient), threat=threat, step=config.step)
        delta = torch.where(going[:, None, None, None], moved, delta)
    return delta


def _loss(model: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


@torch.no_grad()
def _answers(model: nn.Module, levels: Tensor) -> Tensor:
    answers: Tensor = model(levels / LEVELS).argmax(1)
    return answers


def check_free(folder: Path, *, resume: bool = False) -> None:
    """See that a teacher may be trained into `folder`, before hours go into it.

    Raises:
        CacheError: it is not empty and holds no training that was stopped or is finished, or `resume` is False.
        ConfigError: `torchrun` has started several processes, who would all train the same.
    """
    if (world := rank_and_world()[1]) > 1:
        raise ConfigError(f"a teacher is trained by one process and torchrun has started {world}: start it without")
    if (folder / CHECKPOINT).is_file():
        if not resume:
            raise CacheError(
                f"{folder} holds a training that was stopped: darht-teacher train --resume goes on with it; or choose "
                "another --out folder"
            )
    elif not (is_free(folder) or (resume and is_teacher_folder(folder))):
        raise CacheError(f"{folder} is not empty: choose a new or empty --out folder")
