"""From a model's name to a report: the main path of `darht-eval`.

Cheap attacks come before expensive ones, and what is asked of the survivors says so. Everything that ran counts for the
worst case.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks import AutoAttack, Engine, Threat
from darht.attacks.validate import is_probability
from darht.cache.sources.load import Source
from darht.trainer.evaluation.attacks import adaptive, blackbox
from darht.trainer.evaluation.attacks.eot import Expectation, draws_random_numbers, obeys_seed
from darht.trainer.evaluation.attacks.suite import check_reference, run_autoattack, run_quick, run_reference
from darht.trainer.evaluation.checks.calibration import run_corruptions
from darht.trainer.evaluation.checks.consistency import check_memory, check_probe, probe
from darht.trainer.evaluation.checks.fresh import Fresh
from darht.trainer.evaluation.checks.leakage import trained_on
from darht.trainer.evaluation.checks.masking import Masking, check_masking
from darht.trainer.evaluation.checks.memorised import check_memorised
from darht.trainer.evaluation.checks.verdict import outranked
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.load import load_model_and_data, load_surrogates, load_teachers, load_training_split
from darht.trainer.evaluation.measure import EvalSetup, Measurement, OnBatch, begin
from darht.trainer.evaluation.report.overwrite_guard import check_overwrite
from darht.trainer.evaluation.report.write import EvalReport, write_report
from darht.trainer.evaluation.target import Target
from darht.trainer.export.model_card import write_model_card
from darht.trainer.state.checkpoint import BEST
from darht.trainer.student.model import Student

_MASKING_IMAGES = {"quick": 100, "standard": 200, "full": 500}
_MASKING_QUERIES = {"quick": 300, "standard": 1000, "full": 1000}
_BLACKBOX_IMAGES = 1000
_UNSEEDED_SAMPLES, _UNSEEDED_IMAGES, _UNSEEDED_QUERIES = 2, 25, 50  # of what no second evaluation can confirm


def evaluate(
    text: str | nn.Module,
    config: EvalConfig,
    *,
    out: Path | None = None,
    device: torch.device,
    on_batch: OnBatch = lambda name, done, total, alive: None,
) -> EvalReport:
    """Measure a model on a test split and write its report; a run's own model card is written anew with it.

    Args:
        text: what is evaluated, see `target.find`; or a module from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`.
        config: what to measure.
        out: where the report goes; None for the run itself, or `eval-NAME` here.
        device: where to compute.
        on_batch: told attack, images done, images in all and images alive.

    Raises:
        CacheError, ModelError, DataError, ConfigError: something is missing or does not fit, or a stronger one stands.
    """
    target, source = load_model_and_data(text, config, device)
    if config.reference:
        check_reference(len(source.classes))
    ball = Threat(eps=config.eps or target.eps or 8.0, norm=config.norm)
    run = Path(text) if isinstance(text, str) and target.kind == "run" else None
    folder = out or run or Path(f"eval-{_slug(target.name)}")
    stem = "eval" if config.which == BEST else f"eval-{config.which}"
    check_overwrite(folder / f"{stem}.json", target.fingerprint(), tier=config.tier, rows=len(source.images), ball=ball)
    teachers = load_teachers(target, config, device)
    surrogates = load_surrogates(config, len(source.classes), device)
    with _fresh(target) as fresh:
        setup = _setup(target, source, ball, config=config, parts=folder / "eval-parts", device=device,
                       on_batch=on_batch)  # fmt: skip
        found = None if setup.random else probe(setup.model, setup)
        m = begin(setup)
        run_quick(m, teachers)
        masking = _check(m, target, config)
        alive = int(m.alive.sum())
        _run_tier(m, target, config, teachers, surrogates)
        corruptions = run_corruptions(m) if config.corruptions or config.tier == "full" else None
        m.finish()
        checks = [*outranked(m, masking.checks, alive), *([check_probe(m.setup.model, found)] if found else [])]
        checks += [check_memory(m, fresh)] if fresh and not setup.random else []
    masking = replace(masking, checks=tuple(checks))

    facts = {
        "tier": config.tier,
        "note": _note(target, config, teachers),
        "warnings": _warnings(m, target, config),
        "folded": _folded(m, target),
        "corruptions": corruptions,
    }
    report = write_report(folder, stem, target, m, masking=masking, facts=facts)
    if run is not None and folder.resolve() == run.resolve():
        write_model_card(folder, config.which)
    return report


@contextmanager
def _fresh(target: Target) -> Iterator[Fresh | None]:
    """Copies of foreign code before it is asked anything; networks that darht builds itself cannot remember."""
    if target.kind != "python" and "python:" not in str(target.about.get("arch")):
        yield None
        return
    with Fresh(target.model) as fresh:
        yield fresh


def _check(m: Measurement, target: Target, config: EvalConfig) -> Masking:
    images, queries = _MASKING_IMAGES[config.tier], min(_MASKING_QUERIES[config.tier], config.queries[1])
    if not m.setup.seeded:
        images, queries = min(images, _UNSEEDED_IMAGES), min(queries, _UNSEEDED_QUERIES)
    dropout = target.card is not None and target.card.mc_dropout > 0
    masking = check_masking(m, m.correct[:images], queries=queries, known_draws=dropout)
    return replace(masking, checks=(*masking.checks, *check_memorised(m, m.correct[:images])))


def _setup(
    target: Target, source: Source, ball: Threat, *, config: EvalConfig, parts: Path, device: torch.device,
    on_batch: OnBatch,
) -> EvalSetup:  # fmt: skip
    probe = torch.from_numpy(source.images[:32]).to(device).float() / 255
    model = _plain(target) if _is_random(target, probe) else target.model
    random = model is not target.model or draws_random_numbers(model, probe)
    seeded = not random or obeys_seed(model, probe)
    samples = (config.samples if seeded else min(config.samples, _UNSEEDED_SAMPLES)) if random else 1
    small = source.images.shape[2] <= 64
    slots = 64 if device.type == "cpu" or not small else 256
    identity: dict[str, Any] = {
        "model": target.fingerprint(),
        "data": source.sha256,
        "samples": samples,
    }
    if not random:
        with torch.no_grad():
            logits = model(probe)
        # Code around the weights may change them: the answers and their size tell.
        identity |= {"answers": logits.argmax(1).tolist(), "size": f"{float(logits.abs().mean()):.3e}"}
    return EvalSetup(
        model=Expectation(model, samples) if random else model,
        source=source,
        threat=ball,
        device=device,
        seed=config.seed,
        engine=Engine(slots=slots, lanes=1 if random else None),
        ledger=Ledger(parts, identity),
        random=random,
        seeded=seeded,
        samples=samples,
        batch=250 if device.type == "cpu" else 2000,
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


def _run_tier(
    m: Measurement, target: Target, config: EvalConfig, teachers: Mapping[str, nn.Module],
    surrogates: Mapping[str, nn.Module],
) -> None:  # fmt: skip
    """What a tier has beyond the quick one; models that were given are asked in every tier."""
    if config.tier != "quick" and not m.setup.seeded:
        m.left_out[f"tier {config.tier}"] = "no seed fixes the model's answers, so that nothing can be confirmed"
        return
    if config.tier != "quick":
        suite = _sized(config.autoattack, m.setup.threat, m.setup.engine)
        (run_reference if config.reference else run_autoattack)(m, suite)
    if config.tier == "full":
        _run_full(m, target, config, teachers, surrogates)
    elif surrogates:
        blackbox.run_surrogates(m, surrogates)


def _run_full(
    m: Measurement, target: Target, config: EvalConfig, teachers: Mapping[str, nn.Module],
    surrogates: Mapping[str, nn.Module],
) -> None:  # fmt: skip
    if target.student is not None and target.card is not None:
        names = tuple(target.card.teachers)
        said = _teachers_said(m, target, teachers)
        adaptive.run_adaptive(m, target.student, names, teachers, said, samples=m.setup.samples)
    else:
        m.left_out["adaptive"] = "these attacks know the feature map, and the model is not a student of darht"
        adaptive.run_teachers(m, teachers)
    rows = m.correct[:_BLACKBOX_IMAGES]
    blackbox.run_queries(m, rows, square=config.queries[1], rays=config.queries[0])
    blackbox.run_surrogates(m, surrogates)
    blackbox.run_substitutes(m, load_training_split(m.setup.source, target, config), config.substitution, rows)


def _teachers_said(m: Measurement, target: Target, teachers: Mapping[str, nn.Module]) -> Tensor | None:
    """What the map's teachers say about the clean images, `[N, T, C]`: from a cache of these images, or asked now."""
    assert target.card is not None
    names, cache = target.card.teachers, target.cache
    if names and cache is not None and cache.spec.data.sha256 == m.setup.source.sha256:
        stored = [torch.from_numpy(cache.read(f"logits/{name}/clean")[:, 0].astype(np.float32)) for name in names]
        return torch.stack(stored, 1).to(m.setup.device)
    if not names or any(name not in teachers for name in names):
        return None
    said = [_answers(m, teachers[name]) for name in names]
    return torch.stack(said, 1)


@torch.no_grad()
def _answers(m: Measurement, model: nn.Module) -> Tensor:
    parts = [np.arange(start, min(start + 250, m.count)) for start in range(0, m.count, 250)]
    return torch.cat([model(m.setup.tensors(rows)[0]) for rows in parts])


def _folded(m: Measurement, target: Target) -> dict[str, Any] | None:
    """The folded student beside the unfolded one, on clean images and on adversarial ones."""
    if target.student is None:
        return None
    pixels = [m.setup.tensors(rows)[0] for rows in np.array_split(np.arange(m.count), -(-m.count // 250))]
    for example in m.examples.values():
        clean = m.setup.tensors(np.array([example.row]))[0]
        pixels.append((clean + torch.from_numpy(example.delta).to(m.setup.device) / 255).clamp(0, 1))
    found = adaptive.compare_folded(target.student, target.model, pixels)
    passed = found.differing == 0 and found.largest < 1e-4
    return {"passed": passed, "images": found.images, "differing": found.differing, "largest": found.largest}


def _warnings(m: Measurement, target: Target, config: EvalConfig) -> list[str]:
    found = []
    if is_probability(torch.from_numpy(m.logits)):
        found.append("the model returns probabilities: attacks need logits, remove the softmax")
    if m.setup.random:
        found.append(f"the model's output is random: attacked and judged as the mean of {m.setup.samples} draws")
    seen = 0 if target.cache is None else trained_on(target.cache, m.setup.source)
    if seen > 0.01 * m.count:
        found.append(
            f"{seen} of {m.count} test images lie in the cache that the model was trained from: this is training "
            "accuracy, not test accuracy"
        )
    return [*m.setup.source.notes, *found, *m.warnings]


def _note(target: Target, config: EvalConfig, teachers: Mapping[str, Any]) -> str:
    note = target.note
    had = target.cache is not None and target.cache.spec.teachers
    if target.kind == "run" and had and config.teachers is not None and not teachers:
        note += "; where the teachers lie is not known, so transfer was not measured: give --teacher NAME=FOLDER"
    return note


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-")
