"""Evaluate a run: find its student, its data and its teachers, and measure."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darht.cache.exported import open_shards
from darht.cache.source import Source, load_source
from darht.cache.teachers import Teacher, load_teacher
from darht.core.errors import ConfigError, DarhtError
from darht.trainer.checkpoint import BEST, StudentCard, load_student, read_run
from darht.trainer.evaluate import Score, evaluate, quick_attacks, write_report


@dataclass(frozen=True)
class RunReport:
    """The scores of a run, where they were written, and how they may be read."""

    scores: list[Score]
    path: Path
    note: str

    @staticmethod
    def describe(score: Score) -> str:
        """The attack of a score, in a few words."""
        about = score.attack
        if not about:
            return ""
        if "over" in about:
            return "per image, over all rows above"
        steps = f", {about['steps']} steps of {about['step']:g}" if "steps" in about else ""
        return f"{about['norm']} {about['eps']:g}/255{steps}, on {about['against']}"


def evaluate_run(
    run: Path,
    *,
    which: str,
    root: Path | None,
    limit: int | None,
    teachers: dict[str, str] | None,
    seed: int,
    device: torch.device,
    on_batch: Callable[[str, int, int], None],
) -> RunReport:
    """Measure the student of a run on the test split and write `RUN/eval.json` (`eval-last.json` for the last epoch's).

    Args:
        run: the folder that darht-train left.
        which: `student` (best on held-out rows) or `last`.
        root: where the data set lies; None for where the cache was built from.
        limit: the first so many test rows only.
        teachers: folders by name that replace those the cache was built from; None leaves transfer out.
        seed: of the attacks' random starts.
        device: where to compute.
        on_batch: told attack, images done and images in all.

    Raises:
        CacheError, ModelError, DataError, ConfigError: something is not where it should be.
    """
    facts = read_run(run)
    student, card = load_student(run / which, device)
    cache = open_shards((run / facts["cache"]).resolve())
    if cache.root_hash != card.cache_root_hash:
        raise ConfigError(f"{cache.folder} is not the cache that {run} was trained from: its root hash differs")
    origin = cache.origin()
    source = _test_split(cache.spec.data.source, root, origin, limit)
    if source.classes != card.classes:
        raise ConfigError(f"the test split has classes {source.classes[:3]}..., the student {card.classes[:3]}...")
    loaded = {} if teachers is None else _teachers(origin.get("teachers", {}) | teachers, card.num_classes, device)
    attacks = quick_attacks(card.recipe["inner"]["eps"], loaded)
    scores = evaluate(
        lambda x: student(x).logits,
        source,
        attacks,
        device=device,
        seed=seed,
        on_batch=lambda name, images: on_batch(name, images, len(source.images)),
    )
    path, note = run / ("eval.json" if which == BEST else f"eval-{which}.json"), _note(card)
    if teachers is not None and not loaded:
        note += "; where the teachers lie is not known, so transfer was not measured: give --teacher NAME=FOLDER"
    about = {"which": which, "cache_root_hash": card.cache_root_hash, "recipe": card.recipe, "epoch": card.epoch}
    write_report(path, scores, source, {**about, "note": note})
    return RunReport(scores, path, note)


def _test_split(name: str, root: Path | None, origin: dict[str, Any], limit: int | None) -> Source:
    known = origin.get("data_root")
    where = root or (Path(known) if known else None)
    return load_source(name, where, "test", limit=limit, image_size=origin.get("image_size"))


def _teachers(folders: dict[str, str], num_classes: int, device: torch.device) -> dict[str, Teacher]:
    try:
        loaded = {name: load_teacher(Path(folder), device) for name, folder in folders.items()}
    except DarhtError as error:
        raise ConfigError(f"{error}; give --teacher NAME=FOLDER, or --no-transfer") from error
    others = [
        f"'{name}' has {card.num_classes}" for name, (_, card) in loaded.items() if card.num_classes != num_classes
    ]
    if others:
        raise ConfigError(f"the student has {num_classes} classes, teacher {', '.join(others)}: they cannot transfer")
    return {name: teacher for name, (teacher, _) in loaded.items()}


def _note(card: StudentCard) -> str:
    inner = card.recipe["inner"]
    if inner["kind"] == "cached":
        return (
            "inner: cached trains on other networks' examples only: what it buys is transfer robustness; "
            "white-box accuracy is shown beside it"
        )
    return f"inner: pgd, {inner['steps']} steps on the student, teachers quoted on the clean view"
