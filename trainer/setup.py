"""What a run needs before its first step, and what it says about itself: checks, identity, student, held-out rows."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import darht
from darht.attacks import PGD, Engine
from darht.cache.reader import Cache
from darht.cache.source import Source
from darht.cache.stream import Feed, FeedPlan, plan_feed
from darht.cache.teachers import Preprocessing, Teacher, load_teacher
from darht.core.config import fingerprint, to_plain
from darht.core.errors import ConfigError, DarhtError, ModelError
from darht.core.nets import check_pixels
from darht.core.nets.layout import to_channels_last
from darht.core.places import LocalPlace, Place
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.checkpoint import StudentCard
from darht.trainer.config import TrainConfig
from darht.trainer.losses import AdaAd, Darht
from darht.trainer.ranks import Ranks
from darht.trainer.student import Student, check_folds

_SCORED = 1000  # images on the device at once
_HEAD_EPOCHS = 30  # the released schedule has 118
CALMER = "lower optim.lr, or set optim.clip_norm or optim.warmup"


def feed_plan(config: TrainConfig, cache: Cache, device: torch.device, memory_gib: float) -> FeedPlan:
    """Where the rows of the cache will be while this recipe trains.

    Raises:
        ConfigError: the budget is too small even to stream them.
    """
    starts = config.inner.kind == "warm" and config.inner.warm.start == "cached"
    return plan_feed(
        cache,
        device=device,
        adversarial=config.inner.kind == "cached" or config.targets == "nearest" or starts,
        jacobians=config.targets == "first-order",
        batch=config.optim.batch_size,
        budget_gib=memory_gib,
    )


def check_recipe(config: TrainConfig, cache: Cache) -> None:
    """Raise ConfigError where the recipe asks for what the cache does not hold."""
    problems = [*_missing_parts(config, cache), *_missing_teachers(config, cache)]
    if problems:
        raise ConfigError("; ".join(problems))


def _missing_parts(config: TrainConfig, cache: Cache) -> Iterator[str]:
    attacks, inner = cache.spec.attacks, config.inner
    without = f"{cache.folder} has no attacks"
    if inner.kind == "cached" and not attacks:
        yield f"inner: cached needs stored perturbations, {without}; use inner.kind: pgd"
    if inner.kind == "warm" and inner.warm.start == "cached" and not attacks:
        yield f"inner.warm.start: cached needs stored perturbations, {without}; use start: noise"
    if config.targets == "nearest" and not attacks:
        yield f"targets: nearest needs stored answers, {without}; use targets: clean"
    lacking = [name for name in cache.spec.teachers if name not in cache.spec.jacobians]
    if config.targets == "first-order" and lacking:
        yield (
            f"targets: first-order needs the Jacobian of every teacher, {cache.folder} lacks {', '.join(lacking)}; "
            "list them under 'jacobians' and run darht-cache extend, or use targets: clean"
        )
    recipe, answers = config.objective(), (config.teachers, config.targets)
    if isinstance(recipe, AdaAd) and recipe.igdm and answers not in (("live", None), ("cached", "first-order")):
        yield (
            "loss.igdm compares what teachers say at x' and at its mirror image, which quoted answers do not tell "
            "apart; use targets: first-order or teachers: live, or igdm: 0"
        )
    others = {attack.parameters["eps"] for attack in attacks.values()} - {inner.eps}
    if inner.kind == "cached" and others:
        stored = ", ".join(f"{eps:g}" for eps in sorted(others))
        yield f"inner.eps is {inner.eps:g}, attacks of the cache have {stored}; set inner.eps to theirs"


def _missing_teachers(config: TrainConfig, cache: Cache) -> Iterator[str]:
    roles, recipe = {teacher.role for teacher in cache.spec.teachers.values()}, config.objective()
    only_clean = isinstance(recipe, Darht) and recipe.clean_share == 1
    wants_robust = recipe.listens in ("robust", "both") or (recipe.listens == "any" and recipe.examples != "never")
    if wants_robust and not only_clean and "robust" not in roles:
        yield (
            f"recipe {config.recipe} needs a robust teacher on adversarial images; those of {cache.folder} are all "
            "vanilla"
        )
    if recipe.listens == "both" and "vanilla" not in roles:
        yield (
            f"recipe {config.recipe} needs a teacher whose role is vanilla on clean images; those of {cache.folder} "
            "are all robust"
        )


def short_phases(config: TrainConfig) -> str | None:
    """A sentence for a run of `darht` that leaves its head, which only CE reaches, after a few epochs."""
    recipe, epochs = config.objective(), config.optim.epochs
    if not isinstance(recipe, Darht) or recipe.phases[1] >= 0.5 or recipe.phases[1] * epochs >= _HEAD_EPOCHS:
        return None
    trained = recipe.phases[1] * epochs
    return (
        f"the head is trained in the first {trained:.1f} of {epochs} epochs only; short runs do better with "
        "loss.phases: [0.1, 0.8]"
    )


def check_parts(student: Student, config: TrainConfig, rows: int, ranks: Ranks) -> None:
    """Raise ConfigError where a batch of `rows` to train on is cut too small for the processes or for batch norm."""
    batch, parts = min(config.optim.batch_size, rows), ranks.world * config.compute.accumulate
    if batch < ranks.world:
        raise ConfigError(f"batches of {batch} rows do not reach for {ranks.world} processes: raise optim.batch_size")
    normed = any(isinstance(module, _BatchNorm) for module in student.modules())
    if normed and max(1, batch // parts) < 2:
        raise ConfigError(
            f"batch norm takes statistics over at least 2 rows; batches of {batch} in {parts} parts leave 1: raise "
            "optim.batch_size, or lower compute.accumulate"
        )


def run_identity(config: TrainConfig, cache: Cache, plan: FeedPlan) -> dict[str, Any]:
    """What makes two runs the same: recipe, cache, code version, rows left out and, when streamed, how many meet."""
    left_out = {"excluded_rows": fingerprint(cache.excluded)} if cache.excluded else {}
    streamed = {"window_rows": plan.window_rows} if plan.kind == "streamed" else {}
    recipe = to_plain(config) | {"loss": to_plain(config.objective())}
    return {"recipe": recipe, "cache_root_hash": cache.root_hash, "darht": darht.__version__, **left_out, **streamed}


def cache_from(folder: Place, out: Path) -> str:
    """Where the cache lies: relative to the run, so that both can be moved together, or its URL."""
    if isinstance(folder, LocalPlace):
        return os.path.relpath(folder.folder.resolve(), out.resolve())
    return str(folder)


def make_student(config: TrainConfig, feed: Feed, classes: tuple[str, ...]) -> Student:
    """The untrained student on the feed's device; its weights follow from the seed.

    Raises:
        ConfigError, ModelError: the architecture is unknown, or does not take images of this size.
    """
    with borrowed_generator(config.seed, "student"):
        student = Student(
            config.student.arch,
            config.student.kwargs,
            teachers=len(feed.cache.spec.teachers) if config.student.feature_map else 0,
            num_classes=len(classes),
            preprocessing=normalisation(feed.pixel_counts()),
            dropout=config.student.dropout(),
        ).to(feed.plan.device)
        pixels = feed.fetch(feed.training[:2])[0].to(feed.plan.device)
        check_pixels(student, pixels, config.student.arch)
        check_folds(student, pixels.float() / 255)
        if config.compute.channels_last:
            to_channels_last(student, pixels.float() / 255)
    return student


def normalisation(counts: Tensor) -> Preprocessing:
    """Mean and standard deviation per channel, to four digits, in units of [0, 1].

    Args:
        counts: how often each level occurs, `[3, 256]`; see `stream.level_counts`.
    """
    counts = counts.double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt().clamp(min=1e-2)
    return Preprocessing(mean=tuple(round(v, 4) for v in mean.tolist()), std=tuple(round(v, 4) for v in std.tolist()))


def holdout_source(feed: Feed) -> Source:
    """The rows held out of the training split, in memory for the whole run."""
    images, labels = feed.fetch(feed.holdout)
    return Source("holdout", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def watched_source(feed: Feed, config: TrainConfig) -> Source:
    """The first rows to train on, of which `inner: warm` is checked for collapse; none for other modes."""
    rows = config.inner.warm.check_rows if config.inner.kind == "warm" else 0
    images, labels = feed.fetch(feed.training[:rows])
    return Source("training", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def score(student: Student, source: Source, attack: PGD, device: torch.device, seed: int) -> tuple[float, float]:
    """Clean accuracy and accuracy under `attack` in per cent of a student on a source that is not empty.

    Images leave the attack as soon as they are misclassified, and the folded student is asked: selection is to cost
    little beside training.

    Raises:
        DarhtError: the student has diverged.
    """
    lanes = 1 if student.dropout.p else None  # what draws at inference needs an order
    engine = Engine(slots=256 if device.type == "cuda" else 64, lanes=lanes)
    images, labels, net = torch.from_numpy(source.images), torch.from_numpy(source.labels), student.fold().eval()
    clean = robust = 0
    try:
        with borrowed_generator(seed, "holdout"):
            for rows in torch.arange(len(labels)).split(_SCORED):
                x, y = images[rows].to(device).float() / 255, labels[rows].to(device)
                generator = RowRng.create(seed, "evaluate", rows=rows.to(device))
                outcome = engine.run(attack, net, x, y, generator=generator)
                clean += int(outcome.clean_correct.sum())
                robust += int(outcome.robust.sum())
    except ModelError as error:  # it took every batch before: only its numbers can have gone
        raise DarhtError(f"the student diverged ({error}): {CALMER}") from error
    return round(100 * clean / len(labels), 3), round(100 * robust / len(labels), 3)


def live_teachers(
    config: TrainConfig, cache: Cache, given: Mapping[str, Path], device: torch.device
) -> tuple[Teacher, ...]:
    """The cache's teachers in its order, loaded when the recipe asks them; `given` overrides where their folders lie.

    Raises:
        ConfigError: a folder is not known or not wanted, or its weights are not those that the cache was made with.
        ModelError: a folder holds no teacher.
    """
    unknown = [name for name in given if name not in cache.spec.teachers]
    if unknown:
        raise ConfigError(f"the cache has no teacher {', '.join(unknown)}; it has {', '.join(cache.spec.teachers)}")
    if config.teachers == "cached":
        if given:
            raise ConfigError("--teacher says where live teachers lie; set teachers: live, or leave it out")
        return ()
    folders = {name: Path(folder) for name, folder in cache.origin().get("teachers", {}).items()} | dict(given)
    teachers = []
    for name, spec in cache.spec.teachers.items():
        if name not in folders:
            raise ConfigError(f"teachers: live needs the folder of teacher '{name}'; give --teacher {name}=FOLDER")
        teacher, card = load_teacher(folders[name], device)
        if card.weights_sha256 != spec.weights_sha256:
            raise ConfigError(
                f"{folders[name]} holds weights {card.weights_sha256[:12]}, teacher '{name}' of the cache has "
                f"{spec.weights_sha256[:12]}; give --teacher {name}=FOLDER"
            )
        if config.compute.channels_last:
            pixels = torch.linspace(0, 1, 2 * int(np.prod(cache.spec.data.image_shape)), device=device)
            to_channels_last(teacher, pixels.view(2, *cache.spec.data.image_shape))
        teachers.append(teacher)
    return tuple(teachers)


def student_card(config: TrainConfig, cache: Cache, student: Student, row: dict[str, Any]) -> StudentCard:
    """What is written beside a student's weights after the epoch of `row`."""
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
        image_size=cache.spec.data.image_shape[-2:],
        mc_dropout=student.dropout.p,
        mc_samples=student.dropout.samples,
    )
