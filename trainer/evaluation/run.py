"""From a model's name to a report: the main path of `darht-eval`.

Cheap attacks come before expensive ones, and what is asked of the survivors says so. Everything that ran counts for the
worst case.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks import AutoAttack, Engine, Threat
from darht.attacks.validate import is_probability
from darht.trainer.evaluation.attacks import adaptive, blackbox
from darht.trainer.evaluation.attacks.suite import run_autoattack, run_quick, run_reference
from darht.trainer.evaluation.checks.calibration import run_corruptions
from darht.trainer.evaluation.checks.consistency import check_memory, check_probe, probe
from darht.trainer.evaluation.checks.fresh import Fresh
from darht.trainer.evaluation.checks.leakage import trained_on
from darht.trainer.evaluation.checks.masking import Masking, check_masking
from darht.trainer.evaluation.checks.memorised import check_memorised
from darht.trainer.evaluation.checks.verdict import outranked
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.load import load_training_split
from darht.trainer.evaluation.measure import EvalSetup, Measurement, OnBatch, begin
from darht.trainer.evaluation.report.write import EvalReport, write_report
from darht.trainer.evaluation.setup import Case, load_case, setup_of
from darht.trainer.evaluation.target import Target
from darht.trainer.evaluation.workers import helpers
from darht.trainer.export.model_card import write_model_card

_MASKING_IMAGES = {"quick": 100, "standard": 200, "full": 500}
_MASKING_QUERIES = {"quick": 300, "standard": 1000, "full": 1000}
_BLACKBOX_IMAGES = 1000
_UNSEEDED_IMAGES, _UNSEEDED_QUERIES = 25, 50  # of what no second evaluation can confirm


def _silent(name: str, done: int, total: int, alive: int) -> None:
    """Tell nobody."""


def evaluate(
    text: str | nn.Module,
    config: EvalConfig,
    *,
    out: Path | None = None,
    device: torch.device,
    workers: int = 1,
    world: int | None = None,
    on_batch: OnBatch = _silent,
    on_note: Callable[[str], None] = lambda text: None,
) -> EvalReport:
    """Measure a model on a test split and write its report; a run's own model card is written anew with it.

    Args:
        text: what is evaluated, see `target.find`; or a module from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`.
        config: what to measure.
        out: where the report goes; None for the run itself, or `eval-NAME` here.
        device: where to compute.
        workers: processes that share the batches, this one among them; started here.
        world: how many share them where others call `assist`; None for `workers`.
        on_batch: told attack, images done (by all processes), images in all and images alive.
        on_note: told of a worker that was lost; the others do what it left.

    Raises:
        CacheError, ModelError, DataError, ConfigError: something is missing or does not fit, or a stronger one stands.
    """
    case = load_case(text, config, out, device)
    share = partial(assist, config=config, out=out, world=workers)
    with helpers(share, text, device, workers) as lost, _fresh(case.target) as fresh:

        def watch(name: str, done: int, total: int, alive: int) -> None:
            for line in lost():
                on_note(line)
            on_batch(name, done, total, alive)

        setup = setup_of(case, config, device, workers if world is None else world, watch)
        found = None if setup.random else probe(setup.model, setup)
        m, masking, alive, corruptions = _measure(case, config, setup)
        checks = [*outranked(m, masking.checks, alive), *([check_probe(m.setup.model, found)] if found else [])]
        checks += [check_memory(m, fresh)] if fresh and not setup.random else []
    masking = replace(masking, checks=tuple(checks))
    return _written(case, config, m, masking, corruptions)


def assist(text: str | nn.Module, device: torch.device, *, config: EvalConfig, out: Path | None, world: int) -> None:
    """Do a share of what another process measures by `evaluate`, with the same arguments; nothing is written but it.

    Args:
        text: see `evaluate`.
        device: where this process computes.
        config: see `evaluate`.
        out: see `evaluate`; the folder is one for all, also where processes are on several machines.
        world: how many processes share the evaluation.

    Raises:
        CacheError, ModelError, DataError, ConfigError: see `evaluate`.
    """
    case = load_case(text, config, out, device)
    setup = setup_of(case, config, device, world, _silent)
    if setup.seeded:  # else no two processes have the same answers
        _measure(case, config, setup)


def _measure(
    case: Case, config: EvalConfig, setup: EvalSetup
) -> tuple[Measurement, Masking, int, dict[str, Any] | None]:
    """The book when everything has run, the checks, the images alive after the quick tier, and the corruptions."""
    m = begin(setup)
    run_quick(m, case.teachers)
    masking = _check(m, case.target, config)
    alive = int(m.alive.sum())
    _run_tier(m, case.target, config, case.teachers, case.surrogates)
    corruptions = run_corruptions(m) if config.corruptions or config.tier == "full" else None
    m.finish()
    return m, masking, alive, corruptions


def _written(
    case: Case, config: EvalConfig, m: Measurement, masking: Masking, corruptions: dict[str, Any] | None
) -> EvalReport:
    facts = {
        "tier": config.tier,
        "note": _note(case.target, config, case.teachers),
        "warnings": _warnings(m, case.target, config),
        "folded": _folded(m, case.target),
        "corruptions": corruptions,
    }
    report = write_report(case.folder, case.stem, case.target, m, masking=masking, facts=facts)
    if case.run is not None and case.folder.resolve() == case.run.resolve():
        write_model_card(case.folder, config.which)
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
        stored = [torch.from_numpy(cache.logits(name).astype(np.float32)) for name in names]
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
