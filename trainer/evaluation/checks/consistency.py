"""Whether an answer depends on the pixels alone: not on neighbours, order, time, gradients or what was asked before.

Attacks and accuracies are of a function. What remembers, draws from the system's entropy or looks at the rest of its
batch is none, and what is measured on it says nothing about one image asked once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks.engine.query_model import NoGradientError
from darht.attacks.threat import LEVELS
from darht.cache.builder.answers import distances
from darht.core.rng import RowRng
from darht.trainer.evaluation.attacks.suite import pgd_20, step_of
from darht.trainer.evaluation.checks.fresh import Fresh
from darht.trainer.evaluation.checks.verdict import Check, surely_above
from darht.trainer.evaluation.measure import EvalSetup, Measurement

IMAGES = 32
_ROUNDING = 0.05  # of a row's spread: bfloat16 stays below, batch statistics far above
_CHANCE = 0.01  # of the images that may differ by rounding at a boundary
_QUESTIONS = ("clean", "pgd-20 examples", "examples of a fresh copy")
_STEPS = 10  # of the attack on copies that have seen nothing


@dataclass(frozen=True)
class Probe:
    """Answers to the same images, asked in several ways before anything else; `again` asks once more.

    Attributes:
        x: the images, `[n, 3, H, W]`.
        plain: logits in one batch, `[n, C]`.
        differing: by way of asking, images that are answered otherwise.
    """

    x: Tensor
    plain: Tensor
    differing: dict[str, int]


def probe(model: nn.Module, setup: EvalSetup) -> Probe:
    """Ask about the first images together, once more, alone, in another order beside others, and with gradients."""
    count = min(IMAGES, setup.count)
    x = setup.tensors(np.arange(count))[0]
    with torch.no_grad():
        plain = model(x)
        others = torch.cat([x.flip(0), 1 - x])
        ways = {
            "again": model(x),
            "alone": torch.cat([model(one[None]) for one in x]),
            "in another order": model(others)[:count].flip(0),
        }
    with torch.enable_grad():
        ways["with gradients"] = model(x.clone().requires_grad_()).detach()
    return Probe(x, plain, {name: _differing(plain, answers) for name, answers in ways.items()})


def check_probe(model: nn.Module, found: Probe) -> Check:
    """One check over all ways of asking, the last of them after everything has run."""
    with torch.no_grad():
        late = _differing(found.plain, model(found.x))
    differing, count = {**found.differing, "at the end": late}, len(found.x)
    most = max(differing.values())
    return Check(
        "the answer depends on the pixels alone", most == 0,
        "images are answered alike together, alone, in another order, with gradients, and at the end",
        {**{name: float(value) for name, value in differing.items()}, "of": float(count)},
        condemns=surely_above(most, count, _CHANCE),
    )  # fmt: skip


def check_memory(m: Measurement, fresh: Fresh) -> Check:
    """Ask copies that have seen nothing about clean images, PGD-20 examples, and examples made on such copies."""
    rows = m.correct[1 : IMAGES + 1]  # the first image was asked about before
    if not len(rows):
        return Check("the answer does not depend on what was asked before", True, "there is nothing to ask about",
                     {"images": 0.0}, condemns=False)  # fmt: skip
    facts = {"rows": rows.tolist(), "seed": m.setup.seed, "ball": [m.setup.threat.eps, m.setup.threat.norm]}
    counts = m.setup.ledger.get("fresh copies", facts, lambda: {"differing": np.array(_compare(m, fresh, rows))})
    differing = dict(zip(_QUESTIONS, counts["differing"].tolist(), strict=True))
    most = max(differing.values())
    return Check(
        "the answer does not depend on what was asked before", most == 0,
        "a copy that has seen nothing answers like the model that was evaluated, in another order, without the clean "
        "image first; counted are images answered otherwise",
        {**{name: float(value) for name, value in differing.items()}, "of": float(len(rows))},
        condemns=surely_above(most, len(rows), _CHANCE),
    )  # fmt: skip


def _compare(m: Measurement, fresh: Fresh, rows: np.ndarray) -> list[int]:
    """For each of the questions how many images a fresh copy answers otherwise."""
    x, y = m.setup.tensors(rows)
    stream = RowRng.create(m.setup.seed, "fresh", rows=torch.from_numpy(rows).to(m.setup.device))
    try:
        attacked = m.setup.engine.run(pgd_20(m.setup.threat), m.setup.model, x, y, generator=stream).x_adv
    except NoGradientError:
        attacked = x
    return [_changed(m, fresh, part) for part in (x, attacked, _attack(m, fresh, x, y, stream))]


def _changed(m: Measurement, fresh: Fresh, x: Tensor) -> int:
    said = fresh.logits(x.flip(0)).flip(0)
    return _differing(m.setup.ask(x).cpu(), said)


def _attack(m: Measurement, fresh: Fresh, x: Tensor, y: Tensor, stream: RowRng) -> Tensor:
    """PGD of the margin whose every gradient comes from another copy; it begins at a random point."""
    threat = m.setup.threat
    z = threat.clip(x + threat.random_start(x.shape, stream).to(x) / LEVELS, x)
    for _ in range(_STEPS):
        direction = threat.direction(fresh.gradient(z, y).to(x))
        z = threat.clip(z + 2 * step_of(threat) / LEVELS * direction, x)
    return z


def _differing(one: Tensor, other: Tensor) -> int:
    """Rows whose logits differ by more than rounding, or are not numbers."""
    return int((distances(one, other) > _ROUNDING).sum())
