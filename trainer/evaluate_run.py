"""Evaluate a run: find its student, its data and its teachers, and measure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from darht.attacks import AutoAttack
from darht.cache.exported import open_shards
from darht.cache.source import Source, load_source
from darht.cache.teachers import Teacher, load_teacher
from darht.core.errors import ConfigError, DarhtError
from darht.trainer.checkpoint import BEST, StudentCard, load_student, read_run
from darht.trainer.evaluate import AttackOn, Score, WholeSuite, evaluate, quick_attacks, write_report


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
        steps = f", {about['steps']} steps of {about['step']:g}" if "step" in about else ""
        steps += f", version {about['version']}, by {about['by']}" if "version" in about else ""
        return f"{about['norm']} {about['eps']:g}/255{steps}, on {about['against']}"


@dataclass(frozen=True)
class EvalConfig:
    """What `darht-eval` measures.

    Attributes:
        which: `student` (best on held-out rows) or `last`.
        root: where the data set lies; None for where the cache was built from.
        limit: the first so many test rows only.
        teachers: folders by name, beside or instead of those the cache was built from; None leaves transfer out.
        autoattack: add AutoAttack `standard`.
        reference: run the authors' package for it.
        seed: of the attacks' random numbers.
    """

    which: str = BEST
    root: Path | None = None
    limit: int | None = None
    teachers: dict[str, str] | None = field(default_factory=dict)
    autoattack: bool = False
    reference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference and not self.autoattack:
            raise ConfigError("--reference runs the reference AutoAttack: add --attack autoattack")


def evaluate_run(
    run: Path, config: EvalConfig, *, device: torch.device, on_batch: Callable[[str, int, int], None]
) -> RunReport:
    """Measure the student of a run on the test split; writes `RUN/eval.json` (`eval-last.json` for the last epoch's).

    The student is evaluated folded: map and head are one linear layer, so that the function is the same.

    Args:
        run: the folder that darht-train left.
        config: what to measure.
        device: where to compute.
        on_batch: told attack, images done and images in all.

    Raises:
        CacheError, ModelError, DataError, ConfigError: something is not where it should be.
    """
    facts = read_run(run)
    student, card = load_student(run / config.which, device)
    cache = open_shards(facts["cache"] if "://" in facts["cache"] else (run / facts["cache"]).resolve())
    if cache.root_hash != card.cache_root_hash:
        raise ConfigError(f"{cache.folder} is not the cache that {run} was trained from: its root hash differs")
    origin = cache.origin()
    source = _test_split(cache.spec.data.source, config.root, origin, config.limit)
    if source.classes != card.classes:
        raise ConfigError(f"the test split has classes {source.classes[:3]}..., the student {card.classes[:3]}...")
    given = config.teachers
    loaded = {} if given is None else _teachers(origin.get("teachers", {}) | given, card.num_classes, device)
    eps = card.recipe["inner"]["eps"]
    attacks: dict[str, AttackOn | WholeSuite] = {**quick_attacks(eps, loaded)}
    if config.autoattack:
        state = None if config.reference else run / f"autoattack-{config.which}.pt"
        attacks["autoattack"] = WholeSuite(AutoAttack(eps=eps), state, config.reference)
    total = len(source.images)
    scores = evaluate(
        student.fold().requires_grad_(False),
        source,
        attacks,
        device=device,
        seed=config.seed,
        on_batch=lambda name, images: on_batch(name, images, total),
    )
    path, note = run / ("eval.json" if config.which == BEST else f"eval-{config.which}.json"), _note(card)
    if given is not None and not loaded:
        note += "; where the teachers lie is not known, so transfer was not measured: give --teacher NAME=FOLDER"
    about = {"which": config.which, "cache_root_hash": card.cache_root_hash, "recipe": card.recipe, "epoch": card.epoch}
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
