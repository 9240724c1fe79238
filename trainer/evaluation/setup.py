"""What an evaluation is of, loaded and probed: the model, its images, other models, and where the report goes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darht.attacks import Engine, Threat
from darht.attacks.engine.engine import FULL
from darht.cache.sources.load import Source
from darht.trainer.evaluation.attacks.eot import Expectation, draws_random_numbers, obeys_seed
from darht.trainer.evaluation.attacks.suite import check_reference
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.ledger import Ledger
from darht.trainer.evaluation.load import load_model_and_data, load_surrogates, load_teachers
from darht.trainer.evaluation.measure import EvalSetup, OnBatch
from darht.trainer.evaluation.report.overwrite_guard import check_overwrite
from darht.trainer.evaluation.target import Target
from darht.trainer.state.checkpoint import BEST
from darht.trainer.student.model import Student

_UNSEEDED_SAMPLES = 2  # of what no second evaluation can confirm


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is evaluated, loaded, and where its report goes.

    Attributes:
        target: the model.
        source: the images it is asked about.
        ball: what the attacks stay in.
        teachers: whose examples it is asked about, by name.
        surrogates: independently trained models, by name.
        run: the run that the model belongs to; None for other models.
        folder: of the report, and of what was measured so far.
        stem: of the report's files.
    """

    target: Target
    source: Source
    ball: Threat
    teachers: Mapping[str, nn.Module]
    surrogates: Mapping[str, nn.Module]
    run: Path | None
    folder: Path
    stem: str


def load_case(text: str | nn.Module, config: EvalConfig, out: Path | None, device: torch.device) -> Case:
    """Load what `config` names; a report goes to `out`, or into the run, or to `eval-NAME` here.

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
    return Case(
        target=target,
        source=source,
        ball=ball,
        teachers=load_teachers(target, config, device),
        surrogates=load_surrogates(config, len(source.classes), device),
        run=run,
        folder=folder,
        stem=stem,
    )


def setup_of(case: Case, config: EvalConfig, device: torch.device, world: int, on_batch: OnBatch) -> EvalSetup:
    """How a model is asked: whether its answers are random, batches, threads; `world` processes share the ledger."""
    target, source = case.target, case.source
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
        threat=case.ball,
        device=device,
        seed=config.seed,
        engine=Engine(slots=slots, lanes=1 if random else _lanes(world, device)),
        transfer_engine=replace(FULL, lanes=_lanes(world, device)),
        ledger=Ledger(case.folder / "eval-parts", identity, shared=world > 1 and seeded),
        random=random,
        seeded=seeded,
        samples=samples,
        batch=250 if device.type == "cpu" else 1000,  # ten shares of 10,000 images
        on_batch=on_batch,
    )


def _lanes(world: int, device: torch.device) -> int | None:
    """A process's share of the threads; None for what an engine takes by itself."""
    return max(1, torch.get_num_threads() // world) if world > 1 and device.type == "cpu" else None


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


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-")
