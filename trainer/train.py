"""Train a student from a sealed cache. No teacher is loaded; what they said is looked up."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import darht
from darht.cache.loader import TrainingSet, load_training_set
from darht.cache.reader import Cache
from darht.cache.sampler import epoch_order
from darht.cache.source import Source
from darht.cache.teachers import Preprocessing
from darht.core.config import fingerprint, to_plain
from darht.core.errors import ConfigError, DarhtError, ModelError
from darht.core.places import LocalPlace, Place
from darht.core.rng import borrowed_generator
from darht.trainer.checkpoint import (
    BEST,
    LAST,
    Progress,
    StudentCard,
    claim_run,
    load_checkpoint,
    save_checkpoint,
    save_student,
    write_log,
    write_run,
)
from darht.trainer.config import TrainConfig
from darht.trainer.evaluate import AttackOn, correct_rows
from darht.trainer.inner import draw_step
from darht.trainer.losses import RECIPES
from darht.trainer.schedule import descend, learning_rate, make_optimizer
from darht.trainer.student import Student

_CALMER = "lower optim.lr, or set optim.clip_norm or optim.warmup"
OnStep = Callable[[int, int, int], None]
OnEpoch = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,
    cache: Cache,
    out: Path,
    *,
    device: torch.device,
    memory_gib: float = 8.0,
    resume: bool = False,
    on_step: OnStep = lambda step, total, images: None,
    on_epoch: OnEpoch = lambda row: None,
) -> Progress:
    """Train the student that `config` describes and leave it in `out`.

    Args:
        config: the recipe.
        cache: a sealed cache.
        out: the run's folder: `student/` (best on held-out rows), `last/`, `log.csv`, `log.jsonl`, `checkpoint.pt`.
        device: where to train.
        memory_gib: the most that the cache may take in memory.
        resume: go on with a run that was stopped; it ends with the bits of an uninterrupted one.
        on_step: told step, steps in all, and images, after each step.
        on_epoch: told the log's row after each epoch.

    Raises:
        ConfigError, ModelError: recipe and cache do not go together, or the network and the images.
        CacheError: the folder cannot be used as asked.
    """
    check_recipe(config, cache)
    identity = run_identity(config, cache)
    claim_run(out, identity, resume=resume)
    data = load_training_set(cache, device=device, adversarial=config.inner.kind == "cached", budget_gib=memory_gib)
    student = make_student(config, data, cache.spec.data.classes)
    optimizer = make_optimizer(student, config.optim)
    progress = load_checkpoint(out, student, optimizer)
    write_run(out, identity, {"cache": _cache_from(cache.folder, out)})
    steps = max(1, len(data.training) // config.optim.batch_size)
    total = steps * config.optim.epochs
    while progress.epoch < config.optim.epochs:
        start, losses, epoch = time.perf_counter(), [], progress.epoch
        student.train()
        with borrowed_generator(config.seed, "dropout", epoch):
            for number, rows in enumerate(_batches(data, config, epoch, steps), start=epoch * steps):
                done = number / total
                step = draw_step(student, data, rows, config, epoch=epoch, number=number, done=done)
                loss = RECIPES[config.recipe].loss(student, step, config)
                descend(loss, student, optimizer, config.optim, done)
                losses.append(loss.detach())
                on_step(number + 1, total, len(rows))
        seconds, mean = time.perf_counter() - start, float(torch.stack(losses).mean())
        check_finite(mean, epoch + 1)
        row = {
            "epoch": epoch + 1,
            "loss": round(mean, 6),
            **score_holdout(student, data, config, device),
            "lr": round(learning_rate(config.optim, done), 8),
            "images_per_second": round(steps * len(rows) / seconds, 1),
            "seconds": round(seconds, 3),
        }
        save_epoch(out, student, optimizer, progress, row=row, card=_card(config, cache, student, row))
        on_epoch(row)
    return progress


def check_recipe(config: TrainConfig, cache: Cache) -> None:
    """Raise ConfigError where the recipe asks for what the cache does not hold."""
    attacks, problems = cache.spec.attacks, []
    if config.inner.kind == "cached" and not attacks:
        problems.append(f"inner: cached needs stored perturbations, {cache.folder} has no attacks; use inner: pgd")
    others = {attack.parameters["eps"] for attack in attacks.values()} - {config.inner.eps}
    if config.inner.kind == "cached" and others:
        stored = ", ".join(f"{eps:g}" for eps in sorted(others))
        problems.append(
            f"inner.eps is {config.inner.eps:g}, attacks of the cache have {stored}; set inner.eps to theirs"
        )
    robust = any(teacher.role == "robust" for teacher in cache.spec.teachers.values())
    listens = config.recipe == "rslad" or (config.recipe == "darht" and config.clean_share < 1)
    if listens and not robust:
        problems.append(
            f"recipe {config.recipe} needs a robust teacher on adversarial images; those of {cache.folder} are all "
            "vanilla"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def check_finite(loss: float, epoch: int) -> None:
    """Raise DarhtError when a run has diverged: nothing that comes after would be worth its time."""
    if not math.isfinite(loss):
        raise DarhtError(f"the loss is {loss} in epoch {epoch}: {_CALMER}")


def run_identity(config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """What makes two runs the same: recipe, cache, rows left out, and code version."""
    left_out = {"excluded_rows": fingerprint(cache.excluded)} if cache.excluded else {}
    return {"recipe": to_plain(config), "cache_root_hash": cache.root_hash, **left_out, "darht": darht.__version__}


def _cache_from(folder: Place, out: Path) -> str:
    """Where the cache lies: relative to the run, so that both can be moved together, or its URL."""
    if isinstance(folder, LocalPlace):
        return os.path.relpath(folder.folder.resolve(), out.resolve())
    return str(folder)


def make_student(config: TrainConfig, data: TrainingSet, classes: tuple[str, ...]) -> Student:
    """The untrained student on the data's device; its weights follow from the seed.

    Raises:
        ConfigError, ModelError: the architecture is unknown, or does not take images of this size.
    """
    with borrowed_generator(config.seed, "student"):
        student = Student(
            config.student.arch,
            config.student.kwargs,
            teachers=len(data.teachers) if config.student.feature_map else 0,
            num_classes=len(classes),
            preprocessing=normalisation(data.images[torch.from_numpy(data.training)]),
        ).to(data.images.device)
    check_pixels(student, data.images, config.student.arch)
    return student


def check_pixels(model: nn.Module, images: Tensor, arch: str) -> None:
    """Ask a network about one image of uint8 `[N, 3, H, W]`, so that a size that it refuses is a message, not a crash.

    Raises:
        ModelError: the network does not take images of this size.
    """
    was_training, (H, W) = model.training, images.shape[2:]
    try:
        with torch.no_grad():
            model.eval()(images[:1].float() / 255)
    except Exception as error:  # timm asserts, torch raises what it likes: whatever the network says is the answer
        reason = " ".join(str(error).split())
        raise ModelError(f"{arch} does not take images of {W}x{H} pixels ({reason}); change its kwargs") from error
    finally:
        model.train(was_training)


def normalisation(images: Tensor) -> Preprocessing:
    """Mean and standard deviation per channel of uint8 images `[N, 3, H, W]`, to four digits, in units of [0, 1].

    They come from counts of the 256 levels: images as floats would take eight times the cache's memory.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares, levels = (counts / counts.sum(1, keepdim=True)).cpu(), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-2)
    return Preprocessing(mean=tuple(round(v, 4) for v in mean.tolist()), std=tuple(round(v, 4) for v in std.tolist()))


def _batches(data: TrainingSet, config: TrainConfig, epoch: int, steps: int) -> list[Tensor]:
    """This epoch's batches; rows beyond the last whole batch wait for another epoch's order."""
    order = torch.from_numpy(epoch_order(data.training, config.seed, epoch)).to(data.images.device)
    return list(order.split(config.optim.batch_size)[:steps])


def score_holdout(student: Student, data: TrainingSet, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Clean and PGD accuracy in per cent on the rows held out of the training split; empty when there are none."""
    if not len(data.holdout):
        return {}
    held = Source(
        name="holdout",
        split="train",
        images=data.images[torch.from_numpy(data.holdout)].cpu().numpy(),
        labels=data.labels[torch.from_numpy(data.holdout)].cpu().numpy(),
        classes=(),
        sha256="",
    )
    was_training = student.training
    student.eval()
    try:
        clean = correct_rows(lambda x: student(x).logits, held, None, device=device)
        attack = AttackOn(config.inner.pgd())
        robust = correct_rows(lambda x: student(x).logits, held, attack, device=device, seed=config.seed)
    except ModelError as error:  # it took every batch before: only its numbers can have gone
        raise DarhtError(f"the student diverged ({error}): {_CALMER}") from error
    finally:
        student.train(was_training)
    return {"holdout_clean": _per_cent(clean), "holdout_pgd": _per_cent(clean & robust)}


def _per_cent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 3)


def _card(config: TrainConfig, cache: Cache, student: Student, row: dict[str, Any]) -> StudentCard:
    return StudentCard(
        arch=student.arch,
        kwargs=student.kwargs,
        teachers=tuple(cache.spec.teachers) if config.student.feature_map else (),
        num_classes=student.num_classes,
        preprocessing=student.preprocessing,
        classes=cache.spec.data.classes,
        cache_root_hash=cache.root_hash,
        recipe=to_plain(config),
        epoch=row["epoch"],
        selection={key: value for key, value in row.items() if key.startswith("holdout")},
    )


def save_epoch(
    out: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    row: dict[str, Any],
    card: StudentCard,
) -> None:
    """Keep best and last and then the checkpoint, so that whatever a kill leaves is consistent or made again."""
    score = row.get("holdout_pgd", float(row["epoch"]))  # with nothing held out the last epoch is the best
    save_student(out / LAST, student, card)
    if score >= progress.best:
        save_student(out / BEST, student, card)
    progress.epoch, progress.best = row["epoch"], max(score, progress.best)
    progress.history.append(row)
    write_log(out, progress.history)
    save_checkpoint(out, student, optimizer, progress)
