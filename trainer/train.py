"""Train a student from a sealed cache. Unless `teachers: live`, none is loaded; what they said is looked up."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darht.cache.reader import Cache
from darht.cache.source import Source
from darht.cache.stream import Feed
from darht.core.errors import DarhtError
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
from darht.trainer.inner import Examples
from darht.trainer.schedule import descend, learning_rate, make_optimizer
from darht.trainer.setup import (
    CALMER,
    cache_from,
    check_recipe,
    feed_plan,
    holdout_source,
    live_teachers,
    make_student,
    run_identity,
    score,
    student_card,
    watched_source,
)
from darht.trainer.step import Learned
from darht.trainer.student import Student
from darht.trainer.warm import WarmMemory

OnStep = Callable[[int, int, int], None]
OnEpoch = Callable[[dict[str, Any]], None]
OnNote = Callable[[str], None]


@dataclass(eq=False)
class Run:
    """Everything that changes while a student is trained, and so everything that its checkpoint holds.

    Attributes:
        student: trained.
        optimizer: of its parameters.
        memory: of `inner: warm`.
        learned: what the recipe carries from step to step.
        progress: finished epochs and their log.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    memory: WarmMemory | None
    learned: Learned = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def save(self, out: Path) -> None:
        """Write the checkpoint."""
        memory = None if self.memory is None else self.memory.state()
        save_checkpoint(out, self.student, self.optimizer, self.progress, {"memory": memory, "learned": self.learned})

    def load(self, out: Path) -> None:
        """Go on where the checkpoint stands, if there is one."""
        self.progress, more = load_checkpoint(out, self.student, self.optimizer)
        device = next(self.student.parameters()).device
        self.learned = {name: value.to(device) for name, value in more.get("learned", {}).items()}
        if self.memory is not None and more:
            self.memory.load(more["memory"])


def train(
    config: TrainConfig,
    cache: Cache,
    out: Path,
    *,
    device: torch.device,
    memory_gib: float = 8.0,
    resume: bool = False,
    teachers: Mapping[str, Path] | None = None,
    on_step: OnStep = lambda step, total, images: None,
    on_epoch: OnEpoch = lambda row: None,
    on_note: OnNote = lambda text: None,
) -> Progress:
    """Train the student that `config` describes and leave it in `out`.

    Args:
        config: the recipe.
        cache: a sealed cache.
        out: the run's folder: `student/` (best on held-out rows), `last/`, `log.csv`, `log.jsonl`, `checkpoint.pt`.
        device: where to train.
        memory_gib: the most that the cache may take in memory; a larger one is streamed.
        resume: go on with a run that was stopped; it ends with the bits of an uninterrupted one.
        teachers: for `teachers: live`, folders by name where they are not those that the cache remembers.
        on_step: told step, steps in all, and images, after each step.
        on_epoch: told the log's row after each epoch.
        on_note: told what a person should know, a sentence at a time.

    Raises:
        ConfigError, ModelError: recipe and cache do not go together, or the network and the images.
        CacheError: the folder cannot be used as asked.
    """
    check_recipe(config, cache)
    plan, live = feed_plan(config, cache, device, memory_gib), live_teachers(config, cache, teachers or {}, device)
    identity = run_identity(config, cache, plan)
    claim_run(out, identity, resume=resume)
    on_note(str(plan))
    with Feed(cache, plan, seed=config.seed, epochs=config.optim.epochs) as feed:
        run = _start(config, cache, feed)
        held, watched = holdout_source(feed), watched_source(feed, config)
        examples = Examples(config, config.objective(), run.memory, live)
        run.load(out)
        write_run(out, identity, {"cache": cache_from(cache.folder, out), "feed": str(plan)})
        while run.progress.epoch < config.optim.epochs:
            row = _epoch(run, examples, feed, on_step=on_step)
            row |= _scores(run.student, held, watched, config, device)
            if _collapsed(row, run.progress, len(cache.spec.data.classes)):
                on_note(_go_back(run, out, row))
                continue
            save_epoch(out, run, row=row, card=student_card(config, cache, run.student, row))
            on_epoch(row)
    return run.progress


def _start(config: TrainConfig, cache: Cache, feed: Feed) -> Run:
    student, memory = make_student(config, feed, cache.spec.data.classes), None
    if config.inner.kind == "warm":
        offsets = torch.from_numpy(cache.read("views/offset"))
        memory = WarmMemory.create(cache.rows, cache.spec.data.image_shape, offsets, feed.plan.device)
    return Run(student, make_optimizer(student, config.optim), memory)


def _epoch(run: Run, examples: Examples, feed: Feed, *, on_step: OnStep) -> dict[str, Any]:
    """One pass over the rows to train on; the first part of its row in the log."""
    config, recipe, epoch = examples.config, examples.recipe, run.progress.epoch
    start, losses, images, total = time.perf_counter(), [], 0, feed.steps * config.optim.epochs
    careful = min(1.0, run.progress.collapses / 2)
    run.student.train()
    with borrowed_generator(config.seed, "dropout", epoch):
        for number, (data, at) in enumerate(feed.batches(epoch), start=epoch * feed.steps):
            done = number / total
            step = examples.draw(run.student, data, at, epoch=epoch, number=number, done=done, careful=careful)
            out = run.student(step.x)
            loss = recipe.loss(run.student, step, out, run.learned)
            if step.start is not None:
                loss = loss + config.inner.warm.consistency * _drift(out.logits, step.start)
            descend(loss, run.student, run.optimizer, config.optim, done)
            losses.append(loss.detach())
            images += len(at)
            on_step(number + 1, total, len(at))
    seconds, mean = time.perf_counter() - start, float(torch.stack(losses).mean())
    check_finite(mean, epoch + 1)
    return {
        "epoch": epoch + 1,
        "loss": round(mean, 6),
        "lr": round(learning_rate(config.optim, done), 8),
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 3),
    }


def _drift(logits: Tensor, start: Tensor) -> Tensor:
    """FGSM-MEP's consistency: the squared distance of the logits at the two ends of the step (the last rows' own)."""
    return (logits[-len(start) :] - start).square().mean()


def check_finite(loss: float, epoch: int) -> None:
    """Raise DarhtError when a run has diverged: nothing that comes after would be worth its time."""
    if not math.isfinite(loss):
        raise DarhtError(f"the loss is {loss} in epoch {epoch}: {CALMER}")


def _scores(
    student: Student, held: Source, watched: Source, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Accuracies in per cent for the log: on held-out rows and, for `warm`, on some that are trained on."""
    scores, attack = {}, config.inner.pgd()
    if len(held.images):
        scores["holdout_clean"], scores["holdout_pgd"] = score(student, held, attack, device, config.seed)
    if len(watched.images):
        scores["training_pgd"] = score(student, watched, attack, device, config.seed)[1]
    return scores


def _collapsed(row: dict[str, Any], progress: Progress, classes: int) -> bool:
    """Whether PGD accuracy fell below half of its best within two epochs, as single-step training does when it breaks.

    Below twice chance there is nothing to fall from, and PGD steps everywhere cannot collapse.
    """
    before = [old["training_pgd"] for old in progress.history[-2:] if "training_pgd" in old]
    if not before or progress.collapses >= 2 or max(before) < 200 / classes:
        return False
    return bool(row["training_pgd"] < max(before) / 2)


def _go_back(run: Run, out: Path, row: dict[str, Any]) -> str:
    """Take the last good epoch's checkpoint again, with more PGD steps from now on; says so."""
    collapses = run.progress.collapses + 1
    run.load(out)
    run.progress.collapses = collapses
    share = "half of" if collapses == 1 else "all"
    return (
        f"epoch {row['epoch']}: PGD accuracy on training rows collapsed to {row['training_pgd']:.1f} %; back to epoch "
        f"{run.progress.epoch}, and {share} the adversarial steps are PGD steps from here on"
    )


def save_epoch(out: Path, run: Run, *, row: dict[str, Any], card: StudentCard) -> None:
    """Keep best and last and then the checkpoint, so that whatever a kill leaves is consistent or made again."""
    progress, score = run.progress, row.get("holdout_pgd", float(row["epoch"]))  # nothing held out: the last is best
    save_student(out / LAST, run.student, card)
    if score >= progress.best:
        save_student(out / BEST, run.student, card)
    progress.epoch, progress.best = row["epoch"], max(score, progress.best)
    progress.history.append(row)
    write_log(out, progress.history)
    run.save(out)
