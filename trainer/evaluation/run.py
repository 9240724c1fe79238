"""From a model's name to a report: the main path of `darht-eval`.

Cheap attacks come before expensive ones, and what is asked of the survivors says so. Everything that ran counts for the
worst case.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks import AutoAttack, Engine, Threat
from darht.attacks.checks import is_probability
from darht.attacks.threat import Norm
from darht.cache.source import Source, content_sha256, load_source
from darht.cache.teachers import load_teacher
from darht.core.errors import ConfigError, DarhtError
from darht.trainer.checkpoint import BEST
from darht.trainer.evaluation import adaptive, blackbox
from darht.trainer.evaluation.calibration import run_corruptions
from darht.trainer.evaluation.eot import Expectation, draws_random_numbers
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.masking import check_masking
from darht.trainer.evaluation.measure import Measurement, OnBatch
from darht.trainer.evaluation.overlap import trained_on
from darht.trainer.evaluation.report import Report, write_report
from darht.trainer.evaluation.substitute import Substitution
from darht.trainer.evaluation.suite import run_autoattack, run_quick, run_reference
from darht.trainer.evaluation.target import ModelOptions, Target, check_classes, find, load
from darht.trainer.student import Student
from darht.trainer.train import check_pixels

Tier = Literal["quick", "standard", "full"]
QUICK_IMAGES = 1000
_MASKING_IMAGES = {"quick": 100, "standard": 200, "full": 500}
_BLACKBOX_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `darht-eval` measures.

    Attributes:
        tier: `quick` (FGSM, PGD-20, transfer, masking checks; 1,000 images), `standard` (and AutoAttack, on all test
            images), `full` (and adaptive and black-box attacks and corruptions).
        which: of a run: `student` (best on held-out rows) or `last`.
        data: the data set; None for the one that the model belongs to.
        root: where it lies; None for where the cache was built from.
        image_size: side to which an imagefolder is cut.
        download: fetch CIFAR when its files are not there.
        limit: the first so many test rows only.
        eps: radius in pixel levels; None for what the model was trained for, or 8.
        norm: `linf` or `l2`.
        teachers: folders by name, beside or instead of those the cache was built from; None leaves transfer out.
        surrogates: names of independently trained models, as `darht-eval` takes them.
        model: how foreign models are built.
        autoattack: its settings; eps and norm are set from the fields here.
        reference: run the authors' own AutoAttack instead of ours.
        corruptions: measure them in any tier; `full` does always.
        samples: draws that a random model's answer is the mean of.
        queries: of RayS and of Square in the black-box set; of Square in the masking checks a fifth.
        substitution: the adaptive black-box attack.
        seed: of everything random.
    """

    tier: Tier = "quick"
    which: str = BEST
    data: str | None = None
    root: Path | None = None
    image_size: int | None = None
    download: bool = False
    limit: int | None = None
    eps: float | None = None
    norm: Norm = "linf"
    teachers: Mapping[str, str] | None = field(default_factory=dict)
    surrogates: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    autoattack: AutoAttack = field(default_factory=AutoAttack)
    reference: bool = False
    corruptions: bool = False
    samples: int = 16
    queries: tuple[int, int] = (10_000, 5000)
    substitution: Substitution = field(default_factory=Substitution)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference and self.tier == "quick":
            raise ConfigError("--reference runs the reference AutoAttack: add --attack autoattack or --tier standard")
        if self.norm == "l2" and self.eps is None:
            raise ConfigError("an L2 radius has no default: give --eps in pixel levels, e.g. 128 for 128/255")


def evaluate(
    text: str,
    config: EvalConfig,
    *,
    out: Path | None = None,
    device: torch.device,
    on_batch: OnBatch = lambda name, done, total, alive: None,
) -> Report:
    """Measure a model on a test split and write its report.

    Args:
        text: what is evaluated; see `target.find`.
        config: what to measure.
        out: where the report goes; None for the run itself, or `eval-NAME` here.
        device: where to compute.
        on_batch: told attack, images done, images in all and images alive.

    Raises:
        CacheError, ModelError, DataError, ConfigError: something is not where it should be, or does not fit.
    """  # fmt: skip
    target, source = _subject(text, config, device)
    ball = Threat(eps=config.eps or target.eps or 8.0, norm=config.norm)
    teachers = _teachers(target, config, device)
    surrogates = _surrogates(config, len(source.classes), device)
    folder = out or (Path(text) if target.kind == "run" else Path(f"eval-{_slug(target.name)}"))
    m = _measurement(target, source, ball, config=config, parts=folder / "eval-parts", device=device, on_batch=on_batch)

    run_quick(m, teachers)
    masking = check_masking(m, m.correct[: _MASKING_IMAGES[config.tier]], queries=config.queries[1] // 5)
    if config.tier != "quick":
        suite = _sized(config.autoattack, ball, m.engine)
        (run_reference if config.reference else run_autoattack)(m, suite)
    if config.tier == "full":
        _run_full(m, target, config, teachers, surrogates)
    elif surrogates:
        blackbox.run_surrogates(m, surrogates)
    corruptions = run_corruptions(m) if config.corruptions or config.tier == "full" else None
    m.finish()

    facts = {
        "tier": config.tier,
        "note": _note(target, config, teachers),
        "warnings": _warnings(m, target),
        "folded": _folded(m, target.student),
        "corruptions": corruptions,
    }
    stem = "eval" if config.which == BEST else f"eval-{config.which}"
    return write_report(folder, stem, target, m, masking=masking, facts=facts)


def _subject(text: str, config: EvalConfig, device: torch.device) -> tuple[Target, Source]:
    """The model and the images it is asked about; foreign models are built for the data's classes."""
    if find(text, config.model) in ("run", "student", "teacher"):
        target = load(text, config.model, device, which=config.which)
        source = _test_split(target.data, target.origin, config)
    else:
        source = _test_split(None, {}, config)
        target = load(text, config.model, device, classes=len(source.classes))
    image = torch.from_numpy(source.images[:1]).to(device)
    check_pixels(target.model, image, target.name)
    check_classes(target, target.model, image.float() / 255, source.classes)
    return target, source


def _test_split(known: str | None, origin: Mapping[str, Any], config: EvalConfig) -> Source:
    name = config.data or known
    if name is None:
        raise ConfigError("the model does not say what data it belongs to: give --data NAME, and --root DIR")
    lay = origin.get("data_root") if config.data in (None, known) else None
    where = config.root or (Path(lay) if lay else None)
    size = config.image_size or (origin.get("image_size") if config.data in (None, known) else None)
    source = load_source(name, where, "test", limit=config.limit, image_size=size, download=config.download)
    return _first(source, QUICK_IMAGES) if config.tier == "quick" and config.limit is None else source


def _first(source: Source, count: int) -> Source:
    """The first images, or evenly spaced ones where the first lack a class."""
    if len(source.images) <= count:
        return source
    rows = np.arange(count)
    if len(np.unique(source.labels[rows])) < len(source.classes):
        rows = np.linspace(0, len(source.images) - 1, count).astype(np.int64)
    images, labels = source.images[rows], source.labels[rows]
    return Source(source.name, source.split, images, labels, source.classes,
                  content_sha256(images, labels, source.classes))  # fmt: skip


def _measurement(
    target: Target, source: Source, ball: Threat, *, config: EvalConfig, parts: Path, device: torch.device,
    on_batch: OnBatch,
) -> Measurement:  # fmt: skip
    probe = torch.from_numpy(source.images[:32]).to(device).float() / 255
    model = _plain(target) if _is_random(target, probe) else target.model
    random = model is not target.model or draws_random_numbers(model, probe)
    small = source.images.shape[2] <= 64
    slots = 64 if device.type == "cpu" or not small else 256
    identity = {"model": target.fingerprint(), "data": source.sha256, "samples": config.samples if random else 1}
    if not random:
        with torch.no_grad():
            identity["answers"] = model(probe).argmax(1).tolist()
    return Measurement(
        model=Expectation(model, config.samples) if random else model,
        source=source,
        threat=ball,
        device=device,
        seed=config.seed,
        engine=Engine(slots=slots, lanes=1 if random else None),
        ledger=Ledger(parts, identity),
        random=random,
        batch=500 if device.type == "cpu" else 2000,
        on_batch=on_batch,
    )


def _is_random(target: Target, probe: Tensor) -> bool:
    """Whether the student draws random numbers; folding would hide that."""
    return target.student is not None and draws_random_numbers(_plain(target), probe)


class _Logits(nn.Module):
    """A student as a plain classifier, without folding."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.train(student.training)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.student(x).logits
        return logits


def _plain(target: Target) -> nn.Module:
    assert target.student is not None
    return _Logits(target.student)


def _sized(suite: AutoAttack, ball: Threat, engine: Engine) -> AutoAttack:
    return AutoAttack(eps=ball.eps, norm=ball.norm, version=suite.version, engine=engine, steps=suite.steps,
                      queries=suite.queries)  # fmt: skip


def _run_full(
    m: Measurement, target: Target, config: EvalConfig, teachers: Mapping[str, nn.Module],
    surrogates: Mapping[str, nn.Module],
) -> None:  # fmt: skip
    if target.student is not None and target.card is not None:
        names = tuple(target.card.teachers)
        said = _teachers_said(m, target, teachers)
        samples = config.samples if m.random else 1
        adaptive.run_adaptive(m, target.student, names, teachers, said, samples=samples)
    else:
        m.left_out["adaptive"] = "these attacks know the feature map, and the model is not a student of darht"
        adaptive.run_teachers(m, teachers)
    rows = m.correct[:_BLACKBOX_IMAGES]
    blackbox.run_queries(m, rows, square=config.queries[1], rays=config.queries[0])
    blackbox.run_surrogates(m, surrogates)
    blackbox.run_substitutes(m, _training_split(m.source, target, config), config.substitution, rows)


def _teachers_said(m: Measurement, target: Target, teachers: Mapping[str, nn.Module]) -> Tensor | None:
    """What the map's teachers say about the clean images, `[N, T, C]`: from a cache of these images, or asked now."""
    assert target.card is not None
    names, cache = target.card.teachers, target.cache
    if names and cache is not None and cache.spec.data.sha256 == m.source.sha256:
        stored = [torch.from_numpy(cache.read(f"logits/{name}/clean")[:, 0].astype(np.float32)) for name in names]
        return torch.stack(stored, 1).to(m.device)
    if not names or any(name not in teachers for name in names):
        return None
    said = [_answers(m, teachers[name]) for name in names]
    return torch.stack(said, 1)


@torch.no_grad()
def _answers(m: Measurement, model: nn.Module) -> Tensor:
    parts = [np.arange(start, min(start + 250, m.count)) for start in range(0, m.count, 250)]
    return torch.cat([model(m.tensors(rows)[0]) for rows in parts])


def _training_split(test: Source, target: Target, config: EvalConfig) -> Source | str:
    """The training images of the same data, or why they are not there."""
    same = config.data in (None, target.data)
    lay = target.origin.get("data_root") if same else None
    where = config.root or (Path(lay) if lay else None)
    size = config.image_size or (target.origin.get("image_size") if same else None)
    try:
        train = load_source(test.name, where, "train", image_size=size)
    except DarhtError as error:
        return str(error)
    return train if train.images.shape[2:] == test.images.shape[2:] else "they have another size than the test images"


def _teachers(target: Target, config: EvalConfig, device: torch.device) -> dict[str, nn.Module]:
    if config.teachers is None:
        return {}
    folders = {**target.origin.get("teachers", {}), **config.teachers}
    try:
        loaded = {name: load_teacher(Path(folder), device) for name, folder in folders.items()}
    except DarhtError as error:
        raise ConfigError(f"{error}; give --teacher NAME=FOLDER, or --no-transfer") from error
    C = target.num_classes
    others = [f"'{name}' has {card.num_classes}" for name, (_, card) in loaded.items() if card.num_classes != C]
    if others:
        raise ConfigError(f"the student has {C} classes, teacher {', '.join(others)}: they cannot transfer")
    return {name: teacher for name, (teacher, _) in loaded.items()}


def _surrogates(config: EvalConfig, classes: int, device: torch.device) -> dict[str, nn.Module]:
    loaded: dict[str, nn.Module] = {}
    for text in config.surrogates:
        model = load(text, config.model, device, classes=classes)
        if model.num_classes != classes:
            raise ConfigError(f"--surrogate {text} has {model.num_classes} classes, the data has {classes}")
        loaded[model.name if model.name not in loaded else f"{model.name} {len(loaded)}"] = model.model
    return loaded


def _folded(m: Measurement, student: Student | None) -> dict[str, Any] | None:
    """The folded student beside the unfolded one, on clean images and on those of the gallery."""
    if student is None or m.random:
        return None
    pixels = [m.tensors(rows)[0] for rows in np.array_split(np.arange(m.count), -(-m.count // 250))]
    for example in m.examples.values():
        clean = m.tensors(np.array([example.row]))[0]
        pixels.append((clean + torch.from_numpy(example.delta).to(m.device) / 255).clamp(0, 1))
    found = adaptive.compare_folded(student, m.model, pixels)
    passed = found.differing == 0 and found.largest < 1e-4
    return {"passed": passed, "images": found.images, "differing": found.differing, "largest": found.largest}


def _warnings(m: Measurement, target: Target) -> list[str]:
    found = []
    if is_probability(torch.from_numpy(m.logits)):
        found.append("the model returns probabilities: attacks need logits, remove the softmax")
    if m.random:
        found.append("the model's output is random: attacked and judged as the mean of several draws")
    seen = 0 if target.cache is None else trained_on(target.cache, m.source)
    if seen > 0.01 * m.count:
        found.append(
            f"{seen} of {m.count} test images lie in the cache that the model was trained from: this is training "
            "accuracy, not test accuracy"
        )
    return found


def _note(target: Target, config: EvalConfig, teachers: Mapping[str, Any]) -> str:
    note = target.note
    if target.kind == "run" and config.teachers is not None and not teachers:
        note += "; where the teachers lie is not known, so transfer was not measured: give --teacher NAME=FOLDER"
    return note


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-")
