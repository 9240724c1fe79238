"""Train a teacher: a student without a map, on the views of a source instead of a cache, by the loop of students.

While it trains, and after it, `training/` in the teacher's folder is the run: its log and curves, and until the teacher
is measured its checkpoint. The best student of the run, folded, becomes the teacher.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from darht.cache.builder.config import CacheConfig, DataConfig
from darht.cache.builder.resolve import resolve
from darht.cache.builder.seal import holdout_rows
from darht.cache.builder.teachers import Card, is_teacher_folder, load_teacher, read_card, save_teacher
from darht.cache.format.spec import PIXEL_RULES
from darht.cache.format.views import view_table
from darht.cache.read.source import SourceCache
from darht.cache.sources.load import OF_FILES, FileSource, Source, load_source
from darht.cache.sources.open import open_source
from darht.core.class_names import check_class_names
from darht.core.config import canonical_json, spec_diff, to_plain
from darht.core.errors import CacheError, SpecMismatchError
from darht.core.files import is_free
from darht.core.preprocessing import Preprocessing
from darht.core.trust import trusting
from darht.trainer.config import StudentConfig
from darht.trainer.state.checkpoint import BEST, CHECKPOINT, LAST, MEMORY, RUN
from darht.trainer.student.distributed import rank_and_world
from darht.trainer.student.setup import settled_average
from darht.trainer.student.train import Callbacks, train
from darht.trainer.teacher.config import TeachConfig

TRAINING = "training"


def teach(
    config: TeachConfig,
    source: Source | FileSource,
    network: StudentConfig,
    out: Path,
    *,
    device: torch.device,
    memory_gib: float = 8.0,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> Card:
    """Train a network on a source and leave it in `out`, a teacher's folder, whose accuracies are not known yet.

    Args:
        config: algorithm and schedule.
        source: the training split.
        network: the architecture.
        out: the teacher's folder.
        device: where to train.
        memory_gib: the most that the training set may take; a larger one is streamed.
        resume: go on with a training that was stopped; see `darht.trainer.student.train.train`.
        callbacks: who is told what.

    Raises:
        ConfigError, ModelError: the architecture is unknown, does not fold or does not take images of this size; a
            batch is larger than the source, or a crop may lie outside of its images.
        CacheError: the folder cannot be used as asked.
    """
    cache, run = source_cache(config, source), out / TRAINING
    recipe = config.recipe(network)
    told = callbacks or Callbacks()
    train(recipe, cache, run, device=device, memory_gib=memory_gib, resume=resume, callbacks=told)
    card = expected_card(config, source, network)
    if rank_and_world()[0] > 0:
        return card
    with trusting():  # the card names what was asked for
        model, said = load_teacher(run, torch.device("cpu"))
    return save_teacher(out, model.net, replace(card, preprocessing=said.preprocessing))


def open_split(data: str, root: Path | None, split: str, **options: Any) -> Source | FileSource:
    """A split of a data set; pixels of image files stay there until they are wanted.

    Raises:
        DataError: it is not there, or is not what it must be.
    """
    if data in OF_FILES:
        return open_source(data, root, split, rules=PIXEL_RULES, **options)
    return load_source(data, root, split, **options)


def unfinished(
    config: TeachConfig,
    network: StudentConfig,
    out: Path,
    opened: Callable[[str], Source | FileSource],
    *,
    resume: bool,
) -> tuple[Source | FileSource, Source | FileSource] | None:
    """The training and the test split of a teacher that is to be trained, or gone on with; None where it is there.

    Args:
        config: algorithm and schedule.
        network: the architecture.
        out: the teacher's folder.
        opened: gives a split, `train` or `test`.
        resume: whether `out` may hold it already, in part or whole and measured.

    Raises:
        CacheError, SpecMismatchError: the folder cannot be used as asked, or holds another teacher.
        DataError, ConfigError: a split is not there, or the two differ in their classes.
    """
    first = rank_and_world()[0] == 0
    if first:
        check_free(out, resume=resume)
    training = opened("train")
    if resume and is_finished(out, expected_card(config, training, network)):
        if first:
            finish(out)
        return None
    test = opened("test")
    check_class_names(training.classes, test.classes, "the training split", "the test split")
    return training, test


def source_cache(config: TeachConfig, source: Source | FileSource) -> SourceCache:
    """The rows of a source in the views that a training draws from.

    Raises:
        ConfigError: a crop may lie outside of the images.
    """
    of = DataConfig(source=source.name, split=cast(Any, source.split), holdout=config.holdout)
    count = len(view_table(**vars(config.views), seed=config.seed))
    spec = resolve(CacheConfig(of, {}, views=config.views, seed=config.seed), source, {}, count)
    held = holdout_rows(len(source.images), config.holdout, config.seed, spec.data.rules)
    return SourceCache(spec, held, source.images, source.labels)


def expected_card(config: TeachConfig, source: Source | FileSource, network: StudentConfig) -> Card:
    """What is known of a teacher before its training: all but normalisation, weights hash and accuracies."""
    average = settled_average(config.recipe(network), source_cache(config, source))
    return Card(
        arch=network.arch,
        kwargs=network.kwargs,
        num_classes=len(source.classes),
        preprocessing=Preprocessing(resize=network.resize),
        training={"eps": config.inner.eps, **to_plain(replace(config, average=average))},
        data={"source": source.name, "split": source.split, "rows": len(source.images), "sha256": source.sha256},
        weights_sha256="",
        classes=source.classes,
    )


def is_finished(folder: Path, expected: Card) -> bool:
    """Whether `folder` holds the teacher that the training of `expected` makes, whole and measured.

    Raises:
        SpecMismatchError: it holds another teacher.
        ModelError: its weights are not those of its card.
    """
    if (folder / TRAINING / CHECKPOINT).is_file() or not is_teacher_folder(folder):
        return False
    differences = spec_diff(_identity(read_card(folder)), _identity(expected))
    if differences:
        raise SpecMismatchError(
            f"{folder} holds another teacher: {'; '.join(differences)}; choose another --out folder"
        )
    with trusting():  # its card names what was asked for
        load_teacher(folder, torch.device("cpu"))
    return True


def _identity(card: Card) -> dict[str, Any]:
    """What a card says of a training as plain data; the data's hash covers the class names."""
    said = {key: getattr(card, key) for key in ("arch", "kwargs", "num_classes", "training", "data")}
    return cast(dict[str, Any], json.loads(canonical_json({**said, "resize": card.preprocessing.resize})))


def finish(folder: Path) -> None:
    """Note that a teacher is measured, by removing what only a training needs; its log and curves stay."""
    run = folder / TRAINING
    (run / CHECKPOINT).unlink(missing_ok=True)  # first: without it the teacher is finished
    for path in run.glob(MEMORY.format("*")):
        path.unlink(missing_ok=True)
    for name in (BEST, LAST):
        shutil.rmtree(run / name, ignore_errors=True)


def check_free(folder: Path, *, resume: bool = False) -> None:
    """See that a teacher may be trained into `folder`, before hours go into it.

    Raises:
        CacheError: it is not empty and holds no training that was stopped or is finished, or `resume` is False.
    """
    stopped = (folder / TRAINING / RUN).is_file()
    if resume and (stopped or is_teacher_folder(folder)):
        return
    if stopped and not is_teacher_folder(folder):
        raise CacheError(
            f"{folder} holds a training that was stopped: darht-teacher train --resume goes on with it; or choose "
            "another --out folder"
        )
    if not is_free(folder):
        raise CacheError(f"{folder} is not empty: choose a new or empty --out folder")
