"""Train a student from a sealed cache. Unless `teachers: live`, none is loaded; what they said is looked up.

One loop for all recipes: `inner.py` draws a `Step` (images, and what teachers said about them), the recipe in
`losses.py` says what it costs, `run.py` holds what changes and keeps it. `distributed.py` is all that several processes
say to one another. The states of a run, and who knows which, are drawn in `docs/architecture.md`.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch

from darht.cache.read.feed_plan import FeedPlan
from darht.cache.read.reader import Cache
from darht.cache.read.select import select
from darht.cache.read.stream import Feed
from darht.cache.sources.load import Source
from darht.core.device import arithmetic, keep_memory, repeatability
from darht.core.errors import DarhtError
from darht.core.fused import fusing
from darht.core.nets.compiled import Compiled
from darht.core.nets.layout import layout_note, pixel_layout
from darht.core.rng import borrowed_generator
from darht.core.stats import beyond_chance
from darht.core.tensors import save_tensors
from darht.trainer.config import TrainConfig
from darht.trainer.export.model_card import teacher_notes
from darht.trainer.progress.metrics import Metrics
from darht.trainer.schedule import learning_rate, make_optimizer, take_step
from darht.trainer.state.checkpoint import Progress, claim_run, write_run
from darht.trainer.state.pause import Pause
from darht.trainer.student.averaging import averaged_model, is_due
from darht.trainer.student.checkpoints import Checkpoints, advance
from darht.trainer.student.distributed import Ranks, joined
from darht.trainer.student.gradients import StepCost, compute_gradients
from darht.trainer.student.inner import Examples
from darht.trainer.student.memory import Memory
from darht.trainer.student.run import TrainState, load_furthest, pause_file
from darht.trainer.student.score import DIVERGED_HINT, collapse_probe_source, holdout_source, score
from darht.trainer.student.setup import (
    cache_from,
    drawn_views,
    feed_plan,
    live_teachers,
    make_student,
    needed_perturbations,
    run_identity,
    student_card,
    with_average,
)
from darht.trainer.student.single_step import LabelPatterns
from darht.trainer.student.twin import Twin
from darht.trainer.student.validate import check_parts, check_recipe, short_phases
from darht.trainer.student.warm import WarmMemory

OnStep = Callable[[int, int, int, Metrics], None]
OnEpoch = Callable[[dict[str, Any]], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Who is told what.

    Attributes:
        on_step: step, steps in all, images, and the metrics of the epoch so far, after each step.
        on_epoch: the log's row after each epoch.
        on_note: what a person should know, a sentence at a time.
    """

    on_step: OnStep = lambda step, total, images, metrics: None
    on_epoch: OnEpoch = lambda row: None
    on_note: OnNote = lambda text: None


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainContext:
    """What stays as it is while a student is trained.

    Attributes:
        feed: batches of the cache.
        examples: draws what is trained on, as the recipe says.
        ranks: the processes.
        out: the run's folder.
        checkpoints: what is kept there between epochs.
        callbacks: who is told what.
    """

    feed: Feed
    examples: Examples
    ranks: Ranks
    out: Path
    checkpoints: Checkpoints
    callbacks: Callbacks


def train(
    config: TrainConfig,
    cache: Cache,
    out: Path,
    *,
    device: torch.device,
    memory_gib: float = 8.0,
    resume: bool = False,
    teachers: Mapping[str, Path] | None = None,
    callbacks: Callbacks = Callbacks(),
) -> Progress:
    """Train the student that `config` describes and leave it in `out`.

    Args:
        config: the recipe.
        cache: a sealed cache.
        out: the run's folder: `student/` (best on held-out rows), `last/`, `log.csv`, `log.jsonl`, `checkpoint.pt`.
        device: where to train.
        memory_gib: the most that the cache may take in memory; a larger one is streamed.
        resume: go on with a run that was stopped; it ends with the bits of an uninterrupted one.
            A KeyboardInterrupt from `callbacks.on_step` leaves `paused.pt`, from which the next step goes on; one from
            elsewhere, or a kill, costs what is not in the checkpoint: the epoch, and up to a minute before it. Of
            several processes any may raise it: all stop two steps later, or at the epoch's end when that comes first,
            and as many must go on, or the epoch is begun again.
        teachers: for `teachers: live`, folders by name where they are not those that the cache remembers.
        callbacks: who is told what.

    Raises:
        ConfigError, ModelError: recipe and cache do not go together, or the network and the images, or a batch is
            larger than the rows that are trained on.
        CacheError: the folder cannot be used as asked.
    """
    check_recipe(config, cache)
    cache = select(cache, config.select)
    config = with_average(config, cache, out)
    plan, live = feed_plan(config, cache, device, memory_gib), live_teachers(config, cache, teachers or {}, device)
    identity = run_identity(config, cache, plan)
    deterministic, epochs = config.compute.deterministic, config.optim.epochs
    with (
        arithmetic(device, deterministic=deterministic),
        fusing("cuda" if config.compute.compile else ""),  # a CPU has no launches to save, and compiles for minutes
        joined(device) as ranks,
        Feed(
            cache,
            plan,
            seed=config.seed,
            epochs=epochs,
            views=drawn_views(config, cache),
            perturbations=needed_perturbations(config),
        ) as feed,
    ):
        config.optim.check_rows(len(feed.training), feed.groups[0].per_batch)
        if ranks.first:
            claim_run(out, identity, resume=resume)
        state = _start(config, cache, feed, identity)
        check_parts(state.student, config, sum(len(group.rows) for group in feed.groups), ranks)
        average = None if state.average is None else state.average.module
        layout, twin = pixel_layout(state.student), _twin(config, state, feed)
        examples = Examples(config, config.objective(), state.memory, live, average, cache.rows, twin, layout)
        state.shared = ranks.averaged(StepCost(state.forward, examples))
        checkpoints = Checkpoints(out, writes=ranks.first, goes_back=bool(config.inner.probed_rows))
        context = TrainContext(
            feed=feed, examples=examples, ranks=ranks, out=out, checkpoints=checkpoints, callbacks=callbacks
        )
        if ranks.first:
            notes = {"repeats": repeatability(device, deterministic=deterministic)}
            write_run(out, identity, _notes(cache, out, plan) | notes)
        turned = layout_note(state.student) if config.compute.channels_last else ""
        for note in filter(None, (str(plan), turned, short_phases(config), load_furthest(state, ranks, out))):
            callbacks.on_note(note)
        with checkpoints:
            _train(state, context)
    return state.progress


def _notes(cache: Cache, out: Path, plan: FeedPlan) -> dict[str, Any]:
    """What `run.json` says beside the identity: where things were."""
    where = {"cache": cache_from(cache.folder, out)} if cache.built else {}
    return {**where, "feed": str(plan), "teachers": teacher_notes(cache)}


def _train(state: TrainState, context: TrainContext) -> None:
    """Every epoch that is left, and what is kept after each."""
    config, cache, ranks, callbacks = context.examples.config, context.feed.cache, context.ranks, context.callbacks
    held, collapse_probe = holdout_source(context.feed), collapse_probe_source(context.feed, config)
    while state.progress.epoch < config.optim.epochs:
        row = _epoch(state, context)
        scores = _scores(state, held, collapse_probe, config, context.feed.plan.device) if ranks.first else {}
        row |= cast(dict[str, float], ranks.agree(scores))
        if _collapsed(row, state.progress, len(cache.spec.data.classes), len(collapse_probe.images)):
            callbacks.on_note(_go_back(state, context, row))
            continue
        best, card = advance(state.progress, row), student_card(config, cache, state.student, row, state.identity)
        context.checkpoints.add(state, card, best=best, now=state.progress.epoch == config.optim.epochs)
        try:
            callbacks.on_epoch(row)
        except KeyboardInterrupt:
            state.stopping = True
        if ranks.any(state.stopping):
            context.checkpoints.finish(state, card)
            raise KeyboardInterrupt


def _start(config: TrainConfig, cache: Cache, feed: Feed, identity: dict[str, Any]) -> TrainState:
    keep_memory()
    student = make_student(config, feed, cache.spec.data.classes)
    memory: Memory | None = None
    shape = cache.spec.view_shape
    if config.inner.kind == "warm" and config.inner.warm.start == "label":
        memory = LabelPatterns.create(len(cache.spec.data.classes), shape, feed.plan.device)
    elif config.inner.kind == "warm":
        offsets = torch.from_numpy(cache.read("views/offset"))
        memory = WarmMemory.create(cache.rows, shape, offsets, feed.plan.device)
    average = averaged_model(student, config.average)
    forward = Compiled(student) if config.compute.compile else student
    return TrainState(student, forward, make_optimizer(student, config.optim), memory, average, identity=identity)


def _twin(config: TrainConfig, state: TrainState, feed: Feed) -> Twin | None:
    """What PGD ascends on, where some steps do; compiled where the student is."""
    if config.inner.kind == "cached" or config.objective().adversarial_when == "never":
        return None
    probe = feed.fetch(feed.training[:2])[0].to(feed.plan.device).float() / 255
    return Twin(state.student, probe, compiled=config.compute.compile)


def _epoch(state: TrainState, context: TrainContext) -> dict[str, Any]:
    """One pass over the rows to train on; the first part of its row in the log."""
    config, feed, ranks, epoch = context.examples.config, context.feed, context.ranks, state.progress.epoch
    total, first = feed.steps * config.optim.epochs, epoch * feed.steps
    pause, state.pause, wishes = state.pause or Pause(), None, None
    start, metrics, images = time.perf_counter() - pause.seconds, pause.metrics(feed.plan.device), pause.images
    cpu_start = time.process_time() - pause.cpu_seconds
    state.student.train()
    if state.memory is not None:
        if isinstance(state.memory, WarmMemory) and _forgets(config.inner.warm.reset, epoch) and not pause.steps:
            state.memory.forget()
        state.memory.look(torch.from_numpy(np.concatenate([group.rows for group in feed.groups])))
    with borrowed_generator(config.seed, "dropout", epoch, *ranks.own):
        pause.set_generators()
        for number, (data, batch) in islice(enumerate(feed.batches(epoch), start=first), pause.steps, None):
            done = number / total
            examples = context.examples
            compute_gradients(state, examples, ranks, metrics, data=data, batch=batch, number=number, done=done)
            before, wishes = wishes, ranks.wish(state.stopping)
            take_step(state.student, state.optimizer, config.optim, done)
            _average(state, config, step=True, done=done)
            images += len(batch)
            try:
                context.callbacks.on_step(number + 1, total, len(batch), metrics)
            except KeyboardInterrupt:
                state.stopping = True
            if ranks.stop(state.stopping, before):  # between two steps: nothing is half done
                taken = time.perf_counter() - start, time.process_time() - cpu_start
                state.pause = Pause.here(number + 1 - first, images, taken, metrics, ranks.world)
                _stop_here(state, context)
    _average(state, config, step=False, done=(first + feed.steps) / total)
    ranks.share(state.networks, state.memory, state.learned)
    ranks.total(metrics.counts)
    check_finite(metrics.reading().loss, epoch + 1)
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        **metrics.row(),
        "lr": round(learning_rate(config.optim, (first + feed.steps - 1) / total), 8),
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu_start, 3),
    }


def _forgets(every: int, epoch: int) -> bool:
    """Whether rows start anew in this epoch: in every `every`-th; 0 for never."""
    return every > 0 and epoch > 0 and epoch % every == 0


def _stop_here(state: TrainState, context: TrainContext) -> NoReturn:
    """Keep a run that is between two steps, and end it."""
    assert state.pause is not None
    context.checkpoints.settle()
    save_tensors(pause_file(context.out, context.ranks), state.contents())
    steps, of = state.pause.steps, context.feed.steps
    context.callbacks.on_note(f"kept: epoch {state.progress.epoch + 1} up to its step {steps} of {of}")
    raise KeyboardInterrupt


def _average(state: TrainState, config: TrainConfig, *, step: bool, done: float) -> None:
    """Take the weights into the mean when that is due."""
    if state.average is not None and is_due(config.average, step=step, done=done):
        state.average.update_parameters(state.student)


def check_finite(loss: float, epoch: int) -> None:
    """Raise DarhtError when a run has diverged: nothing that comes after would be worth its time."""
    if not math.isfinite(loss):
        raise DarhtError(f"the loss is {loss} in epoch {epoch}: {DIVERGED_HINT}")


def _scores(
    state: TrainState, held: Source, collapse_probe: Source, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Accuracies in per cent for the log: of what is kept on held-out rows; for `warm`, of what is trained on its rows.

    A mean of weights hides for long that the student itself has collapsed.
    """
    scores, attack = {}, config.inner.pgd()
    if len(held.images):
        scores["holdout_clean"], scores["holdout_pgd"] = score(state.result, held, attack, device, config.seed)
    if len(collapse_probe.images):
        scores["training_pgd"] = score(state.student, collapse_probe, attack, device, config.seed)[1]
    return scores


def _collapsed(row: dict[str, Any], progress: Progress, classes: int, rows: int) -> bool:
    """Whether PGD accuracy fell below half of its best within two epochs, as single-step training does when it breaks.

    There is nothing to fall from below twice chance, nor above it by what a network that names one class alone reaches
    on so few `rows`. The fall must be one that chance makes less than once in 1,000 times. PGD steps everywhere cannot
    collapse.
    """
    before = [old["training_pgd"] for old in progress.history[-2:] if "training_pgd" in old]
    if not before or progress.pgd_share == 1 or row["training_pgd"] >= max(before) / 2:
        return False
    if round(rows * max(before) / 100) < beyond_chance(rows, min(2 / classes, 0.75)):
        return False
    failing = min(max(1 - max(before) / 100, 0.5 / rows), 1 - 0.5 / rows)
    return round(rows * (1 - float(row["training_pgd"]) / 100)) >= beyond_chance(rows, failing)


def _go_back(state: TrainState, context: TrainContext, row: dict[str, Any]) -> str:
    """Take the end of the last good epoch again, with more PGD steps from now on; says so."""
    collapses = state.progress.collapses + 1
    context.checkpoints.back(state)
    state.progress.collapses = collapses
    share = "all" if state.progress.pgd_share == 1 else "half of"
    return (
        f"epoch {row['epoch']}: PGD accuracy on training rows collapsed to {row['training_pgd']:.1f} %; back to epoch "
        f"{state.progress.epoch}, and {share} the adversarial steps are PGD steps from here on"
    )
